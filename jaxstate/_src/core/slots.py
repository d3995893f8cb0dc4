"""What state is: addresses, cells, and the holders that are open on a thread.

* An *address* is what a program, or a jaxpr, says about a slot: "the count of the stream
  'dropout'", "the parameter 'w' of the module I was just called in". It is static and hashable, so
  it can stand in a jaxpr that is cached and used again under other state.
* A *cell* is where the value of a slot lives right now.
* A *holder* answers for cells: an open random stream, the parameters of an ``apply``, the operands
  of a custom derivative rule. Holders are kept in a stack per thread; the innermost that knows an
  address wins. The trace that was current when a holder was opened is its *anchor*: code that runs
  under the anchor sees the cells directly, code under traces further in sees them through those
  traces (`core.resolve`).

Whatever shapes a trace (which holders are open, and the types of what they hold) is part of JAX's
cache keys through `_jax.set_context_signature`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

from jaxstate._src import _jax
from jaxstate.errors import SlotTypeError, message

__all__ = [
    "Address", "AllLanes", "Cell", "Holder", "any_known", "any_open", "holders", "open_holder",
]  # fmt: skip


class Address:
    """How a program refers to a slot. Subclasses are immutable, hashable and hold no arrays."""

    __slots__ = ()

    # The holder, for an address that means the slot of one particular holder, open or not.
    own_holder: Callable[[], Holder | None] | None = None

    # Slots that nobody writes are captured as constants of a jaxpr; the others are threaded
    # through it.
    threaded = False

    # Whether the slot is a part of an object, which holds what the current trace sees: see `tree`.
    in_objects = False

    # Slots that a program may write; the devices of a shard_map share a cell of them.
    @property
    def may_be_written(self) -> bool:
        return self.threaded

    # Makes one value of the lanes' values, ``reduce(values, axis=0)``, for a slot that the lanes
    # of a vmap (or the devices of a shard_map) share; None if such values are refused.
    reduce: Callable[..., Any] | None = None

    # What makes one value of several slots together, of what lanes or devices wrote to each:
    # they are written as one (`resolve.write_each`).
    joint: Any = None  # a `Joint`

    # Whether its type says over which mesh axes of a shard_map it varies, as that of a value does.
    # (What it holds may vary sooner or later than it was made.)
    has_axes = False

    # The type that a jaxpr expects in which the address stands, if the slot's type may change.
    wanted: Any = None

    # A scan has one value per step of a slot with this key, stacked outside. Slots of its body with
    # one key are one slot outside, with their number as its second axis: `over(steps, number)`.
    per_step: Hashable = None

    # Whether a loop may bring what is written to the sharding that the slot has before it.
    may_be_resharded = False

    # Whether a custom derivative rule is given the value only if it reads it before it writes.
    given_if_read = False

    def holder(self) -> Holder:
        """The innermost open holder that knows the address; a named error if there is none."""
        for holder in reversed(_thread.stack):
            if holder.knows(self):
                return holder
        raise self.missing()

    def known_holder(self) -> Holder | None:
        """`holder`, or None."""
        return next((holder for holder in holders() if holder.knows(self)), None)

    def over(self, *sizes: int) -> Address:
        """The slot outside, where it has further leading axes. (Only called if `per_step`.)"""
        raise NotImplementedError

    def pinned(self) -> Address:
        """The address of the slot that is meant here, for use elsewhere in this function."""
        return self

    def version(self) -> int:
        """How often the slot was written, for one that is captured and may be written."""
        return 0

    def is_written_in(self, trace: Any, written: Any) -> bool:
        """Whether the jaxpr that ``trace`` builds, which wrote the slots ``written``, wrote it."""
        return self.seen_from(trace) in written

    # Whether `note_write` does anything.
    notices_writes = False

    def note_write(self) -> None:
        """To be called at every write."""

    def note_read(self) -> None:
        """To be called before the program reads it in the middle of a function."""

    def missing(self) -> Exception:
        """The error that says that nothing open knows the address."""
        raise NotImplementedError

    def aval(self) -> Any:
        """The type of the value, without making it."""
        return self.holder().aval(self)

    # Whether `cell_here` gives the same cell at top level as long as that lives, until a holder is
    # opened or closed.
    stays_here = False

    # Whether its holder may recall where it is: see `Holder.remembered`.
    is_recalled = False

    def cell_here(self) -> Cell | None:
        """The cell of the slot, if nothing stands between the program and the cell.

        To ask changes nothing: it makes no cell, and gives out no name or number. None is always
        right, and sends the caller the long way.
        """
        return None

    def seen_from(self, boundary: Any) -> Address:
        """The address as it stands in the jaxpr, or the holder, ``boundary``.

        What it leaves out is completed at the place where that jaxpr is bound.
        """
        return self

    def changed(self, wanted: Any, value: Any) -> Exception:
        """The error for a cached jaxpr that was traced for another type of this slot."""
        return SlotTypeError(
            message(
                f"{self} has type {_jax.shown(_jax.typeof(value))} here, and a function that"
                f" was traced before uses it as {_jax.shown(wanted)}.",
                fix="""
                jax.clear_caches()      # after the type of a slot has changed for good
                """,
                used=_jax.user_location(),
            )
        )

    def path_to(self) -> Hashable:
        """What of the address is not compared, since equal ones mean one slot inside of one jaxpr,
        and tells where that slot is outside of it."""
        return None

    # Whether two addresses that differ in one jaxpr may mean one slot where that is bound.
    may_alias = False

    def meaning_here(self) -> Hashable:
        """What this address has in common, here, with others that mean the same slot."""
        return self

    def aliased(self, other: Address) -> Exception:
        """The error for two addresses in one jaxpr that mean one slot."""
        raise NotImplementedError

    def reduced(self, values: Any) -> Any:
        """What ``reduce`` makes of the lanes' values, which vary along the first axis."""
        raise NotImplementedError

    def check_repeats(self) -> None:
        """Raises if a jaxpr that uses the slot may not run any number of times."""

    def check_absence(self, others: Sequence[Address]) -> None:
        """Raises if a branch, which writes ``others``, may not leave alone what another branch
        writes."""

    def renewed(self, use: dict[Any, Any] | None) -> Address:
        """The address for one use of the jaxpr in which it stands.

        ``use`` maps what was made inside that jaxpr to what this use makes; None if the jaxpr is
        not bound as a whole, but evaluated equation by equation.
        """
        return self


