"""Writable arrays: the tracers that a program with ``x[i] = y`` holds.

A *buffer* is what a writable array and its views share: the current value, and the trace under
which the array was born, its home. Code that runs at home sees the value directly. Code further in
(a jitted function, a loop body, lanes ...) reaches it as a slot (`jaxstate.core.resolve`), which
the buffer becomes the first time that happens.

What a program holds is never what JAX holds: when a writable array is an operand, JAX canonicalizes
it, and gets the value that the array has at that moment. So a later write changes nothing that was
computed before, residuals of derivatives included.

There are two kinds, with the same methods (`Writable`):

* `WritableArray`, a tracer of jaxstate's own: arguments and results of the outermost function,
  views, and what `array` makes.
* Subclasses of JAX's own tracers. While an in-place function runs, the tracers that JAX makes are
  of these types, so that arguments and intermediate values of every loop body can be written too.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import _jax
from jaxstate.arrays import numpy_functions, views
from jaxstate.arrays.masked import MaskedElements, check_fits, mask_in, masked_elements
from jaxstate.arrays.updates import Update, update_at
from jaxstate.core import discharge, resolve, slots
from jaxstate.core.capture import nowhere
from jaxstate.core.refs import Kept, KeptCell, Slot, SlotAddress, Taken, append_result, writing
from jaxstate.core.slots import Address, Holder, Lane
from jaxstate.errors import (
    ClosedStateError,
    CustomRuleStateError,
    LaneWriteError,
    SlotTypeError,
    message,
)

__all__ = ["Activation", "Writable", "WritableArray", "fresh", "is_array", "snapshot"]


# -- When arrays are writable ----------------------------------------------------------------


class Activation(Holder):
    """One call of an in-place function, open while it runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.ended = False

    def knows(self, address: Address) -> bool:
        return False

    def signature(self) -> Any:
        """Inside, JAX traces again what it has traced outside: ``x += y`` means something else."""
        return Activation

    def escaped(self) -> Exception:
        return ClosedStateError(
            message(
                f"A writable array of the in-place function {self.name!r} is used after the"
                " function has ended.",
                fix="""
                return x                    # a result of the function is an ordinary array
                x = jaxstate.array(x)       # or make it outside, where it is used
                """,
                used=_jax.user_location(),
            )
        )


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.activations: list[Activation] = []
        self.quiet = 0


_thread = _ThreadState()


def activation() -> Activation | None:
    """The innermost in-place function that runs on this thread."""
    return _thread.activations[-1] if _thread.activations else None


@contextmanager
def activated(new: Activation) -> Iterator[None]:
    """Runs an in-place function, whose inner functions JAX traces.

    If it called them instead (`jax.disable_jit`), they would write the arrays that they are given,
    and not arrays of their own.
    """
    _jax.IN_PLACE.begin()
    _begin_use()
    _thread.activations.append(new)
    tracing = jax.disable_jit(False) if _jax.jit_is_disabled() else nullcontext()
    try:
        with slots.open_holder(new), tracing:
            yield
    finally:
        _thread.activations.remove(new)
        new.ended = True
        _jax.IN_PLACE.end()


@contextmanager
def _quiet() -> Iterator[None]:
    """For work on the values themselves, which makes no arrays that a program could hold."""
    _thread.quiet += 1
    try:
        here = _jax.current_trace()
        while isinstance(here, InplaceTrace):
            here = here.parent_trace
        with _jax.set_current_trace(here):
            yield
    finally:
        _thread.quiet -= 1


# -- Buffers ---------------------------------------------------------------------------------


def _place() -> Any:
    """The trace that holds the arrays of the code that runs now."""
    return _jax.holding_trace(_jax.current_trace())


class Buffer(Kept):
    """The value that a writable array and its views share.

    Attributes:
      value: the value at home, until the buffer is a slot.
      home: the trace under which the array was born.
      age: larger than that of what was there before.
      version: counts the writes made at home.
    """

    __slots__ = (
        "__weakref__", "activation", "age", "home", "is_own", "kept", "made", "slot", "taken",
        "version",
    )  # fmt: skip

    def __init__(self, value: Any, home: Any, age: int, within: Activation | None) -> None:
        assert not isinstance(value, Writable)
        self.value = value
        self.home = home
        self.age = age
        self.activation = within
        self.made: str | None = None
        self.slot: ArraySlot | None = None
        self.version = 0
        self.taken = None

    def aval(self) -> Any:
        """The type of the value."""
        with writing:
            slot = self.slot
            return _jax.typeof(self.kept) if slot is None else slot.aval(slot.address)

    def read(self, *, to_write: bool = False) -> Any:
        """The current value, as the current trace sees it.

        ``to_write`` says that neither it nor its memory is handed on.
        """
        if self.activation is not None and self.activation.ended:
            raise self.activation.escaped()
        here = _jax.current_trace()
        way = _way_home(self.home, here)
        is_held = self.is_held_elsewhere()
        staged = any(isinstance(t, _jax.StagingTrace) for t in way or ())
        if not is_held and (not way or (self.slot is None and not staged)):
            place = self.place_of_value()
            value = place.peek() if to_write else place.value
            if value is not None:
                return value
        self.become_slot()
        assert self.slot is not None
        if not way and not is_held:  # it has just become a slot, on another thread
            return self.place_of_value().value
        with _quiet(), _jax.set_current_trace(here):
            try:
                value = resolve.read(self.slot.address)
            except CustomRuleStateError:
                # A rule that reads what its function does not: a value that Python closes over.
                value = self.slot.cell(self.slot.address).value
                if way is None and isinstance(value, _jax.DIFFERENTIATED):
                    raise
                with slots.only_open([h for h in slots.stack() if not self._is_held_by(h)]):
                    value = value if way is None else resolve.read(self.slot.address)
            return _jax.canonicalize(value)

    def place_of_value(self) -> Kept:
        """Where the value is at home."""
        if self.slot is None:
            return self
        cell: Any = self.slot.cell(self.slot.address)
        return cell

    def write(self, value: Any) -> None:
        here = _jax.current_trace()
        if self.is_at_home():
            self.note_write()
            self.place_of_value().value = value
            return
        self.version += 1
        self.become_slot()
        assert self.slot is not None
        with _quiet(), _jax.set_current_trace(here):
            resolve.write(self.slot.address, value)

    def is_at_home(self) -> bool:
        """Whether the program sees the value where it is kept."""
        return _place() is self.home and not self.is_held_elsewhere()

    def note_write(self) -> None:
        """To be called for every write at home."""
        self.version += 1
        if self.slot is not None:
            self.slot.address.note_write()

    def state(self) -> Any:
        """Equal as long as nothing was written."""
        if self.is_at_home():
            return self.version if self.slot is None else self.slot.version
        return _Same(self.read())

    def is_held_elsewhere(self) -> bool:
        """Whether a custom rule or a device runs now, which was given the array as an operand."""
        return any(map(self._is_held_by, slots.holders()))

    def _is_held_by(self, holder: Holder) -> bool:
        return holder.age > self.age and (holder.is_boundary or holder.outside is not None)

    def become_slot(self) -> None:
        with writing:
            if self.slot is None:
                self.slot = ArraySlot(self)
                self.kept = None


