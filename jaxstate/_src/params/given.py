"""The parameters and variables that `apply` is given, and what is found at a path in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.specs import ONE_ARRAY, Spec, contrast, names_of, same_structure, spec_of
from jaxstate._src.params.entries import EntryAddress
from jaxstate._src.params.paths import Path
from jaxstate.errors import message, nearest

__all__ = ["Given", "flattened", "type_of_given", "with_dicts"]


class Given:
    """Nested dicts by the kind of their entries: "parameter" and "variable"."""

    def __init__(self, trees: dict[str, Any]) -> None:
        self.trees = trees
        self._scopes: dict[tuple[str, Path], Mapping[str, Any]] = {}
        self._guesses: dict[str, _Guess] = {}

    def scope(self, kind: str, path: Path) -> Any:
        """The given dict at ``path``, or None. Each is looked up in the one around it, once."""
        scope: Any = self._scopes.get((kind, path))
        if scope is not None:
            return scope
        n = len(path)
        while n and (kind, path[:n]) not in self._scopes:
            n -= 1
        scope = self._scopes.get((kind, path[:n]), self.trees[kind])
        for i in range(n, len(path) + 1):
            scope = scope if i == n else scope.get(path[i - 1])
            if type(scope) is not dict and not isinstance(scope, Mapping):
                return None
            self._scopes[kind, path[:i]] = scope
        return scope

    def has_scope(self, path: Path) -> bool:
        return any(self.scope(kind, path) is not None for kind in self.trees)

    def leaves(self, address: EntryAddress, path: Path, wanted: Spec) -> list[tuple[Any, Any]]:
        """The arrays of what was given at ``path``, and their types; an error if nothing was given,
        or something of another structure."""
        scope = self.scope(address.kind, path[:-1])
        if scope is None or path[-1] not in scope:
            raise _missing(address, path, self.trees, wanted)
        found = scope[path[-1]]
        if wanted.is_array:
            aval = type_of_given(found)
            if isinstance(aval, type):
                raise _other_structure(address, path, found, wanted)
            return [(found, aval)]
        leaves, structure = flattened(found, wanted.tree)
        avals = list(map(type_of_given, leaves))
        if not same_structure(structure, wanted.tree) or type in map(type, avals):
            raise _other_structure(address, path, found, wanted)
        return list(zip(leaves, avals, strict=True))

    def guess(self, address: EntryAddress, path: Path, wanted: Spec) -> Spec:
        """The form of what was given, as far as a jaxpr under construction can know it.

        The names that count are given out when that jaxpr is bound, and what is found then is
        compared with the guess. The function says all but the dtypes. Those of the entry at
        ``path``, if it fits, or of the only entry of that name and shape, are right unless
        jaxprs are bound in another order than they were traced.
        """
        guess = self._guesses.get(address.kind)
        if guess is None:
            given, _ = jax.tree_util.tree_flatten_with_path(self.trees[address.kind] or {})
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


class _Guess:
    """The type of a leaf that may get another path: see `Given.guess`."""

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


def _other_structure(address: EntryAddress, path: Path, found: Any, wanted: Spec) -> Exception:
    """The error for what is no tree of arrays of the wanted structure."""
    structure = jax.tree.structure(found)
    if all(map(_jax.is_array_like, jax.tree.leaves(found))):
        return address.mismatch(path, *contrast(spec_of(found), wanted))
    return address.mismatch(
        path, repr(found) if structure == ONE_ARRAY else str(structure), str(wanted)
    )


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


def flattened(value: Any, tree: Any) -> tuple[list[Any], Any]:
    """The leaves and the structure of a value that should be of the structure ``tree``, in which
    a dict may stand for another mapping."""
    leaves, structure = jax.tree.flatten(value)
    if not same_structure(structure, tree):
        again, of_dicts = jax.tree.flatten(with_dicts(value))
        if same_structure(of_dicts, tree):
            return again, of_dicts
    return leaves, structure


def with_dicts(tree: Any, of_all_mappings: bool = True) -> Any:
    """A tree with dicts in the place of other mappings, or of those that are leaves for JAX."""

    def is_mapping(x: Any) -> bool:
        return isinstance(x, Mapping)

    def as_dict(x: Any) -> Any:
        if not is_mapping(x):
            return x
        return {k: with_dicts(v, of_all_mappings) for k, v in x.items()}

    return jax.tree.map(as_dict, tree, is_leaf=is_mapping if of_all_mappings else None)


def type_of_given(x: Any) -> Any:
    """The type of an array; of anything else, its class."""
    if type(x) in _jax.plain_arrays:
        return x.aval
    return _jax.typeof(x) if _jax.is_array_like(x) else type(x)
