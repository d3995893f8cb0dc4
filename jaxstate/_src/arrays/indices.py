"""Indices and shapes as programs write them, as JAX takes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays import views

__all__ = ["axis_number", "entries_of", "is_same_step", "resolved_shape", "value_of_index"]


def is_same_step(a: views.Step, b: views.Step) -> bool:
    if type(a) is not type(b) or a.parent != b.parent:
        return False
    if isinstance(a, views.Reshape) or isinstance(b, views.Reshape):
        return a == b
    return a.order == b.order and all(map(_same_extent, a.along, b.along))


def _same_extent(a: Any, b: Any) -> bool:
    if isinstance(a, views.Fixed) and isinstance(b, views.Fixed):
        ints = isinstance(a.index, int) and isinstance(b.index, int)
        return a.index == b.index if ints else a.index is b.index
    return type(a) is type(b) and a == b


def resolved_shape(new: Sequence[Any], size: int) -> tuple[int, ...]:
    """The shape of ``size`` elements, with the size that -1 stands for."""
    shape = [n if _jax.is_size(n) else operator.index(n) for n in new]
    if not all(isinstance(n, int) for n in (*shape, size)):
        rest = [n for n in shape if not (isinstance(n, int) and n == -1)]
        found = _jax.divided_sizes((size,), rest)
        return tuple(found if isinstance(n, int) and n == -1 else n for n in shape)
    rest = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and rest and size % rest == 0:
        shape[shape.index(-1)] = size // rest
    if math.prod(shape) != size or any(n < 0 for n in shape):
        raise ValueError(f"cannot reshape array of size {size} into shape {tuple(new)}")
    return tuple(shape)


def axis_number(axis: Any, ndim: int) -> int:
    return views.check_bounds(operator.index(axis), ndim, 0)


def value_of_index(index: Any) -> Any:
    """The index with the values that the arrays in it have now, and with arrays for lists.

    JAX takes no lists in an index.
    """
    if isinstance(index, tuple):
        return tuple(map(_value_of_entry, index))
    return _value_of_entry(index)


def entries_of(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _value_of_entry(entry: Any) -> Any:
    if isinstance(entry, _jax.Tracer):
        entry = _jax.canonicalize(entry)
    if isinstance(entry, range):
        entry = list(entry)
    if isinstance(entry, (tuple, list)):
        entry = views.as_array(jax.tree.map(_value_of_entry, entry))
    if isinstance(entry, (np.bool_, np.ndarray)) and entry.dtype == np.bool_ and not entry.ndim:
        return bool(entry)  # JAX takes no others
    if isinstance(entry, slice):
        return slice(*(_value(bound) for bound in (entry.start, entry.stop, entry.step)))
    if isinstance(entry, _jax.DynamicSlice):
        return jax.ds(*(_value(n) for n in (entry.start, entry.size, entry.stride)))
    if isinstance(entry, np.ndarray):
        entry = entry.copy()  # a jaxpr keeps it
    small = isinstance(entry, (np.ndarray, jax.Array)) and entry.dtype in _SMALL
    return entry.astype(np.int32) if small else entry  # JAX compares it with the size of an axis


_SMALL = tuple(map(np.dtype, (np.int8, np.int16, np.uint8, np.uint16)))


def _value(x: Any) -> Any:
    """A bound, with the value that it has now."""
    return _jax.canonicalize(x) if isinstance(x, _jax.Tracer) else x