class _Same:
    """Equality of objects."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def _way_home(home: Any, here: Any) -> list[Any] | None:
    """The traces between here and home; None if home is not further out.

    Then the value is asked for by JAX itself, which takes the results of a function when it has
    left the trace of that function, and builds the linear part of a derivative in no other trace.
    """
    way: list[Any] = []
    for t in _jax.chain(here):
        if resolve.same_trace(t, home):
            return way
        way.append(t)
    return None


class ArrayAddress(SlotAddress):
    """The slot of a buffer. It is captured, as an array that a function closes over is."""

    __slots__ = ()

    threaded = False

    @property
    def may_be_written(self) -> bool:
        return True

    def version(self) -> int:
        slot = self._slot()
        return 0 if slot is None else slot.version  # type: ignore[attr-defined]

    notices_writes = True
    stays_here = False

    def note_write(self) -> None:
        slot = self._slot()
        if slot is not None:
            slot.version += 1  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return "a writable array"


class ArraySlot(Slot):
    """The slot of a buffer."""

    def __init__(self, buffer: Buffer) -> None:
        with _jax.set_current_trace(buffer.home):
            cell = KeptCell(buffer.kept)
            cell.is_own = buffer.is_own
            aval = _jax.typeof(cell.kept)
            super().__init__(cell, aval, "a writable array", buffer.made or "")
        self.address = ArrayAddress(self)
        self.age = buffer.age
        self.activation = buffer.activation
        self.version = buffer.version

    def lane(self, address: Address, trace_: Any, notes: dict[Any, Any]) -> Lane | None:
        """An array that was born in a vmap is one array per lane."""
        if self.age < _age_of(trace_):
            return None
        lane = notes.get(address)
        if lane is None:
            with _jax.set_current_trace(_jax.parent_of(trace_)):
                lane = notes[address] = Lane(_jax.canonicalize(resolve.read(address)), None)
        return lane

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                "Lanes of a vmap wrote different values into a writable array that was made outside"
                " of the vmap, so that they share it.",
                fix="""
                x[:] = jax.vmap(f)(...)             # return the values, and write all of them
                x = jaxstate.array(x)               # or an array per lane: inside the vmap
                """,
                made=self.made or None,
                used=_jax.user_location(),
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    def ended(self) -> Exception:
        return (self.activation or Activation("array")).escaped()


def _age_of(trace_: Any) -> float:
    """The age of the first tracer of a vmap: what is younger was born in it."""
    return _jax.tag_of(trace_).__dict__.get("_jaxstate_age", float("inf"))


# -- The trace of an in-place function -------------------------------------------------------


class InplaceTrace(_jax.Trace):
    """Makes every result a writable array, and hands the operation on to its parent.

    It is needed where JAX would compute at once: an array that is computed cannot be written.
    """

    def __init__(self, parent: Any, within: Activation) -> None:
        super().__init__()
        self.parent_trace = parent
        self.activation = within
        self.requires_low = parent.requires_low

    def process_primitive(self, primitive: Any, operands: Any, params: Any, /) -> Any:
        operands = self._values(operands)
        avals = [_jax.typeof(x) for x in operands]
        out = primitive.bind_with_trace(self.parent_trace, operands, avals, params)
        return [self._box(x) for x in out] if primitive.multiple_results else self._box(out)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, operands: Any, /, **params: Any
    ) -> Any:
        return self._custom(primitive, (fun, jvp), operands, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, operands: Any, /, **params: Any
    ) -> Any:
        return self._custom(primitive, (fun, fwd, bwd), operands, params)

    @property
    def calls_functions(self) -> bool:
        """See `_jax.calls_functions`. The function writes its own arrays then."""
        return self.parent_trace is _jax.eval_trace

    def _custom(self, primitive: Any, functions: Any, operands: Any, params: Any) -> Any:
        operands = self._values(operands)
        if self.calls_functions:
            operands = [self._box(x) for x in operands]
            with _jax.set_current_trace(self):
                return [self._box(x) for x in functions[0].call_wrapped(*operands)]
        avals = [_jax.typeof(x) for x in operands]
        params = dict(params, subfuns=functions)
        out = primitive.bind_with_trace(self.parent_trace, operands, avals, params)
        return [self._box(x) for x in out]

    def process_shard_map(
        self, primitive: Any, fun: Any, operands: Any, /, *args: Any, **params: Any
    ) -> Any:
        """As in a jitted function: what JAX gives the devices eagerly cannot be written."""
        results: list[Any] = []

        def staged(*operands: Any) -> list[Any]:
            trace_ = _jax.current_trace()
            out = trace_.process_shard_map(primitive, fun, operands, *args, **params)
            results.append(out.map(lambda _: None))
            return list(out)

        try:
            with _jax.set_current_trace(self):
                values = _jax.jit(staged)(*operands)
        except _LOOKS_AT_VALUES:  # possible only where JAX runs the function at once
            if self.parent_trace is not _jax.eval_trace:
                raise
            results.clear()
            operands = self._values(operands)
            with _jax.set_current_trace(self.parent_trace):
                out = self.parent_trace.process_shard_map(primitive, fun, operands, *args, **params)
            return out.map(self._box)
        return results[0].update([self._box(x) for x in values])

    def stage_value(self, value: Any) -> Any:
        (value,) = self._values([value])
        return self._box(self.parent_trace.stage_value(value))

    def process_call(self, primitive: Any, fun: Any, operands: Any, params: Any, /) -> Any:
        operands = self._values(operands)
        out = self.parent_trace.process_call(primitive, fun, operands, params)
        return [self._box(x) for x in out]

    def cur_qdd(self, x: Any) -> Any:
        return self.parent_trace.cur_qdd(x)

    def _values(self, operands: Any) -> list[Any]:
        with _jax.set_current_trace(self):
            return [_jax.canonicalize(x) for x in operands]

    def _box(self, value: Any) -> Any:
        value = snapshot(value)
        if _thread.quiet or not is_array(value):
            return value
        return WritableArray(Buffer(value, self, slots.next_age(), self.activation))


_LOOKS_AT_VALUES = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)  # fmt: skip


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and isinstance(_jax.typeof(value), _jax.ShapedArray)


# -- Writable arrays -------------------------------------------------------------------------


class Writable:
    """An array that can be written, as in NumPy. It is a `jax.Array` in everything else."""

    __slots__ = ()

    _buffer: Any
    _steps: tuple[views.Step, ...] = ()
    _is_view = False
    _is_read_only = False
    shape: tuple[int, ...]
    dtype: Any
    ndim: int
    size: int
    aval: Any

    def _own_buffer(self) -> Buffer:
        return self._buffer

    def _read(self) -> Any:
        """The current value, as an ordinary array or tracer."""
        return self._own_buffer().read()

    # What JAX asks for.

    @property
    def dimension_as_value(self) -> Any:
        """Asked for by a jaxpr that meets this as a value, such as a result of its function.

        For all others this is no symbolic dimension.
        """
        if not _jax.is_asked_by_builder():
            raise AttributeError("dimension_as_value")
        return self._read

    def full_lower(self) -> Any:
        """Itself; its value as an operand of a jitted call at top level, which takes no tracers."""
        if not _jax.at_top_level():
            return self
        value = self._read()
        return value.full_lower() if isinstance(value, _jax.Tracer) else value

    def get_referent(self) -> Any:
        """Itself: it stands for no other array."""
        return self

    def to_concrete_value(self) -> Any:
        return _jax.concrete(self._read())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values of this moment, which cannot be written (unless NumPy asks for a copy)."""
        if copy:
            return np.array(self._read(), dtype)
        array = np.asarray(self._read(), dtype)
        if array.flags.writeable:  # converted, where NumPy might have given the array itself
            array.flags.writeable = False
        return array

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return numpy_functions.call_function(Writable, function, args, kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return numpy_functions.call_ufunc(Writable, ufunc, method, inputs, kwargs)

    def _plain_index(self, index: Any) -> Any:
        return _value_of_index(index)

    def __bool__(self) -> bool:
        return self._computed("__bool__")

    def __int__(self) -> int:
        return self._computed("__int__")

    def __float__(self) -> float:
        return self._computed("__float__")

    def __complex__(self) -> complex:
        return self._computed("__complex__")

    def __index__(self) -> int:
        return self._computed("__index__")

    def tolist(self) -> Any:
        return self._computed("tolist")

    def tobytes(self, order: str = "C") -> bytes:
        return self._computed("tobytes", order)

    def item(self, *args: Any) -> Any:
        return self._computed("item", *args)

    def is_deleted(self) -> bool:
        return self._computed("is_deleted")

    def devices(self) -> Any:
        return self._computed("devices")

    def addressable_data(self, index: int) -> Any:
        return self._shared("addressable_data")(index)

    @property
    def addressable_shards(self) -> Any:
        return self._shared("addressable_shards")

    @property
    def global_shards(self) -> Any:
        return self._shared("global_shards")

    @property
    def is_fully_addressable(self) -> bool:
        return self._shared("is_fully_addressable")

    @property
    def is_fully_replicated(self) -> bool:
        return self._shared("is_fully_replicated")

    def __dlpack__(self, **options: Any) -> Any:
        return self._shared("__dlpack__")(**options)

    def __dlpack_device__(self) -> Any:
        return self._shared("__dlpack_device__")()

    def _shared(self, name: str) -> Any:
        """An attribute of the computed array, which may give its memory away."""
        value = self._read()
        concrete = _jax.concrete(value)
        return getattr(value if concrete is None else concrete, name)

    def _computed(self, method: str, *args: Any) -> Any:
        """What the method of a computed array gives; what that of a tracer raises, for others."""
        value = self._read()
        concrete = _jax.concrete(value)
        return getattr(value if concrete is None else concrete, method)(*args)

    def __format__(self, spec: str) -> str:
        value = self._shown()
        return object.__format__(self, spec) if value is None else format(value, spec)

    def __repr__(self) -> str:
        value = self._shown()
        return f"{type(self).__name__}<{self.aval.str_short()}>" if value is None else repr(value)

    def __str__(self) -> str:
        value = self._shown()
        return repr(self) if value is None else str(value)

    def _shown(self) -> Any:
        """The concrete value, if there is one; messages of errors show arrays that have ended."""
        try:
            return self.to_concrete_value()
        except ClosedStateError:
            return None

    # Indexing and views.

    def __getitem__(self, index: Any) -> Any:
        mask = mask_in(index)
        is_copy = any(isinstance(e, np.ndarray) for e in _entries_of(index))  # also of one integer
        index = _value_of_index(index)
        entries = views.expanded(index, self.ndim)
        if not views.is_view(entries):
            views.check_arrays(self.shape, entries)
            with _quiet():
                masked = masked_elements(self._read(), index, entries, mask)
            if masked is not None:
                return masked
            value = self._read()
            if any(isinstance(e, views.Window) for e in entries):
                steps, index = views.without_windows(self.shape, entries)
                with _quiet():
                    value = views.read(steps, value)
                entries = list(index)
            for part in views.in_two_steps(entries) or (index,):
                value = _jax.getitem(value, part)
            return fresh(value)
        steps = views.view(self._steps, self.shape, entries)
        found = self._view(steps)
        is_scalar = all(not isinstance(e, slice) and e is not None for e in entries)
        has_ellipsis = any(e is Ellipsis for e in _entries_of(index))
        return found.copy() if is_copy or (is_scalar and not has_ellipsis) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, MaskedElements):
            entries = views.expanded(_value_of_index(index), self.ndim)
            with _quiet():
                index, value = value.written_to(self._read(), mask_in(index), entries)
        index = _value_of_index(index)
        if isinstance(value, Writable) and self._is_already(index, value):
            return
        value = _jax.canonicalize(value) if isinstance(value, Writable) else value
        self._write(lambda x: update_at(self._steps, x, index, value))

    def _is_already(self, index: Any, value: Writable) -> bool:
        """Whether ``value`` is the view that is to be written: the end of ``x[1:] += y``."""
        if value._buffer is None or value._buffer is not self._buffer:
            return False
        entries = views.expanded(index, self.ndim)
        if not views.is_view(entries):
            return False
        steps = views.view(self._steps, self.shape, entries)
        return len(steps) == len(value._steps) and all(map(_same_step, steps, value._steps))

    def __iter__(self) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def _view(self, steps: tuple[views.Step, ...]) -> WritableArray:
        buffer = self._own_buffer()
        self._detach()  # a write may come through the view
        # Views of views may be the whole array again: x.T.T, x[None][0].
        view = WritableArray(buffer, steps, buffer.aval())
        view._is_view = True
        view._is_read_only = self._is_read_only
        return view

    @property
    def T(self) -> Any:
        return self.transpose()

    @property
    def mT(self) -> Any:
        if self.ndim < 2:
            raise ValueError("matrix transpose requires at least two axes")
        return self.swapaxes(-1, -2)

    def transpose(self, *axes: Any) -> Any:
        """A view with the axes permuted (reversed by default)."""
        if len(axes) == 1 and (axes[0] is None or isinstance(axes[0], (tuple, list))):
            (axes,) = axes
        order = range(self.ndim)[::-1] if not axes else [_axis(a, self.ndim) for a in axes]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"axes {axes} are not a permutation of the axes of the array")
        return self._view(views.transposed(self._steps, self.shape, order))

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        """A view with two axes exchanged."""
        order = list(range(self.ndim))
        a, b = _axis(axis1, self.ndim), _axis(axis2, self.ndim)
        order[a], order[b] = order[b], order[a]
        return self._view(views.transposed(self._steps, self.shape, order))

    def squeeze(self, axis: Any = None) -> Any:
        """A view without axes of size 1."""
        if axis is None:
            dropped = [i for i, n in enumerate(self.shape) if n == 1]
        else:
            dropped = [_axis(a, self.ndim) for a in (axis if isinstance(axis, tuple) else (axis,))]
        if any(self.shape[a] != 1 for a in dropped):
            raise ValueError("cannot select an axis to squeeze out which has size not equal to one")
        return self[(*(0 if i in dropped else slice(None) for i in range(self.ndim)), ...)]

    @property
    def real(self) -> Any:
        """The array itself, or a copy of the real parts, which cannot be written."""
        return self._part(jnp.real) if self.dtype.kind == "c" else self[...]

    @real.setter
    def real(self, value: Any) -> None:
        if self.dtype.kind == "c":
            value = value + 1j * jnp.imag(self._read())
        self[...] = value

    @property
    def imag(self) -> Any:
        """A copy of the imaginary parts, which cannot be written."""
        return self._part(jnp.imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        if self.dtype.kind != "c":
            raise TypeError("array does not have imaginary part to set")
        self[...] = jnp.real(self._read()) + 1j * value

    def view(self, dtype: Any = None) -> Any:
        """A view; a copy that cannot be written, if the dtype is another one."""
        if dtype is None or np.dtype(dtype) == self.dtype:
            return self[...]
        return self._part(lambda x: x.view(dtype))

    def diagonal(self, *args: Any, **kwargs: Any) -> Any:
        """A copy, which cannot be written."""
        return self._part(lambda x: jnp.diagonal(x, *args, **kwargs))

    def _part(self, part: Callable[[Any], Any]) -> WritableArray:
        found = fresh(part(self._read()))
        found._is_read_only = True
        return found

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None, **more: Any) -> Any:
        """The elements in another shape: a view where NumPy gives one, else a copy."""
        new = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        new = _resolved_shape(new, self.size)
        if not copy and self._is_in_order_of_fortran(order):
            return self.T.reshape(new[::-1]).T
        order = "C" if order == "A" else order
        steps = None
        if order == "C" and not copy:
            steps = views.reshaped(self._steps, self._own_buffer_shape(), self.shape, new)
        if steps is not None:
            return self._view(steps)
        return fresh(jnp.reshape(self._read(), new, order=order, **more))

    def ravel(self, order: str = "C", **more: Any) -> Any:
        """The elements along one axis: a view if they are neighbours in memory, else a copy."""
        if self._is_in_order_of_fortran(order):
            return self.T.ravel()
        order = "C" if order in ("A", "K") and self._stand_in().flags.c_contiguous else order
        if order != "C" or not self._stand_in().flags.c_contiguous:
            return self.flatten(order, **more)
        return self.reshape(-1, **more)

    def _stand_in(self) -> np.ndarray:
        return views.stand_in(self._steps, self._own_buffer_shape())

    def _is_in_order_of_fortran(self, order: str) -> bool:
        """Whether the elements in this order are those of the transpose in the order of C."""
        if order not in ("A", "K"):
            return order == "F"
        flags = self._stand_in().flags
        return flags.f_contiguous and not flags.c_contiguous

    def flatten(self, order: str = "C", **more: Any) -> Any:
        """A copy with one axis."""
        return fresh(jnp.ravel(self._read(), order=order, **more))

    @property
    def flat(self) -> _Flat:
        """All elements along one axis: what is read is a copy, writes go through."""
        step = views.Reshape(self.shape, (self.size,))
        return _Flat(self._view((*self._steps, step)))

    @flat.setter
    def flat(self, values: Any) -> None:
        self.put(np.arange(self.size), values)

    def copy(self) -> Any:
        """A new array with the values of this moment."""
        return fresh(self._read())

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return fresh(jnp.astype(self._read(), dtype, *args, **kwargs))

    # Writes.

    def _write(self, update: Callable[[Any], Update]) -> None:
        if self._is_read_only:
            raise ValueError(
                message(
                    "An array that is a part of the bits of another one (its `real`, `imag`,"
                    " `diagonal()` or `view(dtype)`) is a copy here, so it is read-only.",
                    fix="""
                    x.real = values; x.imag = values                # all of them
                    x[i] = jax.lax.complex(real, imag)              # or the whole element
                    x[jnp.arange(n), jnp.arange(n)] = diagonal      # or the array itself
                    """,
                    used=_jax.user_location(),
                )
            )
        buffer = self._own_buffer()
        self._detach()
        if buffer.made is None:
            buffer.made = _jax.user_location()
        with writing:
            new = _write_to(buffer, update)
        if _place() is buffer.home:
            # In a shard_map: what was the same on every device may vary now.
            self.aval = _jax.with_varying_axes_of(self.aval, new)

    def _detach(self) -> None:
        """From the first write on, JAX must not take the tracer for what it was."""

    def _own_buffer_shape(self) -> tuple[int, ...]:
        return self._steps[0].parent if self._steps else self.shape

    def fill(self, value: Any) -> None:
        """Writes one value, a scalar, to all elements."""
        if np.shape(value):
            raise ValueError(f"fill() wants a scalar, and got an array of shape {np.shape(value)}")
        self[...] = value

    def sort(self, axis: int = -1, *args: Any, **kwargs: Any) -> None:
        """Sorts in place."""
        self[...] = jnp.sort(self._read(), axis, *args, **kwargs)

    def partition(self, kth: Any, axis: int = -1, *args: Any, **kwargs: Any) -> None:
        """Moves the ``kth`` elements of the sorted order to their places, smaller ones before."""
        del args, kwargs
        for k in np.atleast_1d(kth):
            views.check_bounds(int(k), self.shape[axis], axis)
        self[...] = jnp.sort(self._read(), axis)

    def put(self, indices: Any, values: Any, mode: str = "raise") -> None:
        """``x.flat[indices] = values``, with the values repeated as often as needed."""
        indices = _value_of_index(indices)
        if not isinstance(indices, jax.Array):
            indices = np.asarray(indices, dtype=int)
        if mode == "wrap":
            indices = indices % self.size
        elif mode == "clip":
            indices = indices.clip(0, self.size - 1)
        indices = indices.ravel()
        values = _jax.canonicalize(values) if isinstance(values, Writable) else values
        values = values if isinstance(values, jax.Array) else np.asarray(values)
        if values.size and indices.size:
            repeated = np.arange(indices.size) % values.size
            self.flat[indices] = values.ravel()[repeated]

    def itemset(self, *args: Any) -> None:
        """Writes one element: ``x.itemset(index, value)``, or ``x.itemset(value)`` of one."""
        *index, value = args
        target = self if index and isinstance(index[0], tuple) else self.flat
        if len(index) > 1:
            target, index = self, [tuple(index)]
        target[index[0] if index else 0] = value

    def resize(self, *args: Any, **kwargs: Any) -> None:
        raise SlotTypeError(
            message(
                f"A writable array has one shape, {self.shape}, and cannot be resized in place.",
                fix="""
                y = jnp.resize(x, new_shape)        # a new array
                """,
                used=_jax.user_location(),
            )
        )

    def _is_scalar(self) -> bool:
        """NumPy's reductions and elements are scalars, which ``+=`` does not write."""
        return self.ndim == 0 and not self._is_view

    def __getattr__(self, name: str) -> Any:
        """What JAX defines for arrays; and what only a computed array has."""
        try:
            return _jax.Tracer.__getattr__(self, name)  # type: ignore[arg-type]
        except AttributeError:
            asked_by_jax = name.startswith("_") or name == "dimension_as_value"
            value = None if asked_by_jax else self.to_concrete_value()
            if value is None:
                raise
            return getattr(value, name)


