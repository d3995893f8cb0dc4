"""A counter, and how results with variables are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

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
