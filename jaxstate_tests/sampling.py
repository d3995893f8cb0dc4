"""Which cases of a broad product `make test` runs. `make matrix` runs all of them."""

import itertools
import zlib

import pytest


def in_sample(n, *names):
    """Whether a case is one of the n-th part that is chosen by a hash of its names."""
    return zlib.crc32("/".join(names).encode()) % n == 0


def part_of_product(n, *axes, name=str):
    """The cases of a product, all but each n-th of them slow. Each value of an axis is in some."""
    cases = []
    for numbered in itertools.product(*map(enumerate, axes)):
        numbers, values = zip(*numbered, strict=True)
        marks = pytest.mark.slow if sum(numbers) % n else ()
        cases.append(pytest.param(*values, id="-".join(map(name, values)), marks=marks))
    return cases
