"""Structures and types of given trees, each kept once while it is in use."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary

import jax

from jaxstate._src import _jax
from jaxstate._src.core.specs import names_of
from jaxstate._src.params.paths import Path

__all__ = ["interned", "types_of_arrays"]


class _Interned:
    """Stands for a key. Signatures are hashed and compared whenever a holder is opened.

    Attributes:
      mixed: see `ApplyStore._mixed`.
    """

    __slots__ = ("__weakref__", "_is_of_dicts", "_numbers", "key", "mixed")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.mixed: list[tuple[Path, Any]] | None = None
        self._numbers: dict[Path, int] | None = None
        self._is_of_dicts: bool | None = None

    def numbers(self, given: Any) -> dict[Path, int]:
        """The number of each leaf of a tree with this key, by its kind and path."""
        if self._numbers is None:
            pairs, _ = jax.tree_util.tree_flatten_with_path(given)
            self._numbers = {names_of(path): i for i, (path, _) in enumerate(pairs)}
        return self._numbers

    def is_of_dicts(self) -> bool:
        """Whether all nodes of the tree with this key are dicts."""
        if self._is_of_dicts is None:
            self._is_of_dicts = _is_of_dicts(self.key[2])  # type: ignore[index]
        return self._is_of_dicts


def _is_of_dicts(tree: Any) -> bool:
    if jax.tree_util.treedef_is_leaf(tree):
        return True
    node = tree.node_data()
    return node is not None and node[0] is dict and all(map(_is_of_dicts, tree.children()))


_interned: WeakValueDictionary[Hashable, _Interned] = WeakValueDictionary()

_interned_lock = threading.Lock()

_by_identity: dict[Hashable, tuple[tuple[Any, ...], _Interned]] = {}


def interned(key: Hashable) -> _Interned:
    """One object for all equal keys, which is hashed and compared by identity."""
    with _interned_lock:
        return _interned.setdefault(key, _Interned(key))


def types_of_arrays(writable: Any, tree: Any, arrays: list[Any]) -> Any:
    """The types of the arrays that are given to an `ApplyStore`, and what is `interned` for them.

    To hash types takes long. So they are known by identity: what a jitted function returns is of
    the same types each time.
    """
    numbers = (writable, tree, *map(id, map(_jax.type_of_array, arrays)))
    known = _by_identity.get(numbers)
    if known is None:
        types = tuple(map(_jax.type_of_array, arrays))
        known = types, interned(("apply", writable, tree, types))
        if len(_by_identity) >= 100:
            _by_identity.clear()
        _by_identity[numbers] = known  # which keeps the types, so that no other gets their numbers
    return known
