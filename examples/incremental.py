"""Sampling from a model of sequences, with each of its intermediate values computed once.

A model of sequences says, for all positions at once, what comes next: ``f(x)[i]`` depends on
``x[:i]`` only. To sample from it is to find the ``x`` with ``x == f(x)``, element by element::

    for i in range(n):
        x = x.at[i].set(f(x)[i])            # naive: all of f, n times

`jaxstate.causal_fixed_point` finds the same ``x``, and computes each element of each intermediate
value once::

    x = jaxstate.causal_fixed_point(f, jnp.zeros(n))

The models here know nothing of it: there is no cache of keys and values in the transformer, and no
queue of activations in the convolutions. Run this file for operations and times of processors::

    python examples/incremental.py
"""

import math
import time
from functools import partial

import jax
import jax.numpy as jnp
from count_operations import count

from jaxstate import causal_fixed_point


def sample_naively(f, x):
    """The ``x`` with ``x == f(x)``, by running all of ``f`` for each element."""
    return jax.lax.fori_loop(0, len(x), lambda t, x: x.at[t].set(f(x)[t]), jnp.zeros_like(x))


def weights(key, *shape):
    return jax.random.normal(key, shape) / math.sqrt(shape[-2])


def drawn(key, logits, dtype):
    """A token for each position. The draws are fixed by the key."""
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape), -1).astype(dtype)


def before(tokens):
    """The token before each token."""
    return jnp.concatenate([jnp.zeros_like(tokens[:1]), tokens[:-1]])


def normalized(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def transformer(key, vocabulary=16, width=64, heads=4, layers=4):
    """A transformer with random weights.

    Returns:
      A function of a sequence of tokens, int32 of shape (n,), to another: the next tokens, drawn
      from what the model makes of the tokens before.
    """
    keys = jax.random.split(key, 7)
    embedding, head = weights(keys[0], vocabulary, width) * 2, weights(keys[1], width, vocabulary)
    blocks = {
        "qkv": weights(keys[2], layers, width, 3 * width),
        "out": weights(keys[3], layers, width, width),
        "up": weights(keys[4], layers, width, 4 * width),
        "down": weights(keys[5], layers, 4 * width, width),
    }

    def block(x, w):
        q, k, v = jnp.split((normalized(x) @ w["qkv"]).reshape(1, len(x), heads, -1), 3, -1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(normalized(x) @ w["up"]) @ w["down"], None

    def model(tokens):
        angles = jnp.arange(len(tokens))[:, None] / 100 ** jnp.linspace(0, 1, width // 2)
        positions = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x, _ = jax.lax.scan(block, embedding[before(tokens)] + positions, blocks)
        return drawn(keys[6], normalized(x) @ head * 2, tokens.dtype)

    return model


def causal_conv_model(key, vocabulary=16, channels=16, layers=6, taps=2):
    """Dilated causal convolutions with gates (https://arxiv.org/abs/1609.03499), random weights.

    Returns:
      A function of tokens to the next tokens, like `transformer`.
    """
    keys = iter(jax.random.split(key, 2 * layers + 3))
    embedding = weights(next(keys), vocabulary, channels) * 4
    gates = [weights(next(keys), taps, channels, 2 * channels) for _ in range(layers)]
    mixes = [weights(next(keys), channels, channels) for _ in range(layers)]
    head, noise = weights(next(keys), channels, vocabulary) * 2, next(keys)

    @partial(jax.jit, static_argnums=3)
    def layer(x, gate, mix, dilation):
        reach = (taps - 1) * dilation
        h = jax.lax.conv_general_dilated(
            x[None], gate, (1,), [(reach, 0)], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0]  # fmt: skip
        a, b = jnp.split(h, 2, axis=-1)
        return x + (jnp.tanh(a) * jax.nn.sigmoid(b)) @ mix

    def model(tokens):
        x = embedding[before(tokens)]
        for k, (gate, mix) in enumerate(zip(gates, mixes, strict=True)):
            x = layer(x, gate, mix, 2**k)
        return drawn(noise, jax.nn.gelu(normalized(x)) @ head, tokens.dtype)

    return model


def timed(f, x):
    """The result of a function, and how many seconds of processors it takes when it is compiled."""
    f = jax.jit(f).lower(x).compile()
    f(x).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        out = f(x).block_until_ready()
        seconds.append(time.process_time() - start)
    return out, min(seconds)


def compare(model, n):
    """One line of the table. The naive way takes n evaluations of the model; one is measured."""
    fast = partial(causal_fixed_point, model)
    x = jnp.zeros(n, jnp.int32)
    flops = count(jax.jit(fast))(x)[1].flops.total() // n
    naive_flops = count(jax.jit(model))(x)[1].flops.total()  # all of it, for each element
    found, seconds = timed(fast, x)
    again, naive_seconds = timed(model, found)
    assert (again == found).all(), "only one sequence has x == f(x)"
    ms, naive_ms = 1e3 * seconds / n, 1e3 * naive_seconds
    print(
        f"{n:6}{flops:20,}{naive_flops:16,}{ms:18.3f}{naive_ms:11.3f}{naive_ms / ms:9.0f}x",
        flush=True,
    )


def main():
    for make in (transformer, causal_conv_model):
        print(f"{make.__name__}")
        print("     n   flops per element           naive    ms per element      naive   faster")
        for n in (64, 128, 256, 512, 1024):
            compare(make(jax.random.key(0)), n)


if __name__ == "__main__":
    main()
