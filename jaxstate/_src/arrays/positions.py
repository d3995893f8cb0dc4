"""Where in an array the elements are that an index of a view names.

A write through a view is one write into the array. The elements that it names are the elements of
its *result*, an array of the shape of ``v[index]``. Per axis of the view their positions are

* an integer,
* a `Line`: ``start + step * k``, where ``k`` counts along an axis of the result, or
* `Points`: an array of integers, which varies along some axes of the result.

`placed` follows them through the steps of the view, from the last to the first, to the axes of the
array itself. What stays lines is written as slices; a reshape may divide an axis of the result into
two, or take several as one. A position that is out of bounds of the view is the size of the axis:
out of bounds of the array, where a scatter drops it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays.views import Fixed, Range, Reshape, Selection, Step, Window, as_signed

__all__ = ["Layout", "Line", "Points", "are_computed", "placed", "spread"]


class Line(NamedTuple):
    """Positions ``start + step * k``, where ``k`` counts along ``axes``, the last one fastest."""

    axes: tuple[int, ...]
    start: Any
    step: int
    size: Any


class Points(NamedTuple):
    """Positions that vary along ``axes``, one dimension of ``values`` for each of them."""

    axes: tuple[int, ...]
    values: Any


class Layout:
    """The axes of the result of an index, by number.

    Attributes:
      axes: the axes now, in their order.
      sizes: of each axis.
      reversed: the axes along which the elements are taken from the end.
    """

    def __init__(self, shape: Sequence[Any]) -> None:
        self.axes = list(range(len(shape)))
        self.sizes = dict(enumerate(shape))
        self.reversed: set[int] = set()
        self._shape = tuple(shape)
        self._parts: dict[int, tuple[int, int]] = {}

    def split(self, axis: int, inner: int) -> tuple[int, int]:
        """Divides an axis into two, the last one of size ``inner``."""
        new = len(self.sizes), len(self.sizes) + 1
        self.sizes[new[0]], self.sizes[new[1]] = self.sizes[axis] // inner, inner
        if axis in self.reversed:
            self.reversed.update(new)
        at = self.axes.index(axis)
        self.axes[at : at + 1] = new
        self._parts[axis] = new
        return new

    def parts(self, axis: int) -> list[int]:
        """The axes that an axis has been divided into."""
        parts = self._parts.get(axis)
        return [axis] if parts is None else [a for part in parts for a in self.parts(part)]

    def forwards(self, line: Line) -> Line:
        """The same elements from the first position to the last."""
        if line.step > 0:
            return line
        self.reversed.symmetric_difference_update(line.axes)
        return Line(line.axes, line.start + line.step * (line.size - 1), -line.step, line.size)

    def arranged(self, value: Any, groups: Sequence[Sequence[int]]) -> Any:
        """A value that broadcasts to the result, as one that broadcasts to these ``groups`` of
        axes, each of them one axis. (The axes left out have size 1.)"""
        n = len(self._shape)
        axes: list[int] = []
        sizes: list[Any] = []
        for axis, size in zip(range(n - jnp.ndim(value), n), jnp.shape(value), strict=True):
            now = self.parts(axis)
            axes += now
            is_whole = len(now) > 1 and not _is_one(size)
            sizes += map(self.sizes.get, now) if is_whole else [size, *[1] * (len(now) - 1)]
        value = value if len(sizes) == jnp.ndim(value) else jnp.reshape(value, sizes)
        flip = [i for i, a in enumerate(axes) if a in self.reversed and not _is_one(sizes[i])]
        value = jnp.flip(value, flip) if flip else value
        wanted = [a for group in groups for a in group]
        rest = [i for i, a in enumerate(axes) if a not in wanted]
        value = jnp.squeeze(value, rest) if rest else value
        axes = [a for a in axes if a in wanted]
        order = sorted(range(len(axes)), key=lambda i: wanted.index(axes[i]))
        value = jnp.transpose(value, order) if order != sorted(order) else value
        groups = list(groups)
        while groups and not any(a in axes for a in groups[0]):
            groups.pop(0)
        wanted = [a for group in groups for a in group]
        new = [i for i, a in enumerate(wanted) if a not in axes]
        value = jnp.expand_dims(value, new) if new else value
        return self._merged(value, groups)

    def _merged(self, value: Any, groups: Sequence[Sequence[int]]) -> Any:
        if all(len(group) == 1 for group in groups):
            return value
        sizes = iter(jnp.shape(value))
        shape, merged = [], []
        for group in groups:
            own = [next(sizes) for _ in group]
            if len(group) > 1:
                own = [self.sizes[a] for a in group]
            shape += own
            merged.append(math.prod(own))
        return jnp.reshape(jnp.broadcast_to(value, shape), merged)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


Place = Any  # an integer, a Line or Points


def placed(steps: Sequence[Step], layout: Layout, places: Sequence[Place]) -> list[Place]:
    """The positions in an array, for positions in the view of it with these steps."""
    places = list(places)
    for step in reversed(steps):
        if isinstance(step, Reshape):
            places = _through_reshape(step, layout, places)
        else:
            places = _through_selection(step, layout, places)
    return [layout.forwards(p) if isinstance(p, Line) else p for p in places]


def are_computed(steps: Sequence[Step]) -> bool:
    """Whether positions that are arrays can be followed through these steps.

    An array without axes has none where an index out of bounds could be dropped, and the positions
    in a reshaped array are counted in 32 bits.
    """
    large = (
        isinstance(s, Reshape) and isinstance(n := math.prod(s.shape), int) and n >= 2**31
        for s in steps
    )
    return not any(large) and all(s.parent for s in steps)


def _through_selection(step: Selection, layout: Layout, places: list[Place]) -> list[Place]:
    of_axis = dict(zip(step.order, places, strict=True))
    on_new_axes = [
        p for d, p in zip(step.order, places, strict=True) if d < 0 and isinstance(p, Points)
    ]
    found: list[Place] = []
    for d, (what, size) in enumerate(zip(step.along, step.parent, strict=True)):
        if isinstance(what, Fixed):
            if not what.is_traced:
                found.append(what.index)
            elif what.among is None:
                found.append(Points((), what.index))
            else:
                found.append(_through_range(what.among, size, layout, Points((), what.index)))
        elif isinstance(what, Range):
            found.append(_through_range(what, size, layout, of_axis[d]))
        else:
            found.append(_through_window(what, size, layout, of_axis[d]))
    for points in on_new_axes:
        found[0] = _if_first(layout, points, found[0], step.parent[0])
    return found


def _if_first(layout: Layout, on_new_axis: Points, place: Place, size: Any) -> Points:
    """The positions of ``place`` where the index of a new axis, of size 1, is in bounds of it."""
    points = _as_points(layout, place)
    axes = tuple(a for a in layout.axes if a in points.axes or a in on_new_axis.axes)
    _, is_inside = _counted(spread(on_new_axis, axes), 1)
    values, is_valid = _counted(spread(points, axes), size)
    return Points(axes, jnp.where(is_inside & is_valid, values, _jax.size_value(size)))


def _through_range(what: Range, size: Any, layout: Layout, place: Place) -> Place:
    start, step, n = what
    if what == (0, 1, size):
        return place
    if isinstance(place, Line):
        return Line(place.axes, start + step * place.start, step * place.step, place.size)
    if not isinstance(place, Points):
        return start + step * place
    values, is_inside = _counted(place.values, n)
    start, size = _jax.size_value(start), _jax.size_value(size)
    return place._replace(values=_where(is_inside, start + step * values, size))


def _through_window(what: Window, size: Any, layout: Layout, place: Place) -> Points:
    axes, values = _as_points(layout, place)
    values, is_inside = _counted(values, what.size)
    last = what.start + what.step * (what.size - 1)
    size = _jax.size_value(size)
    fits = (what.start >= 0) & (last < size)
    return Points(axes, jnp.where(is_inside & fits, what.start + what.step * values, size))


def _counted(values: Any, size: Any) -> tuple[Any, Any]:
    """Positions on an axis, counted from the front, and whether they are in bounds."""
    values, size = as_signed(values), _jax.size_value(size)
    values = _where(values < 0, values + size, values)
    return values, (values >= 0) & (values < size)


def _where(condition: Any, x: Any, y: Any) -> Any:
    known = all(isinstance(a, (int, np.ndarray, np.generic)) for a in (condition, x, y))
    return (np if known else jnp).where(condition, x, y)


def _as_points(layout: Layout, place: Place) -> Points:
    if isinstance(place, Points):
        return place
    if not isinstance(place, Line):
        return Points((), _jax.size_value(place))
    place = layout.forwards(place)
    axes = tuple(part for a in place.axes for part in layout.parts(a))
    values = jnp.arange(place.size) * place.step + _jax.size_value(place.start)
    return Points(axes, jnp.reshape(values, [layout.sizes[a] for a in axes]))


# -- Reshapes --------------------------------------------------------------------------------


def _through_reshape(step: Reshape, layout: Layout, places: list[Place]) -> list[Place]:
    found: list[Place] = []
    at = 0
    for parent, shape in _factors(step.parent, step.shape):
        group = places[at : at + len(shape)]
        group = [layout.forwards(p) if isinstance(p, Line) else p for p in group]
        at += len(shape)
        if parent == shape:
            found += group
            continue
        new = None
        if all(isinstance(n, int) for n in (*parent, *shape)):
            new = _divided(layout, _Linear.of(layout, shape, group), parent)
        found += _scattered(layout, shape, group, parent) if new is None else new
    return found


def _factors(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Two shapes of one size, cut into pieces that have one size each, as small as possible."""
    found = []
    i = j = 0
    while i < len(a) or j < len(b):
        if found and (i == len(a) or j == len(b)):  # only axes of size 1 are left
            left, right = found.pop()
            found.append((left + tuple(a[i:]), right + tuple(b[j:])))
            break
        m, n = i + (i < len(a)), j + (j < len(b))
        while True:
            left, right = math.prod(a[i:m]), math.prod(b[j:n])
            if _is_same(left, right) or (m == len(a) and n == len(b)):
                break
            is_left = n == len(b) or (m < len(a) and _is_less(left, right))
            m, n = m + is_left, n + (not is_left)
        found.append((tuple(a[i:m]), tuple(b[j:n])))
        i, j = m, n
    return found