class _Flat:
    """``x.flat``, which is like `numpy.flatiter`: assigned to, it writes to ``x``."""

    __slots__ = ("_elements",)

    def __init__(self, elements: WritableArray) -> None:
        self._elements = elements

    def __getitem__(self, index: Any) -> Any:
        found = self._elements[index]
        return found.copy() if isinstance(found, WritableArray) and found._is_view else found

    def __setitem__(self, index: Any, value: Any) -> None:
        self._elements[index] = value

    def __len__(self) -> int:
        return len(self._elements)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._elements)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self._elements.__array__(*args, **kwargs)

    def copy(self) -> Any:
        """A new array of one axis."""
        return self._elements.copy()

    __jax_array__ = copy  # for jnp.asarray


def _write_to(buffer: Buffer, update: Callable[[Any], Update]) -> Any:
    """Writes to the buffer: in the memory of the old value, if nothing else has it.

    Returns:
      The new value.
    """
    base = buffer.read(to_write=True)
    place = buffer.place_of_value() if buffer.is_at_home() else None
    with _quiet():
        write = update(base)
        if place is not None and place.kept is base and _is_computed(base):
            del base
            new = _write_kept(place, write)
            buffer.note_write()
            return new
        new = _jax.as_array(_jax.canonicalize(write(base)))
    buffer.write(new)
    return new


