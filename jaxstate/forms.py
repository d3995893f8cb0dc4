"""What a parameter or variable looks like: its structure and types, without its values."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxstate import _compat

__all__ = ["Form", "form_of", "wanted_form"]


class Form(NamedTuple):
    """What a parameter or variable looks like.

    Attributes:
      tree: structure of the value.
      leaves: for each leaf, its path inside the value (empty if the value is one array).
      avals: for each leaf, its type.
    """

    tree: Any
    leaves: tuple[tuple[str, ...], ...]
    avals: tuple[Any, ...]

    def __str__(self) -> str:
        if self.leaves == ((),):
            return self.avals[0].str_short()
        pairs = zip(self.leaves, self.avals, strict=True)
        return "{" + ", ".join(f"{'/'.join(p)}: {a.str_short()}" for p, a in pairs) + "}"

    def same_shapes(self, other: Form) -> bool:
        if self is other:
            return True
        shapes = [[a.shape for a in form.avals] for form in (self, other)]
        return self.tree == other.tree and shapes[0] == shapes[1]

    def strong(self) -> Form:
        """The form of the value made of arrays whose dtype no Python scalar can change."""
        avals = tuple(map(strong_type, self.avals))
        return self if avals == self.avals else self._replace(avals=avals)


def form_of(value: Any) -> Form:
    """The form of a value, or of a tree of anything with shape and dtype."""
    pairs, tree = jax.tree_util.tree_flatten_with_path(value)
    leaves = tuple(tuple(map(_key_name, path)) for path, _ in pairs)
    return Form(tree, leaves, tuple(_compat.aval_of(x) for _, x in pairs))


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


_ONE_ARRAY = jax.tree.structure(0)


def wanted_form(
    init: Callable[..., Any], init_args: tuple[Any, ...], takes_key: bool, known: dict[Any, Form]
) -> Form:
    """The form of what ``init([key,] *init_args)`` makes, without making it.

    ``known`` are the forms that one ``apply`` has asked for (an initializer may look at globals).
    """
    if takes_shape(init, init_args, takes_key):
        shape, *dtype = init_args
        try:
            return _array_form(tuple(shape), tuple(dtype), _compat.type_context())
        except TypeError:  # a dtype that cannot be hashed
            return _array_form.__wrapped__(tuple(shape), tuple(dtype), None)
    if isinstance(init, types.FunctionType) and init.__closure__ is None:
        try:
            form = known.get((init, init_args, takes_key))
        except TypeError:  # arguments that cannot be hashed, such as arrays
            return _form(init, init_args, takes_key)
        if form is None:
            form = known[init, init_args, takes_key] = _form(init, init_args, takes_key)
        return form
    return _form(init, init_args, takes_key)


def takes_shape(init: Callable[..., Any], init_args: tuple[Any, ...], takes_key: bool) -> bool:
    """Whether ``init([key,] shape[, dtype])`` makes one array, as JAX's own initializers do."""
    known = _compat.is_standard_initializer(init) if takes_key else init in _FILLED
    return known and len(init_args) in (1, 2) and _is_shape(init_args[0])


_FILLED = (jnp.zeros, jnp.ones)


@functools.lru_cache(4096)
def _array_form(shape: tuple[int, ...], dtype: tuple[Any, ...], context: Any) -> Form:
    aval = _compat.ShapedArray(shape, jnp.result_type(*dtype or [float]))
    return Form(_ONE_ARRAY, ((),), (aval,))


_INT = frozenset([int])


def _is_shape(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and _INT.issuperset(map(type, x))


def _form(init: Callable[..., Any], init_args: tuple[Any, ...], takes_key: bool) -> Form:
    def made(*keys: Any) -> Form:
        return form_of(jax.eval_shape(lambda *keys: init(*keys, *init_args), *keys))

    if not takes_key:
        return made()
    try:
        return made(_a_key(jax.random.key))
    except Exception:
        try:
            return made(_a_key(jax.random.PRNGKey))  # an initializer may want a raw key
        except Exception:
            pass
        raise


@functools.cache
def _a_key(make: Callable[[int], Any]) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: make(0))


# -- Types that no Python scalar can change --------------------------------------------------


def strong(value: Any) -> Any:
    """The value as an array whose dtype no Python scalar can change."""
    if _compat.is_plain_array(value) and not _compat.is_weak(value):
        return value
    value = _compat.resolved(jnp.asarray(value))
    if not getattr(_compat.typeof(value), "weak_type", False):
        return value
    return jax.lax.convert_element_type(value, value.dtype)


def strong_type(aval: Any) -> Any:
    """The type of `strong` values of type ``aval``."""
    return aval.update(weak_type=False) if getattr(aval, "weak_type", False) else aval
