"""The NumPy programs of ``examples/``: in place, and by hand."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import numpy_ports
import numpy_ports_by_hand

__all__ = ["NAMES", "Port", "numpy_ports", "port"]

NAMES = tuple(numpy_ports.PROGRAMS)


class Port(NamedTuple):
    """One program as two functions of arrays."""

    ours: Callable[..., Any]
    by_hand: Callable[..., Any]
    arrays: list[Any]


def port(name: str, size: float) -> Port:
    """The program with inputs of this size; the numbers among its arguments are fixed."""
    arguments = numpy_ports.inputs(size)[name]
    numbers = [a for a in arguments if isinstance(a, int)]
    arrays = [a for a in arguments if not isinstance(a, int)]

    def fixed(program: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arrays: program(*arrays, *numbers)

    ours, by_hand = numpy_ports.PROGRAMS[name], numpy_ports_by_hand.PROGRAMS[name]
    return Port(fixed(ours), fixed(by_hand), arrays)