def _write_kept(place: Kept, write: Update) -> Any:
    taken = Taken([None], 0, [])
    try:
        into_x = place.take(taken)
        append_result(taken.new, write.program(taken.old[0], into_x=into_x))
        (new,) = taken.new
        place.make(new)
        return new
    finally:
        place.put_back()


def _same_step(a: views.Step, b: views.Step) -> bool:
    if type(a) is not type(b) or a.parent != b.parent:
        return False
    if isinstance(a, views.Reshape) or isinstance(b, views.Reshape):
        return a == b
    return a.order == b.order and all(map(_same_extent, a.along, b.along))


def _same_extent(a: Any, b: Any) -> bool:
    if isinstance(a, views.Fixed) and isinstance(b, views.Fixed):
        ints = isinstance(a.index, int) and isinstance(b.index, int)
        return a.index == b.index if ints else a.index is b.index
    return type(a) is type(b) and a == b


def _resolved_shape(new: Sequence[Any], size: int) -> tuple[int, ...]:
    """The shape of ``size`` elements, with the size that -1 stands for."""
    shape = [n if _jax.is_size(n) else operator.index(n) for n in new]
    if not all(isinstance(n, int) for n in (*shape, size)):
        rest = [n for n in shape if not (isinstance(n, int) and n == -1)]
        found = _jax.divided_sizes((size,), rest)
        return tuple(found if isinstance(n, int) and n == -1 else n for n in shape)
    rest = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and rest and size % rest == 0:
        shape[shape.index(-1)] = size // rest
    if math.prod(shape) != size or any(n < 0 for n in shape):
        raise ValueError(f"cannot reshape array of size {size} into shape {tuple(new)}")
    return tuple(shape)


