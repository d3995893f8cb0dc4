"""The models with Equinox. Keys are split and passed by hand there, as its own layers do."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


class Dense(eqx.Module):
    w: jax.Array
    b: jax.Array

    def __init__(self, features_in: int, features: int, key: Any) -> None:
        self.w = ops.LECUN(key, (features_in, features))
        self.b = ops.ZEROS(key, (features,))

    def __call__(self, x: Any) -> Any:
        return ops.dense(x, self.w, self.b)


class BatchNorm(eqx.Module):
    statistics: eqx.nn.StateIndex

    def __init__(self, features: int) -> None:
        self.statistics = eqx.nn.StateIndex((jnp.zeros((features,)), jnp.ones((features,))))

    def __call__(self, x: Any, state: eqx.nn.State) -> Any:
        y, mean, var = ops.batch_norm(x, *state.get(self.statistics))
        return y, state.set(self.statistics, (mean, var))


class LayerNorm(eqx.Module):
    scale: jax.Array
    shift: jax.Array

    def __init__(self, features: int, key: Any) -> None:
        self.scale = ops.ONES(key, (features,))
        self.shift = ops.ZEROS(key, (features,))

    def __call__(self, x: Any) -> Any:
        return ops.layer_norm(x, self.scale, self.shift)


def _net(make: Callable[[Any], eqx.Module]) -> Net:
    static: Any = None
    tree: Any = None  # a state may be used once, so what is kept of it is a list of its arrays

    def init(key: Any, x: Any) -> Any:
        nonlocal static, tree
        model, state = eqx.nn.make_with_state(make)(key)
        params, static = eqx.partition(model, eqx.is_array)
        arrays, tree = jax.tree.flatten(state)
        return params, arrays

    def forward(params: Any, arrays: Any, x: Any, key: Any) -> Any:
        model: Any = eqx.combine(params, static)
        y, state = model(x, tree.unflatten(arrays), key)
        return y, jax.tree.leaves(state)

    return Net(init, forward)


class MLP(eqx.Module):
    layers: list[Dense]
    norms: list[BatchNorm]

    def __init__(self, depth: int, width: int, key: Any) -> None:
        self.layers = [Dense(width, width, k) for k in jax.random.split(key, depth)]
        self.norms = [BatchNorm(width) for _ in range(depth)]

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(self.layers))
        for layer, norm, k in zip(self.layers, self.norms, keys, strict=True):
            x, state = norm(layer(x), state)
            x = ops.dropout(k, jax.nn.relu(x))
        return x, state


def mlp(depth: int, width: int) -> Net:
    return _net(lambda key: MLP(depth, width, key))


class Block(eqx.Module):
    first: LayerNorm
    second: LayerNorm
    dense: list[Dense]
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, key: Any) -> None:
        keys = jax.random.split(key, 8)
        widths = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        self.first, self.second = LayerNorm(width, keys[0]), LayerNorm(width, keys[1])
        self.dense = [Dense(*w, k) for w, k in zip(widths, keys[2:], strict=True)]
        self.heads = heads

    def __call__(self, x: Any, key: Any) -> Any:
        q, k, v, out, up, down = self.dense
        h = self.first(x)
        x = x + ops.dropout(key, out(ops.attention(q(h), k(h), v(h), self.heads)))
        return x + down(jax.nn.gelu(up(self.second(x))))


class Transformer(eqx.Module):
    blocks: list[Block]

    def __init__(self, depth: int, width: int, heads: int, key: Any) -> None:
        self.blocks = [Block(width, heads, k) for k in jax.random.split(key, depth)]

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(self.blocks))
        for block, k in zip(self.blocks, keys, strict=True):
            x = block(x, k)
        return x, state


def transformer(depth: int, width: int, heads: int) -> Net:
    return _net(lambda key: Transformer(depth, width, heads, key))


class RNN(eqx.Module):
    dense: Dense
    steps: eqx.nn.StateIndex
    width: int = eqx.field(static=True)

    def __init__(self, width: int, key: Any) -> None:
        self.dense = Dense(2 * width, width, key)
        self.steps = eqx.nn.StateIndex(jnp.zeros((), jnp.int32))
        self.width = width

    def __call__(self, xs: Any, state: Any, key: Any) -> Any:
        def body(carry: Any, each: Any) -> Any:
            (h, state), (x, key) = carry, each
            state = state.set(self.steps, state.get(self.steps) + 1)
            h = ops.dropout(key, ops.cell(h, x, self.dense.w, self.dense.b))
            return (h, state), h

        start = jnp.zeros((xs.shape[1], self.width))
        keys = jax.random.split(key, xs.shape[0])
        (_, state), hs = jax.lax.scan(body, (start, state), (xs, keys))
        return hs, state


def rnn(width: int) -> Net:
    return _net(lambda key: RNN(width, key))


class ConvNet(eqx.Module):
    kernels: list[jax.Array]
    norms: list[BatchNorm]
    head: Dense

    def __init__(self, depth: int, channels: int, key: Any) -> None:
        *keys, last = jax.random.split(key, depth + 1)
        shapes = [(3, 3, channels if i else 3, channels) for i in range(depth)]
        self.kernels = [ops.LECUN(k, s) for k, s in zip(keys, shapes, strict=True)]
        self.norms = [BatchNorm(channels) for _ in range(depth)]
        self.head = Dense(channels, 10, last)

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x, state = norm(ops.conv(x, kernel), state)
            x = jax.nn.relu(x)
        return self.head(x.mean((1, 2))), state


def convnet(depth: int, channels: int) -> Net:
    return _net(lambda key: ConvNet(depth, channels, key))
