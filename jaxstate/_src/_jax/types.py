# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Values and types, and sizes, which may be symbolic (`jax.export`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import array, core, dtypes, indexing, pjit
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax
from jax._src.nn import initializers

from jaxstate._src._jax.jaxprs import out_avals
from jaxstate._src._jax.names import (
    BatchTracer,
    JVPTracer,
    LinearizeTracer,
    ShapedArray,
    Tracer,
    eval_trace,
    set_current_trace,
    typeof,
)

__all__ = [
    "DynamicSlice",
    "InconclusiveDimensionOperation",
    "are_concrete_arrays",
    "as_array",
    "aval_of",
    "beside",
    "broadcast_like",
    "broadcast_shapes",
    "canonicalize",
    "children_of",
    "concrete",
    "divided_sizes",
    "has_tangent",
    "is_array_like",
    "is_concrete_array",
    "is_explicitly_sharded",
    "is_known",
    "is_plain_array",
    "is_size",
    "is_standard_initializer",
    "is_tracer",
    "is_typed_key",
    "is_uncommitted",
    "is_weak",
    "mesh_of",
    "of_type",
    "plain_arrays",
    "refuse_user_type",
    "same_aval",
    "same_place",
    "same_sharding",
    "same_size",
    "same_type",
    "sharded_like",
    "shown",
    "size_value",
    "slice_of_axis",
    "stand_in_size",
    "stands_for",
    "type_of",
    "type_of_array",
    "type_of_part",
    "weak",
    "with_weak_type_of",
    "zeros",
]


def canonicalize(x: Any) -> Any:
    """What JAX makes of an operand before it looks at it: a capture becomes its value."""
    return dtypes.canonicalize_value(x)


def concrete(x: Any) -> Any:
    """The concrete value behind a tracer, or None."""
    return core.to_concrete_value(x)


def is_known(x: Any) -> bool:
    """Whether Python can branch on ``x``."""
    return not isinstance(x, Tracer) or core.is_concrete(x)


# JAX's own arrays and tracers: what needs no conversion, and has its type as an attribute.
plain_arrays = frozenset(
    {array.ArrayImpl, pe.DynamicJaxprTracer, BatchTracer, JVPTracer, LinearizeTracer}
)


def is_plain_array(x: Any) -> bool:
    """Whether ``x`` is an array or tracer of JAX's own, and no subclass or relative of these."""
    return type(x) in plain_arrays


def is_concrete_array(x: Any) -> bool:
    """Whether ``x`` is an array of JAX's, and no tracer."""
    return type(x) is array.ArrayImpl


def are_concrete_arrays(kinds: set[type]) -> bool:
    """Whether these are the types of JAX's own arrays only, and not of tracers."""
    return kinds <= {array.ArrayImpl}


type_of_array = operator.attrgetter("aval")  # where `are_concrete_arrays`


def is_uncommitted(x: Any) -> bool:
    """Whether ``x`` is an array, or a key, that goes along to the devices of other operands."""
    if type(x) is not array.ArrayImpl:
        x = None if isinstance(x, Tracer) else getattr(x, "_base_array", None)
    return type(x) is array.ArrayImpl and not x._committed


def beside(place: Any, x: Any) -> Any:
    """The scalar ``x`` on the devices of the array, or key, ``place``, and bound to them or not as
    that is. Where either is traced, ``x``."""
    if isinstance(place, Tracer) or isinstance(x, Tracer):  # (a tracer takes long to say no)
        return x
    place = getattr(place, "_base_array", place)
    if type(place) is not array.ArrayImpl:
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
    if type(x) in plain_arrays or isinstance(x, (jax.Array, Tracer)):
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
    return type(x) in plain_arrays or type_of(x) is not None


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


def mesh_of(aval: Any) -> Any:
    """The mesh that a type knows of, or None."""
    found = getattr(getattr(aval, "sharding", None), "mesh", None)
    return None if found is None or found.empty else found


def has_tangent(aval: Any) -> bool:
    """Whether values of the type have derivatives."""
    return getattr(aval.to_tangent_aval(), "dtype", dtypes.float0) != dtypes.float0


def is_tracer(x: Any) -> bool:
    return isinstance(x, Tracer)


def is_typed_key(x: Any) -> bool:
    """Whether an array, or a type, is one of `jax.random.key`."""
    return hasattr(x, "dtype") and dtypes.issubdtype(x.dtype, dtypes.prng_key)


_globals_of_initializers = vars(initializers)


def is_standard_initializer(init: Any) -> bool:
    """Whether ``init(key, shape, ...)`` is one of `jax.nn.initializers`: its first argument is the
    shape of what it makes. (``functools.wraps`` may give any other the same ``__module__``.)"""
    return getattr(init, "__globals__", None) is _globals_of_initializers


def children_of(x: Any) -> Sequence[Any] | None:
    """The children of a node of a pytree; None for a leaf."""
    found = jax.tree_util.default_registry.flatten_one_level(x)
    return None if found is None else tuple(found[0])
