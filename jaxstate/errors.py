"""The errors of jaxstate: one class per cause, and the builder of their messages.

A message says what happened to which state, where it was made and where it was used (``file:line``
of the user's program), and ends with the lines of code that mend it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from jaxstate._src import _jax

__all__ = [
    "AheadOfTimeError",
    "BranchSowError",
    "ClosedStateError",
    "ConvertedClosureError",
    "CopyWriteError",
    "CustomRuleStateError",
    "DeviceWriteError",
    "FrozenPartError",
    "HostCallbackError",
    "InitializerDataError",
    "LaneWriteError",
    "MaskedWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "MissingVariableError",
    "NameClashError",
    "NotCausalError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "PlantMismatchError",
    "ReadOnlyVariableError",
    "RepeatedSowError",
    "SlotTypeError",
    "SowError",
    "SowMismatchError",
    "SplitStreamError",
    "StateError",
    "StructureChangeError",
    "TraceStateError",
    "UncoveredParameterError",
    "UnsupportedPrimitiveError",
    "UnusedReuseError",
    "VariableConflictError",
    "VariableMismatchError",
]


F = TypeVar("F", bound=Callable[..., Any])


class StateError(Exception):
    """Base class of every error that jaxstate raises about state."""


class MissingStreamError(StateError):
    """A key was drawn from a random stream that is not open."""


class MissingStoreError(StateError):
    """A parameter or variable was used outside ``init`` and ``apply``."""


class MissingParameterError(StateError):
    """``apply`` was given no value for a parameter."""


class UncoveredParameterError(StateError):
    """``parameters_from`` was given no module that has a parameter."""


class UnusedReuseError(StateError):
    """Parameters were given for reuse that the network has no place for."""


class ParameterMismatchError(StateError):
    """``apply`` was given a parameter of another structure or shape than the function makes."""


class ParameterConflictError(StateError):
    """One name in one scope was used for two parameters that differ."""


class MissingVariableError(StateError):
    """A function that uses a variable was given no value for it."""


class VariableMismatchError(StateError):
    """A function was given a variable of another structure or shape than it makes."""


class VariableConflictError(StateError):
    """One name in one scope was used for two variables, or one variable in two ways at once."""


class ReadOnlyVariableError(StateError):
    """A variable was written under ``apply``, which hands on no variables."""


class NameClashError(StateError):
    """A name was used for two of: a parameter, a variable, a scope, a module."""


class InitializerDataError(StateError):
    """An initializer looked at data that does not exist before the loop or the lanes it is in."""


class LaneWriteError(StateError):
    """Lanes of a ``vmap`` wrote different values into one slot they share."""


class DeviceWriteError(StateError):
    """Devices of a ``shard_map`` wrote different values into one slot they share."""


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


class ConvertedClosureError(StateError):
    """A converted closure was differentiated by what it closed over before that was written."""


class TraceStateError(StateError):
    """The state of a stateful trace was used, or changed, where it cannot be."""


class SowError(StateError):
    """Base class of the errors about sown values."""


class RepeatedSowError(SowError):
    """A name was sown more often than its mode allows."""


class BranchSowError(SowError):
    """A branch does not sow what another branch does."""


class SowMismatchError(SowError):
    """One name was sown with two modes, or with values of two types."""


class PlantMismatchError(SowError):
    """A planted value is not of the type of what is sown."""


class NotCausalError(StateError, ValueError):
    """An element of a sequence was found to depend on itself or on later ones."""


class StructureChangeError(StateError):
    """A function under ``mutate`` changed the structure of its tree where it has to stay."""


class CopyWriteError(StateError):
    """A function under ``mutate`` assigned to a copy of its tree, which would be lost."""


class FrozenPartError(StateError):
    """A function under ``mutate(deep=False)`` assigned to a part of a part of its tree."""


class ClosedStateError(StateError):
    """A stream or slot was used after it was closed, or outside of where it lives."""


class HostCallbackError(StateError):
    """A host callback changed a slot that the running call uses."""


class AheadOfTimeError(StateError):
    """A function that uses state of the place where it is called was compiled ahead of time."""


def message(what: str, *, fix: str, **where: str | None) -> str:
    """What happened; then one line per known place; then the code that mends it.

    The last place is the transformation: that given as ``under``, or all that are in progress.
    """
    where.setdefault("under", _jax.transformations())
    lines = [what]
    lines += [f"  {label.replace('_', ' ')}: {place}" for label, place in where.items() if place]
    return "\n".join([*lines, "To mend it:", textwrap.indent(textwrap.dedent(fix).strip(), "    ")])


def thread_that_has_nothing() -> str | None:
    """For a message about missing state: a thread has only the state that it has opened itself."""
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return None
    return f"{thread.name!r}, where only what was opened in it is open"


def check_runs_when_called(fn: Any, where: str) -> None:
    """Raises if ``fn`` is no function, or one that makes a generator or coroutine: these run when
    the state is gone, in pieces."""
    if not callable(fn):
        raise TypeError(
            f"{where} wants a function, and was given {fn!r}.\n"
            f"To mend it:\n    jaxstate.{where}(fn{', x' if where == 'causal_fixed_point' else ''})"
        )
    while isinstance(fn, functools.partial):
        fn = fn.func
    is_function = isinstance(fn, (types.FunctionType, types.MethodType))
    body = fn if is_function else getattr(type(fn), "__call__", fn)  # noqa: B004
    kinds = {
        "a generator": inspect.isgeneratorfunction(body),
        "a coroutine": inspect.iscoroutinefunction(body),
        "an asynchronous generator": inspect.isasyncgenfunction(body),
    }
    for kind, is_kind in kinds.items():
        if is_kind:
            raise TypeError(
                f"{where} wants a function that runs when it is called, and {fn!r} makes"
                f" {kind}.\nTo mend it:\n"
                "    return [f(x) for x in xs]      # return what it makes, and no yield or await"
            )


def called_as(fix: str) -> Callable[[F], F]:
    """A decorator: the error for arguments that a function does not take shows ``fix``, a call."""

    def decorate(fn: F) -> F:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return fn(*args, **kwargs)
            except TypeError:
                problem = does_not_fit(inspect.signature(fn), args, kwargs)
                if problem is None:
                    raise
            raise TypeError(
                message(
                    f"{fn.__name__} does not take the arguments of this call: {problem}.",
                    fix=fix,
                    used=_jax.user_location(),
                )
            )

        return cast(F, call)

    return decorate


def does_not_fit(
    signature: inspect.Signature, args: Iterable[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """Why a function of that signature does not take these arguments."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        problem = str(error)
        unknown = next((k for k in kwargs if k not in signature.parameters), None)
        close = unknown and difflib.get_close_matches(unknown, signature.parameters, n=1)
        return problem + (f" (did you mean {close[0]!r}?)" if close else "")
    return None


def warn_of_unopened(what: str, fix: str) -> None:
    """To be called by the ``__del__`` of what nobody has opened: it warns where it is dropped."""
    warnings.warn(
        f"{what} was made and never opened: 'with' opens it.\nTo mend it:\n"
        + textwrap.indent(textwrap.dedent(fix).strip(), "    "),
        stacklevel=3,
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, or None."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)), None)
