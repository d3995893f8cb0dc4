"""A tree with objects of a class that assigns to itself, and the ways to run a program on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import mutate

f32 = jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cell:
    n: Any
    k: int = dataclasses.field(default=1, metadata=dict(static=True))

    def add(self, x):
        self.n = self.n + x * self.k

    @jax.jit
    def jitted(self, x):
        self.n = self.n + x * self.k
        return self


def loop(n, step):
    jax.lax.fori_loop(0, n, lambda i, _: (step(i), None)[1], None)


RUNS = {
    "mutate": mutate,
    "jit outside": lambda f: lambda *args: jax.jit(mutate(f))(*args),
    "jit inside": lambda f: lambda *args: mutate(jax.jit(f))(*args),
}


def numbers(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), jax.tree.leaves(tree))


def example():
    tree = {"a": f32(1), "b": f32(5), "c": Cell(f32(2)), "d": Cell(f32(10)), "l": [f32(0)]}
    return tree
