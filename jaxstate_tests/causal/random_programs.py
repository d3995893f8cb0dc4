"""Random causal functions: operations on features of shape (n, 3), one after the other.

Each operation keeps the order of time: row i of its result depends on rows up to i. It works on the
last value, and the result is mixed with an earlier one.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WIDTH = 3


def shifted(x, k=1):
    return jnp.pad(x, ((k, 0), (0, 0)))[: len(x)]


class Numbers:
    """What is random in an operation."""

    def __init__(self, seed, n):
        self.choice = random.Random(seed)
        self.numbers = np.random.RandomState(seed)
        self.n = n
        self.k = self.choice.randint(1, 3)
        self.w = self.array(WIDTH, WIDTH) / 2
        self.fixed = self.array(n, WIDTH)

    def array(self, *shape):
        return jnp.asarray(self.numbers.randn(*shape), jnp.float32)

    @property
    def flag(self):
        return self.choice.random() < 0.5


# -- Attention, products ---------------------------------------------------------------------


def attention(x, r):
    seen = jnp.tril(jnp.triu(jnp.ones((r.n, r.n), bool), -r.choice.randint(0, r.n)))
    logits = jnp.where(seen, (x @ r.w) @ x.T, -1e9 if r.flag else -jnp.inf)
    return jax.nn.softmax(logits) @ x


def linear_attention(x, r):
    return jnp.tril(r.fixed[:, :1] * r.fixed[:, :1].T) @ x * 0.1


def pairs_of_features(x, r):
    return jnp.einsum("tij,tj->ti", x[:, :, None] * x[:, None, :], x) * 0.1


def solved(x, r):
    return jnp.linalg.solve(3 * jnp.eye(WIDTH) + 0.1 * r.w.T @ r.w, x.T).T


# -- Windows ---------------------------------------------------------------------------------


def convolution(x, r):
    kernel = r.array(3, WIDTH, WIDTH) / 3
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x[None], kernel, (1,), [(2 * r.k, 0)], rhs_dilation=(r.k,), dimension_numbers=numbers
    )[0]


def maximum(x, r):
    return lax.reduce_window(x, -jnp.inf, lax.max, (3, 1), (1, 1), ((2, 0), (0, 0)))


def window_sum(x, r):
    return lax.reduce_window(x, 0.0, lax.add, (r.k + 1, 1), (1, 1), ((r.k, 0), (0, 0)))


def gathered_windows(x, r):
    places = jnp.arange(r.n)[:, None] + jnp.arange(3)
    return jnp.pad(x, ((2, 0), (0, 0)))[places].sum(1) * 0.3


# -- Running sums and loops ------------------------------------------------------------------


def running(x, r):
    run = r.choice.choice([lax.cumsum, lax.cummax, lax.cummin, lax.cumlogsumexp])
    if r.flag:
        return run(x, 0) * 0.3
    return jnp.flip(run(jnp.flip(x, 0), 0, reverse=True), 0) * 0.3


def associative(x, r):
    return lax.associative_scan(jnp.maximum if r.flag else jnp.add, x) * 0.5


def recurrent(x, r):
    def cell(carry, now):
        h, i = carry
        x, fixed = now
        h = jnp.tanh(h @ r.w + x + fixed)
        return (h, i + 1), (h + 0.1 * i, x * h)

    h, y = lax.scan(cell, (r.fixed[0], 0), (x, r.fixed), unroll=r.choice.choice([1, 2]))[1]
    return h + y


def layers(x, r):
    def layer(x, w):
        return jnp.tanh(x @ w) + 0.5 * shifted(x), None

    return lax.scan(layer, x, jnp.stack([r.w, r.w.T]))[0]


def turns(x, r):
    return lax.fori_loop(0, 2, lambda i, x: jnp.sin(x + i * shifted(x)), x)


def branches(x, r):
    if r.flag:
        return lax.cond(r.fixed[0, 0] > 0, jnp.cos, lambda x: x @ r.w, x)
    return jax.vmap(lambda x: lax.cond(x[0] > 0, jnp.cos, lambda x: 2 * x, x))(x)


# -- Places ----------------------------------------------------------------------------------


def rolled(x, r):
    return jnp.where(jnp.arange(r.n)[:, None] >= r.k, jnp.roll(x, r.k, 0), 0.0)


def written(x, r):
    if r.flag:
        return x.at[1:].set(x[:-1])
    return x.at[:, 1].add(shifted(x)[:, 2]).at[:, 0].set(shifted(x, r.k)[:, 1])


def updated(x, r):
    return lax.dynamic_update_slice(x, shifted(x)[:, :1], (0, 1))


def looked_up(x, r):
    return x[jnp.maximum(jnp.arange(r.n) - r.k, 0)]


def embedded(x, r):
    return r.w[jnp.clip(jnp.abs(2 * x[:, 0]).astype(int), 0, WIDTH - 1)]


def along_features(x, r):
    order = jnp.argsort(r.fixed if r.flag else x, 1)
    return jnp.take_along_axis(x, order, 1) + jnp.sort(x, 1)


def strided(x, r):
    return jnp.repeat(x[::2], 2, axis=0)[: r.n]


def interleaved(x, r):
    y = jnp.stack([x, shifted(x)], 1).reshape(2 * r.n, WIDTH)
    return y[::2] * 0.5 + y[1::2]


def in_pairs(x, r):
    m = r.n // 2 * 2
    pairs = jnp.repeat(shifted(x[:m].reshape(m // 2, 2, WIDTH).sum(1)), 2, axis=0)
    return jnp.concatenate([pairs, x[m:]])


def flipped(x, r):
    return jnp.flip(shifted(jnp.flip(jnp.flip(x, 0), 0)), 1)


def frequencies(x, r):
    return jnp.fft.fft(x, axis=1).real


def one_by_one(x, r):
    x = jnp.pad(x, ((r.k, 0), (0, 0)))
    return lax.map(lambda i: lax.dynamic_slice(x, (i, 0), (1, WIDTH))[0], jnp.arange(r.n))


# -- Elements --------------------------------------------------------------------------------


def selected(x, r):
    return jnp.where(r.fixed > 0 if r.flag else x > 0, x, shifted(x, r.k))


def normalized(x, r):
    return jax.nn.softmax(x) if r.flag else jax.nn.standardize(x)


def checkpointed(x, r):
    return jax.checkpoint(jax.jit(lambda x: jnp.tanh(x) * shifted(x)))(x)


def best(x, r):
    return jax.nn.one_hot(jnp.argmax(x, -1), WIDTH) + lax.top_k(x, WIDTH)[0]


OPERATIONS = [
    attention, linear_attention, pairs_of_features, solved, convolution, maximum, window_sum,
    gathered_windows, running, associative, recurrent, layers, turns, branches, rolled, written,
    updated, looked_up, embedded, along_features, strided, interleaved, in_pairs, flipped,
    frequencies, one_by_one, selected, normalized, checkpointed, best,
]  # fmt: skip


def random_function(seed):
    """A function, and a sequence of the shape that it takes; its operations are its name."""
    choice = random.Random(seed)
    n = choice.choice([1, 2, 5, 8, 9])
    steps = [
        (
            choice.choice(OPERATIONS),
            choice.randrange(10**6),
            choice.random(),
            choice.randrange(1 + i),
        )
        for i in range(choice.randint(2, 6))
    ]
    first = Numbers(seed, n)

    def f(x):
        values = [shifted(x, first.k) + first.fixed]
        for operation, number, mix, earlier in steps:
            y = operation(values[-1], Numbers(number, n))
            if mix < 0.3:
                y = y + 0.5 * values[earlier]
            elif mix < 0.4:
                y = jnp.concatenate([y[:, :1], values[earlier][:, 1:]], 1)
            values.append(jnp.clip(y, -4, 4) if mix < 0.8 else jnp.tanh(y))
        return values[-1]

    f.__name__ = " ".join(operation.__name__ for operation, *_ in steps)
    return f, jnp.zeros((n, WIDTH))
