"""Writable arrays: the tracers that a program with ``x[i] = y`` holds.

What a program holds is never what JAX holds: when a writable array is an operand, JAX canonicalizes
it, and gets the value that the array has at that moment. So a later write changes nothing that was
computed before, residuals of derivatives included.

There are two kinds, with the same methods (`Writable`):

* `WritableArray`, a tracer of jaxstate's own: arguments and results of the outermost function,
  views, and what `array` makes.
* Subclasses of JAX's own tracers (`arrays.boundaries`). While an in-place function runs,
  the tracers that JAX makes are of these types, so that arguments and intermediate values of every
  loop body can be written too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays import views
from jaxstate._src.arrays.activation import activation, first_use, quiet
from jaxstate._src.arrays.buffers import Buffer, place_here, way_home, write_to
from jaxstate._src.arrays.indices import (
    axis_number,
    entries_of,
    is_same_step,
    resolved_shape,
    value_of_index,
)
from jaxstate._src.arrays.masked import MaskedElements, check_fits, mask_in, masked_elements
from jaxstate._src.arrays.protocols import ArrayProtocols
from jaxstate._src.arrays.updates import Update, update_at
from jaxstate._src.core import slots
from jaxstate._src.core.capture import nowhere
from jaxstate._src.core.memory import writing
from jaxstate.errors import SlotTypeError, message

__all__ = ["Writable", "WritableArray", "fresh", "loose", "snapshot"]


class Indexed(ArrayProtocols):
    """Elements that are read and written by their indices, in the buffer that they are part of."""

    __slots__ = ()

    _steps: tuple[views.Step, ...] = ()
    _is_view = False
    _is_read_only = False
    shape: tuple[int, ...]
    dtype: Any
    ndim: int
    size: int

    def __getitem__(self, index: Any) -> Any:
        mask = mask_in(index)
        is_copy = any(isinstance(e, np.ndarray) for e in entries_of(index))  # also of one integer
        index = value_of_index(index)
        entries = views.expanded(index, self.ndim)
        if not views.is_view(entries):
            views.check_arrays(self.shape, entries)
            with quiet():
                masked = masked_elements(self._read(), index, entries, mask)
            if masked is not None:
                return masked
            value = self._read()
            if any(isinstance(e, views.Window) for e in entries):
                steps, index = views.without_windows(self.shape, entries)
                with quiet():
                    value = views.read(steps, value)
                entries = list(index)
            for part in views.in_two_steps(entries) or (index,):
                value = _jax.getitem(value, part)
            return fresh(value)
        steps = views.view(self._steps, self.shape, entries)
        found = self._view(steps)
        is_scalar = all(not isinstance(e, slice) and e is not None for e in entries)
        has_ellipsis = any(e is Ellipsis for e in entries_of(index))
        return found.copy() if is_copy or (is_scalar and not has_ellipsis) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, MaskedElements):
            entries = views.expanded(value_of_index(index), self.ndim)
            with quiet():
                index, value = value.written_to(self._read(), mask_in(index), entries)
        index = value_of_index(index)
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
        return len(steps) == len(value._steps) and all(map(is_same_step, steps, value._steps))

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
            new = write_to(buffer, update)
        if place_here() is buffer.home:
            # In a shard_map: what was the same on every device may vary now.
            self.aval = _jax.with_varying_axes_of(self.aval, new)

    def _detach(self) -> None:
        """From the first write on, JAX must not take the tracer for what it was."""

    def _own_buffer_shape(self) -> tuple[int, ...]:
        return self._steps[0].parent if self._steps else self.shape


class Writable(Indexed):
    """An array that can be written, as in NumPy. It is a `jax.Array` in everything else."""

    __slots__ = ()

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
        order = range(self.ndim)[::-1] if not axes else [axis_number(a, self.ndim) for a in axes]
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"axes {axes} are not a permutation of the axes of the array")
        return self._view(views.transposed(self._steps, self.shape, order))

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        """A view with two axes exchanged."""
        order = list(range(self.ndim))
        a, b = axis_number(axis1, self.ndim), axis_number(axis2, self.ndim)
        order[a], order[b] = order[b], order[a]
        return self._view(views.transposed(self._steps, self.shape, order))

    def squeeze(self, axis: Any = None) -> Any:
        """A view without axes of size 1."""
        if axis is None:
            dropped = [i for i, n in enumerate(self.shape) if n == 1]
        else:
            dropped = [
                axis_number(a, self.ndim) for a in (axis if isinstance(axis, tuple) else (axis,))
            ]
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
        new = resolved_shape(new, self.size)
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
        indices = value_of_index(indices)
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


def _strong(value: Any) -> Any:
    weak = getattr(value, "weak_type", False)
    return jax.lax.convert_element_type(value, value.dtype) if weak else value


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
        with quiet():
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
        if way_home(self._buffer.home, here) is None and not self._buffer.is_held_elsewhere():
            here = self._buffer.home
        state = self._buffer.state()
        if self._cache is not None and self._cache[0] is here and self._cache[1] == state:
            return self._cache[2]
        value = self._buffer.read()
        with _jax.set_current_trace(here), quiet():
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
        for begin in first_use:
            begin()
    return array


def fresh(value: Any) -> WritableArray:
    """A new writable array, born here, with the given value."""
    value = _jax.canonicalize(value)
    return WritableArray(Buffer(value, place_here(), slots.next_age(), activation()))


def snapshot(value: Any) -> Any:
    """The value that a writable array has now; anything else as it is."""
    return _jax.canonicalize(value) if isinstance(value, Writable) else value
