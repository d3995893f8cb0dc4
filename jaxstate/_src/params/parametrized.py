"""Parameters: ``param`` makes them, ``parametrized`` collects them.

    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", jax.nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return jnp.tanh(x @ w)

    params = net.init(jax.random.key(0), x)      # {"w": ...}
    y = net.apply(params, x)                     # a pure function

* ``init`` traces the function, keeps of the jaxpr what the initial values need, and runs that.
  The initial value of a parameter depends on the key and on its path, not on the order of
  execution, so it can be made in any loop body, branch, custom rule or solver.
* ``apply`` opens the given parameters for the time of the call. A parameter is only read, so it is
  captured (`core.capture`): an explicit operand of whatever transformation stands between.
* A parametrized object is a module: its identity is that of its parameters. Called inside another
  one it opens a level of the tree, named after its function.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, overload

from jaxstate._src.handles import Shown
from jaxstate._src.params.arguments import Shape
from jaxstate._src.params.calling import check_is_dict, run_apply, run_init, writable_names
from jaxstate._src.params.metadata import Describable
from jaxstate._src.params.misuse import (
    BY_NAME,
    also_by_name,
    given_by_name,
    has_taken_argument,
    no_such_attribute,
)
from jaxstate._src.params.modules import Module
from jaxstate._src.params.paths import ModuleId
from jaxstate._src.params.reuse import Reusable
from jaxstate._src.params.summary import Summarizable
from jaxstate._src.streams.keys import KeyLike
from jaxstate.errors import called_as

__all__ = ["Keys", "Owner", "Parametrized", "Rest", "Tree", "TreeLike", "parametrized"]

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")
Rest = ParamSpec("Rest")
Keys = KeyLike | Mapping[str, KeyLike]
Tree = dict[str, Any]
TreeLike = Mapping[str, Any]


class Parametrized(Module[P, R], Reusable[P, R], Describable, Summarizable, metaclass=Shown):
    """A function with parameters: see `parametrized`.

    Attributes:
      fn: the function.
      name: how its parameters are called in those of a network that calls it.
    """

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(
        self: Parametrized[Concatenate[Owner, Rest], R],
        instance: Owner,
        owner: type | None = None,
    ) -> Parametrized[Rest, R]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Parametrized[..., Any]:
        """As a method: every instance of the class is its own module."""
        if instance is None:
            return self
        return _BoundMethod(self, instance)

    # A signature cannot have keywords of its own next to those of the function, so there is an
    # overload for them, in which the arguments of the function are not checked.
    @overload
    def init(self, key: Keys, *args: P.args, **kwargs: P.kwargs) -> Tree: ...

    @overload
    def init(self, key: Keys, shape: Shape, /, *args: Any, **kwargs: Any) -> Tree: ...

    @overload
    def init(
        self, key: Keys, *args: Any, reuse: Mapping[Any, Any] | None, **kwargs: Any
    ) -> Tree: ...

    @also_by_name
    def init(
        self,
        key: Any = BY_NAME,
        /,
        *args: Any,
        reuse: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> Tree:
        """The initial parameters.

        Nothing of the function itself is computed: it is traced, and of the jaxpr only what the
        initializers need is run.

        Args:
          key: one random key. It also seeds the random stream "default". A dict
            ``{name: key}`` seeds several streams; the parameters take the key of "params", or
            that of "default" if there is none. Of every other stream that is not open, the key is
            that of the parameters, with the first 8 bytes of the SHA-256 digest of ``"/" + name``
            folded in.
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.
          reuse: ``{module: params}`` or ``{"encoder/dense": params}``, parameters that are taken
            instead of made: see `parameters_from`.

        Returns:
          A new nested dict with string keys, and what the initializers made.

        Raises:
          TypeError: if ``key`` is not a key.
          InitializerDataError: if an initializer needs data of which only the shape was given.
          UnusedReuseError: if a module in ``reuse`` has nothing in common with the function, or a
            name is that of no parameter.
          Whatever `param` and `parameters_from` raise.
        """
        if key is BY_NAME:
            key = given_by_name(self, "init", "key", kwargs)
        if self._taken:
            self._check_taken("init", {"key": kwargs.get("key"), "reuse": reuse}, args)
        return run_init(self, ("parameter",), key, reuse, args, kwargs)[0]

    @overload
    def init_with_state(
        self, key: Keys, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Tree, Tree]: ...

    @overload
    def init_with_state(
        self, key: Keys, shape: Shape, /, *args: Any, **kwargs: Any
    ) -> tuple[Tree, Tree]: ...

    @overload
    def init_with_state(
        self, key: Keys, *args: Any, reuse: Mapping[Any, Any] | None, **kwargs: Any
    ) -> tuple[Tree, Tree]: ...

    @also_by_name
    def init_with_state(
        self,
        key: Any = BY_NAME,
        /,
        *args: Any,
        reuse: Mapping[Any, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tree, Tree]:
        """The initial parameters, and the values that the variables start with.

        Nothing of the function itself is computed, see `init`: no variable is written.

        Args:
          key: as for `init`, like all other arguments.
          reuse: parameters; the initializers of variables see these. Variables are made.

        Returns:
          ``(params, state)``, two new nested dicts with string keys, and what the initializers
          made. A variable has the path that a parameter of its name would have.

        Raises what `init` raises, and what `variable` raises.
        """
        if key is BY_NAME:
            key = given_by_name(self, "init_with_state", "key", kwargs)
        if self._taken:
            given = {"key": kwargs.get("key"), "reuse": reuse}
            self._check_taken("init_with_state", given, args)
        params, state = run_init(self, ("parameter", "variable"), key, reuse, args, kwargs)
        return params, state

    @overload
    def apply(self, params: TreeLike, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def apply(
        self,
        params: TreeLike,
        *args: Any,
        key: Keys | None,
        state: TreeLike | None = None,
        **kwargs: Any,
    ) -> R: ...

    @overload
    def apply(self, params: TreeLike, *args: Any, state: TreeLike | None, **kwargs: Any) -> R: ...

    @also_by_name
    def apply(
        self,
        params: TreeLike = BY_NAME,
        /,
        *args: Any,
        key: Keys | None = None,
        state: TreeLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """The function, with the given parameters: pure in all its arguments.

        Args:
          params: what ``init`` returned, or any dict of that form. Entries that the function does
            not read are left alone.
          *args, **kwargs: passed to the function.
          key: seeds the random stream "default", or ``{name: key}`` seeds several. Without it,
            draws come from the streams that are open outside.
          state: the variables, as ``init_with_state`` and ``apply_with_state`` return them. They
            may be read here, and not written.

        Returns:
          What the function returns.

        Raises:
          MissingParameterError, ParameterMismatchError: see `param`.
          MissingVariableError, VariableMismatchError: see `variable`.
          ReadOnlyVariableError: if the function writes a variable.
          TypeError: if ``params`` or ``state`` is not a dict, or ``key`` not a key.
        """
        if params is BY_NAME:
            params = given_by_name(self, "apply", "params", kwargs)
        if self._taken:
            self._check_taken("apply", {"key": key, "state": state}, args)
        if state is not None:
            check_is_dict(self, state, "apply")
        return run_apply(self, params, state, False, key, args, kwargs)[0]

    @overload
    def apply_with_state(
        self, params: TreeLike, state: TreeLike, *args: P.args, **kwargs: P.kwargs
    ) -> tuple[R, Tree]: ...

    @overload
    def apply_with_state(
        self,
        params: TreeLike,
        state: TreeLike,
        *args: Any,
        key: Keys | None = None,
        mutable: bool | str | Collection[str] = True,
        **kwargs: Any,
    ) -> tuple[R, Tree]: ...

    @also_by_name
    def apply_with_state(
        self,
        params: TreeLike = BY_NAME,
        state: TreeLike = BY_NAME,
        /,
        *args: Any,
        key: Keys | None = None,
        mutable: bool | str | Collection[str] = True,
        **kwargs: Any,
    ) -> tuple[Any, Tree]:
        """The function, with the given parameters and variables: pure in all its arguments.

        Args:
          params: as for `apply`, like all other arguments.
          state: the variables, as ``init_with_state`` and ``apply_with_state`` return them.
          mutable: which variables may be written: all, none, or those of one or several
            collections. ``variable(..., metadata={"collection": "cache"})`` is in the collection
            "cache".

        Returns:
          ``(out, state)``: what the function returns, and all variables after it, those that it
          did not write unchanged, as a new nested dict.

        Raises what `apply` raises; but variables may be written, those that are ``mutable``.
        """
        if params is BY_NAME:
            params = given_by_name(self, "apply_with_state", "params", kwargs)
        if state is BY_NAME:
            state = given_by_name(self, "apply_with_state", "state", kwargs)
        if self._taken:
            given = {"key": key, "mutable": None if mutable is True else mutable}
            self._check_taken("apply_with_state", given, args)
        check_is_dict(self, state, "apply_with_state")
        out, store = run_apply(self, params, state, writable_names(mutable), key, args, kwargs)
        return out, store.state()

    def _check_taken(self, how: str, given: dict[str, Any], args: Any) -> None:
        """Refuses a keyword that the function has an argument for too, and has not got."""
        for name, value in given.items():
            if value is not None and self._taken.get(name, 0) >= len(args):
                raise has_taken_argument(self, how, name)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise no_such_attribute(self, name)


@overload
def parametrized(fn: Callable[P, R], *, name: str | None = None) -> Parametrized[P, R]: ...


@overload
def parametrized(
    fn: None = None, *, name: str | None = None
) -> Callable[[Callable[P, R]], Parametrized[P, R]]: ...


@called_as('net = jaxstate.parametrized(fn, name="net")')
def parametrized(fn: Any = None, *, name: str | None = None) -> Any:
    """Makes a function with parameters out of one that calls `param`.

    Args:
      fn: any function but a generator or coroutine; a method makes every instance of its class a
        module of its own.
      name: of the module; by default the function's name.

    Returns:
      A `Parametrized` object. Called inside another parametrized function it runs ``fn`` as a
      module: the same object called twice shares its parameters, two objects do not, and the
      objects that it makes are the same in every call. Outside it offers
      ``init(key, *args, **kwargs)`` and ``apply(params, *args, key=None, **kwargs)``, and with
      variables ``init_with_state`` and ``apply_with_state``.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def scale(x):
    ...     return x * jaxstate.param("factor", jax.nn.initializers.ones, x.shape)
    >>> params = scale.init(jax.random.key(0), jnp.arange(3.0))
    >>> scale.apply(params, jnp.arange(3.0))
    Array([0., 1., 2.], dtype=float32)
    """
    if fn is None:
        return functools.partial(parametrized, name=name)
    return Parametrized(fn, name)


class _BoundMethod(Parametrized[P, R]):
    """A parametrized method of one instance."""

    def __init__(self, method: Parametrized[..., R], instance: Any) -> None:
        name = method._explicit_name
        if name is None and method.name == "__call__":
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(instance).__name__).lower()
        self._method = method
        super().__init__(types.MethodType(method.fn, instance), name)

    def _new_token(self) -> ModuleId:
        return self._method._instances.token(self.fn.__self__, self._method.fn)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:  # type: ignore[override]
        return type(self)(self._method, copy.deepcopy(self.fn.__self__, memo))

    def __reduce__(self) -> Any:
        """By the instance, and the name of the method in its class."""
        instance = self.fn.__self__
        for name in dir(type(instance)):
            if inspect.getattr_static(type(instance), name, None) is self._method:
                return getattr, (instance, name)
        return type(self), (self._method, instance)
