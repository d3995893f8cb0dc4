"""Views of an array, as in NumPy: which elements of the array they are.

A view is a chain of steps from the array to it. A step is a `Selection` (a basic index: integers,
slices, new axes; and permutations of the axes) or a `Reshape`. Selections of selections are one
selection, so that a write through ``x.T[1:][2]`` is one write into ``x``.

Integers and slices are known here; an integer may also be a traced scalar.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate import _compat

__all__ = ["Fixed", "Range", "Reshape", "Selection", "Step", "expanded", "is_view", "view"]

NEW_AXIS, EMPTY_AXIS = -1, -2


class Fixed(NamedTuple):
    """One element along an axis of the parent; the view does not have that axis."""

    index: Any


class Range(NamedTuple):
    """``size`` elements along an axis of the parent, ``start``, ``start + step`` and so on."""

    start: int
    step: int
    size: int

    def as_slice(self) -> slice:
        stop = self.start + self.size * self.step
        return slice(self.start, None if stop < 0 else stop, self.step)


class Selection(NamedTuple):
    """A basic index and a permutation.

    Attributes:
      parent: the shape that it selects from.
      along: per axis of the parent, a `Fixed` or a `Range`.
      order: per axis of the view, the axis of the parent, or NEW_AXIS, or EMPTY_AXIS.
    """

    parent: tuple[int, ...]
    along: tuple[Fixed | Range, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = {NEW_AXIS: 1, EMPTY_AXIS: 0}
        return tuple(sizes[d] if d < 0 else self.along[d].size for d in self.order)  # type: ignore[union-attr]

    @property
    def kept(self) -> list[int]:
        """The axes of the parent that the view has, in the parent's order."""
        return [d for d, what in enumerate(self.along) if isinstance(what, Range)]

    @property
    def index(self) -> tuple[Any, ...]:
        """The index of the parent, without the permutation."""
        return tuple(a.index if isinstance(a, Fixed) else a.as_slice() for a in self.along)

    @property
    def is_all(self) -> bool:
        """Whether it selects everything, perhaps in another order of the axes."""
        pairs = zip(self.along, self.parent, strict=True)
        return all(isinstance(a, Range) and a == (0, 1, n) for a, n in pairs)

    def read(self, x: Any) -> Any:
        """The elements of ``x``, an array of the shape ``parent``."""
        if EMPTY_AXIS in self.order:
            return jax.numpy.zeros(self.shape, x.dtype)
        y = x if self.is_all else _compat.getitem(x, self.index)
        axes = [d for d in self.order if d >= 0]
        if axes != self.kept:
            y = jax.lax.transpose(y, [self.kept.index(d) for d in axes])
        new = [i for i, d in enumerate(self.order) if d == NEW_AXIS]
        return jax.lax.expand_dims(y, new) if new else y

    def read_numpy(self, x: np.ndarray) -> np.ndarray:
        """The view of a NumPy array (the first element along an axis for a traced integer)."""
        index = tuple(i if isinstance(i, (int, slice)) else 0 for i in self.index)
        y = x[index]
        y = y.transpose([self.kept.index(d) for d in self.order if d >= 0])
        return y[tuple(None if d < 0 else slice(None) for d in self.order)]


class Reshape(NamedTuple):
    """All elements of the parent in another shape, in the same order."""

    parent: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, x: Any) -> Any:
        return jax.lax.reshape(x, self.shape)

    def read_numpy(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.shape, copy=False)


Step = Selection | Reshape


def everything(shape: Sequence[int]) -> Selection:
    return Selection(tuple(shape), tuple(Range(0, 1, n) for n in shape), tuple(range(len(shape))))


# -- Indices ---------------------------------------------------------------------------------


