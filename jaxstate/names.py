"""Where in the tree of parameters the program is, and which names have been given out.

A *level* is one step of a path: a module (a parametrized object, known by its token, named after
its function) or a scope opened by hand. Names are given out in the order in which slots are first
used, with a suffix on a clash: ``dense``, ``dense_1``.

A jaxpr must not fix the names: it may be cached and bound again in another scope, and JAX traces
some bodies twice and throws one away. So an address in a jaxpr has levels relative to that jaxpr,
and whatever names are needed while it is built (to look up the type of a parameter) go to a
`Layer` that ends with it. The names that count are given out where the holder itself resolves the
address.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxstate import _compat
from jaxstate.errors import NameClashError, message

__all__ = ["Home", "Layer", "Layers", "Level", "Path", "ScopeStack", "Token"]

Path = tuple[str, ...]


class Home:
    """The jaxpr under construction in which a module was made.

    Every use of that jaxpr makes the module anew, as running its function again would.
    """

    __slots__ = ("__weakref__",)


class Token:
    """The identity of a module. (Not the module itself: a cached jaxpr may keep its token.)"""

    __slots__ = ("__weakref__", "home")

    def __init__(self, home: Home | None) -> None:
        self.home = home


class Level:
    """One step of a path: a module, or a scope opened by hand (no token)."""

    __slots__ = ("base", "token")

    def __init__(self, base: str, token: Token | None) -> None:
        self.base = base
        self.token = token

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Level) or self.token is not other.token:
            return False
        return self.token is not None or self.base == other.base

    def __hash__(self) -> int:
        return hash((self.base, id(self.token)))

    def __repr__(self) -> str:
        return self.base


class Layer:
    """Names given out by one piece of the program."""

    def __init__(self) -> None:
        self.paths: dict[Token, Path] = {}
        self.taken: dict[Path, dict[str, str]] = {}  # by scope: name -> what it names, see `_WHAT`
        self.entries: dict[Path, Any] = {}  # what a store notes of a parameter or variable
        self.renewed: dict[Token, Token] = {}  # see `Address.renewed`

    def of_lasting_modules(self) -> Layer:
        """The names of modules that were not made by the program that was run."""
        names = Layer()
        for token, path in self.paths.items():
            if token.home is None:
                names.paths[token] = path
                if path:
                    names.taken.setdefault(path[:-1], {})[path[-1]] = "module"
        return names


class Layers:
    """The layers that are visible at one place, innermost first. New names go to the innermost."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def path_of(self, levels: Sequence[Level]) -> Path:
        """The path of ``levels``; names are given out for modules that have none.

        A module that has a path already keeps it, wherever it is used from.
        """
        path: Path = ()
        start = 0
        for i in range(len(levels) - 1, -1, -1):
            known = self._known(levels[i].token)
            if known is not None:
                path, start = known, i + 1
                break
        for level in levels[start:]:
            path = (*path, self._enter(path, level))
        return path

    def know(self, levels: Sequence[Level]) -> bool:
        """Whether all modules among ``levels`` have a name."""
        return all(v.token is None or self._known(v.token) is not None for v in levels)

    def known_path_of(self, levels: Sequence[Level]) -> Path:
        """The path of ``levels`` without giving out names: the bases stand for those to come."""
        for i in range(len(levels) - 1, -1, -1):
            known = self._known(levels[i].token)
            if known is not None:
                return (*known, *(level.base for level in levels[i + 1 :]))
        return tuple(level.base for level in levels)

    def entry(self, path: Path, kind: str) -> Any:
        """What is noted of the parameter or variable at ``path``, or None.

        Raises:
          NameClashError: if the name is taken by something else.
        """
        found = self._kind(path[:-1], path[-1])
        if found not in (None, kind):
            raise _clash(path, kind, found)
        return next((layer.entries[path] for layer in self.layers if path in layer.entries), None)

    def add_entry(self, path: Path, kind: str, entry: Any) -> None:
        self._take(path[:-1], path[-1], kind)
        self.layers[0].entries[path] = entry

    def _known(self, token: Token | None) -> Path | None:
        if token is not None:
            for layer in self.layers:
                if token in layer.paths:
                    return layer.paths[token]
        return None

    def _enter(self, scope: Path, level: Level) -> str:
        if level.token is None:
            kind = self._kind(scope, level.base)
            if kind not in (None, "scope"):
                raise _clash((*scope, level.base), "scope", kind)
            self._take(scope, level.base, "scope")
            return level.base
        name, n = level.base, 0
        while self._kind(scope, name) is not None:
            n += 1
            name = f"{level.base}_{n}"
        self._take(scope, name, "module")
        self.layers[0].paths[level.token] = (*scope, name)
        return name

    def _kind(self, scope: Path, name: str) -> str | None:
        for layer in self.layers:
            if name in layer.taken.get(scope, ()):
                return layer.taken[scope][name]
        return None

    def _take(self, scope: Path, name: str, kind: str) -> None:
        self.layers[0].taken.setdefault(scope, {})[name] = kind


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
            used=_compat.user_location(),
        )
    )


class ScopeStack(threading.local):
    """The levels that the program is in, each with the boundary inside which it was entered.

    A boundary is a jaxpr under construction or a custom rule; None is the holder's own place.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Level, Any]] = []

    def inside(self, *boundaries: Any) -> tuple[Level, ...]:
        """The levels entered directly inside one of ``boundaries``, outermost first."""
        return tuple(level for level, b in self.entries if any(b is x for x in boundaries))

    @contextmanager
    def entered(self, level: Level, boundary: Any) -> Iterator[None]:
        entry = (level, boundary)
        self.entries.append(entry)
        try:
            yield
        finally:
            for i in range(len(self.entries) - 1, -1, -1):
                if self.entries[i] is entry:
                    del self.entries[i]
                    break
