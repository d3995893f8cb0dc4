"""What an operation needs for a part of its result, family by family.

A rule has three answers:

* ``stamps(op)``: when the elements of each result are known, from the stamps of the operands;
* ``facts(op, place)``: which elements of a result are fixed, or None;
* ``compute(op, run, place, region)``: a part of a result, from what ``run.pull`` gives of the
  operands. It may give the parts of all results, as a list, if that region is one of each.

A *recurrence* computes a part from what it has computed before, and has ``advance`` instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import _jax
from jaxstate.causal.knowledge import (
    Facts,
    elementwise_facts,
    facts_or_none,
    latest,
    lean,
    mixed,
    placed,
    selected_facts,
)
from jaxstate.causal.program import Operation, Value, run_equation
from jaxstate.causal.regions import Region, Table, only, region_shape, table_or_none, without


class Rule:
    is_recurrence = False

    def stamps(self, op: Operation) -> list[np.ndarray]:
        raise NotImplementedError

    def facts(self, op: Operation, place: int) -> Facts | None:
        return None

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        raise NotImplementedError


# -- Element by element ----------------------------------------------------------------------


class Elementwise(Rule):
    """Element i of the result is made of elements i of the operands; scalars are for all."""

    def stamps(self, op: Operation) -> list[np.ndarray]:
        stamps = latest((x.stamps for x in op.ins), len(op.avals[0].shape))
        facts = self._facts(op)
        if facts and not facts.assumed:
            stamps = np.where(facts.sure, 0, stamps)
        return [stamps] * len(op.avals)

    def _facts(self, op: Operation) -> Facts | None:
        aval = op.avals[0]
        return elementwise_facts(op.name, [x.facts() for x in op.ins], aval.shape, aval.dtype)

    def facts(self, op: Operation, place: int) -> Facts | None:
        return self._facts(op)

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        shape = op.avals[0].shape
        args = [run.pull(x, self._region(x, region, shape)) for x in op.ins]
        outs = op.bind(args)
        if op.name == "mul":  # zero times what is not known yet is zero
            for x, part in zip(op.ins, args, strict=True):
                facts = x.facts()
                if not x.depends and facts and facts.zero.any():
                    outs = [jnp.where(part == 0, part * outs[0].dtype.type(0), outs[0])]
        return outs

    def _region(self, x: Value, region: Region, shape: Sequence[int]) -> Region:
        if not x.shape:
            return ()
        sizes = zip(x.shape, shape, region, strict=True)
        return tuple(None if n == 1 and n != size else table for n, size, table in sizes)


class Selection(Elementwise):
    """``select_n``: where it is known what is selected, the other operands do not matter."""

    def stamps(self, op: Operation) -> list[np.ndarray]:
        which, cases = op.ins[0], op.ins[1:]
        stamps = latest((x.stamps for x in op.ins), len(op.avals[0].shape))
        facts = which.facts()
        if facts:
            for k, case in enumerate(cases):
                stamps = np.where(facts.sure & (facts.value == k), case.stamps, stamps)
        return [stamps] * len(op.avals)

    def _facts(self, op: Operation) -> Facts | None:
        return selected_facts(op.ins[0].facts(), [x.facts() for x in op.ins[1:]])


# -- Elements at other places ----------------------------------------------------------------


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


def onto_axis(flags: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """Flags with one row for each moment, in the shape in which they broadcast."""
    return flags.reshape(len(flags), *(-1 if d == axis else 1 for d in range(ndim)))


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
        nothing = Facts(np.False_, np.False_)
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


def of_expand(op: Operation, place: int) -> list[Source]:
    x, new = op.ins[0], [int(d) % len(op.avals[0].shape) for d in op.params["dimensions"]]
    kept = [d for d in range(len(op.avals[0].shape)) if d not in new]
    return [Source(x, tuple((d, None) for d in kept))]


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


def known_starts(op: Operation, starts: Sequence[Value], sizes: Sequence[int]) -> list[int] | None:
    """Where a part of the first operand begins, if that is known."""
    found = []
    for start, size, n in zip(starts, sizes, op.ins[0].shape, strict=True):
        at = 0 if size == n else start.concrete() if not start.depends else None
        if at is None:
            return None
        found.append(int(np.clip(int(at), 0, n - size)))
    return found


def window_source(x: Value, starts: Sequence[int], shape: Sequence[int]) -> Source:
    """A value that is put into another one of this shape."""
    axes: list[Any] = []
    for d, (start, size, n) in enumerate(zip(starts, x.shape, shape, strict=True)):
        at = np.arange(n) - start
        axes.append((d, None if size == n else np.where((at >= 0) & (at < size), at, -1)))
    return Source(x, tuple(axes))


def dynamic_slice_rule(op: Operation) -> Rule:
    sizes = op.params["slice_sizes"]
    starts = known_starts(op, op.ins[1:], sizes)
    if starts is None:
        return SliceSomewhere()
    return Copies(lambda op, place: [
        Source(op.ins[0], tuple(
            (d, None if size == n else np.arange(start, start + size))
            for d, (start, size, n) in enumerate(zip(starts, sizes, op.ins[0].shape, strict=True))
        ))
    ])  # fmt: skip


def dynamic_update_slice_rule(op: Operation) -> Rule:
    x, update = op.ins[:2]
    starts = known_starts(op, op.ins[2:], update.shape)
    if starts is None:
        return UpdateSomewhere()
    return Copies(lambda op, place: [window_source(update, starts, x.shape), identity(x)])


class SliceSomewhere(Rule):
    """``dynamic_slice`` from a place that is not known: any element may come from any along the
    axes that are cut."""

    def _cut(self, op: Operation) -> list[int]:
        sizes = zip(op.params["slice_sizes"], op.ins[0].shape, strict=True)
        return [d for d, (size, n) in enumerate(sizes) if size != n]

    def stamps(self, op: Operation) -> list[np.ndarray]:
        starts = [op.ins[1 + d].stamps for d in self._cut(op)]
        return [latest([mixed(op.ins[0].stamps, self._cut(op)), *starts], len(op.ins[0].shape))]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        cut = self._cut(op)
        part = run.pull(op.ins[0], without(region, cut))
        starts = [run.pull(s, ()) if d in cut else np.int32(0) for d, s in enumerate(op.ins[1:])]
        sizes = [k if d in cut else n for d, (k, n) in enumerate(
            zip(op.params["slice_sizes"], part.shape, strict=True))]  # fmt: skip
        return run.clock.take(jax.lax.dynamic_slice(part, starts, sizes), only(region, cut))


class UpdateSomewhere(Rule):
    """``dynamic_update_slice`` at a place that is not known."""

    def _cut(self, op: Operation) -> list[int]:
        sizes = zip(op.ins[1].shape, op.ins[0].shape, strict=True)
        return [d for d, (size, n) in enumerate(sizes) if size != n]

    def stamps(self, op: Operation) -> list[np.ndarray]:
        cut = self._cut(op)
        starts = [op.ins[2 + d].stamps for d in cut]
        update = mixed(op.ins[1].stamps, cut)
        return [latest([op.ins[0].stamps, update, *starts], len(op.ins[0].shape))]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        cut = self._cut(op)
        parts = [run.pull(x, without(region, cut)) for x in op.ins[:2]]
        starts = [run.pull(s, ()) if d in cut else np.int32(0) for d, s in enumerate(op.ins[2:])]
        return run.clock.take(jax.lax.dynamic_update_slice(*parts, starts), only(region, cut))


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
    if len(old) == 0:
        return []
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


# -- Along some axes, all elements with all --------------------------------------------------


class Mixing(Rule):
    """Elements are mixed along all axes but those that are kept: of operands and results, these
    are the same.

    Args:
      kept: ``kept(op)`` are the axes that are kept; the first ones, if results have fewer axes.
    """

    def __init__(self, kept: Callable[[Operation], Sequence[int]]):
        self.kept = kept

    def stamps(self, op: Operation) -> list[np.ndarray]:
        kept = list(self.kept(op))
        most: Any = np.zeros((1,) * len(kept), np.int32)
        for x in op.ins:
            stamps = mixed(x.stamps, [d for d in range(len(x.shape)) if d not in kept])
            if x.shape:
                stamps = stamps.reshape([stamps.shape[d] for d in kept])
            most = np.maximum(most, stamps)
        return [placed(most, kept, len(aval.shape)) for aval in op.avals]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        kept = list(self.kept(op))
        wanted = [
            tuple(region[d] if d in kept else None for d in range(len(x.shape))) for x in op.ins
        ]
        args = [run.pull(x, w) for x, w in zip(op.ins, wanted, strict=True)]
        if any(t is not None for w in wanted for t in w):
            outs = op.bind(args)
        else:
            outs = run_equation(op.eqn, args)
        rest = [d for d in range(len(region)) if d not in kept]
        return run.clock.take(outs[place], only(region, rest))


def all_but(axes: Callable[[Any, int], Sequence[int]]) -> Mixing:
    """Mixes along ``axes(params, ndim)``."""

    def kept(op: Operation) -> list[int]:
        ndim = len(op.avals[0].shape)
        mixing = [d % ndim for d in axes(op.params, ndim)]
        return [d for d in range(ndim) if d not in mixing]

    return Mixing(kept)


MATRICES = Mixing(lambda op: range(max(len(x.shape) for x in op.ins) - 2))
OF_KEYS = Mixing(lambda op: range(len(op.ins[0].shape)))
WHOLE = Mixing(lambda op: ())


NEUTRAL = {
    "reduce_sum": 0, "reduce_or": 0, "reduce_xor": 0, "reduce_max": -np.inf, "reduce_min": np.inf,
    "reduce_prod": 1, "reduce_and": 1,
}  # fmt: skip


class Reduction(Rule):
    """All elements along some axes become one. Those that are neutral do not matter."""

    def _axes(self, op: Operation) -> list[int]:
        axes = op.params["axes"] if "axes" in op.params else op.params["dimensions"]
        return [int(a) for a in axes]

    def _neutral(self, op: Operation) -> Facts | None:
        """Whether elements are neutral, if that is needed to know."""
        x = op.ins[0]
        if op.name not in NEUTRAL or all(x.stamps.shape[d] == 1 for d in self._axes(op)):
            return None
        facts = x.facts()
        return facts and facts._replace(sure=facts.sure & (facts.value == NEUTRAL[op.name]))

    def stamps(self, op: Operation) -> list[np.ndarray]:
        axes, ndim = self._axes(op), len(op.ins[0].shape)
        most = latest((x.stamps for x in op.ins), ndim)
        neutral = self._neutral(op)
        if neutral:
            most = np.where(neutral.sure, 0, most)
        return [mixed(most, axes).squeeze(tuple(axes))] * len(op.avals)

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x, axes, rest = op.ins[0], self._axes(op), iter(region)
        wanted = tuple(None if d in axes else next(rest) for d in range(len(x.shape)))
        args = [run.pull(x, wanted if x.shape else ()) for x in op.ins]
        outs = op.bind(args)
        neutral = self._neutral(op)
        if neutral and neutral.assumed:
            unknown = run.unknown(x, wanted)
            if unknown is not None:
                fixed = jnp.asarray(NEUTRAL[op.name], x.dtype)
                [known] = op.bind([jnp.where(unknown, fixed, args[0])])
                later = run.unknown(op.outs[0], region)
                same = known == outs[0]
                run.check(jnp.all(same if later is None else same | later))
        return outs


class Product(Rule):
    """``dot_general``: what is multiplied by zero does not matter."""

    def _axes(self, op: Operation) -> Any:
        """For both operands, the axis of the result for each axis, then those that are summed."""
        contracted, batch = op.params["dimension_numbers"]
        places: list[list[int]] = []
        n = len(batch[0])
        total = len(op.avals[0].shape)
        for x, c, b in zip(op.ins, contracted, batch, strict=True):
            axes = [0] * len(x.shape)
            for d in range(len(x.shape)):
                if d in b:
                    axes[d] = list(b).index(d)
                elif d in c:
                    axes[d] = total + list(c).index(d)
                else:
                    axes[d], n = n, n + 1
            places.append(axes)
        return places, total, len(contracted[0])

    def stamps(self, op: Operation) -> list[np.ndarray]:
        places, total, summed = self._axes(op)
        ndim = total + summed
        parts = [placed(x.stamps, axes, ndim) for x, axes in zip(op.ins, places, strict=True)]
        most = latest(parts, ndim)
        axes = range(total, ndim)
        if any(most.shape[d] > 1 for d in axes):
            for zero, _ in zip(*self._zeros(op), strict=True):
                if zero is not None:
                    most = np.where(zero, 0, most)
        return [mixed(most, axes).reshape(most.shape[:total])]

    def _zeros(self, op: Operation) -> tuple[list[Any], list[bool]]:
        places, total, summed = self._axes(op)
        zeros: list[Any] = []
        assumed = []
        for x, axes in zip(op.ins, places, strict=True):
            facts = x.facts()
            zero = facts.zero if facts else None
            zeros.append(None if zero is None else placed(zero, axes, total + summed))
            assumed.append(bool(facts and facts.assumed))
        return zeros, assumed

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        places, total, summed = self._axes(op)
        regions = [tuple(region[a] if a < total else None for a in axes) for axes in places]
        args = [run.pull(x, r) for x, r in zip(op.ins, regions, strict=True)]
        out = op.bind(args)
        if any(x.stamps.shape[d] > 1 for x, axes in zip(op.ins, places, strict=True)
               for d, a in enumerate(axes) if a >= total):  # fmt: skip
            for k, assumed in enumerate(self._zeros(op)[1]):
                if assumed:
                    self._check(op, run, region, regions, args, k)
        return out

    def _check(
        self, op: Operation, run: Any, region: Region, regions: Any, args: Any, k: int
    ) -> None:
        """What is assumed to be zero is zero, where the other operand is not known yet."""
        other = op.ins[1 - k]
        unknown = run.unknown(other, regions[1 - k])
        if unknown is None:
            return
        contracted, batch = op.params["dimension_numbers"]
        used = (*contracted[1 - k], *batch[1 - k])
        shape = [n if d in used else m for d, (n, m) in enumerate(
            zip(args[1 - k].shape, unknown.shape, strict=True))]  # fmt: skip
        pair = [jnp.asarray(args[k] != 0, jnp.float32), jnp.asarray(unknown, jnp.float32)]
        pair[1] = jnp.broadcast_to(pair[1], shape)
        missed = jax.lax.dot_general(
            *(pair if k == 0 else pair[::-1]), op.params["dimension_numbers"]
        )
        bad = missed != 0
        later = run.unknown(op.outs[0], region)
        run.check(~jnp.any(bad if later is None else bad & ~later))


# -- Windows ---------------------------------------------------------------------------------


class Axis(NamedTuple):
    """How a window moves along an axis."""

    taps: int
    stride: int
    low: int
    high: int
    base: int  # dilation of the operand
    dilation: int  # of the window

    def places(self, out: np.ndarray, size: int) -> np.ndarray:
        """For each index of the result (first axes) and tap (last) the index in the operand, or -1
        where there is none."""
        at = out[..., None] * self.stride - self.low + np.arange(self.taps) * self.dilation
        inside = (at >= 0) & (at % self.base == 0) & (at // self.base < size)
        return np.where(inside, at // self.base, -1)


class Window(Rule):
    """Each element is made of those in a window. Along an axis of which a part is wanted, the
    windows are cut out and laid side by side."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        """For each axis of the operand along which windows move: the axis of the result, and how."""
        raise NotImplementedError

    def fill(self, op: Operation, x: Any) -> Any:
        """What is outside of the operand."""
        raise NotImplementedError

    def rest(self, op: Operation, region: Region) -> Region:
        """The region of the operand along the other axes."""
        raise NotImplementedError

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        """The result, where along the narrow axes windows are side by side."""
        raise NotImplementedError

    def windowed(self, stamps: np.ndarray, op: Operation, skipped: Any = None) -> np.ndarray:
        """The stamps of the windows' elements, one axis of the operand after the other."""
        for d, (to, how) in self.windows(op).items():
            if stamps.shape[d] > 1:
                at = how.places(np.arange(op.avals[0].shape[to]), stamps.shape[d])
                part = np.where(
                    placed(at >= 0, [d, stamps.ndim], stamps.ndim + 1),
                    np.moveaxis(stamps.take(np.maximum(at, 0), d), d + 1, -1),
                    0,
                )
                stamps = part.max(-1)
        return stamps

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x = op.ins[0]
        windows = self.windows(op)
        wanted = list(self.rest(op, region))
        narrow, flags = [], []
        for d, (to, how) in windows.items():
            table = region[to]
            if table is None:
                continue
            at = how.places(table.rows, x.shape[d]).reshape(len(table.rows), -1)
            if (at < 0).any():
                flags.append((d, at >= 0))
            wanted[d] = Table(np.maximum(at, 0))
            narrow.append(d)
        part = run.pull(x, tuple(wanted))
        for d, inside in flags:
            inside = run.clock.lookup(onto_axis(inside, d, part.ndim))
            part = jnp.where(inside, part, self.fill(op, part))
        return self.on_windows(op, run, part, narrow)


