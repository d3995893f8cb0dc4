# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""What is changed in JAX."""

from __future__ import annotations

import functools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import (
    ad_checkpoint,
    api,
    api_util,
    array,
    config,
    core,
    custom_batching,
    custom_derivatives,
    dispatch,
    dtypes,
    pjit,
    pmap,
    shard_map,
    sharding_impls,
    stages,
    traceback_util,
    tree_util,
)
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax
from jax._src.lax.control_flow import conditionals, loops, solves
from jax._src.numpy import array_methods
from jax._src.random import prng
from jax._src.util import register_cache

from jaxstate._jax.building import traced_for
from jaxstate._jax.calls import JitCall, Jitted, _infer_params, _Inference, _jit_call
from jaxstate._jax.custom_rules import CustomJVP3, CustomVJP3, Traced, _trace_with_rules
from jaxstate._jax.jaxprs import consts_of
from jaxstate._jax.names import (
    DIFFERENTIATING,
    BatchTrace,
    JVPTrace,
    LinearizeTrace,
    PartialTrace,
    ShapedArray,
    StagingTrace,
    Wrap,
    flattree,
    make_jaxpr,
    typeof,
)
from jaxstate._jax.solves import CustomRoot, Solve, _split
from jaxstate._jax.tracers import TRACER_KINDS
from jaxstate._jax.types import has_tangent

__all__ = [
    "choose_tracer_type",
    "defer_transposes",
    "wrap_ahead_of_time",
    "wrap_arguments",
    "wrap_auxiliary",
    "wrap_bind",
    "wrap_bind_with_trace",
    "wrap_checkpoint_operands",
    "wrap_clear_cache",
    "wrap_control_flow",
    "wrap_conversions",
    "wrap_copied_arguments",
    "wrap_current_trace",
    "wrap_custom_root",
    "wrap_device_get",
    "wrap_finished_jaxprs",
    "wrap_forwarding",
    "wrap_jitted_calls",
    "wrap_kernels",
    "wrap_kernels_imported_since",
    "wrap_key_arrays",
    "wrap_operands",
    "wrap_refused_assignments",
    "wrap_results_of_jaxprs",
    "wrap_traced_rules",
    "wrap_tracing",
    "wrap_transfers",
    "wrap_what_is_not_traced",
    "wrap_while_loop",
]


def choose_tracer_type(choose: Callable[[type, Any, Any], type]) -> None:
    """Lets ``choose(kind, trace, content)`` name a subclass for every tracer that JAX makes from
    now on; the content is a value, or only its type."""

    def wrap(kind: type) -> None:
        new = kind.__new__

        def choosing(cls: type, *args: Any, **kwargs: Any) -> Any:
            return new(choose(cls, args[0], args[1]) if cls is kind and len(args) > 1 else cls)

        kind.__new__ = choosing  # type: ignore[method-assign]

    for kind in TRACER_KINDS:
        wrap(kind)


def wrap_refused_assignments(note: str) -> None:
    """Adds a note to the error that JAX has for ``x[i] = y``."""
    refused = array_methods._unimplemented_setitem

    @functools.wraps(refused)
    def with_note(x: Any, index: Any, value: Any) -> None:
        try:
            refused(x, index, value)
        except TypeError as error:
            error.add_note(note)
            raise

    array.ArrayImpl.__setitem__ = with_note  # type: ignore[method-assign]
    core.ShapedArray._setitem = staticmethod(with_note)


