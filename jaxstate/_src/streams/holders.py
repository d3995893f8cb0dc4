"""Streams as holders of state: where a key and a count are, in lanes and on devices too.

A stream is two slots: a key, which is only read, and a count, which every draw increases.

Under ``vmap`` a ``"split"`` stream (the default) gives every lane a stream of its own: the stream
outside draws one key for the whole vmap region, and lane i starts at ``fold_in(that key, i)`` with
count 0. In a ``"share"`` stream all lanes see the same keys.

Under ``shard_map`` and ``pmap`` the stream outside draws one key for the whole region too. With
``"split"`` the device with index i along the mapped axes starts at ``fold_in(that key, i)``, with
``"share"`` every device starts at that key; all with count 0.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import holders_outside
from jaxstate._src.core.resolve import read_at, write_at
from jaxstate._src.core.slots import Address, Cell, Holder, Lane, holders
from jaxstate.errors import (
    ClosedStateError,
    LaneWriteError,
    MissingStreamError,
    SplitStreamError,
    message,
    nearest,
    thread_that_has_nothing,
)

__all__ = ["Count", "StreamAddress", "StreamHolder", "Streams", "draw", "not_opened"]

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
        if isinstance(holder, StreamHolder) and holder.anchor is _jax.current_trace():
            return None if self._order_changed(holder) else holder.cell(self)
        return None

    def holder(self) -> Holder:
        found = super().holder()
        if self.is_innermost is not None and self._order_changed(found):
            raise self._other_order()
        return found

    def _order_changed(self, found: Holder) -> bool:
        """Whether a jaxpr is wrong here that takes name and identity for one stream, or two."""
        if self.is_innermost is None or not isinstance(found, StreamHolder):
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
        meant = next((h for h in holders_outside(boundary) if h.knows(named)), None)
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
        names = {h.name for h in holders() if isinstance(h, StreamHolder)}
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
                made_and_never_opened=not_opened.get(self.name),
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


class Count(Cell):
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


class Streams(Holder):
    """What answers for streams, by their names."""


class StreamHolder(Streams):
    """An open stream."""

    def __init__(
        self, key: Any, key_type: Any, name: str, vmap: str, count: Any, made: str
    ) -> None:
        super().__init__()
        self.name = name
        self.vmap = vmap
        self.made = made
        self.identity = _Identity()
        self.cells = {"key": Cell(key), "count": Count(count, key), "open": Cell(_OPEN)}
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
            key = draw(self.name, identity)
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
            key = from_outside(lambda: draw(self.name, address.identity))
            if self.vmap == "split":
                key = jax.random.fold_in(key, index())
            cells = notes[self] = {"key": Cell(key), "count": Cell(np.int32(0))}
        return cells[address.part]

    def without_values(self) -> StreamHolder:
        copy = StreamHolder.__new__(StreamHolder)
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


# The streams that were made and not opened, by name: where.
not_opened: dict[str, str] = {}


def draw(name: str, identity: Any) -> jax.Array:
    count_address = StreamAddress(name, "count", identity)
    key = read_at(StreamAddress(name, "key", identity))
    count = read_at(count_address)
    write_at(count_address, _after(count))
    return jax.random.fold_in(key, count)


def _after(count: Any) -> Any:
    if isinstance(count, (np.generic, np.ndarray)):
        n = int(count)  # NumPy warns of a number that goes round
        return np.int32(n + 1 if n < 2**31 - 1 else -(2**31))
    if not _jax.is_concrete_array(count):
        return jax.lax.add(count, np.int32(1))  # what "+" is, without a jitted function
    # The same, without a number that has to be brought to the device: a transfer guard forbids it.
    return jax.lax.neg(jax.lax.bitwise_not(count))
