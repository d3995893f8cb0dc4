"""A write as a function: the array after ``x[index] = value``, by one operation.

* to all elements: the value, broadcast;
* to a block of consecutive elements: ``dynamic_update_slice``;
* by a mask: ``select``;
* to anything else: ``scatter``, as ``x.at[index].set(value)`` makes it.

What is written through a view is written into the array (`arrays.positions`). The result
has the type of the array: its dtype, weak or not, and its sharding.

Each is a function of the array, of further arrays and of a static description (`Update`), so that
an eager write can run it jitted, in the memory of the array itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays.positions import Layout, Line, Points, are_computed, placed, spread
from jaxstate._src.arrays.views import (
    EMPTY_AXIS,
    Reshape,
    Selection,
    Step,
    Window,
    check_arrays,
    expanded,
    in_two_steps,
    is_basic,
    is_condition,
    is_mask,
    read,
    view,
)
from jaxstate.errors import MaskedWriteError, message

__all__ = ["Update", "cast", "update_at", "update_through"]


class Update(NamedTuple):
    """``run(static, x, *operands)`` is the array after the write."""

    run: Callable[..., Any]
    static: Any
    operands: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        return _jax.of_type(_jax.typeof(x), self.run(self.static, x, *self.operands))

    def program(self, x: Any, *, into_x: bool) -> Callable[[], Any]:
        """The same, as one program; ``into_x`` gives the memory of ``x`` to the result.

        With a traced operand the result may be another array: one per lane, say.
        """
        is_traced = any(isinstance(y, _jax.Tracer) for y in self.operands)
        placed = x.sharding if x.committed and not is_traced else None
        into_x = into_x and not is_traced and self.run not in (_nothing, _replace)
        return partial(_program(self.run, self.static, into_x, placed), x, *self.operands)


@lru_cache(maxsize=4096)
def _program(run: Callable[..., Any], static: Any, donate: bool, placed: Any) -> Any:
    def write(x: Any, *operands: Any) -> Any:
        return _jax.of_type(_jax.typeof(x), run(static, x, *operands))

    # Else an array of which nothing is left is no operand, and JAX warns of unused memory.
    options: dict[str, Any] = dict(donate_argnums=0 if donate else (), keep_unused=True)
    return _jax.jit(write, **options, **({} if placed is None else {"out_shardings": placed}))


# -- The operations --------------------------------------------------------------------------


def _nothing(static: None, x: Any) -> Any:
    return x


def _replace(static: None, x: Any, value: Any) -> Any:
    return _jax.broadcast_like(_jax.typeof(x), value)


def _block(static: tuple[Any, Any], x: Any, value: Any, *starts: Any) -> Any:
    sizes, axes = static
    if jnp.shape(value) != sizes:
        axes = axes[len(axes) - jnp.ndim(value) :]
        value = jax.lax.broadcast_in_dim(value, sizes, axes)
    if _jax.mesh_of(_jax.typeof(x)) != _jax.mesh_of(_jax.typeof(value)):
        all_axes = tuple(range(x.ndim))  # the other operation wants both in one mesh
        dims = jax.lax.ScatterDimensionNumbers(all_axes, (), all_axes)
        return jax.lax.scatter(x, jnp.stack(starts), value, dims, mode="clip")
    return jax.lax.dynamic_update_slice(x, value, starts, allow_negative_indices=False)


def _scatter(template: tuple[Any, ...], x: Any, value: Any, *arrays: Any) -> Any:
    left = iter(arrays)
    index = tuple(next(left) if e is _ARRAY else _from_key(e) for e in template)
    return x.at[index].set(value)


def _scatter_through(static: tuple[Any, ...], x: Any, value: Any, *arrays: Any) -> Any:
    """The write to some positions of a view."""
    steps, shape, places = _with_operands(static, arrays)
    layout = Layout(shape)
    return _written(x, layout, placed(steps, layout, places), value)(x)


def _by_mask(axes: tuple[int, ...], x: Any, value: Any, mask: Any) -> Any:
    like = _jax.typeof(x)
    mask = _jax.broadcast_like(like, mask, None if mask.shape == x.shape else axes)
    return jax.lax.select(mask, _jax.broadcast_like(like, value), x)


_ARRAY = "array"
_BETWEEN = (slice, type(None), type(Ellipsis))  # what separates integers and arrays


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
    while len(given) - lead > len(shape) and _is_one(given[lead]):
        lead += 1
    left, wanted = given[lead:], tuple(shape)[len(shape) - len(given) + lead :]
    fits = len(left) == len(wanted)
    pairs = zip(left, wanted, strict=False)
    if fits and all(_is_one(m) or _jax.same_size(m, n) for m, n in pairs):
        return jnp.reshape(value, left) if lead else value
    raise ValueError(
        f"could not broadcast input array from shape {given} into shape {tuple(shape)}"
    )


# -- Writes to all of a view -----------------------------------------------------------------


def update_through(steps: Sequence[Step], x: Any, value: Any) -> Update:
    """The write of ``value`` to all elements of the view of ``x`` with these steps.

    The value is cast and broadcasts to the shape of the view.
    """
    if not steps:
        return Update(_replace, None, (value,))
    last = steps[-1]
    if 0 in last.shape or (isinstance(last, Selection) and EMPTY_AXIS in last.order):
        return Update(_nothing, None, ())
    if isinstance(last, Reshape):
        value = jax.lax.reshape(jnp.broadcast_to(value, last.shape), last.parent)
        return update_through(steps[:-1], x, value)
    lines = tuple(Line((i,), 0, 1, n) for i, n in enumerate(last.shape))
    return _update_places(steps, x, last.shape, lines, value)


def _update_places(
    steps: Sequence[Step], x: Any, shape: Sequence[Any], places: Sequence[Any], value: Any
) -> Update:
    """The write to the positions ``places`` in the view of ``x`` with these steps.

    The value broadcasts to ``shape``, that of the elements written.
    """
    description = tuple(steps), tuple(shape), tuple(places)
    arrays: list[Any] = []
    static = _without_operands(description, arrays)
    if arrays:
        return Update(_scatter_through, static, (value, *arrays))
    layout = Layout(shape)
    found = placed(steps, layout, places)
    if any(isinstance(p, Points) for p in found):
        return Update(_scatter_through, static, (value,))
    return _written(x, layout, found, value)


def _written(x: Any, layout: Layout, places: Sequence[Any], value: Any) -> Update:
    """The write of a value to positions in ``x`` itself."""
    points = [p for p in places if isinstance(p, Points)]
    lines = [d for d, p in enumerate(places) if isinstance(p, Line)]
    groups: list[tuple[int, ...]] = [places[d].axes for d in lines]
    varying = [a for a in layout.axes if any(a in p.axes for p in points)]
    if varying:
        # The axes of arrays come in front of all others where a slice is between two of them.
        arrays = [d for d in range(len(places)) if d not in lines]
        is_one_block = arrays[-1] - arrays[0] < len(arrays)
        at = sum(d < arrays[0] for d in lines) if is_one_block else 0
        groups[at:at] = [(a,) for a in varying]
    value = layout.arranged(value, groups)
    if not points:
        if len(lines) == len(places) and all(
            p[1:] == (0, 1, n) for p, n in zip(places, x.shape, strict=True)
        ):
            return Update(_replace, None, (value,))
        # (Along an axis that is sharded JAX has a rule for scatter only.)
        is_block = all(places[d].step == 1 or _is_one(places[d].size) for d in lines)
        if is_block and not _jax.is_explicitly_sharded(_jax.typeof(x)):
            sizes = tuple(p.size if isinstance(p, Line) else 1 for p in places)
            starts = (p.start if isinstance(p, Line) else p for p in places)
            starts = tuple(map(_jax.size_value, starts))
            return Update(_block, (sizes, tuple(lines)), (value, *starts))
    template, operands = [], []
    for place, n in zip(places, x.shape, strict=True):
        if isinstance(place, Points):
            template.append(_ARRAY)
            operands.append(spread(place, varying) if varying else place.values)
        else:
            template.append(_key(_slice(place, n) if isinstance(place, Line) else place))
    return Update(_scatter, tuple(template), (value, *operands))


def _slice(line: Line, size: Any) -> slice:
    _, start, step, n = line
    if (start, step, n) == (0, 1, size):
        return slice(None)
    return slice(start, start + (n - 1) * step + 1, step)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


class _Operand(NamedTuple):
    """Stands for an array in the description of a write."""

    number: int


def _without_operands(x: Any, arrays: list[Any]) -> Any:
    """A description without its arrays, which are appended to ``arrays``."""
    if isinstance(x, tuple):
        parts = [_without_operands(e, arrays) for e in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, (np.ndarray, jax.Array)):
        arrays.append(x)
        return _Operand(len(arrays) - 1)
    return x


def _with_operands(x: Any, arrays: Sequence[Any]) -> Any:
    if isinstance(x, _Operand):
        return arrays[x.number]
    if isinstance(x, tuple):
        parts = [_with_operands(e, arrays) for e in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


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
        shape = steps[-1].shape if steps else x.shape
    elif all(map(is_basic, entries)):
        steps = view(steps, shape, entries)
        return update_through(steps, x, fit(value, steps[-1].shape if steps else x.shape))
    return _update_advanced(steps, shape, x, entries, value)


def _update_if(
    steps: Sequence[Step], x: Any, shape: Any, condition: Any, entries: list[Any], value: Any
) -> Update | None:
    """The write where one entry says if there is any, or None if more is to be known of it."""
    is_traced = _jax.concrete(condition) is None
    others = [None if e is condition else e for e in entries]
    if not all(map(is_basic, others)):
        if not is_traced or jnp.ndim(value):
            return None
        # The shape of what is written does not matter, so the index is as good without the entry.
        others = [e for e in entries if e is not condition]
        written = update_at(steps, x, tuple(others), value)(x)
        return Update(_replace, None, (_if_so(condition, written, x),))
    if not is_traced and (not condition or not all(isinstance(e, _BETWEEN) for e in others)):
        return None
    steps = view(steps, shape, others)
    value = fit(value, steps[-1].shape if steps else x.shape)
    if is_traced:
        value = _if_so(condition, value, read(steps, x))
    return update_through(steps, x, value)


def _if_so(condition: Any, value: Any, otherwise: Any) -> Any:
    like = _jax.typeof(otherwise)
    condition, value = (_jax.broadcast_like(like, x) for x in (condition, value))
    return jax.lax.select(condition, value, otherwise)


def _update_advanced(
    steps: Sequence[Step], shape: Sequence[Any], x: Any, entries: Sequence[Any], value: Any
) -> Update:
    """The write with an index that has arrays."""
    check_arrays(shape, entries)
    masks = [e for e in entries if is_mask(e)]
    arrays = [e for e in entries if not is_basic(e) and not is_mask(e)]
    if len(masks) == 1 and not arrays and masks[0].ndim:
        update = _update_by_mask(steps, shape, x, entries, masks[0], value)
        if update is not None:
            return update
    entries = [_narrow(e) for entry in entries for e in _positions(entry)]
    sizes, places = _places(shape, entries)
    value = fit(value, sizes)
    if 0 in sizes:
        return Update(_nothing, None, ())
    basic = [slice(None) if _is_array(e) else e for e in entries if e is not Ellipsis]
    if are_computed(steps):
        return _update_places(view(steps, shape, basic), x, sizes, places, value)
    target = read(steps, x)
    written = _update_places(view((), shape, basic), target, sizes, places, value)(target)
    return update_through(steps, x, written)


def _narrow(entry: Any) -> Any:
    """A known index in 32 bits, where it fits: JAX warns of the others beside symbolic sizes."""
    if not isinstance(entry, np.ndarray) or entry.dtype != np.int64:
        return entry
    return entry.astype(np.int32) if not entry.size or abs(entry).max() < 2**31 else entry


def _is_array(entry: Any) -> bool:
    return isinstance(entry, (np.ndarray, jax.Array)) and bool(entry.ndim)


def _places(shape: Sequence[Any], entries: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """The shape of ``x[entries]``, and the positions in the view of ``x`` by the basic entries."""
    arrays = [e for e in entries if _is_array(e)]
    block = _jax.broadcast_shapes([e.shape for e in arrays])
    advanced = [i for i, e in enumerate(entries) if not isinstance(e, (*_BETWEEN, Window))]
    is_one_block = advanced[-1] - advanced[0] < len(advanced)
    at = advanced[0] if is_one_block else 0
    before = sum(isinstance(e, (slice, Window, type(None))) for e in entries[:at])
    sizes: list[Any] = []
    places: list[Any] = []
    axis = 0
    for entry in entries:
        if entry is Ellipsis:
            continue
        if _is_array(entry):
            axes = range(before + len(block) - entry.ndim, before + len(block))
            places.append(Points(tuple(axes), entry))
        elif isinstance(entry, (slice, Window, type(None))):
            size = 1 if entry is None else _taken(entry, shape[axis])
            number = len(sizes) + (len(block) if len(sizes) >= before else 0)
            places.append(Line((number,), 0, 1, size))
            sizes.append(size)
        axis += entry is not None
    return (*sizes[:before], *block, *sizes[before:]), places


def _taken(entry: slice | Window, size: Any) -> Any:
    return entry.size if isinstance(entry, Window) else _jax.slice_of_axis(entry, size)[2]


def _update_by_mask(
    outer: Sequence[Step],
    shape: Sequence[Any],
    x: Any,
    entries: Sequence[Any],
    mask: Any,
    value: Any,
) -> Update | None:
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
    steps = view(outer, shape, [*before, *[slice(None)] * mask.ndim, *after])
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
    return update_through(steps, x, _by_mask(axes, read(steps, x), value, jnp.asarray(mask)))


def _positions(entry: Any) -> Sequence[Any]:
    """A mask as the arrays of positions that it finds; anything else as it is."""
    if not is_mask(entry):
        return (entry,)
    concrete = entry if isinstance(entry, np.ndarray) else _jax.concrete(entry)
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
                used=_jax.user_location(),
            )
        )
    return np.asarray(concrete).nonzero()
