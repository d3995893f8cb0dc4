"""``x[mask]`` for a mask that is traced: elements whose number is not known.

They are no array, as an array has a shape. But what most programs do with them needs none:

    x[mask] += 1
    x[mask] = 2 * x[mask] - y[mask]

The operation is done to every element, and assigning the result to an ``x[mask]`` is one select.
Elements that the mask does not find are computed from ones, not from what ``x`` has there: so
nothing that happens to them, such as a division by zero, reaches a derivative.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays.views import is_basic, is_mask, read, view
from jaxstate.errors import MaskedWriteError, message

__all__ = ["MaskedElements", "check_fits", "mask_in", "masked_elements"]


class MaskedElements:
    """The elements of an array that a traced mask finds.

    Arithmetic works with scalars, with arrays of the axes behind those of the mask, and with the
    elements that the same mask finds in other arrays. Everything else is JAX's error for an index
    that is a traced mask, at the place where it is tried.

    Attributes:
      mask: as the user has it.
      state: equal as long as nothing was written to the mask.
      place: which axes the mask is of.
      found: the mask in the shape of the view that it is a mask of.
    """

    __array_ufunc__ = None  # so that scalars and arrays of NumPy leave the arithmetic to this
    __slots__ = ("_array", "_index", "_values", "found", "mask", "place", "state")

    def __init__(self, array: Any, index: Any, mask: Any, place: _Place, found: Any) -> None:
        self._array = array
        self._index = index
        self.mask = mask
        self.state = _state_of(mask)
        self.place = place
        self.found = found
        masked = _view(array, place)
        self._values = _plain(jnp.where(found, masked, jnp.ones((), array.dtype)))

    def written_to(self, x: Any, mask: Any, entries: list[Any]) -> tuple[Any, Any]:
        """An index and a value, by which to write ``x[mask] = self``.

        Args:
          x: the array.
          mask: `mask_in` its index.
          entries: of that index.

        Raises:
          MaskedWriteError: if these are not the elements that ``mask`` finds in such an array.
        """
        place = _place_of_mask(entries)
        target: Any = None if place is None else _view(x, place)
        if not self._are_those_of(mask, _state_of(mask), place, getattr(target, "shape", ())):
            raise MaskedWriteError(
                message(
                    "Elements found by a traced mask were assigned to those that another mask"
                    " finds (or this one after it was written, along another axis, or in an array"
                    " of another shape): nothing says that they are as many.",
                    fix="""
                    mask = x > 0
                    x[mask] = 2 * y[mask]                     # one mask object, one shape
                    x[:] = jnp.where(mask, 2 * y, x)          # or values in the shape of x
                    """,
                    used=_jax.user_location(),
                )
            )
        assert place is not None
        value = _plain(jnp.where(self.found, self._values.astype(x.dtype), target))
        return tuple(place.beside), value

    def _are_those_of(
        self, mask: Any, state: Any, place: _Place | None, shape: tuple[int, ...]
    ) -> bool:
        if mask is not self.mask or place is None or place.axes != self.place.axes:
            return False
        return shape == self.found.shape and state == self.state

    def _apply(self, operation: Callable[..., Any], *others: Any) -> MaskedElements:
        values = [self._operand(other) for other in others]
        new = object.__new__(MaskedElements)
        new._array, new._index = self._array, self._index
        new.mask, new.state, new.place, new.found = self.mask, self.state, self.place, self.found
        new._values = _plain(operation(self._values, *values))
        return new

    def _operand(self, other: Any) -> Any:
        if isinstance(other, MaskedElements):
            same = self._are_those_of(other.mask, other.state, other.place, other.found.shape)
            return other._values if same else other.as_array()
        return _plain(other) if jnp.ndim(other) <= self.place.n_behind else self.as_array()

    def as_array(self) -> Any:
        """Raises what JAX raises."""
        return _jax.getitem(self._array, self._index)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self.as_array(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.as_array(), name)

    def __len__(self) -> int:
        return len(self.as_array())

    def __getitem__(self, index: Any) -> Any:
        return self.as_array()[index]

    def __bool__(self) -> bool:
        return bool(self.as_array())


def _plain(x: Any) -> Any:
    """The value that an array has now, which may be written later."""
    return _jax.canonicalize(x) if _jax.is_tracer(x) else x


def _state_of(mask: Any) -> Any:
    """Equal as long as nothing was written to the mask."""
    buffer_of = getattr(type(mask), "_own_buffer", None)  # else it cannot be written
    return buffer_of(mask).state() if buffer_of else None


def mask_in(index: Any) -> Any:
    """The mask in an index, as the user has it."""
    return next(filter(is_mask, index), None) if isinstance(index, tuple) else index


def masked_elements(array: Any, index: Any, entries: list[Any], mask: Any) -> Any:
    """``array[index]``, if a traced mask and nothing else says what that is, or None.

    ``mask`` is `mask_in` the index that the user gave: another array may be indexed by the same.
    """
    place = _place_of_mask(entries)
    if place is None:
        return None
    like = _jax.typeof(_view(array, place))
    # (Of an array that is sharded JAX does not take elements by positions.)
    if _jax.concrete(place.mask) is not None and not _jax.is_explicitly_sharded(like):
        return None
    found = _jax.broadcast_like(like, place.mask, place.axes)
    return MaskedElements(array, index, mask, place, found)


class _Place(NamedTuple):
    """Where in an index its one mask is.

    Attributes:
      mask: the mask.
      beside: a basic index of the array, of the view that the mask is a mask of.
      axes: of that view, which the mask is of.
      n_behind: the number of axes that ``x[index]`` has behind the one of the elements found.
    """

    mask: Any
    beside: list[Any]
    axes: tuple[int, ...]
    n_behind: int


def _place_of_mask(entries: list[Any]) -> _Place | None:
    """The place of the one mask in an index that has integers and slices beside it, or None."""
    at = [i for i, e in enumerate(entries) if is_mask(e)]
    if len(at) != 1:
        return None
    mask, before, after = entries[at[0]], entries[: at[0]], entries[at[0] + 1 :]
    if any(e is None or e is Ellipsis or not is_basic(e) for e in before + after):
        return None
    n_before, n_after = (sum(isinstance(e, slice) for e in es) for es in (before, after))
    advanced = [i for i, e in enumerate(entries) if not isinstance(e, slice)]
    is_one_block = advanced[-1] - advanced[0] < len(advanced)
    return _Place(
        mask,
        [*before, *[slice(None)] * mask.ndim, *after],
        tuple(range(n_before, n_before + mask.ndim)),
        # What is found comes in front of all if a slice is between the mask and an integer. A mask
        # of no axes makes an axis where it is.
        n_after if is_one_block else n_before + n_after,
    )


def _view(array: Any, place: _Place) -> Any:
    return read(view((), array.shape, place.beside), array)


def check_fits(operand: Any, dtype: Any) -> None:
    """Raises NumPy's OverflowError for ``x += 300`` with bytes: JAX takes the number modulo 256."""
    if type(operand) is int and np.dtype(dtype).kind in "iu":
        np.array(operand, dtype)


