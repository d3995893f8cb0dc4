"""Assignments to objects of classes that refuse them, like frozen dataclasses.

Such a class has a ``__setattr__`` that raises. It gets another one around it, which lets the
program assign to objects of the open sessions of the thread, and to no others.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxstate._src.tree.objects import PerClass, layout_of, made_of, parts_of
from jaxstate._src.tree.session import sessions
from jaxstate._src.tree.walk import Walk


def permit_assignments(walk: Walk) -> None:
    """Lets the program assign to these objects and to others of their classes, while they are
    objects of a session."""
    for node in walk.nodes:
        cls = type(node.object)
        if _known.get(cls) is None:
            _known.put(cls, True)
            if _refuses(cls, node.object):
                _wrap(cls)


_known = PerClass()


def _refuses(cls: type, x: Any) -> bool:
    """Whether an object like this refuses to be assigned what it has."""
    if cls.__setattr__ is object.__setattr__ or layout_of(cls).items is not None:
        return False
    names, _, _ = parts_of(x)
    marks: list[Any] = [object() for _ in names]  # (not its parts: the class may assign to those)
    probe = made_of(cls, names, marks)
    for name, mark in zip(names, marks, strict=True):
        try:
            setattr(probe, name, mark)
        except AttributeError:
            return True
        except Exception:
            return False
    return False


def _is_live(x: Any) -> bool:
    here = sessions()
    if any(s.walk.number_of(x) is not None for s in here):
        return True
    return any(s.refresh().number_of(x) is not None for s in here)


def _wrap(cls: type) -> None:
    for name, plain in (("__setattr__", object.__setattr__), ("__delattr__", object.__delattr__)):
        owner = next((c for c in cls.__mro__ if name in c.__dict__ and c is not object), None)
        if owner is None or hasattr(owner.__dict__[name], "_jaxstate_guarded"):
            continue
        type.__setattr__(owner, name, _guarded(owner.__dict__[name], plain))


def _guarded(original: Any, plain: Any) -> Any:
    @functools.wraps(original)
    def guarded(self: Any, *args: Any) -> None:
        try:
            original(self, *args)
        except AttributeError as error:
            if not _is_live(self):
                if sessions():
                    error.add_note(
                        "The object is none that jaxstate.mutate has given, but a copy of one, as"
                        " jax.tree.map makes it.\nTo mend it:\n    assign to the object of the"
                        " tree, which the function closes over"
                    )
                raise
            plain(self, *args)

    guarded._jaxstate_guarded = True  # type: ignore[attr-defined]
    return guarded