def wrap_operands(
    read: Callable[[Any, Any], Any], hand_out: Callable[[Any, Any, Any], Any]
) -> None:
    """Wraps how a vmap or derivative takes apart what reaches it: operands, and the results of
    the function that is transformed.

    ``read(trace, x)`` replaces what is taken apart, ``hand_out(trace, part, x)`` each of the two
    things in it: a value of the trace outside, and its tangent or batch dimension.
    """

    def wrap(trace_type: type, name: str) -> None:
        original = getattr(trace_type, name)

        def take_apart(trace: Any, x: Any) -> Any:
            value, info = original(trace, read(trace, x))
            return hand_out(trace, value, x), hand_out(trace, info, x)

        setattr(trace_type, name, take_apart)

    wrap(BatchTrace, "to_batch_info")
    wrap(JVPTrace, "to_primal_tangent_pair")
    wrap(LinearizeTrace, "to_primal_tangent_pair")

    # The trace under which the rule of a `custom_jvp` function runs.
    to_jaxpr_tracer = PartialTrace.to_jaxpr_tracer
    PartialTrace.to_jaxpr_tracer = lambda trace, x: to_jaxpr_tracer(trace, read(trace, x))


def wrap_arguments(adopt: Callable[[Any, Any], Any], cut: Callable[[Any], Any]) -> None:
    """Wraps how a transformed function gets the arguments that the transformation leaves alone.

    ``adopt(trace, x)`` replaces an argument that a vmap does not map over, or that a derivative
    knows no tangent of; ``cut(x)`` an argument that ``argnums`` leaves out.
    """

    def wrap(module: Any, name: str) -> None:
        original = getattr(module, name)

        def argument(trace: Any, *args: Any) -> Any:
            out = original(trace, *args)
            return adopt(trace, out) if any(out is x for x in args) else out

        setattr(module, name, argument)

    wrap(batching, "to_elt")
    wrap(ad, "maybe_jvp_tracer")
    wrap(ad, "maybe_linearize_tracer")

    partial = api.argnums_partial2

    def argnums_partial(f: Any, argnums: Any, args: Any, kwargs: Any) -> Any:
        taken = {operator.index(n) % len(args) for n in np.atleast_1d(argnums)}
        args = [x if i in taken else cut(x) for i, x in enumerate(args)]
        return partial(f, argnums, args, {name: cut(x) for name, x in kwargs.items()})

    api.argnums_partial2 = argnums_partial


def wrap_auxiliary(hand_out: Callable[..., Any]) -> None:
    """Wraps how a derivative hands on auxiliary results: ``hand_out(strip, tag, x)``, where
    ``strip(x)`` takes the tangent off and ``tag`` is that of the derivative's trace."""
    plain = ad._strip_tracer

    def strip(kind: type, tag: Any, x: Any) -> Any:
        return hand_out(lambda x: plain(kind, tag, x), tag, x)

    ad._strip_tracer = strip


def wrap_forwarding(may_forward: Callable[[], bool]) -> None:
    """Lets ``may_forward()`` say whether an array among the results that is one of the operands may
    be that very object, and not a result of the operation; and a residual that is one of the
    arguments."""
    plain, plain_of_rule = pe._jaxpr_forwarding, custom_derivatives._filter_forwarded_inputs

    def forwarding(jaxpr: Any) -> list[int | None]:
        found = plain(jaxpr)
        if may_forward():
            return found
        is_array = (isinstance(v.aval, ShapedArray) for v in jaxpr.outvars)
        return [None if a else f for a, f in zip(is_array, found, strict=True)]

    def forwarding_of_rule(outs: Any, ins: Any) -> tuple[list[Any], list[int | None]]:
        if may_forward():
            return plain_of_rule(outs, ins)
        found = [plain_of_rule([x], ins)[1][0] for x in outs]
        is_array = (isinstance(typeof(x), ShapedArray) for x in outs)
        found = [None if a else f for a, f in zip(is_array, found, strict=True)]
        return [x for x, f in zip(outs, found, strict=True) if f is None], found

    pe._jaxpr_forwarding = forwarding
    custom_derivatives._filter_forwarded_inputs = forwarding_of_rule


