"""Views of an array, as in NumPy: which elements of the array they are.

A view is a chain of steps from the array to it. A step is a `Selection` (a basic index: integers,
slices, new axes; and permutations of the axes) or a `Reshape`. Selections of selections are one
selection, so that a write through ``x.T[1:][2]`` is one write into ``x``.

Slices are known here, though with a symbolic size perhaps (`jax.export`); an integer, and the start
of a `jax.ds`, may also be a traced scalar.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate.errors import message

__all__ = [
    "Fixed", "Range", "Reshape", "Selection", "Step", "Window", "expanded", "is_view", "view",
]  # fmt: skip

NEW_AXIS, EMPTY_AXIS = -1, -2


class Range(NamedTuple):
    """``size`` elements along an axis of the parent, ``start``, ``start + step`` and so on."""

    start: Any
    step: int
    size: Any

    def as_slice(self) -> slice:
        stop = self.start + self.size * self.step
        is_to_front = self.step < 0 and isinstance(stop, int) and stop < 0
        return slice(self.start, None if is_to_front else stop, self.step)


class Fixed(NamedTuple):
    """One element along an axis of the parent; the view does not have that axis.

    Attributes:
      index: of the element.
      among: the elements that a traced index counts, if these are not all.
    """

    index: Any
    among: Range | None = None

    @property
    def is_traced(self) -> bool:
        return not _jax.is_size(self.index)

    def read_index(self) -> Any:
        """The index of the element of the parent, the nearest one for an index out of bounds."""
        if self.among is None:
            return self.index
        start, step, size = map(_jax.size_value, self.among)
        i = as_signed(self.index)
        i = jax.numpy.where(i < 0, i + size, i)
        return start + step * jax.numpy.clip(i, 0, size - 1)


class Window(NamedTuple):
    """A `Range` whose start is traced."""

    start: Any
    step: int
    size: int

    def read(self, x: Any, axis: int) -> Any:
        """The elements of ``x`` along an axis; the nearest window for one out of bounds."""
        n = _jax.size_value(x.shape[axis])
        start = jax.numpy.where(self.start < 0, self.start + n, self.start)
        if self.step == 1:
            return jax.lax.dynamic_slice_in_dim(x, start, self.size, axis)
        start = jax.numpy.clip(start, 0, n - 1 - (self.size - 1) * self.step)
        return jax.numpy.take(x, start + np.arange(self.size) * self.step, axis, mode="clip")


class Selection(NamedTuple):
    """A basic index and a permutation.

    Attributes:
      parent: the shape that it selects from.
      along: per axis of the parent, a `Fixed`, a `Range` or a `Window`.
      order: per axis of the view, the axis of the parent, or NEW_AXIS, or EMPTY_AXIS.
    """

    parent: tuple[int, ...]
    along: tuple[Fixed | Range | Window, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = {NEW_AXIS: 1, EMPTY_AXIS: 0}
        return tuple(sizes[d] if d < 0 else self.along[d].size for d in self.order)  # type: ignore[union-attr]

    @property
    def kept(self) -> list[int]:
        """The axes of the parent that the view has, in the parent's order."""
        return [d for d, what in enumerate(self.along) if not isinstance(what, Fixed)]

    @property
    def is_all(self) -> bool:
        """Whether it selects everything, perhaps in another order of the axes."""
        pairs = zip(self.along, self.parent, strict=True)
        return all(isinstance(a, Range) and a == (0, 1, n) for a, n in pairs)

    def read(self, x: Any) -> Any:
        """The elements of ``x``, an array of the shape ``parent``."""
        if EMPTY_AXIS in self.order:
            return jax.numpy.zeros(self.shape, x.dtype)
        y = self._selected(x)
        axes = [d for d in self.order if d >= 0]
        if axes != self.kept:
            y = jax.lax.transpose(y, [self.kept.index(d) for d in axes])
        new = [i for i, d in enumerate(self.order) if d == NEW_AXIS]
        return jax.lax.expand_dims(y, new) if new else y

    def _selected(self, x: Any) -> Any:
        """The elements of ``x``, the axes in the order of the parent's."""
        if self.is_all:
            return x
        windows = any(isinstance(a, Window) for a in self.along)
        if not windows and all(isinstance(n, int) for n in self.parent):
            return _jax.getitem(x, tuple(map(_entry, self.along)))
        # JAX takes an index of an axis of symbolic size beside whole axes only.
        dropped = []
        for d, a in enumerate(self.along):
            if isinstance(a, Fixed) and not a.is_traced:
                x = _range_of(x, d, Range(a.index, 1, 1))
                dropped.append(d)
            if isinstance(a, Range) and a != (0, 1, self.parent[d]):
                x = _range_of(x, d, a)
            if isinstance(a, Window):
                x = a.read(x, d)
        x = jax.lax.squeeze(x, dropped)
        is_traced = [isinstance(a, Fixed) and a.is_traced for a in self.along]
        index = [
            _entry(a) if t else slice(None) for a, t in zip(self.along, is_traced, strict=True)
        ]
        index = [e for d, e in enumerate(index) if d not in dropped]
        return x if all(isinstance(e, slice) for e in index) else _jax.getitem(x, tuple(index))

    def read_numpy(self, x: np.ndarray) -> np.ndarray:
        """The view of a NumPy array (the first element along an axis for a traced integer)."""
        y = x[tuple(map(_entry_of_stand_in, self.along))]
        y = y.transpose([self.kept.index(d) for d in self.order if d >= 0])
        return y[tuple(None if d < 0 else slice(None) for d in self.order)]


