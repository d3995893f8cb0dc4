# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The only file that imports ``jax._src`` or looks at a JAX version.

Everything jaxstate needs from JAX beyond the public API has a name here, with one meaning on
every supported version (0.10.2, 0.11.2, 0.12.0.1). Where versions differ, the difference ends in
this file.

JAX changed most at 0.11: there a jaxpr carries its own constants (before, only a ``ClosedJaxpr``
did), and scan describes its operands with trees. Both came with the module ``flattree``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import (
    ad_checkpoint,
    ad_util,
    api,
    core,
    custom_batching,
    custom_derivatives,
    dtypes,
    effects,
    linear_util,
    pjit,
    shard_map,
    source_info_util,
    traceback_util,
)
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax
from jax._src.lax.control_flow import conditionals, loops, solves
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.util import weakref_lru_cache

try:
    from jax._src import flattree as _flattree
except ImportError:
    _flattree = None

__all__ = ["UNSPECIFIED", "weakref_lru_cache"]

Tracer = core.Tracer
Trace = core.Trace
Primitive = core.Primitive
Var = core.Var
ShapedArray = core.ShapedArray
Effect = effects.Effect
typeof = core.typeof
set_current_trace = core.set_current_trace
eval_trace = core.eval_trace

StagingTrace = pe.DynamicJaxprTrace
StagingTracer = pe.DynamicJaxprTracer
JVPTrace = ad.JVPTrace
JVPTracer = ad.JVPTracer
LinearizeTrace = ad.LinearizeTrace
LinearizeTracer = ad.LinearizeTracer
DIFFERENTIATING = (JVPTrace, LinearizeTrace)
BatchTrace = batching.BatchTrace
BatchTracer = batching.BatchTracer
Zero = ad_util.Zero
SymbolicZero = custom_derivatives.SymbolicZero

jit_p = pjit.jit_p
convert_element_type_p = lax.convert_element_type_p
scan_p = loops.scan_p
while_p = loops.while_p
cond_p = conditionals.cond_p
remat_p = ad_checkpoint.remat_p
custom_jvp_call_p = custom_derivatives.custom_jvp_call_p
custom_vjp_call_p = custom_derivatives.custom_vjp_call_p
linear_solve_p = solves.linear_solve_p
custom_vmap_p = custom_batching.custom_vmap_p
shard_map_p = shard_map.shard_map_p
# Evaluates the closed jaxpr in its parameter ``call_jaxpr``.
call_p = core.closed_call_p if _flattree is None else core.eval_jaxpr_p


# -- Values and types ------------------------------------------------------------------------


def canonicalize(x: Any) -> Any:
    """What JAX makes of an operand before it looks at it: a capture becomes its value."""
    return dtypes.canonicalize_value(x)


def concrete(x: Any) -> Any:
    """The concrete value behind a tracer, or None."""
    return core.to_concrete_value(x)


def as_array(x: Any) -> Any:
    """``x`` as a JAX array or tracer."""
    return x if isinstance(x, (jax.Array, Tracer)) else jax.numpy.asarray(x)


def is_array_like(x: Any) -> bool:
    """Whether JAX takes ``x`` as one array."""
    try:
        typeof(x)
    except TypeError:
        return False
    return True


def aval_of(x: Any) -> Any:
    """The type of an array, or of anything with a shape and a dtype."""
    return x.aval if isinstance(x, Tracer) else core.shaped_abstractify(x)


def same_type(value: Any, aval: Any) -> bool:
    """Whether a value can stand where a jaxpr expects ``aval``."""
    found = typeof(value)
    if isinstance(found, ShapedArray) and isinstance(aval, ShapedArray):
        return found.shape == aval.shape and found.dtype == aval.dtype
    return found == aval


def has_tangent(aval: Any) -> bool:
    """Whether values of the type have derivatives."""
    return getattr(aval.to_tangent_aval(), "dtype", dtypes.float0) != dtypes.float0


def is_typed_key(x: Any) -> bool:
    """Whether an array, or a type, is one of `jax.random.key`."""
    return dtypes.issubdtype(x.dtype, dtypes.prng_key)


def is_standard_initializer(init: Any) -> bool:
    """Whether ``init(key, shape, ...)`` is one of `jax.nn.initializers`: its first argument is the
    shape of what it makes."""
    return getattr(init, "__module__", None) == "jax._src.nn.initializers"


