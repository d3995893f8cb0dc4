"""`causal_fixed_point`: the loop that computes what each new element makes known.

1. The function becomes a `Program`: operations on values, with the time when each element of each
   value is known.
2. `_plan` finds out which values have to be kept: those of which an element is wanted again at a
   later time. All others are computed where they are wanted.
3. The loop has the input and what is kept as its state. For each element it first brings what is
   kept up to date, in the order of the program, and then computes that element of the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.causal.mixing import WHOLE
from jaxstate._src.causal.program import Program, Value
from jaxstate._src.causal.recurrences import LoopOverTime
from jaxstate._src.causal.regions import Clock, Region, are_disjoint, at_moments, box, only, without
from jaxstate._src.causal.table import rule_of
from jaxstate.errors import NotCausalError, called_as, check_runs_when_called, message


@called_as("x = jaxstate.causal_fixed_point(f, jnp.zeros(n))")
def causal_fixed_point(
    f: Callable[[Any], Any], x: Any, *, axis: int | Sequence[int] = 0, steps: int | None = None
) -> Any:
    """The ``x`` with ``x == f(x)``, for a function whose elements depend on earlier ones.

    Args:
      f: a pure function. ``f(x)[i]`` depends on ``x[:i]`` only: on none but earlier elements.
      x: an array, or a tree of arrays that are found together; gives shapes and dtypes, its values
        do not matter.
      axis: along which the elements are in order; or several axes, the last of them the fastest.
        The axes have the same sizes in all arrays.
      steps: how many elements; all without it.

    Returns:
      The same tree as ``x``, with zeros after the first ``steps`` elements.

    Raises:
      NotCausalError: if ``f(x)[i]`` depends on ``x[i]`` or later elements, as far as can be seen.
      TypeError: if ``f`` is no function, ``x`` has what is no array, or ``f(x)`` is of another type
        than ``x``.
      ValueError: if an array has no such ``axis``, or another size there, or ``steps`` is negative.

    Each element of each intermediate value is computed once, where it takes more than that to find
    ``x`` by ``x.at[i].set(f(x)[i])``: all of ``f``, for each element.

    >>> import jax.numpy as jnp
    >>> import jaxstate
    >>> def f(x):                                      # each element is the sum of the two before
    ...     before = jnp.pad(x, (2, 0))
    ...     return jnp.maximum(before[:-2] + before[1:-1], 1)
    >>> print(jaxstate.causal_fixed_point(f, jnp.zeros(8, jnp.int32)))
    [ 1  1  2  3  5  8 13 21]
    """
    check_runs_when_called(f, "causal_fixed_point")
    leaves, tree = jax.tree.flatten(x)
    if not leaves or not all(map(_jax.is_array_like, leaves)):
        raise TypeError(
            f"causal_fixed_point wants an array or a tree of arrays, and was given {x!r}.\n"
            "To mend it:\n    jaxstate.causal_fixed_point(f, jnp.zeros(n))"
        )
    if steps is not None and (isinstance(steps, bool) or not hasattr(steps, "__index__")):
        raise TypeError(f"causal_fixed_point: steps is an integer or None, not {steps!r}.")
    if steps is not None and steps < 0:
        raise ValueError(f"causal_fixed_point: the number of steps is from 0, not {steps}.")
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    order = _Order(leaves, axis)
    jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(tree.unflatten(leaves))
    _check_types(jaxpr, leaves, tree, jax.tree.structure(shapes))
    program = Program(rule_of, LoopOverTime())
    inputs = [
        Value(_jax.typeof(leaf), stamps + 1)
        for leaf, stamps in zip(leaves, order.grids, strict=True)
    ]
    outputs = program.trace(jaxpr, inputs)
    _check_causal(inputs, outputs, order)
    count = order.length if steps is None else min(steps, order.length)
    return tree.unflatten(_Loop(inputs, outputs, order).run(count))


class _Order:
    """The order of the elements.

    Attributes:
      length: how many there are.
      grids: for each array the number of each element (lean).
    """

    def __init__(self, leaves: Sequence[Any], axis: int | Sequence[int]):
        axes = [axis] if isinstance(axis, int) else list(axis)
        self.axes = [[_axis_of(leaf, a) for a in axes] for leaf in leaves]
        if not axes or any(len(set(own)) < len(own) for own in self.axes):
            raise ValueError(f"causal_fixed_point: axis is one or several axes, not {axis}.")
        sizes = {
            tuple(leaf.shape[a] for a in own) for leaf, own in zip(leaves, self.axes, strict=True)
        }
        if len(sizes) != 1:
            raise ValueError(f"The arrays have different sizes along axis {axis}: {sorted(sizes)}.")
        [self.sizes] = sizes
        self.length = math.prod(self.sizes)
        self.grids = [self._grid(leaf, own) for leaf, own in zip(leaves, self.axes, strict=True)]

    def _grid(self, leaf: Any, axes: Sequence[int]) -> np.ndarray:
        numbers = np.arange(self.length, dtype=np.int32).reshape(self.sizes)
        numbers = numbers.transpose(np.argsort(axes))
        return numbers.reshape([n if d in axes else 1 for d, n in enumerate(leaf.shape)])


def _axis_of(x: Any, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"causal_fixed_point: axis {axis} is none of {_jax.typeof(x).str_short()}."
        )
    return axis % x.ndim


def _check_types(jaxpr: Any, leaves: Sequence[Any], tree: Any, out_tree: Any) -> None:
    wanted = [(leaf.shape, leaf.dtype) for leaf in leaves]
    found = [(aval.shape, aval.dtype) for aval in _jax.out_avals(jaxpr)]
    if tree != out_tree or found != wanted:
        shown = [f"{dtype}{list(shape)}" for shape, dtype in found]
        raise TypeError(
            f"f makes {out_tree.unflatten(shown)} of"
            f" {tree.unflatten([f'{dtype}{list(shape)}' for shape, dtype in wanted])};"
            " x == f(x) has to be of one type."
        )


def _check_causal(inputs: list[Value], outputs: list[Value], order: _Order) -> None:
    for y, grid in zip(outputs, order.grids, strict=True):
        late = np.argwhere(y.stamps > grid)
        if len(late) and order.length:
            first = min(
                late.tolist(),
                key=lambda i: np.broadcast_to(grid, np.maximum(grid.shape, y.stamps.shape))[
                    tuple(i)
                ],
            )
            full = np.maximum(grid.shape, y.stamps.shape)
            number = int(np.broadcast_to(grid, full)[tuple(first)])
            needs = int(np.broadcast_to(y.stamps, full)[tuple(first)]) - 1
            raise NotCausalError(_not_causal(number, needs, _culprit(y)))


def _culprit(y: Value) -> str | None:
    """The first operation on the way to a value that makes all elements need this much of x."""
    seen: set[Value] = set()
    stack, found, most = [y], None, y.stamps.max()
    while stack:
        value = stack.pop()
        operation = value.operation
        if value in seen or operation is None or not value.stamps.size:
            continue
        seen.add(value)
        stack += operation.ins
        mixes = value.stamps.min() == most and any(
            x.stamps.min() < most for x in operation.ins if x.depends and x.stamps.size
        )
        if mixes and (found is None or operation.number < found.number):
            found = operation
    if found is None:
        return None
    reason = ", which has no rule of its own and is taken as a whole" if found.rule is WHOLE else ""
    return f"{found!r}{reason}"


def _not_causal(number: int, needs: int, culprit: str | None) -> str:
    mixes = """
        mask = jnp.tri(n, dtype=bool)       # known while tracing: no argument of a jitted function
        logits = jnp.where(mask, logits, -jnp.inf)
        """
    shifts = """
        x = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])     # first of all: what came before
        """
    return message(
        f"f(x)[{number}] depends on x[{needs}], as far as the operations tell, and may depend on"
        f" earlier elements only: x[:{number}].",
        fix=mixes if culprit else shifts,
        all_elements_are_needed_by=culprit,
        used=_jax.user_location(),
    )


# -- The loop --------------------------------------------------------------------------------


class _Plan:
    """What is found out about which values have to be kept.

    Attributes:
      missing: those that do, in the order in which that is found.
      wanted: where elements are wanted that were known before, for each value.
    """

    def __init__(self) -> None:
        self.missing: list[Value] = []
        self.wanted: dict[Value, set[Region]] = {}


class Run:
    """One moment of the loop: the parts of values that are wanted now.

    Attributes:
      clock: which moment it is.
      buffers: the values that are kept, as far as they are known, and the input.
      plan: where values are noted that turn out to be wanted again; None if all that are kept are
        in ``buffers``.
      sound: whether all that was assumed is so; None if nothing was.
    """

    def __init__(self, clock: Clock, buffers: dict[Value, Any], plan: _Plan | None = None):
        self.clock = clock
        self.buffers = buffers
        self.plan = plan
        self.sound: Any = None
        self._parts: dict[Any, Any] = {}

    def pull(self, value: Value, region: Region) -> Any:
        """A part of a value. What is not known yet is anything.

        Along axes that have nothing to do with time all is computed at once, for whoever else wants
        another part of it.
        """
        if not value.depends:
            return self.clock.take(value.array, region)
        parts = [
            axis
            for axis, table in enumerate(region)
            if table is not None and len(table.rows) == 1 and value.stamps.shape[axis] == 1
        ]
        if parts and value.stamps.size > 1:
            return self.clock.take(self.pull(value, without(region, parts)), only(region, parts))
        if value in self.buffers:
            return self.clock.take(self.buffers[value], region)
        if self.plan is not None and self._is_wanted_again(value, region):
            self.plan.missing.append(value)
            self.buffers[value] = empty(value)
            return self.clock.take(self.buffers[value], region)
        key = value, region
        if key not in self._parts:
            operation = value.operation
            assert operation is not None
            part = operation.rule.compute(operation, self, value.place, region)
            parts = part if isinstance(part, list) else None
            for out in operation.outs if parts else [value]:
                self._parts[out, region] = parts[out.place] if parts else part
        return self._parts[key]

    def _is_wanted_again(self, value: Value, region: Region) -> bool:
        """Whether an element that was known before is wanted now, and at another time too."""
        assert value.operation is not None and self.plan is not None
        if value.operation.rule.is_recurrence:
            return True
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            return False  # keys are cheap to make again
        times = self._times(value)
        stamps = at_moments(value.stamps, region)
        if not ((stamps > 0) & (stamps < times)).any():
            return False
        others = self.plan.wanted.setdefault(value, {region})
        return others != {region} or not are_disjoint(region, len(times))

    def _times(self, value: Value) -> np.ndarray:
        return self.clock.times.reshape(-1, *(1,) * len(value.shape))

    def unknown(self, value: Value, region: Region) -> Any:
        """Which elements of a region are not known yet (lean); None if it has no such element."""
        stamps = at_moments(value.stamps, region)
        if not (stamps > self._times(value)).any():
            return None
        if len(stamps) == 1:
            return jnp.asarray(stamps[0]) > self.clock.now
        return self.clock.lookup(stamps > self._times(value))

    def known_part(self, value: Value, region: Region) -> Any:
        """A part of a value, with zero for what is not known yet: what is kept has that already."""
        part = self.pull(value, region)
        if not value.depends or value in self.buffers:
            return part
        unknown = self.unknown(value, region)
        return part if unknown is None else jnp.where(unknown, jnp.zeros((), part.dtype), part)

    def put(self, value: Value, array: Any, part: Any, region: Region) -> Any:
        """The array with the known elements of a part in it."""
        unknown = self.unknown(value, region)
        if unknown is not None:
            part = jnp.where(unknown, jnp.zeros((), part.dtype), part)
        return self.clock.put(array, part, region)

    def check(self, holds: Any) -> None:
        self.sound = holds if self.sound is None else self.sound & holds

    def update(self, value: Value) -> None:
        """Brings a value that is kept up to date, and in a recurrence all results with it."""
        operation = value.operation
        assert operation is not None
        if operation.rule.is_recurrence:
            boxes = [box(out.stamps, self.clock.times) for out in operation.outs]
            if boxes[0] is not None:
                for out in operation.outs:
                    self.buffers.setdefault(out, empty(out))
                outs = operation.rule.advance(operation, self, boxes)
                self.buffers.update(zip(operation.outs, outs, strict=True))
            return
        region = box(value.stamps, self.clock.times)
        if region is not None:
            array = self.buffers.pop(value)
            part = self._fresh(value, region)
            self.buffers[value] = self.put(value, array, part, region)

    def _fresh(self, value: Value, region: Region) -> Any:
        operation = value.operation
        assert operation is not None
        part = operation.rule.compute(operation, self, value.place, region)
        return part[value.place] if isinstance(part, list) else part


def empty(value: Value) -> Any:
    return jnp.zeros(value.shape, value.dtype)


class _Loop:
    """The loop over the elements.

    Attributes:
      kept: the values that are state of the loop, in the order of the program.
    """

    def __init__(self, inputs: list[Value], outputs: list[Value], order: _Order):
        self.inputs = inputs
        self.outputs = outputs
        self.order = order
        self.kept: list[Value] = []
        self.checks = False

    def run(self, steps: int) -> list[Any]:
        empties = [empty(x) for x in self.inputs]
        if not steps:
            return empties
        times = np.arange(steps, dtype=np.int32)
        spans = [span for span in (times[:1], times[1:]) if len(span)]
        for span in spans:
            self._plan(span)
        state = empties, [empty(x) for x in self.kept], jnp.bool_(True)
        for span in spans:
            if len(span) == 1:
                state = self._step(span, span[0], state)
            else:
                step = functools.partial(self._step, span)
                state = jax.lax.fori_loop(int(span[0]), int(span[-1]) + 1, step, state)
        found, _, sound = state
        return self._checked(found, sound) if self.checks else found

    def _step(self, times: np.ndarray, now: Any, state: Any) -> Any:
        """The state with one element more."""
        found, kept, sound = state
        buffers = dict(zip([*self.inputs, *self.kept], [*found, *kept], strict=True))
        run = Run(Clock(times, now), buffers)
        done: set[Any] = set()
        for value in self.kept:
            if not (value.operation.rule.is_recurrence and value.operation in done):  # type: ignore[union-attr]
                run.update(value)
            done.add(value.operation)
        new = []
        for x, y, array, region in zip(
            self.inputs, self.outputs, found, self._targets(times), strict=True
        ):
            new.append(run.clock.put(array, run.pull(y, region).astype(x.dtype), region))
        if run.sound is not None:
            self.checks, sound = True, sound & run.sound
        return new, [run.buffers[x] for x in self.kept], sound

    def _targets(self, times: np.ndarray) -> list[Region]:
        """Where the new elements are."""
        regions = [box(x.stamps - 1, times) for x in self.inputs]
        return [region for region in regions if region is not None]

    def _plan(self, times: np.ndarray) -> None:
        """Finds what has to be kept, without running anything."""
        todo: list[Value] = list(self.kept)
        plan = _Plan()

        def trace(job: Callable[[Run], Any]) -> None:
            def body(now: Any) -> None:
                buffers = {x: empty(x) for x in (*self.inputs, *self.kept)}
                job(Run(Clock(times, now), buffers, plan))

            jax.eval_shape(body, jax.ShapeDtypeStruct((), jnp.int32))
            while plan.missing:
                value = plan.missing.pop()
                assert value.operation is not None
                recurrence = value.operation.rule.is_recurrence
                for out in value.operation.outs if recurrence else [value]:
                    if out not in self.kept:
                        self.kept.append(out)
                        todo.append(out)

        def all_outputs(run: Run) -> None:
            for y, region in zip(self.outputs, self._targets(times), strict=True):
                run.pull(y, region)

        trace(all_outputs)
        while todo:
            value = todo.pop()
            trace(lambda run, value=value: run.update(value))
        self.kept.sort(key=lambda x: (x.operation.number, x.place))  # type: ignore[union-attr]

    def _checked(self, found: list[Any], sound: Any) -> list[Any]:
        if not _jax.is_tracer(sound):
            if not sound:
                raise NotCausalError(_not_masked())
            return found
        return [jnp.where(sound, x, _nothing(x.dtype)) for x in found]


def _nothing(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    return jnp.zeros((), dtype) if dtype.kind == "b" else jnp.asarray(jnp.iinfo(dtype).min, dtype)


def _not_masked() -> str:
    return message(
        "What a mask adds to logits was taken to make the rest of the sequence weightless, as it is"
        " large and negative. It has weight: in a row, every logit is as large and negative.",
        fix="""
        logits = jnp.where(mask, logits, -jnp.inf)     # and at least one True in each row of a mask
        """,
        used=_jax.user_location(),
    )
