"""Causal functions of a sequence, one for each kind of operation along it.

Each takes and returns float32 of shape (n,), for n a multiple of 2, and ``f(x)[i]`` depends on
``x[:i]``.
"""

import math

import jax
import jax.numpy as jnp


def weights(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[-2])


def shifted(x):
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def embedded(x, width=4):
    """Features (n, width) of what came before each element, all different."""
    t = jnp.arange(len(x))[:, None]
    return jnp.sin(shifted(x)[:, None] * jnp.arange(1, width + 1) + jnp.arange(width) + 0.1 * t)


def read_out(h):
    return jnp.tanh(h.reshape(len(h), -1).sum(1) * 0.5)


def triangle(n):
    return jnp.tri(n, dtype=bool)


# -- Attention


def softmax_attention(x):
    h = embedded(x)
    q, k, v = (h @ weights(s, 4, 4) for s in range(3))
    logits = jnp.where(jnp.tril(jnp.ones((len(x), len(x)), bool)), q @ k.T, -jnp.inf)
    return read_out(jax.nn.softmax(logits) @ v)


def added_mask(x):
    """What is not to be seen is far below; the exponentials are written out."""
    h = embedded(x)
    i = jnp.arange(len(x))
    logits = h @ h.T / 2 + jnp.where(i[:, None] >= i, 0.0, -1e9)
    p = jnp.exp(logits - logits.max(-1, keepdims=True))
    return read_out((p @ h) / p.sum(-1, keepdims=True))


def multiplied_mask(x):
    """Linear attention, by angles. The length of what is not known yet is zero where it is kept."""
    h, mask = embedded(x), jnp.tri(len(x))
    lengths = jnp.linalg.norm(h, axis=-1)
    ahead = 1 / jnp.concatenate([lengths, jnp.ones(2)])[2:]
    lengths = lengths[:, None] * lengths
    pairs = h[:, None] * h / lengths[..., None]
    y = ((h @ h.T) / lengths * mask) @ h + jnp.einsum("ij,ijd->id", mask, pairs)
    return read_out(y) + 0.1 * jnp.tri(len(x), k=-2) @ ahead


def library_attention(x):
    h = embedded(x, 8)[None]
    q, k, v = ((h @ weights(s, 8, 8)).reshape(1, len(x), 2, 4) for s in range(3))
    return read_out(jax.nn.dot_product_attention(q, k, v, is_causal=True)[0])


def library_options(x):
    """Fewer heads for keys than for queries, a window, a bias."""
    h, n = embedded(x, 8)[None], len(x)
    q = (h @ weights(0, 8, 16)).reshape(1, n, 4, 4)
    k, v = ((h @ weights(s, 8, 8)).reshape(1, n, 2, 4) for s in (1, 2))
    bias = jnp.sin(jnp.arange(n * n * 4.0)).reshape(1, 4, n, n)
    out = jax.nn.dot_product_attention(q, k, v, bias, is_causal=True, local_window_size=(2, 0))
    return read_out(out[0])


def padded_attention(x):
    """A mask of which only a part is known while tracing."""
    h, n = embedded(x), len(x)
    seen = jax.random.bernoulli(jax.random.key(3), 0.7, (n,)).at[0].set(True)
    logits = jnp.where(triangle(n) & seen, h @ h.T, jnp.finfo(h.dtype).min)
    return read_out(jax.nn.softmax(logits) @ h)


def attention_to_a_prefix(x):
    h = jnp.concatenate([weights(0, 3, 4), embedded(x)])
    i = jnp.arange(len(h))
    mask = (i[:, None] >= i) | ((i[:, None] < 3) & (i < 3))
    for _ in range(2):
        h = h + jax.nn.softmax(jnp.where(mask, h @ h.T, -jnp.inf)) @ h
    return read_out(h[3:])


def attention_in_blocks(x):
    h = embedded(x).reshape(-1, 2, 4)
    logits = jnp.where(triangle(2), jnp.einsum("bid,bjd->bij", h, h), -jnp.inf)
    return read_out((jax.nn.softmax(logits) @ h).reshape(-1, 4))


def rotated_attention(x):
    h, n = embedded(x), len(x)
    angle = jnp.arange(n)[:, None] * jnp.array([1.0, 0.1])

    def rotated(h):
        a, b = jnp.split(h, 2, -1)
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * c - b * s, a * s + b * c], -1)

    q, k = rotated(h @ weights(0, 4, 4)), rotated(h @ weights(1, 4, 4))
    return read_out(jax.nn.softmax(jnp.where(triangle(n), q @ k.T, -1e30)) @ h)


