"""What the lanes of a vmap write to a slot that they share."""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.notes import View, lanes_of, views_of
from jaxstate._src.core.slots import Holder

__all__ = ["put_together", "take_apart", "written_by_lanes"]


class _Kept:
    """A value in the middle of transformations, taken apart: no part of it is a tracer of theirs.

    Attributes:
      value: what is left of it outside of them.
      batch_dims: for each trace in between, from the inside, its batch dimension or None.
    """

    __slots__ = ("batch_dims", "value")


def written_by_lanes(trace: Any, holder: Holder, base: Any) -> dict[Any, _Kept]:
    """What the lanes of a vmap last wrote to slots that they share, each lane its own value."""
    return lanes_of(trace, holder, base).setdefault(_Kept, {})


def take_apart(value: Any, levels: list[Any]) -> _Kept:
    """Lowers what ``levels[0]`` holds through all levels; tangents are kept with their traces."""
    kept = _Kept()
    kept.batch_dims = []
    for trace in levels:
        batch_dim = None
        if isinstance(trace, _jax.BatchTrace):
            value, batch_dim = _jax.lane_value(trace, value)
        elif isinstance(trace, _jax.DIFFERENTIATING) and _jax.owns(trace, value):
            views_of(trace)[id(kept)] = View(value.tangent, kept)
            value = value.primal
        kept.batch_dims.append(batch_dim)
    kept.value = value
    return kept


def put_together(kept: _Kept, levels: list[Any]) -> Any:
    value = kept.value
    pairs = list(zip(levels, kept.batch_dims, strict=True))
    for trace, batch_dim in reversed(pairs):
        if isinstance(trace, _jax.BatchTrace):
            value = _jax.lane_tracer(trace, value, batch_dim)
        elif isinstance(trace, _jax.DIFFERENTIATING):
            view = views_of(trace).get(id(kept))
            if view is not None and view.stored is kept:
                value = _jax.tangent_tracer(trace, value, view.tangent)
    return value
