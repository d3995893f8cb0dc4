# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Jitted calls at top level."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax._src import pjit, tree_util
from jax._src.interpreters import pxla

from jaxstate._src._jax.jaxprs import _new_jaxpr, _open
from jaxstate._src._jax.names import weakref_lru_cache

__all__ = [
    "JitCall",
    "Jitted",
    "JittedFunction",
    "Use",
    "around_inference",
    "checks_results",
    "dispatched",
    "how_jitted",
    "jitted_again",
    "with_constants_inside",
]


# What the jaxpr of a jitted function is wanted for: a call, as it is, or for its types alone.
Use = Literal["call", "trace", "shapes"]


class _Inference:
    """How JAX is asked for the jaxpr of a jitted function."""

    @staticmethod
    def around(infer: Any, jitted: Jitted, args: Any, kwargs: Any, use: Use) -> Any:
        return infer(jitted.fun, jitted.info, args, kwargs)


def around_inference(around: Callable[..., Any]) -> None:
    """Calls ``around(infer, jitted, args, kwargs, use)`` instead."""
    _Inference.around = staticmethod(around)


class JitCall(NamedTuple):
    """What JAX makes of a call of a jitted function.

    Attributes:
      params: of the ``jit_p`` equation that the call is.
      consts: its first operands, what the function closes over and traces.
      operands: its other operands, the flat arguments.
      out_tree: how its results are returned.
      names: of the first operands and of the others, for JAX's errors.
    """

    params: dict[str, Any]
    consts: list[Any]
    operands: list[Any]
    out_tree: Any
    names: tuple[Sequence[str], Sequence[str]] = ((), ())


class Jitted(NamedTuple):
    """A function and how it is jitted."""

    fun: Any
    info: Any

    def infer(self, args: Any, kwargs: Any) -> JitCall:
        """Traces the function, unless JAX knows the jaxpr for such arguments."""
        return _jit_call(*_Inference.around(_infer_params, self, args, kwargs, "call"))


JittedFunction = type(jax.jit(lambda: None))


def how_jitted(x: Any) -> Any:
    """How a function is jitted: where, what is static, and so on."""
    return x._jit_info


def jitted_again(fun: Any, info: Any) -> Any:
    """Another function, jitted in this way."""
    return pjit._cpp_pjit(fun, info)


def _jit_call(p: Any, flat: list[Any]) -> JitCall:
    n = len(p.consts)
    names = p.arg_names or ("",) * (len(flat) - n)
    return JitCall(p.params, flat[:n], flat[n:], p.out_tree, ((), names))


_infer_params = pjit._infer_params


def dispatched(jitted: Jitted, prepare: Callable[..., JitCall]) -> Callable[..., Any]:
    """``f(values, *args, **kwargs)`` on a C++ dispatch of its own, jitted like ``jitted``.

    For operands of new types ``prepare(jitted, values, args, kwargs)`` says what to run. What JAX
    keeps does not keep the function of ``jitted``.
    """
    ref, info = weakref.ref(jitted.fun), jitted.info

    def cache_miss(values: Any, /, *args: Any, **kwargs: Any) -> Any:
        fun: Any = ref()
        call = prepare(Jitted(fun, info), values, args, kwargs)
        flat = [*call.consts, *call.operands]
        names = tuple(name for names in call.names for name in names)
        p = pjit.PjitParams([], call.params, (), None, call.out_tree, names)
        outs, out_flat, out_tree, flat, jaxpr, executable, profiler, consts = _run_python_pjit(
            p, flat, fun, args, kwargs
        )
        data = pjit._get_fastpath_data(
            executable, out_tree, flat, out_flat, jaxpr.effects, jaxpr.consts, profiler, consts
        )
        return outs, data, pjit._need_to_rebuild_with_fdo(profiler)

    def never_called(values: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the dispatch calls executables, or `cache_miss`")

    name = getattr(jitted.fun, "__name__", "call")
    statics = [i + 1 if i >= 0 else i for i in info.static_argnums]
    return _pjit_function(
        name, never_called, cache_miss, statics, info.static_argnames,
        pxla.JitGlobalCppCacheKeys(), tree_util.dispatch_registry, pxla.cc_shard_arg,
        pjit._cpp_pjit_cache_fun_only,
    )  # fmt: skip


_run_python_pjit, _pjit_function = pjit._run_python_pjit, pjit._jax.pjit


def checks_results() -> bool:
    """Whether JAX looks for NaN in results, and then calls the function again with its operands."""
    return jax.config.jax_debug_nans or jax.config.jax_debug_infs


def with_constants_inside(call: JitCall, which: Callable[[Any], bool]) -> JitCall:
    """A call whose jaxpr has constants of a kind inside; the others are its first inputs."""
    inside = tuple(i for i, c in enumerate(call.consts) if which(c))
    if not inside:
        return call
    constants = _ByIdentity(call.consts[i] for i in inside)
    per_input = ("in_shardings", "in_layouts", "donated_invars")
    left_out = {
        name: tuple(x for i, x in enumerate(call.params[name]) if i not in inside)
        for name in per_input
    }
    jaxpr = _with_constants(call.params["jaxpr"], inside, constants)
    return call._replace(
        params=dict(call.params, jaxpr=jaxpr, **left_out),
        consts=[c for i, c in enumerate(call.consts) if i not in inside],
    )


class _ByIdentity(tuple):
    """A tuple that is equal to another if it has the same objects in it."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and [*map(id, self)] == [*map(id, other)]

    def __hash__(self) -> int:
        return hash(tuple(map(id, self)))


@weakref_lru_cache
def _with_constants(jaxpr: Any, inputs: tuple[int, ...], constants: _ByIdentity) -> Any:
    inner = _open(jaxpr)
    constvars = [*inner.constvars, *(inner.invars[i] for i in inputs)]
    left = [v for i, v in enumerate(inner.invars) if i not in inputs]
    return _new_jaxpr(
        inner, constvars, [*jaxpr.consts, *constants], left, inner.outvars, inner.eqns,
        inner.effects,
    )  # fmt: skip
