"""The versions of JAX that jaxstate works with, and the check of the one that is there.

This is imported first, so that a JAX that jaxstate does not know is one error, and changes nothing.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import jax

from jaxstate._src._jax.hooks import LATER, TABLE, VERSION, place_of, version_of
from jaxstate._src._jax.internals import MEMBERS, USED

__all__ = ["HERE", "SUPPORTED", "UntestedJaxWarning"]

# All tests pass with these. The metadata of the package (pyproject.toml) has the bounds, and
# excludes what lies between and cannot work: 0.11.0 and 0.11.1.
SUPPORTED = ("0.10.2", "0.11.2", "0.12.0", "0.12.0.1")


HERE: str = jax.__version__


class UntestedJaxWarning(UserWarning):
    """This version of JAX has what jaxstate uses, but nobody has run the tests with it."""


def parameters_of(function: Any) -> str | None:
    """The names of a function's parameters; None if they are not known, as in C++."""
    function = inspect.unwrap(function)
    is_bound = inspect.ismethod(function)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return None
    n = code.co_argcount + code.co_kwonlyargcount
    names = list(code.co_varnames[is_bound:n])
    if code.co_flags & inspect.CO_VARARGS:
        names.append(f"*{code.co_varnames[n]}")
        n += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        names.append(f"**{code.co_varnames[n]}")
    return ", ".join(names)


def _takes_all(found: str) -> bool:
    """Whether these are the parameters of a wrapper that passes everything on."""
    names = found.split(", ")
    return len(names) == 2 and names[0][0] == "*" and names[1][:2] == "**"


def is_here(when: str) -> bool:
    """Whether this version is one of ``">=0.11"``, ``">=0.11 <0.12"``...; all are in ``""``."""
    return when != "no" and all(
        version_of(bound[1:]) > VERSION
        if bound.startswith("<")
        else version_of(bound[2:]) <= VERSION
        for bound in when.split()
    )


def problems() -> list[str]:
    """What is missing in this version of JAX, or is not what jaxstate knows."""
    found = [*_problems_of_hooks(), *_problems_of_uses()]
    return sorted({text.partition(" ")[0]: text for text in reversed(found)}.values())


def _problems_of_hooks() -> Iterator[str]:
    for row in TABLE:
        if row.group is LATER or not row.since <= VERSION < row.until:
            continue
        try:
            there = place_of(row.path).get()
        except (ImportError, AttributeError, ValueError):
            yield _missing(row.path)
            continue
        if row.parameters:
            yield from _problem_of_parameters(row.path, there, row.parameters)


def _problems_of_uses() -> Iterator[str]:
    for module, names in USED.items():
        wanted = {}
        for name, text in names.items():
            when, _, parameters = text.partition(": ")
            if is_here(when):
                wanted[name] = parameters
        if not wanted:
            continue
        try:
            there = importlib.import_module(module)
        except ImportError:
            yield _missing(module)
            continue
        for name, parameters in wanted.items():
            if name and not hasattr(there, name):
                yield _missing(f"{module}:{name}")
            elif parameters:
                path = f"{module}:{name}"
                yield from _problem_of_parameters(path, getattr(there, name), parameters)
    for path, (when, members) in MEMBERS.items():
        if not is_here(when):
            continue
        try:
            kind = place_of(path).get()
        except (ImportError, AttributeError):
            yield _missing(path)
            continue
        for name in members.split():
            if not hasattr(kind, name):
                yield _missing(f"{path}.{name}")


def _missing(path: str) -> str:
    return f"{path.replace(':', '.')} is missing"


def _problem_of_parameters(path: str, function: Any, known: str) -> Iterator[str]:
    found = parameters_of(function)
    if found is None or found in known.split(" | ") or _takes_all(found):
        return
    yield f"{path.replace(':', '.')} takes ({found}), and not ({known})"


def check() -> None:
    """Raises an `ImportError` if jaxstate cannot work with this version of JAX, and warns if it is
    not one of those that are tested."""
    found = problems()
    if found:
        raise ImportError(
            f"jaxstate works with JAX {', '.join(SUPPORTED)}, and this is JAX {HERE},"
            " whose internals are others:\n"
            + "".join(f"    {text}\n" for text in found)
            + f"To mend it:\n    pip install 'jax=={SUPPORTED[-1]}'"
        )
    if HERE not in SUPPORTED:
        warnings.warn(
            f"jaxstate is tested with JAX {', '.join(SUPPORTED)}, and this is JAX"
            f" {HERE}. What it uses of JAX is there; `python -m jaxstate.selfcheck` says"
            " whether it works.",
            UntestedJaxWarning,
            stacklevel=2,
        )