def _axis(axis: Any, ndim: int) -> int:
    return views.check_bounds(operator.index(axis), ndim, 0)


def _value_of_index(index: Any) -> Any:
    """The index with the values that the arrays in it have now, and with arrays for lists.

    JAX takes no lists in an index.
    """
    if isinstance(index, tuple):
        return tuple(map(_value_of_entry, index))
    return _value_of_entry(index)


def _entries_of(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _value_of_entry(entry: Any) -> Any:
    if isinstance(entry, Writable):
        entry = _jax.canonicalize(entry)
    if isinstance(entry, range):
        entry = list(entry)
    if isinstance(entry, (tuple, list)):
        entry = views.as_array(jax.tree.map(_value_of_entry, entry))
    if isinstance(entry, (np.bool_, np.ndarray)) and entry.dtype == np.bool_ and not entry.ndim:
        return bool(entry)  # JAX takes no others
    if isinstance(entry, slice):
        return slice(*(snapshot(bound) for bound in (entry.start, entry.stop, entry.step)))
    if isinstance(entry, _jax.DynamicSlice):
        return jax.ds(*(snapshot(n) for n in (entry.start, entry.size, entry.stride)))
    if isinstance(entry, np.ndarray):
        entry = entry.copy()  # a jaxpr keeps it
    small = isinstance(entry, (np.ndarray, jax.Array)) and entry.dtype in _SMALL
    return entry.astype(np.int32) if small else entry  # JAX compares it with the size of an axis


_SMALL = tuple(map(np.dtype, (np.int8, np.int16, np.uint8, np.uint16)))


def _strong(value: Any) -> Any:
    weak = getattr(value, "weak_type", False)
    return jax.lax.convert_element_type(value, value.dtype) if weak else value


def _is_computed(value: Any) -> bool:
    return isinstance(value, jax.Array) and not isinstance(value, _jax.Tracer)


# Augmented assignment: x += y and the like.


def _augmented(name: str) -> Callable[[Any, Any], Any]:
    operation = getattr(operator, name)

    def assign(self: Writable, other: Any) -> Any:
        if self._is_scalar() or _jax.is_statement_of_jax(1):
            return NotImplemented
        other = _jax.canonicalize(other) if isinstance(other, Writable) else other
        if isinstance(other, (list, tuple, np.ndarray)):
            other = np.array(other)  # a copy, since a jaxpr keeps it
        check_fits(other, self.dtype)
        with _quiet():
            # (A value of weak type would be computed in the precision of the other operand.)
            result = _jax.canonicalize(operation(_strong(self._read()), other))
        if not np.can_cast(result.dtype, self.dtype, "same_kind"):
            raise TypeError(
                f"Cannot cast the result of {name!r} from {result.dtype} to {self.dtype} with"
                " casting rule 'same_kind'"
            )
        if result.shape != self.shape:
            raise ValueError(
                f"non-broadcastable output operand with shape {self.shape} doesn't match the"
                f" broadcast shape {result.shape}"
            )
        self[...] = result
        return self

    return assign


for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift",
    "and_", "or_", "xor",
):  # fmt: skip
    setattr(Writable, f"__i{_name.rstrip('_')}__", _augmented(_name))


