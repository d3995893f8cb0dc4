"""Random streams as programs use them: `rng_stream` opens one, `next_key` draws from it.

    with jaxstate.rng_stream(jax.random.key(0)):
        k = jaxstate.next_key()                 # anywhere: eager, jit, scan, while, cond, vmap ...

Draw number n is ``jax.random.fold_in(key, n)``, in program order, so a Python loop, a ``scan`` and
a ``while_loop`` that draw as often give the same keys.
"""

from __future__ import annotations

import operator
import threading
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.resolve import read_at
from jaxstate._src.core.slots import holders, open_holder
from jaxstate._src.handles import Handle
from jaxstate._src.streams.holders import (
    StreamAddress,
    StreamHolder,
    Streams,
    draw,
    not_opened,
)
from jaxstate._src.streams.keys import KeyLike, key_and_type
from jaxstate.errors import (
    ClosedStateError,
    MissingStreamError,
    called_as,
    message,
    warn_of_unopened,
)

__all__ = ["Stream", "next_key", "no_key_wanted", "rng_stream"]

T = TypeVar("T")


class Stream(metaclass=Handle, made_by="with jaxstate.rng_stream(key) as stream:"):
    """A handle of an open stream: what ``with rng_stream(...) as stream`` gives.

    ``stream.key`` and ``stream.count`` are enough to go on later, in another process too:
    ``rng_stream(key, count=count)``.
    """

    def __init__(self, holder: StreamHolder) -> None:
        self._holder = holder

    def next_key(self, *nothing: Any) -> jax.Array:
        """Draws the next key of this very stream, also where another of its name is open.

        Returns:
          A key of the kind the stream was opened with.

        Raises:
          ClosedStateError: if the ``with`` block of the stream has ended.
          TypeError: if it is given anything.
        """
        if nothing:
            raise no_key_wanted("Stream.next_key", "stream.next_key()")
        return draw(self._holder.name, self._holder.identity)

    @property
    def name(self) -> str:
        return self._holder.name

    @property
    def key(self) -> jax.Array:
        """The key the stream was opened with."""
        return self._get("key")

    @property
    def count(self) -> jax.Array:
        """The number of keys drawn so far, an int32 scalar."""
        return self._get("count")

    def _get(self, part: Literal["key", "count"]) -> Any:
        holder = self._holder
        if holder.anchor is None:
            return holder.cells[part].value
        if part == "count" and holder.anchor is not _jax.current_trace():
            read_at(StreamAddress(holder.name, "open", holder.identity))
        return read_at(StreamAddress(holder.name, part, holder.identity))

    def __repr__(self) -> str:
        return f"<random stream {self.name!r}>"


class _Opening(AbstractContextManager[Stream]):
    """A stream that ``with`` opens."""

    def __init__(self, holder: StreamHolder) -> None:
        self._holder = holder
        self._open: open_holder | None = None
        self._is_refused = False
        not_opened[holder.name] = holder.made

    def __enter__(self) -> Stream:
        holder = self._holder
        if self._open is not None:
            raise ClosedStateError(
                message(
                    f"Random stream {holder.name!r} was opened twice.",
                    fix=f"""
                    with jaxstate.rng_stream(key, {holder.name!r}) as stream:   # another one
                        ...
                    """,
                    made=holder.made,
                    used=_jax.user_location(),
                )
            )
        not_opened.pop(holder.name, None)
        self._open = open_holder(holder)
        self._open.__enter__()
        holder.identity.thread = threading.get_ident()
        return Stream._make(holder)

    def __exit__(self, *exc: object) -> None:
        self._holder.identity.thread = None
        if self._open is not None:
            self._open.__exit__(*exc)

    def __del__(self) -> None:
        if self._open is None and not self._is_refused:
            warn_of_unopened(
                f"Random stream {self._holder.name!r}",
                """
                with jaxstate.rng_stream(key):
                    ...
                """,
            )

    def __call__(self, *args: Any) -> Any:
        self._is_refused = True
        raise _no_decorator()

    def __getattr__(self, name: str) -> Any:
        if name not in ("next_key", "key", "count"):
            raise AttributeError(name)
        self._is_refused = True
        raise MissingStreamError(
            message(
                f"Random stream {self._holder.name!r} was made and is not open: 'with' opens it.",
                fix="""
                with jaxstate.rng_stream(key) as stream:
                    k = stream.next_key()
                """,
                made=self._holder.made,
                used=_jax.user_location(),
            )
        )


def _no_decorator() -> Exception:
    return TypeError(
        message(
            "rng_stream was used as a decorator: every call of the function would draw the same"
            " keys again.",
            fix="""
            def f(key, x):
                with jaxstate.rng_stream(key):
                    ...
            """,
            used=_jax.user_location(),
        )
    )


