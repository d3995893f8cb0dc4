"""The errors of jaxstate: one class per cause, and the builder of their messages.

A message says what happened to which state, where it was made and where it was used (``file:line``
of the user's program), and ends with the lines of code that mend it.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

__all__ = [
    "ClosedStateError",
    "CustomRuleStateError",
    "InitializerDataError",
    "LaneWriteError",
    "MaskedWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "NameClashError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "SlotTypeError",
    "SplitStreamError",
    "StateError",
    "UnsupportedPrimitiveError",
]


class StateError(Exception):
    """Base class of every error that jaxstate raises about state."""


class MissingStreamError(StateError):
    """A key was drawn from a random stream that is not open."""


class MissingStoreError(StateError):
    """A parameter was used outside ``init`` and ``apply``."""


class MissingParameterError(StateError):
    """``apply`` was given no value for a parameter."""


class ParameterMismatchError(StateError):
    """``apply`` was given a parameter of another structure or shape than the function makes."""


class ParameterConflictError(StateError):
    """One name in one scope was used for two parameters that differ."""


class NameClashError(StateError):
    """A name was used both for a parameter and for a scope."""


class InitializerDataError(StateError):
    """An initializer looked at data that does not exist before the loop or the lanes it is in."""


class LaneWriteError(StateError):
    """Lanes of a ``vmap`` wrote different values into one slot they share."""


class MaskedWriteError(StateError, IndexError):
    """A write by a mask needs the number of elements that the mask finds, and it is traced."""


class SlotTypeError(StateError):
    """A write changed the shape, dtype or structure of a slot."""


class SplitStreamError(StateError):
    """A ``vmap="split"`` stream was used where lanes are directions of a derivative."""


class UnsupportedPrimitiveError(StateError):
    """State was used inside a higher-order primitive that jaxstate has no rule for."""


class CustomRuleStateError(StateError):
    """A custom derivative rule used state in a way that has no answer."""


class ClosedStateError(StateError):
    """A stream or slot was used after it was closed, or outside of where it lives."""


def message(what: str, *, fix: str, **where: str | None) -> str:
    """What happened; then one line per known place; then the code that mends it."""
    lines = [what]
    lines += [f"  {label.replace('_', ' ')}: {place}" for label, place in where.items() if place]
    return "\n".join([*lines, "To mend it:", textwrap.indent(textwrap.dedent(fix).strip(), "    ")])


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, or None."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)
