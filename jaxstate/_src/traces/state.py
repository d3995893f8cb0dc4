"""The state of a trace: a tree whose arrays are slots, wherever the trace sees operations.

A state has a *form*, its static part, and arrays. Putting it into slots gives an `Entry`; in
another place, a jaxpr under construction say, an entry of that form loads the state as it is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.refs import Slot, ZeroCell
from jaxstate._src.core.resolve import read_at, write_at
from jaxstate._src.core.specs import strong, typed


class Static(NamedTuple):
    """A leaf of the state that is no array. (1, 1.0 and True are equal, and not the same.)"""

    value: Hashable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and typed(self.value) == typed(other.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


class _Shown(str):
    """A text that stands in the place of a leaf, and prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class Spec(NamedTuple):
    """The static part of a state: its structure and, for each leaf, a type or a static value."""

    tree: Any
    leaves: tuple[Any, ...]

    def __str__(self) -> str:
        shown = [x if isinstance(x, Static) else _Shown(x.str_short()) for x in self.leaves]
        return str(self.tree.unflatten(shown))


class Shared:
    """What a trace and its copies have in common."""

    def __init__(self) -> None:
        self.place: Any = None
        self.family = object()
        self.slots: dict[tuple[int, Any], Slot] = {}
        self.attributes: dict[Any, Any] = {}  # for which what is below was processed
        self.processed: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def slot(self, n: int, aval: Any) -> Slot:
        """The slot of leaf number ``n``, as long as that is of this type."""
        slot = self.slots.get((n, aval))
        if slot is None:
            with _jax.set_current_trace(self.place):
                slot = Slot(ZeroCell(self.place, aval), aval, f"leaf {n} of a trace", "")
                slot.family = self.family
            self.slots[n, aval] = slot
        return slot

    def close(self) -> None:
        """Forgets all values. Rules of derivatives that run later still know the slots."""
        self.place = None
        self.processed.clear()
        for slot in self.slots.values():
            slot.close()


class Entry:
    """A state that is in slots.

    Attributes:
      form: its static part.
      values: the arrays that were stored or loaded, where they are known.
    """

    def __init__(self, shared: Shared, spec: Spec) -> None:
        self.shared = shared
        self.spec = spec
        self.values: dict[Slot, Any] = {}

    @classmethod
    def store(cls, shared: Shared, state: Any, before: Entry | None = None) -> Entry:
        """Puts a state into slots: all of it that is not there since ``before``."""
        leaves, tree = jax.tree.flatten(state)
        leaves = [_strong(_jax.resolved(x)) if is_array(x) else Static(x) for x in leaves]
        kinds = tuple(x if isinstance(x, Static) else _slot_type(x) for x in leaves)
        check_hashable(kinds)
        entry = cls(shared, Spec(tree, kinds))
        known = {} if before is None else before.values
        for n, x in enumerate(leaves):
            if not isinstance(x, Static):
                slot = shared.slot(n, kinds[n])
                if known.get(slot) is not x:
                    write_at(slot.address, x)
                entry.values[slot] = x
        return entry

    def _slots(self) -> list[Slot | None]:
        leaves = enumerate(self.spec.leaves)
        return [None if isinstance(x, Static) else self.shared.slot(n, x) for n, x in leaves]

    def load(self) -> Any:
        """The state, as it is in the slots here and now."""
        slots = self._slots()
        self.values = {slot: read_at(slot.address) for slot in slots if slot is not None}
        leaves = zip(self.spec.leaves, slots, strict=True)
        return self.spec.tree.unflatten(
            [x.value if s is None else self.values[s] for x, s in leaves]
        )

    def changed(self) -> bool:
        return any(read_at(slot.address) is not value for slot, value in self.values.items())


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _strong(x: Any) -> Any:
    return strong(x) if _jax.is_weak(x) else x


def _slot_type(x: Any) -> Any:
    aval = _jax.typeof(x)
    return aval if _jax.is_typed_key(aval) else _jax.ShapedArray(aval.shape, aval.dtype)


def check_hashable(leaves: tuple[Any, ...]) -> None:
    for leaf in leaves:
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"The state of a trace has the static leaf {leaf.value!r}, which cannot be hashed,"
                " so JAX cannot tell whether it has changed.\nTo mend it:\n"
                "    state = jnp.asarray(...)      # an array, or a tuple, a string, a number"
            ) from None
