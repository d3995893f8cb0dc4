"""The stores of ``init``, which makes parameters and variables, and of ``apply``, which is given
them.

* `InitStore` makes an entry when an address of it is resolved for the first time.
* `ApplyStore` looks it up in the given dicts.

In a custom derivative rule, `entries.RuleStore` stands for either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import boundaries, same_trace
from jaxstate._src.core.memory import KeptElement
from jaxstate._src.core.slots import Cell, Memory, signature_changed
from jaxstate._src.core.specs import (
    ONE_ARRAY,
    ONLY_LEAF,
    Leaf,
    Spec,
    contrast,
    names_of,
    same_structure,
    spec_of,
)
from jaxstate._src.params.entries import EntryAddress, Store
from jaxstate._src.params.entry import Entry, Use
from jaxstate._src.params.interned import interned, types_of_arrays
from jaxstate._src.params.paths import ModuleId, NameTable, Path, PathElement
from jaxstate.errors import InitializerDataError, message, nearest

__all__ = ["ApplyStore", "data_in_custom_rule", "data_on_devices", "flattened", "lowered"]


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
        self._given = {"parameter": params, "variable": state}
        self._scopes: dict[tuple[str, Path], Mapping[str, Any]] = {}
        self._guesses: dict[str, _Guess] = {}
        self._leaves, tree = jax.tree.flatten(self._given)
        kinds = set(map(type, self._leaves))
        self._may_recall = _jax.are_concrete_arrays(kinds)
        if not self._may_recall and any(issubclass(kind, Mapping) for kind in kinds):
            self._given = _with_dicts(self._given, of_all_mappings=False)  # they are no pytrees
            self._leaves, tree = jax.tree.flatten(self._given)
        self._tree = tree
        self.numbered = self._leaves.copy()
        self._numbered_cells: dict[int, KeptElement] = {}
        self._known: _Known | None = None
        if self._may_recall:
            self._leaf_types, self._signature = types_of_arrays(writable, tree, self._leaves)
        else:
            self._leaf_types = tuple(map(_type_of, self._leaves))
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
        return any(self._scope(kind, path) is not None for kind in self._given)

    def _mixed(self) -> list[tuple[Path, Any]]:
        """The paths and types of arrays of one name and shape that are not all of one type.

        A function that two scopes use is traced once, unless these say that it has to be traced
        for other types in the second.
        """
        mixed = self._signature.mixed
        if mixed is None:
            pairs, _ = jax.tree_util.tree_flatten_with_path(self._given)
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
        if self._given[address.kind] is None:
            raise address.not_given()
        wanted = address.form_of_initial(init, init_args)
        place = self.located(address)
        address.spec = wanted
        entry = self.entry_at(place, address)
        if entry.spec is None:
            if place.layers.layers[0] is self.layer:
                entry.spec = self._found(entry, address, wanted)
            else:
                entry.spec = self._guess(address, place.path, wanted)
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
        given = self._given_leaves(address, path, spec)
        value, aval = given[address.leaf.index]
        if aval.shape != address.wanted.shape:
            found = spec._replace(avals=tuple([aval for _, aval in given]))
            raise address.mismatch(path, str(found), str(spec))
        is_stored = address.type_as_stored(aval) is aval
        return _add_cell(entry, address, address.leaf, value, is_stored)

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
        number_of = self._signature.numbers(self._given)
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
        state = _copied(self._given["variable"] or {}, {path[:-1] for path in now})
        for path, value in now.items():
            node = state
            for level in path[:-1]:
                node = node[level]
            node[path[-1]] = value
        return state

    def _value_now(self, path: Path, entry: Entry) -> Any:
        """What is in the cells of a variable; as it was given what is in none."""
        given = self._scope("variable", path[:-1])[path[-1]]
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
            scope = self._scope(address.kind, entry.path[:-1]) or {}
            if entry.path[-1] not in scope:  # nothing is to be given
                return wanted
        given = self._given_leaves(address, entry.path, wanted)
        types = tuple([address.type_as_stored(aval) for _, aval in given])
        if types == wanted.avals:
            found = wanted
        else:
            found = wanted._replace(avals=types)
            if not found.same_shapes(wanted):
                raise address.mismatch(entry.path, str(found), str(wanted))
        for leaf, (value, aval), stored in zip(wanted.leaves, given, types, strict=True):
            if leaf not in entry.cells:
                _add_cell(entry, address, leaf, value, stored is aval)
        return found

    def _guess(self, address: EntryAddress, path: Path, wanted: Spec) -> Spec:
        """The form of what was given, as far as a jaxpr under construction can know it.

        The names that count are given out when that jaxpr is bound, and what is found then is
        compared with the guess. The function says all but the dtypes. Those of the entry at
        ``path``, if it fits, or of the only entry of that name and shape, are right unless
        jaxprs are bound in another order than they were traced.
        """
        guess = self._guesses.get(address.kind)
        if guess is None:
            given, _ = jax.tree_util.tree_flatten_with_path(self._given[address.kind] or {})
            guess = self._guesses[address.kind] = _Guess(
                {
                    names_of(path): address.type_as_stored(_jax.typeof(x))
                    for path, x in given
                    if _jax.is_array_like(x)
                }
            )
        avals = [
            guess((*path, *leaf.path), len(leaf.path) + 1, aval)
            for leaf, aval in zip(wanted.leaves, wanted.avals, strict=True)
        ]
        return wanted if tuple(avals) == wanted.avals else wanted._replace(avals=tuple(avals))

    def _given_leaves(
        self, address: EntryAddress, path: Path, wanted: Spec
    ) -> list[tuple[Any, Any]]:
        """The arrays of what was given at ``path``, and their types; an error if nothing was given,
        or something of another structure."""
        scope = self._scope(address.kind, path[:-1])
        if scope is None or path[-1] not in scope:
            raise _missing(address, path, self._given, wanted)
        found = scope[path[-1]]
        if wanted.is_array:
            leaves = [found]
        else:
            leaves, structure = flattened(found, wanted.tree)
            if not same_structure(structure, wanted.tree):
                raise self._other_structure(address, path, found, wanted)
        avals = [
            leaf.aval if type(leaf) in _jax.plain_arrays else _type_of(leaf) for leaf in leaves
        ]
        if type in map(type, avals):
            raise self._other_structure(address, path, found, wanted)
        return list(zip(leaves, avals, strict=True))

    def _other_structure(
        self, address: EntryAddress, path: Path, found: Any, wanted: Spec
    ) -> Exception:
        """The error for what is no tree of arrays of the wanted structure."""
        structure = jax.tree.structure(found)
        if all(map(_jax.is_array_like, jax.tree.leaves(found))):
            return address.mismatch(path, *contrast(spec_of(found), wanted))
        return address.mismatch(
            path, repr(found) if structure == ONE_ARRAY else str(structure), str(wanted)
        )

    def _scope(self, kind: str, path: Path) -> Any:
        """The given dict at ``path``, or None. Each is looked up in the one around it, once."""
        scope: Any = self._scopes.get((kind, path))
        if scope is not None:
            return scope
        n = len(path)
        while n and (kind, path[:n]) not in self._scopes:
            n -= 1
        scope = self._scopes.get((kind, path[:n]), self._given[kind])
        for i in range(n, len(path) + 1):
            scope = scope if i == n else scope.get(path[i - 1])
            if type(scope) is not dict and not isinstance(scope, Mapping):
                return None
            self._scopes[kind, path[:i]] = scope
        return scope


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


def _add_cell(entry: Entry, address: EntryAddress, leaf: Leaf, value: Any, is_stored: bool) -> Cell:
    """``is_stored`` says whether the value is of the type of what is stored of it."""
    if not is_stored or type(value) not in _jax.plain_arrays:
        value = address.as_stored(value)
    entry.initial[leaf] = value
    cell = entry.cells[leaf] = entry.new_cell(value)
    return cell


class _Guess:
    """The type of a leaf that may get another path: see `ApplyStore._guess`."""

    def __init__(self, types: dict[Path, Any]) -> None:
        self.types = types
        self._by_name: dict[int, dict[Any, set[Any]]] = {}  # by how many last names are compared

    def __call__(self, path: Path, n: int, wanted: Any) -> Any:
        found = self.types.get(path)
        if found is not None and found.shape == wanted.shape:
            return found
        types = self._types_of(n).get((path[-n:], wanted.shape), ())
        if len(types) == 1:
            return next(iter(types))
        return _jax.ShapedArray(wanted.shape, wanted.dtype)

    def _types_of(self, n: int) -> dict[Any, set[Any]]:
        if n not in self._by_name:
            by_name = self._by_name[n] = {}
            for path, aval in self.types.items():
                by_name.setdefault((path[-n:], aval.shape), set()).add(aval)
        return self._by_name[n]


def _missing(address: EntryAddress, path: Path, given: Any, wanted: Any) -> Exception:
    """The error for a path that is not in the dict that was given for its kind."""
    node, i = given[address.kind], 0
    while isinstance(node, Mapping) and path[i] in node:
        node, i = node[path[i]], i + 1
    names = sorted(map(str, node)) if isinstance(node, Mapping) else []
    where = f"in {'/'.join(path[:i])!r}" if i else "at the top"
    other, fix = _of_other_network(address, path, given)
    if not other:
        close = nearest(path[i], names)
        other = f" The nearest name is {close!r}." if close else ""
        fix = address.fix_by_init
    return address.missing_error(
        message(
            f"apply was given no {address.kind} {'/'.join(path)!r}: {path[i]!r} is not among what"
            f" is {where}: {', '.join(map(repr, names)) or 'nothing'}.{other}",
            fix=fix,
            wanted=str(wanted),
            used=address.used,
        )
    )


def _of_other_network(address: EntryAddress, path: Path, given: Any) -> tuple[str, str]:
    """What to say if the dict is of the other kind, of a network around this one, or of a part."""
    is_parameter = address.kind == "parameter"
    other = "variable" if is_parameter else "parameter"
    if _has(given[other], path):
        what = f" It is among the {other}s that were given: were the two exchanged?"
        return what, "y, state = net.apply_with_state(params, state, x)      # parameters first"
    given = given[address.kind]
    whole = "params" if is_parameter else "state"
    call = "apply({}, x)" if is_parameter else "apply_with_state(params, {}, x)"
    for outer, part in _parts(given):
        if _has(part, path):
            of_part = whole + "".join(f'["{name}"]' for name in outer)
            return (
                f" It is in {of_part}: these are the {address.kind}s of a network in which this one"
                " is a part.",
                f"net.{call.format(of_part)}      # of the part",
            )
    for n in range(1, len(path)):
        if _has(given, path[n:]):
            return (
                f" {'/'.join(path[n:])!r} is: these are the {address.kind}s of the part"
                f" {'/'.join(path[:n])!r} alone.",
                f"{path[n - 1]}.{call.format(whole)}      # the part; or all {address.kind}s",
            )
    return "", ""


def _parts(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The dicts in a nested dict, with their paths: those that are further up first."""
    level: list[tuple[tuple[str, ...], Any]] = [((), tree)] if isinstance(tree, Mapping) else []
    while level:
        level = [
            ((*outer, name), part)
            for outer, node in level
            for name, part in node.items()
            if isinstance(part, Mapping)
        ]
        yield from level


