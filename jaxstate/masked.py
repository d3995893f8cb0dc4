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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import _compat
from jaxstate.errors import MaskedWriteError, message
from jaxstate.views import is_mask

__all__ = ["MaskedElements", "mask_in", "masked_elements"]


class MaskedElements:
    """The elements of an array that a traced mask finds.

    Arithmetic works with scalars, with arrays of the axes behind those of the mask, and with the
    elements that the same mask finds in other arrays. Everything else is JAX's error for an index
    that is a traced mask, at the place where it is tried.

    Attributes:
      mask: as the user has it.
      found: the mask in the shape of the array.
      n_behind: the number of axes behind those of the mask.
    """

    __slots__ = ("_array", "_index", "_values", "found", "mask", "n_behind")

    def __init__(self, array: Any, index: Any, mask: Any, found: Any, n_behind: int) -> None:
        self._array = array
        self._index = index
        self.mask = mask
        self.found = found
        self.n_behind = n_behind
        self._values = _plain(jnp.where(found, array, jnp.ones((), array.dtype)))

    def written_to(self, x: Any, mask: Any) -> Any:
        """``x`` after ``x[mask] = self``.

        Raises:
          MaskedWriteError: if these are not the elements that ``mask`` finds in such an array.
        """
        if mask is not self.mask or x.shape != self.found.shape:
            raise MaskedWriteError(
                message(
                    "Elements found by a traced mask were assigned to those that another mask"
                    " finds, or in an array of another shape: nothing says that they are as many.",
                    fix="""
                    mask = x > 0
                    x[mask] = 2 * y[mask]                     # one mask object, one shape
                    x[:] = jnp.where(mask, 2 * y, x)          # or values in the shape of x
                    """,
                    used=_compat.user_location(),
                )
            )
        return _plain(jnp.where(self.found, self._values.astype(x.dtype), x))

    def _apply(self, operation: Callable[..., Any], *others: Any) -> MaskedElements:
        values = [self._operand(other) for other in others]
        new = object.__new__(MaskedElements)
        new._array, new._index = self._array, self._index
        new.mask, new.found, new.n_behind = self.mask, self.found, self.n_behind
        new._values = _plain(operation(self._values, *values))
        return new

    def _operand(self, other: Any) -> Any:
        if isinstance(other, MaskedElements):
            same = other.mask is self.mask and other.found.shape == self.found.shape
            return other._values if same else other._as_array()
        return _plain(other) if jnp.ndim(other) <= self.n_behind else self._as_array()

    def _as_array(self) -> Any:
        """Raises what JAX raises."""
        return _compat.getitem(self._array, self._index)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._as_array(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._as_array(), name)

    def __len__(self) -> int:
        return len(self._as_array())

    def __getitem__(self, index: Any) -> Any:
        return self._as_array()[index]

    def __bool__(self) -> bool:
        return bool(self._as_array())


def _plain(x: Any) -> Any:
    """The value that an array has now, which may be written later."""
    return _compat.canonicalize(x) if _compat.is_tracer(x) else x


def mask_in(index: Any) -> Any:
    """The mask in an index, as the user has it."""
    return next(filter(is_mask, index), None) if isinstance(index, tuple) else index


def masked_elements(array: Any, index: Any, entries: list[Any], mask: Any) -> Any:
    """``array[index]``, if a traced mask and nothing else says what that is, or None.

    ``mask`` is `mask_in` the index that the user gave: another array may be indexed by the same.
    """
    masks = [e for e in entries if is_mask(e)]
    others = [e for e in entries if not is_mask(e)]
    whole = all(isinstance(e, slice) and e == slice(None) for e in others)
    if len(masks) != 1 or not masks[0].ndim or not whole or _compat.concrete(masks[0]) is not None:
        return None
    first = next(i for i, e in enumerate(entries) if e is masks[0])
    axes = tuple(range(first, first + masks[0].ndim))
    if tuple(array.shape[i] for i in axes) != masks[0].shape:
        return None
    found = jax.lax.broadcast_in_dim(masks[0], array.shape, axes)
    return MaskedElements(array, index, mask, found, array.ndim - axes[-1] - 1)


def _binary(name: str) -> None:
    operation = getattr(operator, name)

    def plain(self: MaskedElements, other: Any) -> MaskedElements:
        return self._apply(operation, other)

    def reflected(self: MaskedElements, other: Any) -> MaskedElements:
        return self._apply(lambda x, y: operation(y, x), other)

    def augmented(self: MaskedElements, other: Any) -> MaskedElements:
        result = self._apply(operation, other)
        if not np.can_cast(result._values.dtype, self._values.dtype, "same_kind"):
            raise TypeError(
                f"Cannot cast the result of {name!r} from {result._values.dtype} to"
                f" {self._values.dtype} with casting rule 'same_kind'"
            )
        return result

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
