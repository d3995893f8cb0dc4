# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The wrappers around functions of JAX: what each comes between, and what it asks for.

Each ``wrap_...`` hands wrappers to `hooks.change`, and changes nothing itself.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax._src import api, config, core, dtypes
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe

from jaxstate._src._jax.building import traced_for
from jaxstate._src._jax.custom_rules import Traced, _trace_with_rules
from jaxstate._src._jax.hooks import ALWAYS, LATER, OBJECTS, Group, Place, change
from jaxstate._src._jax.jaxprs import consts_of
from jaxstate._src._jax.names import (
    DIFFERENTIATING,
    BatchTrace,
    StagingTrace,
    Wrap,
    flattree,
    typeof,
)
from jaxstate._src._jax.solves import Solve, _split
from jaxstate._src._jax.traces import chain, current_trace, note_directions
from jaxstate._src._jax.types import has_tangent

__all__ = [
    "defer_transposes",
    "runs_backward",
    "wrap_bind",
    "wrap_bind_with_trace",
    "wrap_callbacks",
    "wrap_checkpoint_operands",
    "wrap_control_flow",
    "wrap_conversions",
    "wrap_copied_arguments",
    "wrap_current_trace",
    "wrap_custom_root",
    "wrap_finished_jaxprs",
    "wrap_jacfwd",
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


def wrap_callbacks(checked: Callable[[Any, Any], Any]) -> None:
    """Uses ``checked(function, arguments)`` instead of a function that runs on the host."""

    def wrap_flat(plain: Any) -> Any:
        def flat_callback(function: Any, in_tree: Any) -> Any:
            given = sys._getframe(1).f_locals  # of the function of JAX that the program has called
            return plain(checked(function, (given["args"], given["kwargs"])), in_tree)

        return flat_callback

    def wrap_debug(plain: Any) -> Any:
        @functools.wraps(plain)
        def debug_callback(callback: Any = None, *args: Any, **kwargs: Any) -> Any:
            options = {k: kwargs.pop(k) for k in ("ordered", "partitioned") if k in kwargs}
            if callback is None and not args:
                return functools.partial(debug_callback, **options)
            return plain(checked(callback, (args, kwargs)), *args, **options, **kwargs)

        return debug_callback

    change("jax._src.callback:_FlatCallback", wrap_flat, OBJECTS)
    change("jax._src.debugging:debug_callback", wrap_debug, OBJECTS)


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
    "_flatten_jvp", "_flatten_fwd", "_flatten_bwd", "custom_vmap_batching", "f_wrapped", "_fun",
}  # fmt: skip

_OF_TWO_RESULTS = {"_flatten_jvp", "_flatten_fwd"}


def runs_backward(call: types.FrameType) -> bool:
    """Whether it is a backward rule that JAX calls there."""
    return call.f_code.co_name == "_flatten_bwd"


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
