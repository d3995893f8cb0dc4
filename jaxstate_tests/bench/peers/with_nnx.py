"""The models with Flax NNX, split into arrays and structure for JAX's transformations.

A recurrent cell with statistics does not go through `jax.lax.scan`, and is left out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


class Dense(nnx.Module):
    def __init__(self, features_in: int, features: int, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(ops.LECUN(rngs.params(), (features_in, features)))
        self.b = nnx.Param(ops.ZEROS(rngs.params(), (features,)))

    def __call__(self, x: Any) -> Any:
        return ops.dense(x, self.w[...], self.b[...])


class BatchNorm(nnx.Module):
    def __init__(self, features: int) -> None:
        self.mean = nnx.BatchStat(jnp.zeros((features,)))
        self.var = nnx.BatchStat(jnp.ones((features,)))

    def __call__(self, x: Any) -> Any:
        y, mean, var = ops.batch_norm(x, self.mean[...], self.var[...])
        self.mean[...], self.var[...] = mean, var
        return y


class LayerNorm(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(ops.ONES(rngs.params(), (features,)))
        self.shift = nnx.Param(ops.ZEROS(rngs.params(), (features,)))

    def __call__(self, x: Any) -> Any:
        return ops.layer_norm(x, self.scale[...], self.shift[...])


def _net(make: Callable[[nnx.Rngs], nnx.Module]) -> Net:
    graph: Any = None

    def init(key: Any, x: Any) -> Any:
        nonlocal graph
        graph, params, state = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        return params, state

    def forward(params: Any, state: Any, x: Any, key: Any) -> Any:
        module: Any = nnx.merge(graph, params, state, copy=True)
        y = module(x, nnx.Rngs(key))
        return y, nnx.state(module, nnx.Not(nnx.Param))

    return Net(init, forward)


class MLP(nnx.Module):
    def __init__(self, depth: int, width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Dense(width, width, rngs) for _ in range(depth)])
        self.norms = nnx.List([BatchNorm(width) for _ in range(depth)])

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = ops.dropout(rngs.dropout(), jax.nn.relu(norm(layer(x))))
        return x


def mlp(depth: int, width: int) -> Net:
    return _net(lambda rngs: MLP(depth, width, rngs))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = LayerNorm(width, rngs), LayerNorm(width, rngs)
        self.q, self.k, self.v, self.out = (Dense(width, width, rngs) for _ in range(4))
        self.up, self.down = Dense(width, 4 * width, rngs), Dense(4 * width, width, rngs)
        self.heads = heads

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        h = self.first(x)
        mixed = self.out(ops.attention(self.q(h), self.k(h), self.v(h), self.heads))
        x = x + ops.dropout(rngs.dropout(), mixed)
        return x + self.down(jax.nn.gelu(self.up(self.second(x))))


class Transformer(nnx.Module):
    def __init__(self, depth: int, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        for block in self.blocks:
            x = block(x, rngs)
        return x


def transformer(depth: int, width: int, heads: int) -> Net:
    return _net(lambda rngs: Transformer(depth, width, heads, rngs))


class Conv(nnx.Module):
    def __init__(self, features_in: int, features: int, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(ops.LECUN(rngs.params(), (3, 3, features_in, features)))

    def __call__(self, x: Any) -> Any:
        return ops.conv(x, self.w[...])


class ConvNet(nnx.Module):
    def __init__(self, depth: int, channels: int, rngs: nnx.Rngs) -> None:
        widths = [3, *[channels] * depth]
        self.convs = nnx.List([Conv(a, b, rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([BatchNorm(channels) for _ in range(depth)])
        self.head = Dense(channels, 10, rngs)

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def convnet(depth: int, channels: int) -> Net:
    return _net(lambda rngs: ConvNet(depth, channels, rngs))
