"""What loops and branches ask of slots that are written in them; loops that run in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate import reap, sow
from jaxstate.extend import new_slot, read, write

HOST = jax.memory.Space.Host
ones = jax.nn.initializers.ones


# -- Memory spaces ---------------------------------------------------------------------------


def slot(run):
    value = new_slot(jnp.zeros(2), name="v")
    run(lambda: write(value, jax.device_put(read(value) + 1, HOST)))
    return read(value)


def variable(run):
    def f():
        v = jaxstate.variable("v", jnp.zeros, (2,))

        def move():
            v.value = jax.device_put(v.value + 1, HOST)

        run(move)

    net = jaxstate.parametrized(f, name="net")
    return net.apply_with_state({}, {"v": jnp.zeros(2)})[1]["v"]


def no_change():
    pass


def turn(f):
    return lambda c, _: (f(), (c, None))[1]


CHANGES = {
    "cond": lambda f: lax.cond(True, f, no_change),
    "cond, the other branch": lambda f: lax.cond(True, no_change, f),
    "switch": lambda f: lax.switch(1, [f, no_change, f]),
    "while body": lambda f: lax.while_loop(lambda i: i < 2, lambda i: (f(), i + 1)[1], 0),
    "while condition": lambda f: lax.while_loop(lambda i: (f(), i < 2)[1], lambda i: i + 1, 0),
    "scan": lambda f: lax.scan(turn(f), 0, length=2),
    "fori_loop": lambda f: lax.fori_loop(0, 2, lambda i, c: (f(), c)[1], 0),
    "jit of scan": lambda f: jax.jit(lambda: lax.scan(turn(f), 0, length=2))(),
    "vmap of cond": lambda f: jax.vmap(lambda p: lax.cond(p, f, no_change))(
        jnp.array([True, True])
    ),
    "map": lambda f: lax.map(lambda x: (f(), x)[1], jnp.arange(2)),
}
SAME = {
    "eagerly": lambda f: f(),
    "jit": lambda f: jax.jit(f)(),
    "checkpoint": lambda f: jax.checkpoint(f)(),
    "both branches": lambda f: lax.cond(True, f, f),
}


@pytest.mark.parametrize("kind", [slot, variable])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_loop_carries_stays_in_its_memory(name, kind):
    with pytest.raises(jaxstate.SlotTypeError, match=r"'v' has type float32.*<host>") as error:
        kind(CHANGES[name])
    assert "jax.device_put(value, jax.memory.Space." in str(error.value)


@pytest.mark.parametrize("kind", [slot, variable])
@pytest.mark.parametrize("name", SAME)
def test_what_is_written_once_may_move(name, kind):
    np.testing.assert_array_equal(kind(SAME[name]), np.ones(2))


# -- Under jax.disable_jit -------------------------------------------------------------------

# A loop that takes three turns, so its condition runs four times.


def count_in_condition():
    n = new_slot(jnp.int32(0))

    def condition(i):
        write(n, read(n) + 1)
        return i < 3

    return condition, lambda i: i + 1, lambda: read(n), 4


def count_in_both():
    n = new_slot(jnp.int32(0))

    def moved(x):
        write(n, read(n) + 1)
        return x

    return lambda i: moved(i) < 3, lambda i: moved(i) + 1, lambda: read(n), 7


def closure_converted(loop):
    f, constants = jax.closure_convert(loop, 0)
    return f(0, *constants)


WAYS = {
    "at top level": lambda loop: loop(0),
    "closure_convert": closure_converted,
    "jit": lambda loop: jax.jit(loop)(0),
    "vmap with one value": lambda loop: jax.vmap(lambda _: loop(0))(jnp.arange(2))[0],
    "scan": lambda loop: lax.scan(lambda c, _: (c, loop(0)), 0, length=1)[1][0],
    "checkpoint": lambda loop: jax.checkpoint(loop)(0),
    "jvp": lambda loop: jax.jvp(loop, (0.0,), (1.0,))[0],
}


@pytest.mark.parametrize("state", [count_in_condition, count_in_both])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("disable", [True, False])
def test_a_loop_that_python_gives_up_moves_its_state_once(way, state, disable):
    condition, body, count, wanted = state()
    with jax.disable_jit(disable):
        assert WAYS[way](lambda i: lax.while_loop(condition, body, i)) == 3
    assert count() == wanted


@pytest.mark.parametrize("way", [name for name in WAYS if "vmap" not in name])
@pytest.mark.parametrize("disable", [True, False])
def test_draws_of_a_loop_that_python_gives_up(way, disable, key):
    def condition(i):
        jaxstate.next_key()
        return i < 3

    def body(i):
        jaxstate.next_key()
        return i + 1

    with jaxstate.rng_stream(key) as stream:
        with jax.disable_jit(disable):
            WAYS[way](lambda i: lax.while_loop(condition, body, i))
        assert stream.count == 7


def test_a_loop_goes_on_with_the_primitive_where_python_has_come_to(key):
    """The condition is known until the carry has become that of a lane."""

    def run(x):
        def body(c):
            i, y = c
            return jnp.where(i == 0, 1, i + x), y + jaxstate.random.uniform()

        return lax.while_loop(lambda c: c[0] < 5, body, (0, 0.0))

    with jaxstate.rng_stream(key) as stream, jax.disable_jit():
        i, y = jax.vmap(run)(jnp.array([1, 2]))
        assert stream.count == 1
    np.testing.assert_array_equal(i, [5, 5])
    for lane, turns in enumerate((5, 3)):
        of_lane = jax.random.fold_in(jax.random.fold_in(key, 0), lane)
        draws = [jax.random.uniform(jax.random.fold_in(of_lane, n)) for n in range(turns)]
        np.testing.assert_allclose(y[lane], sum(draws), rtol=1e-6)


def test_what_a_condition_sows_that_python_gives_up():
    def run(x):
        return lax.while_loop(lambda i: sow("i", i, mode="clobber") < 3, lambda i: i + 1, x)

    with jax.disable_jit():
        out, sown = reap(lambda x: jax.jvp(run, (x,), (1.0,))[0])(0.0)
        lanes, of_lanes = reap(jax.vmap(run))(jnp.array([0, 1]))
    assert (out, sown["i"]) == (3.0, 3.0)
    np.testing.assert_array_equal(lanes, [3, 3])
    np.testing.assert_array_equal(of_lanes["i"], [3, 3])


def test_a_loop_without_state_is_that_of_jax():
    with jax.disable_jit():
        assert jax.grad(lambda x: lax.while_loop(lambda y: y < 8, lambda y: y * 2, x))(3.0) == 4.0
        n = new_slot(jnp.int32(0))
        assert jax.grad(lambda x: lax.while_loop(lambda y: y < 8, lambda y: y * 2, x))(3.0) == 4.0
        with pytest.raises(TypeError, match="boolean scalar"):
            jax.vmap(lambda x: lax.while_loop(lambda y: y, lambda y: y, x))(jnp.arange(2.0))
    assert read(n) == 0
