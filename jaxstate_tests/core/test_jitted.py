"""Jitted calls at top level: which state a call uses, and what JAX keeps of it."""

import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.bench.measure import python_calls

KEY = jax.random.key(3)


def nth_uniform(n, key=KEY):
    return jax.random.uniform(jax.random.fold_in(key, n))


def test_one_function_that_uses_other_slots_for_other_types():
    """The threaded call of the last call is tried first; it must not draw or fail for this one."""

    @jax.jit
    def f(x):
        if x.dtype == jnp.int32:
            return x + 1
        if x.ndim:
            return x + jaxstate.random.uniform(stream="other")
        return x + jaxstate.random.uniform()

    other = jax.random.key(4)
    with jaxstate.rng_stream(KEY) as stream, jaxstate.rng_stream(other, "other") as second:
        for n in range(3):
            assert f(1.0) == 1 + nth_uniform(n)
            assert f(jnp.ones(2)).tolist() == [1 + nth_uniform(n, other)] * 2
            assert f(jnp.int32(1)) == 2
        assert stream.count == 3 and second.count == 3


def test_static_arguments_choose_the_slots():
    a, b = new_slot(0.0), new_slot(0.0)

    @jax.jit
    def unchanged(x):
        return x

    def f(x, which, *, twice=False):
        if which is not None:
            slot = {"a": a, "b": b}[which]
            write(slot, read(slot) + (2 * x if twice else x))
        return unchanged(x)

    f = jax.jit(f, static_argnums=(-1,), static_argnames=("twice",))
    for _ in range(2):
        f(1.0, "a")
        f(1.0, "b", twice=True)
        f(1.0, None)
    assert (read(a), read(b)) == (2, 4)


def test_a_slot_that_is_gone_is_missed_only_where_it_is_used():
    slots = {"a": new_slot(0.0), "b": new_slot(0.0)}

    def f(x, name):
        write(slots[name], read(slots[name]) + x)

    f = jax.jit(f, static_argnames=("name",))
    f(1.0, "b")
    f(1.0, "a")
    del slots["a"]
    gc.collect()
    f(2.0, "b")
    assert read(slots["b"]) == 3


def test_modules_get_their_names_in_the_order_of_each_apply():
    """A call of the last apply must not give out names in this one."""

    def module():
        @jaxstate.parametrized
        def scale(x):
            return x * jaxstate.param("w", jax.nn.initializers.ones, ())

        return scale

    first, second = module(), module()
    f = jax.jit(lambda x, flag: first(x) if flag else second(x), static_argnames=("flag",))

    @jaxstate.parametrized
    def net(x):
        return f(x, flag=False) + 10 * f(x, flag=True)  # second is "scale", first is "scale_1"

    assert sorted(net.init(KEY, 1.0)) == ["scale", "scale_1"]
    params = {"scale": {"w": 3.0}, "scale_1": {"w": 5.0}}
    for _ in range(3):
        assert net.apply(params, 1.0) == 53


def test_an_eager_apply_to_several_types_takes_what_it_takes_for_one():
    inner = jax.jit(lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ()))
    net = jaxstate.parametrized(lambda x: inner(x))
    params = {"w": jnp.float32(2)}
    inputs = [jnp.ones(n) for n in (2, 3, 4)]
    calls = []
    for x in inputs:
        for _ in range(4):
            n = python_calls(lambda x=x: net.apply(params, x))
        calls.append(n)
    assert max(calls) < 1.5 * calls[0]
    assert [net.apply({"w": jnp.float32(3)}, x).sum() for x in inputs] == [6, 9, 12]


def test_a_cleared_cache_is_cleared():
    traces = []

    @jax.jit
    def f(x):
        traces.append(1)
        return x + jaxstate.random.uniform()

    with jaxstate.rng_stream(KEY):
        f(1.0), f(1.0)
        assert len(traces) == 1
        f.clear_cache()
        f(1.0), f(1.0)
        assert len(traces) == 2
        jax.clear_caches()
        f(1.0), f(1.0)
        assert len(traces) == 3


def test_a_thousand_calls_are_traced_once_and_keep_nothing():
    traces = []

    @jax.jit
    def f(x):
        traces.append(1)
        return x * jaxstate.random.uniform()

    with jaxstate.rng_stream(KEY) as stream:
        x = 1.0
        for _ in range(1000):
            x = f(x)
        assert stream.count == 1000
    assert len(traces) <= 2  # a Python float first, then arrays
    traces.clear()
    ref = weakref.ref(f._fun)
    del f
    gc.collect()
    assert ref() is None


