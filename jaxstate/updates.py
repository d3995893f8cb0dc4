"""A write as a function: the array after ``x[index] = value``, by one operation.

* to all elements: the value, broadcast;
* to a block of consecutive elements: ``dynamic_update_slice``;
* by a mask: ``select``;
* to anything else: ``scatter``, as ``x.at[index].set(value)`` makes it.

Each is a function of the array, of further arrays and of a static description (`Update`), so that
an eager write can run it jitted, in the memory of the array itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import _compat
from jaxstate.errors import MaskedWriteError, message
from jaxstate.views import (
    EMPTY_AXIS,
    Fixed,
    Range,
    Selection,
    Step,
    check_arrays,
    expanded,
    in_two_steps,
    is_basic,
    is_condition,
    is_mask,
    view,
)

__all__ = ["Update", "cast", "update_at", "update_through"]


class Update(NamedTuple):
    """``run(static, x, *operands)`` is the array after the write."""

    run: Callable[..., Any]
    static: Any
    operands: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        return self.run(self.static, x, *self.operands)

    def compiled(self, x: Any, *, into_x: bool) -> Any:
        """The same, as one program; ``into_x`` gives the memory of ``x`` to the result.

        With a traced operand the result may be another array: one per lane, say.
        """
        into_x = into_x and self.run not in (_nothing, _replace)
        into_x = into_x and not any(isinstance(y, _compat.Tracer) for y in self.operands)
        return _program(self.run, self.static, into_x)(x, *self.operands)


@lru_cache(maxsize=4096)
def _program(run: Callable[..., Any], static: Any, donate: bool) -> Any:
    def write(x: Any, *operands: Any) -> Any:
        return run(static, x, *operands)

    # Else an array of which nothing is left is no operand, and JAX warns of unused memory.
    return _compat.jit(write, donate_argnums=0 if donate else (), keep_unused=True)


# -- The operations --------------------------------------------------------------------------


def _nothing(static: None, x: Any) -> Any:
    return x


def _replace(shape: tuple[int, ...], x: Any, value: Any) -> Any:
    return value if jnp.shape(value) == shape else jnp.broadcast_to(value, shape)


def _block(static: tuple[Any, Any], x: Any, value: Any, *starts: Any) -> Any:
    sizes, axes = static
    if jnp.shape(value) != sizes:
        value = jax.lax.broadcast_in_dim(value, sizes, axes)
    return jax.lax.dynamic_update_slice(x, value, starts, allow_negative_indices=False)


def _scatter(template: tuple[Any, ...], x: Any, value: Any, *arrays: Any) -> Any:
    left = iter(arrays)
    index = tuple(next(left) if e is _ARRAY else _from_key(e) for e in template)
    return x.at[index].set(value)


def _by_mask(axes: tuple[int, ...], x: Any, value: Any, mask: Any) -> Any:
    if mask.shape != x.shape:
        mask = jax.lax.broadcast_in_dim(mask, x.shape, axes)
    if jnp.shape(value) != x.shape:
        value = jnp.broadcast_to(value, x.shape)
    return jax.lax.select(mask, value, x)


_ARRAY = "array"
_BETWEEN = (slice, type(None), type(Ellipsis))  # what separates integers and arrays
_NO_ARRAYS = (int, *_BETWEEN)


def _key(entry: Any) -> Any:
    """A hashable stand-in for an entry of an index (slices are hashable since Python 3.12)."""
    return ("slice", entry.start, entry.stop, entry.step) if isinstance(entry, slice) else entry


def _from_key(key: Any) -> Any:
    return slice(*key[1:]) if isinstance(key, tuple) else key


# -- Values ----------------------------------------------------------------------------------


def cast(value: Any, dtype: Any) -> Any:
    """The value as an array of ``dtype``, as assignment in NumPy casts it.

    NumPy itself casts numbers and lists of them: it refuses those that do not fit.
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return jnp.asarray(value)
    leaves = jax.tree.leaves(value) if isinstance(value, (list, tuple)) else ()
    if any(isinstance(x, jax.Array) for x in leaves):
        value = jnp.asarray(value)
    if isinstance(value, (list, tuple, bool, int, float, complex)):
        array = np.empty(np.shape(value), dtype)
        array[...] = value
        return array
    if not isinstance(value, jax.Array):
        value = np.array(value)  # a copy, since a jaxpr keeps it
        if value.dtype == dtype:
            return value
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        value = value != 0 if np.dtype(dtype).kind == "b" else jnp.real(value)
    return jax.lax.convert_element_type(value, dtype)


def fit(value: Any, shape: Sequence[int]) -> Any:
    """The value without surplus leading axes; NumPy's error if it does not broadcast."""
    given = jnp.shape(value)
    lead = 0
    while len(given) - lead > len(shape) and given[lead] == 1:
        lead += 1
    try:
        if np.broadcast_shapes(given[lead:], tuple(shape)) == tuple(shape):
            return jnp.reshape(value, given[lead:]) if lead else value
    except ValueError:
        pass
    raise ValueError(
        f"could not broadcast input array from shape {given} into shape {tuple(shape)}"
    )


