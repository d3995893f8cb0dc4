"""A function as a module: where a network calls it, it opens a level of the tree.

It is one module in every call. Called outside of a network it is just its function. What makes its
parameters, and is given them, is `parametrized.Parametrized`.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Self, TypeVar

from jaxstate._src.params.entries import current_origin, innermost_store, level_entered
from jaxstate._src.params.interception import intercepted, interceptions
from jaxstate._src.params.methods import PerInstance, note_instances_of
from jaxstate._src.params.misuse import about_call, note_mistakes, taken_arguments
from jaxstate._src.params.param import check_name
from jaxstate._src.params.paths import ModuleId, PathElement
from jaxstate._src.params.pickling import found_by_name, name_of_global
from jaxstate.errors import check_runs_when_called

__all__ = ["Module"]

P = ParamSpec("P")
R = TypeVar("R")


class Module(Generic[P, R]):
    """A function with an identity, which is that of its parameters.

    Attributes:
      fn: the function.
      name: how its parameters are called in those of a network that calls it.
    """

    def __init__(self, fn: Callable[P, R], name: str | None = None) -> None:
        if not callable(fn):
            fix = (
                f"@jaxstate.parametrized(name={fn!r})"
                if isinstance(fn, str)
                else "parametrized(fn)"
            )
            raise TypeError(
                f"parametrized wants a function, and was given {fn!r}.\nTo mend it:\n    {fix}"
            )
        check_runs_when_called(fn, "parametrized")
        if name is not None:
            check_name(name, "parametrized")
        self.fn = fn
        self.name = name or _name_of(fn)
        self._explicit_name = name
        self._taken = taken_arguments(fn)
        self._token = self._new_token()
        self._instances = PerInstance()
        functools.update_wrapper(self, fn, updated=())  # not the attributes of a callable object

    def _new_token(self) -> ModuleId:
        """Says which module this is; in every call of the module that makes it the same one."""
        here = current_origin()
        return here.token(here.next_key(self.name, getattr(self.fn, "__code__", type(self.fn))))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function; inside another parametrized function, as a module of its own."""
        store = innermost_store()
        watched = store if store is not None and store.looks_at_calls else None
        try:
            with level_entered(store, PathElement(self.name, self._token), self):
                if watched is None or interceptions("module"):
                    return self._as_called(store)(*args, **kwargs)
                watched.called(self, args, kwargs)
                out = self.fn(*args, **kwargs)
                watched.returned(out)
                return out
        except Exception as error:
            self._explain(error, "", args, kwargs)
            raise

    def _as_called(self, store: Any) -> Callable[..., Any]:
        """What runs where the program is in this module: its function, if nobody looks at it.

        (Without a frame of Python in between, of which a nest of modules may have too many.)
        """
        fn: Callable[..., Any] = self.fn
        if store is not None and store.looks_at_calls:
            fn = functools.partial(_watched, store, self)
        around = interceptions("module")
        return functools.partial(_intercepted, around, self.name, fn) if around else fn

    def __set_name__(self, owner: type, name: str) -> None:
        """As a method: an instance is a module from when it is made, not from its first call."""
        note_instances_of(owner)

    def _explain(self, error: Exception, where: str, args: Any, kwargs: Any) -> None:
        """Raises what says more than a TypeError of Python, if the arguments are wrong."""
        if isinstance(error, TypeError):
            other = about_call(self, where, args, kwargs)
            if other is not None:
                raise other from None
        if where or innermost_store() is None:
            note_mistakes(self, error, where, args, kwargs)

    def __copy__(self) -> Self:
        """A module of its own, as a deep copy is."""
        return self.__deepcopy__({}, lambda value, memo: value)

    def __deepcopy__(self, memo: Any, part: Any = copy.deepcopy) -> Self:
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update({name: part(value, memo) for name, value in vars(self).items()})
        new._token, new._instances = new._new_token(), PerInstance()
        return new

    def __reduce__(self) -> Any:
        """A module is pickled as a function is: by its name."""
        return found_by_name, name_of_global(self, self.fn)

    def __dir__(self) -> list[str]:
        """What is public, and the names of Python."""
        return [name for name in super().__dir__() if name[0] != "_" or name[:2] == "__"]

    def __repr__(self) -> str:
        return f"<parametrized {self.name}>"


def _watched(store: Any, module: Module[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """A module that is called, for a store that looks at what goes in and comes out."""
    store.called(module, args, kwargs)
    out = module.fn(*args, **kwargs)
    store.returned(out)
    return out


def _intercepted(around: Any, name: str, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    return intercepted(around, "module", name, fn, args, kwargs)


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return re.sub(r"\W", "", name) or "module"