def test_donated_arguments_and_arguments_named_like_ours():
    def f(values, state):
        return values + jaxstate.random.uniform(), state * 2

    f = jax.jit(f, donate_argnames=("state",))
    with jaxstate.rng_stream(KEY):
        for n in range(3):
            x, state = jnp.zeros(3), jnp.ones(3)
            y, doubled = f(values=x, state=state)
            np.testing.assert_allclose(y, jnp.full(3, nth_uniform(n)))
            assert doubled.tolist() == [2, 2, 2]
            assert state.is_deleted() and not x.is_deleted()


def test_arrays_that_the_function_closes_over_beside_what_it_captures():
    table = jnp.arange(4.0)

    @jax.jit
    def f(i):
        return table[i] + jaxstate.random.uniform()

    with jaxstate.rng_stream(KEY):
        assert [f(i) for i in range(4)] == [i + nth_uniform(i) for i in range(4)]
    with jaxstate.rng_stream(jax.random.key(5)):
        assert f(1) == 1 + nth_uniform(0, jax.random.key(5))


def test_after_an_error_in_a_call_the_state_is_as_before():
    slot = new_slot(0.0)

    @jax.jit
    def f(x):
        write(slot, read(slot) + jaxstate.random.uniform())
        return x.reshape(2)

    with jaxstate.rng_stream(KEY) as stream:
        f(jnp.ones(2))
        after = read(slot)
        with pytest.raises(TypeError):
            f(jnp.ones(3))
        assert read(slot) == after and stream.count == 1
        f(jnp.ones(2))
        assert stream.count == 2


def test_effects_and_results_that_are_no_arrays():
    seen = []

    @jax.jit
    def f(x):
        jax.debug.callback(lambda u: seen.append(float(u)), jaxstate.random.uniform(), ordered=True)
        return {"x": x, "none": None}

    with jaxstate.rng_stream(KEY):
        for _ in range(3):
            assert f(1.0) == {"x": 1.0, "none": None}
    jax.effects_barrier()
    assert seen == [nth_uniform(n) for n in range(3)]


# -- One module under several others -----------------------------------------------------------


def shared_head(x):
    return x.sum() * jaxstate.param("w", jax.nn.initializers.ones, ())


def counted_head(x):
    n = jaxstate.variable("n", jnp.zeros, ())
    n.value += x.sum()
    return n.value


def by_static_argument(head):
    @functools.partial(jax.jit, static_argnums=1)
    def f(x, task):
        with jaxstate.scope(task):
            return head(x)

    return f


def by_shape(head):
    @jax.jit
    def f(x, task):
        with jaxstate.scope("a" if x.size == 1 else "b"):
            return head(x)

    return lambda x, task: f(x if task == "a" else jnp.stack([x, 0 * x]), None)


def by_modules(head):
    a, b = (jaxstate.parametrized(lambda x: head(x), name=name) for name in "ab")
    f = jax.jit(lambda x, task: a(x) if task == "a" else b(x), static_argnums=1)
    return lambda x, task: f(x, task)


CHOICES = [by_static_argument, by_shape, by_modules]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_module_under_several_others_has_the_parameters_of_the_one_it_is_under(choice):
    """Its address is the same in the jaxprs for each of them, and means another slot."""
    f = choice(jaxstate.parametrized(shared_head, name="head"))
    net = jaxstate.parametrized(lambda x, task: f(x, task), name="net")
    params = {"a": {"head": {"w": jnp.float32(2)}}, "b": {"head": {"w": jnp.float32(3)}}}
    for _ in range(2):
        assert net.apply(params, jnp.float32(1), "a") == 2
        assert net.apply(params, jnp.float32(1), "b") == 3
        gradient = jax.grad(lambda p: net.apply(p, jnp.float32(1), "b"))(params)
        assert (gradient["a"]["head"]["w"], gradient["b"]["head"]["w"]) == (0, 1)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_module_under_several_others_writes_the_variables_of_the_one_it_is_under(choice):
    f = choice(jaxstate.parametrized(counted_head, name="head"))
    net = jaxstate.parametrized(lambda x, task: f(x, task), name="net")
    state = {name: {"head": {"n": jnp.float32(0)}} for name in "ab"}
    for task, wanted in [("a", 1), ("b", 1), ("b", 2), ("a", 2)]:
        y, state = net.apply_with_state({}, state, jnp.float32(1), task)
        assert y == wanted == state[task]["head"]["n"]
    assert state["a"]["head"]["n"] == state["b"]["head"]["n"] == 2


# -- What a store remembers of earlier calls of jitted functions ---------------------------------


