# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The wrappers around functions of JAX: what each comes between, and what it asks for.

Each ``wrap_...`` hands wrappers to `hooks.change`, and changes nothing itself.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax._src import (
    api,
    config,
    core,
    dtypes,
    pjit,
    traceback_util,
)
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.util import register_cache

from jaxstate._jax.building import traced_for
from jaxstate._jax.calls import JitCall, Jitted, _Inference, _jit_call
from jaxstate._jax.custom_rules import Traced, _trace_with_rules
from jaxstate._jax.hooks import (
    ALWAYS,
    LATER,
    OBJECTS,
    Group,
    Place,
    change,
)
from jaxstate._jax.jaxprs import consts_of
from jaxstate._jax.names import (
    DIFFERENTIATING,
    BatchTrace,
    StagingTrace,
    Wrap,
    flattree,
    typeof,
)
from jaxstate._jax.solves import Solve, _split
from jaxstate._jax.traces import chain, current_trace, note_directions
from jaxstate._jax.types import has_tangent

__all__ = [
    "defer_transposes",
    "wrap_ahead_of_time",
    "wrap_bind",
    "wrap_bind_with_trace",
    "wrap_checkpoint_operands",
    "wrap_clear_cache",
    "wrap_control_flow",
    "wrap_conversions",
    "wrap_copied_arguments",
    "wrap_current_trace",
    "wrap_custom_root",
    "wrap_finished_jaxprs",
    "wrap_jitted_calls",
    "wrap_kernels",
    "wrap_refused_assignments",
    "wrap_results_of_jaxprs",
    "wrap_traced_rules",
    "wrap_tracing",
    "wrap_while_loop",
]


def wrap_refused_assignments(note: str) -> None:
    """Adds a note to the error that JAX has for ``x[i] = y``."""

    def wrap(refused: Any) -> Any:
        @functools.wraps(refused)
        def with_note(x: Any, index: Any, value: Any) -> None:
            try:
                refused(x, index, value)
            except TypeError as error:
                error.add_note(note)
                raise

        return with_note

    change("jax._src.array:ArrayImpl.__setitem__", wrap, ALWAYS)
    change("jax._src.core:ShapedArray._setitem", wrap, ALWAYS)


def wrap_finished_jaxprs(
    finish_results: Callable[[Any, Sequence[Any]], Sequence[Any]],
    finish: Callable[[Any, list[Any]], Any],
) -> None:
    """Comes between where JAX finishes the construction of a jaxpr.

    ``finish_results(trace, tracers)`` replaces the results, and ``finish(jaxpr, consts)`` the open
    jaxpr and its constants.
    """

    def wrap(plain: Any) -> Any:
        def to_jaxpr(frame: Any, trace: Any, results: Sequence[Any], *info: Any) -> Any:
            return finish(*plain(frame, trace, finish_results(trace, results), *info))

        return to_jaxpr

    change("jax._src.interpreters.partial_eval:JaxprStackFrame.to_jaxpr", wrap, ALWAYS)


def _wrap_inside(path: str, wrap: Wrap, group: Group) -> None:
    """Puts a wrapper around a function of JAX's API that programs and libraries have imported: what
    is replaced is the function inside of the one that they hold."""

    def wrap_named(plain: Any) -> Any:
        wrapped = functools.wraps(plain)(wrap(plain))
        wrapped._jaxstate_replaces = plain
        return wrapped

    change(f"{path}<fun>", wrap_named, group)


def wrap_while_loop(wrap: Wrap) -> None:
    """Puts a wrapper around `jax.lax.while_loop`."""
    _wrap_inside("jax._src.lax.control_flow.loops:while_loop", wrap, ALWAYS)


def defer_transposes(when: Callable[[], bool]) -> None:
    """Transposes the operator of a custom_linear_solve where the result is used, if ``when()``.

    JAX runs what is not linear in the operator before, beside the solve.
    """

    def wrap(plain: Any) -> Any:
        def transpose(operator: Any, primals: Any) -> Any:
            return (lambda x: plain(operator, primals)(x)) if when() else plain(operator, primals)

        return transpose

    change("jax._src.lax.control_flow.solves:_transpose_one_output", wrap, ALWAYS)


def wrap_custom_root(rule: Callable[[Solve], list[Any]]) -> None:
    """Calls ``rule`` for every custom_root, where custom_root is not a primitive."""

    def wrap(plain: Any) -> Any:
        def custom_root(lengths: Any, jaxprs: Any, *args: Any) -> list[Any]:
            consts, guess = _split(args, lengths)

            def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
                longer = type(lengths)(**{name: len(values) for name, values in consts.items()})
                operands = [x for values in consts.values() for x in values]
                return plain(longer, type(jaxprs)(**functions), *operands, *guess)

            return rule(Solve(jaxprs._asdict(), consts, bind))

        return custom_root

    change("jax._src.lax.control_flow.solves:_custom_root.jvp", _with_integer_tangents, ALWAYS)
    change("jax._src.lax.control_flow.solves:_custom_root", wrap, ALWAYS)


def _with_integer_tangents(jvp: Any) -> Callable[..., Any]:
    """jax 0.10 gives auxiliary integers of a custom_root integer tangents, and refuses those."""

    def with_integer_tangents(*args: Any) -> Any:
        outs, tangents = jvp(*args)
        return outs, [
            t if has_tangent(typeof(x)) else np.zeros(x.shape, dtypes.float0)
            for x, t in zip(outs, tangents, strict=True)
        ]

    return with_integer_tangents


def wrap_traced_rules(
    when: Callable[[], bool], call_with_state: Callable[[Any, tuple[Any, ...], Traced], Any]
) -> None:
    """Lets ``call_with_state(function, args, traced)`` call functions with rules of these kinds, if
    ``when()``, and unless it returns `NotImplemented`."""

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            found = _trace_with_rules(function, args, kwargs) if when() else None
            if found is not None:
                result = call_with_state(function, *found)
                if result is not NotImplemented:
                    return result
            return plain(function, *args, **kwargs)

        return call

    change("jax._src.hijax:custom_jvp3.__call__", wrap, ALWAYS)
    change("jax._src.hijax:custom_vjp3.__call__", wrap, ALWAYS)


def wrap_bind(primitive: Any, wrap: Wrap, group: Group = ALWAYS) -> None:
    """Wraps what a primitive does with its operands as they are given."""
    group.add(Place(primitive, "bind"), wrap)


def wrap_bind_with_trace(primitive: Any, wrap: Wrap, group: Group = ALWAYS) -> None:
    """Wraps what a primitive does under the trace it meets."""
    group.add(Place(primitive, "bind_with_trace"), wrap)


class _Done(pjit.PjitParams):
    """Takes the place of what JAX infers about a call: the call has been made."""

    results: Any


class _Inferred(pjit.PjitParams):
    """What JAX has inferred about a call that is about to be made."""

    jitted: Jitted


_NO_JAXPR = types.SimpleNamespace(effects=(), consts=())


class _Ahead(threading.local):
    """The function that `jit_trace` is about to ask for on this thread: that is no call."""

    fun: Any = None


_ahead = _Ahead()


def wrap_jitted_calls(
    call: Callable[[Jitted, Any, Any], Any], call_traced: Callable[[Jitted, JitCall, Any, Any], Any]
) -> None:
    """Comes between when JAX calls a jitted function at top level.

    JAX does so in Python for operands for which its C++ dispatch has no executable. First
    ``call(jitted, args, kwargs)`` is asked, then, when the function is traced for such operands,
    ``call_traced(jitted, call, args, kwargs)``. If both return `NotImplemented`, JAX goes on; else
    that is the result, and JAX keeps no executable.
    """

    def wrap_trace(plain: Any) -> Any:
        @functools.wraps(plain)
        def jit_trace(jitted: Any, *args: Any, **kwargs: Any) -> Any:
            outer, _ahead.fun = _ahead.fun, jitted._fun
            try:
                return plain(jitted, *args, **kwargs)
            finally:
                _ahead.fun = outer

        return jit_trace

    def wrap_infer(plain: Any) -> Any:
        @functools.wraps(plain)
        def infer_params(fun: Any, info: Any, args: Any, kwargs: Any) -> Any:
            is_call = _ahead.fun is not fun
            _ahead.fun = None
            jitted = Jitted(fun, info)
            if not is_call or not core.trace_state_clean() or config.debug_key_reuse.value:
                if not OBJECTS.users:
                    return plain(fun, info, args, kwargs)
                return _Inference.around(plain, jitted, args, kwargs, is_call)
            results = call(jitted, args, kwargs)
            if results is not NotImplemented:
                done = _Done([], {"jaxpr": _NO_JAXPR}, (), None, None, ())
                done.results = results
                return done, []
            p, flat = _Inference.around(plain, jitted, args, kwargs, True)
            p = _Inferred(*p)
            p.jitted = jitted
            return p, flat

        return infer_params

    def wrap_run(plain: Any) -> Any:
        @functools.wraps(plain)
        def run_python_pjit(p: Any, flat: Any, fun: Any, args: Any, kwargs: Any) -> Any:
            results = NotImplemented
            if type(p) is _Done:
                results = p.results
            elif type(p) is _Inferred:
                results = call_traced(p.jitted, _jit_call(p, flat), args, kwargs)
            if results is NotImplemented:
                return plain(p, flat, fun, args, kwargs)
            return results, (), None, flat, _NO_JAXPR, None, None, ()

        return run_python_pjit

    # What a function that is jitted from now on does in Python asks `call` before all else. For the
    # others, `infer_params` does.
    in_progress = threading.local()
    trace, axis_env = core.trace_state_strong_ref, core.axis_env_state

    def wrap_cpp(plain: Any) -> Any:
        @functools.wraps(plain)
        def cpp_pjit(fun: Any, info: Any) -> Any:
            in_progress.jitted = Jitted(fun, info)
            return plain(fun, info)

        return cpp_pjit

    def wrap_module(module: Any) -> Any:
        def pjit_function(name: str, fun: Any, cache_miss: Any, *options: Any) -> Any:
            jitted, in_progress.jitted = getattr(in_progress, "jitted", None), None
            if jitted is None:  # JAX makes one for itself
                return module.pjit(name, fun, cache_miss, *options)
            of_jax = getattr(cache_miss, "__wrapped__", cache_miss)

            @traceback_util.api_boundary
            def ask_first(*args: Any, **kwargs: Any) -> Any:
                if (
                    trace.value is core.eval_trace  # (`is_top_level` takes three calls to say so)
                    and axis_env.value is core.top_axis_env
                    and not config.debug_key_reuse.value
                    and not config.no_tracing.value
                ):
                    results = call(jitted, args, kwargs)
                    if results is not NotImplemented:
                        return results, None, False
                return of_jax(*args, **kwargs)

            return module.pjit(name, fun, ask_first, *options)

        own = types.ModuleType(module.__name__)
        vars(own).update(vars(module), pjit=pjit_function)
        return own

    change("jax._src.pjit:_cpp_pjit", wrap_cpp, ALWAYS)
    change("jax._src.pjit:_jax", wrap_module, ALWAYS)
    change("jax._src.pjit:jit_trace", wrap_trace, ALWAYS)
    change("jax._src.pjit:_infer_params", wrap_infer, ALWAYS)
    change("jax._src.pjit:_run_python_pjit", wrap_run, ALWAYS)


def wrap_clear_cache(forget: Callable[[Any], None], forget_all: Callable[[], None]) -> None:
    """Calls ``forget(fun)`` when the caches of the jitted function of ``fun`` are cleared, and
    ``forget_all()`` when those of all are."""

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def clear_cache(jitted: Any) -> None:
            plain(jitted)
            forget(jitted._fun)

        return clear_cache

    change("jax._src.pjit:jit_evict_fn", wrap, ALWAYS)
    _own_caches.append(_OwnCache(forget_all))


