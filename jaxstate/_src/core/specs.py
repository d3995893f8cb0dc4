"""What a parameter or variable looks like: its structure and types, without its values."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstate._src import _jax

__all__ = ["Leaf", "Spec", "same_structure", "spec_of", "wanted_spec"]

ONE_ARRAY = jax.tree.structure(0)


class Leaf(NamedTuple):
    """One array of the value of a parameter or variable.

    Attributes:
      index: among the leaves of the value.
      path: the names on the way to it, for messages; empty if the value is one array.
    """

    index: int
    path: tuple[str, ...]


ONLY_LEAF = Leaf(0, ())


class Spec(NamedTuple):
    """What a parameter or variable looks like.

    Attributes:
      tree: structure of the value.
      leaves: its arrays.
      avals: for each of these, its type.
    """

    tree: Any
    leaves: tuple[Leaf, ...]
    avals: tuple[Any, ...]

    @property
    def is_array(self) -> bool:
        """Whether the value is one array."""
        return self.tree == ONE_ARRAY

    def __str__(self) -> str:
        if self.is_array:
            return self.avals[0].str_short()
        try:
            return repr(self.tree.unflatten([_Shown(aval) for aval in self.avals]))
        except Exception:  # a class that looks at what it is made of
            return str(self.tree)

    def same(self, other: Spec) -> bool:
        """Whether values of the two forms have the same structure and types."""
        return self is other or (
            self.avals == other.avals and same_structure(self.tree, other.tree)
        )

    def same_shapes(self, other: Spec) -> bool:
        if self is other:
            return True
        if len(self.avals) != len(other.avals) or not same_structure(self.tree, other.tree):
            return False
        return all([fits(a, b) for a, b in zip(self.avals, other.avals, strict=True)])  # noqa: C419

    def strong(self) -> Spec:
        """The form of the value made of arrays whose dtype no Python scalar can change."""
        avals = tuple(map(strong_type, self.avals))
        return self if avals == self.avals else self._replace(avals=avals)


def fits(found: Any, wanted: Any) -> bool:
    """Whether an array of one type can be given for one of another: of another dtype, but no number
    for a random key, and nothing that has no dtype."""
    if found.shape != wanted.shape:
        return False
    one, other = getattr(found, "dtype", None), getattr(wanted, "dtype", None)
    if one is other or one is None or other is None:
        return one is other
    return _jax.is_typed_key(found) == _jax.is_typed_key(wanted)


class _Shown:
    """An array as it is shown inside of a structure: its type, without quotes."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval

    def __repr__(self) -> str:
        return self.aval.str_short()


def spec_of(value: Any) -> Spec:
    """The form of a value, or of a tree of anything with shape and dtype."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(value)
    leaves = tuple([Leaf(i, names_of(path)) for i, (path, _) in enumerate(pairs)])
    return Spec(tree, leaves, tuple(_jax.aval_of(x) for _, x in pairs))


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A path of `jax.tree_util` as strings."""
    return tuple([jax.tree_util.keystr((key,), simple=True) for key in path])


