"""Pieces: what a device of a shard_map has of a parameter that is cut.

    w = jaxstate.param("w", init, (8, 16), metadata={"spec": PartitionSpec("data")})

Inside a `jax.shard_map` over "data" this is the device's own rows, as if ``w`` were an argument
with that spec. Elsewhere the spec is a fact like others.

If ``init`` or ``apply`` is called on the devices, it makes or is given pieces: the initializer
makes the whole and takes the piece, and all else follows from that. If it is called outside of the
shard_map, the parameter enters the shard_map whole, like whatever a function closes over, and the
piece is taken where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxstate._src import _jax
from jaxstate.errors import ParameterMismatchError, message

__all__ = ["Pieces", "pieces_here"]


class Pieces:
    """How a parameter is cut where the program is.

    Attributes:
      spec: for the axes of the array, those of the mesh.
      given: the mesh axes over which the store has pieces, or makes them.
      inside: those of a shard_map inside of which the program is, and the store is not.
    """

    def __init__(
        self, name: str, spec: PartitionSpec, given: frozenset[Any], inside: frozenset[Any]
    ) -> None:
        self.name = name
        self.spec = spec
        self.given = given
        self.inside = inside

    def made_by(self, init: Callable[..., Any]) -> Callable[..., Any]:
        """The initializer of what the store has."""
        return lambda *args: self.taken(init(*args), self.given) if self.given else init(*args)

    def of(self, value: Any) -> Any:
        """What the program sees of what the store has."""
        return self.taken(value, self.inside)

    def taken(self, value: Any, axes: frozenset[Any]) -> Any:
        """The piece of a value that is cut over those mesh axes."""
        if not axes:
            return value
        return jax.tree.map(lambda x: self._piece(x, axes), value)

    def _piece(self, x: Any, axes: frozenset[Any]) -> Any:
        spec = self.spec
        if len(spec) > x.ndim:
            raise self._misfit(x, f"an array of {x.ndim} axes")
        for dim, names in enumerate(spec):
            names = names if isinstance(names, tuple) else (names,)
            for name in names:
                if name not in axes:
                    continue
                n = jax.lax.axis_size(name)
                if x.shape[dim] % n:
                    raise self._misfit(x, f"{x.shape[dim]} elements in {n} equal pieces")
                size = x.shape[dim] // n
                start = jax.lax.axis_index(name) * size
                x = jax.lax.dynamic_slice_in_dim(_jax.vary(x, frozenset([name])), start, size, dim)
        return x

    def _misfit(self, x: Any, what: str) -> Exception:
        return ParameterMismatchError(
            message(
                f"Parameter {self.name!r} is {_jax.typeof(x).str_short()} and cut by {self.spec},"
                f" which cannot be: {what}.",
                fix="""
                metadata={"spec": jax.P("data", None)}   # axes of the mesh for those of the array
                """,
                used=_jax.user_location(),
            )
        )


def pieces_here(name: str, metadata: Any, store: Any) -> Pieces | None:
    """How a parameter of a store is cut here, if it is."""
    spec = metadata.get("spec") if isinstance(metadata, Mapping) else None
    if not isinstance(spec, PartitionSpec):
        return None
    here = frozenset(_jax.abstract_mesh().manual_axes)
    return Pieces(name, spec, here & store.manual_axes, here - store.manual_axes) if here else None
