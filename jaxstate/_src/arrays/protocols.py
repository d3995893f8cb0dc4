"""What JAX, Python and NumPy ask of a writable array: its value in other forms."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays import numpy_functions
from jaxstate._src.arrays.buffers import Buffer
from jaxstate._src.arrays.indices import value_of_index
from jaxstate.errors import ClosedStateError

__all__ = ["ArrayProtocols"]


class ArrayProtocols:
    """Gives the value that the array has now to who asks for it."""

    __slots__ = ()

    _buffer: Any
    aval: Any

    def _own_buffer(self) -> Buffer:
        return self._buffer

    def _read(self) -> Any:
        """The current value, as an ordinary array or tracer."""
        return self._own_buffer().read()

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
        return numpy_functions.call_function(ArrayProtocols, function, args, kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return numpy_functions.call_ufunc(ArrayProtocols, ufunc, method, inputs, kwargs)

    def _plain_index(self, index: Any) -> Any:
        return value_of_index(index)

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
