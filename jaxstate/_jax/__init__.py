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
import dis
import functools
import inspect
import operator
import os
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import (
    ad_checkpoint,
    ad_util,
    api,
    api_util,
    array,
    compute_on,
    config,
    core,
    custom_batching,
    custom_derivatives,
    dispatch,
    dtypes,
    effects,
    hijax,
    indexing,
    linear_util,
    mesh,
    pjit,
    shard_map,
    sharding_impls,
    source_info_util,
    stages,
    traceback_util,
    tree_util,
    xla_metadata,
)
from jax._src.interpreters import ad, batching, mlir, pxla
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax
from jax._src.lax.control_flow import conditionals, loops, solves
from jax._src.nn import functions, initializers
from jax._src.random import prng
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
AbstractValue = core.AbstractValue
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
DIFFERENTIATED = (JVPTracer, LinearizeTracer)
PartialTrace = pe.JaxprTrace
PartialTracer = pe.JaxprTracer
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
linear_call_p = custom_derivatives.linear_call_p
remat_opt_p = custom_derivatives.remat_opt_p  # the forward rule under ``optimize_remat``
custom_vmap_p = custom_batching.custom_vmap_p
shard_map_p = shard_map.shard_map_p
compute_on_p = compute_on.compute_on_p
xla_metadata_call_p = getattr(xla_metadata, "xla_metadata_call_p", None)  # jax >= 0.11
# Evaluates the closed jaxpr in its parameter ``call_jaxpr``.
call_p = core.closed_call_p if _flattree is None else core.eval_jaxpr_p


Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


# -- Values and types ------------------------------------------------------------------------


def canonicalize(x: Any) -> Any:
    """What JAX makes of an operand before it looks at it: a capture becomes its value."""
    return dtypes.canonicalize_value(x)


def concrete(x: Any) -> Any:
    """The concrete value behind a tracer, or None."""
    return core.to_concrete_value(x)


def is_known(x: Any) -> bool:
    """Whether Python can branch on ``x``."""
    return not isinstance(x, Tracer) or core.is_concrete(x)


# JAX's own arrays and tracers: what needs no conversion.
_plain_arrays = frozenset(
    {array.ArrayImpl, pe.DynamicJaxprTracer, BatchTracer, JVPTracer, LinearizeTracer}
)


def is_plain_array(x: Any) -> bool:
    """Whether ``x`` is an array or tracer of JAX's own, and no subclass or relative of these."""
    return type(x) in _plain_arrays


def is_concrete_array(x: Any) -> bool:
    """Whether ``x`` is an array of JAX's, and no tracer."""
    return type(x) is array.ArrayImpl


def beside(place: Any, x: Any) -> Any:
    """The scalar ``x`` on the devices of the array, or key, ``place``, and bound to them or not as
    that is. Where either is traced, ``x``."""
    place = getattr(place, "_base_array", place)
    if type(place) is not array.ArrayImpl or isinstance(x, Tracer):
        return x
    if (
        type(x) is array.ArrayImpl
        and x._committed == place._committed
        and (not x._committed or x.sharding.device_set == place.sharding.device_set)
    ):
        return x
    if place._committed:
        sharding = place.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return _put(x, sharding) if sharding.is_fully_replicated else x
    (device,) = place.sharding.device_set
    if type(x) is array.ArrayImpl:
        x = x.addressable_data(0)
    x = _put(x, device)
    return array.ArrayImpl(x.aval, x.sharding, x._arrays, committed=False, _skip_checks=True)


def _put(x: Any, place: Any) -> Any:
    """The concrete ``x`` in another place, whatever transformation is in progress."""
    with set_current_trace(eval_trace):
        return jax.device_put(x, place)


def as_array(x: Any) -> Any:
    """``x`` as a JAX array or tracer."""
    if type(x) in _plain_arrays or isinstance(x, (jax.Array, Tracer)):
        return x
    refuse_user_type(x)
    return jax.numpy.asarray(x)


def refuse_user_type(x: Any) -> None:
    """Raises if ``x`` is a value of a type that a user has registered with JAX."""
    aval = type_of(x)
    if getattr(aval, "is_high", False):
        raise TypeError(
            f"State is made of arrays, and this is a value of the type {aval} of"
            " jax.experimental.hijax.\n"
            "To mend it:\n    arrays = jax.typeof(value).lower_val(value)     # keep these instead"
        )


def is_array_like(x: Any) -> bool:
    """Whether JAX takes ``x`` as one array."""
    return type(x) in _plain_arrays or type_of(x) is not None


def type_of(x: Any) -> Any:
    """The type of what JAX takes as one array; None for anything else."""
    try:
        return typeof(x)
    except TypeError:
        return None


def aval_of(x: Any) -> Any:
    """The type of an array, or of anything with a shape and a dtype."""
    if isinstance(x, Tracer):
        return x.aval
    refuse_user_type(x)
    return core.shaped_abstractify(x)


def same_type(value: Any, aval: Any) -> bool:
    """Whether a value can stand where a jaxpr expects ``aval``."""
    found = typeof(value)
    if found is aval:
        return True
    if isinstance(found, ShapedArray) and isinstance(aval, ShapedArray):
        return found.shape == aval.shape and found.dtype == aval.dtype
    return found == aval


def shown(aval: Any) -> str:
    """A type as messages show it."""
    return aval.str_short() + (" (weakly typed)" if getattr(aval, "weak_type", False) else "")


