"""The trace of an in-place function."""

from __future__ import annotations

from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import Activation, is_array, thread
from jaxstate._src.arrays.array import WritableArray, snapshot
from jaxstate._src.arrays.buffers import Buffer
from jaxstate._src.core import slots

__all__ = ["InplaceTrace"]


class InplaceTrace(_jax.Trace):
    """Makes every result a writable array, and hands the operation on to its parent.

    It is needed where JAX would compute at once: an array that is computed cannot be written.
    """

    makes_writable = True

    def __init__(self, parent: Any, within: Activation) -> None:
        super().__init__()
        self.parent_trace = parent
        self.activation = within
        self.requires_low = parent.requires_low

    def process_primitive(self, primitive: Any, operands: Any, params: Any, /) -> Any:
        operands = self._values(operands)
        avals = [_jax.typeof(x) for x in operands]
        out = primitive.bind_with_trace(self.parent_trace, operands, avals, params)
        return [self._box(x) for x in out] if primitive.multiple_results else self._box(out)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, operands: Any, /, **params: Any
    ) -> Any:
        return self._custom(primitive, (fun, jvp), operands, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, operands: Any, /, **params: Any
    ) -> Any:
        return self._custom(primitive, (fun, fwd, bwd), operands, params)

    @property
    def calls_functions(self) -> bool:
        """See `_jax.calls_functions`. The function writes its own arrays then."""
        return self.parent_trace is _jax.eval_trace

    def _custom(self, primitive: Any, functions: Any, operands: Any, params: Any) -> Any:
        operands = self._values(operands)
        if self.calls_functions:
            operands = [self._box(x) for x in operands]
            with _jax.set_current_trace(self):
                return [self._box(x) for x in functions[0].call_wrapped(*operands)]
        avals = [_jax.typeof(x) for x in operands]
        params = dict(params, subfuns=functions)
        out = primitive.bind_with_trace(self.parent_trace, operands, avals, params)
        return [self._box(x) for x in out]

    def process_shard_map(
        self, primitive: Any, fun: Any, operands: Any, /, *args: Any, **params: Any
    ) -> Any:
        """As in a jitted function: what JAX gives the devices eagerly cannot be written."""
        results: list[Any] = []

        def staged(*operands: Any) -> list[Any]:
            trace_ = _jax.current_trace()
            out = trace_.process_shard_map(primitive, fun, operands, *args, **params)
            results.append(out.map(lambda _: None))
            return list(out)

        try:
            with _jax.set_current_trace(self):
                values = _jax.jit(staged)(*operands)
        except _LOOKS_AT_VALUES:  # possible only where JAX runs the function at once
            if self.parent_trace is not _jax.eval_trace:
                raise
            results.clear()
            operands = self._values(operands)
            with _jax.set_current_trace(self.parent_trace):
                out = self.parent_trace.process_shard_map(primitive, fun, operands, *args, **params)
            return out.map(self._box)
        return results[0].update([self._box(x) for x in values])

    def stage_value(self, value: Any) -> Any:
        (value,) = self._values([value])
        return self._box(self.parent_trace.stage_value(value))

    def process_call(self, primitive: Any, fun: Any, operands: Any, params: Any, /) -> Any:
        operands = self._values(operands)
        out = self.parent_trace.process_call(primitive, fun, operands, params)
        return [self._box(x) for x in out]

    def cur_qdd(self, x: Any) -> Any:
        return self.parent_trace.cur_qdd(x)

    def _values(self, operands: Any) -> list[Any]:
        with _jax.set_current_trace(self):
            return [_jax.canonicalize(x) for x in operands]

    def _box(self, value: Any) -> Any:
        value = snapshot(value)
        if thread.quiet or not is_array(value):
            return value
        return WritableArray(Buffer(value, self, slots.next_age(), self.activation))


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip
