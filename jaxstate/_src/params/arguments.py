"""The arguments of a function that is only traced: which of them are arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["Shape", "split_arrays"]

# What stands for an array where only its type is looked at.
Shape = jax.ShapeDtypeStruct


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any], bool]:
    """The arrays of a tree; the function that puts others in their place; is any a mere shape."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if _is_dynamic(x)]
    arrays = [leaves[i] for i in where]

    def rebuild(arrays: list[Any]) -> Any:
        full = list(leaves)
        for i, x in zip(where, arrays, strict=True):
            full[i] = x
        return structure.unflatten(full)

    return arrays, rebuild, any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)


def _is_dynamic(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