def counted(name="part"):
    """A module with a parameter, which is its scale, and a variable, the number of its calls."""

    def part(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        n.value += 1
        return x * jaxstate.param("w", jax.nn.initializers.ones, ()) + n.value

    return jaxstate.parametrized(name=name)(part)


PARTS = [counted() for _ in range(3)]
JITTED = [jax.jit(lambda x, part=part: part(x)) for part in PARTS]
TWO = jax.jit(lambda x: PARTS[2](PARTS[0](x)))


def in_scope(x):
    with jaxstate.scope("inner"):
        return JITTED[1](x)


DRAWING = jax.jit(lambda x: PARTS[1](x) + jaxstate.random.uniform())

# What an ``apply`` can do: how it is done, and which parts are used, in which scope.
STEPS = {
    "0": (JITTED[0], [0], ()),
    "1": (JITTED[1], [1], ()),
    "eager 0": (PARTS[0], [0], ()),
    "eager 2": (PARTS[2], [2], ()),
    "2 and 0": (TWO, [0, 2], ()),
    "1 in a scope": (in_scope, [1], ("inner",)),
    "1 and a draw": (DRAWING, [1], ()),
}


@jaxstate.parametrized
def steps_in_order(x, steps):
    for step in steps:
        x = STEPS[step][0](x)
    return x


def steps_by_hand(weights, x, steps):
    """The names of the parts in the order of first use, and what comes out."""
    names, numbers, counts, draws = {}, {}, {}, 0
    for step in steps:
        _, parts, scope = STEPS[step]
        for part in parts:
            if part not in names:
                n = numbers[scope] = numbers.get(scope, -1) + 1
                names[part] = (*scope, f"part_{n}" if n else "part")
            counts[part] = counts.get(part, 0) + 1
            x = x * weights[names[part]] + counts[part]
        if "draw" in step:
            x, draws = x + nth_uniform(draws), draws + 1
    return x, {names[part]: n for part, n in counts.items()}


WEIGHTS = {
    (*scope, name): 0.5 + 0.1 * i
    for i, name in enumerate(("part", "part_1", "part_2"))
    for scope in ((), ("inner",))
}


def as_tree(leaf, values):
    tree = {}
    for path, value in values.items():
        node = tree
        for level in path:
            node = node.setdefault(level, {})
        node[leaf] = jnp.float32(value)
    return tree


@pytest.mark.parametrize("seed", range(6))
def test_applies_to_equal_types_in_which_other_calls_come_first(seed):
    """What one ``apply`` found must be right in the next: names are given in the order of use."""
    random = np.random.default_rng(seed)
    programs = [random.choice(list(STEPS), size=random.integers(1, 5)) for _ in range(4)]
    params, state = as_tree("w", WEIGHTS), as_tree("n", dict.fromkeys(WEIGHTS, 0))
    for i in [0, 0, 0, 1, 2, 3, 0, 1, 1, 2, 2, 3, 3, 0]:
        steps = tuple(programs[i])
        y, after = steps_in_order.apply_with_state(params, state, jnp.float32(1), steps, key=KEY)
        wanted, counts = steps_by_hand(WEIGHTS, 1.0, steps)
        np.testing.assert_allclose(y, wanted, rtol=1e-5)
        wanted_state = as_tree("n", {**dict.fromkeys(WEIGHTS, 0), **counts})
        assert jax.tree.map(float, after) == jax.tree.map(float, wanted_state)


def test_what_is_remembered_of_an_apply_is_right_for_other_types_and_keeps_no_arrays():
    part = counted()
    f = jax.jit(lambda x: part(x))
    net = jaxstate.parametrized(lambda x: f(x) + f(x))
    params = {"part": {"w": jnp.float32(2)}}
    for dtype in (jnp.float32, jnp.float16, jnp.float32) * 3:
        state = {"part": {"n": jnp.zeros((), dtype)}}
        y, after = net.apply_with_state(params, state, jnp.float32(1))
        assert (y, after["part"]["n"], after["part"]["n"].dtype) == (7, 2, dtype)
        y, after = net.apply_with_state(params, {"part": {"n": 5.0}}, jnp.float32(1))
        assert (y, after["part"]["n"]) == (17, 7)
    ref = weakref.ref(params["part"]["w"])
    with pytest.raises(jaxstate.MissingVariableError):
        net.apply_with_state(params, {"part": {}}, jnp.float32(1))
    del params, state, after
    gc.collect()
    assert ref() is None


def test_a_store_that_another_thread_has_closed_is_not_found():
    def opened():
        with jaxstate.rng_stream(KEY):
            yield

    @jax.jit
    def draw():
        return jaxstate.random.uniform()

    open_here = opened()
    next(open_here)
    for n in range(2):
        assert draw() == nth_uniform(n)
    thread = threading.Thread(target=open_here.close)
    thread.start()
    thread.join()
    with pytest.raises(jaxstate.MissingStreamError):
        draw()
    total = new_slot(0.0)

    @jax.custom_jvp
    def add(x):
        write(total, read(total) + x)
        return x

    add.defjvps(lambda dot, out, x: dot)
    jax.jit(lambda x: add(x))(1.0)
    assert read(total) == 1
