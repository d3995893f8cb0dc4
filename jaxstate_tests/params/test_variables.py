"""Variables equal the same program with its variables passed and returned by hand."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxstate

KEY = jax.random.key(0)
ones = jax.nn.initializers.ones
refusal = pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")


def assert_same(found, wanted, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert not isinstance(a, jax.core.Tracer)
        assert jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 1e-6}))


def both(f):
    return f, jax.jit(f)


@jaxstate.parametrized
def counter(x):
    n = jaxstate.variable("n", jnp.zeros, (), jnp.int32)
    n.value += 1
    return x


def count(net, x):
    """The count after one application, eagerly and jitted."""
    params, state = net.init_with_state(KEY, x)
    assert int(state["counter"]["n"]) == 0
    found = [f(params, state, x)[1]["counter"]["n"] for f in both(net.apply_with_state)]
    assert found[0] == found[1] and found[0].dtype == jnp.int32
    return int(found[0])


# -- Loops and branches: counter == steps ----------------------------------------------------

LOOPS = {
    "python": lambda f, x, n: [x := f(x) for _ in range(n)],
    "scan": lambda f, x, n: lax.scan(lambda c, _: (f(c), None), x, length=n)[0],
    "fori": lambda f, x, n: lax.fori_loop(0, n, lambda _, c: f(c), x),
    "fori_traced": lambda f, x, n: lax.fori_loop(0, jnp.int32(n), lambda _, c: f(c), x),
    "while": lambda f, x, n: lax.while_loop(
        lambda c: c[0] < n, lambda c: (c[0] + 1, f(c[1])), (jnp.int32(0), x)
    ),
    "jit_in_scan": lambda f, x, n: lax.scan(lambda c, _: (jax.jit(f)(c), None), x, length=n)[0],
    "scan_in_scan": lambda f, x, n: lax.scan(
        lambda c, _: (LOOPS["scan"](f, c, 1), None), x, length=n
    )[0],
    "map": lambda f, x, n: lax.map(f, jnp.zeros(n)),
    "grad_of_scan": lambda f, x, n: jax.grad(lambda x: LOOPS["scan"](f, x, n))(x),
    "checkpoint": lambda f, x, n: LOOPS["scan"](jax.checkpoint(f), x, n),
    "vmap": lambda f, x, n: jax.vmap(lambda x: LOOPS["scan"](f, x, n))(jnp.zeros(3)),
}


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


# -- Derivatives -----------------------------------------------------------------------------


def through_a_variable(x):
    """x ** 4, by way of a variable that is written, updated in a loop and read under jit."""
    v = jaxstate.variable("v", jnp.ones, ())
    v.value = x

    def body(c, _):
        v.value = v.value * x
        return c, None

    lax.scan(body, 0.0, length=2)
    return jax.jit(lambda: v.value * x)()


@pytest.mark.parametrize(
    "derivative, wanted",
    [
        (jax.grad, 32.0),
        (jax.jacfwd, 32.0),
        (lambda f: jax.grad(jax.checkpoint(f)), 32.0),
        (lambda f: jax.grad(jax.jit(f)), 32.0),
        (lambda f: lambda x: jax.linearize(f, x)[1](1.0), 32.0),
        (lambda f: jax.grad(jax.grad(f)), 48.0),
        (lambda f: jax.jacfwd(jax.jacrev(f)), 48.0),
    ],
)
def test_gradients_flow_through_a_variable_and_what_leaves_is_the_value(derivative, wanted):
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())
        g = derivative(through_a_variable)(x)
        return g, v.value  # outside of the region: the value

    for apply in both(net.apply_with_state):
        out, state = apply({}, {"v": 5.0}, 2.0)
        assert_same(out, (jnp.float32(wanted), jnp.float32(8.0)))
        assert_same(state, {"v": jnp.float32(8.0)})


def test_derivatives_with_respect_to_the_given_state():
    net = jaxstate.parametrized(
        lambda x: lax.fori_loop(0, 3, lambda i, x: accumulate(x), x), name="net"
    )

    def accumulate(x):
        v = jaxstate.variable("v", jnp.ones, ())
        v.value = v.value * x
        return jnp.sin(v.value + x)

    def by_hand(v, x):
        for _ in range(3):
            v = v * x
            x = jnp.sin(v + x)
        return x, v

    def loss(v, x):
        y, state = net.apply_with_state({}, {"v": v}, x)
        return y * state["v"]

    def loss_by_hand(v, x):
        y, v = by_hand(v, x)
        return y * v

    for f in both(jax.grad(loss, (0, 1))):
        wanted = jax.grad(loss_by_hand, (0, 1))(1.5, 0.5)
        np.testing.assert_allclose(f(1.5, 0.5), wanted, rtol=1e-5)


# -- Custom rules ----------------------------------------------------------------------------


def with_rule(kind, f):
    """``f`` with a rule that is not its derivative, so that losing it shows."""
    if kind == "custom_jvp":
        g = jax.custom_jvp(lambda x: f(x))
        g.defjvp(lambda p, t: (f(*p), 3 * t[0]))
    else:
        g = jax.custom_vjp(lambda x: f(x))
        g.defvjp(lambda x: (f(x), None), lambda _, ct: (3 * ct,))
    return g


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
def test_custom_rules_keep_their_rule_and_move_variables_once(kind):
    @jaxstate.parametrized
    def net(x):
        outer = jaxstate.variable("outer", jnp.zeros, ())

        def f(x):
            n = jaxstate.variable("n", jnp.zeros, ())
            n.value = n.value + x
            outer.value = outer.value + n.value
            return x * n.value

        g = with_rule(kind, f)
        value = lax.scan(lambda c, _: (g(c), None), x, length=2)[0]
        return value, jax.grad(lambda x: g(x))(x)

    def by_hand(x):
        n, outer, c = 0.0, 0.0, x
        for _ in range(2):
            n = n + c
            outer, c = outer + n, c * n
        n = n + x
        return {"n": n, "outer": outer + n}, c

    params, state = net.init_with_state(KEY, 1.5)
    wanted, value = by_hand(jnp.float32(1.5))
    for apply in both(net.apply_with_state):
        (y, g), new = apply(params, state, 1.5)
        assert_same(new, wanted)
        assert (float(y), float(g)) == (float(value), 3.0)


# -- Lanes -----------------------------------------------------------------------------------


def test_lanes_read_and_write_what_is_the_same_for_all():
    @jaxstate.parametrized
    def net(xs):
        n = jaxstate.variable("n", jnp.zeros, ())

        def lane(x):
            n.value = n.value + lax.pmean(x, "i")
            return x - n.value

        return jax.vmap(jax.jit(lane), axis_name="i")(xs)

    xs = jnp.arange(4.0)
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"n": 1.0}, xs), (xs - 2.5, {"n": jnp.float32(2.5)}))


def reducing(f, reduce):
    """``f(x, v) -> (y, v)`` by way of a variable, in each of a few transformations of it."""

    def one(x):
        v = jaxstate.variable("v", jnp.ones, (), reduce=reduce)
        y, v.value = f(x, v.value)
        return y + v.value

    def one_by_hand(x, v):
        y, v = f(x, v)
        return y + v, v

    def twice(x):
        return one(one(x))

    def twice_by_hand(x, v):
        return one_by_hand(*one_by_hand(x, v))

    yield "once", one, one_by_hand
    yield "twice", twice, twice_by_hand
    yield "jit", jax.jit(twice), twice_by_hand
    yield "scan", lambda x: lax.scan(lambda c, _: (one(c), None), x, length=2)[0], twice_by_hand
    yield (
        "cond",
        lambda x: lax.cond(x > 1.5, twice, lambda x: -x, x),
        lambda x, v: lax.cond(x > 1.5, twice_by_hand, lambda x, v: (-x, v), x, v),
    )
    yield (
        "while",
        lambda x: lax.while_loop(lambda x: x < 9, one, x),
        lambda x, v: lax.while_loop(lambda c: c[0] < 9, lambda c: one_by_hand(*c), (x, v)),
    )
    yield "checkpoint", jax.checkpoint(twice), twice_by_hand
    yield (
        "grad",
        jax.grad(twice),
        lambda x, v: jax.grad(twice_by_hand, has_aux=True)(x, v),
    )


CASES = list(reducing(lambda x, v: (x + 0.5 * v, 0.5 * v * x), jnp.mean))


@pytest.mark.parametrize("name, lane, by_hand", CASES, ids=[name for name, *_ in CASES])
@pytest.mark.parametrize("nested", [False, True])
def test_reduce_makes_one_value_of_the_lanes_values(name, lane, by_hand, nested):
    """Each lane goes on with its own value inside, as by hand; outside is the reduction."""

    @jaxstate.parametrized
    def net(xs):
        f = jax.vmap(jax.vmap(lane)) if nested else jax.vmap(lane)
        y = f(xs)
        return y, jaxstate.variable("v", jnp.ones, ()).value

    def net_by_hand(xs, v):
        f = by_hand
        for _ in range(1 + nested):
            f = with_mean(f)
        y, v = f(xs, v)
        return (y, v), {"v": v}

    def with_mean(f):
        def run(xs, v):
            ys, vs = jax.vmap(f, (0, None))(xs, v)
            return ys, jnp.mean(vs, axis=0)

        return run

    xs = jnp.arange(1.0, 5.0)
    xs = jnp.stack([xs, 2 * xs]) if nested else xs
    wanted = net_by_hand(xs, jnp.float32(2.0))
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, xs), wanted, rtol=1e-5)

    def loss(xs, v):
        (y, v), _ = net.apply_with_state({}, {"v": v}, xs)
        return y.sum() + v**2

    def loss_by_hand(xs, v):
        (y, v), _ = net_by_hand(xs, v)
        return y.sum() + v**2

    if name != "while":
        wanted = jax.grad(loss_by_hand, (0, 1))(xs, 2.0)
        for gradient in both(jax.grad(loss, (0, 1))):
            assert_same(gradient(xs, 2.0), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
@pytest.mark.parametrize("order", ["vmap(grad(rule))", "grad(rule(vmap))", "grad(vmap(rule))"])
def test_reduce_in_functions_with_custom_rules(kind, order):
    @jaxstate.parametrized
    def net(xs):
        v = jaxstate.variable("v", jnp.ones, (), reduce=jnp.mean)

        def f(x):
            v.value = v.value * x
            return v.value + x

        if order == "vmap(grad(rule))":
            return jax.vmap(jax.grad(with_rule(kind, f)))(xs), v.value
        g = with_rule(kind, jax.vmap(f)) if "rule(vmap" in order else jax.vmap(with_rule(kind, f))
        return jax.grad(lambda xs: g(xs).sum())(xs), v.value

    xs = jnp.arange(3.0)
    wanted = (jnp.full(3, 3.0), jnp.float32(2.0)), {"v": jnp.float32(2.0)}
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, xs), wanted)


def test_lanes_in_a_loop_start_from_what_the_last_lanes_left():
    @jaxstate.parametrized
    def net(xs):
        def body(c, _):
            v = jaxstate.variable("v", lambda: {"a": 1.0}, reduce=jnp.mean)

            def lane(x):
                v.value = {"a": v.value["a"] * x + c}
                return v.value["a"]

            ys = jax.vmap(lane)(xs)
            return c + v.value["a"] + ys.sum(), ys

        return lax.scan(body, 0.5, length=3)

    def by_hand(v, xs):
        def body(carry, _):
            c, v = carry
            ys = v * xs + c
            v = ys.mean()
            return (c + v + ys.sum(), v), ys

        (c, v), ys = lax.scan(body, (0.5, v), length=3)
        return (c, ys), {"v": {"a": v}}

    xs = jnp.arange(3.0)
    for apply in both(net.apply_with_state):
        wanted = by_hand(jnp.float32(1.5), xs)
        assert_same(apply({}, {"v": {"a": 1.5}}, xs), wanted, rtol=1e-5)


def test_an_explicit_apply_inside_has_its_own_state():
    @jaxstate.parametrized
    def inner(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        n.value = n.value + x
        return n.value

    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        n.value = n.value + 10
        y, explicit = inner.apply_with_state({}, {"n": x}, 1.0)
        apply = jax.vmap(inner.apply_with_state, (None, 0, None))
        _, lanes = jax.jit(apply)({}, {"n": jnp.arange(3.0)}, y)
        return inner(y), explicit, lanes, n.value

    state = {"n": jnp.float32(1), "inner": {"n": jnp.float32(2)}}
    for apply in both(net.apply_with_state):
        y = jnp.float32(6)
        wanted = y + 2, {"n": y}, {"n": jnp.arange(3.0) + y}, jnp.float32(11)
        left = {"n": jnp.float32(11), "inner": {"n": y + 2}}
        assert_same(apply({}, state, 5.0), (wanted, left))


def test_reduce_is_for_values_that_differ_and_sees_them_once():
    seen = []

    def total(values, axis):
        seen.append(values.shape)
        return values.sum(axis)

    @jaxstate.parametrized
    def net(xs):
        hits = jaxstate.variable("hits", jnp.zeros, (), reduce=total)

        def lane(x):
            hits.value = x
            differs = hits.value
            hits.value = 7.0
            return differs + hits.value

        jax.vmap(lane)(xs)
        before = hits.value

        def last(x):
            hits.value = x

        jax.vmap(last, axis_name="i")(xs)
        return before

    out, state = net.apply_with_state({}, {"hits": 1.0}, jnp.arange(3.0))
    assert_same((out, state), (jnp.float32(7), {"hits": jnp.float32(3)}))
    assert seen == [(3,), (3,)]


def test_a_state_per_lane_outside_of_apply():
    params, state = {}, {"n": jnp.arange(3.0)}

    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        lax.fori_loop(0, 2, lambda i, _: setattr(n, "value", n.value + x), None)
        return lax.cond(x > 1, lambda: n.value, lambda: 0.0)

    xs = jnp.arange(3.0)
    for apply in both(jax.vmap(net.apply_with_state, (None, 0, 0))):
        assert_same(apply(params, state, xs), (jnp.array([0.0, 0.0, 6.0]), {"n": 3 * xs}))
    _, states = jax.vmap(net.init_with_state, (None, 0))(KEY, xs)
    assert_same(states, {"n": jnp.zeros(3)})


def test_hessian_and_jacfwd_write_values_not_directions():
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, (3,), reduce=jnp.sum)

        def f(x):
            v.value = v.value + x**2
            return (v.value * x).sum()

        return jax.hessian(f)(x), jax.jacfwd(f)(x)

    def by_hand(x, v):
        def f(x, v):
            return ((v + x**2) * x).sum(), v + x**2

        h = jax.hessian(lambda x: f(x, v)[0])(x)
        v = f(x, v)[1]
        g = jax.jacfwd(lambda x: f(x, v)[0])(x)
        return (h, g), {"v": f(x, v)[1]}

    x = jnp.arange(1.0, 4.0)
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": jnp.ones(3)}, x), by_hand(x, jnp.ones(3)), rtol=1e-5)


# -- Devices ---------------------------------------------------------------------------------


def test_devices_read_a_replicated_variable():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())
        return jax.shard_map(lambda x: x * v.value, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    for f in (net, jaxstate.parametrized(jax.jit(net.fn))):
        assert_same(f.apply({}, jnp.arange(4.0), state={"v": 2.0}), 2 * jnp.arange(4.0))
    out, _ = net.apply_with_state({}, {"v": 2.0}, jnp.arange(4.0))
    assert_same(out, 2 * jnp.arange(4.0))


@refusal
def test_a_value_of_one_device_is_not_one_for_all():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())

        def on_device(x):
            v.value = x.sum()
            return x

        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    for apply in both(net.apply_with_state):
        with pytest.raises(jaxstate.DeviceWriteError, match="variable 'v'"):
            apply({}, {"v": 0.0}, jnp.ones(2))
    with pytest.raises(jaxstate.DeviceWriteError, match="variable 'v'"):
        net.init_with_state(KEY, jnp.ones(2))


def test_devices_write_one_value():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())

        def on_device(x):
            v.value = 0.5 * v.value + lax.psum(x.sum(), "d")
            return x * v.value

        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    x = jnp.arange(4.0)
    assert_same(net.init_with_state(KEY, x)[1], {"v": jnp.float32(1)})
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, x), (7 * x, {"v": jnp.float32(7)}))


@refusal
@pytest.mark.parametrize("reduce", [None, jnp.sum])
@pytest.mark.parametrize(("results", "spec", "says"), [
    (lambda x, n: {"y": x, "n": n}, {"y": PartitionSpec(), "n": PartitionSpec()},
     r"(?s)require replication.*out_specs\['y'\] is P\(\)"),
    (lambda x, n: (n, x), PartitionSpec("d"), r"(?s)too long.*\[0\].* has rank 0"),
], ids=["replication", "rank"])  # fmt: skip
def test_jax_says_which_results_of_devices_that_write_do_not_fit(results, spec, says, reduce):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, (), reduce=reduce)

        def on_device(x):
            v.value = v.value + 1
            return results(x, v.value)

        return jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=spec)(x)

    runs = (
        lambda: net.init_with_state(KEY, jnp.ones(2)),
        lambda: jax.jit(net.apply_with_state)({}, {"v": 0.0}, jnp.ones(2)),
    )
    for run in runs:
        with pytest.raises(ValueError, match=says):
            run()


# -- Batch norm ------------------------------------------------------------------------------


def statistics(x, axis_name=None):
    mean, square = x.mean(0), (x**2).mean(0)
    if axis_name:
        mean, square = lax.pmean((mean, square), axis_name)
    return mean, square - mean**2


def batch_norm(axis_name=None):
    @jaxstate.parametrized
    def batch_norm(x):
        scale = jaxstate.param("scale", ones, x.shape[-1:])
        running = jaxstate.variable("mean", jnp.zeros, x.shape[-1:])
        running_var = jaxstate.variable("var", jnp.ones, x.shape[-1:])
        mean, var = statistics(x, axis_name)
        running.value = 0.9 * running.value + 0.1 * mean
        running_var.value = 0.9 * running_var.value + 0.1 * var
        return scale * (x - mean) / jnp.sqrt(var + 1e-5)

    return batch_norm


def batch_norm_by_hand(p, s, x, axis_name=None):
    mean, var = statistics(x, axis_name)
    s = {"mean": 0.9 * s["mean"] + 0.1 * mean, "var": 0.9 * s["var"] + 0.1 * var}
    return p["scale"] * (x - mean) / jnp.sqrt(var + 1e-5), s


def model(norm, wrap=lambda f: f):
    norms = [norm, batch_norm()]

    @jaxstate.parametrized
    def model(x):
        x = jnp.tanh(wrap(norms[0])(x) @ jnp.ones((3, 3)))
        return norms[1](jax.checkpoint(jnp.sin)(x))

    return model


def model_by_hand(p, s, x):
    y, first = batch_norm_by_hand(p["batch_norm"], s["batch_norm"], x)
    x = jnp.tanh(y @ jnp.ones((3, 3)))
    y, second = batch_norm_by_hand(p["batch_norm_1"], s["batch_norm_1"], jnp.sin(x))
    return y, {"batch_norm": first, "batch_norm_1": second}


BATCH = jax.random.normal(jax.random.key(1), (8, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_batch_norm_in_a_plain_value_and_grad_body(wrap):
    net = model(batch_norm(), wrap)
    params, state = net.init_with_state(KEY, BATCH)

    def loss(apply):
        def run(params, state):
            y, state = apply(params, state, BATCH)
            return jnp.sum(y**3), state

        return jax.value_and_grad(run, has_aux=True)

    wanted = loss(model_by_hand)(params, state)
    for step in both(loss(net.apply_with_state)):
        assert_same(step(params, state), wanted, rtol=2e-4, atol=2e-4)


def test_value_and_grad_inside_the_state():
    """The derivative of a part of the function: no `has_aux`, the statistics are just there."""
    norm = batch_norm()

    @jaxstate.parametrized
    def step(x):
        return jax.value_and_grad(lambda x: jnp.sum(norm(x) ** 3))(x)

    def by_hand(p, s, x):
        def loss(x):
            y, new = batch_norm_by_hand(p["batch_norm"], s["batch_norm"], x)
            return jnp.sum(y**3), {"batch_norm": new}

        (y, s), g = jax.value_and_grad(loss, has_aux=True)(x)
        return (y, g), s

    params, state = step.init_with_state(KEY, BATCH)
    for apply in both(step.apply_with_state):
        wanted = by_hand(params, state, BATCH)
        assert_same(apply(params, state, BATCH), wanted, rtol=2e-4, atol=2e-5)


def test_batch_norm_in_a_scan_of_micro_batches():
    norm = batch_norm()

    @jaxstate.parametrized
    def net(batches):
        return lax.scan(lambda c, x: (c + jnp.sum(norm(x) ** 3), None), 0.0, batches)[0]

    def by_hand(p, s, batches):
        def body(carry, x):
            c, s = carry
            y, s = batch_norm_by_hand(p, s, x)
            return (c + jnp.sum(y**3), s), None

        return lax.scan(body, (0.0, s), batches)[0]

    batches = BATCH.reshape(2, 4, 3)
    params, state = net.init_with_state(KEY, batches)

    def wanted_loss(params, state):
        y, s = by_hand(params["batch_norm"], state["batch_norm"], batches)
        return y, {"batch_norm": s}

    wanted = jax.value_and_grad(wanted_loss, has_aux=True)(params, state)
    for step in both(
        jax.value_and_grad(lambda p, s: net.apply_with_state(p, s, batches), has_aux=True)
    ):
        assert_same(step(params, state), wanted, rtol=2e-4, atol=2e-4)


def test_batch_norm_over_lanes_with_pmean_equals_one_batch():
    norm = batch_norm("lanes")

    @jaxstate.parametrized
    def net(x):
        return jax.vmap(norm, axis_name="lanes")(x.reshape(4, 2, 3)).reshape(8, 3)

    params, state = net.init_with_state(KEY, BATCH)
    y, new = batch_norm_by_hand(params["batch_norm"], state["batch_norm"], BATCH)
    for apply in both(net.apply_with_state):
        assert_same(apply(params, state, BATCH), (y, {"batch_norm": new}), rtol=1e-4, atol=1e-5)


# -- Refusals --------------------------------------------------------------------------------


@refusal
@pytest.mark.parametrize(
    "wrong", [jnp.zeros(2), jnp.int32(1), True, 1j, None, (0.0, 0.0), "a"], ids=str
)
@pytest.mark.parametrize("loop", ["python", "scan", "while", "vmap", "grad_of_scan"])
def test_a_write_of_another_type_is_refused_at_the_write(wrong, loop):
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())

        def write(x):
            v.value = wrong
            return x

        LOOPS[loop](write, x, 2)

    for apply in both(jaxstate.parametrized(net).apply_with_state):
        with pytest.raises(jaxstate.SlotTypeError, match="'v' is float32\\[\\], and was") as e:
            apply({}, {"v": 0.0}, 0.5)
        assert "test_variables.py:" in str(e.value)


def test_a_python_number_takes_the_dtype_of_the_variable():
    @jaxstate.parametrized
    def net():
        v = jaxstate.variable("v", jnp.zeros, (), jnp.bfloat16)
        n = jaxstate.variable("n", lambda: 0)
        lax.fori_loop(0, 3, lambda i, _: setattr(v, "value", 2), None)
        lax.fori_loop(0, 3, lambda i, _: setattr(n, "value", n.value + 1), None)

    _, state = net.init_with_state(KEY)
    wanted = {"v": jnp.bfloat16(2), "n": jnp.int32(3)}
    for apply in both(net.apply_with_state):
        assert_same(apply({}, state)[1], wanted)


def raises(error, match):
    return pytest.raises(error, match=f"(?s){match}.*To mend it:")


@refusal
@pytest.mark.parametrize("inside", ["", "jit", "scan", "cond", "while", "jit_scan", "grad"])
def test_a_value_per_lane_is_refused_at_the_write_and_offers_two_answers(inside):
    def net(xs):
        v = jaxstate.variable("v", jnp.zeros, ())

        def lane(x):
            def f(x):
                v.value = x  # THE WRITE
                return x

            wraps = {
                "": f,
                "jit": jax.jit(f),
                "scan": lambda x: LOOPS["scan"](f, x, 2),
                "jit_scan": jax.jit(lambda x: LOOPS["scan"](f, x, 2)),
                "cond": lambda x: lax.cond(x > 0, f, lambda x: x, x),
                "while": lambda x: lax.while_loop(lambda x: x < 3, lambda x: f(x + 1), x),
                "grad": jax.grad(f),
            }
            return wraps[inside](x)

        return jax.vmap(lane)(xs)

    lines = pathlib.Path(__file__).read_text().split("\n")
    (line,) = [i for i, text in enumerate(lines, 1) if text.endswith("  # THE WRITE")]
    for apply in both(jaxstate.parametrized(net).apply_with_state):
        match = rf"variable '.*v', .*test_variables.py:{line} .*vmap over 3 lanes"
        with raises(jaxstate.LaneWriteError, match) as caught:
            apply({}, {"v": 0.0}, jnp.arange(3.0))
        assert 'variable("v", ..., reduce=jnp.mean)' in str(caught.value)
        assert "made inside the vmap" in str(caught.value)


@refusal
def test_reduce_keeps_the_type():
    @jaxstate.parametrized
    def net(xs):
        n = jaxstate.variable("n", jnp.zeros, (), jnp.int32, reduce=jnp.mean)
        jax.vmap(lambda x: setattr(n, "value", x))(xs)

    for apply in both(net.apply_with_state):
        with raises(jaxstate.SlotTypeError, "'n' has type int32.*reduce makes .* float32"):
            apply({}, {"n": 0}, jnp.arange(3))


@refusal
def test_reduce_makes_an_array_of_values_along_an_axis():
    def net(reduce):
        def net(xs):
            n = jaxstate.variable("n", jnp.zeros, (), reduce=reduce)
            jax.vmap(lambda x: setattr(n, "value", x))(xs)

        return jaxstate.parametrized(net).apply_with_state

    for wrong in (lambda values, axis: None, lambda values, axis: "n"):
        with raises(jaxstate.SlotTypeError, "'n' has type float32.*reduce makes .* is "):
            net(wrong)({}, {"n": 0.0}, jnp.arange(3.0))
    with pytest.raises(TypeError, match="'axis'") as caught:
        net(lambda values: values.sum())({}, {"n": 0.0}, jnp.arange(3.0))
    (note,) = [note for note in caught.value.__notes__ if "variable 'n'" in note]
    assert "called as reduce(values, axis=0)" in note


@refusal
def test_apply_without_state_and_writes_under_apply_are_refused():
    @jaxstate.parametrized
    def net(x):
        return jax.jit(counter)(x)

    state = net.init_with_state(KEY, 1.0)[1]
    assert net.init(KEY, 1.0) == {}
    for mode in (lambda f: f, jax.jit):
        with raises(jaxstate.MissingVariableError, "'n' was used, .* no variables") as caught:
            mode(lambda x: net.apply({}, x))(1.0)
        assert "net.apply(params, x, state=state)" in str(caught.value)
        with raises(jaxstate.ReadOnlyVariableError, "'n' was written under apply"):
            mode(lambda x: net.apply({}, x, state=state))(1.0)
        with raises(jaxstate.MissingVariableError, "'counter/n'.* The nearest name is 'nn'"):
            mode(lambda x: net.apply_with_state({}, {"counter": {"m": 0, "nn": 0}}, x))(1.0)
        with raises(jaxstate.VariableMismatchError, "'counter/n' is int32\\[2\\]"):
            mode(lambda x: net.apply_with_state({}, {"counter": {"n": jnp.arange(2)}}, x))(1.0)
    assert_same(net.apply_with_state({}, state, 1.0)[1], {"counter": {"n": jnp.int32(1)}})


@refusal
def test_names_are_of_one_thing():
    def conflict(x):
        jaxstate.variable("v", jnp.zeros, ())
        jax.jit(lambda: jaxstate.variable("v", jnp.zeros, (2,)).value)()

    def clash(x):
        jaxstate.param("v", ones, ())
        jax.jit(lambda: jaxstate.variable("v", jnp.zeros, ()).value)()

    def other_clash(x):
        jaxstate.variable("v", jnp.zeros, ())
        jaxstate.param("v", ones, ())

    def scope_clash(x):
        with jaxstate.scope("v"):
            jaxstate.param("w", ones, ())
        jaxstate.variable("v", jnp.zeros, ())

    for f, error, match in [
        (conflict, jaxstate.VariableConflictError, r"'v' is used twice, as float32\[\] and"),
        (clash, jaxstate.NameClashError, "'v' is a parameter already, .* a variable too"),
        (other_clash, jaxstate.NameClashError, "'v' is a variable already, .* a parameter too"),
        (scope_clash, jaxstate.NameClashError, "'v' is a scope opened by hand already"),
    ]:
        net = jaxstate.parametrized(f)
        with raises(error, match):
            net.init_with_state(KEY, 1.0)
        with raises(error, match):
            params = {"v": {"w": 1.0} if f is scope_clash else 1.0}
            net.apply_with_state(params, {"v": 1.0}, 1.0)


@refusal
def test_handles_are_used_where_they_mean_something():
    kept = []

    @jaxstate.parametrized
    def inner():
        return kept[-1].value

    @jaxstate.parametrized
    def net(x):
        kept.append(jaxstate.variable("v", jnp.zeros, ()))
        inner()
        if x == "nested":
            inner.apply_with_state({}, {"v": 1.0})
        if x == "escaped":
            jax.jit(lambda: kept.append(jaxstate.variable("w", jnp.zeros, ())))()
            inner()
        return kept[-1].value

    state = {"v": 2.0, "w": 3.0}
    assert net.apply_with_state({}, state, "")[0] == 2.0
    with raises(jaxstate.ClosedStateError, "'v' was used outside of the init or apply"):
        kept[-1].value = 1.0
    with raises(jaxstate.ClosedStateError, "or inside another one"):
        net.apply_with_state({}, state, "nested")
    with raises(jaxstate.ClosedStateError, "'w' was made inside a transformed function that has"):
        net.apply_with_state({}, state, "escaped")
    with raises(jaxstate.MissingStoreError, "variable 'v' was used outside init and apply"):
        jaxstate.variable("v", jnp.zeros, ())


@refusal
def test_two_ways_to_one_variable_in_one_function():
    """One slot would have two addresses in the jaxpr; what one writes the other would not see."""

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())

        def body(c, _):
            again = jaxstate.variable("v", jnp.zeros, ())
            again.value = again.value + x
            return c + v.value, None

        return lax.scan(body, x, length=3)[0]

    for apply in both(net.apply_with_state):
        with raises(jaxstate.VariableConflictError, "a handle that was made outside"):
            apply({}, {"v": 0.0}, 1.0)


@refusal
def test_a_failed_call_leaves_nothing_half_written():
    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())

        def body(i, _):
            n.value = n.value + 1
            if x:
                raise RuntimeError

        with contextlib.suppress(RuntimeError):
            lax.fori_loop(0, 3, body, None)
        return n.value

    state = {"n": jnp.float32(0)}
    assert net.apply_with_state({}, state, False) == (3.0, {"n": 3.0})
    assert net.apply_with_state({}, state, True) == (0.0, {"n": 0.0})
    assert state == {"n": 0.0}


@refusal
def test_bad_input_is_refused_where_it_is_given():
    def declaring(*args, **kwargs):
        return jaxstate.parametrized(lambda: jaxstate.variable(*args, **kwargs))

    for name in ("", "a/b", 3):
        with pytest.raises(TypeError, match="variable wants a non-empty string without '/'"):
            declaring(name, jnp.zeros, ()).init(KEY)
    with pytest.raises(TypeError, match=r"wants a function init\(\*init_args\)"):
        declaring("v", jnp.zeros(3)).init(KEY)
    with pytest.raises(TypeError, match=r"wants a function reduce\(values, axis=0\)"):
        declaring("v", jnp.zeros, (), reduce="mean").init(KEY)
    for state in (None, [1.0], 0.0):
        with pytest.raises(TypeError, match="wants the variables as a dict"):
            counter.apply_with_state({}, state, 1.0)


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