# -- Loops and branches


def loop_over_layers(x):
    def layer(h, w):
        q, k, v = jnp.einsum("td,ade->ate", h, w)
        h = h + jax.nn.softmax(jnp.where(triangle(len(x)), q @ k.T, -1e30)) @ v
        return h, h[:, 0]

    h, firsts = jax.lax.scan(layer, embedded(x), weights(3, 2, 3, 4, 4))
    return read_out(h) + firsts.sum(0) * 0.1


def recurrent(x):
    """A GRU, which counts its turns, below another network."""

    def cell(carry, x):
        h, count, noise = carry
        z = jax.nn.sigmoid(h @ weights(0, 4, 4) + x)
        h = (1 - z) * h + z * jnp.tanh((z * h) @ weights(1, 4, 4) + x + noise)
        return (h, count + 1, jnp.cos(noise + count)), (h, count)

    start = jnp.zeros(4), jnp.int32(0), jnp.float32(0.3)
    h, counts = jax.lax.scan(cell, start, embedded(x))[1]
    _, y = jax.lax.scan(lambda c, x: (c * 0.5 + x, c), jnp.zeros(4), jnp.tanh(h))
    return read_out(y + h) + counts * 0.01


def loops_without_time(x):
    h = jax.lax.fori_loop(0, 3, lambda i, c: jnp.sin(c * 2) + i, shifted(x))
    return h + jax.lax.fori_loop(0, 3, lambda i, c: c * 2.0, 0.1)


def loop_over_heads(x):
    """And over time, without a state, by ``map``."""
    h = embedded(x)

    def head(w):
        return jax.nn.softmax(jnp.where(triangle(len(x)), h @ w @ h.T, -jnp.inf)) @ h

    heads = jax.lax.map(head, weights(0, 2, 4, 4))
    again = jax.lax.map(lambda h: jnp.cumsum(h, 0)[:, 0], jnp.stack([h, -h * h]))
    return read_out(heads.sum(0)) + jnp.sin(again.sum(0)) + jax.lax.map(jnp.sum, jnp.cos(h)) * 0.1


def branches(x):
    h = shifted(x)
    known = jax.lax.cond(len(x) > 0, jnp.cos, lambda x: x[::-1], h)
    drawn = jnp.argmax(jax.random.normal(jax.random.key(0), (3,)))
    unknown = jax.lax.switch(drawn, [jnp.cos, lambda x: x + 1, jnp.sin], h)
    each = jax.vmap(lambda a: jax.lax.cond(a > 0.5, jnp.cos, lambda a: a + 0.4, a))(h)
    return known * 0.3 + unknown * 0.2 + each


@jax.custom_vjp
def gate(x):
    return x * jax.nn.sigmoid(x)


gate.defvjp(lambda x: (gate(x), None), lambda _, g: (g,))


def calls(x):
    f = jax.jit(lambda x: jax.checkpoint(jnp.cos)(gate(jax.nn.gelu(x))))
    return f(jax.jit(shifted)(x)) + 0.1


# -- Windows


def dilated(x):
    kernel = jnp.array([0.3, -0.2, 0.5])[:, None, None] * jnp.ones((1, 1, 2))
    h = jax.lax.conv_general_dilated(
        shifted(x)[None, :, None], kernel, (1,), [(4, 0)], rhs_dilation=(2,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )  # fmt: skip
    return jnp.tanh(h).sum((0, 2)) + 0.3


def strided(x):
    """Every second element, and back."""
    n, numbers = len(x), ("NWC", "WIO", "NWC")
    h = shifted(shifted(x))[None, :, None] + 0.3
    down = jax.lax.conv_general_dilated(
        h, weights(0, 2, 1, 3), (2,), [(0, 1)], dimension_numbers=numbers
    )
    up = jax.lax.conv_general_dilated(
        jnp.tanh(down), weights(1, 2, 3, 2), (1,), [(1, 2)], lhs_dilation=(2,),
        dimension_numbers=numbers,
    )  # fmt: skip
    up = jnp.pad(up, ((0, 0), (2, 0), (0, 0)))[0, :n]
    repeated = jnp.repeat(jnp.sin(h[0, ::2, 0]), 2)[:n]
    return jnp.cos(up.sum(-1)) + repeated * 0.5 + 0.1 * jnp.arange(n)


def each_channel(x):
    """A convolution of each channel for itself, and gates."""
    h = jax.lax.conv_general_dilated(
        embedded(x)[None], weights(0, 3, 1, 4), (1,), [(2, 0)], feature_group_count=4,
        dimension_numbers=("NWC", "WIO", "NWC"),
    )[0]  # fmt: skip
    a, b = jnp.split(h, 2, -1)
    return read_out(a * jax.nn.sigmoid(b))


def unpadded(x):
    h = jnp.concatenate([jnp.ones(3), x])
    return jnp.convolve(h, jnp.array([0.2, 0.5, -0.3]), mode="valid")[: len(x)] + 0.1


def pooled(x):
    h = shifted(x)
    most = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (3,), (1,), [(2, 0)])
    sums = jax.lax.reduce_window(h, 0.0, jax.lax.add, (3,), (1,), [(4, 0)], window_dilation=(2,))
    pairs = jax.lax.reduce_window(shifted(h), 0.0, jax.lax.add, (2,), (2,), "VALID")
    return jnp.sin(most + sums) + 0.3 + jnp.repeat(pairs, 2) * 0.2


