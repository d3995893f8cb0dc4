"""Combinators: functions from networks to networks, in a few lines each.

A parametrized function may call ``init`` and ``apply`` of another one. The parameters of that one
can then be a parameter (a tree of arrays) of its own, and it can do with them what it likes: add up
their squares, transform them, map over a batch. The ideas are those of JAXnet
(https://github.com/JuliusKunze/jaxnet).

    python examples/combinators.py
"""

import jax
import jax.numpy as jnp

import jaxstate


def parameters_of(model, *args):
    """All parameters of ``model``, as one parameter of the function that is running."""
    return jaxstate.param("model", model.init, *args)


def Regularized(loss, regularizer):
    """``loss`` plus ``regularizer(params)`` of its parameters."""

    @jaxstate.parametrized
    def regularized(*args):
        params = parameters_of(loss, *args)
        return loss.apply(params, *args) + regularizer(params)

    return regularized


def L2Regularized(loss, scale):
    """``loss`` plus ``scale`` times half the sum of the squares of its parameters."""

    def penalty(params):
        return scale * sum(jnp.sum(p**2) for p in jax.tree.leaves(params)) / 2

    return Regularized(loss, penalty)


def Reparametrized(model, transform):
    """``model`` with ``transform()(p)`` in the place of each of its parameters ``p``.

    ``transform`` makes a parametrized function, so a transformation may have parameters too.
    """

    @jaxstate.parametrized
    def reparametrized(*args):
        params = parameters_of(model, *args)
        return model.apply(jax.tree.map(lambda p: transform()(p), params), *args)

    return reparametrized


def Batched(model, axis=0):
    """``model``, a function of one example, for a batch along ``axis`` of every argument."""

    @jaxstate.parametrized
    def batched(*args):
        return jax.vmap(model, in_axes=axis)(*args)

    return batched


def normalized():
    """Weight normalization (Salimans and Kingma, 2016): length and direction of the weights."""

    @jaxstate.parametrized
    def normalized(w):
        length = jaxstate.param("length", lambda key, w: jnp.linalg.norm(w), w)
        return length * w / jnp.maximum(jnp.linalg.norm(w), 1e-12)

    return normalized


@jaxstate.parametrized
def linear(x):
    w = jaxstate.param("w", jax.nn.initializers.normal(), x.shape)
    return jnp.dot(w, x)


def main():
    predict = Batched(Reparametrized(linear, normalized))

    @jaxstate.parametrized
    def squared_error(x, y):
        return jnp.mean((predict(x) - y) ** 2)

    loss = L2Regularized(squared_error, 1e-3)
    x = jax.random.normal(jax.random.key(0), (64, 3))
    y = x @ jnp.array([1.0, -2.0, 0.5])
    params = loss.init(jax.random.key(1), x, y)
    print(jax.tree.map(jnp.shape, params))

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(loss.apply)(params, x, y)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

    for i in range(101):
        params, value = step(params)
        if i % 25 == 0:
            print(f"step {i:3}: loss {value:.4f}")


if __name__ == "__main__":
    main()
