"""What an operation needs for a part of its result, family by family.

A rule has three answers:

* ``stamps(op)``: when the elements of each result are known, from the stamps of the operands;
* ``facts(op, place)``: which elements of a result are fixed, or None;
* ``compute(op, run, place, region)``: a part of a result, from what ``run.pull`` gives of the
  operands. It may give the parts of all results, as a list, if that region is one of each.

A *recurrence* computes a part from what it has computed before, and has ``advance`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxstate._src.causal.knowledge import Facts
from jaxstate._src.causal.program import Operation
from jaxstate._src.causal.regions import Region


class Rule:
    """Of one kind of operations; nothing is kept in it but how the kind is told from others."""

    is_recurrence = False

    def stamps(self, op: Operation) -> list[np.ndarray]:
        raise NotImplementedError

    def facts(self, op: Operation, place: int) -> Facts | None:
        return None

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        raise NotImplementedError

    def advance(self, op: Operation, run: Any, boxes: Sequence[Region]) -> list[Any]:
        """All results, brought up to date in these regions."""
        raise NotImplementedError