def wrap_key_arrays(are_traced: Callable[[], bool]) -> None:
    """Lets ``are_traced()`` say whether an array of keys is iterated and copied as others are.

    JAX does both to the numbers behind the keys, and fails if something traces that.
    """
    keys = prng.PRNGKeyArray
    plain_iter, plain_copy = keys.__iter__, keys.copy

    def iterate(self: Any) -> Iterator[Any]:
        if self.ndim and are_traced():
            return (self[i] for i in range(len(self)))
        return plain_iter(self)

    def copy(self: Any) -> Any:
        return jax.numpy.array(self, copy=True) if are_traced() else plain_copy(self)

    keys.__iter__ = iterate
    keys.copy = copy


def wrap_what_is_not_traced(wrap: Wrap) -> None:
    """Puts a wrapper around what JAX does only where nothing is traced, and around the creation of
    constants, which looks at its device only there."""
    sharding_impls.set_mesh.__init__ = wrap(sharding_impls.set_mesh.__init__)
    stages.Compiled.__call__ = wrap(stages.Compiled.__call__)
    plain = {"get_mesh": sharding_impls.get_mesh, "full": lax.full, "full_like": lax.full_like}
    new = {name: functools.wraps(f)(wrap(f)) for name, f in plain.items()}
    for module in (sharding_impls, jax.sharding, lax, jax.lax):
        for name, function in plain.items():
            if getattr(module, name, None) is function:
                setattr(module, name, new[name])


def wrap_device_get(wrap: Wrap) -> None:
    """Puts a wrapper around what `jax.device_get` does with one array."""
    api._device_get = wrap(api._device_get)


def wrap_finished_jaxprs(
    finish_result: Callable[[Any, Any], Any], finish: Callable[[Any, list[Any]], Any]
) -> None:
    """Comes between where JAX finishes the construction of a jaxpr.

    ``finish_result(trace, tracer)`` replaces each result, and ``finish(jaxpr, consts)`` the open
    jaxpr and its constants.
    """
    plain = pe.JaxprStackFrame.to_jaxpr

    def to_jaxpr(frame: Any, trace: Any, results: Sequence[Any], *info: Any) -> Any:
        results = [finish_result(trace, x) for x in results]
        return finish(*plain(frame, trace, results, *info))

    pe.JaxprStackFrame.to_jaxpr = to_jaxpr  # type: ignore[method-assign]


def _wrap_inside(module: Any, name: str, wrap: Wrap) -> None:
    """Puts a wrapper around a function of JAX's API that programs and libraries have imported: what
    is replaced is the function inside of the one that they hold."""
    function = getattr(module, name)
    while "fun" not in function.__code__.co_freevars:
        function = function.__wrapped__  # another library has wrapped it
    cell = function.__closure__[function.__code__.co_freevars.index("fun")]
    plain = cell.cell_contents
    wrapped = functools.wraps(plain)(wrap(plain))
    wrapped._jaxstate_replaces = plain
    cell.cell_contents = wrapped


def wrap_while_loop(wrap: Wrap) -> None:
    """Puts a wrapper around `jax.lax.while_loop`."""
    _wrap_inside(loops, "while_loop", wrap)


def defer_transposes(when: Callable[[], bool]) -> None:
    """Transposes the operator of a custom_linear_solve where the result is used, if ``when()``.

    JAX runs what is not linear in the operator before, beside the solve.
    """
    plain = solves._transpose_one_output

    def transpose(operator: Any, primals: Any) -> Any:
        return (lambda x: plain(operator, primals)(x)) if when() else plain(operator, primals)

    solves._transpose_one_output = transpose


def wrap_custom_root(rule: Callable[[Solve], list[Any]]) -> None:
    """Calls ``rule`` for every custom_root, where custom_root is not a primitive."""
    if CustomRoot is not None:
        return
    plain = solves._custom_root

    def custom_root(lengths: Any, jaxprs: Any, *args: Any) -> list[Any]:
        consts, guess = _split(args, lengths)

        def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
            longer = type(lengths)(**{name: len(values) for name, values in consts.items()})
            operands = [x for values in consts.values() for x in values]
            return plain(longer, type(jaxprs)(**functions), *operands, *guess)

        return rule(Solve(jaxprs._asdict(), consts, bind))

    plain.defjvp(_with_integer_tangents(plain.jvp))
    solves._custom_root = custom_root


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

    def wrap(kind: Any) -> None:
        plain = kind.__call__

        @functools.wraps(plain)
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            found = _trace_with_rules(function, args, kwargs) if when() else None
            if found is not None:
                result = call_with_state(function, *found)
                if result is not NotImplemented:
                    return result
            return plain(function, *args, **kwargs)

        kind.__call__ = call

    for kind in (CustomJVP3, CustomVJP3):
        if kind is not None:
            wrap(kind)