def expanded(index: Any, ndim: int) -> list[Any]:
    """The entries of an index of an array: one per axis that it has, and the new axes.

    Lists are arrays, the ellipsis is spelled out. A boolean array stands for as many axes as it
    has. An ellipsis that stands for no axis stays where it separates integers and arrays, since in
    NumPy it does that like a slice.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    entries = [_as_array_or_scalar(e) for e in entries]
    used = sum(map(_axes_of, entries))
    if used > ndim:
        raise IndexError(
            f"too many indices for array: array is {ndim}-dimensional, but {used} were indexed"
        )
    dots = [i for i, e in enumerate(entries) if e is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    at = dots[0] if dots else len(entries)
    if dots and used == ndim and _separates(entries[:at], entries[at + 1 :]):
        return entries
    entries[at : at + len(dots)] = [slice(None)] * (ndim - used)
    return entries


def _separates(before: list[Any], after: list[Any]) -> bool:
    """Whether what is between these entries is between integers and arrays of one index."""
    if all(map(is_basic, before + after)):
        return False
    return all(any(not isinstance(e, (slice, type(None))) for e in es) for es in (before, after))


def as_array(entry: Any) -> Any:
    """A list in an index: of JAX, if there is something of JAX in it, and of NumPy else."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(entry)):
        return jax.numpy.asarray(entry)
    array = np.array(entry)
    return array if array.size else array.astype(int)


def _as_array_or_scalar(entry: Any) -> Any:
    if isinstance(entry, (list, tuple, range)):
        entry = as_array(entry)
    if isinstance(entry, (bool, np.bool_)):
        return np.asarray(entry)
    if entry is None or entry is Ellipsis or isinstance(entry, int):
        return entry
    if isinstance(entry, slice):
        return _static(entry)
    dtype = getattr(entry, "dtype", None)
    if isinstance(entry, (np.integer, np.ndarray)) and not entry.ndim and entry.dtype.kind in "iu":
        return int(entry)
    if isinstance(dtype, np.dtype) and (dtype == np.bool_ or np.issubdtype(dtype, np.integer)):
        return entry
    raise IndexError(
        "only integers, slices (`:`), ellipsis (`...`), None and integer or boolean arrays are"
        f" valid indices; got {entry!r}"
    )


def is_mask(entry: Any) -> bool:
    return getattr(entry, "dtype", None) == np.bool_


def _axes_of(entry: Any) -> int:
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if is_mask(entry) else 1


def is_basic(entry: Any) -> bool:
    """Whether an entry alone makes a view: an integer (perhaps traced), a slice, or a new axis."""
    if entry is None or entry is Ellipsis or isinstance(entry, (int, slice)):
        return True
    return entry.ndim == 0 and not is_mask(entry)


def is_condition(entry: Any) -> bool:
    """Whether an entry is a boolean of no axes: True is an index of a new axis, False of none."""
    return is_mask(entry) and not entry.ndim


