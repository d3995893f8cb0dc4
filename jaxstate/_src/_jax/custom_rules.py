# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Functions with custom derivative rules."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import api_util, core, custom_derivatives, hijax, linear_util
from jax._src.interpreters import ad
from jax._src.nn import functions

from jaxstate._src._jax.names import SymbolicZero, Zero, flattree, jit, typeof
from jaxstate._src._jax.registries import resolved
from jaxstate._src._jax.types import is_tracer

__all__ = [
    "CustomJVP3",
    "CustomVJP3",
    "Traced",
    "instantiate_symbolic_zero",
    "is_of_jax",
    "is_rule_of_activation",
    "like_traced_rules",
    "map_results",
    "prepend_cotangents",
    "reset_stores",
    "symbolic_zero_like",
    "wrap_backward_rule",
    "wrap_rule_function",
    "zero_cotangent",
]


class Traced(NamedTuple):
    """A function that JAX has traced for some arguments.

    Attributes:
      jaxpr: takes ``consts`` in front of ``operands``.
      consts: what the function closes over and traces.
      operands: the flat arguments.
      statics: the numbers of the arguments that are no operands.
      out_tree: how its results are returned.
    """

    jaxpr: Any
    consts: Sequence[Any]
    operands: Sequence[Any]
    statics: Sequence[int]
    out_tree: Any


# custom_jvp and custom_vjp as JAX has them behind flags, and for ``generic_batching``: they trace
# the function at once, and make one operation of it and its rules.
CustomJVP3: Any = getattr(hijax, "custom_jvp3", None)
CustomVJP3: Any = hijax.custom_vjp3


def _trace_with_rules(
    function: Any, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], Traced] | None:
    """The arguments by position, and what JAX is about to trace; None if it traces nothing."""
    try:
        args = api_util.resolve_kwargs(function.f, args, kwargs)
    except TypeError:
        return None  # JAX says what is wrong
    leaves = [jax.tree.leaves(x) for x in args]
    traced = [any(map(is_tracer, xs)) for xs in leaves]
    at_once = flattree is not None and type(function) is CustomVJP3
    if at_once and core.trace_state_clean() and not any(traced):
        return None  # JAX calls it
    statics = [i for i in function.static_argnums if not traced[i]]
    if len(statics) < len(function.static_argnums) and type(function) is CustomVJP3:
        return None  # JAX refuses it
    flat = [x for i, xs in enumerate(leaves) if i not in statics for x in xs]
    try:
        found = jit(function.f, static_argnums=(*statics,)).trace(*args)
    except ValueError:  # a static argument without a hash
        fun = _with_static_arguments(function.f, args, statics)
        found = jit(fun).trace(*(x for i, x in enumerate(args) if i not in statics))
    return args, Traced(found.jaxpr, found._consts, flat, statics, found.out_tree)


def _with_static_arguments(fun: Any, args: Sequence[Any], statics: Sequence[int]) -> Any:
    def of_others(*others: Any) -> Any:
        rest = iter(others)
        return fun(*(x if i in statics else next(rest) for i, x in enumerate(args)))

    return of_others


def like_traced_rules(function: Any, fun: Any, more: int, wrap: Callable[[str, Any], Any]) -> Any:
    """A function like ``function``, made of ``fun``, which takes ``more`` arguments in front.

    ``wrap(name, rule)`` is what becomes of each of its rules.
    """

    def named(fun: Any, like: Any) -> Any:
        def call(*args: Any) -> Any:
            return fun(*args)

        functools.update_wrapper(call, like, updated=())
        del call.__wrapped__  # JAX looks at the arguments of that
        return call

    def rule(name: str, rule: Any) -> Any:
        return named(wrap(name, rule), rule)

    statics = [i + more for i in function.static_argnums]
    other = type(function)(named(fun, function.f), statics)
    for name, value in vars(function).items():
        if name in ("jvp_fun", "fwd", "bwd") and value is not None:
            setattr(other, name, rule(name, value))
        elif name == "remat_rules" and value is not None:
            fwd, rem, bwd, with_logs = value
            rules = rule("remat_fwd", fwd), rule("rem", rem), rule("remat_bwd", bwd)
            other.remat_rules = (*rules, with_logs)
        elif name in ("symz", "opt_remat", "with_logs", "with_accums", "generic_batching"):
            setattr(other, name, value)
    return other