def stands_for(value: Any, aval: Any) -> bool:
    """Whether a value is of the type for which a jaxpr was traced, weak or not, sharded or not."""
    found = typeof(value)
    if found is aval or not isinstance(found, ShapedArray) or not isinstance(aval, ShapedArray):
        return found is aval or found == aval
    if found.shape != aval.shape or found.dtype != aval.dtype:
        return False
    # (Of a mesh without explicit axes a type may know or not.)
    return found.weak_type == aval.weak_type and found.sharding.spec == aval.sharding.spec


def same_place(a: Any, b: Any) -> bool:
    """Whether values of two types of one shape are in the same memory, and sharded in the same way
    (one that knows of no mesh may be sharded in any)."""
    if not isinstance(a, ShapedArray) or not isinstance(b, ShapedArray):
        return True
    return a.memory_space == b.memory_space and same_sharding(a, b)


def same_sharding(a: Any, b: Any) -> bool:
    """Whether values of two types are sharded in the same way, as far as their types know."""
    return mesh_of(a) is None or mesh_of(b) is None or a.sharding.spec == b.sharding.spec


def same_aval(a: Any, b: Any) -> bool:
    """Whether a jaxpr that returns a value of type ``a`` may return one of type ``b`` instead."""
    return core.typematch(a, b)


def with_weak_type_of(aval: Any, value: Any) -> Any:
    """``value``, weakly typed or not as ``aval`` is, if that is all in which they differ."""
    found = typeof(value)
    if found == aval or not core.typematch(found, aval):
        return value
    if getattr(found, "weak_type", None) == getattr(aval, "weak_type", None):
        return value
    return lax._convert_element_type(value, aval.dtype, aval.weak_type)


def zeros(aval: Any) -> Any:
    """An array of the type ``aval``, which may be that of a random key."""
    return jax.lax.full(aval.shape, 0, aval.dtype)


def is_weak(x: Any) -> bool:
    """Whether the dtype of a value gives way to that of another operand."""
    return bool(getattr(typeof(x), "weak_type", False))


def weak(x: Any) -> Any:
    """``x`` as a value whose dtype gives way to that of another operand."""
    return x if is_weak(x) else lax._convert_element_type(x, x.dtype, weak_type=True)


def axes_of(aval: Any) -> frozenset[Any]:
    """The mesh axes of a shard_map over which values of a type differ."""
    return frozenset(aval.mat.varying) if isinstance(aval, ShapedArray) else frozenset()


def varying_axes(x: Any) -> frozenset[Any]:
    """The mesh axes of a shard_map over which a value differs, according to its type."""
    return axes_of(typeof(x))


def device_axes() -> frozenset[Any]:
    """The mesh axes of the shard_map that the program is in, if types say what varies over them."""
    return frozenset(mesh.get_abstract_mesh().manual_axes if config._check_vma.value else ())


def vary(x: Any, axes: frozenset[Any]) -> Any:
    """A value as one of a type that varies over ``axes`` too."""
    more = tuple(axes - varying_axes(x))
    return core.pvary(x, more) if more else x


def with_axes(aval: Any, axes: frozenset[Any]) -> Any:
    """A type whose values vary over ``axes`` too."""
    if axes <= axes_of(aval):
        return aval
    return aval.update_manual_axis_type(aval.mat.update(varying=aval.mat.varying | axes))


def varying_equation(atom: Any, axes: frozenset[Any]) -> Any:
    """The equation of a jaxpr whose result is ``atom`` as one that varies over ``axes`` too."""
    jaxpr = make_jaxpr(lambda x: vary(x, axes))(atom.aval)
    (eqn,) = equations(jaxpr)
    return eqn.replace(invars=[atom])


def with_varying_axes_of(aval: Any, x: Any) -> Any:
    """The type ``aval`` of a value that differs over the same mesh axes as ``x`` does."""
    found = typeof(x)
    return aval if found.mat == aval.mat else aval.update(manual_axis_type=found.mat)


def type_of_part(aval: Any, shape: Sequence[int], part: Callable[[Any], Any]) -> Any:
    """The type of ``part(x)``, elements of an array ``x`` of type ``aval``, in a new shape."""
    if is_explicitly_sharded(aval):
        return out_avals(jax.make_jaxpr(part)(aval))[0]
    if aval.sharding.mesh.empty:
        return ShapedArray(shape, aval.dtype, weak_type=aval.weak_type)
    sharding = aval.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=tuple(shape), sharding=sharding)


def is_explicitly_sharded(aval: Any) -> bool:
    """Whether a type says how the axes of an array lie on a mesh."""
    return any(axis is not None for axis in aval.sharding.spec)


def sharded_like(aval: Any, x: Any) -> Any:
    """A value with axes sharded as those of the type ``aval``, whose shape it has."""
    if typeof(x).sharding.spec == aval.sharding.spec:
        return x
    return pjit.reshard(x, aval.sharding)


def broadcast_like(aval: Any, x: Any, axes: Sequence[int] | None = None) -> Any:
    """A value broadcast to the shape of the type ``aval``, its axes being ``axes`` of that, and
    sharded as an array of the type is."""
    shape = aval.shape
    if np.shape(x) != shape or axes is not None:
        n = len(shape)
        axes = range(n - np.ndim(x), n) if axes is None else axes
        if not is_explicitly_sharded(aval):
            return lax.broadcast_in_dim(x, shape, axes)
        x = lax.broadcast_in_dim(x, shape, axes, out_sharding=None if np.ndim(x) else aval.sharding)
    return sharded_like(aval, x) if is_explicitly_sharded(aval) else x