def wrap_bind(primitive: Any, wrap: Wrap) -> None:
    """Wraps what a primitive does with its operands as they are given."""
    primitive.bind = wrap(primitive.bind)


def wrap_transfers(wrap: Wrap) -> None:
    """Wraps `jax.device_put` of leaves: what it does under a trace, and at top level."""
    wrap_bind(dispatch.device_put_p, wrap)
    dispatch._batched_device_put_impl = wrap(dispatch._batched_device_put_impl)


def wrap_bind_with_trace(primitive: Any, wrap: Wrap) -> None:
    """Wraps what a primitive does under the trace it meets."""
    primitive.def_bind_with_trace(wrap(primitive.bind_with_trace))


_cache_miss_code = next(
    code
    for code in pjit._cpp_pjit.__code__.co_consts
    if isinstance(code, types.CodeType) and code.co_name == "cache_miss"
)


class _Done(NamedTuple):
    """Takes the place of what JAX infers about a call: the call has been made."""

    results: Any


_NO_JAXPR = types.SimpleNamespace(effects=(), consts=())


def wrap_jitted_calls(
    call: Callable[[Jitted, Any, Any], Any], call_traced: Callable[[Jitted, JitCall, Any, Any], Any]
) -> None:
    """Comes between when JAX calls a jitted function at top level.

    JAX does so in Python for operands for which its C++ dispatch has no executable. First
    ``call(jitted, args, kwargs)`` is asked, then, when the function is traced for such operands,
    ``call_traced(jitted, call, args, kwargs)``. If both return `NotImplemented`, JAX goes on; else
    that is the result, and JAX keeps no executable.
    """
    run, jitted_function, plain_function = pjit._run_python_pjit, pjit._cpp_pjit, pjit._jax.pjit
    in_progress = threading.local()
    trace, axis_env = core.trace_state_strong_ref, core.axis_env_state

    def infer_params(fun: Any, info: Any, args: Any, kwargs: Any) -> Any:
        # `lower` and `trace` infer too.
        is_call = sys._getframe(1).f_code is _cache_miss_code
        jitted = Jitted(fun, info)
        if not is_call or not core.trace_state_clean() or config.debug_key_reuse.value:
            return _Inference.around(_infer_params, jitted, args, kwargs, is_call)
        results = call(jitted, args, kwargs)
        if results is not NotImplemented:
            return _Done(results), ()
        p, flat = _Inference.around(_infer_params, jitted, args, kwargs, True)
        results = call_traced(jitted, _jit_call(p, flat), args, kwargs)
        return (p, flat) if results is NotImplemented else (_Done(results), ())

    def run_python_pjit(p: Any, flat: Any, fun: Any, args: Any, kwargs: Any) -> Any:
        if type(p) is _Done:
            return p.results, (), None, flat, _NO_JAXPR, None, None, ()
        return run(p, flat, fun, args, kwargs)

    # What a function that is jitted from now on does in Python asks `call` before all else. For the
    # others, `infer_params` does.
    def cpp_pjit(fun: Any, info: Any) -> Any:
        in_progress.jitted = Jitted(fun, info)
        return jitted_function(fun, info)

    def pjit_function(name: str, fun: Any, cache_miss: Any, *options: Any) -> Any:
        jitted, in_progress.jitted = getattr(in_progress, "jitted", None), None
        if jitted is None:  # JAX makes one for itself
            return plain_function(name, fun, cache_miss, *options)
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

        return plain_function(name, fun, ask_first, *options)

    own = types.ModuleType(pjit._jax.__name__)
    vars(own).update(vars(pjit._jax), pjit=pjit_function)
    pjit._jax, pjit._cpp_pjit = own, cpp_pjit
    pjit._infer_params = infer_params
    pjit._run_python_pjit = run_python_pjit