class Convolution(Window):
    """``conv_general_dilated``, where the kernel does not depend on the input."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        p = op.params
        numbers = p["dimension_numbers"]
        kernel = op.ins[1].shape
        return {
            numbers.lhs_spec[2 + k]: (
                numbers.out_spec[2 + k],
                Axis(
                    kernel[numbers.rhs_spec[2 + k]], p["window_strides"][k], *p["padding"][k],
                    p["lhs_dilation"][k], p["rhs_dilation"][k],
                ),
            )
            for k in range(len(kernel) - 2)
        }  # fmt: skip

    def fill(self, op: Operation, x: Any) -> Any:
        return jnp.zeros((), x.dtype)

    def rest(self, op: Operation, region: Region) -> Region:
        numbers = op.params["dimension_numbers"]
        wanted: list[Table | None] = [None] * len(region)
        if op.params["batch_group_count"] == 1:
            wanted[numbers.lhs_spec[0]] = region[numbers.out_spec[0]]
        return tuple(wanted)

    def stamps(self, op: Operation) -> list[np.ndarray]:
        x, kernel = op.ins
        numbers = op.params["dimension_numbers"]
        mixing = [numbers.lhs_spec[1]]
        if op.params["batch_group_count"] != 1:
            mixing.append(numbers.lhs_spec[0])
        stamps = mixed(x.stamps, mixing)
        windows = self.windows(op)
        moving = [d for d in windows if stamps.shape[d] > 1]
        used = self._taps(op, moving)
        if used is None:
            stamps = self.windowed(stamps, op)
        else:
            stamps = self._at_taps(op, stamps, moving, used)
        order = [0] * len(x.shape)
        for a, b in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
            order[a] = b
        return [placed(stamps, order, len(x.shape))]

    def _taps(self, op: Operation, moving: Sequence[int]) -> np.ndarray | None:
        """Which taps along the moving axes are not zero for some channel; None if all."""
        kernel = op.ins[1]
        facts = kernel.facts() if moving else None
        if facts is None or not facts.zero.any():
            return None
        numbers = op.params["dimension_numbers"]
        axes = [numbers.rhs_spec[numbers.lhs_spec.index(d)] for d in moving]
        others = tuple(d for d in range(len(kernel.shape)) if d not in axes)
        used = ~np.broadcast_to(facts.zero, kernel.shape).all(axis=others)
        return None if used.all() else used.transpose(np.argsort(np.argsort(axes)))

    def _at_taps(
        self, op: Operation, stamps: np.ndarray, moving: Sequence[int], used: np.ndarray
    ) -> np.ndarray:
        windows = self.windows(op)
        most: Any = np.int32(0)
        for taps in np.argwhere(used):
            part, inside = stamps, np.bool_(True)
            for d, tap in zip(moving, taps, strict=True):
                to, how = windows[d]
                at = how.places(np.arange(op.avals[0].shape[to]), op.ins[0].shape[d])[:, tap]
                part = part.take(np.maximum(at, 0), d)
                inside = inside & placed(at >= 0, [d], stamps.ndim)
            most = np.maximum(most, np.where(inside, part, 0))
        return most if np.ndim(most) else np.zeros((1,) * stamps.ndim, np.int32)

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        p = op.params
        numbers = p["dimension_numbers"]
        kernel = run.pull(op.ins[1], (None,) * len(op.ins[1].shape))
        changed: dict[str, list[Any]] = {
            name: list(p[name])
            for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        }
        for d in narrow:
            k = numbers.lhs_spec.index(d) - 2
            changed["window_strides"][k] = kernel.shape[numbers.rhs_spec[2 + k]]
            changed["padding"][k] = (0, 0)
            changed["lhs_dilation"][k] = changed["rhs_dilation"][k] = 1
        return op.bind([x, kernel], **{name: tuple(v) for name, v in changed.items()})[0]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        numbers = op.params["dimension_numbers"]
        whole = [numbers.out_spec[1]]
        if op.params["batch_group_count"] != 1:
            whole.append(numbers.out_spec[0])
        part = super().compute(op, run, place, without(region, whole))
        return run.clock.take(part, only(region, whole))


class Pooling(Window):
    """``reduce_window`` and its special cases."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        p = op.params
        return {
            d: (d, Axis(taps, stride, *pads, base, dilation))
            for d, (taps, stride, pads, base, dilation) in enumerate(zip(
                p["window_dimensions"], p["window_strides"], p["padding"], p["base_dilation"],
                p["window_dilation"], strict=True,
            ))
        }  # fmt: skip

    def fill(self, op: Operation, x: Any) -> Any:
        if op.name == "reduce_window_sum":
            return jnp.zeros((), x.dtype)
        lowest = op.name == "reduce_window_max"
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(-jnp.inf if lowest else jnp.inf, x.dtype)
        limits = jnp.iinfo(x.dtype)
        return jnp.asarray(limits.min if lowest else limits.max, x.dtype)

    def rest(self, op: Operation, region: Region) -> Region:
        return region

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [self.windowed(op.ins[0].stamps, op)]

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        p = op.params
        changed: dict[str, list[Any]] = {
            name: list(p[name])
            for name in ("window_strides", "padding", "base_dilation", "window_dilation")
        }
        for d in narrow:
            changed["window_strides"][d] = p["window_dimensions"][d]
            changed["padding"][d] = (0, 0)
            changed["base_dilation"][d] = changed["window_dilation"][d] = 1
        return op.bind([x], **{name: tuple(v) for name, v in changed.items()})[0]


