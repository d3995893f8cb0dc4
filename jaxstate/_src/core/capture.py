"""Capture: how a jaxpr says that it reads a slot.

While a jaxpr is built, a slot that nobody writes is a *constant* of that jaxpr whose value is a
`StateTracer`. It stands for the slot, not for a value. JAX itself hoists the constants of an inner
function into explicit operands: of jit, scan, while, cond, checkpoint, custom rules, linear
solves, closure conversion. When such an operand is bound, JAX canonicalizes it, and for a
`StateTracer` that means: the value that the slot has where the bind happens (`resolve.resolve`).

So state that is only read goes through every transformation by JAX's own handling of closures, a
cached jaxpr is right for other values, and gradients through implicit functions come out right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.slots import Address

__all__ = ["StateTracer"]


class _Nowhere(_jax.Trace):
    """The trace of tracers that are no values: always valid, never current."""

    parent_trace = None

    def process_primitive(self, primitive: Any, args: Any, params: Any, /) -> Any:
        raise AssertionError("a StateTracer is resolved before it reaches a trace")


nowhere = _Nowhere()


class StateTracer(_jax.Tracer):
    """A constant of a jaxpr that stands for a slot."""

    __slots__ = ("address",)

    def __init__(self, address: Address, aval: Any) -> None:
        super().__init__(nowhere, aval)
        self.address = address

    def __repr__(self) -> str:
        return f"StateTracer({self.address}, {self.aval.str_short()})"

    def dimension_as_value(self) -> Any:
        """The current value. A jaxpr builder asks for it before it makes a constant."""
        return _jax.canonicalize(self)

    def to_concrete_value(self) -> Any:
        return _jax.concrete(_jax.canonicalize(self))

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(_jax.canonicalize(self), *args, **kwargs)

    def _contents(self) -> list[tuple[str, Any]]:
        """What it contains may carry a tangent, says the JVP tracer: `jax.closure_convert` makes an
        operand of it then, and keeps no capture."""
        return [("value", _jax.PERTURBED)]
