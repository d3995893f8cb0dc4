"""The programs of `numpy_ports`, written for JAX by hand: ``.at`` and loops that carry arrays."""

import jax.numpy as jnp
from jax.lax import dynamic_update_slice, fori_loop, select


def lu(a):
    order = jnp.arange(len(a))
    for k in range(len(a) - 1):
        p = k + abs(a[k:, k]).argmax()
        a = a.at[jnp.array([k, p])].set(a[jnp.array([p, k])])
        order = order.at[jnp.array([k, p])].set(order[jnp.array([p, k])])
        factors = a[k + 1 :, k] / a[k, k]
        a = dynamic_update_slice(a, factors[:, None], (k + 1, k))
        rest = a[k + 1 :, k + 1 :] - jnp.outer(a[k + 1 :, k], a[k, k + 1 :])
        a = dynamic_update_slice(a, rest, (k + 1, k + 1))
    return a, order


def smith_waterman(a, b, match=3, gap=2):
    def row(i, score):
        def cell(j, score):
            aligned = score[i, j] + jnp.where(a[i] == b[j], match, -match)
            skipped = jnp.maximum(score[i, j + 1], score[i + 1, j]) - gap
            best = jnp.maximum(0, jnp.maximum(aligned, skipped))
            return score.at[i + 1, j + 1].set(best)

        return fori_loop(0, len(b), cell, score)

    return fori_loop(0, len(a), row, jnp.zeros((len(a) + 1, len(b) + 1), jnp.int32))


def life(grid, steps):
    def generation(_, grid):
        shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        neighbours = sum(jnp.roll(grid, shift, (0, 1)) for shift in shifts)
        grid = select(neighbours < 2, jnp.zeros_like(grid), grid)
        grid = select(neighbours > 3, jnp.zeros_like(grid), grid)
        return select(neighbours == 3, jnp.ones_like(grid), grid)

    return fori_loop(0, steps, generation, grid)


def heat(u, steps, rate=0.2):
    def step(_, u):
        u = dynamic_update_slice(u, u[1][None], (0, 0))
        u = dynamic_update_slice(u, u[-2][None], (len(u) - 1, 0))
        u = dynamic_update_slice(u, u[:, 1][:, None], (0, 0))
        u = dynamic_update_slice(u, u[:, -2][:, None], (0, u.shape[1] - 1))
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        change = rate * (around - 4 * u[1:-1, 1:-1])
        return dynamic_update_slice(u, u[1:-1, 1:-1] + change, (1, 1))

    return fori_loop(0, steps, step, u)


def gauss_seidel(a, b, sweeps):
    def sweep(_, x):
        def solve(i, x):
            return x.at[i].set(x[i] + (b[i] - a[i] @ x) / a[i, i])

        return fori_loop(0, len(b), solve, x)

    return fori_loop(0, sweeps, sweep, jnp.zeros_like(b))


def heap_sort(x):
    n = len(x)

    def sift(x, root, end):
        def down(_, carry):
            x, at = carry
            left = jnp.minimum(2 * at[0] + 1, n - 1)
            right = jnp.minimum(left + 1, n - 1)
            child = jnp.where((right < end) & (x[right] > x[left]), right, left)
            child = jnp.where((2 * at[0] + 1 < end) & (x[child] > x[at[0]]), child, at[0])
            at = at.at[1].set(child)
            x = x.at[at].set(x[at[::-1]])
            return x, at.at[0].set(child)

        return fori_loop(0, n.bit_length(), down, (x, jnp.array([root, 0])))[0]

    def extract(i, x):
        end = n - 1 - i
        x = x.at[jnp.array([0, end])].set(x[jnp.array([end, 0])])
        return sift(x, 0, end)

    x = fori_loop(0, n, lambda i, x: sift(x, n - 1 - i, n), x)
    return fori_loop(0, n, extract, x)


def moving_average(samples, size):
    def arrive(i, carry):
        ring, means = carry
        ring = ring.at[i % size].set(samples[i])
        return ring, means.at[i].set(ring.sum() / jnp.minimum(i + 1, size))

    start = jnp.zeros(size, samples.dtype), jnp.zeros_like(samples)
    return fori_loop(0, len(samples), arrive, start)[1]


def decode(weights, tokens):
    embedding, positions, layers = weights

    def step(t, carry):
        tokens, keys, values = carry
        x = embedding[tokens[t]] + positions[t]
        for n, (query, key, value, out, up, down) in enumerate(layers):
            keys = keys.at[n, t].set(x @ key)
            values = values.at[n, t].set(x @ value)
            scores = keys[n] @ (x @ query) / jnp.sqrt(x.size)
            later = jnp.arange(len(tokens)) > t
            scores = select(later, jnp.full_like(scores, -jnp.inf), scores)
            p = jnp.exp(scores - scores.max())
            p = p / p.sum()
            x = x + p @ values[n] @ out
            x = x + jnp.maximum(x @ up, 0) @ down
        return tokens.at[t + 1].set((embedding @ x).argmax()), keys, values

    cache = jnp.zeros((len(layers), *positions.shape), jnp.float32)
    return fori_loop(0, len(tokens) - 1, step, (tokens, cache, jnp.zeros_like(cache)))[0]


PROGRAMS = {f.__name__: f for f in (
    lu, smith_waterman, life, heat, gauss_seidel, heap_sort, moving_average, decode
)}  # fmt: skip
