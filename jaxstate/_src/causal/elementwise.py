"""Operations that work element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxstate._src.causal.knowledge import Facts, elementwise_facts, latest, selected_facts
from jaxstate._src.causal.program import Operation, Value
from jaxstate._src.causal.regions import Region
from jaxstate._src.causal.rule import Rule


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
        if op.name == "mul":
            for k, (x, part) in enumerate(zip(op.ins, args, strict=True)):
                facts = x.facts()
                if facts and facts.zero.any():
                    outs = self._times_zero(op.ins[1 - k], region, shape, run, part, outs[0])
        return outs

    def _times_zero(
        self, x: Value, region: Region, shape: Sequence[int], run: Any, zero: Any, out: Any
    ) -> list[Any]:
        """Zero times what is not known yet is zero, whatever stands there."""
        unknown = run.unknown(x, self._region(x, region, shape)) if x.depends else None
        return [
            out if unknown is None else jnp.where((zero == 0) & unknown, out.dtype.type(0), out)
        ]

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
        if facts and not facts.assumed:
            for k, case in enumerate(cases):
                stamps = np.where(facts.sure & (facts.value == k), case.stamps, stamps)
        return [stamps] * len(op.avals)

    def _facts(self, op: Operation) -> Facts | None:
        return selected_facts(op.ins[0].facts(), [x.facts() for x in op.ins[1:]])


class Collective(Rule):
    """Sums over devices and the like, of several arrays at once."""

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [x.stamps for x in op.ins]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        return op.bind([run.pull(op.ins[place], region)])[0]