class WritableArray(Writable, _jax.Tracer):
    """A writable array of jaxstate's own, or a view of one."""

    __slots__ = ("_buffer", "_cache", "_is_read_only", "_is_view", "_steps")

    def __init__(
        self, buffer: Buffer, steps: tuple[views.Step, ...] = (), aval: Any = None
    ) -> None:
        aval = _jax.typeof(buffer.peek()) if aval is None else aval
        if steps:
            aval = _jax.type_of_part(aval, steps[-1].shape, lambda x: views.read(steps, x))
        _jax.Tracer.__init__(self, nowhere, aval)
        self._line_info = None
        self._buffer = buffer
        self._steps = steps
        self._is_view = False
        self._is_read_only = False
        self._cache: Any = None

    def _read(self) -> Any:
        if not self._steps:
            return self._buffer.read()
        here = _jax.current_trace()
        if _way_home(self._buffer.home, here) is None and not self._buffer.is_held_elsewhere():
            here = self._buffer.home
        state = self._buffer.state()
        if self._cache is not None and self._cache[0] is here and self._cache[1] == state:
            return self._cache[2]
        value = self._buffer.read()
        with _jax.set_current_trace(here), _quiet():
            value = _jax.canonicalize(views.read(self._steps, value))
        if not isinstance(value, _jax.Tracer) or here is self._buffer.home:
            self._cache = here, state, value
        return value

    def become_slot(self) -> None:
        """Makes it a slot now, and not when it is used inside of a transformation."""
        self._buffer.become_slot()

    @property
    def batch_dim(self) -> Any:
        """Asked for by the error of a vmap whose ``out_axes`` leave out the axis of its lanes."""
        return self._read().batch_dim

    def __reduce__(self) -> Any:
        """Pickled, it is an array of its own."""
        return _restored, (np.asarray(self),)


def _restored(value: np.ndarray) -> WritableArray:
    return loose(jnp.asarray(value))