class Joint:
    """How lanes' values of several slots become one value of each: see `Address.joint`."""

    def whole(self, address: Address) -> Hashable:
        """What the addresses have in common that belong together, and no others."""
        raise NotImplementedError

    def reduced(self, pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        """One value per address, of pairs ``(address, values)``: all that belong together."""
        raise NotImplementedError


class Cell:
    """The value of one slot: an array, or a tracer of the holder's anchor or of a trace outside."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


_ages = itertools.count()


def next_age() -> int:
    """A number that is larger the later it is taken."""
    return next(_ages)


class Holder:
    """Something open that answers for cells."""

    anchor: Any = None
    used_on: Any = None  # the loose holders of the thread that used it last
    _remains: Holder | None = None

    # A custom rule that is given its state as operands answers for every address, and what stands
    # outside of it is seen from the trace `outside`, with the holders `below` open. (So it is for a
    # shard_map, which is no boundary: its jaxpr, if it has one, is.)
    is_boundary = False
    outside: Any = None
    below: Sequence[Holder] = ()

    # The `family` of the transparent trace whose slot this is.
    family: Any = None

    @property
    def opened_under(self) -> Any:
        """The trace under which it was opened."""
        return self.anchor

    def __init__(self) -> None:
        self.lane_tables: dict[int, Any] = {}  # see `notes.lanes_of`
        self.extra: dict[Any, Any] = {}  # what clients note, by their own keys
        self.age = next_age()

    def knows(self, address: Address) -> bool:
        """Whether the address is one of this holder's."""
        raise NotImplementedError

    def passed_on(self, address: Address) -> Holder | None:
        """The holder outside that answers instead, for an address that this one leaves alone."""
        return None

    def cell(self, address: Address) -> Cell:
        """The cell of an address that the holder knows; made now if the holder makes cells."""
        raise NotImplementedError

    def write_cells(self, addresses: Sequence[Address], values: Sequence[Any]) -> None:
        """Writes the cells of slots that belong together (`Address.joint`), or of one slot."""
        for address, value in zip(addresses, values, strict=True):
            self.cell(address).value = value

    def aval(self, address: Address) -> Any:
        """The type of a slot, without making the slot."""
        return _jax.typeof(self.cell(address).value)

    def varies_over(self, address: Address, read: Callable[[], Any]) -> frozenset[Any]:
        """The mesh axes over which a slot varies as a jaxpr sees it that is traced now.

        ``read()`` is what the slot holds outside of that jaxpr.
        """
        return _jax.varying_axes(read())

    def without_values(self) -> Holder:
        """What is left of the holder for a function that runs when it may be closed: its names
        and its policy, and no arrays or tracers."""
        return self

    def remains(self) -> Holder:
        """`without_values`, for one who only asks what it knows: made once."""
        if self._remains is None:
            self._remains = self.without_values()
        return self._remains

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> Lane | AllLanes | None:
        """The lanes' own cell of the address in the vmap of ``trace``; None if lanes share it.

        ``notes`` is a place to keep cells in, which ends with that vmap.
        """
        return None

    def differs_by_device(self, address: Address) -> bool:
        """Whether every device of a shard_map has its own cell of the address."""
        return False

    def device_cell(
        self,
        address: Address,
        notes: dict[Any, Any],
        from_outside: Callable[[Callable[[], Any]], Any],
        index: Callable[[], Any],
    ) -> Cell:
        """The device's own cell of the address in a shard_map.

        ``notes`` is a place to keep cells in, which ends with that shard_map;
        ``from_outside(draw)`` is what ``draw()`` gives in the place where it is called;
        ``index()`` is the device's index.
        """
        raise NotImplementedError

    def place_here(self) -> Hashable:
        """All that decides, here and now, which cells addresses mean and what the holder knows when
        they were asked for; None if that cannot be said."""
        return None

    # The values of a holder with a place: its memories number them.
    numbered: list[Any]

    def numbered_cell(self, number: int) -> Cell:
        """The cell of a variable among them."""
        raise NotImplementedError

    def remembered(self, addresses: Sequence[Address]) -> Memory | None:
        """What the holder knows now, without any values, to be used again where `place_here` is
        equal, in this holder or another; None if that cannot be."""
        return None

    def recall(self, memory: Any) -> None:
        """From now on the holder knows what it knew when it `remembered` that."""
        raise NotImplementedError

    def captured(self, address: Address, value: Any, version: int) -> Any:
        """What a boundary makes of ``value``, the capture of a slot that it was given as an operand
        when the slot had been written ``version`` times: see `resolve.read_since`."""
        raise NotImplementedError

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        """The error for a value per lane written to a slot that the lanes share."""
        raise NotImplementedError

    def signature(self) -> Hashable:
        """What of the holder can shape a trace; None for nothing."""
        return None


class Memory:
    """What a holder knew at one time: see `Holder.remembered`.

    Attributes:
      numbers: of the values of the addresses that were asked for.
    """

    numbers: Sequence[int]


class Lane:
    """The value of one slot in each lane of a vmap: the array over all lanes and its batch axis,
    and no tracer, since the leak checker counts these."""

    __slots__ = ("batch_dim", "value")

    def __init__(self, value: Any, batch_dim: int | None) -> None:
        self.value = value
        self.batch_dim = batch_dim

    def write(self, value: Any, batch_dim: int | None) -> None:
        self.value, self.batch_dim = value, batch_dim


class AllLanes(NamedTuple):
    """Says that the values of all lanes are one slot outside of the vmap, on its leading axis."""

    address: Address


class OpenHere:
    """What is known of the holders that are open, until one is opened or closed.

    Attributes:
      signature: what of them can shape a trace, compared by identity; None for nothing.
      found: what callers note.
    """

    __slots__ = ("__weakref__", "found", "signature")

    def __init__(self, signature: Hashable) -> None:
        self.signature = signature
        self.found: dict[Any, Any] = {}


class _Stack(list):
    """The open holders of a thread; another thread may close one of them."""

    def __init__(self) -> None:
        self.here: Any = OpenHere(None)  # None if another thread has closed one


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.stack = _Stack()
        self.loose: WeakSet[Holder] = WeakSet()
        self.published: tuple[Hashable, ...] = ()
        self.guards = 0  # see `where_unused`


_thread = _ThreadState()

# Holders that are not in a stack, of any thread: their addresses know them (`Address.own_holder`).
_loose_holders: WeakSet[Holder] = WeakSet()

# Entered around a function that runs inside of a holder that is a boundary, or of the devices of a
# shard_map: ``with inside(holder)``.
around_functions: list[Callable[[Holder], AbstractContextManager[Any]]] = []

# Called when a holder is opened: what has to look at packages that were imported since.
on_open: list[Callable[[], None]] = []


def holders() -> Iterator[Holder]:
    """The open holders of this thread, innermost first."""
    return reversed(_thread.stack)


def any_stacked() -> bool:
    """Whether this thread has open holders."""
    return bool(_thread.stack)


def any_open() -> bool:
    """Whether this thread has state: open holders, or slots that it has made or used."""
    return bool(_thread.stack or _thread.loose)


def any_known() -> bool:
    """Whether a function could use state: also a slot of another thread that this one has not used.

    For what shows in nothing if the function uses none.
    """
    return bool(_thread.stack or _loose_holders)


def add_loose(holder: Holder) -> None:
    """To be called with a holder that is in no stack."""
    _loose_holders.add(holder)
    note_use(holder)


def note_use(holder: Holder) -> None:
    """To be called where this thread uses such a holder."""
    loose = _thread.loose
    if holder.used_on is loose:
        return
    is_new = holder not in loose
    loose.add(holder)
    holder.used_on = loose
    if is_new and _thread.guards:
        raise _FirstUseError


class _FirstUseError(BaseException):
    """Ends a call that was taken for one without state."""


def where_unused(call: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What ``call()`` returns, on a thread without state.

    If it uses a slot of another thread, it ends there, and ``otherwise()`` is called: this thread
    has state then.
    """
    if not _loose_holders:
        return call()
    _thread.guards += 1
    try:
        return call()
    except _FirstUseError:
        if _thread.guards > 1:
            raise
    finally:
        _thread.guards -= 1
    return otherwise()


class open_holder:  # a class: generators take longer
    """Opens ``holder`` on this thread, anchored at the trace that is current.

    Closing removes this very holder: a generator may close it when others were opened since.
    """

    __slots__ = ("_holder", "_stack")

    def __init__(self, holder: Holder) -> None:
        self._holder = holder

    def __enter__(self) -> None:
        for notice in on_open:
            notice()
        self._stack = _thread.stack
        self._holder.anchor = _jax.holding_trace(_jax.current_trace())
        self._stack.append(self._holder)
        try:
            _publish_signature(self._stack)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        _remove(self._stack, self._holder)
        if self._stack is _thread.stack:
            _publish_signature(self._stack)
        else:  # a generator may be closed by another thread
            self._stack.here = None
        self._holder.anchor = None


def open_here() -> OpenHere:
    """What is known of the holders that are open on this thread."""
    if _thread.stack.here is None:
        _publish_signature(_thread.stack)
    return _thread.stack.here  # type: ignore[return-value]


def function_inside(holder: Holder) -> ExitStack:
    """What clients do around a function that runs inside of ``holder``."""
    around = ExitStack()
    for client in around_functions:
        around.enter_context(client(holder))
    return around


def stack() -> list[Holder]:
    """The open holders of this thread, outermost first."""
    return list(_thread.stack)


def signature_changed() -> None:
    """To be called when the signature of an open holder is another one than before."""
    _publish_signature(_thread.stack)


class only_open:
    """For a while, ``holders`` are the open holders of this thread."""

    __slots__ = ("_hidden", "_holders", "_stack")

    def __init__(self, holders: Sequence[Holder]) -> None:
        self._holders = holders

    def __enter__(self) -> None:
        self._stack = _thread.stack
        self._hidden = list(self._stack)
        self._stack[:] = self._holders
        _publish_signature(self._stack)

    def __exit__(self, *_: object) -> None:
        self._stack[:] = self._hidden
        _publish_signature(self._stack)


def _remove(stack: list[Holder], holder: Holder) -> None:
    for i in range(len(stack) - 1, -1, -1):
        if stack[i] is holder:
            del stack[i]
            return


class _Signature:
    """One interned signature: JAX's caches compare it on every jitted call, by identity."""

    __slots__ = ("__weakref__", "holders")

    def __init__(self, signatures: tuple[Hashable, ...]) -> None:
        self.holders = signatures


_signatures: WeakValueDictionary[tuple[Hashable, ...], _Signature] = WeakValueDictionary()
_signatures_lock = threading.Lock()


# What else can shape a trace: each is called, and says None for nothing.
signature_parts: list[Callable[[], Hashable]] = []


def _publish_signature(stack: _Stack) -> None:
    signatures = tuple([s for holder in stack if (s := holder.signature()) is not None])
    for part in signature_parts:
        if (signature := part()) is not None:
            signatures += (signature,)
    if signatures == _thread.published and stack.here is not None:
        stack.here = OpenHere(stack.here.signature)
        return
    token = None
    if signatures:
        with _signatures_lock:
            token = _signatures.setdefault(signatures, _Signature(signatures))
    _jax.set_context_signature(token)
    _thread.published, stack.here = signatures, OpenHere(token)