def _entry(what: Any) -> Any:
    """What selects these elements in an index of JAX."""
    return what.read_index() if isinstance(what, Fixed) else what.as_slice()


def _entry_of_stand_in(what: Fixed | Range | Window) -> Any:
    if isinstance(what, Fixed):
        return 0 if what.is_traced else _jax.stand_in_size(what.index)
    if isinstance(what, Window):
        return slice(0, what.size * what.step, what.step)
    return Range(*map(_jax.stand_in_size, what)).as_slice()


def _range_of(x: Any, axis: int, a: Range) -> Any:
    if a.step not in (1, -1):
        positions = jax.numpy.arange(a.size) * a.step + _jax.size_value(a.start)
        return jax.numpy.take(x, positions, axis, mode="clip")
    start = a.start if a.step == 1 else a.start - a.size + 1
    x = jax.lax.slice_in_dim(x, start, start + a.size, axis=axis)
    return x if a.step == 1 else jax.lax.rev(x, [axis])


class Reshape(NamedTuple):
    """All elements of the parent in another shape, in the same order."""

    parent: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, x: Any) -> Any:
        return jax.lax.reshape(x, self.shape)

    def read_numpy(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(tuple(map(_jax.stand_in_size, self.shape)), copy=False)


Step = Selection | Reshape


def read(steps: Sequence[Step], x: Any) -> Any:
    """The view of ``x`` with these steps."""
    for step in steps:
        x = step.read(x)
    return x


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
    if isinstance(entry, _jax.DynamicSlice):
        return _slice_or_window(entry)
    if _jax.is_size(entry):
        return _jax.size_value(entry)
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
    if entry is None or entry is Ellipsis or isinstance(entry, (int, slice, Window)):
        return True
    return entry.ndim == 0 and not is_mask(entry)


def is_condition(entry: Any) -> bool:
    """Whether an entry is a boolean of no axes: True is an index of a new axis, False of none."""
    return is_mask(entry) and not entry.ndim


def in_two_steps(entries: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Two indices that do what one with conditions does: the new axes, then arrays for them.

    None if there is no condition, or one that is traced.
    """
    known = [np.asarray(_jax.concrete(e)) for e in entries if is_condition(e)]
    if not known or any(k.dtype != np.bool_ for k in known):
        return None
    new_axes: list[Any] = []
    for entry in entries:
        new_axes += [None] if is_condition(entry) else [slice(None)] * _axes_of(entry)
    arrays = (np.zeros(int(k), int) for k in known)
    return tuple(new_axes), tuple(next(arrays) if is_condition(e) else e for e in entries)


def without_windows(
    shape: Sequence[Any], entries: Sequence[Any]
) -> tuple[tuple[Step, ...], tuple[Any, ...]]:
    """The steps to what the windows in an index take, and the index of that."""
    windows: list[Any] = []
    for entry in entries:
        windows += [entry] if isinstance(entry, Window) else [slice(None)] * _axes_of(entry)
    rest = tuple(slice(None) if isinstance(e, Window) else e for e in entries)
    return view((), shape, windows), rest


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
        if isinstance(entry, int) and isinstance(shape[axis], int):
            check_bounds(entry, shape[axis], axis)
        elif isinstance(entry, np.ndarray) and entry.size and isinstance(shape[axis], int):
            check_bounds(int(entry.min()), shape[axis], axis)
            check_bounds(int(entry.max()), shape[axis], axis)
        axis += entry is not None and entry is not Ellipsis


def _may_be_outside(i: int, size: Any) -> bool:
    """Whether nobody knows if the index is out of bounds, for a symbolic size."""
    try:
        return (-i <= size if i < 0 else i < size) not in (True, False)
    except _jax.InconclusiveDimensionOperation:
        return True


def check_bounds(i: int, size: Any, axis: int) -> Any:
    """The integer index, counted from the front."""
    if not (-i <= size if i < 0 else i < size):
        raise IndexError(f"index {i} is out of bounds for axis {axis} with size {size}")
    return i + size if i < 0 else i


# -- Steps to a view -------------------------------------------------------------------------


def view(steps: Sequence[Step], shape: Sequence[int], entries: Sequence[Any]) -> tuple[Step, ...]:
    """The steps to ``v[entries]``, for a view ``v`` of the given steps and shape.

    The entries are basic and as `expanded` gives them.
    """
    before, last = _last_selection(steps, shape)
    if not _takes(last, entries):
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
            start, step, taken = _jax.slice_of_axis(entry, size)
            if d < 0:
                order.append(EMPTY_AXIS if taken == 0 else NEW_AXIS)
                continue
            old = along[d]
            assert isinstance(old, Range)
            along[d] = Range(old.start + old.step * start, old.step * step, taken)
            order.append(d)
        elif isinstance(entry, int) and not _may_be_outside(entry, size):
            i = check_bounds(entry, size, axis)
            if d >= 0:
                old = along[d]
                assert isinstance(old, Range)
                along[d] = Fixed(old.start + old.step * i)
        elif isinstance(entry, Window):
            along[d] = entry
            order.append(d)
        else:
            old = along[d]
            assert isinstance(old, Range)
            entry = jax.numpy.asarray(entry)
            along[d] = Fixed(entry, None if old == (0, 1, last.parent[d]) else old)
    return _with(before, Selection(last.parent, tuple(along), tuple(order)))


def _takes(last: Selection, entries: Sequence[Any]) -> bool:
    """Whether a selection and an index of it are one selection."""
    if any(isinstance(a, Window) for a in last.along):
        return False
    given = [e for e in entries if e is not None]
    traced = [d for d, e in zip(last.order, given, strict=False) if not isinstance(e, (int, slice))]
    windows = any(isinstance(e, Window) for e in given)
    return all(d >= 0 for d in traced) and (last.is_all or not windows)


def _static(entry: slice) -> slice:
    return slice(*(None if b is None else _bound(b) for b in (entry.start, entry.stop, entry.step)))


def _bound(bound: Any) -> Any:
    if _jax.is_size(bound):
        return bound
    try:
        return operator.index(bound)
    except jax.errors.TracerIntegerConversionError:
        raise IndexError(
            message(
                "A bound of a slice is traced, so nobody knows how many elements it takes.",
                fix="""
                x[jax.ds(start, 3)] = values            # as many as you say, from a traced start
                i = jnp.arange(len(x))
                x[(start <= i) & (i < stop)] = value    # or one value for all between the bounds
                """,
                used=_jax.user_location(),
            )
        ) from None


def _slice_or_window(entry: Any) -> slice | Window:
    """A `jax.ds` of this index."""
    start, size, step = entry.start, operator.index(entry.size), operator.index(entry.stride)
    if not _jax.is_size(start):
        return Window(as_signed(start), step, size)
    return slice(start, start + size * step, step)


def as_signed(index: Any) -> Any:
    """An integer, traced or not, of a type that has negative numbers and room for all positions."""
    index = index if isinstance(index, (np.ndarray, np.generic)) else jax.numpy.asarray(index)
    dtype = np.dtype(index.dtype)
    if dtype.kind == "i" and dtype.itemsize >= 4:
        return index
    if dtype.itemsize >= 4:  # what has no place among the positive numbers is out of bounds
        index = index.clip(0, np.iinfo(np.int32).max)
    return index.astype(np.int32)


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
        step.read_numpy(stand_in(steps, base))
    except ValueError:
        return None
    return (*steps, step)


def stand_in(steps: Sequence[Step], base: Sequence[int]) -> np.ndarray:
    """A view of NumPy with these steps, of an array of the shape ``base``, and of no memory."""
    base = [_jax.stand_in_size(n) for n in base]
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