def loose(value: Any) -> WritableArray:
    """A new writable array, in an in-place function or outside of any."""
    array = fresh(value)
    if activation() is None:
        _jax.IN_PLACE.keep_for(array._buffer)
        _begin_use()
    return array


def fresh(value: Any) -> WritableArray:
    """A new writable array, born here, with the given value."""
    value = _jax.canonicalize(value)
    return WritableArray(Buffer(value, _place(), slots.next_age(), activation()))


def snapshot(value: Any) -> Any:
    """The value that a writable array has now; anything else as it is."""
    return _jax.canonicalize(value) if isinstance(value, Writable) else value


class objects:
    """What `jaxstate.mutate` says of its objects, which come and go as they are."""

    @staticmethod
    def is_object(x: Any) -> bool:
        return False

    @staticmethod
    def writable(inside: Any) -> AbstractContextManager[Any]:
        """Makes their arrays writable, in a function that is called ``inside`` another one."""
        return nullcontext()


# -- JAX's own tracers, writable -------------------------------------------------------------


def _writable_kind(kind: type) -> type:
    class WritableTracer(Writable, kind):  # type: ignore[misc, valid-type]
        __slots__ = ("_activation", "_age", "_buffer")

        def __init__(self, trace: Any, *args: Any, **kwargs: Any) -> None:
            self._age = slots.next_age()
            self._activation = activation()
            self._buffer = None
            _note_birth(trace, self._age)
            if kind is not _jax.StagingTracer:
                # What a vmap or derivative is given is the value of this moment.
                with _jax.set_current_trace(trace.parent_trace):
                    args = tuple(snapshot(a) for a in args)
            kind.__init__(self, trace, *args, **kwargs)

        def _own_buffer(self) -> Buffer:
            if self._buffer is None:
                value = _jax.plain_copy(self, kind)
                if _jax.is_constant_of_jaxpr(self):
                    kept = resolve.notes_of(self._trace).extra
                    kept.setdefault(Writable, []).append(self)
                self._buffer = Buffer(value, self._trace, self._age, None)
            return self._buffer

        def _read(self) -> Any:
            return self._own_buffer().read()

        def _detach(self) -> None:
            if self._trace is not nowhere:
                self._own_buffer().activation = self._activation
                self._trace = nowhere

        def full_lower(self) -> Any:
            if self._trace is nowhere:
                return self
            lower = kind.full_lower(self)  # type: ignore[attr-defined]
            return lower if lower is self else _adopt(self._trace, lower, is_new=True)

    WritableTracer.__name__ = WritableTracer.__qualname__ = f"Writable{kind.__name__}"
    return WritableTracer


def _note_birth(trace_: Any, age: int) -> None:
    if isinstance(trace_, _jax.BatchTrace):
        _jax.tag_of(trace_).__dict__.setdefault("_jaxstate_age", age)


_writable_kinds = {kind: _writable_kind(kind) for kind in _jax.TRACER_KINDS}


def _choose(kind: type, trace_: Any, content: Any) -> type:
    if not _thread.activations or _thread.quiet or _jax.is_linear_part(trace_):
        return kind
    aval = content if isinstance(content, _jax.AbstractValue) else _jax.typeof(content)
    return _writable_kinds[kind] if isinstance(aval, _jax.ShapedArray) else kind  # not a ref


def _read_operand(trace_: Any, value: Any) -> Any:
    """What reaches a vmap or derivative without a bind is read there."""
    with _jax.set_current_trace(trace_):
        return snapshot(value)


def _hand_out(trace_: Any, value: Any, taken: Any) -> Any:
    """What a vmap or derivative takes out of ``taken`` may be a result, so an array outside."""
    if not _thread.activations or _thread.quiet:
        return value
    if not isinstance(value, _jax.Tracer) and not isinstance(taken, Writable):
        return value
    if not is_array(value) or _jax.is_linear_part(getattr(value, "_trace", None)):
        return value
    if not isinstance(trace_.parent_trace, (*_TRACES_OF_RULES, _jax.TransparentTrace)):
        return value  # another library's trace has tracers of its own
    home = _jax.holding_trace(trace_.parent_trace)
    return WritableArray(Buffer(value, home, slots.next_age(), activation()))


def _adopt(trace_: Any, value: Any, *, is_new: bool = False) -> Any:
    """An argument that a vmap or derivative hands on as it is: an array of the function's own."""
    if not _thread.activations or _thread.quiet:
        return value
    if not isinstance(value, Writable) and not (is_new and is_array(value)):
        return value
    with _jax.set_current_trace(trace_.parent_trace):
        content = _jax.canonicalize(value)
    age = slots.next_age()
    _note_birth(trace_, age)
    return WritableArray(Buffer(content, trace_, age, activation()))


def _hand_out_auxiliary(strip: Callable[[Any], Any], tag: Any, result: Any) -> Any:
    """An auxiliary result of a derivative, as an array outside."""
    if not isinstance(result, Writable) or not _thread.activations or _thread.quiet:
        return strip(snapshot(result))
    home = result._buffer.home if result._buffer else result._trace  # type: ignore[attr-defined]
    if getattr(home, "tag", None) is tag:
        home = _jax.holding_trace(home.parent_trace)
    value = strip(snapshot(result))
    return WritableArray(Buffer(value, home, slots.next_age(), activation()))


def _cut(argument: Any) -> Any:
    """An argument whose arrays are its own."""
    if not _thread.activations or _thread.quiet:
        return argument
    return jax.tree.map(
        lambda x: fresh(x) if isinstance(x, Writable) else x, argument, is_leaf=objects.is_object
    )


def _may_forward() -> bool:
    """A result that is an operand itself would be the same array, and read when it may be another
    one."""
    return not _thread.activations or bool(_thread.quiet)


_TRACES_OF_PROGRAMS = (
    _jax.StagingTrace, _jax.BatchTrace, *_jax.DIFFERENTIATING, InplaceTrace
)  # fmt: skip
_TRACES_OF_RULES = (*_TRACES_OF_PROGRAMS, _jax.PartialTrace)


