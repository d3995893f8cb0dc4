"""Classes whose objects the library makes: what `help` shows, and that nobody calls them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from jaxstate._src import _jax
from jaxstate.errors import message

__all__ = ["Handle", "Shown"]


class Shown(type):
    """The type of classes of which ``help`` shows what is public, and how an object is called."""

    def __dir__(cls) -> list[str]:
        names = super().__dir__()
        return [name for name in names if name[0] != "_" or name == "__call__"]

    @property
    def __signature__(cls) -> inspect.Signature:
        return inspect.Signature()


class Handle(Shown):
    """The type of classes that a program does not call. ``made_by`` is what gives it an object."""

    _made_by: ClassVar[dict[type, str]] = {}

    def __new__(mcs, name: str, bases: Any, namespace: Any, *, made_by: str) -> Handle:
        cls = super().__new__(mcs, name, bases, namespace)
        mcs._made_by[cls] = made_by
        return cls

    if not TYPE_CHECKING:

        def __call__(cls, *_: Any, **__: Any) -> Any:
            raise TypeError(
                message(
                    f"jaxstate.{cls.__name__} is the class of what jaxstate gives to programs, and"
                    " is not called by them.",
                    fix=Handle._made_by[cls],
                    used=_jax.user_location(),
                )
            )

    def _make(cls, *args: Any) -> Any:
        return super().__call__(*args)