# -- Traces ----------------------------------------------------------------------------------


def current_trace() -> Any:
    """The trace that is current on this thread, or None inside a rule (jax >= 0.11)."""
    return core.trace_ctx.trace


def at_top_level() -> bool:
    """Whether no transformation is in progress on this thread."""
    return core.trace_state_clean()


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
        trace = parent_of(trace)


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


def without_tangents(value: Any) -> Any:
    """The primal value of a tracer in the middle of a derivative."""
    if isinstance(value, (JVPTracer, LinearizeTracer)):
        return without_tangents(value.primal)
    if isinstance(value, BatchTracer):
        return lane_tracer(value._trace, without_tangents(value.val), value.batch_dim)
    return value


def lane_tracer(trace: Any, value: Any, batch_dim: int | None) -> Any:
    """What one lane of the vmap of ``trace`` sees of an array over all lanes."""
    return value if batch_dim is None else BatchTracer(trace, value, batch_dim)


def lane_value(trace: Any, value: Any) -> tuple[Any, int | None]:
    """The array over all lanes that ``value`` stands for, and its batch dimension."""
    return trace.to_batch_info(value)


def lane_count(trace: Any) -> int:
    """The number of lanes of the vmap of ``trace``."""
    return trace.axis_data.size


def lanes_are_directions(trace: Any) -> bool:
    """Whether the vmap of ``trace`` is the one in `jax.jacfwd`, which runs over directions.

    Nothing in the trace tells this vmap from one around `jax.jvp`. So look for the frame that runs
    it (the one with its tag), and for who called that: jacfwd, or the user.
    """
    frame = sys._getframe()
    while frame is not None:
        in_vmap = frame.f_code.co_filename == batching.__file__
        if in_vmap and frame.f_locals.get("tag") is trace.tag:
            break
        frame = frame.f_back
    while frame is not None and not source_info_util.is_user_filename(frame.f_code.co_filename):
        if frame.f_code in _jacfwd_code:
            return True
        frame = frame.f_back
    return False


def _code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_objects(constant)


_jacfwd_code = frozenset(_code_objects(inspect.unwrap(api.jacfwd).__code__))


# -- Tracers that can be written -------------------------------------------------------------

# The tracers that a Python function can meet as arguments or results inside a transformation.
TRACER_KINDS = (pe.DynamicJaxprTracer, BatchTracer, JVPTracer, LinearizeTracer)


def choose_tracer_type(choose: Callable[[type, Any], type]) -> None:
    """Lets ``choose(kind, trace)`` name a subclass for every tracer that JAX makes from now on."""

    def wrap(kind: type) -> None:
        new = kind.__new__

        def choosing(cls: type, *args: Any, **kwargs: Any) -> Any:
            return new(choose(cls, args[0]) if cls is kind and args else cls)

        kind.__new__ = choosing  # type: ignore[method-assign]

    for kind in TRACER_KINDS:
        wrap(kind)


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


def wrap_operands(read: Callable[[Any, Any], Any], hand_out: Callable[[Any, Any], Any]) -> None:
    """Wraps how a vmap or derivative takes apart what reaches it: operands, and the results of
    the function that is transformed.

    ``read(trace, x)`` replaces what is taken apart, ``hand_out(trace, x)`` each of the two things
    in it: a value of the trace outside, and its tangent or batch dimension.
    """

    def wrap(trace_type: type, name: str) -> None:
        original = getattr(trace_type, name)

        def take_apart(trace: Any, x: Any) -> Any:
            value, info = original(trace, read(trace, x))
            return hand_out(trace, value), hand_out(trace, info)

        setattr(trace_type, name, take_apart)

    wrap(BatchTrace, "to_batch_info")
    wrap(JVPTrace, "to_primal_tangent_pair")
    wrap(LinearizeTrace, "to_primal_tangent_pair")

    # The trace under which the rule of a `custom_jvp` function runs.
    to_jaxpr_tracer = pe.JaxprTrace.to_jaxpr_tracer
    pe.JaxprTrace.to_jaxpr_tracer = lambda trace, x: to_jaxpr_tracer(trace, read(trace, x))


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


_jax_package = os.path.dirname(jax.__file__) + os.sep


def is_called_by_jax(depth: int) -> bool:
    """Whether the frame ``depth`` above the caller's is code of JAX itself."""
    return sys._getframe(depth + 1).f_code.co_filename.startswith(_jax_package)


