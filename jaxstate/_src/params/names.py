"""Names of arrays in trees of parameters: ``"encoder/dense/w"``.

    flat = jaxstate.flatten_names(params)           # as safetensors has them
    params = jaxstate.unflatten_names(flat)
    params = net.init(key, x, reuse=flat)           # some of them, and the rest is made

A name is the path of an array, joined with slashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxstate._src.core.specs import names_of
from jaxstate._src.params.paths import Path
from jaxstate.errors import nearest

__all__ = ["by_path", "flatten_names", "nested", "unflatten_names"]


def flatten_names(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name.

    Args:
      tree: parameters or variables, any tree.

    Returns:
      A dict ``{"encoder/dense/w": array}``. An item of a list goes by its number, and an attribute
      of an object by its name.

    Raises:
      ValueError: if two arrays have one name, because the key of a dict has a slash.

    >>> import jaxstate
    >>> jaxstate.flatten_names({"encoder": {"w": 1.0}, "heads": [2.0, 3.0]})
    {'encoder/w': 1.0, 'heads/0': 2.0, 'heads/1': 3.0}
    """
    flat: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(names_of(path))
        if name in flat:
            raise ValueError(f"flatten_names: two arrays have the name {name!r}.")
        flat[name] = x
    return flat


def unflatten_names(flat: Mapping[str, Any], like: Any = None) -> Any:
    """The tree with the arrays that `flatten_names` gave names.

    Args:
      flat: ``{"encoder/dense/w": array}``.
      like: a tree of the structure of the result, with anything in the place of arrays, such as
        ``jax.eval_shape(net.init, key, x)``. Without it the result is a nested dict.

    Raises:
      TypeError: if ``flat`` is no dict with strings as keys.
      ValueError: if a name is that of an array and of a dict, or if the names are not those of
        ``like``.

    >>> import jaxstate
    >>> flat = {"encoder/w": 1.0, "heads/0": 2.0, "heads/1": 3.0}
    >>> jaxstate.unflatten_names(flat)
    {'encoder': {'w': 1.0}, 'heads': {'0': 2.0, '1': 3.0}}
    >>> jaxstate.unflatten_names(flat, like={"encoder": {"w": 0}, "heads": [0, 0]})
    {'encoder': {'w': 1.0}, 'heads': [2.0, 3.0]}
    """
    if not isinstance(flat, Mapping) or not all(isinstance(name, str) for name in flat):
        raise TypeError(
            f"unflatten_names wants a dict from names to arrays, and was given {flat!r}.\n"
            'To mend it:\n    jaxstate.unflatten_names({"encoder/dense/w": array})'
        )
    if like is None:
        paths = {tuple(name.split("/")): x for name, x in flat.items()}
        for path in paths:
            for n in range(1, len(path)):
                if path[:n] in paths:
                    name, inner = "/".join(path[:n]), "/".join(path)
                    raise ValueError(f"unflatten_names: {name!r} is an array, and has {inner!r}.")
        return nested(paths)
    names = list(flatten_names(like))
    for name in (*names, *flat):
        if name not in flat or name not in names:
            where, others = ("flat", flat) if name not in flat else ("like", names)
            close = nearest(name, others)
            raise ValueError(
                f"unflatten_names: {name!r} is not in {where}."
                + (f" The nearest name is {close!r}." if close else "")
            )
    return jax.tree.structure(like).unflatten([flat[name] for name in names])


def by_path(given: Any, at: Path) -> Iterator[tuple[Path, Any]]:
    """The arrays of what is given at a path, where names may be joined with slashes."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            yield from by_path(value, (*at, *str(name).split("/")))
    else:
        for path, x in jax.tree_util.tree_flatten_with_path(given)[0]:
            yield (*at, *names_of(path)), x


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """A nested dict out of full paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