def of_type(aval: Any, x: Any) -> Any:
    """A value of the shape and dtype of ``aval`` as one of that type: weak or not, and sharded."""
    if is_explicitly_sharded(aval):
        x = sharded_like(aval, x)
    return with_weak_type_of(aval, x) if is_weak(x) != aval.weak_type else x


def broadcast_shapes(shapes: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """The shape to which arrays of these shapes broadcast, whose sizes may be symbolic."""
    return jax.lax.broadcast_shapes(*map(tuple, shapes))


# -- Sizes, which may be symbolic (`jax.export`) ---------------------------------------------

InconclusiveDimensionOperation = core.InconclusiveDimensionOperation
DynamicSlice = indexing.Slice


def is_size(x: Any) -> bool:
    """Whether ``x`` is an integer or a symbolic size."""
    if isinstance(x, (int, np.integer)):
        return True
    return not isinstance(x, (Tracer, jax.Array, np.ndarray)) and core.is_symbolic_dim(x)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal."""
    return core.definitely_equal(a, b)


def size_value(size: Any) -> Any:
    """A size as something that can be computed with."""
    return core.dimension_as_value(size)


def divided_sizes(a: Sequence[Any], b: Sequence[Any]) -> Any:
    """The size that makes of the shape ``b`` one with as many elements as ``a`` has."""
    return core.divide_shape_sizes(a, b)


def stand_in_size(size: Any) -> int:
    """An integer in the place of a size, the same for equal ones."""
    if isinstance(size, (int, np.integer)):
        return int(size)
    return int(size._evaluate(dict.fromkeys(size._get_vars(), 5040)))


def slice_of_axis(entry: slice, size: Any) -> tuple[Any, int, Any]:
    """Start, step and size of a slice of an axis."""
    bounds = (entry.start, entry.stop, entry.step)
    if isinstance(size, int) and all(b is None or isinstance(b, int) for b in bounds):
        taken = range(*entry.indices(size))
        return taken.start if taken else 0, taken.step, len(taken)
    return core.canonicalize_slice(entry, size)


abstract_mesh = mesh.get_abstract_mesh
use_abstract_mesh = mesh.use_abstract_mesh


def out_of_devices(outside: Any) -> Any:
    """A context in which the mesh is ``outside``, if the program is in a shard_map."""
    inside = mesh.get_abstract_mesh().manual_axes
    return use_abstract_mesh(outside) if inside else contextlib.nullcontext()


def into_mesh(x: Any) -> Any:
    """A value from outside of a shard_map as every device of that shard_map sees it."""
    here = abstract_mesh()
    if typeof(x).sharding.mesh in (here, mesh.empty_abstract_mesh):
        return x
    return pjit.reshard(x, jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec()))


def mesh_of(aval: Any) -> Any:
    """The mesh that a type knows of, or None."""
    found = getattr(getattr(aval, "sharding", None), "mesh", None)
    return None if found is None or found.empty else found


def _may_become(found: Any, wanted: Any) -> bool:
    """Whether two meshes differ in the types of their axes only, and none is of one device."""
    if found is None or wanted is None or found == wanted:
        return False
    return (
        found.shape_tuple == wanted.shape_tuple
        and set(found.manual_axes) == set(wanted.manual_axes)
    )  # fmt: skip


def in_mesh(x: Any, here: Any = None) -> Any:
    """``x`` as a value of the mesh ``here``, by default that of the program, if it is one of the
    same mesh with axes of other types."""
    here, aval = abstract_mesh() if here is None else here, typeof(x)
    if not _may_become(mesh_of(aval), here):
        return x
    spec = core.modify_spec_for_auto_manual(aval.sharding.spec, here)
    return _resharded(x, jax.sharding.NamedSharding(here, spec))


def type_in_mesh(aval: Any, here: Any) -> Any:
    """The type ``aval`` in the mesh ``here``, whose axes may have other types. If it knows of no
    mesh, it is that of a value that is whole on every device."""
    if here.empty or here.manual_axes or not isinstance(aval, ShapedArray):
        return aval
    spec = jax.sharding.PartitionSpec(*[None] * aval.ndim)
    if mesh_of(aval) is not None:
        if not _may_become(mesh_of(aval), here):
            return aval
        spec = core.modify_spec_for_auto_manual(aval.sharding.spec, here)
    return aval.update(sharding=jax.sharding.NamedSharding(here, spec))


def type_in_jaxpr(trace: Any, aval: Any) -> Any:
    """The type ``aval`` in the mesh in which ``trace`` builds a jaxpr.

    Its inputs know; the program may be in a region inside. (If they do not, it is taken for that of
    the region: a value that comes out of it is whole on every device then.)
    """
    here = abstract_mesh()
    if here.empty:
        return aval
    meshes = (mesh_of(v.aval) for v in trace.frame.invars)
    return type_in_mesh(aval, next((m for m in meshes if m is not None), here))


def with_mesh(x: Any) -> Any:
    """``x``; if its type knows of no mesh, as a value of the mesh of the program."""
    found = typeof(x)
    wanted = type_in_mesh(found, abstract_mesh())
    return x if mesh_of(found) is not None or wanted is found else _resharded(x, wanted.sharding)


def in_mesh_set(x: Any) -> Any:
    """``x`` as a value of the mesh that `jax.set_mesh` has set, if any."""
    mesh_set = mesh.get_concrete_mesh()
    return x if mesh_set.empty else in_mesh(x, mesh_set.abstract_mesh)


def in_mesh_of(aval: Any, x: Any) -> Any:
    """``x`` as a value of the mesh of ``aval``, and sharded so, if it is one of the same mesh with
    axes of other types, or of none."""
    found, wanted = mesh_of(typeof(x)), mesh_of(aval)
    if wanted is None or not (found is None or _may_become(found, wanted)):
        return x
    return _resharded(x, aval.sharding)


def _resharded(x: Any, sharding: Any) -> Any:
    with use_abstract_mesh(sharding.mesh):
        return pjit.reshard(x, sharding)


def mesh_equation(atom: Any, like: Any) -> Any:
    """The equation of a jaxpr whose result is ``atom`` as a value of the mesh of the type ``like``,
    or of that of the program if that knows of none; None if it is one."""
    change = in_mesh if mesh_of(like) is None else functools.partial(in_mesh_of, like)
    eqns = equations(jax.make_jaxpr(change)(atom.aval))
    return eqns[0].replace(invars=[atom]) if eqns else None


def resharding_equation(atom: Any, like: Any) -> Any:
    """The equation of a jaxpr whose result is ``atom``, sharded as a value of the type ``like``."""
    (eqn,) = equations(jax.make_jaxpr(lambda x: _resharded(x, like.sharding))(atom.aval))
    return eqn.replace(invars=[atom])


def has_tangent(aval: Any) -> bool:
    """Whether values of the type have derivatives."""
    return getattr(aval.to_tangent_aval(), "dtype", dtypes.float0) != dtypes.float0


def is_tracer(x: Any) -> bool:
    return isinstance(x, Tracer)


def is_typed_key(x: Any) -> bool:
    """Whether an array, or a type, is one of `jax.random.key`."""
    return hasattr(x, "dtype") and dtypes.issubdtype(x.dtype, dtypes.prng_key)


def is_standard_initializer(init: Any) -> bool:
    """Whether ``init(key, shape, ...)`` is one of `jax.nn.initializers`: its first argument is the
    shape of what it makes. (``functools.wraps`` may give any other the same ``__module__``.)"""
    return getattr(init, "__globals__", None) is vars(initializers)


def children_of(x: Any) -> Sequence[Any] | None:
    """The children of a node of a pytree; None for a leaf."""
    found = jax.tree_util.default_registry.flatten_one_level(x)
    return None if found is None else tuple(found[0])


# -- Traces ----------------------------------------------------------------------------------


def current_trace() -> Any:
    """The trace that is current on this thread, or None inside a rule (jax >= 0.11)."""
    return core.trace_ctx.trace


def at_top_level() -> bool:
    """Whether no transformation is in progress on this thread."""
    return core.trace_ctx.is_top_level()


# Programs may put something else in the place of `jax.jit` for a while (`chex.fake_jit`).
jit = jax.jit


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


# Operations that may hand back what they were given, while a jaxpr is built.
FORWARDING = {*pe.forwarding_rules, *pe.const_fold_rules} - {pjit.jit_p, dispatch.device_put_p}


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


def donates(x: Any) -> bool:
    """Whether ``x`` is a compiled function that takes the memory of an argument."""
    return isinstance(x, stages.Compiled) and any(x.donate_argnums)


def takes_results() -> bool:
    """Whether who called the caller is JAX, about to put the results of a function into its jaxpr.

    It has left the trace of that function by then.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_filename in _FILES_BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    return code.co_filename == pe.__file__ and code.co_name.startswith("trace_to_jaxpr")


_FILES_BETWEEN = frozenset(m.__file__ for m in (dtypes, tree_util, _flattree) if m is not None)


def is_asked_by_builder() -> bool:
    """Whether who called the caller is a jaxpr builder, which makes a constant of a value."""
    return sys._getframe(2).f_code is _to_jaxpr_tracer_code


_to_jaxpr_tracer_code = pe.DynamicJaxprTrace.to_jaxpr_tracer.__code__


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


def is_operator_instruction(depth: int) -> bool:
    """Whether the frame ``depth`` above the caller's is at an operator, such as ``a += b``."""
    frame = sys._getframe(depth + 1)
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "BINARY_OP"


# -- Jaxprs under construction ---------------------------------------------------------------


def stage(trace: Any, primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """Adds one equation to the jaxpr that ``trace`` is building."""
    source_info = source_info_util.current()
    operands = [trace.to_jaxpr_tracer(x, source_info) for x in operands]
    return trace.default_process_primitive(primitive, operands, params, source_info)


def emit(
    trace: Any, primitive: Any, operands: Sequence[Any], avals: Sequence[Any], params: Any,
    effs: Any, source_info: Any = None,
) -> list[Any]:  # fmt: skip
    """`stage`, of an equation of which everything is known."""
    source_info = source_info or source_info_util.current()
    operands = [trace.to_jaxpr_tracer(x, source_info) for x in operands]
    return trace.emit_eqn(operands, avals, primitive, params, effs, source_info)


current_source = source_info_util.current


def traced_for(trace: Any) -> str:
    """What the jaxpr is for that ``trace`` is building: "jit", "scan" ..."""
    return trace.frame.debug_info.traced_for


def is_finished(trace: Any) -> bool:
    """Whether a trace with notes has built its jaxpr. (JAX does not mark it as invalid.)"""
    return type(trace.frame.constvar_to_val) is not _Constants


def new_const(trace: Any, value: Any, source_info: Any = None) -> Any:
    """The tracer of ``value`` as a constant of the jaxpr that ``trace`` is building."""
    return trace.new_const(value, source_info or source_info_util.current())


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
        if any(trace is t for t in known):
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


def with_constvars(jaxpr: Any, kept: Sequence[bool], eqns: Sequence[Any]) -> Any:
    """The open jaxpr that was just finished with some of its constants, and other equations."""
    n = len(kept)
    of_jaxpr = jaxpr.constvars if _flattree is None else jaxpr.all_invars[:n]
    inputs = jaxpr.invars if _flattree is None else jaxpr.all_invars[n:]
    constvars = [v for v, k in zip(of_jaxpr, kept, strict=True) if k]
    debug_info = jaxpr.debug_info
    names = debug_info.arg_names
    if names is not None and len(names) == n + len(inputs):  # jax >= 0.11 has names for constants
        debug_info = debug_info._replace(arg_names=names[n:])
    return core.Jaxpr(
        constvars, list(inputs), jaxpr.outvars, list(eqns), jaxpr.effects, debug_info,
        jaxpr.is_high,
    )  # fmt: skip


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


def constant_of(tracer: Any) -> Any:
    """The constant that a tracer of a jaxpr under construction stands for; None if it is none."""
    var = tracer.val
    return tracer._trace.frame.constvar_to_val.get(var) if isinstance(var, Var) else None


def copied(trace: Any, tracer: Any) -> Any:
    """A tracer of the jaxpr that ``trace`` is building, as the result of an equation."""
    return stage(trace, lax.copy_p, [tracer], {})


# -- Jaxprs ----------------------------------------------------------------------------------


def is_closed(jaxpr: Any) -> bool:
    """Whether ``jaxpr`` is of the kind that carries its constants."""
    return _flattree is not None or isinstance(jaxpr, core.ClosedJaxpr)


def close(jaxpr: Any) -> Any:
    """A closed jaxpr of an open one without constants."""
    return jaxpr if is_closed(jaxpr) else core.ClosedJaxpr(jaxpr, ())


def closed(jaxpr: Any, consts: Sequence[Any]) -> Any:
    """The closed jaxpr of an open one and its constants."""
    return jaxpr.with_consts(consts) if _flattree is not None else core.ClosedJaxpr(jaxpr, consts)


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


_JAXPR = (core.Jaxpr,) if _flattree is not None else (core.Jaxpr, core.ClosedJaxpr)


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
    if _flattree is not None:
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
    if _flattree is not None:
        return core.Jaxpr(*contents, list(consts))
    jaxpr = core.Jaxpr(*contents)
    return jaxpr if consts is None else core.ClosedJaxpr(jaxpr, consts)


def eval_closed_jaxpr(jaxpr: Any, *args: Any) -> list[Any]:
    """Evaluates a closed jaxpr under the current trace."""
    return core.eval_jaxpr(_open(jaxpr), jaxpr.consts, *args)


def trace_flat(fun: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """The closed jaxpr of a function of flat arguments; it must not close over tracers."""
    return make_jaxpr(fun)(*avals)


# -- Parameters of higher-order primitives ---------------------------------------------------


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_params_with(
    params: dict[str, Any], consts: int, carry: int, xs: int = 0, ys: int = 0
) -> dict[str, Any]:
    """``params`` for ``consts`` more constants (or fewer) and ``carry`` more carried values in
    front, and ``xs`` more inputs and ``ys`` more outputs per step behind the others."""
    if "num_consts" in params:
        return dict(
            params, num_consts=params["num_consts"] + consts, num_carry=params["num_carry"] + carry
        )
    assert _flattree is not None
    pack, nones = _flattree.pack, _flattree.nones
    old_consts, old_carry, old_xs = params["ft_in"].unpack()
    carry_out, old_ys = params["ft_out"].unpack()
    return dict(
        params,
        ft_in=pack(
            (
                nones(consts + len(old_consts)),
                pack((nones(carry), old_carry)),
                pack((old_xs, nones(xs))),
            )
        ),
        ft_out=pack((pack((nones(carry), carry_out)), pack((old_ys, nones(ys))))),
    )


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


# -- Solves ----------------------------------------------------------------------------------


class Solve(NamedTuple):
    """An operation made of several functions, each with constants of its own.

    Attributes:
      functions: closed jaxprs, which take their constants in front.
      consts: the constants of each.
      bind: the operation with other ``functions`` and ``consts``. It returns flat results; further
        results of the function ``"solve"`` come last.
    """

    functions: dict[str, Any]
    consts: dict[str, list[Any]]
    bind: Callable[[dict[str, Any], dict[str, list[Any]]], list[Any]]


def linear_solve_of(args: Sequence[Any], params: dict[str, Any]) -> Solve:
    """A custom_linear_solve: ``matvec``, ``solve`` and, if it can be transposed, ``vecmat`` and
    ``transpose_solve``."""
    jaxprs, lengths = params["jaxprs"], params["const_lengths"]
    present = [name for name in jaxprs._fields if getattr(jaxprs, name) is not None]
    consts, rest = _split(args, lengths)

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        longer = {name: len(consts[name]) for name in present}
        operands = [x for name in present for x in consts[name]]
        return linear_solve_p.bind(
            *operands, *rest, jaxprs=jaxprs._replace(**functions),
            const_lengths=lengths._replace(**longer),
        )  # fmt: skip

    return Solve({name: getattr(jaxprs, name) for name in present}, consts, bind)


def defer_transposes(when: Callable[[], bool]) -> None:
    """Transposes the operator of a custom_linear_solve where the result is used, if ``when()``.

    JAX runs what is not linear in the operator before, beside the solve.
    """
    plain = solves._transpose_one_output

    def transpose(operator: Any, primals: Any) -> Any:
        return (lambda x: plain(operator, primals)(x)) if when() else plain(operator, primals)

    solves._transpose_one_output = transpose


def _split(args: Sequence[Any], lengths: Any) -> tuple[dict[str, list[Any]], list[Any]]:
    parts, rest = {}, list(args)
    for name, n in lengths._asdict().items():
        parts[name], rest = rest[:n], rest[n:]
    return parts, rest


# From jax 0.11 on, custom_root and the derivative of its function are primitives that hide their
# functions; before, it is a custom_jvp.
CustomRoot = getattr(solves, "CustomRoot", None)
RootLinearMap = getattr(solves, "_RootLinearMap", None)


def custom_root_of(args: Sequence[Any], prim: Any) -> Solve:
    """A custom_root (jax >= 0.11): ``f``, ``solve`` and ``tangent_solve``."""
    solve_consts, guess, f_consts, tangent_consts = jax.tree.unflatten(prim.in_tree, args)
    guess = jax.tree.leaves(guess)
    root, n_root = prim.in_avals[1], len(guess)
    tangent = jax.tree.map(lambda aval: aval.to_tangent_aval(), root)
    functions = {
        "f": make_jaxpr(prim.f)(prim.in_avals[2], root),
        "solve": make_jaxpr(prim.solve)(prim.in_avals[0], root),
        "tangent_solve": make_jaxpr(prim.tangent_solve)(prim.in_avals[3], root, tangent),
    }
    consts = {"f": f_consts, "solve": solve_consts, "tangent_solve": tangent_consts}

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        f, tangent_solve = _taking_lists(functions["f"]), _taking_lists(functions["tangent_solve"])
        solved = _taking_lists(functions["solve"])

        def solve(consts: list[Any], guess: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = solved(consts, guess)
            return outs[:n_root], outs[n_root:]

        operands = consts["solve"], guess, consts["f"], consts["tangent_solve"]
        avals = jax.tree.map(typeof, operands)
        solve_traced = jit(solve).trace(*avals[:2])
        root = CustomRoot(f, solve, tangent_solve, solve_traced, avals, True)  # type: ignore[misc]
        return jax.tree.leaves(root(*operands))

    return Solve(functions, {name: jax.tree.leaves(c) for name, c in consts.items()}, bind)


def root_linear_map_of(args: Sequence[Any], prim: Any) -> Solve:
    """The derivative of the function ``f`` of a custom_root, or its transpose."""
    consts, x, v = jax.tree.unflatten(prim.in_tree, args)
    f = make_jaxpr(prim.f)(*prim.in_avals[:2])

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        operands = consts["f"], jax.tree.leaves(x), jax.tree.leaves(v)
        linear_map = RootLinearMap(  # type: ignore[misc]
            _taking_lists(functions["f"]), jax.tree.map(typeof, operands),
            jax.tree.leaves(prim.out_aval), frozenset(), prim.transposed,
        )  # fmt: skip
        return linear_map(*operands)

    return Solve({"f": f}, {"f": jax.tree.leaves(consts)}, bind)


def _taking_lists(jaxpr: Any) -> Callable[..., list[Any]]:
    """The function of a jaxpr, from lists of operands to a list of results."""
    return lambda *lists: eval_closed_jaxpr(jaxpr, *(x for xs in lists for x in xs))


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


def is_vmap_rule(rule: Any) -> bool:
    """Whether the rule of a custom_vmap operation is that of a user's function."""
    return isinstance(rule, custom_batching.ClosedRule)


# -- Primitives that hide their jaxprs -------------------------------------------------------

call_hi_primitive_p = hijax.call_hi_primitive_p
_HiPrim = hijax.VJPHiPrimitive if _flattree is None else hijax.HiPrim


def hidden_jaxprs(prim: Any) -> Iterator[Any]:
    """The jaxprs that an operation of `jax.experimental.hijax` hides in its attributes."""
    for value in prim.params.values():
        if isinstance(value, _HiPrim):
            yield from hidden_jaxprs(value)
        elif isinstance(value, stages.Traced):
            yield value.jaxpr
        else:
            yield from core.jaxprs_in_params({"": value})


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
    at_once = _flattree is not None and type(function) is CustomVJP3
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


def without_derivative(name: str, error: Callable[..., Exception]) -> Any:
    """The primitive of a function that returns its operand, and raises ``error(**params)`` where it
    is differentiated."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, **_: x)
    primitive.def_abstract_eval(lambda x, **_: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda ctx, x, **_: [x])

    def refuse(primals: Any, tangents: Any, **params: Any) -> Any:
        raise error(**params)

    ad.primitive_jvps[primitive] = refuse
    return primitive


RematTraced = ad_checkpoint.RematTraced
Scan3 = loops.Scan3


def remat_with(prim: Any, jaxpr: Any, more: int) -> Any:
    """A checkpointed jaxpr of JAX's next implementation with another one, which takes ``more``
    operands in front."""
    params = dict(prim.params, jaxpr=jaxpr)
    if isinstance(params.get("prevent_cse"), tuple):
        params["prevent_cse"] = (False,) * more + params["prevent_cse"]
    return RematTraced(**params)


def scan3_with(prim: Any, jaxpr: Any, more: int) -> Any:
    """A scan of JAX's next implementation with another body, which takes ``more`` operands in
    front, the same in every step."""
    return Scan3(**dict(prim.params, jaxpr=jaxpr, extensives=[False] * more + prim.extensives))


def is_of_user(prim: Any) -> bool:
    """Whether the class of an operation of `jax.experimental.hijax` is not one of JAX's own."""
    return not type(prim).__module__.startswith("jax.")


def expanded(prim: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of the ``expand`` of an operation of `jax.experimental.hijax`, and what that closes
    over."""
    traced = jit(prim.expand).trace(*prim.in_avals)
    return traced.jaxpr, [*traced.jaxpr.consts, *traced._consts]


def is_high(jaxpr: Any) -> bool:
    """Whether a jaxpr has operations that JAX expands when it compiles it."""
    return jaxpr.is_high


# -- Functions that return flat results ------------------------------------------------------

flat_list = tree_util.FlatTree.flatten_list if _flattree is None else _flattree.flatten_list


# -- Configuration: what shapes a trace is part of JAX's cache keys ---------------------------

_context_signature = core.config_ext.Config(
    "jaxstate_context", None, include_in_jit_key=True, include_in_trace_context=True
)


def trace_context() -> Hashable:
    """All of the configuration that shapes a trace."""
    return config.trace_context()


def trace_context_without_state() -> Hashable:
    """The same for a trace that uses no state."""
    context, signature = config.trace_context(), _context_signature.value
    if signature is None:
        return context
    i = context.index(signature)
    return (*context[:i], None, *context[i + 1 :])


def type_context() -> Hashable:
    """The configuration that shapes the type of a new array."""
    x64 = config.enable_x64.value, config.explicit_x64_dtypes.value
    return (*x64, mesh.get_abstract_mesh())


def default_key_kind() -> str:
    """The kind of random keys that `jax.random.key` makes."""
    return jax.config.jax_default_prng_impl


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


# -- Jitted calls at top level ---------------------------------------------------------------


def _infer(infer: Any, jitted: Jitted, args: Any, kwargs: Any, is_call: bool) -> Any:
    return infer(jitted.fun, jitted.info, args, kwargs)


# How JAX is asked for the jaxpr of a call of a jitted function, or (if not `is_call`) for one
# without a call. A client may replace this.
around_inference: Callable[..., Any] = _infer


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
        return _jit_call(*around_inference(_infer_params, self, args, kwargs, True))


def _jit_call(p: Any, flat: list[Any]) -> JitCall:
    n = len(p.consts)
    names = p.arg_names or ("",) * (len(flat) - n)
    return JitCall(p.params, flat[:n], flat[n:], p.out_tree, ((), names))


_infer_params = pjit._infer_params
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
    run = pjit._run_python_pjit

    def infer_params(fun: Any, info: Any, args: Any, kwargs: Any) -> Any:
        # `lower` and `trace` infer too.
        is_call = sys._getframe(1).f_code is _cache_miss_code
        if not is_call or not core.trace_state_clean() or config.debug_key_reuse.value:
            return around_inference(_infer_params, Jitted(fun, info), args, kwargs, is_call)
        jitted = Jitted(fun, info)
        results = call(jitted, args, kwargs)
        if results is not NotImplemented:
            return _Done(results), ()
        p, flat = around_inference(_infer_params, jitted, args, kwargs, True)
        results = call_traced(jitted, _jit_call(p, flat), args, kwargs)
        return (p, flat) if results is NotImplemented else (_Done(results), ())

    def run_python_pjit(p: Any, flat: Any, fun: Any, args: Any, kwargs: Any) -> Any:
        if type(p) is _Done:
            return p.results, (), None, flat, _NO_JAXPR, None, None, ()
        return run(p, flat, fun, args, kwargs)

    pjit._infer_params = infer_params
    pjit._run_python_pjit = run_python_pjit


def wrap_clear_cache(forget: Callable[[Any], None]) -> None:
    """Calls ``forget(fun)`` when the caches of the jitted function of ``fun`` are cleared."""
    plain = pjit.jit_evict_fn

    def clear_cache(jitted: Any) -> None:
        plain(jitted)
        forget(jitted._fun)

    # JAX sets the method again whenever it makes a jitted function.
    pjit.jit_evict_fn = type(jax.jit(lambda: None)).clear_cache = clear_cache


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
    return pjit._jax.pjit(
        name, never_called, cache_miss, statics, info.static_argnames,
        pxla.JitGlobalCppCacheKeys(), tree_util.dispatch_registry, pxla.cc_shard_arg,
        pjit._cpp_pjit_cache_fun_only,
    )  # fmt: skip


_run_python_pjit = pjit._run_python_pjit


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


def resolved(x: Any) -> Any:
    """``x``; if it is a capture, what it stands for."""
    return canonicalize(x) if type(x) in _captures else x


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


make_jaxpr = jax.make_jaxpr


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
                    if _flattree is None
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


_captures: list[type] = []


def register_tracer_type(tracer_type: type, resolve: Callable[[Any], Any]) -> None:
    """Makes every ``bind`` call ``resolve`` on operands of ``tracer_type``."""
    _captures.append(tracer_type)
    dtypes.register_canonicalize_value_handler(tracer_type, resolve)
    core.pytype_aval_mappings[tracer_type] = lambda tracer: tracer.aval


# `jax.closure_convert` asks whether a constant may carry a tangent by looking at what its tracer
# contains; a JVP tracer says yes.
PERTURBED = object.__new__(JVPTracer)
PERTURBED.primal = PERTURBED.tangent = PERTURBED._trace = None
PERTURBED.aval = ShapedArray((), dtypes.float0)


# -- Functions with custom derivative rules --------------------------------------------------


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


def operand_tree(operands: Any) -> Any:
    """The tree structure of operands. (jax >= 0.11 describes them with a registry of its own.)"""
    if _flattree is None:
        return jax.tree.structure(operands)
    return tree_util.tracing_registry.flatten(operands)[1]


def tree_with_leaves(tree: Any, n: int) -> Any:
    """A tree structure with ``n`` leaves after those of ``tree``."""
    return jax.tree.structure((tree.unflatten(range(tree.num_leaves)), [0] * n))


def map_results(fun: Callable[[Any], Any], out: Any) -> Any:
    """``fun`` of each result of a function with a custom rule, or of one of its rules.

    (jax >= 0.11: a backward rule returns them with logs.)
    """
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], list):
        return [fun(x) for x in out[0]], out[1]
    return [fun(x) for x in out]


def prepend_cotangents(cotangents: list[Any], out: Any) -> Any:
    """What a backward rule returns, with cotangents in front. (jax >= 0.11: with logs.)"""
    if _flattree is not None:
        rest, logs = out
        return [*cotangents, *rest], logs
    return [*cotangents, *out]


# -- The user's program ----------------------------------------------------------------------

# Frames of this package are not the user's: neither in tracebacks nor in `user_location`.
_package = os.path.dirname(os.path.dirname(__file__)) + os.sep
traceback_util.register_exclusion(_package)
source_info_util.register_exclusion(_package)


def user_location() -> str:
    """``file:line`` of the innermost frame that is neither JAX's, jaxstate's, nor Python's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if source_info_util.is_user_filename(name) and not name.startswith("<frozen "):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
        frame = frame.f_back
    return "an unknown line"


def transformations() -> str:
    """What is in progress here, innermost first: "scan of f at a.py:3, in a derivative"."""
    found = (_described(trace) for trace in chain(current_trace()))
    return ", in ".join(text for text in found if text)


def _described(trace: Any) -> str | None:
    if isinstance(trace, BatchTrace):
        return f"vmap over {lane_count(trace)} lanes"
    if isinstance(trace, DIFFERENTIATING):
        return "a derivative"
    info = getattr(getattr(trace, "frame", None), "debug_info", None)
    if info is None:
        return None
    file = (info.func_src_info or "").rpartition(" at ")[2].rpartition(":")[0]
    if file.startswith(_package):
        return None
    user = source_info_util.is_user_filename(file)
    return f"{info.traced_for} of {info.func_src_info}" if user else info.traced_for


def location_of(eqn: Any) -> str:
    """``file:line`` of the user's code that an equation comes from."""
    return source_info_util.summarize(eqn.source_info)


# -- Where JAX calls functions of a program --------------------------------------------------


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
    flat_trees = pe.FlatTree if _flattree is None else pe.ft

    def flatten(x: Any, *args: Any, **kwargs: Any) -> Any:
        trace = core.trace_ctx.trace
        if isinstance(trace, StagingTrace):
            x = result_of(traced_for(trace), x)
        return flat_trees.flatten(x, *args, **kwargs)

    wrapped = _Wrapped(flat_trees, flatten=flatten)
    if _flattree is None:
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


def wrap_copied_arguments(notice: Callable[[Any], None]) -> None:
    """Calls ``notice(arguments)`` with the arguments that JAX puts together of the tracers of a
    derivative or a vmap, before it calls a function with them."""
    cls = tree_util.FlatTree if _flattree is None else _flattree.FlatTree
    unflatten, tree_unflatten = cls.unflatten, batching.tree_unflatten

    def flat_tree_unflatten(flat: Any, *args: Any, **kwargs: Any) -> Any:
        tree = unflatten(flat, *args, **kwargs)
        if isinstance(core.trace_ctx.trace, DIFFERENTIATING):
            notice(tree)
        return tree

    def unflatten_for_vmap(*args: Any) -> Any:
        tree = tree_unflatten(*args)
        if isinstance(core.trace_ctx.trace, BatchTrace):
            notice(tree)
        return tree

    cls.unflatten, batching.tree_unflatten = flat_tree_unflatten, unflatten_for_vmap


def content(x: Any) -> Any:
    """What the tracer of a derivative or a vmap was made of."""
    if isinstance(x, BatchTracer):
        return x.val
    return x.primal if isinstance(x, (JVPTracer, LinearizeTracer)) else x


_MODULES_WITHOUT_CALLBACKS = (
    "jax._src.numpy.", "jax._src.lax.", "jax._src.nn.", "jax._src.random", "jax._src.ops.",
    "jax._src.image.", "jax._src.scipy.special", "jax._src.scipy.stats", "jax._src.scipy.linalg",
    "jax._src.scipy.fft", "jax._src.scipy.signal", "jax._src.prng",
)  # fmt: skip


def calls_no_user(fun: Any) -> bool:
    """Whether a function is of JAX's library and calls none of the program's."""
    if type(fun) is not types.FunctionType or fun.__closure__ is not None:
        return False
    if fun.__code__ in _without_callbacks:
        return True
    module = fun.__globals__.get("__name__", "")
    if not module.startswith(_MODULES_WITHOUT_CALLBACKS):
        return False
    if "control_flow" in module or fun.__name__ == "_piecewise":
        return False
    _without_callbacks.add(fun.__code__)
    return True


_without_callbacks: set[Any] = set()