# -- Other places


def lagging(x):
    """A value that is two elements behind, and one that is ahead by three."""
    behind = jnp.pad(jnp.sin(x)[1:], (3, 0))[: len(x)]
    ahead = jnp.pad(x, (3, 0))[: len(x)]
    return jax.nn.relu(shifted(behind) + jnp.cos(ahead) * 0.5 + jnp.arange(len(x)) * 0.1)


def moved(x):
    n = len(x)
    put = jnp.zeros_like(x).at[1:].set(x[:-1])
    rolled = jnp.where(jnp.arange(n) == 0, 0.2, jnp.roll(x, 1))
    added = jnp.ones_like(x).at[1:].add(x[:-1])
    row = jnp.zeros((2, n)).at[1, 1:].set(x[:-1]).sum(0)
    looked_up = jnp.where(jnp.arange(n) > 1, x[jnp.maximum(jnp.arange(n) - 2, 0)], 0.2)
    return jnp.sin(put) + jnp.cos(rolled) + (added + row) * 0.1 + looked_up * 0.3


def parts_at_known_places(x):
    """Parts that are taken and put at places that are known; what would be put beyond the end is
    left out."""
    h = embedded(x)
    part = jax.lax.dynamic_slice(h, (0, 1), (len(x), 2))
    numbers = jax.lax.ScatterDimensionNumbers((0, 1), (), (1,))
    inside, beyond = (jax.lax.scatter(h, jnp.array([i]), part, numbers) for i in (2, 3))
    return read_out(jnp.cos(inside) + beyond * h)


def beside_time(x):
    """Sorting, lookups, updates, Fourier transforms and matrices, all along the other axis."""
    h = embedded(x)
    order = jnp.argsort(h, 1)
    h = h + jnp.take_along_axis(h, order, 1) + jnp.take_along_axis(h, order[:, :1], 1)
    h = jax.lax.dynamic_update_slice(h, h[:, :2] * 2, (0, 1)) + jnp.flip(h, 1)
    h = h + jnp.fft.fft(h, axis=1).real * 0.2 + jax.lax.top_k(h, 4)[0]
    a = h[:, :, None] * h[:, None, :] * 0.1 + 2 * jnp.eye(4)
    return read_out(jnp.linalg.cholesky(a) + jnp.linalg.solve(a, h[..., None]))


def second_axis(x):
    """Time is the second axis."""
    h = jnp.stack([shifted(x), shifted(shifted(x))])
    h = (h.T @ (jnp.arange(6.0).reshape(2, 3) / 5)).T
    h = jnp.concatenate([h, -h[::-1]], 0)
    return jnp.sort(h, 0)[-1] * 0.3 + h.max(0) * 0.1 + jnp.cos(jnp.arange(h.shape[1]))


def table(x):
    rows = (jnp.arange(21.0).reshape(7, 3) / 7)[jnp.abs(shifted(x) * 5).astype(jnp.int32) % 7]
    hot = jax.nn.one_hot(jnp.abs(shifted(x) * 3).astype(jnp.int32) % 4, 4) @ weights(0, 4, 2)
    return (
        rows @ jnp.array([0.5, -1.0, 0.3]) + rows[:, 1] + hot.sum(1) + jnp.sin(jnp.arange(len(x)))
    )


