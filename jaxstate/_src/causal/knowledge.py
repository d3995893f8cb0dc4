"""What is known of a value before anything runs: when its elements are known, and which are fixed.

A *stamp* is the number of elements of the input that have to be known for an element of a value to
be known: 0 if it depends on none. The stamps of a value are an array of integers in its shape, and
*lean*: an axis along which they are all the same has size 1.

*Facts* are the values of elements that are known while the function is traced: those of a mask, of
what is multiplied by it, of what is selected by it. With them, a sum of products does not depend on
what it multiplies by zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# What is added to the logits of what is not to be seen is below this. That the exponential of it is
# zero is looked at when the function runs.
NEGLIGIBLE = -1e3


def lean(a: np.ndarray) -> np.ndarray:
    """The array with size 1 along each axis along which it does not change."""
    for axis, size in enumerate(a.shape):
        first = a.take([0], axis) if size > 1 else a
        if size > 1 and (first == a.take([1], axis)).all() and (first == a).all():
            a = first
    return a


def latest(stamps: Iterable[np.ndarray], ndim: int) -> np.ndarray:
    """The stamps of what depends on all of these, element by element."""
    most: Any = functools.reduce(np.maximum, stamps, np.int32(0))
    return most.reshape((1,) * (ndim - most.ndim) + most.shape)


def mixed(stamps: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The stamps of what depends on all elements along these axes."""
    return stamps.max(axis=tuple(axes), keepdims=True) if stamps.size else stamps


def placed(a: np.ndarray, axes: Sequence[int], ndim: int) -> np.ndarray:
    """The array as one of ``ndim`` axes, with axis k in the place of ``axes[k]``."""
    order = np.argsort(axes, kind="stable")
    shape = [1] * ndim
    for axis, size in zip(axes, a.shape, strict=True):
        shape[axis] = size
    return a.transpose(order).reshape(shape)


class Facts(NamedTuple):
    """Elements whose value is known.

    Attributes:
      sure: of which elements (lean).
      value: the values, of those (lean).
      assumed: whether that is so only if what is added to logits makes them negligible.
    """

    sure: np.ndarray
    value: np.ndarray
    assumed: bool = False

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Facts:
        return Facts(change(self.sure), change(self.value), self.assumed)

    @property
    def zero(self) -> np.ndarray:
        return self.sure & (self.value == 0)


def facts_or_none(sure: np.ndarray, value: Any, assumed: bool) -> Facts | None:
    return Facts(np.asarray(sure), np.asarray(value), assumed) if sure.any() else None


UFUNCS: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "add": np.add, "add_any": np.add, "and": np.bitwise_and, "copy": np.array,
    "div": np.true_divide, "eq": np.equal, "exp": np.exp, "exp2": np.exp2, "ge": np.greater_equal,
    "gt": np.greater, "le": np.less_equal, "lt": np.less, "max": np.maximum, "min": np.minimum,
    "mul": np.multiply, "ne": np.not_equal, "neg": np.negative, "not": np.invert,
    "or": np.bitwise_or, "stop_gradient": np.array, "sub": np.subtract, "xor": np.bitwise_xor,
    "convert_element_type": np.array, "reduce_precision": np.array, "copy_p": np.array,
}  # fmt: skip


def _absorbed(name: str, place: int, a: Facts, dtype: Any) -> tuple[Any, Any, bool] | None:
    """What is known whatever the other operand is: of which elements, their value, if assumed."""
    is_bool, is_float = dtype == np.bool_, jnp.issubdtype(dtype, jnp.floating)
    if name == "mul" or (name == "and" and is_bool):
        return a.zero, 0, a.assumed
    if name == "or" and is_bool:
        return a.sure & (a.value != 0), 1, a.assumed
    if name == "div" and place == 0:  # if the other operand is zero too, that is found out later
        return a.zero, 0, True
    if is_float and (name == "add" or (name == "sub" and place == 0)):
        return a.sure & (a.value <= NEGLIGIBLE), -np.inf, True
    return None


def elementwise_facts(
    name: str, operands: Sequence[Facts | None], shape: Sequence[int], dtype: Any
) -> Facts | None:
    """The facts of the result of an elementwise operation, from those of its operands."""
    if name not in UFUNCS or not any(operands):
        return None
    if name == "div" and not jnp.issubdtype(dtype, jnp.inexact):
        return None
    one = np.ones((1,) * len(shape), bool)
    sure, value, assumed = ~one, np.zeros(one.shape, dtype), any(f and f.assumed for f in operands)
    known = [f for f in operands if f]
    with np.errstate(all="ignore"):
        if all(operands):
            sure = functools.reduce(np.logical_and, [f.sure for f in known], one)
            value = np.asarray(UFUNCS[name](*(f.value for f in known))).astype(dtype)
        for place, f in enumerate(operands):
            found = f and _absorbed(name, place, f, dtype)
            if found and (where := found[0] & ~sure).any():
                value = np.where(where, np.asarray(found[1], dtype), value)
                sure, assumed = sure | where, assumed or found[2]
    return facts_or_none(sure, value, assumed)


def selected_facts(which: Facts | None, cases: Sequence[Facts | None]) -> Facts | None:
    """The facts of ``select_n``."""
    if which is None or not any(cases):
        return None
    sure = np.zeros(which.sure.shape, bool)
    value, assumed = None, which.assumed
    for k, case in enumerate(cases):
        if case:
            here = which.sure & (which.value == k) & case.sure
            value = case.value if value is None else np.where(here, case.value, value)
            sure = sure | here
            assumed = assumed or case.assumed
    return facts_or_none(sure, value, assumed)
