# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Tracers that can be written, and what a tracer is made of."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch, dtypes, pjit, stages
from jax._src.interpreters import partial_eval as pe

from jaxstate._src._jax.names import (
    DIFFERENTIATED,
    BatchTracer,
    JVPTracer,
    LinearizeTracer,
    ShapedArray,
    StagingTrace,
    Tracer,
    Var,
)
from jaxstate._src._jax.types import is_concrete_array

__all__ = [
    "FORWARDING",
    "PERTURBED",
    "TRACER_KINDS",
    "can_be_donated",
    "content",
    "donates",
    "getitem",
    "is_constant_of_jaxpr",
    "is_linear_part",
    "is_only_reference",
    "is_same",
    "like_copy",
    "may_share_memory",
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


def is_only_reference(held: list[Any], i: int = 0) -> bool:
    """Whether the list has the only reference to its element ``i``.

    How many references the interpreter itself holds is measured, on an element that is alone.
    """
    alone = [object()]
    return sys.getrefcount(held[i]) == sys.getrefcount(alone[0])


def can_be_donated(x: Any) -> bool:
    """Whether JAX can use the memory of a computed array for a result."""
    return is_concrete_array(x) and all(d.platform in _DONATING for d in x.sharding.device_set)


_DONATING = ("cpu", "gpu", "tpu")


def may_share_memory(x: Any) -> bool:
    """Whether another array may have the memory of ``x``, or somebody outside of JAX.

    `device_put`, `addressable_data` and others give arrays that have, of which ``x`` knows nothing.
    So all arrays that there are are looked at. On a CPU, JAX itself copies what somebody outside
    has (a NumPy view, DLPack) when memory is to be used again. Elsewhere that is not known, and
    between several devices the parts would be to be compared: there the answer is yes. And so it is
    if there are so many arrays that to copy takes no longer.
    """
    devices = x.sharding.device_set
    if len(devices) > 1:
        return True
    (device,) = devices
    if device.platform != "cpu":
        return True
    shape, is_alone = x.shape, device.client.device_count() == 1
    arrays = device.client.live_arrays()
    if len(arrays) > max(256, x.nbytes >> 10):
        return True
    for other in arrays:
        if is_alone or len(other.sharding.device_set) == 1:
            is_like = other.shape == shape and other is not x and not other.is_deleted()
            if is_like and other.unsafe_buffer_pointer() == x.unsafe_buffer_pointer():
                return True
        elif other.sharding.shard_shape(other.shape) == shape:  # that part may be ``x``
            return True
    return False


def like_copy(x: Any) -> Any:
    """A computed array that differs from ``x`` in nothing but its memory; None if there is none."""
    copy = jnp.copy(x)
    if x.committed and not _is_like(copy, x):  # an operation gives its sharding in another spelling
        copy = jax.device_put(x, x.sharding, may_alias=False)
    return copy if _is_like(copy, x) else None


def _is_like(a: Any, b: Any) -> bool:
    return a.aval == b.aval and a.committed == b.committed and a.format == b.format


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
