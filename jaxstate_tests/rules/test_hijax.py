"""Operations and types that a user defines with `jax.experimental.hijax`."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import hijax
from jax.nn.initializers import constant

import jaxstate
from jaxstate.extend import new_slot, read, write

# A function of such an operation leaks in JAX 0.10, with no other package imported.
pytestmark = pytest.mark.leaks_allowed("JAX leaks tracers")

Operation = getattr(hijax, "HiPrim", None) or hijax.VJPHiPrimitive
X = np.ones(2, np.float32)


def operation(function):
    """``function`` as an operation whose derivative is 7, whatever the function is."""

    class Sevenfold(Operation):
        def __init__(self, aval):
            self.in_avals, self.out_aval, self.params = (aval,), aval, {}
            super().__init__()

        def expand(self, x):
            return function(x)

        def vjp_fwd(self, nonzero, x):
            return self(x), None

        def vjp_bwd_retval(self, residuals, cotangent):
            return (7 * cotangent,)

    return lambda x: Sevenfold(jax.typeof(x))(x)


def in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0]


def in_cond(f):
    return lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x)


WAYS = {
    "jit": jax.jit,
    "jit of jit": lambda f: jax.jit(jax.jit(f)),
    "scan": in_scan,
    "jit of scan": lambda f: jax.jit(in_scan(f)),
    "cond": in_cond,
    "checkpoint": jax.checkpoint,
}
GRADIENTS = {
    "grad": lambda f: jax.grad(lambda x: f(x).sum()),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x: f(x).sum())),
    "grad of jit": lambda f: jax.grad(lambda x: jax.jit(f)(x).sum()),
    "grad of scan": lambda f: jax.grad(lambda x: in_scan(f)(x).sum()),
}

noisy = operation(lambda x: x + jaxstate.random.uniform(x.shape))


@pytest.mark.parametrize("way", ["eagerly", *WAYS])
def test_draws_in_an_operation_at_top_level(way, key):
    f = WAYS.get(way, lambda f: f)(noisy)
    with jaxstate.rng_stream(key) as stream:
        for n in range(2):
            found = f(jnp.array(X))
            wanted = X + jax.random.uniform(jax.random.fold_in(key, n), (2,))
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert stream.count == 2


@pytest.mark.parametrize("way", GRADIENTS)
def test_an_operation_that_draws_keeps_its_derivative_and_its_draws(way, key):
    f = GRADIENTS[way](noisy)
    with jaxstate.rng_stream(key) as stream:
        for n in range(2):
            np.testing.assert_array_equal(f(jnp.array(X)), 7 * np.ones(2))
            assert stream.count == n + 1


def test_slots_in_an_operation_at_top_level():
    total = new_slot(jnp.zeros(2))

    def add(x):
        write(total, read(total) + x)
        return 2 * x

    f = jax.jit(in_scan(operation(add)))
    for n in (1, 2):
        np.testing.assert_array_equal(f(jnp.array(X)), 2 * X)
        np.testing.assert_array_equal(read(total), n * X)


def weighted(x):
    return x * jaxstate.param("w", constant(3.0), x.shape)


PARAMS = {"w": np.full(2, 3, np.float32)}


@pytest.mark.parametrize("way", ["jit", "scan", "cond"])
def test_state_that_ends_before_jax_expands_an_operation_is_refused(way, key):
    net = jaxstate.parametrized(lambda x: WAYS[way](operation(weighted))(x), name="net")

    def stream_inside(x):
        with jaxstate.rng_stream(key):
            return WAYS[way](operation(lambda x: x + jaxstate.random.uniform(x.shape)))(x)

    def refused(match):
        return pytest.raises(jaxstate.UnsupportedPrimitiveError, match=match)

    with refused("expand method of Sevenfold uses parameter 'w'"):
        net.init(key, X)
    with refused("expand method of Sevenfold uses parameter 'w'"):
        jax.jit(net.apply)(PARAMS, X)
    with refused("expand method of Sevenfold uses the .* of random stream 'default'"):
        jax.jit(stream_inside)(X)
    with jaxstate.rng_stream(jax.random.key(5)) as outer:
        with refused("expand method of Sevenfold uses the .* of random stream 'default'"):
            jax.jit(stream_inside)(X)
        assert outer.count == 0


def test_operations_without_state_beside_state(key):
    double = operation(lambda x: 2 * x)
    net = jaxstate.parametrized(lambda x: weighted(jax.jit(double)(x)), name="net")
    params = net.init(key, X)
    np.testing.assert_array_equal(params["w"], PARAMS["w"])
    np.testing.assert_array_equal(jax.jit(net.apply)(params, X), 6 * X)
    slope = jax.jit(jax.grad(lambda x: net.apply(params, x).sum()))(X)
    np.testing.assert_array_equal(slope, 21 * np.ones(2))


# -- Values of types of a user ---------------------------------------------------------------


class Boxed:
    def __init__(self, array):
        self.array = array


@dataclass(frozen=True)
class BoxedType(hijax.HiType):
    shape: tuple

    def lo_ty(self):
        return [jax.core.ShapedArray(self.shape, jnp.float32)]

    def lower_val(self, value):
        return [value.array]

    def raise_val(self, array):
        return Boxed(array)

    def to_tangent_aval(self):
        return self

    def str_short(self, *args, **kwargs):
        return "Boxed"


hijax.register_hitype(Boxed, lambda boxed: BoxedType(jnp.shape(boxed.array)))


def of_variable(value):
    def f(x):
        v = jaxstate.variable("v", jnp.zeros, (2,))
        v.value = value
        return x

    return jaxstate.parametrized(f, name="net").apply_with_state({}, {"v": X}, X)


USES = {
    "slot": new_slot,
    "write": lambda value: write(new_slot(X), value),
    "variable": of_variable,
    "new variable": lambda value: jaxstate.parametrized(
        lambda: jaxstate.variable("v", lambda: value), name="net"
    ).init_with_state(jax.random.key(0)),
    "parameter": lambda value: jaxstate.parametrized(
        lambda: jaxstate.param("w", lambda key: value), name="net"
    ).init(jax.random.key(0)),
    "given parameter": lambda value: jaxstate.parametrized(weighted, name="net").apply(
        {"w": value}, X
    ),
    "sow": lambda value: jaxstate.reap(lambda: jaxstate.sow("a", value))(),
    "plant": lambda value: jaxstate.plant(lambda x: jaxstate.sow("a", x))({"a": value}, X),
}


@pytest.mark.parametrize("use", USES)
def test_values_of_such_types_are_no_state(use):
    with pytest.raises((TypeError, jaxstate.StateError), match="Boxed"):
        USES[use](Boxed(jnp.array(X)))


def test_values_of_such_types_beside_state(key):
    @jax.jit
    def f(x, boxed):
        return x + jaxstate.random.uniform((2,)), boxed

    with jaxstate.rng_stream(key) as stream:
        y, boxed = f(X, Boxed(jnp.array(X)))
        assert stream.count == 1
    np.testing.assert_array_equal(boxed.array, X)
    np.testing.assert_allclose(y, X + jax.random.uniform(jax.random.fold_in(key, 0), (2,)))
