"""NumPy programs in JAX: unchanged but for import, decorator, and how long loops are spelled.

Every function here is a NumPy program. `in_numpy` runs it as one: the same code, with ``np`` for
NumPy and no decorator. A loop that would be too long to unroll when the program is traced has its
body in a function, which `repeat` calls; the body writes to the arrays around it.
"""

import types

import jax
import jax.numpy as np
import numpy

from jaxstate import inplace


def repeat(n, body):
    """``for i in range(n): body(i)``, as one loop of the compiled program."""
    jax.lax.fori_loop(0, n, lambda i, _: body(i), None)


@inplace
def lu(a):
    """``a[order] = l @ u`` with partial pivoting; both factors end in ``a``. (Unrolled.)"""
    order = np.arange(len(a))
    for k in range(len(a) - 1):
        p = k + abs(a[k:, k]).argmax()
        a[[k, p]] = a[[p, k]]
        order[[k, p]] = order[[p, k]]
        a[k + 1 :, k] /= a[k, k]
        a[k + 1 :, k + 1 :] -= np.outer(a[k + 1 :, k], a[k, k + 1 :])
    return a, order


@inplace
def smith_waterman(a, b, match=3, gap=2):
    """The scores of local alignments of two sequences."""
    score = np.zeros((len(a) + 1, len(b) + 1), np.int32)

    def row(i):
        def cell(j):
            aligned = score[i, j] + np.where(a[i] == b[j], match, -match)
            skipped = np.maximum(score[i, j + 1], score[i + 1, j]) - gap
            score[i + 1, j + 1] = np.maximum(0, np.maximum(aligned, skipped))

        repeat(len(b), cell)

    repeat(len(a), row)
    return score


@inplace
def life(grid, steps):
    """The game of life on a torus."""

    def generation(_):
        shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        neighbours = sum(np.roll(grid, shift, (0, 1)) for shift in shifts)
        grid[neighbours < 2] = 0
        grid[neighbours > 3] = 0
        grid[neighbours == 3] = 1

    repeat(steps, generation)
    return grid


@inplace
def heat(u, steps, rate=0.2):
    """The heat equation in an insulated plate; the outermost cells are ghosts."""
    inner = u[1:-1, 1:-1]

    def step(_):
        u[0] = u[1]
        u[-1] = u[-2]
        u[:, 0] = u[:, 1]
        u[:, -1] = u[:, -2]
        around = u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]
        inner[:] = inner + rate * (around - 4 * inner)

    repeat(steps, step)
    return u


@inplace
def gauss_seidel(a, b, sweeps):
    """Solves ``a @ x = b``: every unknown from the newest values of the others."""
    x = np.zeros_like(b)

    def sweep(_):
        def solve(i):
            x[i] += (b[i] - a[i] @ x) / a[i, i]

        repeat(len(b), solve)

    repeat(sweeps, sweep)
    return x


@inplace
def heap_sort(x):
    """Sorts with a heap in the array itself."""
    n = len(x)

    def sift(root, end):
        """Moves the root down to its place in the heap ``x[:end]``."""
        at = np.array([root, 0])

        def down(_):
            left = np.minimum(2 * at[0] + 1, n - 1)
            right = np.minimum(left + 1, n - 1)
            child = np.where((right < end) & (x[right] > x[left]), right, left)
            child = np.where((2 * at[0] + 1 < end) & (x[child] > x[at[0]]), child, at[0])
            at[1] = child
            x[at] = x[at[::-1]]
            at[0] = child

        repeat(n.bit_length(), down)

    def extract(i):
        end = n - 1 - i
        x[np.array([0, end])] = x[np.array([end, 0])]
        sift(0, end)

    repeat(n, lambda i: sift(n - 1 - i, n))
    repeat(n, extract)
    return x


@inplace
def moving_average(samples, size):
    """The mean of the last ``size`` samples at every moment, from a ring buffer."""
    ring = np.zeros(size, samples.dtype)
    means = np.zeros_like(samples)

    def arrive(i):
        ring[i % size] = samples[i]
        means[i] = ring.sum() / np.minimum(i + 1, size)

    repeat(len(samples), arrive)
    return means


@inplace
def decode(weights, tokens):
    """Greedy decoding of a small transformer: the first token is given, the others are filled in.

    The keys and values of the tokens so far are kept in a cache.
    """
    embedding, positions, layers = weights
    keys = np.zeros((len(layers), *positions.shape), np.float32)
    values = np.zeros_like(keys)

    def step(t):
        x = embedding[tokens[t]] + positions[t]
        for n, (query, key, value, out, up, down) in enumerate(layers):
            keys[n, t] = x @ key
            values[n, t] = x @ value
            scores = keys[n] @ (x @ query) / np.sqrt(x.size)
            scores[np.arange(len(tokens)) > t] = -np.inf
            p = np.exp(scores - scores.max())
            p /= p.sum()
            x = x + p @ values[n] @ out
            x = x + np.maximum(x @ up, 0) @ down
        tokens[t + 1] = (embedding @ x).argmax()

    repeat(len(tokens) - 1, step)
    return tokens


# -- Inputs ------------------------------------------------------------------------------------


def inputs(size=1.0):
    """Arguments for every program, as arrays of NumPy; ``size`` scales them."""
    rng = numpy.random.default_rng(0)
    few, some, many = (max(3, int(size * n)) for n in (16, 64, 200))

    def normal(*shape):
        return rng.standard_normal(shape).astype(numpy.float32)

    plate = numpy.zeros((some, some), numpy.float32)
    plate[some // 4 : some // 2, some // 3 :] = 100
    d, n_tokens = 16, 40
    layer = [normal(d, d) / 4 for _ in range(4)] + [normal(d, 2 * d) / 4, normal(2 * d, d) / 4]
    weights = normal(n_tokens, d), 0.3 * normal(many, d), [layer, layer[::-1][2:] + layer[4:]]
    start = numpy.zeros(many, numpy.int32)
    start[0] = 3
    return {
        "lu": (normal(few, few),),
        "smith_waterman": tuple(rng.integers(0, 4, (2, some)).astype(numpy.int32)),
        "life": (rng.integers(0, 2, (some, some)).astype(numpy.int32), many),
        "heat": (plate, many),
        "gauss_seidel": (normal(some, some) + some * numpy.eye(some, dtype="f"), normal(some), 10),
        "heap_sort": (normal(many),),
        "moving_average": (normal(many), 8),
        "decode": (weights, start),
    }


PROGRAMS = {f.__name__: f for f in (
    lu, smith_waterman, life, heat, gauss_seidel, heap_sort, moving_average, decode
)}  # fmt: skip


# -- The same code in NumPy ----------------------------------------------------------------------


def _repeat_in_numpy(n, body):
    for i in range(n):
        body(i)


def in_numpy(program):
    """The program with ``np`` for NumPy, not decorated. It writes its arguments."""
    plain = program.__wrapped__
    names = {**globals(), "np": numpy, "repeat": _repeat_in_numpy}
    return types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
