# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Jaxprs under construction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from jax._src import core, source_info_util
from jax._src.lax import lax

from jaxstate._src._jax.names import StagingTrace, Var, flattree
from jaxstate._src._jax.traces import chain, current_trace, parent_of

__all__ = [
    "GrowingEquation",
    "abandon_traces_inside",
    "builds_jaxpr",
    "constant_of",
    "constants_of",
    "copied",
    "current_place",
    "emit",
    "is_finished",
    "jaxpr_around",
    "may_run_again",
    "new_const",
    "notes_of",
    "stage",
    "traced_for",
    "with_constvars",
]


def stage(trace: Any, primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Adds one equation to the jaxpr that ``trace`` is building."""
    source_info = source_info_util.current()
    operands = [trace.to_jaxpr_tracer(x, source_info) for x in operands]
    return trace.default_process_primitive(primitive, operands, params, source_info)


def current_place() -> tuple[Any, Any]:
    """Where the program is, as equations note it."""
    return source_info_util.current(), core.current_jaxpr_eqn_context()


def emit(
    trace: Any, primitive: Any, operands: Sequence[Any], avals: Sequence[Any], params: Any,
    effs: Any, place: tuple[Any, Any],
) -> list[Any]:  # fmt: skip
    """`stage`, of an equation of which everything is known."""
    operands = [trace.to_jaxpr_tracer(x, place[0]) for x in operands]
    return trace.emit_eqn(operands, avals, primitive, params, effs, *place)


class GrowingEquation:
    """An equation without operands, in the jaxpr that ``trace`` is building, that gets its results
    one by one. It has an effect, or JAX would drop it."""

    __slots__ = ("_eqn", "_trace", "place")

    def __init__(
        self, trace: Any, primitive: Any, params: Any, effs: Any, place: tuple[Any, Any]
    ) -> None:
        trace.emit_eqn([], [], primitive, params, effs, *place)
        self._trace, self._eqn, self.place = trace, trace.frame.tracing_eqns[-1], place

    def result(self, aval: Any) -> Any:
        """One more result."""
        var = self._trace.frame.newvar(aval)
        self._eqn.outvars.append(var)
        return self._trace.var_to_tracer(var, self.place[0], self._eqn)

    @property
    def params(self) -> dict[str, Any]:
        return self._eqn.params

    def divide(self, own: dict[int, tuple[Any, Any]]) -> None:
        """Makes some of the results those of equations of their own.

        Args:
          own: for their numbers, the operand and the parameters of such an equation.
        """
        eqn, eqns, made = self._eqn, self._trace.frame.tracing_eqns, []
        for i, (operand, params) in own.items():
            self._trace.emit_eqn([operand], [], eqn.primitive, params, eqn.effects, *self.place)
            made.append(eqns.pop())
            made[-1].outvars.append(eqn.outvars[i])
        eqn.outvars[:] = [v for i, v in enumerate(eqn.outvars) if i not in own]
        at = next(i for i, other in enumerate(eqns) if other is eqn)
        eqns[at : at + 1] = [*made, eqn] if eqn.outvars else made


def traced_for(trace: Any) -> str:
    """What the jaxpr is for that ``trace`` is building: "jit", "scan" ..."""
    return trace.frame.debug_info.traced_for


def is_finished(trace: Any) -> bool:
    """Whether a trace has built its jaxpr. (JAX does not mark it as invalid.)"""
    return type(trace.frame.constid_to_tracer) is dict


def jaxpr_around(trace: Any) -> Any:
    """What builds the jaxpr around the one that ``trace`` builds; None if there is none."""
    trace = trace.parent_trace
    while trace is not None and not isinstance(trace, StagingTrace):
        trace = parent_of(trace)
    return None if trace is None or is_finished(trace) else trace


def new_const(trace: Any, value: Any, aval: Any, place: tuple[Any, Any]) -> Any:
    """The tracer of ``value`` as a constant of the jaxpr that ``trace`` is building."""
    return trace.new_const(value, place[0], aval)


class _Constants(dict):
    """``constvar_to_val`` of a jaxpr under construction, with room for jaxstate's own notes."""

    __slots__ = ("notes",)


def notes_of(trace: Any, make: Callable[[], Any]) -> Any:
    """The notes that jaxstate keeps for a jaxpr under construction; made on first use.

    They have to die with the construction: a note holds tracers, tracers hold their trace, and
    the leak checker counts every tracer that is alive after its trace. ``invalidate`` of the
    staging trace replaces ``constvar_to_val``, so that dict is where the notes live.
    """
    constants = trace.frame.constvar_to_val
    if type(constants) is not _Constants:
        constants = trace.frame.constvar_to_val = _Constants(constants)
        constants.notes = make()
    return constants.notes


def builds_jaxpr(outside: Any, inside: Any) -> bool:
    """Whether what runs under the trace ``inside`` builds a jaxpr, which ``outside`` does not."""
    known = list(chain(outside))
    for trace in chain(inside):
        if trace in known:
            return False
        if isinstance(trace, StagingTrace):
            return True
    return False


_RUN_ONCE = frozenset({
    "jit", "make_jaxpr", "remat", "checkpoint", "cond", "switch", "compute_on", "closure_convert",
    "linearize", "custom_jvp fun", "custom_jvp jvp", "custom_vjp fun", "custom_vjp fwd",
})  # fmt: skip


def may_run_again(trace: Any) -> bool:
    """Whether a jaxpr that is under construction at ``trace`` may be that of a loop."""
    infos = [t.frame.debug_info for t in chain(trace) if isinstance(t, StagingTrace)]
    return any(info is None or info.traced_for not in _RUN_ONCE for info in infos)


def abandon_traces_inside(outside: Any) -> None:
    """Ends the jaxprs under construction that ``outside`` does not know: nobody will finish them.

    JAX keeps every constant of such a jaxpr alive until its construction is finished.
    """
    known = list(chain(outside))
    for trace in chain(current_trace()):
        if any(trace is t for t in known):
            return
        if isinstance(trace, StagingTrace):
            trace.invalidate()


def with_constvars(jaxpr: Any, kept: Sequence[bool], eqns: Sequence[Any]) -> Any:
    """The open jaxpr that was just finished with some of its constants, and other equations."""
    n = len(kept)
    of_jaxpr = jaxpr.constvars if flattree is None else jaxpr.all_invars[:n]
    inputs = jaxpr.invars if flattree is None else jaxpr.all_invars[n:]
    constvars = [v for v, k in zip(of_jaxpr, kept, strict=True) if k]
    debug_info = jaxpr.debug_info
    names = debug_info.arg_names
    if names is not None and len(names) == n + len(inputs):  # jax >= 0.11 has names for constants
        debug_info = debug_info._replace(arg_names=names[n:])
    return core.Jaxpr(
        constvars, list(inputs), jaxpr.outvars, list(eqns), jaxpr.effects, debug_info,
        jaxpr.is_high,
    )  # fmt: skip


def constants_of(trace: Any) -> Collection[Any]:
    """The constants, so far, of the jaxpr that ``trace`` is building."""
    return trace.frame.constvar_to_val.values()


def constant_of(tracer: Any) -> Any:
    """The constant that a tracer of a jaxpr under construction stands for; None if it is none."""
    var = tracer.val
    return tracer._trace.frame.constvar_to_val.get(var) if isinstance(var, Var) else None


def copied(trace: Any, tracer: Any) -> Any:
    """A tracer of the jaxpr that ``trace`` is building, as the result of an equation."""
    return stage(trace, lax.copy_p, [tracer], {})
