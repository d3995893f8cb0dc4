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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, overload

import jax

from jaxstate._src import _jax
from jaxstate._src.core.handles import Shown
from jaxstate._src.core.slots import open_holder
from jaxstate._src.params.arguments import Shape, split_arrays
from jaxstate._src.params.calling import (
    keys_of_streams,
    not_all_were_made,
    open_streams,
    run_slice,
    store_for_init,
    writable_names,
)
from jaxstate._src.params.entries import (
    current_origin,
    innermost_store,
    level_entered,
)
from jaxstate._src.params.interception import intercepted, interceptions
from jaxstate._src.params.metadata import Describable
from jaxstate._src.params.methods import PerInstance, note_instances_of
from jaxstate._src.params.misuse import (
    BY_NAME,
    LAZY,
    about_call,
    also_by_name,
    given_by_name,
    has_taken_argument,
    name_to_call,
    no_such_attribute,
    note_mistakes,
    refuse_lazy,
    taken_arguments,
)
from jaxstate._src.params.names import nested
from jaxstate._src.params.nests import room_for_nests
from jaxstate._src.params.param import check_name
from jaxstate._src.params.paths import ModuleId, Path, PathElement
from jaxstate._src.params.pickling import found_by_name, name_of_global
from jaxstate._src.params.reuse import Reusable, reused
from jaxstate._src.params.stores import ApplyStore
from jaxstate._src.params.summary import Summarizable
from jaxstate._src.streams.holders import FoldedStreams
from jaxstate._src.streams.keys import KeyLike
from jaxstate.errors import called_as, check_runs_when_called

__all__ = ["Keys", "Owner", "Parametrized", "Rest", "Tree", "TreeLike", "parametrized"]

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")
Rest = ParamSpec("Rest")
Keys = KeyLike | Mapping[str, KeyLike]
Tree = dict[str, Any]
TreeLike = Mapping[str, Any]


class Parametrized(Reusable[P, R], Describable, Summarizable, metaclass=Shown):
    """A function with parameters: see `parametrized`.

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
        return self._init(("parameter",), key, reuse, args, kwargs)[0]

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
        params, state = self._init(("parameter", "variable"), key, reuse, args, kwargs)
        return params, state

    def _init(
        self, kinds: Sequence[str], key: Any, reuse: Any, args: Any, kwargs: Any
    ) -> list[dict[str, Any]]:
        """A nested dict of the initial values of each kind of entry, parameters first."""
        where = "init" if len(kinds) == 1 else "init_with_state"
        param_key, streams = keys_of_streams(key, "init")
        arrays, rebuild, abstract = split_arrays((args, kwargs))
        given = None if reuse is None else reused(self, reuse, args, kwargs, every_part=True)

        def forward(param_key: Any, streams: Any, arrays: Any) -> list[dict[Path, Any]]:
            args, kwargs = rebuild(arrays)
            store = store_for_init(self._token, param_key, given)
            with (
                open_holder(store),
                open_holder(FoldedStreams(param_key)),
                open_streams(streams),
                store.root_entered(self),
                room_for_nests(),
            ):
                try:
                    refuse_lazy(self, self._as_called(None)(*args, **kwargs))
                except Exception as error:
                    self._explain(error, where, args, kwargs)
                    raise
            return [store.initial_values(kind) for kind in kinds]

        with jax.disable_jit(False):  # every branch is traced
            made, shapes = _jax.make_jaxpr(forward, return_shape=True)(param_key, streams, arrays)
        operands = jax.tree.leaves((param_key, streams, arrays))
        leaves = run_slice(made, operands, abstract)
        values = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        if given is not None:
            values[0] = given.joined_with(values[0])
        return [nested(x) for x in values]

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
            self._check_state(state)
        return self._apply(params, state, False, key, args, kwargs)[0]

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
        self._check_state(state, "apply_with_state")
        out, store = self._apply(params, state, writable_names(mutable), key, args, kwargs)
        return out, store.state()

    def _apply(
        self, params: Any, state: Any, writable: Any, key: Any, args: Any, kwargs: Any
    ) -> tuple[Any, ApplyStore]:
        self._check_dict(params, "the parameters", "y = net.apply(params, x)")
        streams = {} if key is None else keys_of_streams(key, "apply")[1]

        def store() -> ApplyStore:
            return ApplyStore(self._token, params, state, writable)

        def run(store: ApplyStore) -> tuple[Any, ApplyStore]:
            with (
                open_holder(store),
                open_streams(streams),
                store.root_entered(self),
                room_for_nests(),
            ):
                try:
                    out = self._as_called(None)(*args, **kwargs)
                except Exception as error:
                    where = "apply_with_state" if writable else "apply"
                    self._explain(error, where, args, kwargs)
                    raise
                if type(out) in LAZY:
                    refuse_lazy(self, out)
                return out, store

        if not _jax.jit_is_disabled():
            return run(store())
        # Only the branches that are taken are seen now, and modules would be named accordingly.
        named = store()
        made: dict[Path, int] = {}

        def trace() -> None:
            _, traced = run(store())
            named.layer = traced.layer.of_lasting_modules()
            made.update(traced.layer.made)

        with jax.disable_jit(False):
            jax.eval_shape(trace)
        out, named = run(named)
        for base, n in named.layer.made.items():
            if n < made.get(base, 0):
                raise not_all_were_made(base, n, made[base])
        return out, named

    def _explain(self, error: Exception, where: str, args: Any, kwargs: Any) -> None:
        """Raises what says more than a TypeError of Python, if the arguments are wrong."""
        if isinstance(error, TypeError):
            other = about_call(self, where, args, kwargs)
            if other is not None:
                raise other from None
        if where or innermost_store() is None:
            note_mistakes(self, error, where, args, kwargs)

    def _check_taken(self, how: str, given: dict[str, Any], args: Any) -> None:
        """Refuses a keyword that the function has an argument for too, and has not got."""
        for name, value in given.items():
            if value is not None and self._taken.get(name, 0) >= len(args):
                raise has_taken_argument(self, how, name)

    def _check_state(self, state: Any, how: str = "apply") -> None:
        fix = "y, state = net.apply_with_state(params, state, x)"
        self._check_dict(state, "the variables", fix, how)

    def _check_dict(self, given: Any, what: str, fix: str, how: str = "apply") -> None:
        if type(given) is not dict and not isinstance(given, Mapping):
            aval = _jax.type_of(given)
            found = type(given).__name__ if aval is None else aval.str_short()
            if innermost_store() is not None:
                called = f"y = {name_to_call(self)}(x)      # a part of the network that calls it"
                fix = f"{called}\n    {fix}"
            if isinstance(given, tuple) and len(given) == 2:
                fix = f"params, state = net.init_with_state(key, x)\n    {fix}"
            raise TypeError(
                f"{name_to_call(self)}.{how} wants {what} as a dict (what init returned), and was"
                f" given {found}.\nTo mend it:\n    {fix}"
            )

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

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise no_such_attribute(self, name)

    def __dir__(self) -> list[str]:
        """What is public, and the names of Python."""
        return [name for name in super().__dir__() if name[0] != "_" or name[:2] == "__"]

    def __repr__(self) -> str:
        return f"<parametrized {self.name}>"


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


def _watched(store: Any, module: Parametrized[..., Any], /, *args: Any, **kwargs: Any) -> Any:
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
