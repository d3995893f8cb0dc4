"""Slots of which every lane and every device has its own value: a counter, and a maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxstate
from jaxstate.extend import new_slot, read, write

X = jnp.arange(4)


def counter():
    return new_slot(jnp.int32(10), lanes=lambda before, values: before + (values - before).sum(0))


def scan(f, n=3):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=n)[0]


def turns(f):
    """As many turns as the number says."""

    def run(n):
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, f(s[1])), (0, n))[1]

    return run


def if_even(f):
    return lambda x: jax.lax.cond(x % 2 == 0, f, lambda x: x, x)


def with_rule(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, ct: (ct,))
    return g


def of_float(transform):
    """A derivative, of which the value does not matter."""

    def run(f):
        def g(x):
            f(jnp.int32(1))
            return x * 2.0

        return lambda x: (transform(g)(x * 1.0), x)[1]

    return run


def on_devices(f):
    mesh = jax.make_mesh((1,), ("d",))
    spec = PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


# Each with what is called, and how often the function runs.
CASES = {
    "here": (lambda f: f(X[1]), 1),
    "jit": (lambda f: jax.jit(f)(X[1]), 1),
    "scan": (lambda f: scan(f)(X[1]), 3),
    "while": (lambda f: turns(f)(X[2]), 2),
    "cond": (lambda f: (if_even(f)(X[1]), if_even(f)(X[2])), 1),
    "vmap": (lambda f: jax.vmap(f)(X), 4),
    "vmap, not of its argument": (lambda f: jax.vmap(lambda x: (f(X[1]), x))(X), 4),
    "vmap of jit": (lambda f: jax.vmap(jax.jit(f))(X), 4),
    "vmap of scan": (lambda f: jax.vmap(scan(f))(X), 12),
    "scan of vmap": (lambda f: scan(jax.vmap(f))(X), 12),
    "vmap of cond": (lambda f: jax.vmap(if_even(f))(X), 2),
    "vmap of while": (lambda f: jax.vmap(turns(f))(X), 6),
    "vmap of vmap": (lambda f: jax.vmap(jax.vmap(f))(X.reshape(2, 2)), 4),
    "vmap of vmap of cond": (lambda f: jax.vmap(jax.vmap(if_even(f)))(X.reshape(2, 2)), 2),
    "two vmaps": (lambda f: (jax.vmap(f)(X), f(X[0]), jax.vmap(f)(X[:2])), 7),
    "vmap of checkpoint": (lambda f: jax.vmap(jax.checkpoint(f))(X), 4),
    "map": (lambda f: jax.lax.map(f, X, batch_size=3), 4),
    "grad": (lambda f: of_float(jax.grad)(f)(X[1]), 1),
    "vmap of grad": (lambda f: jax.vmap(of_float(jax.grad)(f))(X), 4),
    "grad of checkpoint": (lambda f: of_float(lambda g: jax.grad(jax.checkpoint(g)))(f)(X[1]), 1),
    "grad of custom_vjp": (lambda f: of_float(lambda g: jax.grad(with_rule(g)))(f)(X[1]), 1),
    "jacfwd": (lambda f: of_float(jax.jacfwd)(f)(X[1]), 1),
    "vmap of jacfwd": (lambda f: jax.vmap(of_float(jax.jacfwd)(f))(X), 4),
    "shard_map": (lambda f: on_devices(f)(X[1]), 1),
    "shard_map of vmap": (lambda f: on_devices(jax.vmap(f))(X), 4),
}
MODES = {"eagerly": lambda f: f, "jit": jax.jit}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_counter_counts_in_each_lane(case, mode):
    run, times = CASES[case]
    calls = counter()

    def f(x):
        write(calls, read(calls) + 1)
        return x

    go = MODES[mode](lambda: (run(f), read(calls))[1])
    assert [int(go()), int(go())] == [10 + times, 10 + 2 * times]
    assert read(calls) == 10 + 2 * times and read(calls).dtype == jnp.int32


@pytest.mark.parametrize("case", CASES)
def test_a_counter_that_is_made_in_a_jitted_function(case):
    run, times = CASES[case]

    def inside(_):
        own = counter()

        def f(x):
            write(own, read(own) + 1)
            return x

        run(f)
        return read(own)

    assert jax.jit(jax.vmap(inside))(X[:2]).tolist() == [10 + times] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_lane_goes_on_from_what_was_there_before(mode):
    largest = new_slot(1.5, lanes=lambda before, values: values.max(0))

    def f(x):
        seen = read(largest)
        write(largest, jnp.maximum(read(largest), x))
        write(largest, jnp.maximum(read(largest), 2 * x))
        return seen, read(largest)

    xs = jnp.array([0.5, 3.0, 1.0])
    seen, own = MODES[mode](jax.vmap(f))(xs)
    np.testing.assert_array_equal(seen, [1.5, 1.5, 1.5])
    np.testing.assert_array_equal(own, np.maximum(1.5, 2 * np.asarray(xs)))
    assert read(largest) == 6.0
    slope = jax.grad(lambda xs: (jax.vmap(f)(xs), read(largest))[1])(jnp.array([0.5, 4.0, 1.0]))
    np.testing.assert_array_equal(slope, [0.0, 2.0, 0.0])


def test_what_lanes_makes_has_the_type_of_the_slot():
    wrong = new_slot(jnp.zeros(2), lanes=lambda before, values: values.sum())
    with pytest.raises(jaxstate.SlotTypeError, match=r"slot 'slot' has type f\w*32\[2\].*lanes="):
        jax.vmap(lambda x: write(wrong, jnp.ones(2) * x))(X)
    np.testing.assert_array_equal(read(wrong), [0, 0])
    with pytest.raises(TypeError, match="lanes is a function of two arrays"):
        new_slot(0.0, lanes="sum")
