"""Where in the tree of parameters the program is, and which names have been given out.

A *level* is one step of a path: a module (a parametrized object, known by its token, named after
its function) or a scope opened by hand. Names are given out in the order in which slots are first
used, with a suffix on a clash: ``dense``, ``dense_1``.

A jaxpr must not fix the names: it may be cached and bound again in another scope, and JAX traces
some bodies twice and throws one away. So an address in a jaxpr has levels relative to that jaxpr,
and whatever names are needed while it is built (to look up the type of a parameter) go to a
`NameTable` that ends with it. The names that count are given out where the holder itself resolves
the address.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

from jaxstate._src import _jax
from jaxstate._src.core.slots import next_age, signature_changed
from jaxstate._src.core.uses import after_uses, current_use
from jaxstate.errors import NameClashError, message

__all__ = [
    "Entered",
    "FrameId",
    "ModuleId",
    "NameTable",
    "NameTables",
    "Origin",
    "Path",
    "PathElement",
    "Root",
    "ScopeStack",
    "program",
]

Path = tuple[str, ...]


class FrameId:
    """The jaxpr under construction in which a module was made.

    Every use of that jaxpr makes the module anew, as running its function again would.

    Attributes:
      counts: how many modules of each kind were made in it, by no call of a module.
    """

    __slots__ = ("__weakref__", "counts")

    def __init__(self) -> None:
        self.counts: dict[Hashable, int] = {}


class ModuleId:
    """The identity of a module. (Not the module itself: a cached jaxpr may keep its token.)

    Two tokens are equal if they are one, or if two calls of one module made them, in one ``init``
    or ``apply`` and with one key.

    Attributes:
      home: the jaxpr in which the module was made.
      parent: the module whose call made it; None if no call of a module did.
      key: which of those that this call, or the jaxpr, made.
      run: the ``init`` or ``apply`` during which that was.
      made: the number of the call that made it, and which of those made there it is; or None.
    """

    __slots__ = ("__weakref__", "_hash", "home", "key", "made", "parent", "run")

    def __init__(
        self,
        home: FrameId | None,
        parent: ModuleId | None = None,
        key: Hashable = None,
        run: object = None,
        made: tuple[int, Any] | None = None,
    ) -> None:
        self.made = made
        self.home = home
        self.parent = parent
        self.key = key
        self.run = run
        self._hash = id(self) if parent is None else hash((parent, key))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if self.parent is None or not isinstance(other, ModuleId) or self.run is not other.run:
            return False
        return self.key == other.key and self.parent == other.parent

    def __hash__(self) -> int:
        return self._hash

    @property
    def is_lasting(self) -> bool:
        """Whether it was made by no program that runs."""
        return self.home is None and self.parent is None

    def inside(self, home: FrameId, run: object) -> ModuleId:
        """The same module of this run, such that every use of the jaxpr ``home`` looks it up."""
        if self.parent is None or self.run is not run or self.home is home:
            return self
        return ModuleId(home, self.parent.inside(home, run), self.key, run, self.made)

    def __deepcopy__(self, memo: Any) -> ModuleId:
        return ModuleId(self.home)


class Origin(NamedTuple):
    """Where modules are made: in a call of a module, or in a jaxpr under construction.

    Attributes:
      home: the jaxpr.
      parent: the module that is being called; None if there is none in that jaxpr.
      scopes: those opened by hand in that call or jaxpr.
      counts: how many modules of each kind were made there.
      run: the ``init`` or ``apply`` that is in progress.
      call: the number of the call, if there is one.
      kept: see `Entered`.
    """

    home: FrameId | None
    parent: ModuleId | None
    scopes: tuple[str, ...]
    counts: dict[Hashable, int]
    run: object
    call: int | None = None
    kept: frozenset[Any] = frozenset()

    def next_key(self, *kind: Hashable) -> Hashable:
        """The key of the next module of that kind: it is the same in every call."""
        kind = (self.scopes, *kind)
        n = self.counts.get(kind, 0) + 1
        while (kind, n) in self.kept:
            n += 1
        self.counts[kind] = n
        return kind, n

    def token(self, key: Hashable, *part: Hashable) -> ModuleId:
        """The module with that key, or a part of what has it."""
        made = None if self.call is None else (self.call, key)
        return ModuleId(self.home, self.parent, (key, *part) if part else key, self.run, made)


class PathElement:
    """One step of a path: a module, or a scope opened by hand (no token)."""

    __slots__ = ("base", "token")

    def __init__(self, base: str, token: ModuleId | None) -> None:
        self.base = base
        self.token = token

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathElement) or self.token != other.token:
            return False
        return self.token is not None or self.base == other.base

    def __hash__(self) -> int:
        return hash(self.base if self.token is None else self.token)

    def inside(self, home: FrameId, run: object) -> PathElement:
        """The same level; see `ModuleId.inside`."""
        token = self.token
        if token is None or token.parent is None:
            return self
        return PathElement(self.base, token.inside(home, run))

    def __repr__(self) -> str:
        return self.base


class Root(PathElement):
    """Where the paths of one ``init`` or ``apply`` begin: the network itself."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Root) and self.token == other.token

    __hash__ = PathElement.__hash__

    def inside(self, home: FrameId, run: object) -> PathElement:
        return self