@called_as('with jaxstate.rng_stream(jax.random.key(0), "dropout"):')
def rng_stream(
    key: KeyLike,
    name: str = "default",
    *,
    vmap: Literal["split", "share"] = "split",
    count: int | jax.Array = 0,
) -> AbstractContextManager[Stream]:
    """Opens a random stream for the code inside the ``with`` block, and all it calls.

    Args:
      key: a typed key (`jax.random.key`) or a raw ``uint32`` key (`jax.random.PRNGKey`); the
        stream gives out keys of the same kind.
      name: the stream's name. The innermost open stream of a name is the one drawn from.
      vmap: ``"split"`` gives every lane of a ``vmap`` its own keys, ``"share"`` the same keys.
      count: the number of keys already drawn, to go on with a saved stream.

    Returns:
      What ``with`` opens. It gives a `Stream`, a handle.

    Raises:
      TypeError: if ``key`` is not one key, ``name`` no string, or ``count`` not an integer.
      ValueError: if ``vmap`` is neither, or ``count`` negative or not an int32.

    >>> import jax, jaxstate
    >>> with jaxstate.rng_stream(jax.random.key(0)) as stream:
    ...     k = jaxstate.next_key()
    >>> bool(k == jax.random.fold_in(jax.random.key(0), 0)), int(stream.count)
    (True, 1)
    """
    if callable(key):
        raise _no_decorator()
    if not isinstance(name, str):
        aval = _jax.type_of(name)
        found = repr(name) if aval is None else aval.str_short()
        raise TypeError(
            f"rng_stream wants the name of a stream second, and was given {found}.\n"
            'To mend it:\n    with jaxstate.rng_stream(key, "dropout"):'
        )
    holder = StreamHolder(
        *key_and_type(key, "rng_stream"), name, _check_vmap(vmap), _check_count(count),
        _jax.user_location(),
    )  # fmt: skip
    return _Opening(holder)


_REQUIRED: Any = object()


@overload
def next_key(name: str = "default") -> jax.Array: ...


@overload
def next_key(name: str = "default", *, default: T) -> jax.Array | T: ...


def next_key(name: str = "default", *, default: Any = _REQUIRED) -> Any:
    """Draws the next key from the innermost open stream called ``name``.

    Draw number n (from 0) is ``jax.random.fold_in(key, n)``.

    Args:
      name: of the stream.
      default: what is returned if no stream of that name is open. (Under ``init``, every stream is
        open.) Whether one is open is known when a function is traced, and is part of the keys of
        JAX's caches.

    Returns:
      A key of the kind the stream was opened with.

    Raises:
      MissingStreamError: if no stream of that name is open, and there is no ``default``.
      TypeError: if ``name`` is no string: the key comes from the stream, and is not passed.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jax.jit
    ... def dropout(x, rate):
    ...     key = jaxstate.next_key("dropout", default=None)
    ...     if key is None:
    ...         return x
    ...     return jnp.where(jax.random.bernoulli(key, rate, x.shape), 0, x / (1 - rate))
    >>> dropout(jnp.ones(3), 0.5)
    Array([1., 1., 1.], dtype=float32)
    >>> with jaxstate.rng_stream(jax.random.key(0), "dropout"):
    ...     y = dropout(jnp.ones(3), 1.0)
    >>> y
    Array([0., 0., 0.], dtype=float32)
    """
    if isinstance(name, Stream):
        raise TypeError(
            f"A random stream was given where its name is wanted.\nTo mend it:\n"
            f"    jaxstate.random.normal(shape, stream={name.name!r})\n"
            "    key = stream.next_key()      # or a key from the stream itself"
        )
    if not isinstance(name, str):
        raise no_key_wanted("next_key", 'jaxstate.next_key("dropout")')
    return draw(name, None) if default is _REQUIRED or _is_open(name) else default


def _is_open(name: str) -> bool:
    """Whether there is a stream of that name, be it one that cannot be drawn from here."""
    address = StreamAddress(name, "key")
    return any(isinstance(h, Streams) and h.knows(address) for h in holders())


def no_key_wanted(name: str, better: str) -> Exception:
    return TypeError(
        f"{name} takes no key: the key comes from the random stream that is open.\n"
        f"To mend it:\n    with jaxstate.rng_stream(key):\n        {better}"
    )


def _check_vmap(vmap: str) -> str:
    if vmap not in ("split", "share"):
        raise ValueError(f"rng_stream: vmap is 'split' or 'share', not {vmap!r}.")
    return vmap


def _check_count(count: Any) -> Any:
    if isinstance(count, _jax.Tracer):
        aval = _jax.typeof(count)
        if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.integer):
            raise TypeError(f"rng_stream: count is one integer, not {aval.str_short()}.")
        return jax.lax.convert_element_type(count, jnp.int32)
    if isinstance(count, jax.Array):
        count = jax.device_get(count)
    count = operator.index(count)
    if not 0 <= count < 2**31:
        raise ValueError(f"rng_stream: count is from 0 to 2**31 - 1, not {count}.")
    return np.int32(count)