def _around_bind(bind: Callable[..., Any], operands: Any, params: Any) -> Any:
    """Inside the bind of a higher-order primitive JAX is among itself; its results are arrays."""
    here = _jax.current_trace()
    if not _thread.activations or _thread.quiet or not isinstance(here, _TRACES_OF_RULES):
        return bind(*operands, **params)
    donated = params.get("donated_invars", ())
    operands = [*map(_given_away, operands, donated)] if any(donated) else map(snapshot, operands)
    _thread.quiet += 1
    try:
        out = bind(*operands, **params)
    finally:
        _thread.quiet -= 1
    # Under the rule of a custom_jvp: what is known is a value of the trace outside.
    place = here.parent_trace if isinstance(here, _jax.PartialTrace) else here
    with _jax.set_current_trace(place):
        return [_array_of_program(x) for x in out]


def _given_away(x: Any, donated: bool) -> Any:
    """The value of an operand; a copy, if it is donated and the memory may be a caller's."""
    if not donated or not isinstance(x, Writable):
        return snapshot(x)
    is_own = x._own_buffer().place_of_value().is_own
    value = snapshot(x)
    if is_own or not _is_computed(value):
        return value
    with _quiet():
        return jnp.array(value)


def _array_of_program(x: Any) -> Any:
    """A result of JAX as the program gets it: what an array is known to hold can be written."""
    unknown = isinstance(x, _jax.PartialTracer)
    return x if unknown or not is_array(x) or isinstance(x, Writable) else fresh(x)


def _around_forwarding(bind: Callable[..., Any]) -> Callable[..., Any]:
    """An operation with nothing to do hands back what it was given: the value of an array."""

    def forward(*operands: Any, **params: Any) -> Any:
        out = bind(*operands, **params)
        if isinstance(out, (list, tuple)):
            return [x if isinstance(x, Writable) else _own(x) for x in out]
        return out if isinstance(out, Writable) else _own(out)

    return forward


def _around_conversion(bind: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion that has nothing to do gives the array itself, as JAX does with tracers."""

    def convert(x: Any, **params: Any) -> Any:
        if isinstance(x, Writable):
            wanted = params["new_dtype"], params["weak_type"]
            if (x.dtype, x.aval.weak_type) == wanted and params["sharding"] is None:
                return x if _thread.activations and not _thread.quiet else snapshot(x)
        return bind(x, **params)

    return convert


def _own(x: Any) -> Any:
    """An array that an in-place function gets from JAX, as an array of its own."""
    if not _thread.activations or _thread.quiet or not is_array(x):
        return x
    return fresh(x) if isinstance(_jax.current_trace(), _TRACES_OF_PROGRAMS) else x


def _around_device_get(get: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An array whose value is known is fetched; JAX hands back tracers."""

    def device_get(x: Any) -> Any:
        value = x.to_concrete_value() if isinstance(x, Writable) else None
        return get(x if value is None else value)

    return device_get


def _around_top_level(function: Callable[..., Any]) -> Callable[..., Any]:
    """What JAX does only where nothing is traced works with the values, where these are known."""

    def call(*args: Any, **kwargs: Any) -> Any:
        here = _jax.current_trace()
        while isinstance(here, InplaceTrace):
            here = here.parent_trace
        if not _thread.activations or _thread.quiet or here is not _jax.eval_trace:
            return function(*args, **kwargs)
        donates = any(map(_jax.donates, args[:1]))
        args, kwargs = jax.tree.map(partial(_given_away, donated=donates), (args, kwargs))
        with _jax.set_current_trace(here):
            out = function(*args, **kwargs)
        return jax.tree.map(_own, out)

    return call


def _around_rules(bind: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of a function with a custom rule, and of its rules, are arrays of its own.

    (Not those of a backward rule, which may run when the in-place function has ended.)
    """

    def bind_with_trace(trace_: Any, args: Any, avals: Any, params: Any, /) -> Any:
        first, *others = params["subfuns"]
        if _thread.activations and not _thread.quiet and not _jax.is_of_jax(first):
            second, *others = others
            params = dict(params, subfuns=(_in_place(first), _in_place(second), *others))
        return bind(trace_, args, avals, params)

    return bind_with_trace


def _in_place(fun: Any) -> Any:
    """A function or rule of the user's, whose arguments are arrays of its own."""

    def run(*args: Any) -> Any:
        call = activation()
        _jax.reset_stores(fun)
        if call is None or all(isinstance(x, Writable) or not is_array(x) for x in args):
            return fun.call_wrapped(*args)
        inside = InplaceTrace(_jax.current_trace(), call)
        quiet, _thread.quiet = _thread.quiet, 0  # JAX may be among itself when it calls a rule
        try:
            with _jax.set_current_trace(inside):
                out = fun.call_wrapped(*map(inside._box, args))
                return [snapshot(x) for x in out]
        finally:
            _thread.quiet = quiet

    return _jax.wrap_rule_function(fun, run)


_jax.choose_tracer_type(_choose)
_jax.wrap_operands(_read_operand, _hand_out)
_jax.wrap_arguments(_adopt, _cut)
_jax.wrap_auxiliary(_hand_out_auxiliary)
_jax.wrap_forwarding(_may_forward)
for _primitive in _jax.FORWARDING:
    _jax.wrap_bind(_primitive, _around_forwarding, _jax.IN_PLACE)
_jax.wrap_bind(_jax.convert_element_type_p, _around_conversion, _jax.IN_PLACE)
for _primitive in (_jax.custom_jvp_call_p, _jax.custom_vjp_call_p):
    _jax.wrap_bind_with_trace(_primitive, _around_rules, _jax.IN_PLACE)
_jax.wrap_device_get(_around_device_get)
_jax.wrap_what_is_not_traced(_around_top_level)
_jax.wrap_key_arrays(lambda: bool(_thread.activations) and not _thread.quiet)


def _begin_use() -> None:
    """From the first writable array on: what other parts of jaxstate ask."""
    resolve.to_program = _own
    discharge.around_binds[:] = [_around_bind]


def _value(array: Writable) -> Any:
    """What JAX gets for an array that is an operand. A result it reads itself, where it belongs."""
    return array if _jax.takes_results() else array._read()


for _kind in (WritableArray, *_writable_kinds.values()):
    _jax.register_tracer_type(_kind, _value)
