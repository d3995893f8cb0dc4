"""Tracers that stand in objects in the place of arrays.

An `Entry` is an array as it was at the entry of a jaxpr under construction. To make one adds no
equation to the jaxpr. When the program uses it, it becomes a capture of that jaxpr; if it never
does, nothing of it is left. An `Ended` is in the place of an array when `mutate` has ended.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.capture import nowhere
from jaxstate._src.tree import problems


class Entry(_jax.Tracer):
    """An array as it was at the entry of a jaxpr, or of a function with a custom rule."""

    __slots__ = ("_frame", "_number", "_value")

    def __init__(self, frame: Any, number: int, aval: Any) -> None:
        super().__init__(nowhere, aval)
        self._frame = frame
        self._number = number
        self._value: Any = None

    def resolve(self) -> Any:
        if self._value is None:
            self._value = self._frame.read(self._number)
        return self._value

    def value_if_used(self) -> Any:
        """The capture that it has become, or itself."""
        return self if self._value is None else self._value

    def is_alive(self) -> bool:
        """Whether it can still be used."""
        return not self._frame.is_finished()

    def __repr__(self) -> str:
        return f"Entry({self.aval.str_short()})"

    def dimension_as_value(self) -> Any:
        return self.resolve()

    def to_concrete_value(self) -> Any:
        return None

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self.resolve(), *args, **kwargs)

    def _contents(self) -> list[tuple[str, Any]]:
        return [("value", _jax.PERTURBED)] if _jax.has_tangent(self.aval) else []


class Ended(_jax.Tracer):
    """An array of an object that a function under `mutate` was given, when that has ended."""

    __slots__ = ("_graph", "_number")

    def __init__(self, graph: Any, number: int, aval: Any) -> None:
        super().__init__(nowhere, aval)
        self._graph = graph
        self._number = number

    def resolve(self) -> Any:
        raise problems.closed(self._graph.label(self._number))

    def is_alive(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Ended({self._graph.label(self._number)}, {self.aval.str_short()})"

    def dimension_as_value(self) -> Any:
        return self.resolve()

    to_concrete_value = dimension_as_value

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.resolve()


_jax.register_tracer_type(Entry, Entry.resolve)
_jax.register_tracer_type(Ended, Ended.resolve)
