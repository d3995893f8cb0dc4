"""The mathematics of the benchmark models, shared by all libraries.

What is compared is how a library gets parameters, keys and running statistics to these functions.
"""

from typing import Any

import jax
import jax.numpy as jnp

LECUN = jax.nn.initializers.lecun_normal()
ZEROS = jax.nn.initializers.zeros
ONES = jax.nn.initializers.ones


def dense(x: Any, w: Any, b: Any) -> Any:
    return x @ w + b


def batch_norm(x: Any, mean: Any, var: Any) -> tuple[Any, Any, Any]:
    """``x`` normalized over all axes but the last, and the running statistics after it."""
    axes = tuple(range(x.ndim - 1))
    here = x.mean(axes)
    spread = ((x - here) ** 2).mean(axes)
    normalized = (x - here) * jax.lax.rsqrt(spread + 1e-5)
    return normalized, 0.9 * mean + 0.1 * here, 0.9 * var + 0.1 * spread


def layer_norm(x: Any, scale: Any, shift: Any) -> Any:
    mean = x.mean(-1, keepdims=True)
    spread = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(spread + 1e-5) * scale + shift


def dropout(key: Any, x: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0.0)


def attention(q: Any, k: Any, v: Any, heads: int) -> Any:
    """From (batch, length, width) to the same."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def conv(x: Any, w: Any) -> Any:
    """From (batch, height, width, channels) with a kernel of shape (3, 3, channels, features)."""
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def cell(carry: Any, x: Any, w: Any, b: Any) -> Any:
    """One step of a recurrent network."""
    return jnp.tanh(jnp.concatenate([carry, x], -1) @ w + b)