def _has(tree: Any, path: Path) -> bool:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def lowered(data: Any, address: EntryAddress, anchor: Any) -> Any:
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


def data_in_custom_rule(address: EntryAddress) -> Exception:
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


def data_on_devices(address: EntryAddress) -> Exception:
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


def _copied(node: Any, levels: set[Path], path: Path = ()) -> Any:
    """A tree of variables as a new tree of the same arrays.

    What leads to one of ``levels`` is a module or scope, and becomes a dict.
    """
    if type(node) is dict or (
        isinstance(node, Mapping) and any(level[: len(path)] == path for level in levels)
    ):
        return {k: _copied(v, levels, (*path, k)) for k, v in node.items()}
    return jax.tree.map(lambda x: x, node)


def flattened(value: Any, tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a value that should be of the structure ``tree``, in which
    a dict may stand for another mapping."""
    leaves, structure = jax.tree.flatten(value)
    if not same_structure(structure, tree):
        again, with_dicts = jax.tree.flatten(_with_dicts(value))
        if same_structure(with_dicts, tree):
            return again, with_dicts
    return leaves, structure


def _with_dicts(tree: Any, of_all_mappings: bool = True) -> Any:
    """A tree with dicts in the place of other mappings, or of those that are leaves for JAX."""

    def is_mapping(x: Any) -> bool:
        return isinstance(x, Mapping)

    def as_dict(x: Any) -> Any:
        if not is_mapping(x):
            return x
        return {k: _with_dicts(v, of_all_mappings) for k, v in x.items()}

    return jax.tree.map(as_dict, tree, is_leaf=is_mapping if of_all_mappings else None)


def _type_of(x: Any) -> Any:
    """The type of an array; of anything else, its class."""
    if type(x) in _jax.plain_arrays:
        return x.aval
    return _jax.typeof(x) if _jax.is_array_like(x) else type(x)
