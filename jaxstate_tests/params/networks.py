"""Small networks, the same by hand, and what is compared."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

import jaxstate

normal = jax.nn.initializers.normal(1.0)
lecun = jax.nn.initializers.lecun_normal()
zeros = jax.nn.initializers.zeros


def dense(features):
    @jaxstate.parametrized
    def dense(x):
        w = jaxstate.param("w", lecun, (x.shape[-1], features))
        b = jaxstate.param("b", zeros, (features,))
        return x @ w + b

    return dense


def dense_by_hand(p, x):
    return x @ p["w"] + p["b"]


def scaled(name="scale"):
    @jaxstate.parametrized(name=name)
    def scale(x):
        return x * jaxstate.param("s", normal, ())

    return scale


def shapes(params):
    return jax.tree.map(jnp.shape, params)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, rtol=1e-5):
    """Each array to `rtol` of its largest element, which is what its sums are rounded to."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(_assert_close, rtol), a, b)


def _assert_close(rtol, x, y):
    largest = np.max(np.abs(y), initial=0.1, where=np.isfinite(y))
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * largest)


@jaxstate.parametrized
def net(x, layer=dense(8), head=dense(1)):
    x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(layer(x)), x)
    return jax.jit(head)(x)


def net_by_hand(p, x):
    for _ in range(3):
        x = jnp.tanh(dense_by_hand(p["dense"], x))
    return dense_by_hand(p["dense_1"], x)
