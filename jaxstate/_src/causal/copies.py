"""Operations that give elements other places: slices, padding, broadcasting ..."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src.causal.knowledge import Facts, facts_or_none, lean, placed
from jaxstate._src.causal.program import Operation, Value
from jaxstate._src.causal.regions import Region, Table, only, onto_axis, region_shape, table_or_none
from jaxstate._src.causal.rule import Rule


class Source(NamedTuple):
    """Where elements of a result come from.

    Attributes:
      value: an operand.
      axes: for each axis of the operand, the axis of the result that moves along it (or None), and
        the index in the operand for each index in the result, -1 where it is not from here; None
        for the same index.
      where: further axes of the result, and for each of their indices whether it is from here.
    """

    value: Value
    axes: tuple[tuple[int | None, np.ndarray | None], ...]
    where: tuple[tuple[int, np.ndarray], ...] = ()

    def here(self) -> list[tuple[int, np.ndarray]]:
        """The axes of the result along which only a part is from here, and which."""
        outside = [(to, i >= 0) for to, i in self.axes if i is not None and (i < 0).any()]
        return [*self.where, *outside]  # type: ignore[list-item]


def identity(x: Value) -> Source:
    return Source(x, tuple((d, None) for d in range(len(x.shape))))


def along(x: Value, axis: int, index: np.ndarray) -> Source:
    return Source(x, tuple((d, index if d == axis else None) for d in range(len(x.shape))))


class Copies(Rule):
    """Each element of a result is an element of an operand, and it is known which.

    Args:
      sources: ``sources(op, place)`` is a list of `Source`; the first that has the element counts.
    """

    def __init__(self, sources: Callable[[Operation, int], list[Source]]):
        self.sources = sources

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [self._copied(op, k, lambda x: x.stamps) for k in range(len(op.avals))]

    def facts(self, op: Operation, place: int) -> Facts | None:
        facts = {s.value: s.value.facts() for s in self.sources(op, place)}
        if not any(facts.values()):
            return None
        nothing = Facts(np.array(False), np.array(False))
        sure = self._copied(op, place, lambda x: (facts[x] or nothing).sure)
        value = self._copied(op, place, lambda x: (facts[x] or nothing).value)
        assumed = any(f and f.assumed for f in facts.values())
        return facts_or_none(lean(sure), lean(value), assumed)

    def _copied(self, op: Operation, place: int, of: Callable[[Value], Any]) -> np.ndarray:
        """The elements that something lean about the operands has in the places of the result."""
        out: Any = None
        ndim = len(op.avals[place].shape)
        for source in reversed(self.sources(op, place)):
            part = np.asarray(of(source.value))
            part = part.reshape((1,) * (len(source.axes) - part.ndim) + part.shape)
            for axis, (_, index) in enumerate(source.axes):
                if index is not None and part.shape[axis] > 1:
                    part = part.take(np.maximum(index, 0), axis)
            part = part.squeeze(tuple(d for d, (to, _) in enumerate(source.axes) if to is None))
            part = placed(part, [to for to, _ in source.axes if to is not None], ndim)
            inside = np.ones((1,) * ndim, bool)
            for to, flags in source.here():
                inside = inside & placed(flags, [to], ndim)
            out = part if out is None else np.where(inside, part, out)
        return out

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        shape = region_shape(op.avals[place].shape, region)
        parts = []
        for source in self.sources(op, place):
            inside = np.ones((1,) * (1 + len(shape)), bool)
            for to, flags in source.here():
                table = region[to]
                flags = flags[None] if table is None else flags[table.rows]
                inside = inside & onto_axis(flags, to, len(shape))
            if inside.any():
                parts.append((source, inside))
            if inside.all():
                break
        out: Any = None
        for source, inside in reversed(parts):
            part = self._part(source, run, region, shape)
            out = part if out is None else jnp.where(run.clock.lookup(inside), part, out)
        return out

    def _part(self, source: Source, run: Any, region: Region, shape: Sequence[int]) -> Any:
        """What the result would be if it were all from here."""
        x = source.value
        wanted: list[Table | None] = []
        for n, (to, index) in zip(x.shape, source.axes, strict=True):
            table = None if to is None else region[to]
            if index is not None:
                rows = index[None] if table is None else index[table.rows]
                table = table_or_none(np.maximum(rows, 0), n)
            wanted.append(table)
        part = run.pull(x, tuple(wanted))
        sizes = zip(part.shape, source.axes, strict=True)
        part = part.reshape([n for n, (to, _) in sizes if to is not None])
        kept = [to for to, _ in source.axes if to is not None]
        order = np.argsort(kept, kind="stable").tolist()
        if order != sorted(order):
            part = part.transpose(order)
        return part if part.shape == shape else jax.lax.broadcast_in_dim(part, shape, sorted(kept))


def of_broadcast(op: Operation, place: int) -> list[Source]:
    x, dims, shape = op.ins[0], op.params["broadcast_dimensions"], op.params["shape"]
    one = np.zeros(1, int)
    axes = [
        (int(d), None) if n == shape[d] else (None, one) for n, d in zip(x.shape, dims, strict=True)
    ]
    return [Source(x, tuple(axes))]


def of_transpose(op: Operation, place: int) -> list[Source]:
    x, order = op.ins[0], list(op.params["permutation"])
    return [Source(x, tuple((order.index(d), None) for d in range(len(x.shape))))]


def of_squeeze(op: Operation, place: int) -> list[Source]:
    x, removed = op.ins[0], [int(d) % len(op.ins[0].shape) for d in op.params["dimensions"]]
    one, axes, to = np.zeros(1, int), [], 0
    for d in range(len(x.shape)):
        axes.append((None, one) if d in removed else (to, None))
        to += d not in removed
    return [Source(x, tuple(axes))]


def of_slice(op: Operation, place: int) -> list[Source]:
    x, p = op.ins[0], op.params
    strides = p["strides"] or (1,) * len(x.shape)
    bounds = zip(p["start_indices"], p["limit_indices"], strides, x.shape, strict=True)
    axes = [
        (d, None if (a, b, s) == (0, n, 1) else np.arange(a, b, s))
        for d, (a, b, s, n) in enumerate(bounds)
    ]
    return [Source(x, tuple(axes))]


def of_rev(op: Operation, place: int) -> list[Source]:
    x = op.ins[0]
    reversed_ = op.params["dimensions"]
    axes = [(d, np.arange(n)[::-1] if d in reversed_ else None) for d, n in enumerate(x.shape)]
    return [Source(x, tuple(axes))]


def of_tile(op: Operation, place: int) -> list[Source]:
    x, reps = op.ins[0], op.params["reps"]
    axes = [
        (d, None if r == 1 else np.arange(n * r) % n)
        for d, (n, r) in enumerate(zip(x.shape, reps, strict=True))
    ]
    return [Source(x, tuple(axes))]


def of_pad(op: Operation, place: int) -> list[Source]:
    x, fill = op.ins
    axes: list[Any] = []
    for d, (n, (low, high, inner)) in enumerate(
        zip(x.shape, op.params["padding_config"], strict=True)
    ):
        if low == high == inner == 0:
            axes.append((d, None))
            continue
        at = np.arange(op.avals[0].shape[d]) - low
        inside = (at >= 0) & (at % (inner + 1) == 0) & (at // (inner + 1) < n)
        axes.append((d, np.where(inside, at // (inner + 1), -1)))
    return [Source(x, tuple(axes)), Source(fill, ())]


def of_concatenate(op: Operation, place: int) -> list[Source]:
    axis, total = op.params["dimension"], op.avals[0].shape[op.params["dimension"]]
    sources, start = [], 0
    for x in op.ins:
        at, size = np.arange(total) - start, x.shape[axis]
        if size:
            sources.append(along(x, axis, np.where((at >= 0) & (at < size), at, -1)))
        start += size
    return sources


def of_stack(op: Operation, place: int) -> list[Source]:
    axis, sources = op.params["axis"], []
    for k, x in enumerate(op.ins):
        axes = tuple((d + (d >= axis), None) for d in range(len(x.shape)))
        sources.append(Source(x, axes, ((axis, np.arange(len(op.ins)) == k),)))
    return sources


def of_split(op: Operation, place: int) -> list[Source]:
    axis, sizes = op.params["axis"], op.params["sizes"]
    start = sum(sizes[:place])
    return [along(op.ins[0], axis, np.arange(start, start + sizes[place]))]


def of_unstack(op: Operation, place: int) -> list[Source]:
    x, axis = op.ins[0], op.params["axis"]
    axes: list[Any] = [(d - (d > axis), None) for d in range(len(x.shape))]
    axes[axis] = (None, np.array([place]))
    return [Source(x, tuple(axes))]


def same_place(op: Operation, place: int) -> list[Source]:
    return [identity(op.ins[place])]


class Reshape(Rule):
    """The same elements in the same order. Axes that belong together are a group."""

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [self._reshaped(op, op.ins[0].stamps)]

    def facts(self, op: Operation, place: int) -> Facts | None:
        facts = op.ins[0].facts()
        return facts and facts.each(lambda a: self._reshaped(op, a))

    def _reshaped(self, op: Operation, a: np.ndarray) -> np.ndarray:
        x, shape = op.ins[0], op.avals[0].shape
        # Only groups of axes along which it changes are written out.
        sizes: list[int] = []
        new: list[int] = []
        for old_axes, new_axes in groups(x.shape, shape):
            changes = any(a.shape[d] > 1 for d in old_axes)
            sizes += [x.shape[d] if changes else 1 for d in old_axes]
            new += [shape[d] if changes else 1 for d in new_axes]
        return lean(np.broadcast_to(a, sizes).reshape(new))

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x, shape = op.ins[0], op.avals[0].shape
        wanted: list[Table | None] = [None] * len(x.shape)
        whole = []  # axes of groups that have to be reshaped before the part is taken
        for old_axes, new_axes in groups(x.shape, shape):
            if all(region[d] is None for d in new_axes):
                continue
            tables = places_in_group(
                [x.shape[d] for d in old_axes], [shape[d] for d in new_axes],
                [region[d] for d in new_axes],
            )  # fmt: skip
            if tables is None:
                whole += new_axes
                continue
            for d, table in zip(old_axes, tables, strict=True):
                wanted[d] = table
        sizes = [n if d in whole else (n if t is None else t.size)
                 for d, (n, t) in enumerate(zip(shape, region, strict=True))]  # fmt: skip
        part = run.pull(x, tuple(wanted)).reshape(sizes)
        return run.clock.take(part, only(region, whole))


def groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes, in groups of one product, as small as they can be."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [], []
        m = n = 1
        if i < len(old):
            a, m, i = [i], old[i], i + 1
        if j < len(new) and (m != 1 or not a or new[j] == 1):
            b, n, j = [j], new[j], j + 1
        while m != n:
            if m < n and i < len(old):
                m, i = m * old[i], i + 1
                a.append(i - 1)
            elif j < len(new):
                n, j = n * new[j], j + 1
                b.append(j - 1)
            else:
                break
        found.append((a, b))
    return found


def places_in_group(
    old: Sequence[int], new: Sequence[int], region: Sequence[Table | None]
) -> list[Table | None] | None:
    """Where elements are in the old axes; None if that is not a product of indices."""
    flat = np.zeros((1, 1), np.int64)
    for n, table in zip(new, region, strict=True):
        rows = np.arange(n)[None] if table is None else table.rows
        flat = (flat[:, :, None] * n + rows[:, None, :]).reshape(max(len(flat), len(rows)), -1)
    tables: list[Table | None] = []
    again = np.zeros((1, 1), np.int64)
    for d, n in enumerate(old):
        at = flat // math.prod(old[d + 1 :]) % n
        counts = {len(dict.fromkeys(row)) for row in at.tolist()}
        if len(counts) != 1:
            return None
        rows = np.array([list(dict.fromkeys(row)) for row in at.tolist()])
        again = (again[:, :, None] * n + rows[:, None, :]).reshape(len(rows), -1)
        tables.append(table_or_none(rows, n))
    return tables if again.shape == flat.shape and (again == flat).all() else None
