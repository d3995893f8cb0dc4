"""Every index that can be made of a few entries reads and writes what it does in NumPy.

`make test` runs all of up to three entries, those of four whose ellipsis stands for no axis, and
those of up to three with a boolean of no axes; `make matrix` all of four.
"""

import itertools
import math

import jax
import numpy as np
import pytest

import jaxstate

X = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
ENTRIES = {
    "1": 1,
    ":": slice(None),
    "1:": slice(1, None),
    "array": np.array([1, 0]),
    "traced": np.array(1),
    "None": None,
    "...": Ellipsis,
    "mask of 2": np.array([True, True]),
    "mask of 3": np.array([True, False, True]),
}
BOOLEANS = {"True": True, "False": False}
AT_ONCE, CHUNKS = 100, {"few": 9, "four": 25, "booleans": 2}


def indices(which):
    """The names of the entries of every index that is one in NumPy."""
    if which == "booleans":
        among = [*BOOLEANS, "1", ":", "array", "None", "mask of 2"]
        for names in itertools.chain(*(itertools.product(among, repeat=n) for n in (1, 2, 3))):
            if not BOOLEANS.keys().isdisjoint(names) and is_index(names):
                yield names
        return
    products = [itertools.product(ENTRIES, repeat=n) for n in (1, 2, 3, 4)]
    for names in itertools.chain(*(products[:3] if which == "few" else products[3:])):
        if is_index(names):
            yield names
    if which == "few":
        for names in itertools.product(("1", ":", "array", "traced", "mask of 3"), repeat=3):
            if is_index(names):
                yield from ((*names[:at], "...", *names[at:]) for at in range(4))


def is_index(names):
    try:
        X[index_of(names)]
    except IndexError:
        return False
    return True


def index_of(names, traced=lambda x: x):
    """The index, with what ``traced`` makes of the integers that are arrays."""
    entries = [{**ENTRIES, **BOOLEANS}[name] for name in names]
    return tuple(traced(e) if isinstance(e, np.ndarray) and e.dtype != bool else e for e in entries)


def values(shape):
    """What is written: all elements of their own, one per last axis, one per first axis."""
    yield np.arange(math.prod(shape), dtype=np.float32).reshape(shape) + 100
    if shape:
        yield np.arange(shape[-1], dtype=np.float32) + 50
        yield np.arange(shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1)) + 50


def run(x, index, shape):
    """What is read, and the array after each write. It is the same program in NumPy."""
    results = [x[index].copy()]
    changed = x.copy()
    changed[index] += np.float32(1)
    results.append(changed)
    for value in values(shape):
        changed = x.copy()
        changed[index] = value
        results.append(changed)
    return results


@pytest.mark.parametrize(
    ("which", "chunk"),
    [
        pytest.param(which, n, marks=[pytest.mark.slow] * (which == "four" or n % 3 > 0))
        for which in ("few", "booleans", "four")
        for n in range(CHUNKS[which])
    ],
)
def test_every_index_of_a_few_entries(which, chunk):
    names = list(indices(which))
    assert AT_ONCE * (CHUNKS[which] - 1) < len(names) <= AT_ONCE * CHUNKS[which]
    names = names[AT_ONCE * chunk : AT_ONCE * (chunk + 1)]
    shapes = [X[index_of(n)].shape for n in names]

    @jax.jit
    @jaxstate.inplace
    def program(x, array, scalar):
        def traced(e):
            return array if e.ndim else scalar

        return [run(x, index_of(n, traced), shape) for n, shape in zip(names, shapes, strict=True)]

    found = program(X, ENTRIES["array"], ENTRIES["traced"])
    for n, shape, results in zip(names, shapes, found, strict=True):
        wanted = run(X, index_of(n), shape)
        for a, b in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(n))
