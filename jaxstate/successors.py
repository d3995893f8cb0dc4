"""What becomes of a shadow whose object is replaced.

A part that is assigned anew keeps its slots, so the shadow that stood for the old part has to
become something else: Python code that still has it means the object that was there before. It
gets the values that the slots had, which are known inside the boundary (the jaxpr under
construction) in which the part is assigned, and nowhere else: in the next turn of a loop they are
others. So the program gets another shadow of the same part in each boundary, its `handle`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from jaxstate import trace
from jaxstate.containers import with_record
from jaxstate.leaves import GONE, Bundle, Leaf, Noted, Static, extra_of
from jaxstate.shadows import is_shadow, record_of, set_record


def handle(shadow: Any, boundary: Any) -> Any:
    """The shadow of the same part for the code inside a boundary."""
    record = record_of(shadow)
    if record.leaves is None or record.is_home(boundary):
        return shadow
    handles = record.leaves.extra if boundary is None else extra_of(boundary)
    key = place_of(record)
    if key not in handles:
        handles[key] = with_record(record.seen_from(boundary))
    return handles[key]


def place_of(record: Any) -> Hashable:
    """What all shadows of one part have in common."""
    return ("shadow", record.leaves and record.leaves.level, record.number)


def is_same_place(a: Any, b: Any) -> bool:
    place = place_of(record_of(a))
    return place[2] is not None and place == place_of(record_of(b))  # type: ignore[index]


def succeeded(shadow: Any) -> Any:
    """Another shadow with the slots of this one, which becomes a guest with the present values."""
    record = record_of(shadow)
    leaves = record.leaves
    assert leaves is not None and record.number is not None
    boundaries = trace.boundaries(leaves)
    here = boundaries[0] if boundaries else None
    parts = [*record.attributes.values(), *_all_items(record)]
    inner = {id(part): handle(part, here) for part in parts if is_shadow(part)}
    successors = {id(part): succeeded(part) for part in parts if is_shadow(part)}

    def frozen(entry: Any) -> Any:
        if isinstance(entry, Bundle):
            return Bundle(entry.tree, [frozen(e) for e in entry.entries])
        if isinstance(entry, Leaf):
            value = leaves.read(entry)
            return Static(value) if here is None else Noted(leaves, value, here)
        return inner.get(id(entry), entry)

    old = [shadow]
    for handles in (leaves.extra, *map(extra_of, boundaries)):
        old += [handle for handle in [handles.pop(place_of(record), None)] if handle is not None]
    for other in old:
        is_known = record_of(other).is_home(here)
        guest = record.with_entries(frozen if is_known else lambda entry: GONE)
        guest.leaves = guest.number = guest.home = None
        set_record(other, guest)
    new = record.with_entries(lambda entry: successors.get(id(entry), entry))
    new.set_home(here)
    successor = leaves.shadows[record.number] = with_record(new)
    return successor


def _all_items(record: Any) -> list[Any]:
    items = record.items
    return list(items.values()) if isinstance(items, dict) else list(items or ())