def bitcast_rule(op: Operation) -> Rule:
    ndim = min(len(op.ins[0].shape), len(op.avals[0].shape))  # one has an axis of parts at its end
    return Mixing(lambda op: range(ndim))


def convolution_rule(op: Operation) -> Rule:
    return WHOLE if op.ins[1].depends else Convolution()


# -- Indices ---------------------------------------------------------------------------------


class Gather(Rule):
    """``gather``: what is looked up where."""

    def _kept(self, op: Operation) -> dict[int, int]:
        """For axes of the operand that are not indexed, the axis of the result."""
        numbers, ndim = op.params["dimension_numbers"], len(op.avals[0].shape)
        sizes, shape = op.params["slice_sizes"], op.ins[0].shape
        batch = self._batch(op)
        kept = {}
        dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        offsets = iter(numbers.offset_dims)
        for d in range(len(shape)):
            if d not in dropped:
                to = next(offsets)
                if sizes[d] == shape[d]:
                    kept[d] = to
        for d, at in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            kept[d] = batch[at]
        assert all(to < ndim for to in kept.values())
        return kept

    def _batch(self, op: Operation) -> list[int]:
        """The axes of the result that are those of the indices."""
        offsets = op.params["dimension_numbers"].offset_dims
        return [d for d in range(len(op.avals[0].shape)) if d not in offsets]

    def stamps(self, op: Operation) -> list[np.ndarray]:
        x, indices = op.ins
        where = indices.concrete() if not indices.depends else None
        if where is not None:
            with jax.ensure_compile_time_eval():
                stamps = jnp.asarray(np.broadcast_to(x.stamps, x.shape))
                return [np.asarray(op.bind([stamps, where], fill_value=0)[0])]
        kept, ndim = self._kept(op), len(op.avals[0].shape)
        of_x = mixed(x.stamps, [d for d in range(x.stamps.ndim) if d not in kept])
        of_x = of_x.reshape([of_x.shape[d] for d in kept])
        of_x = placed(of_x, list(kept.values()), ndim)
        at = mixed(indices.stamps, [indices.stamps.ndim - 1])[..., 0]
        return [np.maximum(of_x, placed(at, self._batch(op), ndim))]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x, indices = op.ins
        numbers, batch = op.params["dimension_numbers"], self._batch(op)
        wanted: list[Table | None] = [None] * len(x.shape)
        for d, at in zip(
            numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
        ):
            wanted[d] = region[batch[at]]
        args = [
            run.pull(x, tuple(wanted)),
            run.pull(indices, (*(region[d] for d in batch), None)),
        ]
        out = op.bind(args, unique_indices=False, indices_are_sorted=False)[0]
        return run.clock.take(out, only(region, numbers.offset_dims))


