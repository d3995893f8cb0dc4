"""Parts of arrays that move with time.

A *region* says for each axis which elements: all of them (None), or those of a `Table`, which has a
row of indices for each moment. That the indices are numbers, not tracers, is what makes everything
here easy: rules compute with them in NumPy, and only `Clock` turns them into operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Table:
    """Indices along an axis: ``rows[m]`` are those at moment m. One row is for all moments."""

    def __init__(self, rows: np.ndarray):
        rows = np.asarray(rows, np.int32)
        if len(rows) > 1 and (rows == rows[:1]).all():
            rows = rows[:1]
        self.rows = rows
        self._key = rows.shape, rows.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    @property
    def is_contiguous(self) -> bool:
        return bool((np.diff(self.rows, axis=1) == 1).all())

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Table:
        return Table(change(self.rows))


Region = tuple[Table | None, ...]


def table_or_none(rows: np.ndarray, size: int) -> Table | None:
    """The table, or None if it is all of the axis at all moments."""
    everything = rows.shape[1] == size and (rows == np.arange(size)).all()
    return None if everything else Table(rows)


def region_shape(shape: Sequence[int], region: Region) -> tuple[int, ...]:
    return tuple(n if t is None else t.size for n, t in zip(shape, region, strict=True))


def only(region: Region, axes: Sequence[int]) -> Region:
    """The region along some axes, and everything along the others."""
    return tuple(t if axis in axes else None for axis, t in enumerate(region))


def without(region: Region, axes: Sequence[int]) -> Region:
    return tuple(None if axis in axes else t for axis, t in enumerate(region))


def onto_axis(flags: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Flags with one row for each moment, in the shape in which they broadcast."""
    return flags.reshape(len(flags), *(-1 if d == axis else 1 for d in range(ndim)))


def at_moments(a: np.ndarray, region: Region) -> np.ndarray:
    """A lean array in a region, with an axis of moments in front."""
    index = []
    for axis, table in enumerate(region):
        moves = table is not None and a.shape[axis] > 1
        rows = table.rows if moves and table else np.arange(a.shape[axis])[None]
        index.append(rows.reshape(len(rows), *(-1 if d == axis else 1 for d in range(a.ndim))))
    return a[tuple(index)] if index else a[None]


def box(stamps: np.ndarray, times: np.ndarray) -> Region | None:
    """The least region that has the elements with stamp ``t`` at time ``t``; None without any.

    A time that has fewer than another has some of its elements twice, or those of the time before.
    """
    where = np.nonzero((stamps >= times[0]) & (stamps <= times[-1]))
    if not len(where[0]) and stamps.ndim:
        return None
    moments = stamps[where] - times[0]
    region: list[Table | None] = []
    for axis, size in enumerate(stamps.shape):
        if size == 1:
            region.append(None)
            continue
        pairs = np.unique(moments.astype(np.int64) * size + where[axis])
        moment, element = pairs // size, pairs % size
        counts = np.bincount(moment, minlength=len(times))
        starts = np.cumsum(counts) - counts
        with_some = np.flatnonzero(counts)
        last = np.searchsorted(with_some, np.arange(len(times)), side="right") - 1
        source = with_some[np.maximum(last, 0)]
        places = np.minimum(np.arange(counts.max())[None], counts[source][:, None] - 1)
        rows = element[starts[source][:, None] + places]
        region.append(table_or_none(rows, size))
    return tuple(region)


class Clock:
    """A moment of the loop: makes operations out of tables.

    Attributes:
      times: those that the loop goes through, one after the other.
      now: which of them it is, a tracer.
    """

    def __init__(self, times: np.ndarray, now: Any):
        self.times = times
        self.now = now

    def lookup(self, rows: np.ndarray) -> Any:
        """The row of this moment."""
        if len(rows) == 1:
            return rows[0]
        if rows.dtype != bool:
            steps = np.diff(rows.astype(np.int64), axis=0)
            if (steps == steps.flat[0]).all():
                first = rows[0].astype(np.int64) - steps.flat[0] * int(self.times[0])
                return self.now * np.int32(steps.flat[0]) + np.asarray(first, np.int32)
        elif rows[0].size == 1 and _changes_once(rows):
            flags = rows.reshape(len(rows))
            later = self.now >= np.int32(self.times[np.argmax(flags != flags[0])])
            return jnp.reshape(later if flags[-1] else ~later, rows.shape[1:])
        row = self.now - np.int32(self.times[0])
        return jax.lax.dynamic_index_in_dim(jnp.asarray(rows), row, 0, keepdims=False)

    def start(self, table: Table) -> Any:
        return self.lookup(table.rows[:, 0])

    def take(self, array: Any, region: Region) -> Any:
        """The part of an array that is a region of it."""
        sizes = region_shape(array.shape, region)
        together = [t is not None and t.is_contiguous for t in region]
        if any(together):
            starts = [
                self.start(t) if t is not None and c else np.int32(0)
                for t, c in zip(region, together, strict=True)
            ]
            ends = [s if c else n for s, c, n in zip(sizes, together, array.shape, strict=True)]
            if all(isinstance(s, np.integer) for s in starts):
                limits = [int(s) + e for s, e in zip(starts, ends, strict=True)]
                array = jax.lax.slice(array, [int(s) for s in starts], limits)
            else:
                array = jax.lax.dynamic_slice(array, starts, ends, allow_negative_indices=False)
        for axis, (table, done) in enumerate(zip(region, together, strict=True)):
            if table is not None and not done:
                array = jnp.take(array, self.lookup(table.rows), axis, mode="clip")
        return array

    def put(self, array: Any, part: Any, region: Region) -> Any:
        """The array with another part in a region of it."""
        if all(t is None for t in region):
            return part
        if all(t is None or t.is_contiguous for t in region):
            starts = [np.int32(0) if t is None else self.start(t) for t in region]
            return jax.lax.dynamic_update_slice(array, part, starts, allow_negative_indices=False)
        index = [
            np.arange(n) if t is None else self.lookup(t.rows)
            for n, t in zip(array.shape, region, strict=True)
        ]
        return array.at[jnp.ix_(*index)].set(part, mode="promise_in_bounds")


def are_disjoint(region: Region, moments: int) -> bool:
    """Whether no element is in the region at two moments."""
    places = np.zeros((1, 1), np.int64)
    for table in region:
        if table is not None and len(table.rows) > 1:
            size = int(table.rows.max()) + 1
            places = places[:, :, None] * size + table.rows[:, None, :]
            places = places.reshape(len(places), -1)
    each = [np.unique(row) for row in places] if places.shape[1] > 1 else [places]
    together = np.concatenate([row.ravel() for row in each])
    return moments == 1 or (len(places) > 1 and len(np.unique(together)) == len(together))


def _changes_once(rows: np.ndarray) -> bool:
    flags = rows.reshape(len(rows))
    return int((flags[1:] != flags[:-1]).sum()) == 1