class NameTable:
    """Names given out by one piece of the program."""

    def __init__(self) -> None:
        self.paths: dict[ModuleId, Path] = {}
        self.taken: dict[Path, str] = {}  # what each name is given to, see `_WHAT`
        self.numbers: dict[Path, int] = {}  # the first suffix that may be free
        self.entries: dict[Path, Any] = {}  # what a store notes of a parameter or variable
        self.renewed: dict[Any, Any] = {}  # see `Address.renewed`
        self.made: dict[Path, int] = {}  # how many modules of a name the program itself made
        self.shown: dict[tuple[Path, ModuleId], Path] = {}  # of what has no name, see `path_now`

    def copy(self) -> NameTable:
        """The same names, without the entries."""
        names = NameTable()
        names.paths.update(self.paths)
        names.taken.update(self.taken)
        names.numbers.update(self.numbers)
        names.made.update(self.made)
        return names

    def of_lasting_modules(self) -> NameTable:
        """The names of modules that were not made by the program that was run."""
        names = NameTable()
        for token, path in self.paths.items():
            if token.is_lasting:
                names.paths[token] = path
                if path:
                    names.taken[path] = "module"
        return names


class NameTables:
    """The layers that are visible at one place, innermost first. New names go to the innermost."""

    def __init__(self, layers: Sequence[NameTable]) -> None:
        self.layers = layers

    def path_of(self, levels: Sequence[PathElement]) -> Path:
        """The path of ``levels``; names are given out for modules that have none.

        A module that has a path already keeps it, wherever it is used from.
        """
        path: Path = ()
        start = 0
        for i in range(len(levels) - 1, -1, -1):
            known = self.known(levels[i].token)
            if known is not None:
                path, start = known, i + 1
                break
        for level in levels[start:]:
            path = self.entered(path, level)
        return path

    def entered(self, scope: Path, level: PathElement) -> Path:
        """The path of ``level`` in ``scope``. (A module that calls itself is there already.)"""
        known = self.known(level.token)
        return (*scope, self.enter(scope, level)) if known is None else known

    def known(self, token: ModuleId | None) -> Path | None:
        """The path of a module, if it has one already."""
        if token is not None:
            for layer in self.layers:
                if token in layer.paths:
                    return layer.paths[token]
        return None

    def known_path_of(self, levels: Sequence[PathElement]) -> Path:
        """The path of ``levels`` without giving out names: the bases stand for those to come."""
        for i in range(len(levels) - 1, -1, -1):
            known = self.known(levels[i].token)
            if known is not None:
                return (*known, *(level.base for level in levels[i + 1 :]))
        return tuple(level.base for level in levels)

    def entry(self, path: Path, kind: str) -> Any:
        """What is noted of the parameter or variable at ``path``, or None.

        Raises:
          NameClashError: if the name is taken by something else.
        """
        found = self._kind(path)
        if found is None:
            return None
        if found != kind:
            raise _clash(path, kind, found)
        for layer in self.layers:
            if path in layer.entries:
                return layer.entries[path]
        return None

    def add_entry(self, path: Path, kind: str, entry: Any) -> None:
        self.layers[0].taken[path] = kind
        self.layers[0].entries[path] = entry

    def enter(self, scope: Path, level: PathElement) -> str:
        """The name of ``level`` in ``scope``, given out now."""
        base = (*scope, level.base)
        if level.token is None:
            kind = self._kind(base)
            if kind not in (None, "scope"):
                raise _clash(base, "scope", kind)
            self.layers[0].taken[base] = "scope"
            return level.base
        name, n = self._free_name(scope, level.base)
        layer = self.layers[0]
        layer.numbers[base] = n + 1
        layer.taken[*scope, name] = "module"
        if not level.token.is_lasting:
            layer.made[base] = layer.made.get(base, 0) + 1
        layer.paths[level.token] = (*scope, name)
        if program.followers or program.always_followed:
            program.has_new_names = True
            if current_use() is None:
                _follow_names()
        return name

    def _free_name(self, scope: Path, base: str) -> tuple[str, int]:
        """The name that the next module gets, and its number."""
        n, path = 0, (*scope, base)
        for layer in self.layers:
            n = max(n, layer.numbers.get(path, 0))
        name = f"{base}_{n}" if n else base
        while self._kind((*scope, name)) is not None:
            n += 1
            name = f"{base}_{n}"
        return name, n

    def expected_path_of(self, levels: Sequence[PathElement]) -> Path:
        """What `path_of` would be, without giving out names."""
        return self._path(levels, lambda path, level: (*path, self._free_name(path, level.base)[0]))

    def path_now(self, levels: Sequence[PathElement], is_given: Callable[[Path], bool]) -> Path:
        """What is told to the program as the path of ``levels``, without giving out names.

        A module gets its name with its first parameter or variable; until then (or for ever, if it
        has none) it is told the name that it would get, and no other module is told that: unless
        ``is_given`` says that parameters of that name are there.
        """
        return self._path(levels, lambda path, level: self._path_to_show(path, level, is_given))

    def _path(
        self, levels: Sequence[PathElement], nameless: Callable[[Path, PathElement], Path]
    ) -> Path:
        """The path of ``levels``. That of a module without a name is ``nameless(scope, level)``."""
        path: Path = ()
        for level in levels:
            known = self.known(level.token)
            if known is not None:
                path = known
            elif level.token is None:
                path = (*path, level.base)
            else:
                path = nameless(path, level)
        return path

    def _path_to_show(
        self, scope: Path, level: PathElement, is_given: Callable[[Path], bool]
    ) -> Path:
        token = level.token
        assert token is not None
        shown = [layer.shown for layer in self.layers]
        path = next((x[scope, token] for x in shown if (scope, token) in x), None)
        if path is None:
            name, n = self._free_name(scope, level.base)
            path = (*scope, name)
            if not is_given(path):
                taken = {path for x in shown for path in x.values()}
                while path in taken:
                    n += 1
                    path = (*scope, f"{level.base}_{n}")
            # What the program makes in a jaxpr is made anew in the next one.
            shown[-1 if token.is_lasting else 0][scope, token] = path
        return path

    def title_of(self, scope: Path, level: PathElement) -> Path:
        """The path of ``level`` in ``scope``, as far as it can be known now."""
        if level.token is None:
            return (*scope, level.base)
        for layer in self.layers:
            if level.token in layer.paths:
                return layer.paths[level.token]
        return (*scope, self._free_name(scope, level.base)[0])

    def _kind(self, path: Path) -> str | None:
        for layer in self.layers:
            if path in layer.taken:
                return layer.taken[path]
        return None


