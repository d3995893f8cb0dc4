"""Random streams: keys that nobody has to split or pass.

    with jaxstate.rng_stream(jax.random.key(0)):
        k = jaxstate.next_key()                 # anywhere: eager, jit, scan, while, cond, vmap ...
        x = jaxstate.random.normal((3,))        # the samplers of jax.random, keyed from the stream

A stream is two slots: a key, which is only read, and a count, which every draw increases. Draw
number n is ``jax.random.fold_in(key, n)``, in program order, so a Python loop, a ``scan`` and a
``while_loop`` that draw as often give the same keys.

Under ``vmap`` a ``"split"`` stream (the default) gives every lane a stream of its own: the stream
outside draws one key for the whole vmap region, and lane i starts at ``fold_in(that key, i)`` with
count 0. In a ``"share"`` stream all lanes see the same keys.

``init`` opens every stream that nobody has opened, with a key made from its own (`FoldedStreams`).

Under ``shard_map`` and ``pmap`` the stream outside draws one key for the whole region too. With
``"split"`` the device with index i along the mapped axes starts at ``fold_in(that key, i)``, with
``"share"`` every device starts at that key; all with count 0.

This module also offers the samplers of `jax.random` without their ``key`` argument; ``stream=``
names the stream to draw from.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxstate import _jax
from jaxstate.core.initializers import folded, words_of
from jaxstate.core.resolve import is_inside, read, write
from jaxstate.core.slots import Address, Cell, Holder, Lane, holders, open_holder
from jaxstate.errors import (
    ClosedStateError,
    LaneWriteError,
    MissingStreamError,
    SplitStreamError,
    message,
    nearest,
    thread_that_has_nothing,
    warn_of_unopened,
)

__all__ = [
    "Stream",
    "ball",
    "bernoulli",
    "beta",
    "binomial",
    "bits",
    "categorical",
    "cauchy",
    "chisquare",
    "choice",
    "dirichlet",
    "double_sided_maxwell",
    "exponential",
    "f",
    "gamma",
    "generalized_normal",
    "geometric",
    "gumbel",
    "laplace",
    "loggamma",
    "logistic",
    "lognormal",
    "maxwell",
    "multinomial",
    "multivariate_normal",
    "next_key",
    "normal",
    "orthogonal",
    "pareto",
    "permutation",
    "poisson",
    "rademacher",
    "randint",
    "rayleigh",
    "rng_stream",
    "t",
    "triangular",
    "truncated_normal",
    "uniform",
    "wald",
    "weibull_min",
]

Shape = Sequence[int]
Sharding = NamedSharding | PartitionSpec
KeyLike = jax.Array | np.ndarray
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_OPEN = np.False_


Part = Literal["key", "count", "open"]


class StreamAddress(Address):
    """The key or the count of the innermost stream of a name, or of one particular stream.

    Attributes:
      part: the key, the count, or that the stream is open: a slot without information, which a
        jaxpr reads that looks at a particular stream and reads nothing else by its identity.
      identity: of the particular stream, or None.
      is_innermost: in an address that stands in a jaxpr and has an identity, whether the innermost
        stream of that name was that very stream; else None.
    """

    __slots__ = ("identity", "is_innermost", "name", "part")

    part: Part

    # The key too, though nobody writes it: where a function was made a pytree of its constants, and
    # that pytree is an argument of a jitted function, a captured key would be the key outside, and
    # the count in a vmap inside the count of the lanes. Key and count have to be read in one place.
    threaded = True

    stays_here = True

    def __init__(
        self, name: str, part: Part, identity: Any = None, is_innermost: bool | None = None
    ) -> None:
        self.name = name
        self.part = part
        self.identity = identity
        self.is_innermost = is_innermost

    def cell_here(self) -> Cell | None:
        holder = next((h for h in holders() if h.knows(self)), None)
        if isinstance(holder, _StreamHolder) and holder.anchor is _jax.current_trace():
            return None if self._order_changed(holder) else holder.cell(self)
        return None

    def holder(self) -> Holder:
        found = super().holder()
        if self.is_innermost is not None and self._order_changed(found):
            raise self._other_order()
        return found

    def _order_changed(self, found: Holder) -> bool:
        """Whether a jaxpr is wrong here that takes name and identity for one stream, or two."""
        if self.is_innermost is None or not isinstance(found, _StreamHolder):
            return False
        named = StreamAddress(self.name, self.part)
        innermost = next(h for h in holders() if h.knows(named))
        return (innermost is found) is not self.is_innermost

    def seen_from(self, boundary: Any) -> StreamAddress:
        """A handle's count goes by its name where that means the same stream.

        One slot must have one address in one jaxpr. (The rest keeps the handle's identity, so that
        a jaxpr that is used again where the name means another stream says so.)
        """
        if self.identity is None:
            return self
        named = StreamAddress(self.name, self.part)
        outside = (h for h in holders() if not (h.is_boundary or is_inside(h, boundary)))
        meant = next((h for h in outside if h.knows(named)), None)
        is_innermost = meant is not None and meant.knows(self)
        if self.part == "count":
            return named if is_innermost else self
        return StreamAddress(self.name, self.part, self.identity, is_innermost)

    def _parts(self) -> tuple[Any, ...]:
        return self.name, self.part, self.identity, self.is_innermost

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StreamAddress) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def __repr__(self) -> str:
        return f"the {self.part} of random stream {self.name!r}"

    def missing(self) -> Exception:
        if self.identity is not None and self.identity.thread not in (None, threading.get_ident()):
            return ClosedStateError(
                message(
                    f"A handle of random stream {self.name!r} was used in another thread than that"
                    " in which the stream is open.",
                    fix="""
                    key = stream.next_key()                # where the stream is open
                    thread = Thread(target=f, args=(key,))
                    with jaxstate.rng_stream(key):         # in the thread
                        ...
                    """,
                    used=_jax.user_location(),
                    thread=thread_that_has_nothing(),
                )
            )
        if self.identity is not None:
            return ClosedStateError(
                message(
                    f"{'A key was drawn from a' if self.part == 'key' else 'The count of a'}"
                    f" handle of random stream {self.name!r}"
                    f"{'' if self.part == 'key' else ' was read'} after its 'with' block ended.",
                    fix="""
                    with jaxstate.rng_stream(stream.key, count=stream.count) as stream:
                        k = stream.next_key()
                    """,
                    used=_jax.user_location(),
                )
            )
        names = {h.name for h in holders() if isinstance(h, _StreamHolder)}
        shown = "none" if not names else ", ".join(sorted(map(repr, names)))
        close = nearest(self.name, names)
        argument = "" if self.name == "default" else f', "{self.name}"'
        lines = (getattr(h, "line_with_keys", None) for h in holders())
        call = next((line(self.name) for line in lines if line), "")
        return MissingStreamError(
            message(
                f"A key was drawn from random stream {self.name!r}, and no stream of that name is"
                f" open.{f' Did you mean {close!r}?' if close else ''}",
                fix=f"""
                {call}
                with jaxstate.rng_stream(jax.random.key(0){argument}):
                    ...    # the code that draws
                """,
                used=_jax.user_location(),
                open_streams=shown,
                made_and_never_opened=_not_opened.get(self.name),
                thread=thread_that_has_nothing(),
            )
        )

    def _other_order(self) -> Exception:
        return ClosedStateError(
            message(
                f"A function was traced where a handle of random stream {self.name!r} was"
                f" {'' if self.is_innermost else 'not '}that of the innermost stream of the name,"
                " and is used again where it is not so.",
                fix=f"""
                with jaxstate.rng_stream(key, "{self.name}_2"):   # streams with names of their own
                jax.clear_caches()                            # or trace the function again
                """,
                used=_jax.user_location(),
            )
        )


class _Count(Cell):
    """The count of a stream: a number, which is kept where the key is.

    A call on other devices leaves it there, which would bind all later draws to them.
    """

    __slots__ = ("_is_free", "_key", "_value")

    def __init__(self, value: Any, key: Any) -> None:
        self._key = key
        self._value = value
        self._is_free = _jax.is_uncommitted(key)

    @property
    def value(self) -> Any:  # type: ignore[override]
        if type(self._value) is np.int32:
            self._value = _jax.beside(self._key, self._value)
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        if not (self._is_free and _jax.is_uncommitted(value)):
            value = _jax.beside(self._key, value)
        self._value = value


class _Identity:
    """Says which stream a handle is of.

    Attributes:
      thread: the number of the thread in which the stream is open, or None.
    """

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread: int | None = None


class _StreamHolder(Holder):
    """An open stream."""

    def __init__(
        self, key: Any, key_type: Any, name: str, vmap: str, count: Any, made: str
    ) -> None:
        super().__init__()
        self.name = name
        self.vmap = vmap
        self.made = made
        self.identity = _Identity()
        self.cells = {"key": Cell(key), "count": _Count(count, key), "open": Cell(_OPEN)}
        # Kept apart from the values: a rule that runs later asks for the types too.
        self.avals = {
            "key": key_type,
            "count": _jax.typeof(_jax.canonicalize(count)),
            "open": _jax.typeof(_OPEN),
        }
        self._signature = ("stream", name, vmap, self.avals["key"], self.avals["count"])

    def knows(self, address: Address) -> bool:
        if type(address) is not StreamAddress or address.name != self.name:
            return False
        return address.identity is None or address.identity is self.identity

    def cell(self, address: StreamAddress) -> Cell:  # type: ignore[override]
        return self.cells[address.part]

    def aval(self, address: StreamAddress) -> Any:  # type: ignore[override]
        return self.avals[address.part]

    def lane(  # type: ignore[override]
        self, address: StreamAddress, trace: Any, notes: dict[Any, Any]
    ) -> Lane | None:
        if self.vmap == "share" or address.part == "open":
            return None
        lanes = notes.get(self)
        if lanes is None and address.part == "count":
            return Lane(np.int32(0), None)  # to look at the count splits nothing
        if lanes is None:
            lanes = notes[self] = self._split(trace, address.identity)
        return lanes[address.part]

    def _split(self, trace: Any, identity: Any) -> dict[str, Lane]:
        """One draw outside, by name or by handle, and from it a key per lane."""
        if _jax.lanes_are_directions(trace):
            raise SplitStreamError(
                message(
                    f"Random stream {self.name!r} has vmap='split', and was drawn from under"
                    " jax.jacfwd or jax.hessian. Their lanes are directions of one derivative and"
                    " have to see the same numbers.",
                    fix=f"""
                    with jaxstate.rng_stream(key, {self.name!r}, vmap="share"):
                        jax.jacfwd(f)(x)
                    """,
                    made=self.made,
                    used=_jax.user_location(),
                )
            )
        with _jax.set_current_trace(_jax.parent_of(trace)):
            key = _draw(self.name, identity)
            lanes = jnp.arange(_jax.lane_count(trace), dtype=jnp.uint32)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, lanes)
        return {"key": Lane(keys, 0), "count": Lane(_jax.beside(key, np.int32(0)), None)}

    def differs_by_device(self, address: Address) -> bool:
        return True

    def device_cell(  # type: ignore[override]
        self, address: StreamAddress, notes: Any, from_outside: Any, index: Any
    ) -> Cell:
        if address.part == "open":
            return Cell(_OPEN)
        cells = notes.get(self)
        if cells is None:
            key = from_outside(lambda: _draw(self.name, address.identity))
            if self.vmap == "split":
                key = jax.random.fold_in(key, index())
            cells = notes[self] = {"key": Cell(key), "count": Cell(np.int32(0))}
        return cells[address.part]

    def without_values(self) -> _StreamHolder:
        copy = _StreamHolder.__new__(_StreamHolder)
        copy.__dict__.update(self.__dict__, cells={}, anchor=None, lane_tables={})
        return copy

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                f"Lanes of a vmap drew from random stream {self.name!r} a different number of"
                " times, and with vmap='share' they have one count.",
                fix=f"""
                with jaxstate.rng_stream(key, {self.name!r}, vmap="split"):
                    ...
                """,
                made=self.made,
                used=_jax.user_location(),
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    def signature(self) -> Hashable:
        return self._signature


class FoldedStreams(Holder):
    """Every stream that is not open: of each name one, whose key is made from one key and the name.

    The key of the stream "dropout" is the given one, with the first 8 bytes of the SHA-256 digest
    of "/dropout" folded in. (The path of no parameter begins with a slash.)
    """

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key, self.key_type = _key_and_type(key, "init")
        self.mesh = _jax.abstract_mesh()
        self.streams: dict[str, _StreamHolder] = {}

    def knows(self, address: Address) -> bool:
        if not isinstance(address, StreamAddress) or address.identity is not None:
            return False
        return not any(isinstance(h, _StreamHolder) and h.knows(address) for h in holders())

    def stream(self, name: str) -> _StreamHolder:
        """The stream of that name; it gets its key when the key is asked for."""
        if name not in self.streams:
            new = _StreamHolder(None, self.key_type, name, "split", np.int32(0), "")
            self.streams[name] = new.without_values()
        return self.streams[name]

    def cell(self, address: StreamAddress) -> Cell:  # type: ignore[override]
        stream = self.stream(address.name)
        if not stream.cells:
            with _jax.set_current_trace(self.anchor), _jax.use_abstract_mesh(self.mesh):
                key = folded(self.key, words_of(f"/{address.name}"))
            stream.cells = {"key": Cell(key), "count": _Count(np.int32(0), key)}
        return stream.cell(address)

    def aval(self, address: StreamAddress) -> Any:  # type: ignore[override]
        return self.stream(address.name).aval(address)

    def lane(  # type: ignore[override]
        self, address: StreamAddress, trace: Any, notes: dict[Any, Any]
    ) -> Lane | None:
        if _jax.lanes_are_directions(trace):
            return None  # whoever opens the stream will say vmap="share"
        return self.stream(address.name).lane(address, trace, notes)

    def differs_by_device(self, address: Address) -> bool:
        return True

    def device_cell(  # type: ignore[override]
        self, address: StreamAddress, notes: Any, from_outside: Any, index: Any
    ) -> Cell:
        return self.stream(address.name).device_cell(address, notes, from_outside, index)

    def without_values(self) -> FoldedStreams:
        copy = FoldedStreams.__new__(FoldedStreams)
        streams = {name: stream.without_values() for name, stream in self.streams.items()}
        copy.__dict__.update(self.__dict__, key=None, streams=streams, anchor=None, lane_tables={})
        return copy

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return self.stream(address.name).refuse_lanes(address, trace)  # type: ignore[attr-defined]

    def signature(self) -> Hashable:
        return "every stream", self.key_type


class Stream:
    """A handle of an open stream: what ``with rng_stream(...) as stream`` gives.

    ``stream.key`` and ``stream.count`` are enough to go on later, in another process too:
    ``rng_stream(key, count=count)``.
    """

    def __init__(self, holder: _StreamHolder) -> None:
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
            raise _no_key_wanted("Stream.next_key", "stream.next_key()")
        return _draw(self._holder.name, self._holder.identity)

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
            read(StreamAddress(holder.name, "open", holder.identity))
        return read(StreamAddress(holder.name, part, holder.identity))

    def __repr__(self) -> str:
        return f"<random stream {self.name!r}>"


# The streams that were made and not opened, by name: where.
_not_opened: dict[str, str] = {}


class _Opening(AbstractContextManager[Stream]):
    """A stream that ``with`` opens."""

    def __init__(self, holder: _StreamHolder) -> None:
        self._holder = holder
        self._open: open_holder | None = None
        self._is_refused = False
        _not_opened[holder.name] = holder.made

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
        _not_opened.pop(holder.name, None)
        self._open = open_holder(holder)
        self._open.__enter__()
        holder.identity.thread = threading.get_ident()
        return Stream(holder)

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
        raise TypeError(
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
    if not isinstance(name, str):
        aval = _jax.type_of(name)
        found = repr(name) if aval is None else aval.str_short()
        raise TypeError(
            f"rng_stream wants the name of a stream second, and was given {found}.\n"
            'To mend it:\n    with jaxstate.rng_stream(key, "dropout"):'
        )
    holder = _StreamHolder(
        *_key_and_type(key, "rng_stream"), name, _check_vmap(vmap), _check_count(count),
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
        raise _no_key_wanted("next_key", 'jaxstate.next_key("dropout")')
    return _draw(name, None) if default is _REQUIRED or _is_open(name) else default


def _is_open(name: str) -> bool:
    """Whether there is a stream of that name, be it one that cannot be drawn from here."""
    address, kinds = StreamAddress(name, "key"), (_StreamHolder, FoldedStreams)
    return any(isinstance(h, kinds) and h.knows(address) for h in holders())


def _draw(name: str, identity: Any) -> jax.Array:
    count_address = StreamAddress(name, "count", identity)
    key = read(StreamAddress(name, "key", identity))
    count = read(count_address)
    write(count_address, _after(count))
    return jax.random.fold_in(key, count)


def _after(count: Any) -> Any:
    if isinstance(count, (np.generic, np.ndarray)):
        n = int(count)  # NumPy warns of a number that goes round
        return np.int32(n + 1 if n < 2**31 - 1 else -(2**31))
    if not _jax.is_concrete_array(count):
        return count + 1
    # The same, without a number that has to be brought to the device: a transfer guard forbids it.
    return jax.lax.neg(jax.lax.bitwise_not(count))


def _no_key_wanted(name: str, better: str) -> Exception:
    return TypeError(
        f"{name} takes no key: the key comes from the random stream that is open.\n"
        f"To mend it:\n    with jaxstate.rng_stream(key):\n        {better}"
    )


def check_key(key: Any, where: str) -> Any:
    """``key`` as an array, if it is one key; a TypeError that says what it is otherwise."""
    return _key_and_type(key, where)[0]


def _key_and_type(key: Any, where: str) -> tuple[Any, Any]:
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
    raise TypeError(
        f"{where} wants one random key, and was given {found}.\n"
        "To mend it:\n    key = jax.random.key(0)"
    )


def _default_kind() -> Hashable:
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


@functools.lru_cache
def _raw_key_shape(kind: Hashable) -> tuple[int, ...]:
    """The shape of a raw key where ``kind`` is the default."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


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