class _OwnCache:
    """A cache that `jax.clear_caches` clears."""

    def __init__(self, clear: Callable[[], None]) -> None:
        self.cache_clear = clear
        register_cache(self, "jaxstate")


_own_caches: list[_OwnCache] = []  # JAX has weak references to them


def wrap_ahead_of_time(check: Callable[[Any, Sequence[Any]], None]) -> None:
    """Calls ``check(jaxpr, constants)`` before a jitted function is lowered ahead of time, by
    ``lower`` or by `jax.export`."""

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def lower(traced: Any, **options: Any) -> Any:
            check(traced.jaxpr, [*traced.jaxpr.consts, *traced._consts])
            return plain(traced, **options)

        return lower

    change("jax._src.stages:Traced.lower", wrap, ALWAYS)


def wrap_kernels(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wraps what traces functions to kernels: ``wrap(kind, trace)``."""
    reduction = functools.partial(wrap, "the computation of a reduction")
    change("jax._src.lax.lax:_reduction_jaxpr", reduction, ALWAYS)
    change("jax._src.lax.lax:_variadic_reduction_jaxpr", reduction, ALWAYS)
    LATER.when_imported(
        "jax._src.custom_partitioning:custom_partitioning.__call__",
        functools.partial(wrap, "custom_partitioning"),
    )
    LATER.when_imported(
        "jax._src.pallas.pallas_call:_trace_kernel_to_jaxpr",
        functools.partial(wrap, "a Pallas kernel"),
    )


def wrap_results_of_jaxprs(resolve: Callable[[Any], Any]) -> None:
    """Calls ``resolve`` for each result of a jaxpr that is evaluated: a constant may be among them.

    So it may be in what `jax.closure_convert` gives, and in what `jax.make_jaxpr` gave.
    """

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def eval_jaxpr(*args: Any, **kwargs: Any) -> list[Any]:
            return [resolve(x) for x in plain(*args, **kwargs)]

        return eval_jaxpr

    change("jax._src.core:eval_jaxpr", wrap, ALWAYS)


def wrap_conversions(
    is_open: Callable[[], bool],
    where_unused: Callable[[Callable[[], Any], Callable[[], Any]], Any],
    resolve: Callable[[Any], Any],
) -> None:
    """Wraps `jax.closure_convert` and `jax.make_jaxpr`, which hand out what a function closes over.

    If ``is_open()``, they hand out ``resolve`` of each such constant, and trace a function again
    that JAX has traced before. Else JAX is called by ``where_unused(call, otherwise)``, which may
    find that state is used.
    """

    def wrap_convert(plain: Any) -> Any:
        def closure_convert(fun: Any, *types: Any) -> Any:
            if not is_open():
                jax_ = plain.__wrapped__ if config.check_tracer_leaks.value else plain
                return where_unused(lambda: jax_(fun, *types), lambda: closure_convert(fun, *types))
            converted, consts = plain.__wrapped__(_untraced(fun), *types)
            return converted, [resolve(c) for c in consts]

        def uncached(fun: Any, *types: Any) -> Any:
            return closure_convert(fun, *types)

        closure_convert.__wrapped__ = uncached  # type: ignore[attr-defined]
        return closure_convert

    def wrap_make(make_jaxpr: Any) -> Any:
        def make_jaxpr_of_values(fun: Any, *args: Any, **options: Any) -> Any:
            plain = make_jaxpr(fun, *args, **options)

            @functools.wraps(plain)
            def made(*args_of_fun: Any, **kwargs: Any) -> Any:
                if not is_open():
                    return where_unused(
                        lambda: plain(*args_of_fun, **kwargs), lambda: made(*args_of_fun, **kwargs)
                    )
                out = make_jaxpr(_untraced(fun), *args, **options)(*args_of_fun, **kwargs)
                jaxpr, *rest = out if isinstance(out, tuple) else (out,)
                consts = [resolve(c) for c in consts_of(jaxpr)]
                if consts:
                    jaxpr = (
                        core.ClosedJaxpr(jaxpr.jaxpr, consts)
                        if flattree is None
                        else jaxpr.with_consts(consts)
                    )
                return (jaxpr, *rest) if rest else jaxpr

            return made

        return make_jaxpr_of_values

    change("jax._src.custom_derivatives:_closure_convert_for_avals", wrap_convert, ALWAYS)
    _wrap_inside("jax._src.api:make_jaxpr", wrap_make, ALWAYS)


def _untraced(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same and that no cache of JAX knows."""

    @functools.wraps(fun)
    def untraced(*args: Any, **kwargs: Any) -> Any:
        return fun(*args, **kwargs)

    return untraced


def wrap_current_trace(enter: Callable[[Any], Any], leave: Callable[[Any, bool], None]) -> None:
    """Comes between when JAX makes a trace current, and calls a function under it.

    ``enter(trace)`` is called when the trace is current. If that returns something, it is given to
    ``leave(something, failed)`` before the trace stops to be current.
    """

    def wrap(plain: Any) -> Any:
        class SetCurrentTrace(plain):
            __slots__ = ("entered",)

            def __enter__(self) -> None:
                plain.__enter__(self)
                self.entered = None
                if not OBJECTS.users:
                    OBJECTS.remove_unused()
                    return
                try:
                    self.entered = enter(self.trace)
                except BaseException:
                    plain.__exit__(self, *sys.exc_info())
                    raise

            def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
                entered, self.entered = self.entered, None
                try:
                    if entered is not None:
                        leave(entered, kind is not None)
                except BaseException:
                    plain.__exit__(self, *sys.exc_info())
                    raise
                plain.__exit__(self, kind, error, traceback)

        return SetCurrentTrace

    change("jax._src.core:set_current_trace", wrap, OBJECTS)


class _Wrapped:
    """Something of JAX with other attributes here and there."""

    def __init__(self, plain: Any, call: Any = None, **others: Any) -> None:
        self.__dict__.update(others, _plain=plain, _call=call or plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def __instancecheck__(self, x: Any) -> bool:
        return isinstance(x, self._plain)


def wrap_tracing(around: Callable[[Any], Any], result_of: Callable[[str, Any], Any]) -> None:
    """Comes between when JAX traces a function to a jaxpr.

    ``with around(fun)``: before JAX looks for the jaxpr in its cache. ``result_of(kind, result)``
    is what the function returned, as JAX is to see it; ``kind`` says what it is traced for.
    """

    def wrap(plain: Any) -> Any:
        def trace(fun: Any, *args: Any, **kwargs: Any) -> Any:
            with around(fun):
                return plain(fun, *args, **kwargs)

        return _Wrapped(plain, trace)

    def wrap_trees(plain: Any) -> Any:
        def flatten(x: Any, *args: Any, **kwargs: Any) -> Any:
            trace = core.trace_ctx.trace
            if isinstance(trace, StagingTrace):
                x = result_of(traced_for(trace), x)
            return plain.flatten(x, *args, **kwargs)

        return _Wrapped(plain, flatten=flatten)

    change("jax._src.interpreters.partial_eval:trace_to_jaxpr", wrap, OBJECTS)
    change("jax._src.interpreters.partial_eval:FlatTree", wrap_trees, OBJECTS)
    change("jax._src.interpreters.partial_eval:ft", wrap_trees, OBJECTS)


def wrap_control_flow(around: Callable[..., Any]) -> None:
    """Calls ``around(name, function, args, kwargs)`` instead of loops and branches."""

    def wrap(name: str) -> Wrap:
        return lambda plain: lambda *args, **kwargs: around(name, plain, args, kwargs)

    for module, names in (
        ("loops", ("scan", "while_loop", "fori_loop")), ("conditionals", ("cond", "switch"))
    ):  # fmt: skip
        for name in names:
            _wrap_inside(f"jax._src.lax.control_flow.{module}:{name}", wrap(name), OBJECTS)


def wrap_checkpoint_operands(convert: Callable[[Any], Any]) -> None:
    """Calls ``convert(operands)`` for the operands of `jax.checkpoint`."""

    def wrap(registry: Any) -> Any:
        return _Wrapped(registry, flatten=lambda x, *args: registry.flatten(convert(x), *args))

    change("jax._src.ad_checkpoint:tracing_registry", wrap, OBJECTS)


def wrap_copied_arguments(
    notice: Callable[[Any, Any], None], notice_result: Callable[[Any, Any], None]
) -> None:
    """Calls ``notice(arguments, call)`` with the arguments that JAX puts together for a function
    that it differentiates, maps, converts or runs on devices, or that has a rule of its own, before
    it calls the function, and ``notice_result(result, call)`` after that. ``call`` is the frame
    that does so, and None (without a second call) where the function is differentiated or mapped.
    """

    def wrap_flat(plain: Any) -> Any:
        def unflatten(flat: Any, *args: Any, **kwargs: Any) -> Any:
            tree = plain(flat, *args, **kwargs)
            trace, caller = core.trace_ctx.trace, sys._getframe(1)
            if isinstance(trace, DIFFERENTIATING):
                if caller.f_globals is ad.__dict__:
                    notice(tree, None)
            elif isinstance(trace, StagingTrace) and caller.f_globals is pe.__dict__:
                notice(tree, caller)
            return tree

        return unflatten

    def noticing(plain: Any) -> Any:
        def noticing_unflatten(*args: Any) -> Any:
            tree = plain(*args)
            caller = sys._getframe(1)
            if caller.f_code.co_name in _WITH_ARGUMENTS:
                notice(tree, None if caller.f_globals is batching.__dict__ else caller)
            return tree

        return noticing_unflatten

    def noticing_result(plain: Any) -> Any:
        def noticing_flatten(tree: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            others = caller.f_locals if caller.f_code.co_name in _OF_TWO_RESULTS else {}
            notice_result((tree, others.get("res"), others.get("py_tangents_out")), caller)
            return plain(tree, *args, **kwargs)

        return noticing_flatten

    def noticing_trees(plain: Any) -> Any:
        return _Wrapped(plain, flatten=noticing_result(plain.flatten))

    change("jax._src.tree_util:FlatTree.unflatten", wrap_flat, OBJECTS)
    change("jax._src.flattree:FlatTree.unflatten", wrap_flat, OBJECTS)
    results = ("api_util", "custom_derivatives", "custom_batching", "pmap")
    for module in (*results, "interpreters.batching", "shard_map"):
        change(f"jax._src.{module}:tree_unflatten", noticing, OBJECTS)
    for module in results:
        change(f"jax._src.{module}:tree_flatten", noticing_result, OBJECTS)
    for module in ("shard_map", "interpreters.partial_eval"):
        for name in ("ft", "FlatTree"):
            change(f"jax._src.{module}:{name}", noticing_trees, OBJECTS)


# Functions of JAX that call those of the program, and put the arguments of these together.
_WITH_ARGUMENTS = {
    "flatten_fun", "flatten_fun_nokwargs", "_flatten_fun_nokwargs", "flatten_fun_for_vmap",
    "_flatten_jvp", "_flatten_fwd", "custom_vmap_batching", "f_wrapped", "_fun",
}  # fmt: skip
_OF_TWO_RESULTS = {"_flatten_jvp", "_flatten_fwd"}


def wrap_jacfwd() -> None:
    """Notes of the vmap in `jax.jacfwd` that its lanes are directions: see `lanes_are_directions`.

    JAX runs a partial application of `_jvp` there, which no program can.
    """

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def vmap(fun: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(fun, functools.partial) and fun.func is api._jvp:
                fun = functools.partial(_over_directions, fun)
            return plain(fun, *args, **kwargs)

        return vmap

    change("jax._src.api:vmap", wrap, ALWAYS)


def _over_directions(pushforward: Any, tangents: Any) -> Any:
    trace = next(t for t in chain(current_trace()) if isinstance(t, BatchTrace))
    note_directions(trace)
    return pushforward(tangents)


wrap_jacfwd()
