"""`mutate(deep=False)`: objects that a function may not assign to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from jaxstate._src.tree.node import Node
from jaxstate._src.tree.problems import frozen_part
from jaxstate._src.tree.walk import Walk


class _Frozen(NamedTuple):
    """An object that may not be assigned to, as the program was given it."""

    label: str
    node: Node


class FrozenParts(list[_Frozen]):
    """The objects that may not be assigned to; none, if all may."""

    def freeze(self, walk: Walk) -> None:
        """From now on the program may assign to the parts of the tree only."""
        for n, node in enumerate(walk.nodes):
            if node.parent >= 0:
                self.append(_Frozen(walk.graph.label_of_node(n), node))
        self.accept()

    def check(self) -> None:
        for label, node in self:
            part = node.changed_part()
            if part is not None:
                raise frozen_part(label + part)

    def accept(self) -> None:
        """What the objects are now was not assigned by the program."""
        self[:] = [_Frozen(label, node.seen_now()) for label, node in self]

    def written(self) -> AbstractContextManager[None]:
        """While what a transformed function has assigned is put into the objects: it was checked
        where the function ended."""
        return self._written() if self else nullcontext()

    @contextmanager
    def _written(self) -> Iterator[None]:
        self.check()
        yield
        self.accept()
