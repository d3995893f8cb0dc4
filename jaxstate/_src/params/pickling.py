"""Pickling by name: what a module of Python keeps under a name is looked up there again.

A function is pickled like that, and an object that is a function with parameters too: a copy made
of its parts would be another module.
"""

from __future__ import annotations

import importlib
import operator
import pickle
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["found_by_name", "name_of_global"]


def found_by_name(module: str, name: str) -> Any:
    """What stands in an importable module under a (dotted) name."""
    return operator.attrgetter(name)(importlib.import_module(module))


def name_of_global(value: Any, fn: Any) -> tuple[str, str]:
    """The module and the name under which `found_by_name` finds ``value``, made of ``fn``."""
    for module, name in _candidates(value, fn):
        try:
            found = operator.attrgetter(name)(sys.modules[module])
        except (AttributeError, KeyError):
            continue
        if found is value:
            return module, name
    raise pickle.PicklingError(
        f"{value!r} cannot be pickled: it is pickled by name, as a function is, and no module of"
        " Python has it under a name.\nTo mend it:\n"
        "    net = jaxstate.parametrized(fn)      # in a module, outside of any function; or\n"
        "    pickle.dumps(params)                 # the parameters, and make the net again"
    )


def _candidates(value: Any, fn: Any) -> Iterator[tuple[str, str]]:
    home = getattr(fn, "__module__", None) or "__main__"
    yield home, getattr(fn, "__qualname__", None) or "?"
    modules = [home, *(m for m in list(sys.modules) if m != home)]
    for module in modules:
        for name, found in list(getattr(sys.modules.get(module), "__dict__", {}).items()):
            if found is value:
                yield module, name