# -- Writes to all of a view -----------------------------------------------------------------


def update_through(steps: Sequence[Step], x: Any, value: Any) -> Update:
    """The write of ``value`` to all elements of the view of ``x`` with these steps.

    The value is cast and broadcasts to the shape of the view.
    """
    if not steps:
        return Update(_replace, x.shape, (value,))
    *outer, last = steps
    if len(outer) == 0 and isinstance(last, Selection):
        return _update_selection(last, value)
    parent = x
    for step in outer:
        parent = step.read(parent)
    if isinstance(last, Selection):
        inner = _update_selection(last, value)(parent)
    else:
        inner = jax.lax.reshape(jnp.broadcast_to(value, last.shape), last.parent)
    return update_through(outer, x, inner)


def _update_selection(selection: Selection, value: Any) -> Update:
    if 0 in selection.shape or EMPTY_AXIS in selection.order:
        return Update(_nothing, None, ())
    value, axes = _in_order_of_parent(selection, value)
    selection, value = _forwards(selection, value, axes)
    kept = selection.kept
    if selection.is_all:
        return Update(_replace, selection.parent, (_with_axes(value, axes, kept),))
    is_block = all(
        isinstance(a.index, int) if isinstance(a, Fixed) else a.step == 1 for a in selection.along
    )
    if is_block:
        sizes = tuple(1 if isinstance(a, Fixed) else a.size for a in selection.along)
        starts = tuple(a.index if isinstance(a, Fixed) else a.start for a in selection.along)
        return Update(_block, (sizes, tuple(axes)), (value, *starts))
    template = tuple(_ARRAY if isinstance(i, jax.Array) else _key(i) for i in selection.index)
    arrays = tuple(i for i in selection.index if isinstance(i, jax.Array))
    return Update(_scatter, template, (_with_axes(value, axes, kept), *arrays))


def _in_order_of_parent(selection: Selection, value: Any) -> tuple[Any, list[int]]:
    """The value with its axes in the order of the parent's, and which axes of it they are."""
    ndim = jnp.ndim(value)
    order = selection.order[len(selection.order) - ndim :]
    new = [i for i, d in enumerate(order) if d < 0]
    if new:
        value = jax.lax.squeeze(value, new)
    axes = [d for d in order if d >= 0]
    if axes != sorted(axes):
        value = jax.lax.transpose(value, [int(i) for i in np.argsort(axes)])
    return value, sorted(axes)


def _forwards(selection: Selection, value: Any, axes: Sequence[int]) -> tuple[Selection, Any]:
    """The same write with positive steps only."""
    along = list(selection.along)
    for d, a in enumerate(along):
        if isinstance(a, Range) and a.step < 0:
            along[d] = Range(a.start + a.step * (a.size - 1), -a.step, a.size)
            if d in axes and jnp.shape(value)[axes.index(d)] > 1:
                value = jnp.flip(value, axes.index(d))
        if isinstance(a, Range) and a.size == 1:
            along[d] = Range(a.start, 1, 1)
    return selection._replace(along=tuple(along)), value


def _with_axes(value: Any, axes: Sequence[int], wanted: Sequence[int]) -> Any:
    """The value with axes of size 1 where it lacks axes between the others."""
    if list(axes) == list(wanted[len(wanted) - len(axes) :]):
        return value
    return jnp.expand_dims(value, [i for i, d in enumerate(wanted) if d not in axes])


# -- Writes by any index ---------------------------------------------------------------------


def update_at(steps: Sequence[Step], x: Any, index: Any, value: Any) -> Update:
    """The write of ``v[index] = value``, where ``v`` is the view of ``x`` with these steps."""
    shape = steps[-1].shape if steps else x.shape
    entries = expanded(index, len(shape))
    value = cast(value, x.dtype)
    conditions = [e for e in entries if is_condition(e)]
    if len(conditions) == 1:
        update = _update_if(steps, x, shape, conditions[0], entries, value)
        if update is not None:
            return update
    two_steps = in_two_steps(entries)
    if two_steps is not None:
        new_axes, entries = two_steps
        steps = view(steps, shape, new_axes)
    elif all(map(is_basic, entries)):
        steps = view(steps, shape, entries)
        return update_through(steps, x, fit(value, steps[-1].shape if steps else x.shape))
    target = _through(steps, x)
    update = _update_advanced(target, entries, value)
    return update_through(steps, x, update(target)) if steps else update


def _through(steps: Sequence[Step], x: Any) -> Any:
    """The view of ``x`` with these steps."""
    for step in steps:
        x = step.read(x)
    return x


