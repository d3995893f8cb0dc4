# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Jaxprs: their parts, and others made of them. (From jax 0.11 on a jaxpr carries its own
constants; before, only a ``ClosedJaxpr`` did.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax._src import core
from jax._src.interpreters import partial_eval as pe

from jaxstate._src._jax.names import flattree, make_jaxpr

__all__ = [
    "close",
    "closed",
    "consts_of",
    "constvars",
    "equations",
    "eval_closed_jaxpr",
    "hoist_constants",
    "in_avals",
    "invars",
    "is_closed",
    "jaxprs_in",
    "opened",
    "out_avals",
    "outvars",
    "remade",
    "separated",
    "trace_flat",
    "with_computed_constants",
    "with_jaxprs",
    "without_dead_code",
]


def is_closed(jaxpr: Any) -> bool:
    """Whether ``jaxpr`` is of the kind that carries its constants."""
    return flattree is not None or isinstance(jaxpr, core.ClosedJaxpr)


def close(jaxpr: Any) -> Any:
    """A closed jaxpr of an open one without constants."""
    return jaxpr if is_closed(jaxpr) else core.ClosedJaxpr(jaxpr, ())


def closed(jaxpr: Any, consts: Sequence[Any]) -> Any:
    """The closed jaxpr of an open one and its constants."""
    return jaxpr.with_consts(consts) if flattree is not None else core.ClosedJaxpr(jaxpr, consts)


def separated(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A closed jaxpr as JAX's functions return an open one and its constants."""
    return _open(jaxpr), jaxpr.consts


def opened(jaxpr: Any) -> Any:
    """The open jaxpr of a closed one without constants."""
    return _open(jaxpr)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if is_closed(jaxpr) else jaxpr


def equations(jaxpr: Any) -> Sequence[Any]:
    return jaxpr.eqns


def invars(jaxpr: Any) -> Sequence[Any]:
    """The inputs, without the variables that have a constant attached."""
    return _open(jaxpr).invars


def constvars(jaxpr: Any) -> Sequence[Any]:
    """The variables that have a constant attached."""
    return _open(jaxpr).constvars


def outvars(jaxpr: Any) -> Sequence[Any]:
    return _open(jaxpr).outvars


def in_avals(jaxpr: Any) -> list[Any]:
    return [v.aval for v in invars(jaxpr)]


def out_avals(jaxpr: Any) -> list[Any]:
    return [v.aval for v in outvars(jaxpr)]


def jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    return core.jaxprs_in_params(params)


_JAXPR = (core.Jaxpr,) if flattree is not None else (core.Jaxpr, core.ClosedJaxpr)


def with_jaxprs(params: dict[str, Any], replace: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters of an equation with every jaxpr among them replaced."""

    def replaced(value: Any) -> Any:
        if isinstance(value, _JAXPR):
            return replace(value)
        if not isinstance(value, tuple):
            return value
        items = [replaced(v) for v in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

    return {name: replaced(value) for name, value in params.items()}


def remade(
    jaxpr: Any, *, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any], effs: Any
) -> Any:
    """A jaxpr of the same kind and with the same constants, and other contents."""
    inner = _open(jaxpr)
    consts = jaxpr.consts if is_closed(jaxpr) else None
    return _new_jaxpr(inner, inner.constvars, consts, invars, outvars, eqns, effs)


def consts_of(jaxpr: Any) -> Sequence[Any]:
    """The constants that a closed jaxpr carries."""
    return jaxpr.consts


def without_dead_code(jaxpr: Any) -> Any:
    """The closed jaxpr without the equations and constants that its outputs do not need."""
    inner = _open(jaxpr)
    keep = [False] * len(inner.constvars) + [True] * len(invars(jaxpr))
    pruned, used, _ = pe.dce_jaxpr_consts(inner, [True] * len(outvars(jaxpr)), keep)
    if flattree is not None:
        return pruned
    return core.ClosedJaxpr(pruned, [c for c, u in zip(jaxpr.consts, used, strict=True) if u])


def hoist_constants(jaxpr: Any, which: Callable[[Any], bool]) -> Any:
    """The closed jaxpr with the constants of a kind as leading inputs, in their order."""
    inner = _open(jaxpr)
    pairs = list(zip(inner.constvars, jaxpr.consts, strict=True))
    hoisted = [v for v, c in pairs if which(c)]
    kept = [(v, c) for v, c in pairs if not which(c)]
    return _new_jaxpr(
        inner, [v for v, _ in kept], [c for _, c in kept], [*hoisted, *inner.invars],
        inner.outvars, inner.eqns, inner.effects,
    )  # fmt: skip


def with_computed_constants(
    jaxpr: Any, compute: Callable[[Any], tuple[Any, dict[str, Any], Any] | None]
) -> Any:
    """The closed jaxpr with equations in the place of some of its constants.

    ``compute(constant)`` is primitive, parameters and effects of an equation without operands;
    None for a constant that stays.
    """
    inner = _open(jaxpr)
    made = [(v, c, compute(c)) for v, c in zip(inner.constvars, jaxpr.consts, strict=True)]
    kept = [(v, c) for v, c, eqn in made if eqn is None]
    eqns = [core.new_jaxpr_eqn([], [v], *eqn) for v, _, eqn in made if eqn is not None]
    effs = frozenset(inner.effects).union(*(eqn.effects for eqn in eqns))
    return _new_jaxpr(
        inner, [v for v, _ in kept], [c for _, c in kept], invars(jaxpr), inner.outvars,
        [*eqns, *inner.eqns], effs,
    )  # fmt: skip


def _new_jaxpr(
    like: Any, constvars: Any, consts: Any, invars: Any, outvars: Any, eqns: Any, effs: Any
) -> Any:
    debug_info = like.debug_info.with_unknown_names()._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
    )
    contents = constvars, list(invars), list(outvars), list(eqns), effs, debug_info, like.is_high
    if flattree is not None:
        return core.Jaxpr(*contents, list(consts))
    jaxpr = core.Jaxpr(*contents)
    return jaxpr if consts is None else core.ClosedJaxpr(jaxpr, consts)


def eval_closed_jaxpr(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr under the current trace."""
    return core.eval_jaxpr(_open(jaxpr), jaxpr.consts, *args)


def trace_flat(fun: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """The closed jaxpr of a function of flat arguments; it must not close over tracers."""
    return make_jaxpr(fun)(*avals)
