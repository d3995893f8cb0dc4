"""Variables equal the same program with its variables passed and returned by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.params.counting import (
    KEY,
    LOOPS,
    assert_same,
    both,
    counter,
    ones,
)


def count(net, x):
    """The count after one application, eagerly and jitted."""
    params, state = net.init_with_state(KEY, x)
    assert int(state["counter"]["n"]) == 0
    found = [f(params, state, x)[1]["counter"]["n"] for f in both(net.apply_with_state)]
    assert found[0] == found[1] and found[0].dtype == jnp.int32
    return int(found[0])


# -- Loops and branches: counter == steps ----------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_counter_is_the_number_of_steps(loop, steps):
    if loop == "python" and steps == 0:
        return  # no loop at all: no variable

    def net(x):
        LOOPS[loop](counter, x, steps)

    assert count(jaxstate.parametrized(net), 0.5) == steps


def test_the_condition_of_a_while_loop_reads_and_writes():
    @jaxstate.parametrized
    def net(limit):
        left = jaxstate.variable("left", lambda: jnp.int32(5))
        tests = jaxstate.variable("tests", jnp.zeros, (), jnp.int32)

        def condition(i):
            tests.value += 1
            return (left.value > 0) & (i < limit)

        def body(i):
            left.value -= 2
            return i + 1

        return lax.while_loop(condition, body, 0)

    params, state = net.init_with_state(KEY, 9)
    for limit, left, tests in ((9, -1, 4), (1, 3, 2), (0, 5, 1)):
        for apply in both(net.apply_with_state):
            turns, new = apply(params, state, limit)
            assert (int(new["left"]), int(new["tests"]), int(turns)) == (left, tests, tests - 1)


@pytest.mark.parametrize("taken", [True, False])
def test_what_one_branch_writes_and_the_other_leaves_passes_through(taken):
    @jaxstate.parametrized
    def net(p, x):
        a = jaxstate.variable("a", jnp.ones, ())
        b = jaxstate.variable("b", jnp.ones, ())

        def write_a(x):
            a.value = a.value + x
            return a.value

        def write_b(x):
            b.value = b.value * x
            return x

        y = lax.cond(p, write_a, write_b, x)
        return y + lax.switch(jnp.int32(p), [lambda: a.value, lambda: 2 * b.value])

    params, state = net.init_with_state(KEY, taken, 3.0)
    for apply in both(net.apply_with_state):
        y, new = apply(params, state, taken, 3.0)
        a, b = (4.0, 1.0) if taken else (1.0, 3.0)
        assert_same(new, {"a": jnp.float32(a), "b": jnp.float32(b)})
        assert float(y) == (4.0 + 2 * b if taken else 3.0 + a)


def carry_sizes(jaxpr):
    (scan,) = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    return len(scan.outvars)


def test_only_what_is_written_is_carried():
    @jaxstate.parametrized
    def net(x):
        read_only = jaxstate.variable("read_only", jnp.ones, ())
        written = jaxstate.variable("written", jnp.ones, ())
        jaxstate.variable("unused", jnp.ones, ())

        def body(x, _):
            written.value = written.value * read_only.value
            return x + written.value, None

        return lax.scan(body, x, length=3)[0]

    params, state = net.init_with_state(KEY, 1.0)
    jaxpr = jax.make_jaxpr(net.apply_with_state)(params, state, 1.0)
    assert carry_sizes(jaxpr) == 2  # x, written


# -- init ------------------------------------------------------------------------------------


def test_init_gives_the_values_that_variables_start_with_wherever_they_are_made():
    def made(name, value):
        v = jaxstate.variable(name, jnp.full, (2,), value)
        v.value = v.value + 1

    @jax.custom_jvp
    def with_rule(x):
        made("custom_jvp", 5.0)
        return x

    with_rule.defjvp(lambda p, t: (with_rule(*p), t[0]))

    @jaxstate.parametrized
    def net(x):
        made("top", 0.0)
        jax.jit(made, static_argnums=(0, 1))("jit", 1.0)
        lax.fori_loop(0, 0, lambda i, c: made("loop", 2.0), None)
        lax.cond(x > 0, lambda: None, lambda: made("branch", 3.0))
        jax.vmap(lambda x: made("vmap", 4.0))(jnp.ones(3))
        with_rule(x)
        jax.checkpoint(lambda: made("checkpoint", 6.0))()
        jax.grad(lambda x: (made("grad", 7.0), x)[1])(x)
        return x * jaxstate.param("w", ones, ())

    names = ["top", "jit", "loop", "branch", "vmap", "custom_jvp", "checkpoint", "grad"]
    wanted = {name: jnp.full((2,), float(i)) for i, name in enumerate(names)}
    for init in (net.init_with_state, jax.jit(net.init_with_state)):
        params, state = init(KEY, 1.0)
        assert_same(state, wanted)
        assert_same(params, {"w": jnp.float32(1.0)})
    params, state = net.init_with_state(KEY, jax.ShapeDtypeStruct((), jnp.float32))
    assert sorted(state) == sorted(names)
    assert_same(state, wanted)
    assert_same(net.init(KEY, 1.0), {"w": jnp.float32(1.0)})
    shapes = jax.eval_shape(net.init_with_state, KEY, 1.0)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, (params, state))


def test_init_does_no_arithmetic_of_the_forward_pass():
    ran = []

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())
        v.value = v.value + jnp.sin(x)
        jax.debug.callback(lambda v: ran.append(v), v.value)
        return v.value

    jaxpr = jax.make_jaxpr(lambda x: net.init_with_state(KEY, x))(1.0)
    assert "sin" not in str(jaxpr)
    net.init_with_state(KEY, 1.0)
    jax.effects_barrier()
    assert ran == []


def test_an_initializer_may_look_at_data_and_at_other_state():
    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", ones, (3,))
        low = jaxstate.variable("low", lambda: x.min(0))
        copy = jaxstate.variable("copy", lambda w: {"ema": w, "steps": 0}, w)

        def body(c, _):
            inner = jaxstate.variable("inner", lambda: 2 * x[0])
            inner.value = inner.value + c
            return c, None

        lax.scan(body, low.value, length=2)
        return copy.value["ema"]

    x = jnp.arange(6.0).reshape(2, 3)
    params, state = net.init_with_state(KEY, x)
    wanted = {
        "low": x[0],
        "copy": {"ema": jnp.ones(3), "steps": jnp.int32(0)},
        "inner": 2 * x[0],
    }
    assert_same(state, wanted)
    _, state = net.apply_with_state(params, state, x)
    assert_same(state, {**wanted, "inner": 2 * x[0] + 2 * x[0]})


# -- apply -----------------------------------------------------------------------------------


def test_unwritten_and_unread_entries_are_returned_unchanged():
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", lambda: {"a": jnp.zeros(2), "b": [jnp.zeros(()), jnp.ones(())]})
        jaxstate.variable("left", jnp.zeros, ())
        value = v.value
        v.value = {"a": value["a"] + x, "b": [value["b"][0] - x, value["b"][1]]}

    _, state = net.init_with_state(KEY, 1.0)
    assert_same(state["v"], {"a": jnp.zeros(2), "b": [jnp.float32(0), jnp.float32(1)]})
    state["other"] = {"deep": {"x": np.arange(3)}}
    before = jax.tree.map(np.array, state)
    for apply in both(net.apply_with_state):
        _, new = apply({}, state, 2.0)
        assert type(new["v"]) is type(new["other"]["deep"]) is dict
        changed = {"a": jnp.full(2, 2.0), "b": [jnp.float32(-2), jnp.float32(1)]}
        assert_same(new, {**before, "v": changed})
        new["v"]["b"][0] = new["other"]["deep"]["x"] = None  # the caller's own
        assert_same(state, before)


def test_apply_reads_variables_and_refuses_to_write_them():
    @jaxstate.parametrized
    def net(x, train):
        v = jaxstate.variable("v", jnp.zeros, ())
        if train:
            v.value = v.value + 1
        return jax.jit(lambda x: lax.fori_loop(0, 3, lambda i, x: x + v.value, x))(x)

    state = {"v": jnp.float32(2.0)}
    assert float(net.apply({}, 1.0, False, state=state)) == 7.0
    grad = jax.grad(lambda state: net.apply({}, 1.0, False, state=state))(state)
    assert_same(grad, {"v": jnp.float32(3.0)})


def test_reading_under_apply_is_a_capture_that_every_primitive_takes():
    @jax.custom_batching.custom_vmap
    def doubled(x):
        return 2 * x * jaxstate.variable("v", jnp.ones, ()).value

    doubled.def_vmap(lambda size, batched, x: (doubled(x), batched[0]))

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())
        y = lax.custom_linear_solve(lambda y: y * v.value, x, lambda f, b: b / f(1.0))
        return y + jax.jit(doubled)(x)

    assert float(net.apply({}, 6.0, state={"v": 3.0})) == 2.0 + 36.0


def test_one_jitted_function_under_other_state_and_in_other_scopes():
    traced = []

    @jax.jit
    def step(x):
        traced.append(None)
        total = jaxstate.variable("total", jnp.zeros, ())
        total.value = total.value + x
        return total.value

    @jaxstate.parametrized
    def net(x):
        with jaxstate.scope("a"):
            y = step(x)
        with jaxstate.scope("b"):
            return step(y) + step(x)

    _, state = net.init_with_state(KEY, 1.0)
    assert_same(state, {"a": {"total": jnp.float32(0)}, "b": {"total": jnp.float32(0)}})
    traced.clear()
    for start in (0.0, 5.0):
        state = {"a": {"total": start}, "b": {"total": 2 * start}}
        y, new = net.apply_with_state({}, state, jnp.float32(1.0))
        a, b = start + 1, 2 * start + start + 1
        assert_same(new, {"a": {"total": jnp.float32(a)}, "b": {"total": jnp.float32(b + 1)}})
        assert float(y) == b + (b + 1)
    assert len(traced) == 1
    wide = {"a": {"total": jnp.bfloat16(1)}, "b": {"total": jnp.bfloat16(1)}}
    _, new = net.apply_with_state({}, wide, jnp.bfloat16(1))
    assert new["b"]["total"].dtype == jnp.bfloat16


def test_a_module_used_twice_shares_its_variables_and_two_modules_do_not():
    def make():
        @jaxstate.parametrized
        def counter(x):
            n = jaxstate.variable("n", jnp.zeros, (), jnp.int32)
            n.value += 1
            return x

        return counter

    one, two = make(), make()

    @jaxstate.parametrized
    def part(x):
        return jax.jit(one)(x)

    @jaxstate.parametrized
    def net(x):
        return part(one(jax.jit(two)(lax.fori_loop(0, 3, lambda i, x: one(x), x))))

    _, state = net.init_with_state(KEY, 1.0)
    for apply in both(net.apply_with_state):
        _, new = apply({}, state, 1.0)
        assert_same(new, {"counter": {"n": jnp.int32(5)}, "counter_1": {"n": jnp.int32(1)}})


def test_names_are_given_in_the_order_of_the_program_jitted_or_not():
    def make():
        @jaxstate.parametrized
        def m(write, x):
            v = jaxstate.variable("v", jnp.zeros, ())
            if write:
                v.value = x
            return v.value

        return m

    one, two = make(), make()

    def f(x):
        return one(True, x) + two(False, x)

    for g in both(f):
        _, state = jaxstate.parametrized(g).apply_with_state(
            {}, {"m": {"v": 1.0}, "m_1": {"v": 2.0}}, 5.0
        )
        assert float(state["m"]["v"]) == 5.0


# -- Handles ---------------------------------------------------------------------------------


def test_a_handle_means_the_scope_where_it_was_made():
    @jaxstate.parametrized
    def layer(x, total):
        mine = jaxstate.variable("total", jnp.zeros, ())
        mine.value = mine.value + 1
        total.value = total.value + x
        with jaxstate.scope("deep"):
            total.value = total.value + x
        return total.value

    @jaxstate.parametrized
    def net(x):
        with jaxstate.scope("root"):
            total = jaxstate.variable("total", jnp.zeros, ())

        def body(c, _):
            with jaxstate.scope("body"):
                jax.jit(lambda c: layer(c, total))(c)
                inside = jaxstate.variable("inside", jnp.zeros, ())

                @jax.checkpoint
                def more():
                    with jaxstate.scope("more"):
                        inside.value = inside.value + total.value

                more()
            return c, None

        lax.scan(body, x, length=2)
        return total.value

    _, state = net.init_with_state(KEY, 1.0)
    assert sorted(state) == ["body", "root"]
    for apply in both(net.apply_with_state):
        y, new = apply({}, state, 3.0)
        assert_same(
            new,
            {
                "root": {"total": jnp.float32(12)},
                "body": {"layer": {"total": jnp.float32(2)}, "inside": jnp.float32(18)},
            },
        )
        assert float(y) == 12.0


def test_a_function_that_closes_over_a_handle_is_right_in_two_scopes():
    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())

        @jax.jit
        def step(x):
            n.value = n.value + x

        step(x)
        with jaxstate.scope("a"):
            step(x)
            other = jaxstate.variable("n", jnp.zeros, ())
            step(x)
        return other.value

    _, state = net.init_with_state(KEY, 1.0)
    for apply in both(net.apply_with_state):
        assert_same(apply({}, state, 2.0), (jnp.float32(0), {"n": jnp.float32(6), "a": {"n": 0.0}}))


def test_without_jit_it_is_the_same():
    def make():
        return jaxstate.parametrized(counter.fn, name="counter")

    one, two = make(), make()

    @jaxstate.parametrized
    def net(x):
        x = lax.fori_loop(0, 3, lambda i, x: one(x), x)
        return lax.cond(x > 9, one, two, x)

    state = net.init_with_state(KEY, 1.0)[1]
    with jax.disable_jit():
        _, new = net.apply_with_state({}, state, 1.0)
        assert_same(net.init_with_state(KEY, 1.0)[1], state)
    assert_same(new, net.apply_with_state({}, state, 1.0)[1])
    assert_same(new, {"counter": {"n": jnp.int32(3)}, "counter_1": {"n": jnp.int32(1)}})
