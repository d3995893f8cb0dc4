"""Random keys as users give them: one key, typed or raw."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax

__all__ = ["KeyLike", "check_key", "is_a_key", "key_and_type"]

KeyLike = jax.Array | np.ndarray


def check_key(key: Any, where: str) -> Any:
    """``key`` as an array, if it is one key; a TypeError that says what it is otherwise."""
    return key_and_type(key, where)[0]


def key_and_type(key: Any, where: str) -> tuple[Any, Any]:
    """`check_key`, and the type of the key: to ask an array of keys for its type takes long."""
    aval = _jax.type_of(key)
    if aval is not None:
        if _jax.is_typed_key(aval):
            if aval.shape == ():
                return key, aval
        elif getattr(aval, "dtype", None) == jnp.uint32 and aval.shape == _raw_key_shape(
            _default_kind()
        ):
            key = _jax.canonicalize(key)
            return key, _jax.typeof(key)
    found = repr(key) if aval is None else aval.str_short()
    if isinstance(key, Mapping):
        found = f"a dict with {', '.join(map(repr, key)) or 'nothing'}"
    raise TypeError(
        f"{where} wants one random key, and was given {found}.\n"
        f"To mend it:\n    {_mended(key, aval, where)}"
    )


# A call of what takes a key first.
_WITH_KEY = {
    "init": "net.init(jax.random.key(0), x)",
    "summary": "net.summary(jax.random.key(0), x)",
    "rng_stream": 'with jaxstate.rng_stream(jax.random.key(0), "dropout"):',
}


def _mended(key: Any, aval: Any, where: str) -> str:
    if aval is not None and _jax.is_typed_key(aval):
        return "key = keys[0]      # one of them; or jax.vmap, for a result of each"
    if hasattr(key, "next_key"):
        return "key = stream.next_key()"
    return _WITH_KEY.get(where, "key = jax.random.key(0)")


def _default_kind() -> Hashable:
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


@functools.lru_cache
def _raw_key_shape(kind: Hashable) -> tuple[int, ...]:
    """The shape of a raw key where ``kind`` is the default."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def is_a_key(x: Any) -> bool:
    """Whether an argument is one key, or looks like a raw one."""
    if not isinstance(x, jax.Array):
        return False
    if _jax.is_typed_key(x):
        return x.shape == ()
    return x.dtype == jnp.uint32 and x.shape == _raw_key_shape(_default_kind())