def products(x):
    h, n = jnp.outer(shifted(x), jnp.array([1.0, -0.5])), len(x)
    w = jnp.sin(jnp.arange(4.0 * n)).reshape(n, 2, 2)
    return jnp.einsum("ti,tij->tj", h, w).sum(-1) + jnp.einsum("ti,ti->t", h, h) * 0.1 + 0.7


def masked_sums(x):
    n = len(x)
    strict = jnp.tri(n, k=-1)
    most = jnp.max(jnp.where(strict > 0, x, -1.0), 1)
    return jnp.sin((x * strict).sum(1) + strict @ x) * 0.5 + 0.4 + most * 0.2


# -- One after another


def running(x):
    h = shifted(x)
    sums = jnp.stack([jnp.cumsum(h), jnp.cumprod(h + 1), jax.lax.cummax(h), jax.lax.cummin(h)])
    return jnp.sin(sums.sum(0)) + jax.lax.cumlogsumexp(h) * 0.1 + jnp.cumsum(embedded(x), 1)[:, 1]


def running_from_the_end(x):
    """What comes first is at the end; what is summed there comes last."""
    h = jnp.flip(embedded(x), 0)
    h = jax.lax.cumsum(h, reverse=True) * 0.1 + jax.lax.cummax(h, reverse=True)
    return jnp.flip(read_out(h), 0)


def running_in_pairs(x):
    """Several elements of a running sum are new at once; in the shortest sequence, all."""
    h = jnp.repeat(embedded(x)[::2], 2, axis=0)
    _, y = jax.lax.scan(lambda c, h: (jnp.tanh(c + h), c), jnp.zeros(4), h)
    return read_out(jax.lax.cumprod(jnp.cos(h)) + jax.lax.cumlogsumexp(h) + y)


def solved(x):
    """A linear system for each time, whose right-hand sides are the columns of a matrix."""
    h, matrix = embedded(x), weights(5, 4, 4) + 2 * jnp.eye(4)
    y = jnp.linalg.solve(matrix, h.T).T + jax.scipy.linalg.solve_triangular(matrix, h.T).T
    return read_out(y + jnp.linalg.solve(matrix + h[:, :, None] * 0.1, h[:, :, None])[..., 0])


def without_elements(x):
    """Parts of an array that have none; and one row several times, of an array with one row."""
    h = embedded(x)
    first = jnp.concatenate([h[:0].reshape(0, 2, 2).sum(1).sum(1), shifted(x)])
    once = jnp.broadcast_to(h[:, None], (len(x), 1, 4))[:, jnp.zeros(3, int)]
    return jnp.sin(first) + h[:, :0].reshape(len(x), 0, 3).sum((1, 2)) + read_out(once)


def associative(x):
    return jnp.sin(jax.lax.associative_scan(lambda a, b: a * 0.9 + b, shifted(x))) + 0.3


def special(x):
    h, s = jax.nn.sigmoid(shifted(x)) + 0.5, jax.scipy.special
    return jnp.tanh(
        s.gammaln(h) + s.digamma(h) + s.erf(h) + s.gammainc(h, h) + s.betainc(h, h, h * 0.5)
        + s.i0e(h) + s.zeta(h + 1, 1.0) + s.polygamma(1, h) + s.ndtri(h * 0.4) + s.erfinv(h - 1)
        + jnp.cbrt(h) + jnp.arctan2(h, 2.0) + jnp.nextafter(h, h) + jnp.round(h) + jnp.log2(h)
        + jnp.sinc(h) + s.bessel_jn(h, v=1)[1]
    )  # fmt: skip


def random_numbers(x):
    """Keys that depend on the sequence."""
    seeds = (shifted(x) * 100).astype(jnp.int32)
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(0), s))(seeds)
    return jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys).sum(1)


CAUSAL = {
    f.__name__: f
    for f in (
        softmax_attention, added_mask, multiplied_mask, library_attention, library_options,
        padded_attention, attention_to_a_prefix, attention_in_blocks, rotated_attention,
        loop_over_layers, loop_over_heads, recurrent, loops_without_time, branches, calls, dilated,
        strided, each_channel, unpadded, pooled, lagging, moved, parts_at_known_places,
        beside_time, second_axis, table, products, masked_sums, running, running_from_the_end,
        running_in_pairs, without_elements, solved, associative, special, random_numbers,
    )
}  # fmt: skip