class Scatter(Rule):
    """``scatter`` and those that add, multiply ...: the whole result is computed, or all of it
    along the axes that are indexed."""

    def _kept(self, op: Operation) -> dict[int, int]:
        """For axes of the operand that are not indexed, the axis of the updates."""
        numbers = op.params["dimension_numbers"]
        operand, indices, updates = op.ins[:3]
        windows = iter(numbers.update_window_dims)
        dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        kept = {}
        for d in range(len(operand.shape)):
            if d not in dropped:
                to = next(windows)
                if d not in numbers.scatter_dims_to_operand_dims:
                    kept[d] = to
        batch = [d for d in range(len(updates.shape)) if d not in numbers.update_window_dims]
        for d, at in zip(
            numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
        ):
            kept[d] = batch[at]
        return kept

    def stamps(self, op: Operation) -> list[np.ndarray]:
        x, indices, updates = op.ins[:3]
        numbers = op.params["dimension_numbers"]
        where = indices.concrete() if not indices.depends else None
        if where is not None:
            same = {k: op.params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
            function = jax.lax.scatter if op.name == "scatter" else jax.lax.scatter_max
            with jax.ensure_compile_time_eval():
                stamps = [jnp.asarray(np.broadcast_to(v.stamps, v.shape)) for v in (x, updates)]
                return [np.asarray(function(stamps[0], where, stamps[1], numbers, **same))]
        kept, ndim = self._kept(op), len(x.shape)
        new = mixed(
            updates.stamps, [d for d in range(len(updates.shape)) if d not in kept.values()]
        )
        new = new.transpose(
            [*kept.values(), *(d for d in range(new.ndim) if d not in kept.values())]
        ).reshape([new.shape[d] for d in kept.values()])
        new = placed(new, list(kept), ndim)
        return [latest([x.stamps, new, indices.stamps.max(initial=0)], ndim)]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x, indices, updates = op.ins[:3]
        numbers = op.params["dimension_numbers"]
        batching = {
            d: at for d, at in zip(
                numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        }  # fmt: skip
        kept = self._kept(op)
        of_updates: list[Table | None] = [None] * len(updates.shape)
        of_indices: list[Table | None] = [None] * len(indices.shape)
        for d, to in kept.items():
            of_updates[to] = region[d]
        for d, at in batching.items():
            of_indices[at] = region[d]
        args = [
            run.pull(x, only(region, list(kept))),
            run.pull(indices, tuple(of_indices)),
            run.pull(updates, tuple(of_updates)),
        ]
        out = op.bind(args)[0]
        return run.clock.take(out, without(region, list(kept)))


def scatter_rule(op: Operation) -> Rule:
    """A window that is put at a known place is a copy."""
    x, indices, updates = op.ins[:3]
    numbers = op.params["dimension_numbers"]
    where = indices.concrete() if not indices.depends else None
    if where is None or where.size != where.shape[-1] or op.name != "scatter":
        return Scatter()
    starts = [0] * len(x.shape)
    for d, start in zip(numbers.scatter_dims_to_operand_dims, np.ravel(where), strict=True):
        starts[d] = int(start)
    if numbers.operand_batching_dims or not all(
        0 <= i < n for i, n in zip(starts, x.shape, strict=True)
    ):
        return Scatter()
    windows = iter(numbers.update_window_dims)
    axes: list[Any] = [(None, np.zeros(1, int))] * len(updates.shape)
    where = []
    for d, (start, n) in enumerate(zip(starts, x.shape, strict=True)):
        at = np.arange(n) - start
        if d in numbers.inserted_window_dims:
            where.append((d, at == 0))
            continue
        to = next(windows)
        size = updates.shape[to]
        if start + size > n:
            return Scatter()
        axes[to] = d, None if size == n else np.where((at >= 0) & (at < size), at, -1)
    source = Source(updates, tuple(axes), tuple(where))
    return Copies(lambda op, place: [source, identity(x)])


# -- One element after another ---------------------------------------------------------------


class Cumulative(Rule):
    """Each element is the one before, combined with another one.

    Args:
      combine: two elements.
    """

    is_recurrence = True

    def __init__(self, combine: Callable[[Any, Any], Any]):
        self.combine = combine

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [np.maximum.accumulate(op.ins[0].stamps, op.params["axis"])]

    def advance(self, op: Operation, run: Any, boxes: Sequence[Region]) -> list[Any]:
        axis, x, region = op.params["axis"], op.ins[0], boxes[0]
        out = run.buffers[op.outs[0]]
        for column, before, is_first in turns(region[axis]):
            here = tuple(column if d == axis else t for d, t in enumerate(region))
            last = run.clock.take(
                out, tuple(before if d == axis else t for d, t in enumerate(region))
            )
            new = run.pull(x, here)
            part = jnp.where(run.clock.lookup(is_first), new, self.combine(last, new))
            out = run.put(op.outs[0], out, part, here)
        return [out]


def cumulative(combine: Callable[[Any, Any], Any]) -> Callable[[Operation], Rule]:
    def rule(op: Operation) -> Rule:
        moves = op.ins[0].stamps.shape[op.params["axis"]] > 1
        if op.params["reverse"] or not moves:
            return all_but(lambda p, ndim: [p["axis"]])
        return Cumulative(combine)

    return rule


def turns(table: Table | None) -> list[tuple[Table, Table, np.ndarray]]:
    """For each index of a table, one after the other: it, the one before, whether it is the first."""
    assert table is not None, "what moves along an axis has a table for it"
    return [
        (Table(rows), Table(np.maximum(rows - 1, 0)), (rows == 0).reshape(len(rows)))
        for rows in np.split(table.rows, table.size, axis=1)
    ]


class LoopOverTime(Rule):
    """A scan whose turns are in the order of the input. Its results are what it carries after each
    turn, and then those of the turns."""

    is_recurrence = True

    def _parts(self, op: Operation) -> tuple[list[Value], list[Value], list[Value]]:
        n, m = _jax.scan_arity(op.params)
        return list(op.ins[:n]), list(op.ins[n : n + m]), list(op.ins[n + m :])

    def stamps(self, op: Operation) -> list[np.ndarray]:
        most: Any = np.zeros(op.params["length"], np.int32)
        for x in self._parts(op)[2]:
            most = np.maximum(most, x.stamps.reshape(len(x.stamps), -1).max(1))
        most = np.maximum.accumulate(most)
        return [most.reshape(-1, *(1,) * (len(aval.shape) - 1)) for aval in op.avals]

    def advance(self, op: Operation, run: Any, boxes: Sequence[Region]) -> list[Any]:
        consts, init, xs = self._parts(op)
        body = _jax.close(op.params["jaxpr"])
        outs = [run.buffers[x] for x in op.outs]
        known = [run.pull(x, (None,) * len(x.shape)) for x in (*consts, *init)]
        for column, before, is_first in turns(boxes[0][0]):
            first = run.clock.lookup(is_first)
            carry = [
                jnp.where(first, start, run.clock.take(h, at(before, h))[0])
                for start, h in zip(known[len(consts) :], outs, strict=False)
            ]
            step = [run.pull(x, at(column, x))[0] for x in xs]
            parts = _jax.eval_closed_jaxpr(body, *known[: len(consts)], *carry, *step)
            outs = [
                run.put(x, out, part[None], at(column, out))
                for x, out, part in zip(op.outs, outs, parts, strict=True)
            ]
        return outs


def at(table: Table, x: Any) -> Region:
    """The region that is a table along the first axis."""
    return (table, *(None,) * (len(x.shape) - 1))


# -- The table -------------------------------------------------------------------------------

ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
    exp2 expm1 eq_to floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to
    lgamma log log1p logistic lt lt_to max min mul mulhi ne neg nextafter not or polygamma
    population_count pow random_fold_in random_gamma_grad random_seed real reduce_precision
    regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh threefry2x32 xor zeta
""".split()
REDUCTIONS = """
    argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
    reduce_xor
""".split()
UNCHANGED = "device_put mesh_cast optimization_barrier pcast pvary sharding_constraint".split()
SCATTERS = """
    scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add scatter_max
    scatter_min scatter_mul scatter_sub
""".split()
OF_MATRICES = (
    "cholesky cholesky_update eig eigh householder_product lu qr svd triangular_solve".split()
)

RULES: dict[str, Rule | Callable[[Operation], Rule]] = {
    **dict.fromkeys(ELEMENTWISE, Elementwise()),
    **dict.fromkeys(REDUCTIONS, Reduction()),
    **dict.fromkeys(UNCHANGED, Copies(same_place)),
    **dict.fromkeys(OF_MATRICES, MATRICES),
    **dict.fromkeys(SCATTERS, scatter_rule),
    **dict.fromkeys(["reduce_window_sum", "reduce_window_max", "reduce_window_min"], Pooling()),
    **dict.fromkeys(["random_bits", "random_split", "random_unwrap", "random_clone"], OF_KEYS),
    "bitcast_convert_type": bitcast_rule,
    "broadcast_in_dim": Copies(of_broadcast),
    "concatenate": Copies(of_concatenate),
    "conv_general_dilated": convolution_rule,
    "cumlogsumexp": cumulative(jnp.logaddexp),
    "cummax": cumulative(jax.lax.max),
    "cummin": cumulative(jax.lax.min),
    "cumprod": cumulative(jax.lax.mul),
    "cumsum": cumulative(jax.lax.add),
    "dot_general": Product(),
    "dynamic_slice": dynamic_slice_rule,
    "dynamic_update_slice": dynamic_update_slice_rule,
    "expand_dims": Copies(of_expand),
    "fft": all_but(lambda p, ndim: range(ndim - len(p["fft_lengths"]), ndim)),
    "gather": Gather(),
    "pad": Copies(of_pad),
    "reshape": Reshape(),
    "rev": Copies(of_rev),
    "select_n": Selection(),
    "slice": Copies(of_slice),
    "sort": all_but(lambda p, ndim: [p["dimension"]]),
    "split": Copies(of_split),
    "squeeze": Copies(of_squeeze),
    "stack": Copies(of_stack),
    "tile": Copies(of_tile),
    "top_k": all_but(lambda p, ndim: [p.get("axis", ndim - 1)]),
    "transpose": Copies(of_transpose),
    "unstack": Copies(of_unstack),
}


def rule_of(op: Operation) -> Rule:
    """What has no rule is taken as a whole: every result depends on every operand."""
    rule = RULES.get(op.name, WHOLE)
    return rule if isinstance(rule, Rule) else rule(op)
