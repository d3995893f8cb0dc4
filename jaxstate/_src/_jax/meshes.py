# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Types and values in a mesh of devices: their axes, and how they are sharded."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
from jax._src import config, core, mesh, pjit

from jaxstate._src._jax.jaxprs import equations
from jaxstate._src._jax.names import ShapedArray, make_jaxpr, typeof
from jaxstate._src._jax.types import mesh_of

__all__ = [
    "abstract_mesh",
    "axes_of",
    "device_axes",
    "in_mesh",
    "in_mesh_of",
    "in_mesh_set",
    "into_mesh",
    "mesh_equation",
    "out_of_devices",
    "resharding_equation",
    "type_in_jaxpr",
    "type_in_mesh",
    "use_abstract_mesh",
    "vary",
    "varying_axes",
    "varying_equation",
    "with_axes",
    "with_mesh",
    "with_varying_axes_of",
]


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
