"""Operations that mix elements along some of the axes: sorting, sums, products of matrices ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src.causal.knowledge import Facts, latest, mixed, placed
from jaxstate._src.causal.program import Operation, run_equation
from jaxstate._src.causal.regions import Region, only, without
from jaxstate._src.causal.rule import Rule


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
WHOLE = Mixing(lambda op: ())


class TriangularSolve(Rule):
    """Of a matrix and a right-hand side, each of whose columns (or rows) is solved for itself."""

    def _mixed(self, op: Operation) -> tuple[list[int], list[int]]:
        """The axes of the matrix and those of the right-hand side that are mixed."""
        n = len(op.ins[0].shape)
        return [n - 2, n - 1], [n - 2 if op.params["left_side"] else n - 1]

    def stamps(self, op: Operation) -> list[np.ndarray]:
        parts = [mixed(x.stamps, d) for x, d in zip(op.ins, self._mixed(op), strict=True)]
        return [latest(parts, len(op.avals[0].shape))]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        mixes = self._mixed(op)
        args = [run.pull(x, without(region, axes)) for x, axes in zip(op.ins, mixes, strict=True)]
        [out] = op.bind(args)
        return run.clock.take(out, only(region, mixes[1]))


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
        places, total, _ = self._axes(op)
        regions = [tuple(region[a] if a < total else None for a in axes) for axes in places]
        masked = any(
            x.stamps.shape[d] > 1
            for x, axes in zip(op.ins, places, strict=True)
            for d, a in enumerate(axes)
            if a >= total
        )
        if not masked:
            return op.bind([run.pull(x, r) for x, r in zip(op.ins, regions, strict=True)])
        zeros, assumed = self._zeros(op)
        args = [
            run.known_part(x, r) if zero is None else run.pull(x, r)
            for x, r, zero in zip(op.ins, regions, zeros, strict=True)
        ]
        for k in range(2):
            if assumed[k]:
                self._check(op, run, region, regions, args, k)
        return op.bind(args)

    def _check(
        self, op: Operation, run: Any, region: Region, regions: Any, args: Any, k: int
    ) -> None:
        """What is assumed to be zero is zero, where the other operand is not known yet."""
        other = op.ins[1 - k]
        unknown = run.unknown(other, regions[1 - k])
        if unknown is None:
            return
        contracted, batch = op.params["dimension_numbers"]
        shared = (*contracted[1 - k], *batch[1 - k])
        shape = [n if d in shared else m for d, (n, m) in enumerate(
            zip(args[1 - k].shape, unknown.shape, strict=True))]  # fmt: skip
        used = jnp.asarray(args[k] != 0, jnp.float32)
        late = jnp.broadcast_to(jnp.asarray(unknown, jnp.float32), shape)
        left, right = (used, late) if k == 0 else (late, used)
        bad = jax.lax.dot_general(left, right, op.params["dimension_numbers"]) != 0
        later = run.unknown(op.outs[0], region)
        run.check(~jnp.any(bad if later is None else bad & ~later))