def _update_if(
    steps: Sequence[Step], x: Any, shape: Any, condition: Any, entries: list[Any], value: Any
) -> Update | None:
    """The write where one entry says if there is any, or None if more is to be known of it."""
    is_traced = _compat.concrete(condition) is None
    if is_traced and not jnp.ndim(value):
        # The shape of what is written does not matter, so the index is as good without the entry.
        others = tuple(e for e in entries if e is not condition)
        written = update_at(steps, x, others, value)(x)
        return Update(_replace, x.shape, (_if_so(condition, written, x),))
    others = [None if e is condition else e for e in entries]
    if not all(map(is_basic, others)):
        return None
    if not is_traced and (not condition or not all(isinstance(e, _BETWEEN) for e in others)):
        return None
    steps = view(steps, shape, others)
    value = fit(value, steps[-1].shape if steps else x.shape)
    if is_traced:
        value = _if_so(condition, value, _through(steps, x))
    return update_through(steps, x, value)


def _if_so(condition: Any, value: Any, otherwise: Any) -> Any:
    return jax.lax.select(
        jnp.broadcast_to(condition, otherwise.shape),
        jnp.broadcast_to(value, otherwise.shape),
        otherwise,
    )


def _update_advanced(x: Any, entries: Sequence[Any], value: Any) -> Update:
    """The write with an index that has arrays."""
    check_arrays(x.shape, entries)
    masks = [e for e in entries if is_mask(e)]
    arrays = [e for e in entries if not is_basic(e) and not is_mask(e)]
    if len(masks) == 1 and not arrays and masks[0].ndim:
        update = _update_by_mask(x, entries, masks[0], value)
        if update is not None:
            return update
    entries = [e for entry in entries for e in _positions(entry)]
    value = fit(value, _shape_of(x.shape, entries))
    is_array = [not isinstance(e, _NO_ARRAYS) for e in entries]
    template = tuple(_ARRAY if a else _key(e) for a, e in zip(is_array, entries, strict=True))
    return Update(
        _scatter, template, (value, *(e for a, e in zip(is_array, entries, strict=True) if a))
    )


def _update_by_mask(x: Any, entries: Sequence[Any], mask: Any, value: Any) -> Update | None:
    """One select, if the value is the same for every element that the mask finds."""
    if any(e is None for e in entries) and jnp.ndim(value):
        return None
    advanced = [i for i, e in enumerate(entries) if not isinstance(e, _BETWEEN)]
    is_one_block = advanced[-1] - advanced[0] < len(advanced)  # nothing is between them
    entries = [e for e in entries if e is not Ellipsis and e is not None]
    at = next(i for i, e in enumerate(entries) if e is mask)
    before, after = entries[:at], entries[at + 1 :]
    if not all(map(is_basic, before + after)):
        return None
    steps = view((), x.shape, [*before, *[slice(None)] * mask.ndim, *after])
    shape = steps[-1].shape if steps else x.shape
    first, last = (sum(isinstance(e, slice) for e in es) for es in (before, after))
    # In the value, the axis of the elements found is where the mask is, or in front of all others.
    sizes = jnp.shape(value)
    behind = last if is_one_block else first + last
    if len(sizes) > behind:
        found = len(sizes) - behind - 1
        if sizes[found] != 1:
            return None
        sizes = sizes[:found] + sizes[found + 1 :]
    if len(sizes) > last:
        n = len(sizes) - last
        value = jnp.reshape(value, (*sizes[:n], *[1] * mask.ndim, *sizes[n:]))
    value = fit(value, shape)
    axes = tuple(range(first, first + mask.ndim))
    if not steps:
        return Update(_by_mask, axes, (value, jnp.asarray(mask)))
    return update_through(steps, x, _by_mask(axes, steps[-1].read(x), value, jnp.asarray(mask)))


def _positions(entry: Any) -> Sequence[Any]:
    """A mask as the arrays of positions that it finds; anything else as it is."""
    if not is_mask(entry):
        return (entry,)
    concrete = entry if isinstance(entry, np.ndarray) else _compat.concrete(entry)
    if concrete is None:
        raise MaskedWriteError(
            message(
                f"A write by a traced mask of shape {entry.shape} was given a value per element"
                " found, and how many the mask finds is known only when the program runs.",
                fix="""
                x[mask] = scalar                            # one value for all of them
                x[:] = jnp.where(mask, values, x)           # or values in the shape of x
                x[jnp.nonzero(mask, size=n)] = values       # or their number, if you know it
                """,
                used=_compat.user_location(),
            )
        )
    return np.asarray(concrete).nonzero()


def _shape_of(shape: Sequence[int], entries: Sequence[Any]) -> tuple[int, ...]:
    """The shape of ``x[entries]``, which NumPy works out on a stand-in without elements."""
    entries = [e if isinstance(e, _NO_ARRAYS) else np.zeros(e.shape, int) for e in entries]
    sizes, axis = list(shape), 0
    for entry in entries:
        if isinstance(entry, np.ndarray):
            sizes[axis] = max(sizes[axis], 1)  # or NumPy refuses the zeros
        axis += entry is not None and entry is not Ellipsis
    return np.broadcast_to(np.int8(0), sizes)[tuple(entries)].shape