def wrap_clear_cache(forget: Callable[[Any], None], forget_all: Callable[[], None]) -> None:
    """Calls ``forget(fun)`` when the caches of the jitted function of ``fun`` are cleared, and
    ``forget_all()`` when those of all are."""
    plain = pjit.jit_evict_fn

    def clear_cache(jitted: Any) -> None:
        plain(jitted)
        forget(jitted._fun)

    # JAX sets the method again whenever it makes a jitted function.
    pjit.jit_evict_fn = type(jax.jit(lambda: None)).clear_cache = clear_cache
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
    plain = stages.Traced.lower

    @functools.wraps(plain)
    def lower(traced: Any, **options: Any) -> Any:
        check(traced.jaxpr, [*traced.jaxpr.consts, *traced._consts])
        return plain(traced, **options)

    stages.Traced.lower = lower


_kernels = [
    ("jax._src.lax.lax", "_reduction_jaxpr", "the computation of a reduction"),
    ("jax._src.lax.lax", "_variadic_reduction_jaxpr", "the computation of a reduction"),
    ("jax._src.custom_partitioning", "custom_partitioning.__call__", "custom_partitioning"),
    ("jax._src.pallas.pallas_call", "_trace_kernel_to_jaxpr", "a Pallas kernel"),
]
_wrap_kernel: Any = None