def is_of_jax(fun: Any) -> bool:
    """Whether a ``WrappedFun`` is of a function of JAX itself, or of a jaxpr."""
    return _module_of(fun).startswith("jax.")


def _module_of(fun: Any) -> str:
    """Where the function of a ``WrappedFun`` is written. (``__module__`` is what it looks like.)"""
    function = getattr(fun.f, "func", fun.f)
    function = getattr(function, "_jaxstate_replaces", function)
    if not isinstance(function, types.FunctionType):  # jitted
        function = getattr(function, "__wrapped__", function)
    return getattr(function, "__globals__", {}).get("__name__") or ""


# The rules of `jax.nn.relu` and the like.
_rules_of_activations = {
    fun.jvp for fun in vars(functions).values() if isinstance(fun, custom_derivatives.custom_jvp)
}


def is_rule_of_activation(rule: Any) -> bool:
    """Whether a ``WrappedFun`` is the rule of a function of `jax.nn`. Neither that function nor
    this rule calls anything of the user's, unless `wrap_rule_function` replaced them."""
    return rule.f in _rules_of_activations


def wrap_rule_function(fun: Any, replace: Callable[..., Any]) -> Any:
    """The ``WrappedFun`` that runs ``replace`` and can be called like ``fun``."""
    replace._jaxstate_replaces = getattr(fun.f, "_jaxstate_replaces", fun.f)  # type: ignore[attr-defined]
    return linear_util.wrap_init(replace, debug_info=fun.debug_info.with_unknown_names())


def wrap_backward_rule(
    bwd: Any,
    n_residuals: Callable[[], int],
    given: Callable[[Sequence[Any]], tuple[Sequence[Any], contextlib.AbstractContextManager[Any]]],
) -> Any:
    """The ``WrappedFun`` of a backward rule with further residuals, ``n_residuals()`` in all.

    ``given(residuals)`` are those that the rule takes, and a context to run it in.
    """

    def call(*args: Any) -> Any:
        n = n_residuals()
        residuals, context = given(args[:n])
        reset_stores(bwd)
        with context:
            return map_results(resolved, bwd.call_wrapped(*residuals, *args[n:]))

    if _TakesAccumulators and isinstance(bwd.f, _TakesAccumulators) and not bwd.transforms:
        return linear_util.wrap_init(_WithAccumulators(bwd.f, call, given), bwd.debug_info)
    return wrap_rule_function(bwd, call)


# From jax 0.12 on a backward rule may add its results to accumulators.
_TakesAccumulators: Any = getattr(ad, "CustomBwdWithAccums", None)


class _WithAccumulators(_TakesAccumulators or object):  # type: ignore[misc]
    def __init__(self, bwd: Any, call: Callable[..., Any], given: Callable[..., Any]) -> None:
        self._bwd = bwd
        self._call = call
        self._given = given

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def call_with_accums(self, residuals: Any, cts: Any, accumulators: Any) -> Any:
        residuals, context = self._given(residuals)
        with context:
            return self._bwd.call_with_accums(residuals, cts, accumulators)


def reset_stores(fun: Any) -> None:
    """Lets a ``WrappedFun`` be called again: its side outputs may be stored once only."""
    for store in fun.stores:
        if store:
            store.reset()


def instantiate_symbolic_zero(tangent: Any) -> Any:
    if isinstance(tangent, SymbolicZero):
        return ad.instantiate_zeros(Zero(tangent.aval))
    return tangent


def symbolic_zero_like(primal: Any) -> Any:
    return SymbolicZero(typeof(primal).to_tangent_aval())


def zero_cotangent(aval: Any) -> Any:
    return Zero(aval.to_tangent_aval())


def map_results(fun: Callable[[Any], Any], out: Any) -> Any:
    """``fun`` of each result of a function with a custom rule, or of one of its rules.

    (jax >= 0.11: a backward rule returns them with logs.)
    """
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        return [fun(x) for x in out[0]], out[1]
    return [fun(x) for x in out]


def prepend_cotangents(cotangents: list[Any], out: Any) -> Any:
    """What a backward rule returns, with cotangents in front. (jax >= 0.11: with logs.)"""
    if flattree is not None:
        rest, logs = out
        return [*cotangents, *rest], logs
    return [*cotangents, *out]
