"""Interception: what a program does around each call of a module, parameter or variable.

    def double(next_fun, args, kwargs, context):
        return 2 * next_fun(*args, **kwargs)

    with jaxstate.intercept(double):
        y = net.apply(params, x)

An interceptor is a holder without slots (`core.slots`): so functions that run later, as
the rules of derivatives do, find it, and it is a part of JAX's cache keys.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jaxstate._src.core.slots import (
    Address,
    Holder,
    holders,
    open_here,
    open_holder,
    signature_changed,
)
from jaxstate._src.params.paths import program
from jaxstate._src.params.places import following, path_of
from jaxstate.errors import warn_of_unopened

__all__ = ["Intercepted", "intercept", "intercepted", "interceptions"]

Interceptor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], "Intercepted"], Any]


class Intercepted(NamedTuple):
    """What an interceptor is called around: the ``context`` of `intercept`.

    Attributes:
      kind: ``"module"``, ``"parameter"`` or ``"variable"``.
      name: of the module, as in its path (of a network itself: of its function), or of the
        parameter or variable.
      path: of the module, parameter or variable: see `path`.
      module: the parametrized object that is called, or that a parameter or variable is in; None
        for one that is in no module.
    """

    kind: str
    name: str
    path: tuple[str, ...]
    module: Any


def intercept(
    modules: Interceptor | None = None,
    *,
    params: Interceptor | None = None,
    variables: Interceptor | None = None,
) -> AbstractContextManager[None]:
    """Calls a function around each call of a module, parameter or variable in the program.

    Args:
      modules: called as ``modules(next_fun, args, kwargs, context)`` instead of each module that
        the program calls as ``module(*args, **kwargs)``: parametrized functions, methods, blocks of
        a `stack`, and the network whose ``init`` or ``apply`` is called. What it returns is what
        the call returns. ``next_fun(*args, **kwargs)`` is the module itself.
      params: the same for each `param`: ``args`` is ``(init, *init_args)``, and ``next_fun`` of
        such arguments makes the parameter, or takes it, and returns its value.
      variables: the same for each `variable`; ``next_fun`` returns the `Variable`.

    The context is an `Intercepted`, with ``kind``, ``name``, ``path`` and ``module``.

    An interceptor runs where the module runs: parameters that it makes are those of the module, and
    what it sows has the path of the module. Of nested interceptors the innermost is called first,
    and its ``next_fun`` calls the next one. What an interceptor itself calls, beside ``next_fun``,
    does not come to it again.

    Functions are traced once for each interceptor and path, as `jax.jit` compiles them once. So an
    interceptor should be a pure function, made once and not for each call.

    Raises:
      TypeError: if it is given no function.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def layer(x):
    ...     return x * jaxstate.param("w", jax.nn.initializers.ones, ())
    >>> net = jaxstate.parametrized(lambda x: layer(x) + 1, name="net")
    >>> def double(next_fun, args, kwargs, context):
    ...     y = next_fun(*args, **kwargs)
    ...     return 2 * y if context.path == ("layer",) else y
    >>> with jaxstate.intercept(double):
    ...     print(net.apply({"layer": {"w": jnp.float32(10.0)}}, 1.0))
    21.0
    """
    given = {"module": modules, "parameter": params, "variable": variables}
    hooks = {kind: hook for kind, hook in given.items() if hook is not None}
    for hook in hooks.values() or [None]:
        if not callable(hook) or not _takes_four(hook):
            raise TypeError(
                f"intercept wants a function (next_fun, args, kwargs, context), and was given"
                f" {hook!r}.\nTo mend it:\n"
                "    with jaxstate.intercept(lambda next_fun, args, kwargs, context:"
                " next_fun(*args, **kwargs)):"
            )
    return _Opening(hooks)


def _takes_four(hook: Any) -> bool:
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # not every function has a signature
        return True
    try:
        signature.bind(*range(4))
    except TypeError:
        return False
    return True


class _Opening(ContextDecorator, AbstractContextManager[None]):
    """What ``with`` opens, or each call of a function that it decorates."""

    def __init__(self, hooks: Mapping[str, Interceptor]) -> None:
        self._hooks = hooks
        self._open: list[ExitStack] = []
        self._was_opened = False

    def __enter__(self) -> None:
        self._was_opened = True
        with ExitStack() as opened:
            opened.enter_context(open_holder(_Interception(self._hooks)))
            opened.enter_context(following())
            self._open.append(opened.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    def __call__(self, function: Any) -> Any:
        self._was_opened = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not self._was_opened:
            warn_of_unopened(
                "An interceptor",
                """
                with jaxstate.intercept(interceptor):
                    ...
                """,
            )


class _Interception(Holder):
    """What one `intercept` is given.

    Attributes:
      active: whether calls come to it. They do not where it runs itself.
    """

    def __init__(self, hooks: Mapping[str, Interceptor], active: bool = True) -> None:
        super().__init__()
        self.hooks = hooks
        self.active = active
        self._signature = tuple([(kind, _identity(hook)) for kind, hook in hooks.items()])

    def knows(self, address: Address) -> bool:
        return False

    def without_values(self) -> _Interception:
        return _Interception(self.hooks, self.active)

    def signature(self) -> Hashable:
        return "intercept", self.active, self._signature


# An interceptor may hold tracers, and keys of caches are kept: so something stands for it in these.
_identities: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _identity(hook: Any) -> Any:
    """One object for each interceptor, and for all that are equal."""
    owner, name = hook, None
    if isinstance(hook, types.MethodType):
        owner, name = hook.__self__, hook.__func__
    try:
        known = _identities.setdefault(owner, {})
    except TypeError:  # no hash, or no weak references
        return object()
    return known.setdefault(name, object())


def interceptions(kind: str) -> list[_Interception]:
    """Those that calls of that kind come to, in the order in which they are called."""
    found = open_here().found
    key = _Interception, kind
    if key not in found:
        found[key] = [
            holder
            for holder in holders()
            if isinstance(holder, _Interception) and holder.active and kind in holder.hooks
        ]
    return found[key]


def intercepted(
    around: Sequence[_Interception],
    kind: str,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``function(*args, **kwargs)``, by way of interceptors.

    The program is in the module that is called, or in which the parameter or variable is.
    """
    path = path_of(program.entries)
    module = next((e.module for e in reversed(program.entries) if e.module is not None), None)
    if kind != "module":
        path = (*path, name)
    elif program.entries[-1].entries is not None and path:
        name = path[-1]
    context = Intercepted(kind, name, path, module)

    def call_next(i: int, args: Any, kwargs: Any) -> Any:
        if i == len(around):
            with _set_active(around, True):
                return function(*args, **kwargs)

        def next_fun(*args: Any, **kwargs: Any) -> Any:
            return call_next(i + 1, args, kwargs)

        with _set_active(around[i : i + 1], False):
            return around[i].hooks[kind](next_fun, args, kwargs, context)

    out = call_next(0, args, kwargs or {})
    if out is None and kind != "module":
        raise TypeError(
            f"An interceptor made None of {kind} {'/'.join(path)!r}. Does it lack a return?\n"
            "To mend it:\n    return next_fun(*args, **kwargs)"
        )
    return out


@contextmanager
def _set_active(interceptions: Sequence[_Interception], active: bool) -> Iterator[None]:
    before = [interception.active for interception in interceptions]
    for interception in interceptions:
        interception.active = active
    signature_changed()
    try:
        yield
    finally:
        for interception, was in zip(interceptions, before, strict=True):
            interception.active = was
        signature_changed()
