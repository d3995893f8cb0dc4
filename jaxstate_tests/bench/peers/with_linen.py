"""The models with Flax linen.

A recurrent cell that makes statistics does not go through ``nn.scan``, and is left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


class Dense(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("w", ops.LECUN, (x.shape[-1], self.features))
        return ops.dense(x, w, self.param("b", ops.ZEROS, (self.features,)))


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        mean = self.variable("statistics", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("statistics", "var", jnp.ones, x.shape[-1:])
        y, new_mean, new_var = ops.batch_norm(x, mean.value, var.value)
        if not self.is_initializing():
            mean.value, var.value = new_mean, new_var
        return y


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", ops.ONES, x.shape[-1:])
        return ops.layer_norm(x, scale, self.param("shift", ops.ZEROS, x.shape[-1:]))


def _net(module: nn.Module) -> Net:
    def init(key: Any, x: Any) -> Any:
        made = module.init({"params": key, "dropout": key}, x)
        return made.get("params"), {"statistics": made.get("statistics", {})}

    def forward(params: Any, state: Any, x: Any, key: Any) -> Any:
        given = {"params": params, **state}
        return module.apply(given, x, mutable=["statistics"], rngs={"dropout": key})

    return Net(init, forward)


class MLP(nn.Module):
    depth: int
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = jax.nn.relu(BatchNorm()(Dense(self.width)(x)))
            x = ops.dropout(self.make_rng("dropout"), x)
        return x


def mlp(depth: int, width: int) -> Net:
    return _net(MLP(depth, width))


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        dense = lambda x: Dense(self.width)(x)  # noqa: E731
        h = LayerNorm()(x)
        mixed = dense(ops.attention(dense(h), dense(h), dense(h), self.heads))
        x = x + ops.dropout(self.make_rng("dropout"), mixed)
        return x + dense(jax.nn.gelu(Dense(4 * self.width)(LayerNorm()(x))))


class Transformer(nn.Module):
    depth: int
    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = Block(self.width, self.heads)(x)
        return x


def transformer(depth: int, width: int, heads: int) -> Net:
    return _net(Transformer(depth, width, heads))


class Conv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return ops.conv(x, self.param("w", ops.LECUN, (3, 3, x.shape[-1], self.features)))


class ConvNet(nn.Module):
    depth: int
    channels: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = jax.nn.relu(BatchNorm()(Conv(self.channels)(x)))
        return Dense(10)(x.mean((1, 2)))


def convnet(depth: int, channels: int) -> Net:
    return _net(ConvNet(depth, channels))