def _is_same(a: Any, b: Any) -> bool:
    return bool(_jax.same_size(a, b))


def _is_less(a: Any, b: Any) -> bool:
    try:
        return bool(a < b)
    except _jax.InconclusiveDimensionOperation:
        return False


class _Linear(NamedTuple):
    """Positions in the elements of some axes, counted through: ``start`` and, for each axis of the
    result, by how much they grow along it."""

    start: int
    growth: dict[int, int]

    @staticmethod
    def of(layout: Layout, shape: Sequence[int], places: Sequence[Place]) -> _Linear | None:
        start, growth, stride = 0, {}, 1
        for n, place in zip(reversed(shape), reversed(places), strict=True):
            if isinstance(place, Points):
                return None
            if isinstance(place, Line):
                by = stride * place.step
                for axis in reversed(place.axes):
                    growth[axis] = by
                    by *= layout.sizes[axis]
                place = place.start
            start += stride * place
            stride *= n
        return _Linear(start, growth)


def _divided(layout: Layout, linear: _Linear | None, shape: Sequence[int]) -> list[Place] | None:
    """The positions per axis of ``shape``, if these are lines."""
    if linear is None:
        return None
    start, growth = linear
    growth = {a: by for a, by in growth.items() if layout.sizes[a] != 1}
    places: list[Place] = []
    for n in reversed(shape[1:]):
        inside, outside = {}, {}
        for axis, by in growth.items():
            if by % n == 0:
                outside[axis] = by // n
            elif by < n and n % by == 0 and layout.sizes[axis] > n // by:
                if layout.sizes[axis] % (n // by):
                    return None
                outer, inner = layout.split(axis, n // by)
                outside[outer], inside[inner] = 1, by
            else:
                inside[axis] = by
        if start % n + sum(by * (layout.sizes[a] - 1) for a, by in inside.items()) >= n:
            return None
        places.append(_line(layout, start % n, inside))
        start, growth = start // n, outside
    if shape:
        places.append(_line(layout, start, growth))
    return None if None in places else places[::-1]


def _line(layout: Layout, start: int, growth: dict[int, int]) -> Place | None:
    if not growth:
        return start
    axes = sorted(growth, key=lambda a: -growth[a])
    step = by = growth[axes[-1]]
    for axis in reversed(axes):
        if growth[axis] != by:
            return None
        by *= layout.sizes[axis]
    return Line(tuple(axes), start, step, by // step)


def _scattered(
    layout: Layout, shape: Sequence[Any], places: Sequence[Place], parent: Sequence[Any]
) -> list[Place]:
    """The positions per axis of ``parent``, one by one."""
    places = [_as_points(layout, p) if isinstance(p, Line) else p for p in places]
    points = [p for p in places if isinstance(p, Points)]
    axes = tuple(a for a in layout.axes if any(a in p.axes for p in points))
    position: Any = 0
    fits: Any = True
    stride: Any = 1
    for place, n in zip(reversed(places), reversed(shape), strict=True):
        values = place
        if isinstance(place, Points):
            values, is_inside = _counted(spread(place, axes), n)
            fits = is_inside if fits is True else fits & is_inside
        position = position + _times(values, stride)
        stride = stride * n
    if _jax.is_size(position):
        position = jnp.asarray(_jax.size_value(position))
    if fits is not True:
        position = jnp.where(fits, position, _jax.size_value(stride))
    found: list[Place] = []
    inner: Any = 1
    for i, n in reversed(list(enumerate(parent))):
        values = _divided_by(jax.lax.div, position, inner)
        found.append(Points(axes, _divided_by(jax.lax.rem, values, n) if i else values))
        inner = inner * n
    return found[::-1]


def _times(values: Any, n: Any) -> Any:
    return values if isinstance(n, int) and n == 1 else values * _jax.size_value(n)


def _divided_by(divide: Any, values: Any, n: Any) -> Any:
    """The quotient, or the remainder, of positions, none of which is negative."""
    if isinstance(n, int) and n == 1:
        return values if divide is jax.lax.div else jnp.zeros_like(values)
    n = jnp.asarray(_jax.size_value(n), values.dtype)
    return divide(values, jnp.broadcast_to(n, values.shape))


def spread(points: Points, axes: Sequence[int]) -> Any:
    """The positions with a dimension for each of ``axes``, of size 1 where they do not vary."""
    values = points.values
    have = [a for a in axes if a in points.axes]
    order = [points.axes.index(a) for a in have]
    if order != sorted(order):
        values = values.transpose(order)
    new = [i for i, a in enumerate(axes) if a not in points.axes]
    return jax.lax.expand_dims(values, new) if new else values
