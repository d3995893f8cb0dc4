"""The store of ``apply``, which is given parameters and variables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import boundaries
from jaxstate._src.core.memory import KeptElement
from jaxstate._src.core.slots import Cell, Memory, signature_changed
from jaxstate._src.core.specs import ONLY_LEAF, Leaf, Spec, names_of
from jaxstate._src.params.entries import EntryAddress, Store
from jaxstate._src.params.entry import Entry, Use
from jaxstate._src.params.given import Given, flattened, type_of_given, with_dicts
from jaxstate._src.params.interned import interned, types_of_arrays
from jaxstate._src.params.paths import ModuleId, NameTable, Path, PathElement

__all__ = ["ApplyStore"]


class ApplyStore(Store):
    """Given parameters and variables.

    Args:
      root: the module that is applied.
      params: a nested dict.
      state: a nested dict of the variables, or None if none was given.
      writable: whether the variables may be written, or the collections that may.
    """

    def __init__(
        self,
        root: ModuleId,
        params: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        writable: bool | frozenset[str] = False,
    ) -> None:
        super().__init__(root)
        self.writable = writable
        trees: dict[str, Any] = {"parameter": params, "variable": state}
        self._leaves, tree = jax.tree.flatten(trees)
        kinds = set(map(type, self._leaves))
        self._may_recall = _jax.are_concrete_arrays(kinds)
        if not self._may_recall and any(issubclass(kind, Mapping) for kind in kinds):
            trees = with_dicts(trees, of_all_mappings=False)  # they are no pytrees
            self._leaves, tree = jax.tree.flatten(trees)
        self._given = Given(trees)
        self._tree = tree
        self.numbered = self._leaves.copy()
        self._numbered_cells: dict[int, KeptElement] = {}
        self._known: _Known | None = None
        if self._may_recall:
            self._leaf_types, self._signature = types_of_arrays(writable, tree, self._leaves)
        else:
            self._leaf_types = tuple(map(type_of_given, self._leaves))
            self._signature = interned(("apply", writable, tree, self._leaf_types))
        self._types_here: Hashable = None  # of what is `_mixed`, in the scope of the program

    @functools.cached_property
    def _types(self) -> dict[int, Any]:
        return dict(zip(map(id, self._leaves), self._leaf_types, strict=True))

    def signature(self) -> Hashable:
        if self._types_here is None:
            return self._signature
        return self._signature, self._types_here

    def entered(self, level: PathElement, module: Any = None) -> Any:
        context = super().entered(level, module)
        return _InOtherTypes(self, context) if self._mixed() else context

    def is_given(self, path: Path) -> bool:
        return self._given.has_scope(path)

    def _mixed(self) -> list[tuple[Path, Any]]:
        """The paths and types of arrays of one name and shape that are not all of one type.

        A function that two scopes use is traced once, unless these say that it has to be traced
        for other types in the second.
        """
        mixed = self._signature.mixed
        if mixed is None:
            pairs, _ = jax.tree_util.tree_flatten_with_path(self._given.trees)
            types = [(names_of(path), self._types[id(x)]) for path, x in pairs]
            found: dict[Any, set[Any]] = {}
            for path, aval in types:
                found.setdefault((path[0], path[-1], np.shape(aval)), set()).add(aval)
            mixed = self._signature.mixed = [
                (path, aval)
                for path, aval in types
                if len(found[path[0], path[-1], np.shape(aval)]) > 1
            ]
        return mixed

    def types_here(self) -> Hashable:
        """The types of what is `_mixed` in the scope that the program is in."""
        levels = self.scopes.inside(None, *boundaries(self))
        path = self.layers().expected_path_of(levels)
        n = len(path) + 1
        return tuple([
            (name[0], name[n:], aval) for name, aval in self._mixed() if name[1:n] == path
        ]) or None  # fmt: skip

    def use_types(self, types: Hashable) -> Hashable:
        """Has functions traced for these types from now on; returns those before."""
        before, self._types_here = self._types_here, types
        if types != before:
            signature_changed()
        return before

    def declare(self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Use:
        if self._given.trees[address.kind] is None:
            raise address.not_given()
        wanted = address.form_of_initial(init, init_args)
        place = self.located(address)
        address.spec = wanted
        entry = self.entry_at(place, address)
        if entry.spec is None:
            if place.layers.layers[0] is self.layer:
                entry.spec = self._found(entry, address, wanted)
            else:
                entry.spec = self._given.guess(address, place.path, wanted)
        elif not entry.spec.same_shapes(wanted):
            raise address.conflict(place.path, entry.used, entry.spec, wanted)
        addresses = address.leaves(entry.spec, None)
        has_cells = place.here and len(entry.cells) == len(addresses)
        return Use(entry.spec, addresses, entry if has_cells else None)

    def aval(self, address: EntryAddress) -> Any:  # type: ignore[override]
        spec = self.entry(address).spec
        return spec.avals[spec.leaves.index(address.leaf)] if spec else address.wanted

    def new_cell(self, entry: Entry, address: EntryAddress, path: Path) -> Cell:
        spec = address.spec
        assert spec is not None
        given = self._given.leaves(address, path, spec)
        value, aval = given[address.leaf.index]
        if aval.shape != address.wanted.shape:
            found = spec._replace(avals=tuple([aval for _, aval in given]))
            raise address.mismatch(path, str(found), str(spec))
        is_stored = address.type_as_stored(aval) is aval
        return self._add_cell(entry, address, address.leaf, value, is_stored)

    def _add_cell(
        self, entry: Entry, address: EntryAddress, leaf: Leaf, value: Any, is_stored: bool
    ) -> Cell:
        """``is_stored`` says whether the value is of the type of what is stored of it."""
        if not is_stored or type(value) not in _jax.plain_arrays:
            # What is kept for all uses is an array of where the store is, and not of the first use.
            with _jax.set_current_trace(self.anchor), _jax.use_abstract_mesh(self.mesh):
                value = address.as_stored(value)
        entry.initial[leaf] = value
        cell = entry.cells[leaf] = entry.new_cell(value)
        return cell

    # What a jitted function finds in the store when it is called at top level is the same in each
    # ``apply`` of the same module to arrays of the same types, if the same calls came before. As
    # long as nothing else looks at the names, there need not be any.

    @functools.cached_property
    def layer(self) -> NameTable:  # type: ignore[override]
        if self._known is None:
            return super().layer
        names = self._known.names.copy()
        for path, (template, number) in self._known.entries.items():
            entry = names.entries[path] = template.without_values()
            entry.initial[ONLY_LEAF] = self._leaves[number]
            is_written = entry.kind == "variable"
            make = self.numbered_cell if is_written else partial(_LeafCell, self.numbered)
            entry.cells[ONLY_LEAF] = make(number)
        return names

    def numbered_cell(self, number: int) -> KeptElement:
        cell = self._numbered_cells.get(number)
        if cell is None:
            cell = self._numbered_cells[number] = KeptElement(self.numbered, number)
        return cell

    def place_here(self) -> Hashable:
        if not self._may_recall or "layer" in self.__dict__ or not self.is_here():
            return None
        return self._signature, self.root, self._known, self.scopes.inside(None)

    def remembered(self, addresses: Sequence[Any]) -> _Memory | None:
        if self.layer.renewed or self.layer.shown or not self.is_here():
            return None
        number_of = self._signature.numbers(self._given.trees)
        entries = {}
        for path, entry in self.layer.entries.items():
            number = number_of.get((entry.kind, *path))
            if number is None or list(entry.initial) != [ONLY_LEAF]:
                return None
            if entry.initial[ONLY_LEAF] is not self._leaves[number]:
                return None  # something is kept in its place
            entries[path] = entry.without_values(), number
        paths = [self.located(a).path for a in addresses]
        numbers = [entries[path][1] for path in paths if path in entries]
        if len(set(numbers)) < len(addresses):
            return None
        known = self._known
        if known is None or not known.is_all_of(self.layer):
            known = _Known(self.layer.copy(), entries)
        return _Memory(known, numbers)

    def recall(self, memory: _Memory) -> None:
        self._known = memory.known

    def state(self) -> dict[str, Any]:
        """The variables as they are now: a new tree, with dicts for modules and scopes."""
        if "layer" not in self.__dict__ and self._signature.is_of_dicts():
            if not _jax.abstract_mesh().empty:
                self.numbered = list(map(_jax.in_mesh, self.numbered))
            return self._tree.unflatten(self.numbered)["variable"]
        now = {
            path: self._value_now(path, entry)
            for path, entry in self.layer.entries.items()
            if entry.kind == "variable" and entry.cells
        }
        state = _copied(self._given.trees["variable"] or {}, {path[:-1] for path in now})
        for path, value in now.items():
            node = state
            for level in path[:-1]:
                node = node[level]
            node[path[-1]] = value
        return state

    def _value_now(self, path: Path, entry: Entry) -> Any:
        """What is in the cells of a variable; as it was given what is in none."""
        given = self._given.scope("variable", path[:-1])[path[-1]]
        assert entry.expected is not None
        if entry.expected.is_array:
            value = entry.cells[ONLY_LEAF].value
            return given if value is entry.initial[ONLY_LEAF] else _jax.in_mesh(value)
        leaves, tree = flattened(given, entry.expected.tree)
        for leaf, cell in entry.cells.items():
            if cell.value is not entry.initial[leaf]:
                leaves[leaf.index] = _jax.in_mesh(cell.value)
        return tree.unflatten(leaves)

    def _found(self, entry: Entry, address: EntryAddress, wanted: Spec) -> Spec:
        """Makes the cells of an entry, and gives the form of what was given; an error if it is not
        of the wanted structure and shapes."""
        if not wanted.leaves:
            scope = self._given.scope(address.kind, entry.path[:-1]) or {}
            if entry.path[-1] not in scope:  # nothing is to be given
                return wanted
        given = self._given.leaves(address, entry.path, wanted)
        types = tuple([address.type_as_stored(aval) for _, aval in given])
        if types == wanted.avals:
            found = wanted
        else:
            found = wanted._replace(avals=types)
            if not found.same_shapes(wanted):
                raise address.mismatch(entry.path, str(found), str(wanted))
        for leaf, (value, aval), stored in zip(wanted.leaves, given, types, strict=True):
            if leaf not in entry.cells:
                self._add_cell(entry, address, leaf, value, stored is aval)
        return found


class _Known:
    """The names that a store had given out at one time, and what it knew of the entries.

    Attributes:
      entries: for each path an entry without values, and the number of its value.
    """

    def __init__(self, names: NameTable, entries: dict[Path, tuple[Entry, int]]) -> None:
        self.names = names
        self.entries = entries

    def is_all_of(self, names: NameTable) -> bool:
        """Whether nothing came to be known since, where ``names`` began with these."""
        return (
            len(names.entries) == len(self.entries)
            and len(names.taken) == len(self.names.taken)
            and len(names.paths) == len(self.names.paths)
        )


class _Memory(Memory):
    def __init__(self, known: _Known, numbers: list[int]) -> None:
        self.known = known
        self.numbers = numbers


class _LeafCell(Cell):
    """The cell of one of many values."""

    __slots__ = ("_number", "_values")

    def __init__(self, values: list[Any], number: int) -> None:
        self._values = values
        self._number = number

    @property
    def value(self) -> Any:  # type: ignore[override]
        return self._values[self._number]


class _InOtherTypes:
    """One level that the program is in, where parameters may have other types than outside."""

    __slots__ = ("_before", "_level", "_store")

    def __init__(self, store: ApplyStore, level: Any) -> None:
        self._store = store
        self._level = level

    def __enter__(self) -> None:
        self._level.__enter__()
        self._before = self._store.use_types(self._store.types_here())

    def __exit__(self, *error: object) -> None:
        self._level.__exit__(*error)
        self._store.use_types(self._before)


def _copied(node: Any, levels: set[Path], path: Path = ()) -> Any:
    """A tree of variables as a new tree of the same arrays.

    What leads to one of ``levels`` is a module or scope, and becomes a dict.
    """
    if type(node) is dict or (
        isinstance(node, Mapping) and any(level[: len(path)] == path for level in levels)
    ):
        return {k: _copied(v, levels, (*path, k)) for k, v in node.items()}
    return jax.tree.map(lambda x: x, node)
