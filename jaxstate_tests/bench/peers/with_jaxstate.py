"""The models with jaxstate."""

from typing import Any

import jax
import jax.numpy as jnp

import jaxstate
from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


def dense(features: int) -> Any:
    @jaxstate.parametrized
    def dense(x: Any) -> Any:
        w = jaxstate.param("w", ops.LECUN, (x.shape[-1], features))
        return ops.dense(x, w, jaxstate.param("b", ops.ZEROS, (features,)))

    return dense


def batch_norm() -> Any:
    @jaxstate.parametrized
    def norm(x: Any) -> Any:
        mean = jaxstate.variable("mean", jnp.zeros, x.shape[-1:])
        var = jaxstate.variable("var", jnp.ones, x.shape[-1:])
        y, mean.value, var.value = ops.batch_norm(x, mean.value, var.value)
        return y

    return norm


def layer_norm() -> Any:
    @jaxstate.parametrized
    def norm(x: Any) -> Any:
        scale = jaxstate.param("scale", ops.ONES, x.shape[-1:])
        return ops.layer_norm(x, scale, jaxstate.param("shift", ops.ZEROS, x.shape[-1:]))

    return norm


def dropout(x: Any) -> Any:
    return ops.dropout(jaxstate.next_key(), x)


def _net(module: Any) -> Net:
    return Net(
        module.init_with_state,
        lambda params, state, x, key: module.apply_with_state(params, state, x, key=key),
    )


def mlp(depth: int, width: int) -> Net:
    layers = [(dense(width), batch_norm()) for _ in range(depth)]

    @jaxstate.parametrized
    def mlp(x: Any) -> Any:
        for layer, norm in layers:
            x = dropout(jax.nn.relu(norm(layer(x))))
        return x

    return _net(mlp)


def block(width: int, heads: int) -> Any:
    q, k, v, out, up, down = map(dense, [width] * 4 + [4 * width, width])
    first, second = layer_norm(), layer_norm()

    @jaxstate.parametrized
    def block(x: Any) -> Any:
        h = first(x)
        x = x + dropout(out(ops.attention(q(h), k(h), v(h), heads)))
        return x + down(jax.nn.gelu(up(second(x))))

    return block


def transformer(depth: int, width: int, heads: int) -> Net:
    blocks = [block(width, heads) for _ in range(depth)]

    @jaxstate.parametrized
    def transformer(x: Any) -> Any:
        for f in blocks:
            x = f(x)
        return x

    return _net(transformer)


def rnn(width: int) -> Net:
    @jaxstate.parametrized
    def cell(carry: Any, x: Any) -> Any:
        w = jaxstate.param("w", ops.LECUN, (width + x.shape[-1], width))
        b = jaxstate.param("b", ops.ZEROS, (width,))
        steps = jaxstate.variable("steps", jnp.zeros, (), jnp.int32)
        steps.value += 1
        carry = dropout(ops.cell(carry, x, w, b))
        return carry, carry

    @jaxstate.parametrized
    def rnn(xs: Any) -> Any:
        start = jnp.zeros((xs.shape[1], width))
        return jax.lax.scan(cell, start, xs)[1]

    return _net(rnn)


def conv(features: int) -> Any:
    @jaxstate.parametrized
    def conv(x: Any) -> Any:
        return ops.conv(x, jaxstate.param("w", ops.LECUN, (3, 3, x.shape[-1], features)))

    return conv


def convnet(depth: int, channels: int) -> Net:
    layers = [(conv(channels), batch_norm()) for _ in range(depth)]
    head = dense(10)

    @jaxstate.parametrized
    def convnet(x: Any) -> Any:
        for layer, norm in layers:
            x = jax.nn.relu(norm(layer(x)))
        return head(x.mean((1, 2)))

    return _net(convnet)
