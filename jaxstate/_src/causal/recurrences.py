"""Operations that go through the elements one after the other: running sums, loops over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.causal.mixing import all_but
from jaxstate._src.causal.program import Operation
from jaxstate._src.causal.regions import Region, Table
from jaxstate._src.causal.rule import Rule


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
        for column, before, is_first in turns(region[axis], x.shape[axis]):
            here = tuple(column if d == axis else t for d, t in enumerate(region))
            last = run.clock.take(
                out, tuple(before if d == axis else t for d, t in enumerate(region))
            )
            new = run.pull(x, here)
            part = jnp.where(run.clock.lookup(is_first), new, self.combine(last, new))
            out = run.put(op.outs[0], out, part, here)
        return [out]


def cumulative(combine: Callable[[Any, Any], Any]) -> Callable[[Operation], Rule]:
    """The rule of a running sum from the start; one from the end is turned round before."""

    def rule(op: Operation) -> Rule:
        if op.ins[0].stamps.shape[op.params["axis"]] == 1:
            return all_but(lambda p, ndim: [p["axis"]])
        return Cumulative(combine)

    return rule


def turns(table: Table | None, size: int) -> list[tuple[Table, Table, np.ndarray]]:
    """For the indices of a table, or all of an axis of that size, one after the other: it, that
    before, whether it is the first."""
    every = np.arange(size)[None] if table is None else table.rows
    return [
        (Table(rows), Table(np.maximum(rows - 1, 0)), (rows == 0).reshape(len(rows)))
        for rows in np.split(every, every.shape[1], axis=1)
    ]


class LoopOverTime(Rule):
    """A scan whose turns are in the order of the input. Its results are what it carries after each
    turn, and then those of the turns."""

    is_recurrence = True

    def stamps(self, op: Operation) -> list[np.ndarray]:
        most: Any = np.zeros(op.params["length"], np.int32)
        for x in op.ins[op.params["carried"] :]:
            most = np.maximum(most, x.stamps.reshape(len(x.stamps), -1).max(1))
        if op.params["carried"]:
            most = np.maximum.accumulate(most)
        return [most.reshape(-1, *(1,) * (len(aval.shape) - 1)) for aval in op.avals]

    def advance(self, op: Operation, run: Any, boxes: Sequence[Region]) -> list[Any]:
        carried = op.params["carried"]
        init, xs = op.ins[:carried], op.ins[carried:]
        outs = [run.buffers[x] for x in op.outs]
        starts = [run.pull(x, (None,) * len(x.shape)) for x in init]
        for column, before, is_first in turns(boxes[0][0], op.params["length"]):
            first = run.clock.lookup(is_first)
            carry = [
                jnp.where(first, start, run.clock.take(h, at(before, h))[0])
                for start, h in zip(starts, outs, strict=False)
            ]
            step = [run.pull(x, at(column, x))[0] for x in xs]
            parts = _jax.eval_closed_jaxpr(op.params["jaxpr"], *carry, *step)
            outs = [
                run.put(x, out, part[None], at(column, out))
                for x, out, part in zip(op.outs, outs, parts, strict=True)
            ]
        return outs


def at(table: Table, x: Any) -> Region:
    """The region that is a table along the first axis."""
    return (table, *(None,) * (len(x.shape) - 1))
