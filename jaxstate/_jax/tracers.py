# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Tracers that can be written, and what a tracer is made of."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from jax._src import dispatch, dtypes, pjit, stages
from jax._src.interpreters import partial_eval as pe

from jaxstate._jax.names import (
    DIFFERENTIATED,
    BatchTracer,
    JVPTracer,
    LinearizeTracer,
    ShapedArray,
    StagingTrace,
    Tracer,
    Var,
)

__all__ = [
    "FORWARDING",
    "PERTURBED",
    "TRACER_KINDS",
    "content",
    "donates",
    "getitem",
    "has_numpy_copy",
    "is_constant_of_jaxpr",
    "is_linear_part",
    "is_only_reference",
    "is_same",
    "plain_copy",
    "primal_of",
]


# The tracers that a Python function can meet as arguments or results inside a transformation.
TRACER_KINDS = (pe.DynamicJaxprTracer, BatchTracer, JVPTracer, LinearizeTracer)


def plain_copy(tracer: Any, kind: type) -> Any:
    """A tracer of JAX's own type ``kind`` with the contents of ``tracer``."""
    copy = object.__new__(kind)
    for cls in kind.__mro__:
        for name in cls.__dict__.get("__slots__", ()):
            if name != "__weakref__":
                with contextlib.suppress(AttributeError):  # not every kind fills all its slots
                    setattr(copy, name, object.__getattribute__(tracer, name))
    return copy


def is_constant_of_jaxpr(tracer: Any) -> bool:
    """Whether a tracer stands for a constant, which the jaxpr forgets when the tracer is gone."""
    return (
        isinstance(tracer, pe.DynamicJaxprTracer)
        and isinstance(tracer.val, Var)
        and tracer.val in tracer._trace.frame.constvar_to_val
    )


# Operations that may hand back what they were given, while a jaxpr is built.
FORWARDING = {*pe.forwarding_rules, *pe.const_fold_rules} - {pjit.jit_p, dispatch.device_put_p}


def donates(x: Any) -> bool:
    """Whether ``x`` is a compiled function that takes the memory of an argument."""
    return isinstance(x, stages.Compiled) and any(x.donate_argnums)


def is_linear_part(trace: Any) -> bool:
    """Whether ``trace`` builds what a derivative computes later; no code of a user runs there."""
    return isinstance(trace, StagingTrace) and trace.parent_trace is None and trace.frame.auto_dce


def getitem(x: Any, index: Any) -> Any:
    """``x[index]`` as JAX defines it."""
    return Tracer.__getitem__(x, index) if isinstance(x, Tracer) else x[index]


def has_numpy_copy(x: Any) -> bool:
    """Whether NumPy code may hold the memory of the array."""
    return getattr(x, "_npy_value", None) is not None


def is_only_reference(held: list[Any]) -> bool:
    """Whether the list has the only reference to its one element.

    How many references the interpreter itself holds is measured, on an element that is alone.
    """
    alone = [object()]
    return sys.getrefcount(held[0]) == sys.getrefcount(alone[0])


def primal_of(x: Any) -> Any:
    """A value without any of its tangents."""
    while isinstance(x, DIFFERENTIATED):
        x = x.primal
    return x


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are one, also where they are two tracers of one variable of a jaxpr."""
    if isinstance(a, pe.DynamicJaxprTracer) and isinstance(b, pe.DynamicJaxprTracer):
        return a is b or (isinstance(a.val, Var) and a.val is b.val)
    return a is b


# `jax.closure_convert` asks whether a constant may carry a tangent by looking at what its tracer
# contains; a JVP tracer says yes.
PERTURBED = object.__new__(JVPTracer)
PERTURBED.primal = PERTURBED.tangent = PERTURBED._trace = None
PERTURBED.aval = ShapedArray((), dtypes.float0)


def content(x: Any) -> Any:
    """What the tracer of a derivative or a vmap was made of."""
    if isinstance(x, BatchTracer):
        return x.val
    return x.primal if isinstance(x, (JVPTracer, LinearizeTracer)) else x
