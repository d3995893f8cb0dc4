"""The models with Haiku."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


def _param(name: str, init: Any, shape: tuple[int, ...]) -> Any:
    return hk.get_parameter(name, shape, init=lambda s, d: init(hk.next_rng_key(), s, d))


class Dense(hk.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def __call__(self, x: Any) -> Any:
        w = _param("w", ops.LECUN, (x.shape[-1], self.features))
        return ops.dense(x, w, _param("b", ops.ZEROS, (self.features,)))


class BatchNorm(hk.Module):
    def __call__(self, x: Any) -> Any:
        mean = hk.get_state("mean", x.shape[-1:], init=jnp.zeros)
        var = hk.get_state("var", x.shape[-1:], init=jnp.ones)
        y, mean, var = ops.batch_norm(x, mean, var)
        hk.set_state("mean", mean)
        hk.set_state("var", var)
        return y


class LayerNorm(hk.Module):
    def __call__(self, x: Any) -> Any:
        scale = _param("scale", ops.ONES, x.shape[-1:])
        return ops.layer_norm(x, scale, _param("shift", ops.ZEROS, x.shape[-1:]))


def dropout(x: Any) -> Any:
    return ops.dropout(hk.next_rng_key(), x)


def _net(fun: Any) -> Net:
    f = hk.transform_with_state(fun)
    return Net(f.init, lambda params, state, x, key: f.apply(params, state, key, x))


def mlp(depth: int, width: int) -> Net:
    def fun(x: Any) -> Any:
        for _ in range(depth):
            x = dropout(jax.nn.relu(BatchNorm()(Dense(width)(x))))
        return x

    return _net(fun)


class Block(hk.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads

    def __call__(self, x: Any) -> Any:
        dense = lambda x: Dense(self.width)(x)  # noqa: E731
        h = LayerNorm()(x)
        x = x + dropout(dense(ops.attention(dense(h), dense(h), dense(h), self.heads)))
        return x + dense(jax.nn.gelu(Dense(4 * self.width)(LayerNorm()(x))))


def transformer(depth: int, width: int, heads: int) -> Net:
    def fun(x: Any) -> Any:
        for _ in range(depth):
            x = Block(width, heads)(x)
        return x

    return _net(fun)


class Cell(hk.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def __call__(self, carry: Any, x: Any) -> Any:
        w = _param("w", ops.LECUN, (self.width + x.shape[-1], self.width))
        b = _param("b", ops.ZEROS, (self.width,))
        steps = hk.get_state("steps", (), jnp.int32, init=jnp.zeros)
        hk.set_state("steps", steps + 1)
        carry = dropout(ops.cell(carry, x, w, b))
        return carry, carry


def rnn(width: int) -> Net:
    def fun(xs: Any) -> Any:
        cell = Cell(width)
        return hk.scan(cell, jnp.zeros((xs.shape[1], width)), xs)[1]

    return _net(fun)


class Conv(hk.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def __call__(self, x: Any) -> Any:
        return ops.conv(x, _param("w", ops.LECUN, (3, 3, x.shape[-1], self.features)))


def convnet(depth: int, channels: int) -> Net:
    def fun(x: Any) -> Any:
        for _ in range(depth):
            x = jax.nn.relu(BatchNorm()(Conv(channels)(x)))
        return Dense(10)(x.mean((1, 2)))

    return _net(fun)