# -- Jaxprs under construction ---------------------------------------------------------------


def stage(trace: Any, primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Adds one equation to the jaxpr that ``trace`` is building."""
    source_info = source_info_util.current()
    operands = [trace.to_jaxpr_tracer(x, source_info) for x in operands]
    return trace.default_process_primitive(primitive, operands, params, source_info)


def new_const(trace: Any, value: Any) -> Any:
    """The tracer of ``value`` as a constant of the jaxpr that ``trace`` is building."""
    return trace.new_const(value, source_info_util.current())


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


# -- Jaxprs ----------------------------------------------------------------------------------


def is_closed(jaxpr: Any) -> bool:
    """Whether ``jaxpr`` is of the kind that carries its constants."""
    return _flattree is not None or isinstance(jaxpr, core.ClosedJaxpr)


def close(jaxpr: Any) -> Any:
    """A closed jaxpr of an open one without constants."""
    return jaxpr if is_closed(jaxpr) else core.ClosedJaxpr(jaxpr, ())


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if is_closed(jaxpr) else jaxpr


def equations(jaxpr: Any) -> Sequence[Any]:
    return jaxpr.eqns


def invars(jaxpr: Any) -> Sequence[Any]:
    """The inputs, without the variables that have a constant attached."""
    return _open(jaxpr).invars


def outvars(jaxpr: Any) -> Sequence[Any]:
    return _open(jaxpr).outvars


def in_avals(jaxpr: Any) -> list[Any]:
    return [v.aval for v in invars(jaxpr)]


def out_avals(jaxpr: Any) -> list[Any]:
    return [v.aval for v in outvars(jaxpr)]


def jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    return core.jaxprs_in_params(params)


def remade(
    jaxpr: Any, *, invars: Sequence[Any], outvars: Sequence[Any], eqns: Sequence[Any], effs: Any
) -> Any:
    """A jaxpr of the same kind and with the same constants, and other contents."""
    inner = _open(jaxpr)
    consts = jaxpr.consts if is_closed(jaxpr) else None
    return _new_jaxpr(inner, inner.constvars, consts, invars, outvars, eqns, effs)


def hoist_tracers(jaxpr: Any) -> Any:
    """The closed jaxpr with the constants that are tracers as leading inputs, in their order."""
    inner = _open(jaxpr)
    pairs = list(zip(inner.constvars, jaxpr.consts, strict=True))
    hoisted = [v for v, c in pairs if isinstance(c, Tracer)]
    kept = [(v, c) for v, c in pairs if not isinstance(c, Tracer)]
    return _new_jaxpr(
        inner, [v for v, _ in kept], [c for _, c in kept], [*hoisted, *inner.invars],
        inner.outvars, inner.eqns, inner.effects,
    )  # fmt: skip


def _new_jaxpr(
    like: Any, constvars: Any, consts: Any, invars: Any, outvars: Any, eqns: Any, effs: Any
) -> Any:
    debug_info = like.debug_info.with_unknown_names()._replace(
        arg_names=("",) * len(invars), result_paths=("",) * len(outvars)
    )
    contents = constvars, list(invars), list(outvars), list(eqns), effs, debug_info, like.is_high
    if _flattree is not None:
        return core.Jaxpr(*contents, list(consts))
    jaxpr = core.Jaxpr(*contents)
    return jaxpr if consts is None else core.ClosedJaxpr(jaxpr, consts)


def eval_closed_jaxpr(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr under the current trace."""
    return core.eval_jaxpr(_open(jaxpr), jaxpr.consts, *args)


def trace_flat(fun: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """The closed jaxpr of a function of flat arguments; it must not close over tracers."""
    return jax.make_jaxpr(fun)(*avals)


# -- Parameters of higher-order primitives ---------------------------------------------------


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_params_with(params: dict[str, Any], consts: int, carry: int) -> dict[str, Any]:
    """``params`` for ``consts`` more constants (or fewer) and ``carry`` more carried values."""
    if "num_consts" in params:
        return dict(
            params, num_consts=params["num_consts"] + consts, num_carry=params["num_carry"] + carry
        )
    assert _flattree is not None
    pack, nones = _flattree.pack, _flattree.nones
    old_consts, old_carry, xs = params["ft_in"].unpack()
    carry_out, ys = params["ft_out"].unpack()
    return dict(
        params,
        ft_in=pack((nones(consts + len(old_consts)), pack((nones(carry), old_carry)), xs)),
        ft_out=pack((pack((nones(carry), carry_out)), ys)),
    )


# -- Configuration: what shapes a trace is part of JAX's cache keys ---------------------------

_context_signature = core.config_ext.Config(
    "jaxstate_context", None, include_in_jit_key=True, include_in_trace_context=True
)


def set_context_signature(signature: Any) -> None:
    """Makes ``signature`` part of the keys of JAX's caches of traces and programs; None ends it."""
    _context_signature.set_local(core.config_ext.unset if signature is None else signature)


# -- Primitives, effects, hooks --------------------------------------------------------------


def allow_effect_everywhere_but_in_compiled_code(effect_type: type) -> None:
    """Lets jaxprs with the effect be built inside every transformation, and none be lowered."""
    effects.control_flow_allowed_effects.add_type(effect_type)
    effects.custom_derivatives_allowed_effects.add_type(effect_type)
    effects.remat_allowed_effects.add_type(effect_type)


def register_lowering(primitive: Any, rule: Callable[..., Any]) -> None:
    mlir.register_lowering(primitive, rule)


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def wrap_bind(primitive: Any, wrap: Wrap) -> None:
    """Wraps what a primitive does with its operands as they are given."""
    primitive.bind = wrap(primitive.bind)


def wrap_bind_with_trace(primitive: Any, wrap: Wrap) -> None:
    """Wraps what a primitive does under the trace it meets."""
    primitive.def_bind_with_trace(wrap(primitive.bind_with_trace))


def wrap_top_level_jit(wrap: Wrap) -> None:
    """Wraps what a jitted call runs at top level, where ``jit_p.bind`` is not on the path.

    The function takes the flat operands and the parameters of ``jit_p`` and returns
    ``(outputs, executable, profiler, const_args)``; without an executable JAX does not store the
    call on its C++ fast path.
    """
    pjit._pjit_call_impl_python = wrap(pjit._pjit_call_impl_python)


def run_jit_primitive(args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Runs one jit equation on concrete operands, compiled once per jaxpr."""
    return jit_p.impl(*args, **params)


def register_tracer_type(tracer_type: type, resolve: Callable[[Any], Any]) -> None:
    """Makes every ``bind`` call ``resolve`` on operands of ``tracer_type``."""
    dtypes.register_canonicalize_value_handler(tracer_type, resolve)
    core.pytype_aval_mappings[tracer_type] = lambda tracer: tracer.aval


# `jax.closure_convert` asks whether a constant may carry a tangent by looking at what its tracer
# contains; a JVP tracer says yes.
PERTURBED = object.__new__(JVPTracer)
PERTURBED.primal = PERTURBED.tangent = PERTURBED._trace = None
PERTURBED.aval = ShapedArray((), dtypes.float0)


# -- Functions with custom derivative rules --------------------------------------------------


def wrap_rule_function(fun: Any, replace: Callable[..., Any]) -> Any:
    """The ``WrappedFun`` that runs ``replace`` and can be called like ``fun``."""
    return linear_util.wrap_init(replace, debug_info=fun.debug_info.with_unknown_names())


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


def tree_with_leaves(tree: Any, n: int) -> Any:
    """A tree structure with ``n`` leaves after those of ``tree``."""
    return jax.tree.structure((tree.unflatten(range(tree.num_leaves)), [0] * n))


def prepend_cotangents(cotangents: list[Any], out: Any) -> Any:
    """What a backward rule returns, with cotangents in front. (jax >= 0.11: with logs.)"""
    if _flattree is not None:
        rest, logs = out
        return [*cotangents, *rest], logs
    return [*cotangents, *out]


# -- The user's program ----------------------------------------------------------------------

# Frames of this package are not the user's: neither in tracebacks nor in `user_location`.
_package = os.path.dirname(__file__) + os.sep
traceback_util.register_exclusion(_package)
source_info_util.register_exclusion(_package)


def user_location() -> str:
    """``file:line`` of the innermost frame that is neither JAX's nor jaxstate's."""
    frame = sys._getframe(1)
    while frame is not None:
        if source_info_util.is_user_filename(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
        frame = frame.f_back
    return "an unknown line"


def location_of(eqn: Any) -> str:
    """``file:line`` of the user's code that an equation comes from."""
    return source_info_util.summarize(eqn.source_info)
