"""Public objects are known by the module in which they are public.

So a message, a type that is printed, and `help` show names that a program may import, and pickles
keep them, wherever the code stands: in JAX, ``jax.Array`` is in ``jax._src``. (The price is that of
JAX too: `inspect.getsource` finds functions and methods, and no classes.)
"""

from __future__ import annotations

import types
import typing
from typing import Any

__all__ = ["known_as_public", "written_in"]

_PARTS = ("jaxstate._src.", "jaxstate.errors")

# Public object, or method of one -> the module with its source.
written_in: dict[Any, str] = {}


def known_as_public(module: Any) -> None:
    """Gives what ``module`` lists as public, and is written in a part, the name of ``module``."""
    # Where `doctest` looks for what is in a module by ``__module__``, and under no name of it.
    examples = module.__test__ = {}
    for name in module.__all__:
        value = getattr(module, name)
        if not _is_written_in_a_part(value):
            continue
        if not isinstance(value, type):
            _move(value, module.__name__)
            continue
        for cls in value.__mro__:  # `help` shows the classes that it is made of
            if _is_written_in_a_part(cls):
                _settle_annotations(cls)
                for member in vars(cls).values():
                    member = getattr(member, "__func__", member)  # of a class method
                    if isinstance(member, types.FunctionType) and _is_written_in_a_part(member):
                        _move(member, module.__name__)
                _move(cls, module.__name__)
                if cls.__name__ not in module.__all__:
                    examples[cls.__name__] = cls


def _is_written_in_a_part(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").startswith(_PARTS)


def _move(value: Any, module: str) -> None:
    overloads = [] if isinstance(value, type) else typing.get_overloads(value)
    written_in[value] = value.__module__
    value.__module__ = module
    for overload in overloads:  # they are found by this name
        overload.__module__ = module
        typing.overload(overload)


def _settle_annotations(cls: type) -> None:
    """Those that are written as strings have a meaning in the module of the class only."""
    if own := vars(cls).get("__annotations__"):
        known = typing.get_type_hints(cls)
        cls.__annotations__ = {name: known[name] for name in own}