def in_two_steps(entries: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Two indices that do what one with conditions does: the new axes, then arrays for them.

    None if there is no condition, or one that is traced.
    """
    known = [np.asarray(_compat.concrete(e)) for e in entries if is_condition(e)]
    if not known or any(k.dtype != np.bool_ for k in known):
        return None
    new_axes: list[Any] = []
    for entry in entries:
        new_axes += [None] if is_condition(entry) else [slice(None)] * _axes_of(entry)
    arrays = (np.zeros(int(k), int) for k in known)
    return tuple(new_axes), tuple(next(arrays) if is_condition(e) else e for e in entries)


def check_arrays(shape: Sequence[int], entries: Sequence[Any]) -> None:
    """Raises an IndexError for known integers out of bounds, and masks of other sizes.

    The entries are those of `expanded`, where at least one is an array.
    """
    axis = 0
    for entry in entries:
        if is_mask(entry):
            for n in entry.shape:
                if n != shape[axis]:
                    raise IndexError(
                        f"boolean index did not match indexed array along axis {axis}; size of"
                        f" axis is {shape[axis]} but size of corresponding boolean axis is {n}"
                    )
                axis += 1
            continue
        if isinstance(entry, int):
            check_bounds(entry, shape[axis], axis)
        elif isinstance(entry, np.ndarray) and entry.size:
            check_bounds(int(entry.min()), shape[axis], axis)
            check_bounds(int(entry.max()), shape[axis], axis)
        axis += entry is not None and entry is not Ellipsis


def check_bounds(i: int, size: int, axis: int) -> int:
    """The integer index, counted from the front."""
    if not -size <= i < size:
        raise IndexError(f"index {i} is out of bounds for axis {axis} with size {size}")
    return i + size if i < 0 else i


# -- Steps to a view -------------------------------------------------------------------------


def view(steps: Sequence[Step], shape: Sequence[int], entries: Sequence[Any]) -> tuple[Step, ...]:
    """The steps to ``v[entries]``, for a view ``v`` of the given steps and shape.

    The entries are basic and as `expanded` gives them.
    """
    before, last = _last_selection(steps, shape)
    if any(_is_traced(e) for e in entries) and not last.is_all:
        # A traced integer counts within the view: its bounds are those of the view.
        before, last = tuple(steps), everything(shape)
    along, order = list(last.along), []
    axes = iter(range(len(last.order)))
    for entry in entries:
        if entry is None:
            order.append(NEW_AXIS)
            continue
        axis = next(axes)
        d = last.order[axis]
        size = last.shape[axis]
        if isinstance(entry, slice):
            start, stop, step = _static(entry).indices(size)
            taken = range(start, stop, step)
            if d < 0:
                order.append(NEW_AXIS if taken else EMPTY_AXIS)
                continue
            old = along[d]
            assert isinstance(old, Range)
            first = taken.start if taken else 0
            along[d] = Range(old.start + old.step * first, old.step * step, len(taken))
            order.append(d)
        elif isinstance(entry, int):
            i = check_bounds(entry, size, axis)
            if d >= 0:
                old = along[d]
                assert isinstance(old, Range)
                along[d] = Fixed(old.start + old.step * i)
        elif d >= 0:
            along[d] = Fixed(entry)
    return _with(before, Selection(last.parent, tuple(along), tuple(order)))


def _static(entry: slice) -> slice:
    parts = (entry.start, entry.stop, entry.step)
    return slice(*(None if p is None else operator.index(p) for p in parts))


def _is_traced(entry: Any) -> bool:
    return entry is not None and not isinstance(entry, (int, slice))


def transposed(
    steps: Sequence[Step], shape: Sequence[int], axes: Sequence[int]
) -> tuple[Step, ...]:
    """The steps to ``v.transpose(axes)``."""
    before, last = _last_selection(steps, shape)
    return _with(before, last._replace(order=tuple(last.order[a] for a in axes)))


def reshaped(
    steps: Sequence[Step], base: Sequence[int], shape: Sequence[int], new: Sequence[int]
) -> tuple[Step, ...] | None:
    """The steps to ``v.reshape(new)``, or None where NumPy makes a copy."""
    step = Reshape(tuple(shape), tuple(new))
    try:
        step.read_numpy(_stand_in(steps, base))
    except ValueError:
        return None
    return (*steps, step)


def is_contiguous(steps: Sequence[Step], base: Sequence[int]) -> bool:
    """Whether the elements of the view are neighbours in NumPy's memory, in the view's order."""
    return _stand_in(steps, base).flags.c_contiguous


def _stand_in(steps: Sequence[Step], base: Sequence[int]) -> np.ndarray:
    """A view of NumPy with these steps, of an array of the shape ``base``, and of no memory."""
    strides = np.cumprod([1, *(max(n, 1) for n in reversed(base))])[-2::-1]
    x = np.lib.stride_tricks.as_strided(
        np.empty(1, np.int8), shape=tuple(base), strides=tuple(int(s) for s in strides)
    )
    for step in steps:
        x = step.read_numpy(x)
    return x


def _last_selection(
    steps: Sequence[Step], shape: Sequence[int]
) -> tuple[tuple[Step, ...], Selection]:
    if steps and isinstance(steps[-1], Selection):
        return tuple(steps[:-1]), steps[-1]
    return tuple(steps), everything(shape)


def _with(before: tuple[Step, ...], last: Selection) -> tuple[Step, ...]:
    is_identity = last.is_all and last.order == tuple(range(len(last.parent)))
    return before if is_identity else (*before, last)


def is_view(entries: Sequence[Any]) -> bool:
    """Whether an index gives a view: NumPy gives a scalar if integers take every axis."""
    return all(map(is_basic, entries))