_WHAT = {
    "parameter": "a parameter",
    "variable": "a variable",
    "scope": "a scope opened by hand",
    "module": "a module",
}


def _clash(path: Path, wanted: str, found: str) -> NameClashError:
    function = "variable" if wanted == "variable" else "param"
    return NameClashError(
        message(
            f"{'/'.join(path)!r} is {_WHAT[found]} already, and cannot be {_WHAT[wanted]} too.",
            fix=f"""
            jaxstate.{function}("{path[-1]}_value", ...)          # another name for one of them
            with jaxstate.scope("{path[-1]}_part"): ...      # or, for a scope, another name
            """,
            used=_jax.user_location(),
        )
    )


class _Program(threading.local):
    """Where the program is.

    Attributes:
      entries: the modules and scopes that it is in, of all stores and of none, outermost first.
      followers: how much of what is open looks at the path of the program, so that what is traced
        depends on it.
    """

    # Whether all that is traced depends on the path, in all threads.
    always_followed = False

    # Whether names were given out that JAX's caches do not know of yet.
    has_new_names = False

    def __init__(self) -> None:
        self.entries: list[Entered] = []
        self.followers = 0


program = _Program()


def _follow_names() -> None:
    """Says that names were given out: not in the middle of a use of a jaxpr, which JAX looks up in
    its caches more than once."""
    if program.has_new_names:
        program.has_new_names = False
        signature_changed()


after_uses.append(_follow_names)


def note_kept(parent: ModuleId | None, made: tuple[int, Any]) -> bool:
    """To be called where a module is used that a call of ``parent`` made: see `ModuleId.made`.

    If that call is over and the module was kept, it has the number that it got there in the call
    that is in progress too, and what this one makes from now on gets others. Returns False if this
    one has made a module with that number.
    """
    made_in, key = made
    calls = [e for e in program.entries if e.level.token == parent]
    if not calls or any(e.number == made_in for e in calls) or key in calls[-1].kept:
        return True
    kind, n = key
    if calls[-1].counts.get(kind, 0) >= n:
        return False
    calls[-1].kept |= {key}
    return True