def __dir__() -> list[str]:
    return __all__


# -- Samplers --------------------------------------------------------------------------------


def _sampler(declared: F) -> F:
    """The function of `jax.random` with the name of ``declared``, keyed from a stream.

    What is declared is what type checkers see. The signature is that of the JAX that is installed,
    whose older versions lack some options.
    """
    name = declared.__name__
    with_key = getattr(jax.random, name)
    declared_signature = inspect.signature(declared)
    first, *_ = declared_signature.parameters

    @functools.wraps(declared)
    def sample(*args: Any, stream: str = "default", **kwargs: Any) -> jax.Array:
        if "key" in kwargs or (args and is_a_key(args[0])):
            raise _no_key_wanted(
                f"jaxstate.random.{name}",
                f"jaxstate.random.{name}({first}=...)\n"
                f"    jax.random.{name}(key, {first}=...)      # or with a key of your own",
            )
        return with_key(next_key(stream), *args, **kwargs)

    sample.__signature__ = _without_key(with_key, declared_signature)  # type: ignore[attr-defined]
    sample.__doc__ = (
        f"`jax.random.{name}` with the next key of the random stream called ``stream``.\n\n"
        f"All other arguments, the result and the distribution are those of"
        f" `jax.random.{name}`.\n\n"
        "Raises:\n  MissingStreamError: if no stream of that name is open.\n"
        "  TypeError: if the first argument is a random key. (An array that only looks like one,\n"
        "    of the type of a raw key, has to be passed by name.)\n"
    )
    return cast(F, sample)


