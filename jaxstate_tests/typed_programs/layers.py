"""A network with parameters, variables, draws and methods: trained, stacked and reused."""

from typing import assert_type

import jax
import jax.numpy as jnp

import jaxstate


@jaxstate.parametrized
def dense(x: jax.Array, features: int = 4) -> jax.Array:
    w = jaxstate.param("w", jax.nn.initializers.lecun_normal(), (x.shape[-1], features))
    b = jaxstate.param("b", jax.nn.initializers.zeros, (features,))
    assert_type(b, jax.Array)
    return x @ w + b


@jaxstate.parametrized(name="network")
def net(x: jax.Array, *, train: bool = False) -> jax.Array:
    x = jnp.tanh(dense(x))
    mean = jaxstate.variable("mean", jnp.zeros, (4,))
    assert_type(mean, jaxstate.Variable[jax.Array])
    if train:
        mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        x = x * jaxstate.random.bernoulli(0.9, x.shape, stream="dropout")
    return jaxstate.sow("hidden", x - mean.value)


class Mlp:
    def __init__(self, width: int) -> None:
        self.width = width

    @jaxstate.parametrized
    def __call__(self, x: jax.Array, depth: int) -> tuple[jax.Array, int]:
        for _ in range(depth):
            x = dense(x, self.width)
        return x, depth

    @jaxstate.parametrized(name="half")
    def half(self, x: jax.Array) -> jax.Array:
        return x / 2


@jaxstate.parametrized
def block(x: jax.Array, scale: float = 1.0) -> jax.Array:
    with jaxstate.scope("inner"):
        shift = jaxstate.param("shift", lambda key: jax.random.normal(key, x.shape))
        assert_type(shift, jax.Array)
        return x * scale * jaxstate.param("s", jax.nn.initializers.ones, ()) + shift


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    shape: jax.ShapeDtypeStruct = jax.eval_shape(lambda: x)
    return shape


def main() -> None:
    key = jax.random.key(0)
    x = jnp.ones((2, 3))
    keys = {"params": key, "dropout": key}

    params, state = net.init_with_state(key, x)
    assert_type(net.apply(params, x, state=state, train=False), jax.Array)
    y, state = net.apply_with_state(params, state, x, key=keys, train=True)
    assert_type(y, jax.Array)
    y, state = net.apply_with_state(params, state, x)
    assert_type(dense.apply(dense.init(key, x), x, features=4), jax.Array)
    dense.init(key, shape_of(x))
    dense.init(keys, x, reuse={dense: dense.init(key, x)})
    assert_type(dense.apply_from({dense: dense.init(key, x)}, x), jax.Array)
    assert_type(dense.shaped(x).apply(dense.init(key, x), x), jax.Array)
    print(dense.summary(key, x).total_size)

    mlp = Mlp(3)
    out, depth = mlp.__call__.apply(mlp.__call__.init(key, x, 2), x, depth=2)
    assert_type(out, jax.Array)
    assert_type(depth, int)
    assert_type(mlp.half.apply({}, x), jax.Array)

    deep = jaxstate.stack(block, 3, checkpoint=True)
    assert_type(deep.apply(deep.init(key, x, 2.0), x, scale=2.0), jax.Array)
    deep.restack(deep.unstack(deep.init(key, x)))

    (y, state), sown = jaxstate.reap(net.apply_with_state)(params, state, x)
    print(sown["hidden"].shape)

    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return dense.apply(params, x).sum()

    jax.jit(jax.grad(loss))(dense.init(key, x), x)


if __name__ == "__main__":
    main()
