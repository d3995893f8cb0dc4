"""The store of `init`, which makes parameters and variables where they are first used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import boundary_of, same_trace
from jaxstate._src.core.initializers import (
    TracedInit,
    init_p,
    initialize_at,
    initializer_at,
    words_of,
)
from jaxstate._src.core.notes import notes_of
from jaxstate._src.core.resolve import read_at
from jaxstate._src.core.slots import Cell, Holder, holders
from jaxstate._src.params.entries import EntryAddress, Store
from jaxstate._src.params.entry import Entry, Use
from jaxstate._src.params.paths import ModuleId, NameTables, Path
from jaxstate.errors import InitializerDataError, message

__all__ = ["InitStore"]


class InitStore(Store):
    """Parameters and variables being made."""

    makes_entries = True

    def __init__(self, root: ModuleId, key: Any) -> None:
        super().__init__(root)
        self.key = key
        self.key_aval = _jax.typeof(key)

    def signature(self) -> Hashable:
        return ("init", self.key_aval)

    def aval(self, address: EntryAddress) -> Any:  # type: ignore[override]
        spec = self.entry(address).spec
        assert spec is not None
        return spec.avals[spec.leaves.index(address.leaf)]

    def varies_over(self, address: EntryAddress, read: Any) -> frozenset[Any]:  # type: ignore[override]
        """All there are: to read would be to make it, and nobody sees what ``init`` computes."""
        return _jax.device_axes()

    def declare(self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Use:
        with _jax.out_of_devices(self.mesh):
            key_aval = self.key_aval
            if _jax.mesh_of(key_aval) is not None:
                key_aval = _jax.type_in_mesh(key_aval, _jax.abstract_mesh())
            traced_init, data = initializer_at(
                address, init, init_args, *[key_aval] * address.takes_key
            )
        address.traced_init = traced_init
        place = self.located(address)
        entry = place.layers.entry(place.path, address.kind)
        if entry is not None:
            if not entry.spec.same(traced_init.spec):
                raise address.conflict(place.path, entry.used, entry.spec, traced_init.spec)
        elif data:
            initialize_at(address.leaves(traced_init.spec, traced_init), traced_init, data)
        elif place.here:
            entry = self.entry_at(place, address)
        addresses = address.leaves(traced_init.spec, traced_init)
        if entry is None or not place.here:
            return Use(traced_init.spec, addresses, None)
        if not entry.cells:
            self.make(entry, address, (), place.path)
        return Use(traced_init.spec, addresses, entry)

    def new_cell(self, entry: Entry, address: EntryAddress, path: Path) -> Cell:
        self.make(entry, address, (), path)
        return entry.cells[address.leaf]

    def make(self, entry: Entry, address: EntryAddress, data: Sequence[Any], path: Path) -> None:
        """Makes an entry from the initializer in its address."""
        traced_init = address.traced_init
        assert traced_init is not None
        with _jax.set_current_trace(self.anchor), _jax.use_abstract_mesh(traced_init.mesh):
            data = list(map(_jax.in_mesh, data))
            if address.takes_key:
                key = _jax.in_mesh(self.key)
                values = traced_init.run_with_key(data, key, words_of("/".join(path)))
            else:
                values = traced_init.run(data)
            leaves = [_jax.in_mesh(_jax.as_array(value), self.mesh) for value in values]
        entry.initial = dict(zip(traced_init.spec.leaves, leaves, strict=True))
        entry.cells = {leaf: entry.new_cell(value) for leaf, value in entry.initial.items()}

    def initialize(
        self, addresses: Sequence[Any], traced_init: TracedInit, data: Sequence[Any]
    ) -> list[Any]:
        address = addresses[0].having(traced_init=traced_init)
        place = self.located(address)
        if place.layers.entry(place.path, address.kind) is None:
            entry = self.entry_at(place, address)
            data = [_lowered(d, address, self.anchor) for d in map(_jax.canonicalize, data)]
            boundary = boundary_of(self)
            if boundary is None:
                self.make(entry, address, data, self.path(NameTables([self.layer]), address))
            elif isinstance(boundary, Holder):
                raise _data_in_custom_rule(address)
            elif self._devices_are_inside():
                raise _data_on_devices(address)
            else:
                keys = tuple(a.seen_from(boundary) for a in addresses)
                leaves = _jax.stage(
                    boundary, init_p, data, dict(addresses=keys, traced_init=traced_init)
                )
                notes_of(boundary).values.update(zip(keys, leaves, strict=True))
        return [read_at(a) for a in addresses]

    def _devices_are_inside(self) -> bool:
        """Whether the program is in a shard_map that the store is outside of."""
        inside = (h for h in holders() if h.age > self.age)
        return any(h.outside is not None and not h.is_boundary for h in inside)

    def made(self, kind: str) -> dict[Path, Entry]:
        """All entries of a kind that have an array."""
        entries = self.layer.entries.items()
        return {path: entry for path, entry in entries if entry.kind == kind and entry.initial}

    def initial_values(self, kind: str) -> dict[Path, Any]:
        """What all entries of a kind start with: path -> value."""
        return {
            path: entry.spec.tree.unflatten(entry.initial.values())  # type: ignore[union-attr]
            for path, entry in self.made(kind).items()
        }


def _lowered(data: Any, address: EntryAddress, anchor: Any) -> Any:
    """The value under ``anchor`` that an initializer may keep of data in the middle of a
    transformation inside of it."""
    while isinstance(data, (_jax.JVPTracer, _jax.LinearizeTracer, _jax.BatchTracer)):
        if any(same_trace(data._trace, trace) for trace in _jax.chain(anchor)):
            break
        if isinstance(data, _jax.BatchTracer):
            if data.batch_dim is not None:
                raise InitializerDataError(
                    message(
                        f"The initializer of {address} looks at data that differs between the"
                        " lanes of a vmap, and the lanes share the parameter.",
                        fix="""
                        w = jaxstate.param("w", init, xs)                # outside, from all lanes
                        params = jax.vmap(net.init, (None, 0))(key, xs)  # or one net per lane
                        """,
                        used=address.used,
                    )
                )
            data = data.val
        else:
            data = data.primal
    return data


def _data_in_custom_rule(address: EntryAddress) -> Exception:
    return InitializerDataError(
        message(
            f"The initializer of {address} looks at data inside a function with a custom"
            " derivative rule.",
            fix="""
            w = jaxstate.param("w", init, x)      # before the call of the function
            """,
            used=address.used,
        )
    )


def _data_on_devices(address: EntryAddress) -> Exception:
    return InitializerDataError(
        message(
            f"The initializer of {address} looks at data inside a shard_map, where every device has"
            " its own, and the devices share what it makes.",
            fix="""
            w = jaxstate.param("w", init, xs)     # before the call of the mapped function, from xs
            """,
            used=address.used,
        )
    )
