"""The slots of objects, as they stand in a jaxpr: its arrays, and its structure.

* `LeafAddress`: an array that was there when the jaxpr began.
* `Shape`: the structure, which is only written, and never in a loop or a branch. Writing it makes
  the objects what they are at the end of the jaxpr.
* `NewLeaf`: an array that such a change adds. It is written behind the `Shape`.

The objects of the calls of `mutate` that are open are told apart by how deep these are nested, so
that a jitted function which was traced in one call can be used in the next one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxstate import _compat
from jaxstate.slots import Address
from jaxstate.tree import problems
from jaxstate.tree.graph import Graph, Walk
from jaxstate.tree.objects import Blank


class TreeAddress(Address):
    """A slot of the objects of a call of `mutate`."""

    __slots__ = ("label", "level")

    in_objects = True
    may_be_written = True

    def __init__(self, level: int, label: str) -> None:
        self.level = level
        self.label = label

    def missing(self) -> Exception:
        return problems.closed(self.label)

    def key(self) -> Any:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.key() == other.key()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        return f"leaf {self.label}"


class LeafAddress(TreeAddress):
    """One array.

    Attributes:
      renewed_objects: the numbers of the objects that a loop replaces by others like them.
    """

    __slots__ = ("number", "renewed_objects")

    def __init__(self, level: int, number: int, label: str, renewed: tuple[int, ...] = ()) -> None:
        super().__init__(level, label)
        self.number = number
        self.renewed_objects = renewed

    def key(self) -> Any:
        return self.level, self.number


class Change:
    """How a jaxpr changes the structure of the objects.

    Attributes:
      before, after: the objects at the beginning and the end.
      objects: for each object at the end, its number at the beginning, or None for a new one.
      blanks: for each object at the end, what makes one like it.
      leaves: for each array at the end, its number at the beginning, or None for a new one.
      roots: how many of the roots are the program's. (Behind them come detached objects.)
    """

    def __init__(self, before: Walk, entries: list[Any], after: Walk, roots: int) -> None:
        numbers = {id(entry): i for i, entry in enumerate(entries)}
        self.before: Graph = before.graph
        self.after: Graph = after.graph
        self.objects = [before.number_of(node.object) for node in after.nodes]
        self.blanks = [Blank.of(node.object) for node in after.nodes]
        self.leaves = [numbers.get(id(x)) for x in after.leaves]
        self.roots = roots


class Shape(TreeAddress):
    """The structure of the objects, for a jaxpr that changes it."""

    __slots__ = ("change",)
    threaded = True

    def __init__(self, level: int, change: Change, label: str) -> None:
        super().__init__(level, label)
        self.change = change

    def key(self) -> Any:
        return self.level, id(self.change)

    def __repr__(self) -> str:
        return f"the structure of {self.label}"

    def check_repeats(self) -> None:
        raise problems.structure_changed(self.label)

    check_absence = check_repeats


class NewLeaf(TreeAddress):
    """An array that a change of the structure adds."""

    __slots__ = ("change", "number")
    threaded = True

    def __init__(self, level: int, change: Change, number: int, label: str) -> None:
        super().__init__(level, label)
        self.change = change
        self.number = number

    def key(self) -> Any:
        return self.level, id(self.change), self.number


FLAG = np.bool_(True)  # what is written to a `Shape`
FLAG_TYPE = _compat.typeof(FLAG)
