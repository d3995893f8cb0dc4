"""Operations with indices: gather, scatter and dynamic slices.

Where the indices are known while tracing it is known too which elements go where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src.causal.copies import Copies, Source, identity
from jaxstate._src.causal.knowledge import latest, mixed, placed
from jaxstate._src.causal.program import Operation, Value
from jaxstate._src.causal.regions import Region, Table, only, without
from jaxstate._src.causal.rule import Rule


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
        part, update = (run.pull(x, without(region, cut)) for x in op.ins[:2])
        starts = [run.pull(s, ()) if d in cut else np.int32(0) for d, s in enumerate(op.ins[2:])]
        out = jax.lax.dynamic_update_slice(part, update, starts)
        return run.clock.take(out, only(region, cut))


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
        operand, _, updates = op.ins[:3]
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
        batching = dict(
            zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        )
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