def _binary(name: str) -> None:
    operation = getattr(operator, name)

    def plain(self: MaskedElements, other: Any) -> MaskedElements:
        return self._apply(operation, other)

    def reflected(self: MaskedElements, other: Any) -> MaskedElements:
        return self._apply(lambda x, y: operation(y, x), other)

    def augmented(self: MaskedElements, other: Any) -> MaskedElements:
        check_fits(other, self._values.dtype)
        result = self._apply(operation, other)
        if not np.can_cast(result._values.dtype, self._values.dtype, "same_kind"):
            raise TypeError(
                f"Cannot cast the result of {name!r} from {result._values.dtype} to"
                f" {self._values.dtype} with casting rule 'same_kind'"
            )
        self._values = result._values.astype(self._values.dtype)
        return self

    short = name.rstrip("_")
    setattr(MaskedElements, f"__{short}__", plain)
    setattr(MaskedElements, f"__r{short}__", reflected)
    setattr(MaskedElements, f"__i{short}__", augmented)


for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_",
    "xor",
):  # fmt: skip
    _binary(_name)


def _other(name: str) -> Callable[..., Any]:
    operation = getattr(operator, name)
    return lambda self, *others: self._apply(operation, *others)


for _name in ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(MaskedElements, f"__{_name}__", _other(_name))
MaskedElements.__hash__ = None  # type: ignore[assignment]  # it is compared element by element