def wrap_kernels(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Wraps what traces functions to kernels: ``wrap(kind, trace)``."""
    global _wrap_kernel
    _wrap_kernel = wrap
    wrap_kernels_imported_since()


def wrap_kernels_imported_since() -> None:
    """JAX imports some of them only when they are used."""
    for kernel in [k for k in _kernels if k[0] in sys.modules]:
        module, path, kind = kernel
        *outer, name = path.split(".")
        place = functools.reduce(getattr, outer, sys.modules[module])
        setattr(place, name, _wrap_kernel(kind, getattr(place, name)))
        _kernels.remove(kernel)


def wrap_results_of_jaxprs(resolve: Callable[[Any], Any]) -> None:
    """Calls ``resolve`` for each result of a jaxpr that is evaluated: a constant may be among them.

    So it may be in what `jax.closure_convert` gives, and in what `jax.make_jaxpr` gave.
    """
    plain = core.eval_jaxpr

    @functools.wraps(plain)
    def eval_jaxpr(*args: Any, **kwargs: Any) -> list[Any]:
        return [resolve(x) for x in plain(*args, **kwargs)]

    core.eval_jaxpr = eval_jaxpr
    if hasattr(jax.core, "eval_jaxpr"):
        jax.core.eval_jaxpr = eval_jaxpr


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
    plain = custom_derivatives._closure_convert_for_avals

    def closure_convert(fun: Any, *types: Any) -> Any:
        if not is_open():
            jax_ = plain.__wrapped__ if config.check_tracer_leaks.value else plain
            return where_unused(lambda: jax_(fun, *types), lambda: closure_convert(fun, *types))
        converted, consts = plain.__wrapped__(_untraced(fun), *types)
        return converted, [resolve(c) for c in consts]

    closure_convert.__wrapped__ = closure_convert  # type: ignore[attr-defined]
    custom_derivatives._closure_convert_for_avals = closure_convert

    @functools.wraps(make_jaxpr)
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

    api.make_jaxpr = jax.make_jaxpr = make_jaxpr_of_values


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
    plain = core.set_current_trace

    class SetCurrentTrace(plain):
        __slots__ = ("entered",)

        def __enter__(self) -> None:
            plain.__enter__(self)
            self.entered = None
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

    core.set_current_trace = SetCurrentTrace


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
    trace_to_jaxpr = pe.trace_to_jaxpr

    def trace(fun: Any, *args: Any, **kwargs: Any) -> Any:
        with around(fun):
            return trace_to_jaxpr(fun, *args, **kwargs)

    pe.trace_to_jaxpr = _Wrapped(trace_to_jaxpr, trace)
    flat_trees = pe.FlatTree if flattree is None else pe.ft

    def flatten(x: Any, *args: Any, **kwargs: Any) -> Any:
        trace = core.trace_ctx.trace
        if isinstance(trace, StagingTrace):
            x = result_of(traced_for(trace), x)
        return flat_trees.flatten(x, *args, **kwargs)

    wrapped = _Wrapped(flat_trees, flatten=flatten)
    if flattree is None:
        pe.FlatTree = wrapped
    else:
        pe.ft = wrapped


def wrap_control_flow(around: Callable[..., Any]) -> None:
    """Calls ``around(name, function, args, kwargs)`` instead of loops and branches."""

    def wrap(name: str) -> Wrap:
        return lambda plain: lambda *args, **kwargs: around(name, plain, args, kwargs)

    for module, name in (
        (loops, "scan"), (loops, "while_loop"), (loops, "fori_loop"), (conditionals, "cond"),
        (conditionals, "switch"),
    ):  # fmt: skip
        _wrap_inside(module, name, wrap(name))


def wrap_checkpoint_operands(convert: Callable[[Any], Any]) -> None:
    """Calls ``convert(operands)`` for the operands of `jax.checkpoint`."""
    registry = ad_checkpoint.tracing_registry
    ad_checkpoint.tracing_registry = _Wrapped(
        registry, flatten=lambda x, *args: registry.flatten(convert(x), *args)
    )


def wrap_copied_arguments(
    notice: Callable[[Any, Any], None], notice_result: Callable[[Any, Any], None]
) -> None:
    """Calls ``notice(arguments, call)`` with the arguments that JAX puts together for a function
    that it differentiates, maps, converts or runs on devices, or that has a rule of its own, before
    it calls the function, and ``notice_result(result, call)`` after that. ``call`` is the frame
    that does so, and None (without a second call) where the function is differentiated or mapped.
    """
    cls = tree_util.FlatTree if flattree is None else flattree.FlatTree
    plain_unflatten = cls.unflatten

    def unflatten(flat: Any, *args: Any, **kwargs: Any) -> Any:
        tree = plain_unflatten(flat, *args, **kwargs)
        trace, caller = core.trace_ctx.trace, sys._getframe(1)
        if isinstance(trace, DIFFERENTIATING):
            if caller.f_globals is ad.__dict__:
                notice(tree, None)
        elif isinstance(trace, StagingTrace) and caller.f_globals is pe.__dict__:
            notice(tree, caller)
        return tree

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

    cls.unflatten = unflatten
    for module in (api_util, batching, custom_derivatives, custom_batching, pmap, shard_map):
        module.tree_unflatten = noticing(module.tree_unflatten)
        if module not in (shard_map, batching):
            module.tree_flatten = noticing_result(module.tree_flatten)
    for module in (shard_map, pe):
        name = "ft" if hasattr(module, "ft") else "FlatTree"
        plain = getattr(module, name)
        setattr(module, name, _Wrapped(plain, flatten=noticing_result(plain.flatten)))


# Functions of JAX that call those of the program, and put the arguments of these together.
_WITH_ARGUMENTS = {
    "flatten_fun", "flatten_fun_nokwargs", "_flatten_fun_nokwargs", "flatten_fun_for_vmap",
    "_flatten_jvp", "_flatten_fwd", "custom_vmap_batching", "f_wrapped", "_fun",
}  # fmt: skip
_OF_TWO_RESULTS = {"_flatten_jvp", "_flatten_fwd"}
