"""What parameters and variables have in common: how a program refers to them, and who is asked.

Both are entries of a tree, found by name. An *address* says which: the modules and scopes that were
entered, relative to the jaxpr (or custom rule) in which the entry is used, and its name. The store
completes the address with the place where that jaxpr is bound, and gives out names: `params.paths`.
What is special to either is in `params.param` and `params.lanes_of_variables`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import boundaries, boundary_of, innermost_boundary
from jaxstate._src.core.initializers import TracedInit
from jaxstate._src.core.notes import Boundaries, notes_of
from jaxstate._src.core.slots import Address, Cell, Holder, holders, open_here
from jaxstate._src.core.specs import ONLY_LEAF, Leaf, Spec, contrast, same_structure, wanted_spec
from jaxstate._src.params.entry import (
    OUTSIDE,
    Entry,
    Located,
    Use,
    current_home,
    home_of,
    made_and_kept,
    made_and_over,
)
from jaxstate._src.params.paths import (
    Entered,
    FrameId,
    ModuleId,
    NameTable,
    NameTables,
    Origin,
    Path,
    PathElement,
    Root,
    ScopeStack,
    note_kept,
)
from jaxstate.errors import StateError, message

__all__ = [
    "EntryAddress", "RuleStore", "Store", "current_origin", "current_place", "innermost_store",
    "level_entered", "place_of",
]  # fmt: skip


class EntryAddress(Address):
    """One leaf of an entry, relative to the place (holder, jaxpr, custom rule) it is used in.

    Two addresses are equal if they mean the same leaf: what is above the innermost module only
    says where that module's name is given out.

    Attributes:
      levels: the modules and scopes that were entered in that place, outermost first.
      name: of the entry.
      used: ``file:line`` of the call that uses it.
      leaf: which array of the entry's value.
      form: of that value, once it is known.
      traced_init: how to make the entry, if it is being initialized.
      home: the jaxpr in which the address stands, if it stands in one.
      wanted: the type of the leaf, in an address that stands in a jaxpr.
      place: what ``levels`` are relative to, if that is not where the address is used.
      metadata: of the entry, see `params.metadata`.
    """

    may_alias = True

    kind: str
    takes_key: bool
    missing_error: type[StateError]
    mismatch_error: type[StateError]
    conflict_error: type[StateError]

    def __init__(self, name: str, used: str, metadata: Any = None) -> None:
        self.levels: tuple[PathElement, ...] = ()
        self.metadata = metadata
        self.name = name
        self.used = used
        self.leaf: Leaf = ONLY_LEAF
        self.spec: Spec | None = None
        self.traced_init: TracedInit | None = None
        self.home: FrameId | None = None
        self.wanted: Any = None
        self.place: FrameId | None = None
        self._hash: int | None = None  # and with it `_meaning`, once somebody asks
        self._seen: tuple[Any, Any, EntryAddress] | None = None  # see `seen_from`

    def having(self, **changes: Any) -> Any:
        """A copy with other attributes."""
        return self.used_at(self.used, **changes, _hash=None, _seen=None)

    def used_at(self, used: str, **changes: Any) -> Any:
        """The same address, where it is used in another line."""
        new = object.__new__(type(self))
        new.__dict__ = {**self.__dict__, "used": used, **changes}
        return new

    def place_at(self, place: FrameId | None, levels: tuple[PathElement, ...]) -> None:
        """Makes a new address relative to another place."""
        self.place, self.levels, self._hash, self._seen = place, levels, None, None

    def leaves(self, spec: Spec, traced_init: TracedInit | None) -> list[Any]:
        """The addresses of the leaves of an entry of that form; its own, if there is only one."""
        if spec.is_array:
            self.traced_init, self.spec, self.wanted = traced_init, spec, spec.avals[0]
            return [self]
        return [
            self.having(leaf=leaf, traced_init=traced_init, spec=spec, wanted=aval)
            for leaf, aval in zip(spec.leaves, spec.avals, strict=True)
        ]

    def _find_meaning(self) -> tuple[Any, ...]:
        for i in reversed(range(len(self.levels))):
            if self.levels[i].token:
                return self.levels[i:], self.name, self.leaf
        return self.place, self.levels, self.name, self.leaf

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return False
        mine = self._hash or hash(self)
        theirs = other._hash or hash(other)  # type: ignore[attr-defined]
        return mine == theirs and self._meaning == other._meaning  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        if self._hash is None:
            self._meaning = self._find_meaning()
            self._hash = hash(self._meaning)
        return self._hash

    def path_to(self) -> Hashable:
        return self.place, self.levels

    def __repr__(self) -> str:
        path = [*(level.base for level in self.levels), self.name, *self.leaf.path]
        return f"{self.kind} {'/'.join(path)!r}"

    def store(self) -> Store:
        store = innermost_store()
        if store is None:
            raise self.missing()
        return store

    def holder(self) -> Holder:  # who knows one knows all that are threaded, or all that are not
        found, key = open_here().found, (EntryAddress, self.threaded)
        if key not in found:
            found[key] = super().holder()
        return found[key]

    def aval(self) -> Any:
        if self.home is None and self.wanted is not None and _jax.abstract_mesh().empty:
            return self.wanted  # the program has declared it, here, where types know of no mesh
        return super().aval()

    @property
    def is_recalled(self) -> bool:  # type: ignore[override]
        return not self._is_made_anew()

    def cell_here(self) -> Cell | None:
        store = innermost_store()
        return None if store is None or self._is_made_anew() else store.known_cell(self)

    def seen_from(self, boundary: Any) -> EntryAddress:
        store = self.store()
        boundary = None if boundary is store else boundary
        home, run = home_of(boundary), store.run
        levels, place, seen = self.levels, self.place, self._seen
        if place is None:
            levels = store.scopes.inside(boundary) + levels
        elif seen is not None and seen[0] is home and seen[1] is run:
            return seen[2] if seen[2].used is self.used else seen[2].used_at(self.used)
        elif place is home:
            place = None
        levels = tuple([level.inside(home, run) for level in levels])
        new = self.having(levels=levels, place=place, home=home)
        if self.place is not None:
            self._seen = home, run, new
        return new

    def _is_made_anew(self) -> bool:
        """Whether a module on the way to it is made by every use of the jaxpr it stands in."""
        home = self.home
        if home is not None:
            for level in self.levels:
                if level.token is not None and level.token.home is home:
                    return True
        return False

    def renewed(self, use: dict[Any, Any] | None) -> EntryAddress:
        if not self._is_made_anew():
            return self
        if use is None:
            use = self.store().layers().layers[0].renewed
        return self.having(
            levels=tuple(
                PathElement(v.base, _renewed(v.token, self.home, use)) for v in self.levels
            )
        )

    def meaning_here(self) -> Hashable:
        return self.store().meaning_of(self)

    def pinned(self) -> EntryAddress:
        if self.place is not None:
            return self
        home, levels = current_place(self.store(), False)
        return self.having(place=home, levels=levels + self.levels)

    def aliased(self, other: Address) -> Exception:
        return self.conflict_error(
            message(
                f"One function uses {self} in two ways and writes it: with a handle that was made"
                " outside of the function, and by name.",
                fix=f"""
                handle = jaxstate.variable("{self.name}", ...)      # inside: for both uses
                """,
                used=self.used,
                and_used=getattr(other, "used", None),
            )
        )

    @staticmethod
    def initial(init: Callable[..., Any], init_args: tuple[Any, ...], *keys: Any) -> Any:
        """What the initializer makes."""
        return init(*keys, *init_args)

    def form_of_initial(self, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Spec:
        """The form of what the initializer makes, without making it."""
        return wanted_spec(init, init_args, self.takes_key)

    def as_stored(self, value: Any) -> Any:
        """What is kept of a value that the user gives."""
        return _jax.as_array(value)

    def type_as_stored(self, aval: Any) -> Any:
        """The type of what is kept of a value of type ``aval``."""
        return aval

    def initialize(
        self, addresses: Sequence[Any], traced_init: TracedInit, data: Sequence[Any]
    ) -> list[Any]:
        return self.store().initialize(addresses, traced_init, data)

    def changed(self, wanted: Any, value: Any) -> Exception:
        store = self.store()
        path = store.path(store.layers(), self)
        if store.makes_entries and self.spec is not None:
            entry = store.entry(self)
            if entry.spec is not None:
                return self.conflict(path, entry.used, entry.spec, self.spec)
        path = (*path, *self.leaf.path)
        return self.mismatch(path, _jax.shown(_jax.typeof(value)), _jax.shown(wanted))

    def not_given(self) -> Exception:
        """The error for an ``apply`` that was given no entries of this kind at all."""
        raise NotImplementedError

    def refuse_lanes(self, trace: Any) -> Exception:
        """The error for a value per lane of the vmap of ``trace``."""
        raise NotImplementedError

    def mismatch(self, path: Path, found: str, wanted: str) -> Exception:
        """The error for a value of another form than the function makes."""
        return self.mismatch_error(
            message(
                f"{self.kind.capitalize()} {'/'.join(path)!r} is {found}, and the function wants"
                f" {wanted}.",
                fix=self.fix_by_init,
                used=self.used,
            )
        )

    def conflict(self, path: Path, made: str, first: Spec, spec: Spec) -> Exception:
        """The error for one name in one scope that is used for two entries."""
        shown = contrast(first, spec)
        function = "param" if self.kind == "parameter" else "variable"
        return self.conflict_error(
            message(
                f"{self.kind.capitalize()} {'/'.join(path)!r} is used twice, as {shown[0]} and as"
                f" {shown[1]}. The same name in the same scope is the same {self.kind}.",
                fix=f"""
                jaxstate.{function}("{path[-1]}_2", ...)          # another one: another name
                with jaxstate.scope("second"): ...           # or another scope
                second = jaxstate.parametrized(layer)        # or each layer a module of its own
                """,
                made=made,
                used=self.used,
            )
        )

    fix_by_init: str


def _renewed(token: ModuleId | None, home: Any, use: dict[Any, Any]) -> ModuleId | None:
    """The module that one use of a jaxpr makes for one that was made inside of it."""
    if token is None or token.home is not home:
        return token
    if token not in use:
        here = current_origin()
        if token.parent is not None:
            parent = _renewed(token.parent, home, use)
            if token.made is not None:
                note_kept(parent, token.made)
            use[token] = ModuleId(here.home, parent, token.key, here.run)
        else:
            if home not in use:
                use[home] = here.next_key("use")
            use[token] = here.token((use[home], token.key))
    return use[token]


def current_origin() -> Origin:
    """Where a module is made that is made here."""
    store = innermost_store()
    home, parent, scopes, counts, run = current_home(), None, (), None, None
    number, kept = None, frozenset()
    if store is not None:
        boundary, run = place_of(store), store.run
        call, scopes = store.scopes.call_in(boundary)
        if boundary is None:
            home, call = store.home, call or store.call_of_root
        if call is not None:
            parent, counts = call.level.token, call.counts
            number, kept = call.number, call.kept
    if counts is None:
        counts = {} if home is None else home.counts
    return Origin(home, parent, scopes, counts, run, number, kept)


def current_place(store: Store, is_here: bool) -> tuple[FrameId, tuple[PathElement, ...]]:
    """Where in the tree the program is: levels, and what they are relative to.

    ``is_here`` says that `Store.is_here` is known to be true.
    """
    boundary = None if is_here else boundary_of(store)
    return home_of(boundary), store.scopes.inside(boundary)


def place_of(store: Store) -> Any:
    """The innermost boundary between the program and the store, or None."""
    return None if store.is_here() else boundary_of(store)


class Store(Holder):
    """The parameters and variables of one ``init`` or ``apply``, while it runs."""

    # Whether variables may be written: all, or those of certain collections.
    writable: bool | frozenset[str] = True

    # Whether what is not there is made. (Then two uses can differ, and no value is given.)
    makes_entries = False

    def __init__(self, root: ModuleId) -> None:
        super().__init__()
        self.root = root
        self.scopes = ScopeStack()
        self.call_of_root: Any = Entered(None, PathElement("", root), None)
        self.home = current_home()
        self.place = innermost_boundary()
        self.run = object()  # of which this store is, or for which it stands
        self.mesh = _jax.abstract_mesh()
        self.manual_axes = frozenset(self.mesh.manual_axes)  # of the shard_map that it is in

    @functools.cached_property
    def layer(self) -> NameTable:
        """The names that the store has given out, and what it knows of the entries."""
        names = NameTable()
        names.paths[self.root] = ()
        return names

    @functools.cached_property
    def own_layers(self) -> NameTables:
        """The names that are visible where no boundary is around the program."""
        return NameTables([self.layer])

    def knows(self, address: Address) -> bool:
        return isinstance(address, EntryAddress)

    def entered(self, level: PathElement, module: Any = None) -> Any:
        """A context in which the program is in ``level``, the given module if it is one."""
        token, root = level.token, self.call_of_root
        if token is not None and token.made is not None and token.run is self.run:
            is_of_root = root is not None and token.made[0] == root.number
            if not is_of_root and not note_kept(token.parent, token.made):
                raise made_and_kept(level)
        return Entered(self.scopes.entries, level, place_of(self), self, module)

    def root_entered(self, module: Any) -> Any:
        """A context in which the program is in the network itself, which is in no path."""
        return Entered(None, Root(module.name, module._token), None, self, module)

    def is_given(self, path: Path) -> bool:
        """Whether ``apply`` was given something in a module of that path."""
        return False

    def is_here(self) -> bool:
        """Whether nothing of JAX stands between the program and the store.

        Then a cell is all there is to a slot: this is the short way of most reads and writes.
        """
        if _jax.current_trace() is not self.anchor or _jax.abstract_mesh() is not self.mesh:
            return False
        for holder in holders():
            if holder is self:
                return True
            if holder.is_boundary or holder.outside is not None:
                return False
        return False

    def layers(self) -> NameTables:
        """The names visible here: of the boundaries around the program, then the store's own."""
        return self._layers_of(boundaries(self))

    def _layers_of(self, around: Boundaries) -> NameTables:
        found = around.extra.get(self)
        if found is None:
            outer = around.outer
            layers = (
                [*map(self.layer_of, around), self.layer]
                if outer is None
                else [self.layer_of(around[0]), *self._layers_of(outer).layers]
            )
            found = around.extra[self] = NameTables(layers)
        return found

    def layer_of(self, boundary: Any) -> NameTable:
        extra = boundary.extra if isinstance(boundary, Holder) else notes_of(boundary).extra
        layer = extra.get(self)
        if layer is None:
            layer = extra[self] = NameTable()
        return layer

    def without_values(self) -> RuleStore:
        return RuleStore(self)

    def located(self, address: EntryAddress) -> Located:
        here = self.is_here()
        if here and address.place is None and not address.levels:
            path = (*self.scopes.own_path(self.own_layers), address.name)
            return Located(here, self.own_layers, path)
        if here and address.place is OUTSIDE:
            path = (*self.own_layers.path_of(address.levels), address.name)
            return Located(here, self.own_layers, path)
        around = boundaries(self)
        layers = self.own_layers if here else self._layers_of(around)
        return Located(here, layers, self.path(layers, address, around))

    def path(
        self, layers: NameTables, address: EntryAddress, around: Boundaries | None = None
    ) -> Path:
        above = self._above(address, boundaries(self) if around is None else around)
        return (*layers.path_of(above + address.levels), address.name)

    def _above(self, address: EntryAddress, around: Boundaries) -> tuple[PathElement, ...]:
        """The levels around the place that an address is relative to."""
        if address.place is None:
            return self.scopes.inside(None, *around)
        for i, boundary in enumerate(around):
            if home_of(boundary) is address.place:
                return self.scopes.inside(None, *around[i + 1 :])
        if address.place is OUTSIDE:
            return ()
        raise made_and_over(address)

    def meaning_of(self, address: EntryAddress) -> Hashable:
        """What two addresses have in common that mean the same slot here."""
        return self.located(address).path, address.leaf

    def entry(self, address: EntryAddress) -> Entry:
        """What is known here of the entry; noted here if it was not known yet."""
        return self.entry_at(self.located(address), address)

    def entry_at(self, place: Located, address: EntryAddress) -> Entry:
        entry = place.layers.entry(place.path, address.kind)
        if entry is None:
            spec = address.traced_init and address.traced_init.spec
            expected = spec or address.spec
            entry = Entry(address.kind, place.path, spec, expected, address.used)
            place.layers.add_entry(place.path, address.kind, entry)
        elif entry.expected is None:
            entry.expected = address.spec
        elif address.spec and not same_structure(entry.expected.tree, address.spec.tree):
            raise address.conflict(place.path, entry.used, entry.expected, address.spec)
        return entry

    def known_cell(self, address: EntryAddress) -> Cell | None:
        """The cell of a leaf, if it exists and nothing stands between the program and it."""
        if not self.is_here() or address.place not in (None, OUTSIDE):
            return None
        above = self.scopes.inside(None) if address.place is None else ()
        path: Path | None = ()
        for level in (*above, *address.levels):
            path = self.layer.paths.get(level.token) if level.token else (*path, level.base)
            if path is None:
                return None
        entry = self.layer.entries.get((*path, address.name))
        return entry and entry.cells.get(address.leaf)

    def cell(self, address: EntryAddress) -> Cell:  # type: ignore[override]
        place = self.located(address)
        entry = self.entry_at(place, address)
        cell = entry.cells.get(address.leaf)
        if cell is None:
            # Its name is given out by the store, whatever jaxprs are around the program.
            path = place.path if place.here else self.path(self.own_layers, address)
            cell = self.new_cell(entry, address, path)
        return cell

    def new_cell(self, entry: Entry, address: EntryAddress, path: Path) -> Cell:
        """Makes the cell of a leaf of an entry, or takes what was given at ``path``."""
        raise NotImplementedError

    # Whether the store looks at what goes into modules and comes out. (Not by running them: a nest
    # of modules has no more frames of Python than it needs.)
    looks_at_calls = False

    def called(self, module: Any, args: Any, kwargs: Any) -> None:
        """A module is about to run."""

    def returned(self, out: Any) -> None:
        """The module that the program is in has run."""

    def line_with_keys(self, name: str) -> str:
        """How the random stream ``name`` is seeded from outside."""
        if name == "default":
            return "net.apply(params, x, key=key)"
        return f'net.apply(params, x, key={{"default": key, "{name}": other_key}})'

    def declare(self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Use:
        """The use of an entry by the program, here."""
        raise NotImplementedError

    def initialize(
        self, addresses: Sequence[Any], traced_init: TracedInit, data: Sequence[Any]
    ) -> list[Any]:
        """Makes an entry from data: here if the store is here, else in the jaxpr around."""
        raise NotImplementedError

    def refuse_lanes(self, address: EntryAddress, trace: Any) -> Exception:  # type: ignore[override]
        return address.refuse_lanes(trace)


class RuleStore(Store):
    """Stands for a store in a custom derivative rule, which is given the values as operands."""

    def __init__(self, store: Store) -> None:
        super().__init__(ModuleId(None))
        self.writable = store.writable
        self.run = store.run
        self.home = store.home
        self.place = None
        self.manual_axes = store.manual_axes
        self.call_of_root = None
        self._signature = store.signature()

    def signature(self) -> Hashable:
        return self._signature

    def meaning_of(self, address: EntryAddress) -> Hashable:
        return address

    def declare(self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Use:
        spec = address.form_of_initial(init, init_args)
        leaves = address.leaves(spec, None)
        types = tuple(map(_type_given, leaves, spec.avals))
        if types != spec.avals:  # of other dtypes than the initializer makes
            spec = spec._replace(avals=types)
            leaves = address.leaves(spec, None)
        return Use(spec, leaves, None)


def _type_given(address: EntryAddress, wanted: Any) -> Any:
    """The type of what a custom rule is given for a leaf; ``wanted`` if it is given nothing."""
    holder = next((h for h in holders() if h.is_boundary), None)
    try:
        found = wanted if holder is None else holder.aval(address)
    except StateError:
        return wanted
    return found if found.shape == wanted.shape else wanted


def level_entered(store: Store | None, level: PathElement, module: Any = None) -> Any:
    """A context in which the program is in ``level``: of the store, or outside of any."""
    if store is None:
        return Entered(None, level, innermost_boundary(), None, module)
    return store.entered(level, module)


def innermost_store() -> Store | None:
    found = open_here().found
    if Store not in found:
        found[Store] = next((h for h in holders() if isinstance(h, Store)), None)
    return found[Store]
