"""What stands between the program and a holder: the boundaries of jaxprs, lanes and devices."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.notes import Boundaries, notes_of
from jaxstate._src.core.slots import Holder, any_stacked, holders, open_here, stack

__all__ = ["boundaries", "boundary_of", "holders_outside", "innermost_boundary", "same_trace"]


def boundaries(holder: Holder) -> Boundaries:
    """What stands between here and the holder."""
    trace, here = _jax.current_trace(), open_here()
    if trace is _jax.eval_trace and not any_stacked():
        return Boundaries(())
    known = _known_boundaries(trace, holder, here)
    if known is not None:
        return known
    found = _find_boundaries(holder, trace)
    if not found or found[0] is not trace or _jax.is_finished(trace):
        return Boundaries(found)
    # A nest may be deep, and each jaxpr of it asks: what is found is noted for all of them.
    n = 1
    while n < len(found) and _jax.jaxpr_around(found[n - 1]) is found[n]:
        n += 1
    known = None
    for i in reversed(range(n)):
        outer, known = known, _known_boundaries(found[i], holder, here)
        if known is None:
            known = Boundaries(found[i:], outer)
            notes_of(found[i]).around = holder, weakref.ref(here), known
    assert known is not None
    return known


def _known_boundaries(trace: Any, holder: Holder, here: Any) -> Boundaries | None:
    """The boundaries from a jaxpr under construction, if they have been found already."""
    if not isinstance(trace, _jax.StagingTrace) or _jax.is_finished(trace):
        return None
    around = notes_of(trace).around
    if around is None or around[0] is not holder or around[1]() is not here:
        return None
    return around[2]


def _find_boundaries(holder: Holder, trace: Any) -> list[Any]:
    found: list[Any] = []
    known: set[int] = set()  # of what is found: the number of each trace
    bottom = [holder] if holder is _OUTERMOST else []
    open_holders = bottom + stack()
    if trace is holder.anchor and open_holders and open_holders[-1] is holder:
        return found
    while open_holders:
        inner = open_holders.pop()
        if inner is not holder and inner.outside is None and not inner.is_boundary:
            continue
        # The jaxpr of a shard_map does not know its parent: `outside` does. So in a shard_map the
        # chain ends by itself. (A copy of the holder's anchor may be in it: a derivative or vmap
        # re-enters its trace there.)
        ends_by_itself = inner is not holder and not inner.is_boundary
        if ends_by_itself:
            open_holders = bottom + list(inner.below)
        for t in _jax.chain(trace):
            if not ends_by_itself and same_trace(t, inner.anchor):
                break
            if isinstance(t, _jax.StagingTrace) and id(t) not in known:
                known.add(id(t))
                found.append(t)
        if inner is holder:
            break
        if inner.is_boundary:
            found.append(inner)
        trace = inner.outside
    return found


def boundary_of(holder: Holder) -> Any:
    """The innermost boundary between here and the holder, or None."""
    around = boundaries(holder)
    return around[0] if around else None


def innermost_boundary() -> Any:
    """The innermost boundary of all, or None."""
    return boundary_of(_OUTERMOST)


# Stands for a holder that is outside of all.
_OUTERMOST = Holder()


def holders_outside(boundary: Any) -> Iterator[Holder]:
    """The open holders around a jaxpr or holder (see `Address.seen_from`), innermost first."""
    return (h for h in holders() if not (h.is_boundary or _is_inside(h, boundary)))


def _is_inside(holder: Holder, boundary: Any) -> bool:
    """Whether ``holder`` was opened inside a boundary."""
    if isinstance(boundary, Holder):
        return holder.age > boundary.age
    return any(trace is boundary for trace in _jax.chain(holder.anchor))


def same_trace(a: Any, b: Any) -> bool:
    """Whether two traces are one, or one is a re-entered copy of the other."""
    if a is b:
        return True
    tag = getattr(a, "tag", None)
    return tag is not None and tag is getattr(b, "tag", None)
