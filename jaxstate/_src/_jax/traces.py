# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Traces and the chain of them, and the tracers of derivatives and vmaps."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import core
from jax._src.interpreters import batching

from jaxstate._src._jax.names import (
    BatchTracer,
    JVPTrace,
    JVPTracer,
    LinearizeTracer,
    PartialTracer,
    StagingTrace,
    Tracer,
    Zero,
    eval_trace,
    set_current_trace,
    typeof,
)
from jaxstate._src._jax.types import has_tangent

__all__ = [
    "TransparentTrace",
    "all_lanes",
    "at_top_level",
    "calls_functions",
    "chain",
    "current_trace",
    "has_ended",
    "holding_trace",
    "is_of_finished_jaxpr",
    "jit_is_disabled",
    "known_part",
    "lane_count",
    "lane_tracer",
    "lane_value",
    "lanes_are_directions",
    "note_directions",
    "owns",
    "parent_of",
    "plain_value",
    "tag_of",
    "tangent_tracer",
    "without_tangents",
]


# The trace that is current on this thread, or None inside a rule (jax >= 0.11). (It is asked for
# all the time, so that a function of Python around it would count.)
current_trace: Callable[[], Any] = functools.partial(
    operator.attrgetter("value"), core.trace_state_strong_ref
)


def at_top_level() -> bool:
    """Whether no transformation is in progress on this thread."""
    return core.trace_ctx.is_top_level()


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is active: branches and loops run as Python then."""
    return bool(jax.config.jax_disable_jit)


def parent_of(trace: Any) -> Any:
    """The next trace of the chain, or None at its end."""
    return getattr(trace, "parent_trace", None)


def chain(trace: Any) -> Iterator[Any]:
    """The traces from ``trace`` outwards."""
    while trace is not None:
        yield trace
        trace = getattr(trace, "parent_trace", None)


class TransparentTrace(core.Trace):
    """A trace that sees every operation and holds no values: they are those of its parent."""

    parent_trace: Any = None

    # What the trace has in common with its copies further in.
    family: Any = None

    def stage_value(self, val: Any) -> Any:
        return self.parent_trace.stage_value(val)


def holding_trace(trace: Any) -> Any:
    """The trace that holds the values of a program that runs under ``trace``."""
    while isinstance(trace, TransparentTrace):
        trace = trace.parent_trace
    return trace


def calls_functions(trace: Any) -> bool:
    """Whether a function with a custom rule is simply called under ``trace``: nothing is
    differentiated there, and no jaxpr built."""
    return trace is None or trace is eval_trace or getattr(trace, "calls_functions", False)


def tag_of(trace: Any) -> Any:
    """The object that a JVP, linearize or batch trace shares with its re-entered copies.

    JAX makes a new trace with the same tag when it re-enters a transformation for a subfunction.
    All tags compare equal, so look at identity.
    """
    return trace.tag


def owns(trace: Any, value: Any) -> bool:
    """Whether ``value`` is a tracer of ``trace`` (or of a re-entered copy of it)."""
    return isinstance(value, Tracer) and getattr(value._trace, "tag", None) is trace.tag


def tangent_tracer(trace: Any, primal: Any, tangent: Any) -> Any:
    """The tracer of a differentiating trace for a primal value and its tangent."""
    kind = JVPTracer if isinstance(trace, JVPTrace) else LinearizeTracer
    return kind(trace, primal, tangent)


def has_ended(value: Any) -> bool:
    """Whether ``value`` is a tracer of a derivative or a vmap that the program is not in."""
    if not isinstance(value, (JVPTracer, LinearizeTracer, BatchTracer)):
        return False
    return not any(getattr(t, "tag", None) is value._trace.tag for t in chain(current_trace()))


def is_of_finished_jaxpr(value: Any) -> bool:
    """Whether ``value`` is a tracer of a jaxpr that is not under construction any more."""
    trace = getattr(value, "_trace", None)
    if not isinstance(trace, StagingTrace) or any(t is trace for t in chain(current_trace())):
        return False
    frame = trace.frame
    return not (frame.tracing_eqns or frame.constid_to_tracer or frame.constvar_to_val)


def without_tangents(
    value: Any,
    keep: Callable[[Any], bool] = lambda trace: False,
    refuse: Callable[[], None] = lambda: None,
) -> Any:
    """The primal value of a tracer in the middle of derivatives.

    Tangents of a trace that ``keep(trace)`` says stay; for others that are not zero ``refuse()`` is
    called.
    """
    if isinstance(value, (JVPTracer, LinearizeTracer)):
        if keep(value._trace):
            return value
        if type(value.tangent) is not Zero and has_tangent(typeof(value)):
            refuse()
        return without_tangents(value.primal, keep, refuse)
    if isinstance(value, BatchTracer):
        inner = without_tangents(value.val, keep, refuse)
        return lane_tracer(value._trace, inner, value.batch_dim)
    return value


def known_part(value: Any) -> Any:
    """The value, without the trace that linearizes the rule of a custom_jvp function; None if it
    depends on the tangents."""
    if isinstance(value, PartialTracer):
        return value.pval.get_known()
    if isinstance(value, BatchTracer):
        inner = known_part(value.val)
        return None if inner is None else lane_tracer(value._trace, inner, value.batch_dim)
    return value


def plain_value(tracer: Any) -> Any:
    """The value that a tracer boxes, if its trace says that it is only that; else the tracer."""
    return core.full_lower(tracer)


def lane_tracer(trace: Any, value: Any, batch_dim: int | None) -> Any:
    """What one lane of the vmap of ``trace`` sees of an array over all lanes."""
    return value if batch_dim is None else BatchTracer(trace, value, batch_dim)


def lane_value(trace: Any, value: Any) -> tuple[Any, int | None]:
    """The array over all lanes that ``value`` stands for, and its batch dimension."""
    return trace.to_batch_info(value)


def all_lanes(trace: Any, value: Any) -> Any:
    """The array over all lanes that ``value`` stands for, with the lanes on its leading axis."""
    value, batch_dim = trace.to_batch_info(value)
    with set_current_trace(trace.parent_trace):
        return batching.bdim_at_front(value, batch_dim, trace.axis_data.size)


def note_directions(trace: Any) -> None:
    """Notes that the vmap of ``trace`` is the one in `jax.jacfwd`."""
    trace.tag.__dict__["_jaxstate_directions"] = True


def lanes_are_directions(trace: Any) -> bool:
    """Whether the vmap of ``trace`` is the one in `jax.jacfwd`, which runs over directions.

    Nothing of JAX's in the trace tells this vmap from one around `jax.jvp`.
    """
    return "_jaxstate_directions" in trace.tag.__dict__


def lane_count(trace: Any) -> int:
    """The number of lanes of the vmap of ``trace``."""
    return trace.axis_data.size