def contrast(found: Spec, wanted: Spec) -> tuple[str, str]:
    """Two forms as a message shows what tells them apart."""
    shown = str(found), str(wanted)
    if shown[0] == shown[1]:
        shown = str(found.tree), str(wanted.tree)
    pairs = zip(*shown, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
    return _around(shown[0], same), _around(shown[1], same)


def _around(text: str, i: int) -> str:
    """What is around position ``i`` of a text that is too long to be shown."""
    if len(text) <= 400:
        return text
    start, end = max(0, i - 100), i + 300
    return "... " * (start > 0) + text[start:end] + " ..." * (end < len(text))


# -- Structures ------------------------------------------------------------------------------


def same_structure(a: Any, b: Any) -> bool:
    """Whether two structures are equal, functions that were made twice by the same code too.

    A structure has static parts, such as the activation function of a module. If an initializer
    makes that function, it makes another one whenever it is called.
    """
    if a is b or a == b:
        return True
    ours, theirs = a.node_data(), b.node_data()
    if ours is None or theirs is None or ours[0] is not theirs[0]:
        return False
    ours, theirs = (ours[1], a.children()), (theirs[1], b.children())
    return (
        len(ours[1]) == len(theirs[1])
        and _same_static(ours[0], theirs[0])
        and all(map(same_structure, ours[1], theirs[1]))
    )


def _same_static(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_static, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_static(a[k], b[k]) for k in a)
    if isinstance(a, functools.partial):
        return _same_static((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, types.FunctionType):
        return _same_static(_contents(a), _contents(b))
    return bool(a == b)


def _contents(fn: Any) -> tuple[Any, ...]:
    """What a function is made of."""
    cells = tuple([cell.cell_contents for cell in fn.__closure__ or ()])
    return fn.__code__, cells, fn.__defaults__, fn.__kwdefaults__, fn.__dict__


def typed(x: Any) -> Any:
    """A value such that what compares equal is the same: 1, 1.0 and True differ, 0.0 and -0.0."""
    if isinstance(x, tuple):
        return type(x), tuple(map(typed, x))
    return type(x), repr(x) if isinstance(x, (float, complex)) else x


# -- The form that an initializer makes ------------------------------------------------------


def wanted_spec(init: Callable[..., Any], init_args: tuple[Any, ...], takes_key: bool) -> Spec:
    """The form of what ``init([key,] *init_args)`` makes, without making it."""
    if takes_shape(init, init_args, takes_key):
        shape, *dtype = init_args
        dtype = [d for d in dtype if d is not None] or _own_dtype(init)
        try:
            return _array_spec(tuple(shape), tuple(dtype), _jax.type_context())
        except TypeError:  # a dtype that cannot be hashed
            return _array_spec.__wrapped__(tuple(shape), tuple(dtype), None)

    def made(*keys: Any) -> Spec:
        def arrays(*keys: Any) -> Any:
            return all_arrays(init(*keys, *init_args))

        return spec_of(jax.eval_shape(arrays, *keys))

    if not takes_key:
        return made()
    kind = _jax.default_key_kind()
    try:
        return made(_a_key(jax.random.key, kind))
    except Exception:
        try:
            return made(_a_key(jax.random.PRNGKey, kind))  # an initializer may want a raw key
        except Exception:
            pass
        raise


class NoArrayError(TypeError):
    """An initializer made what is no tree of arrays.

    Attributes:
      found: what it made, or a part of that.
      is_part: whether it is a part.
    """

    def __init__(self, found: Any, is_part: bool) -> None:
        super().__init__(f"{found!r} is no array")
        self.found = found
        self.is_part = is_part


def all_arrays(value: Any) -> Any:
    """What an initializer made, if it is a tree of arrays."""
    for leaf in [None] if value is None else jax.tree.leaves(value):
        if not _jax.is_array_like(leaf):
            raise NoArrayError(leaf, leaf is not value)
    return value


def takes_shape(init: Callable[..., Any], init_args: tuple[Any, ...], takes_key: bool) -> bool:
    """Whether ``init([key,] shape[, dtype])`` makes one array, as JAX's own initializers do."""
    if takes_key:
        known = _jax.is_standard_initializer(init)
    else:
        known = init is jnp.zeros or init is jnp.ones
    return known and len(init_args) in (1, 2) and _is_shape(init_args[0])


def _own_dtype(init: Any) -> list[Any]:
    """The dtype that one of JAX's initializers was made with: ``lecun_normal(dtype=...)``."""
    defaults = getattr(init, "__defaults__", None)
    return [defaults[0]] if defaults and defaults[0] is not None else []


@functools.lru_cache(4096)
def _array_spec(shape: tuple[int, ...], dtype: tuple[Any, ...], context: Any) -> Spec:
    aval = _jax.ShapedArray(shape, jnp.result_type(*dtype or [float]))
    return Spec(ONE_ARRAY, (ONLY_LEAF,), (aval,))


_INT = frozenset([int])


def _is_shape(x: Any) -> bool:
    return (type(x) is tuple or isinstance(x, (tuple, list))) and _INT.issuperset(map(type, x))


@functools.lru_cache(16)
def _a_key(make: Callable[[int], Any], kind: str) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: make(0))


# -- Types that no Python scalar can change --------------------------------------------------


def strong(value: Any) -> Any:
    """The value as an array whose dtype no Python scalar can change."""
    if _jax.is_plain_array(value) and not _jax.is_weak(value):
        return value
    _jax.refuse_user_type(value)
    value = _jax.resolved(jnp.asarray(value))
    if not getattr(_jax.typeof(value), "weak_type", False):
        return value
    return jax.lax.convert_element_type(value, value.dtype)


def strong_type(aval: Any) -> Any:
    """The type of `strong` values of type ``aval``."""
    return aval.update(weak_type=False) if getattr(aval, "weak_type", False) else aval