def _without_key(with_key: Any, declared: inspect.Signature) -> inspect.Signature:
    """The parameters that the function of JAX has after its key, and ``stream``."""
    _, *installed = inspect.signature(with_key).parameters.values()
    known = declared.parameters
    parameters = [
        p.replace(annotation=known[p.name].annotation if p.name in known else p.empty)
        for p in installed
    ]
    return declared.replace(parameters=[*parameters, known["stream"]])


def is_a_key(x: Any) -> bool:
    """Whether an argument is one key, or looks like a raw one."""
    if not isinstance(x, jax.Array):
        return False
    if _jax.is_typed_key(x):
        return x.shape == ()
    return x.dtype == jnp.uint32 and x.shape == _raw_key_shape(_default_kind())


# fmt: off
@_sampler
def ball(
    d: int, p: ArrayLike = 2, shape: Shape = (), dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def bernoulli(
    p: ArrayLike = 0.5, shape: Shape | None = None, mode: str = "low", *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def beta(
    a: ArrayLike, b: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def binomial(
    n: ArrayLike, p: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def bits(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def categorical(
    logits: ArrayLike, axis: int = -1, shape: Shape | None = None, replace: bool = True,
    mode: str | None = None, *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def cauchy(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def chisquare(
    df: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def choice(
    a: ArrayLike, shape: Shape = (), replace: bool = True, p: ArrayLike | None = None,
    axis: int = 0, mode: str | None = None, *, stream: str = "default",
) -> jax.Array: ...

@_sampler
def dirichlet(
    alpha: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def double_sided_maxwell(
    loc: ArrayLike, scale: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None, *,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def exponential(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def f(
    dfnum: ArrayLike, dfden: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def gamma(
    a: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def generalized_normal(
    p: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def geometric(
    p: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def gumbel(
    shape: Shape = (), dtype: DTypeLike | None = None, mode: str | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def laplace(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def loggamma(
    a: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def logistic(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def lognormal(
    sigma: ArrayLike = np.float32(1.0), shape: Shape | None = None, dtype: DTypeLike | None = None,  # noqa: B008
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def maxwell(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def multinomial(
    n: ArrayLike, p: ArrayLike, *, shape: Shape | None = None, dtype: DTypeLike | None = None,
    unroll: int | bool = 1, stream: str = "default",
) -> jax.Array: ...

@_sampler
def multivariate_normal(
    mean: ArrayLike, cov: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    method: str = "cholesky", *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def normal(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def orthogonal(
    n: int, shape: Shape = (), dtype: DTypeLike | None = None, m: int | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def pareto(
    b: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def permutation(
    x: ArrayLike, axis: int = 0, independent: bool = False, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def poisson(
    lam: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    method: str = "exact", out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def rademacher(
    shape: Shape = (), dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def randint(
    shape: Shape, minval: ArrayLike, maxval: ArrayLike, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def rayleigh(
    scale: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def t(
    df: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def triangular(
    left: ArrayLike, mode: ArrayLike, right: ArrayLike, shape: Shape | None = None,
    dtype: DTypeLike | None = None, *, out_sharding: Sharding | None = None,
    stream: str = "default",
) -> jax.Array: ...

@_sampler
def truncated_normal(
    lower: ArrayLike, upper: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None,
    *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def uniform(
    shape: Shape = (), dtype: DTypeLike | None = None, minval: ArrayLike = 0.0,
    maxval: ArrayLike = 1.0, *, out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def wald(
    mean: ArrayLike, shape: Shape | None = None, dtype: DTypeLike | None = None, *,
    out_sharding: Sharding | None = None, stream: str = "default",
) -> jax.Array: ...

@_sampler
def weibull_min(
    scale: ArrayLike, concentration: ArrayLike, shape: Shape = (), dtype: DTypeLike | None = None,
    *, stream: str = "default",
) -> jax.Array: ...