class ScopeStack(threading.local):
    """The levels of one store that the program is in, each with the boundary inside which it was
    entered.

    A boundary is a jaxpr under construction or a custom rule; None is the holder's own place.
    """

    def __init__(self) -> None:
        self.entries: list[Entered] = []

    def inside(self, *boundaries: Any) -> tuple[PathElement, ...]:
        """The levels entered directly inside one of ``boundaries``, outermost first."""
        if len(boundaries) == 1:
            (boundary,) = boundaries
            return tuple([e.level for e in self.entries if e.boundary is boundary])
        return tuple([e.level for e in self.entries if e.boundary in boundaries])

    def call_in(self, boundary: Any) -> tuple[Entered | None, tuple[str, ...]]:
        """The innermost call of a module that was begun directly inside a boundary, and the scopes
        that were opened by hand since."""
        scopes: list[str] = []
        for entered in reversed(self.entries):
            if entered.boundary is boundary:
                if entered.level.token is not None:
                    return entered, tuple(scopes)
                scopes.append(entered.level.base)
        return None, tuple(scopes)

    def own_path(self, layers: NameTables) -> Path:
        """The path of the program where no boundary is around it; see `NameTables.path_of`.

        Each level keeps its path, so that this takes as long at every depth.
        """
        entries, path = self.entries, ()
        i = len(entries)
        while i:
            entered = entries[i - 1]
            if entered.boundary is None:
                if entered.path is None:
                    entered.path = layers.known(entered.level.token)
                if entered.path is not None:
                    path = entered.path
                    break
            i -= 1
        for entered in entries[i:]:
            if entered.boundary is None:
                entered.path = path = layers.entered(path, entered.level)
        return path


class Entered:
    """One level that the program is in, while it is.

    Attributes:
      level: the module or scope.
      boundary: inside which it was entered: see `ScopeStack`.
      store: in which it is a level; None outside of ``init`` and ``apply``. There, ``boundary`` is
        the innermost one of all.
      module: the parametrized object, if it is one.
      path: of the level, once it is known; only in the holder's own place.
      title: its path as far as it could be known when it was entered, for the names of operations.
      told: what `path` is in it, if that is known from before.
      counts: see `Origin`.
      number: of the call.
      kept: which modules, made in an earlier call of this one and kept, are used in this call.
    """

    __slots__ = (
        "_name_scope", "boundary", "counts", "entries", "kept", "level", "module", "number", "path",
        "store", "title", "told",
    )  # fmt: skip

    def __init__(
        self,
        entries: list[Entered] | None,
        level: PathElement,
        boundary: Any,
        store: Any = None,
        module: Any = None,
    ) -> None:
        self.entries = entries
        self.level = level
        self.boundary = boundary
        self.store = store
        self.module = module
        self.path: Path | None = None
        self.title: Path = ()
        self.told: Path | None = None
        self.counts: dict[Hashable, int] = {}
        self.number = next_age()
        self.kept: frozenset[Any] = frozenset()
        self._name_scope: Any = None

    @property
    def place(self) -> Any:
        """The innermost boundary of all in which it was entered, or None."""
        store = self.store
        return self.boundary if self.boundary is not None or store is None else store.place

    def __enter__(self) -> None:
        if _jax.current_trace() is not _jax.eval_trace:
            self._name_operations()
        if self.entries is not None:
            self.entries.append(self)
        program.entries.append(self)
        if program.followers or program.always_followed:
            signature_changed()

    def __exit__(self, *error: Any) -> None:
        for entries in (self.entries, program.entries):
            if entries and entries[-1] is self:
                entries.pop()
            elif entries:
                _remove(entries, self)
        if self._name_scope is not None:
            self._name_scope.__exit__(*error)
        if program.followers or program.always_followed:
            signature_changed()

    def _name_operations(self) -> None:
        """Gives operations the name of the level, in compiled programs and profiles."""
        if self.entries:
            self.title = self.entries[-1].title
        if self.store is None:
            name = self.level.base
        elif self.entries is None:  # the network itself, which is in no path
            name = "" if program.entries else self.level.base
        else:
            names = self.store.own_layers if self.boundary is None else self.store.layers()
            self.title = names.title_of(self.title, self.level)
            name = self.title[-1] if self.title else ""
        if name:
            self._name_scope = jax.named_scope(name)
            self._name_scope.__enter__()


def _remove(entries: list[Entered], entered: Entered) -> None:
    for i in range(len(entries) - 1, -1, -1):  # a generator may leave it late
        if entries[i] is entered:
            del entries[i]
            break
