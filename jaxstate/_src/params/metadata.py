"""Metadata: static facts about a parameter or variable, said where it is made.

    w = jaxstate.param("w", init, (4, 8), metadata={"axes": ("embed", "mlp")})

    net.metadata(x)      # {"w": {"axes": ("embed", "mlp")}}, with the paths of net.init(key, x)

What the facts mean is up to those who look at them, but for three names: a stack or ensemble puts
its own axis in front of ``"axes"``, ``apply_with_state(..., mutable=...)`` names ``"collection"``s
of variables, and ``"spec"`` is what a shard_map has of a parameter (`params.pieces`).

The metadata stands in the address of the entry. A store that makes the entries to look at them, and
throws them away, keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxstate._src import _jax
from jaxstate._src.core.slots import Cell
from jaxstate._src.params.entries import EntryAddress, innermost_store
from jaxstate._src.params.entry import Entry, Located, Use
from jaxstate._src.params.names import nested
from jaxstate._src.params.observing import ObservingStore, observe
from jaxstate._src.streams.keys import is_a_key
from jaxstate.errors import ParameterMismatchError, message

__all__ = ["Describable", "Metadata", "PerArray", "checked", "collection_of", "of_copies"]


class Metadata(dict[str, Any]):
    """The metadata of one array: a dict that is a leaf for JAX.

    So ``jax.tree.map(f, params, net.metadata(x))`` calls ``f(array, metadata)``. It is empty for
    what has no metadata.
    """

    __slots__ = ()


class PerArray(NamedTuple):
    """Metadata of each array of a value, in the order of its leaves."""

    values: tuple[Any, ...] = ()


class Describable:
    """What a parametrized object can say of its parameters and variables by tracing alone."""

    fn: Callable[..., Any]

    def metadata(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The metadata of the parameters.

        Nothing is computed: the function is traced.

        Args:
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.

        Returns:
          A nested dict of the structure of ``init(key, *args)``. In the place of each array is
          what was given as ``metadata``, a dict as a `Metadata`, which is a leaf for JAX; an
          empty one, if nothing was given.

        Raises:
          ParameterConflictError: if two uses of a parameter give it different metadata.
          Whatever ``init`` raises.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> from jax.sharding import PartitionSpec
        >>> @jaxstate.parametrized
        ... def net(x):
        ...     init = jax.nn.initializers.ones
        ...     w = jaxstate.param("w", init, (4, 8), metadata={"axes": ("embed", "mlp")})
        ...     return x @ w + jaxstate.param("b", init, (8,))
        >>> metadata = net.metadata(jnp.ones(4))
        >>> metadata == {"w": {"axes": ("embed", "mlp")}, "b": {}}
        True
        >>> rules = {"mlp": "model"}
        >>> def spec(m):
        ...     return PartitionSpec(*map(rules.get, m.get("axes", ())))
        >>> specs = jax.tree.map(spec, metadata)
        >>> specs == {"w": PartitionSpec(None, "model"), "b": PartitionSpec()}
        True
        """
        return described(self, args, kwargs)["parameter"].tree

    def metadata_with_state(
        self, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The metadata of the parameters, and of the variables.

        Args:
          *args, **kwargs: as for `metadata`.

        Returns:
          Two nested dicts of the structures that ``init_with_state(key, *args)`` returns.

        Raises what `metadata` raises; VariableConflictError for variables.
        """
        found = described(self, args, kwargs)
        return found["parameter"].tree, found["variable"].tree


class Described(NamedTuple):
    """The metadata of all entries of a kind.

    Attributes:
      tree: a nested dict.
      leaves: what is in the place of each array.
    """

    tree: dict[str, Any]
    leaves: list[Any]


def described(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Described]:
    """The metadata of the entries of a module that is called so, by kind."""
    found: dict[str, Described] = {}

    def see(store: _DescribingStore) -> None:
        for kind in ("parameter", "variable"):
            entries = store.made(kind)
            leaves = {path: _of_arrays(entry) for path, entry in entries.items()}
            trees: dict[Any, Any] = {p: e.spec and e.spec.tree for p, e in entries.items()}
            tree = {p: trees[p].unflatten(leaves[p]) for p in entries}
            shape = {p: trees[p].unflatten(map(_Place, leaves[p])) for p in entries}
            places = jax.tree.leaves(nested(shape))
            found[kind] = Described(nested(tree), [place.value for place in places])

    try:
        observe(module, args, kwargs, lambda key: _DescribingStore(module._token, key), see)
    except Exception as error:
        if args and is_a_key(args[0]):
            error.add_note("metadata takes no key.\nTo mend it:\n    net.metadata(x)")
        else:
            module._explain(error, "metadata", args, kwargs)
        raise
    return found


class _Place:
    """A leaf for JAX, whatever is in it."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _of_arrays(entry: Entry) -> list[Any]:
    """What is in the place of each array of an entry."""
    given, n = entry.metadata, len(entry.spec.leaves)  # type: ignore[union-attr]
    if isinstance(given, PerArray):
        return list(given.values)
    if given is None or isinstance(given, Mapping):
        return [Metadata(given or {}) for _ in range(n)]
    return [given] * n


class _DescribingStore(ObservingStore):
    """Entries that are made to see their metadata, and thrown away."""

    collects_metadata = True

    def declare(self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Use:
        use = super().declare(address, init, init_args)
        if use.entry is not None:
            _note(use.entry, address)
        return use

    def entry_at(self, place: Located, address: EntryAddress) -> Entry:
        entry = super().entry_at(place, address)
        _note(entry, address)
        return entry

    def known_cell(self, address: EntryAddress) -> Cell | None:
        """None: the cell of a second use would be found without its metadata."""
        return None


def _note(entry: Entry, address: EntryAddress) -> None:
    given, before = address.metadata, entry.metadata
    if before is None:
        entry.metadata = given
    elif given is not None and given is not before and given != before:
        raise address.conflict_error(
            message(
                f"{address.kind.capitalize()} {'/'.join(entry.path)!r} is used twice, with metadata"
                f" {before!r} and {given!r}.",
                fix=f"""
                metadata = {before!r}       # one for all uses, or given in one place only
                """,
                made=entry.used,
                used=address.used,
            )
        )


# -- For those who make entries --------------------------------------------------------------


def checked(metadata: Any, name: str) -> Any:
    """The metadata, if it is static."""
    if isinstance(metadata, PerArray):
        return metadata
    for x in jax.tree.leaves(metadata):
        if isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(
                f"The metadata of {name!r} is static, and was given an array: {x!r}.\n"
                "To mend it:\n"
                '    metadata={"decay": 0.1}                    # a number of Python\n'
                f'    jaxstate.variable("{name}_scale", lambda: array)    # or state of its own'
            )
    return metadata


def collection_of(metadata: Any) -> Any:
    """The collection that a variable is in, or None."""
    return metadata.get("collection") if isinstance(metadata, Mapping) else None


def of_copies(
    block: Any, axis: str | None, args: Callable[[], tuple[Any, ...]], kwargs: dict[str, Any]
) -> tuple[PerArray, PerArray]:
    """The metadata of stacked parameters and variables of a block that is called with ``args()``.

    It takes a trace of the block, and is empty where nobody looks at it.
    """
    store = innermost_store()
    here = set(_jax.abstract_mesh().manual_axes)
    on_devices = store is not None and not here <= store.manual_axes
    if not on_devices and not getattr(store, "collects_metadata", False):
        return PerArray(), PerArray()
    found = described(block, args(), kwargs)
    if on_devices and any("spec" in m for m in found["parameter"].leaves if isinstance(m, dict)):
        raise ParameterMismatchError(
            message(
                f"Parameters of {block.name!r} are cut by their metadata, and its copies are inside"
                " of a shard_map that init or apply is outside of.",
                fix="""
                init = jax.shard_map(net.init, in_specs=(P(), P("data")), out_specs=specs, ...)
                apply = jax.shard_map(net.apply, in_specs=(specs, P("data")), ...)  # inside
                """,
                used=_jax.user_location(),
            )
        )
    params, state = (
        PerArray(tuple(_with_axis(m, axis) for m in found[kind].leaves))
        for kind in ("parameter", "variable")
    )
    return params, state


def _with_axis(metadata: Any, axis: str | None) -> Any:
    if not isinstance(metadata, Metadata):
        return metadata
    metadata = Metadata(metadata)
    for name, first in (("axes", axis), ("spec", None)):
        if isinstance(metadata.get(name), (tuple, list, PartitionSpec)):
            new = (first, *metadata[name])
            is_spec = isinstance(metadata[name], PartitionSpec)
            metadata[name] = PartitionSpec(*new) if is_spec else new
    return metadata
