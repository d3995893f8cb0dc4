"""`param` and `scope`: what a function says of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any, ParamSpec, TypeVar, overload

import jax

from jaxstate._src import _jax
from jaxstate._src.params.entries import EntryAddress, innermost_store, level_entered
from jaxstate._src.params.interception import intercepted, interceptions
from jaxstate._src.params.metadata import checked
from jaxstate._src.params.misuse import about_initializer
from jaxstate._src.params.paths import PathElement
from jaxstate._src.params.pieces import pieces_here
from jaxstate.errors import (
    MissingParameterError,
    MissingStoreError,
    ParameterConflictError,
    ParameterMismatchError,
    called_as,
    message,
    thread_that_has_nothing,
    warn_of_unopened,
)

__all__ = ["ParamAddress", "check_name", "param", "scope"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class ParamAddress(EntryAddress):
    """One leaf of a parameter."""

    kind = "parameter"
    takes_key = True
    missing_error = MissingParameterError
    mismatch_error = ParameterMismatchError
    conflict_error = ParameterConflictError

    def missing(self) -> Exception:
        return MissingStoreError(
            message(
                f"{self} was used outside init and apply.",
                fix="""
                params = net.init(jax.random.key(0), x)     # net = jaxstate.parametrized(fn)
                y = net.apply(params, x)
                """,
                used=self.used,
                thread=thread_that_has_nothing(),
            )
        )

    fix_by_init = """
        params = net.init(key, x)      # with inputs of the shapes that apply is given
        """


@overload
def param(name: str, init: Callable[[jax.Array], T], *, metadata: Any = None) -> T: ...


@overload
def param(name: str, init: Callable[..., T], *init_args: Any, metadata: Any = None) -> T: ...


@called_as('w = jaxstate.param("w", init, shape, dtype)      # init(key, shape, dtype)')
def param(name: str, init: Callable[..., T], *init_args: Any, metadata: Any = None) -> T:
    """A parameter of the module (or `scope`) that the program is in.

    Args:
      name: without "/", unique in that scope; the same name there is the same parameter.
      init: called as ``init(key, *init_args)``, returns any tree of arrays, which is kept with its
        types (tuples, dataclasses, modules of other packages). The initializers of
        `jax.nn.initializers` fit: ``param("w", jax.nn.initializers.lecun_normal(), (3, 4))``.
      *init_args: static values or arrays.
      metadata: any static value that goes with the parameter, a dict for example:
        ``{"axes": ("embed", "mlp")}``. `Parametrized.metadata` gives that of all parameters.
        ``{"spec": PartitionSpec("data")}`` says how the parameter is cut: inside a `jax.shard_map`
        over "data" it is the device's own piece.

    Returns:
      The value: during ``init`` what the initializer makes, during ``apply`` what was given.

    Raises:
      TypeError: if ``name`` is not a name, ``init`` not a function, or ``metadata`` has arrays.
      MissingStoreError: outside ``init`` and ``apply``.
      MissingParameterError, ParameterMismatchError: if ``apply`` was not given a value of the
        structure and shapes that ``init`` would make.
      ParameterConflictError: if the name is in use for a parameter of another form.
      NameClashError: if the name is in use for a variable, module or scope.
      InitializerDataError: if ``init`` looks at data that comes out of a loop or a vmap.

    The initial value depends on the key given to ``init`` and on the path of the parameter alone:
    the key is folded with the first 8 bytes of the SHA-256 digest of the path.
    """
    used = _jax.user_location()
    check_name(name, "param")
    if metadata is not None:
        metadata = checked(metadata, name)

    def value(init: Any, *init_args: Any) -> Any:
        if not callable(init):
            is_after = init_args and callable(init_args[0])
            given = f"init, {init!r}" if is_after else "lambda key: value"
            raise TypeError(
                f"param({name!r}, ...) wants a function init(key, *init_args), and was given"
                f' {init!r}.\nTo mend it:\n    jaxstate.param("{name}", {given})'
            )
        address = ParamAddress(name, used, metadata)
        store = address.store()
        pieces = None if metadata is None else pieces_here(name, metadata, store)
        made = init if pieces is None else pieces.made_by(init)
        try:
            use = store.declare(address, made, init_args)
        except Exception as error:
            raise about_initializer(address, init, init_args, error)  # noqa: B904
        found = use.spec.tree.unflatten(use.values())
        return found if pieces is None else pieces.of(found)

    around = interceptions("parameter")
    if not around:
        return value(init, *init_args)
    return intercepted(around, "parameter", name, value, (init, *init_args))


class _Scope(ContextDecorator):
    """A level of the tree that ``with`` opens; as a decorator, in every call of the function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[Any] = []
        self._was_opened = False

    def __enter__(self) -> None:
        self._was_opened = True
        level = level_entered(innermost_store(), PathElement(self._name, None))
        level.__enter__()
        self._open.append(level)

    def __exit__(self, *exc: object) -> None:
        self._open.pop().__exit__(*exc)

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:  # type: ignore[override]
        self._was_opened = True
        return super().__call__(fn)

    def __del__(self) -> None:
        if not self._was_opened:
            warn_of_unopened(
                f"Scope {self._name!r}",
                f"""
                with jaxstate.scope("{self._name}"):
                    ...
                """,
            )


@called_as('with jaxstate.scope("encoder"):')
def scope(name: str) -> _Scope:
    """Opens a level of the tree of parameters and variables by hand.

    The same name opens the same level again. Outside ``init`` and ``apply`` it is a level of the
    paths of sown values (`reap`) and of `path`.

    >>> import jax, jaxstate
    >>> @jaxstate.parametrized
    ... def net(x):
    ...     with jaxstate.scope("encoder"):
    ...         return x * jaxstate.param("scale", jax.nn.initializers.ones, ())
    >>> net.init(jax.random.key(0), 2.0)
    {'encoder': {'scale': Array(1., dtype=float32)}}
    """
    check_name(name, "scope")
    return _Scope(name)


def check_name(name: Any, where: str) -> None:
    """Names are joined with slashes where a path is written, or made into a key."""
    if not isinstance(name, str) or not name or "/" in name:
        if not callable(name):
            fix = ""
        elif where == "scope":
            fix = '\nTo mend it:\n    @jaxstate.scope("encoder")      # or in a with block'
        else:
            fix = f'\nTo mend it:\n    jaxstate.{where}("w", init, shape)'
        raise TypeError(
            f"{where} wants a non-empty string without '/' as name, and was given {name!r}.{fix}"
        )
