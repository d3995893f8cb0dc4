"""Parameters: ``param`` makes them, ``parametrized`` collects them.

    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", jax.nn.initializers.lecun_normal(), (x.shape[-1], 8))
        return jnp.tanh(x @ w)

    params = net.init(jax.random.key(0), x)      # {"w": ...}
    y = net.apply(params, x)                     # a pure function

* ``init`` traces the function, keeps of the jaxpr what the initial values need, and runs that.
  The initial value of a parameter depends on the key and on its path, not on the order of
  execution, so it can be born in any loop body, branch, custom rule or solver.
* ``apply`` opens the given parameters for the time of the call. A parameter is only read, so it is
  captured (`jaxstate.capture`): an explicit operand of whatever transformation stands between.
* A parametrized object is a module: its identity is that of its parameters. Called inside another
  one it opens a level of the tree, named after its function.
"""

from __future__ import annotations

import functools
import hashlib
import re
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate import _compat
from jaxstate.births import (
    Birth,
    Form,
    bear_at,
    birth_p,
    form_of,
    sliced,
    trace_initializer,
)
from jaxstate.errors import (
    InitializerDataError,
    MissingParameterError,
    MissingStoreError,
    ParameterConflictError,
    ParameterMismatchError,
    message,
    nearest,
)
from jaxstate.names import Home, Layer, Layers, Level, Path, ScopeStack, Token
from jaxstate.random import check_key, rng_stream
from jaxstate.slots import Address, Cell, Holder, holders, open_holder
from jaxstate.trace import boundaries, boundary_of, notes_of, read

__all__ = ["Parametrized", "param", "parametrized", "scope"]


# -- Addresses -------------------------------------------------------------------------------


class ParamAddress(Address):
    """One leaf of a parameter, relative to the place (holder, jaxpr, custom rule) it is used in.

    Two addresses are equal if they mean the same leaf: what is above the innermost module only
    says where that module's name is given out.

    Attributes:
      levels: the modules and scopes that were entered in that place, outermost first.
      name: of the parameter.
      leaf: path inside the parameter's value; empty if the value is one array.
      birth: how to make the parameter, if it is being initialized.
      wanted: the type of the leaf, in an address that stands in a jaxpr.
      used: ``file:line`` of the `param` call.
      home: the jaxpr in which the address stands, if it stands in one.
    """

    __slots__ = ("birth", "home", "leaf", "levels", "name", "used", "wanted")

    def __init__(
        self,
        levels: tuple[Level, ...],
        name: str,
        leaf: Path,
        birth: Birth | None,
        used: str,
        home: Home | None = None,
        wanted: Any = None,
    ) -> None:
        self.home = home
        self.wanted = wanted
        self.levels = levels
        self.name = name
        self.leaf = leaf
        self.birth = birth
        self.used = used

    def _meaning(self) -> tuple[Any, ...]:
        start = next((i for i in reversed(range(len(self.levels))) if self.levels[i].token), 0)
        return self.levels[start:], self.name, self.leaf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamAddress) and self._meaning() == other._meaning()

    def __hash__(self) -> int:
        return hash(self._meaning())

    def __repr__(self) -> str:
        path = [*(level.base for level in self.levels), self.name, *self.leaf]
        return f"parameter {'/'.join(path)!r}"

    def missing(self) -> Exception:
        return MissingStoreError(
            message(
                f"{self} was used outside init and apply.",
                fix="""
                params = net.init(jax.random.key(0), x)     # net = jaxstate.parametrized(fn)
                y = net.apply(params, x)
                """,
                used=self.used,
            )
        )

    def store(self) -> _Store:
        for holder in holders():
            if isinstance(holder, _Store):
                return holder
        raise self.missing()

    def seen_from(self, boundary: Any) -> ParamAddress:
        store = self.store()
        above = store.scopes.inside(None if boundary is store else boundary)
        home = None if isinstance(boundary, Holder) else home_of(boundary)
        return self._with(above + self.levels, home)

    def renewed(self, use: dict[Any, Any] | None) -> ParamAddress:
        home = self.home
        if home is None or not any(v.token and v.token.home is home for v in self.levels):
            return self
        if use is None:
            use = self.store().layers().layers[0].renewed

        def renew(token: Token | None) -> Token | None:
            if token is None or token.home is not home:
                return token
            return use.setdefault(token, Token(current_home()))

        return self._with(tuple(Level(v.base, renew(v.token)) for v in self.levels), None)

    def _with(self, levels: tuple[Level, ...], home: Home | None) -> ParamAddress:
        return ParamAddress(levels, self.name, self.leaf, self.birth, self.used, home, self.wanted)

    def bear(self, addresses: Sequence[Any], birth: Birth, data: Sequence[Any]) -> list[Any]:
        store = self.store()
        assert isinstance(store, _InitStore)
        return store.bear(addresses, birth, data)

    def changed(self, wanted: Any, value: Any) -> Exception:
        path = "/".join(self.store().path(self.store().layers(), self) + self.leaf)
        return _mismatch(path, _compat.typeof(value).str_short(), wanted.str_short(), self.used)


def home_of(boundary: Any) -> Home:
    """The home of what is made inside a jaxpr under construction."""
    return notes_of(boundary).extra.setdefault(Home, Home())


def current_home() -> Home | None:
    """The home of what is made here; None outside of any jaxpr under construction."""
    for trace in _compat.chain(_compat.current_trace()):
        if isinstance(trace, _compat.StagingTrace):
            return home_of(trace)
    return None


class _Slot:
    """What is known of one parameter: its form, the place that used it first, its values.

    The form is None if only a leaf was used so far, by a jaxpr.
    """

    __slots__ = ("cells", "form", "used")

    def __init__(self, form: Form | None, used: str) -> None:
        self.form = form
        self.used = used
        self.cells: dict[Path, Cell] = {}


# -- Stores ----------------------------------------------------------------------------------


class _Store(Holder):
    """The parameters of one ``init`` or ``apply``, while it runs."""

    def __init__(self, root: Token) -> None:
        super().__init__()
        self.layer = Layer()
        self.layer.paths[root] = ()
        self.scopes = ScopeStack()

    def knows(self, address: Address) -> bool:
        return isinstance(address, ParamAddress)

    def layers(self) -> Layers:
        """The names visible here: of the boundaries around the program, then the store's own."""
        return Layers([*(self._layer_of(b) for b in boundaries(self)), self.layer])

    def _layer_of(self, boundary: Any) -> Layer:
        extra = boundary.extra if isinstance(boundary, Holder) else notes_of(boundary).extra
        return extra.setdefault(self, Layer())

    def without_values(self) -> _RuleStore:
        return _RuleStore()

    def path(self, layers: Layers, address: ParamAddress) -> Path:
        above = self.scopes.inside(None, *boundaries(self))
        return (*layers.path_of(above + address.levels), address.name)

    def slot(self, address: ParamAddress) -> _Slot:
        """What is known here of the parameter; noted here if it was not known yet."""
        layers = self.layers()
        path = self.path(layers, address)
        slot = layers.slot(path)
        if slot is None:
            slot = _Slot(address.birth and address.birth.form, address.used)
            layers.add_slot(path, slot)
        return slot

    def declare(self, name: str, init: Any, init_args: tuple[Any, ...], used: str) -> Any:
        """The value of a parameter that the program uses here."""
        raise NotImplementedError

    def _value(self, name: str, form: Form, birth: Birth | None, used: str) -> Any:
        return form.tree.unflatten(
            [
                read(ParamAddress((), name, leaf, birth, used, None, aval))
                for leaf, aval in zip(form.leaves, form.avals, strict=True)
            ]
        )


class _InitStore(_Store):
    """Parameters being made."""

    def __init__(self, root: Token, key: Any) -> None:
        super().__init__(root)
        self.key = key
        self.key_aval = _compat.typeof(key)

    def signature(self) -> Hashable:
        return ("init", self.key_aval)

    def aval(self, address: ParamAddress) -> Any:  # type: ignore[override]
        form = self.slot(address).form
        assert form is not None
        return form.avals[form.leaves.index(address.leaf)]

    def declare(self, name: str, init: Any, init_args: tuple[Any, ...], used: str) -> Any:
        birth, data = trace_initializer(init, init_args, self.key_aval)
        form = birth.form
        layers = self.layers()
        path = self.path(layers, ParamAddress((), name, (), birth, used))
        slot = layers.slot(path)
        if slot is not None:
            if slot.form != form:
                raise _conflict(path, slot.used, slot.form, form, used)
        elif data:
            addresses = [ParamAddress((), name, leaf, birth, used) for leaf in form.leaves]
            return form.tree.unflatten(bear_at(addresses, birth, data))
        return self._value(name, form, birth, used)

    def cell(self, address: ParamAddress) -> Cell:  # type: ignore[override]
        slot = self.slot(address)
        if not slot.cells:
            assert address.birth is not None
            path = self.path(Layers([self.layer]), address)
            self._make(path, slot, address.birth, ())
        return slot.cells[address.leaf]

    def _make(self, path: Path, slot: _Slot, birth: Birth, data: Sequence[Any]) -> None:
        with _compat.set_current_trace(self.anchor):
            leaves = birth.run(_param_key(self.key, path), data)
        slot.cells = dict(zip(birth.form.leaves, map(Cell, leaves), strict=True))

    def bear(self, addresses: Sequence[Any], birth: Birth, data: Sequence[Any]) -> list[Any]:
        """Makes a parameter from data: here if the store is here, else in the jaxpr around."""
        layers = self.layers()
        path = self.path(layers, addresses[0])
        if layers.slot(path) is None:
            slot = _Slot(birth.form, addresses[0].used)
            layers.add_slot(path, slot)
            data = [_lowered(d, addresses[0]) for d in map(_compat.canonicalize, data)]
            boundary = boundary_of(self)
            if boundary is None:
                self._make(path, slot, birth, data)
            elif isinstance(boundary, Holder):
                raise _data_in_custom_rule(addresses[0])
            else:
                keys = tuple(a.seen_from(boundary) for a in addresses)
                leaves = _compat.stage(boundary, birth_p, data, dict(addresses=keys, birth=birth))
                notes_of(boundary).values.update(zip(keys, leaves, strict=True))
        return [read(a) for a in addresses]

    def values(self) -> dict[Path, Any]:
        """Everything made so far: full path of each leaf -> value."""
        return {
            (*path, *leaf): cell.value
            for path, slot in self.layer.slots.items()
            for leaf, cell in slot.cells.items()
        }


class _ApplyStore(_Store):
    """Given parameters."""

    def __init__(self, root: Token, params: Mapping[str, Any]) -> None:
        super().__init__(root)
        self.params = params
        leaves, tree = jax.tree.flatten(params)
        types = tuple(_compat.typeof(x) if _compat.is_array_like(x) else type(x) for x in leaves)
        self._signature = ("apply", tree, types)
        self._avals = {path: _compat.typeof(x) for path, x in _arrays(params)}

    def signature(self) -> Hashable:
        return self._signature

    def declare(self, name: str, init: Any, init_args: tuple[Any, ...], used: str) -> Any:
        wanted = wanted_form(init, init_args)
        layers = self.layers()
        path = self.path(layers, ParamAddress((), name, (), None, used))
        slot = layers.slot(path)
        if slot is None:
            slot = _Slot(None, used)
            layers.add_slot(path, slot)
        if slot.form is None:
            inside = layers.layers[0] is not self.layer
            slot.form = self._guess(path, wanted) if inside else self._found(path, wanted, used)
        elif not slot.form.same_shapes(wanted):
            raise _conflict(path, slot.used, slot.form, wanted, used)
        return self._value(name, slot.form, None, used)

    def aval(self, address: ParamAddress) -> Any:  # type: ignore[override]
        slot = self.slot(address)
        if slot.form is not None:
            return slot.form.avals[slot.form.leaves.index(address.leaf)]
        return address.wanted

    def cell(self, address: ParamAddress) -> Cell:  # type: ignore[override]
        slot = self.slot(address)
        cell = slot.cells.get(address.leaf)
        if cell is None:
            path = self.path(Layers([self.layer]), address)
            value = self._leaf((*path, *address.leaf), address.wanted, address.used)
            cell = slot.cells[address.leaf] = Cell(_compat.as_array(value))
        return cell

    def _found(self, path: Path, wanted: Form, used: str) -> Form:
        """The form of what was given; an error if it is not of the wanted structure and shapes."""
        values = [self._leaf((*path, *leaf), wanted, used) for leaf in wanted.leaves]
        found = Form(wanted.tree, wanted.leaves, tuple(map(_compat.typeof, values)))
        if not found.same_shapes(wanted):
            raise _mismatch("/".join(path), str(found), str(wanted), used)
        return found

    def _guess(self, path: Path, wanted: Form) -> Form:
        """The form of what was given, as far as a jaxpr under construction can know it.

        The names that count are given out when that jaxpr is bound, and what is found then is
        compared with the guess. The function says all but the dtypes. Those of the parameter at
        ``path``, if it fits, or of the only parameter of that name and shape, are right unless
        jaxprs are bound in another order than they were traced.
        """
        return Form(wanted.tree, wanted.leaves, tuple(
            self._guess_leaf((*path, *leaf), len(leaf) + 1, aval)
            for leaf, aval in zip(wanted.leaves, wanted.avals, strict=True)
        ))  # fmt: skip

    def _guess_leaf(self, path: Path, n: int, wanted: Any) -> Any:
        def fits(other: Path) -> bool:
            return other[-n:] == path[-n:] and self._avals[other].shape == wanted.shape

        if path in self._avals and fits(path):
            return self._avals[path]
        dtypes = {self._avals[other].dtype for other in self._avals if fits(other)}
        return _compat.ShapedArray(wanted.shape, dtypes.pop() if len(dtypes) == 1 else wanted.dtype)

    def _leaf(self, path: Path, wanted: Any, used: str) -> Any:
        """The array at ``path``; an error that says what was ``wanted`` (a form or a type)."""
        node: Any = self.params
        for i, name in enumerate(path):
            if not isinstance(node, Mapping) or name not in node:
                raise self._missing(path, i, node, wanted, used)
            node = node[name]
        if isinstance(node, Mapping) or not _compat.is_array_like(node):
            found = f"a dict with {sorted(node)}" if isinstance(node, Mapping) else repr(node)
            raise _mismatch("/".join(path), found, _shown(wanted), used)
        return node

    def _missing(self, path: Path, i: int, node: Any, wanted: Any, used: str) -> Exception:
        names = sorted(map(str, node)) if isinstance(node, Mapping) else []
        close = nearest(path[i], names)
        where = f"in {'/'.join(path[:i])!r}" if i else "at the top"
        return MissingParameterError(
            message(
                f"apply was given no parameter {'/'.join(path)!r}: {path[i]!r} is not among what"
                f" is {where}: {', '.join(map(repr, names)) or 'nothing'}."
                + (f" The nearest name is {close!r}." if close else ""),
                fix="""
                params = net.init(key, x)      # makes every parameter that the function uses
                y = net.apply(params, x)
                """,
                wanted=_shown(wanted),
                used=used,
            )
        )


class _RuleStore(_Store):
    """Stands for the parameters in a custom derivative rule, which is given their values."""

    def __init__(self) -> None:
        super().__init__(Token(None))

    def declare(self, name: str, init: Any, init_args: tuple[Any, ...], used: str) -> Any:
        return self._value(name, wanted_form(init, init_args), None, used)


def _lowered(data: Any, address: ParamAddress) -> Any:
    """The value that an initializer may keep of data in the middle of a transformation."""
    while isinstance(data, (_compat.JVPTracer, _compat.LinearizeTracer, _compat.BatchTracer)):
        if isinstance(data, _compat.BatchTracer):
            if data.batch_dim is not None:
                raise InitializerDataError(
                    message(
                        f"The initializer of {address} looks at data that differs between the"
                        " lanes of a vmap, and the lanes share the parameter.",
                        fix="""
                        w = jaxstate.param("w", init, xs)                # outside, from all lanes
                        params = jax.vmap(net.init, (None, 0))(key, xs)  # or one net per lane
                        """,
                        used=address.used,
                    )
                )
            data = data.val
        else:
            data = data.primal
    return data


def _data_in_custom_rule(address: ParamAddress) -> Exception:
    return InitializerDataError(
        message(
            f"The initializer of {address} looks at data inside a function with a custom"
            " derivative rule.",
            fix="""
            w = jaxstate.param("w", init, x)      # before the call of the function
            """,
            used=address.used,
        )
    )


def _shown(wanted: Any) -> str:
    return str(wanted) if isinstance(wanted, Form) else wanted.str_short()


def _mismatch(path: str, found: str, wanted: str, used: str) -> Exception:
    return ParameterMismatchError(
        message(
            f"Parameter {path!r} is {found}, and the function wants {wanted}.",
            fix="""
            params = net.init(key, x)      # with inputs of the shapes that apply is given
            """,
            used=used,
        )
    )


def _arrays(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The arrays of a nested dict, with their paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _arrays(value, (*path, name))
        elif _compat.is_array_like(value):
            yield (*path, name), value


def _conflict(path: Path, made: str, first: Any, form: Form, used: str) -> Exception:
    return ParameterConflictError(
        message(
            f"Parameter {'/'.join(path)!r} is used twice, as {first} and as {form}. The same"
            " name in the same scope is the same parameter.",
            fix=f"""
            jaxstate.param("{path[-1]}_2", ...)          # another parameter: another name
            with jaxstate.scope("second"): ...           # or another scope
            """,
            made=made,
            used=used,
        )
    )


# -- What a parameter should look like -------------------------------------------------------

_ONE_ARRAY = jax.tree.structure(0)


def wanted_form(init: Callable[..., Any], init_args: tuple[Any, ...]) -> Form:
    """The form of what ``init(key, *init_args)`` makes, without making it."""
    if _compat.is_standard_initializer(init) and init_args and _is_shape(init_args[0]):
        shape, *dtype = init_args[:2]
        aval = _compat.ShapedArray(tuple(shape), jnp.result_type(*dtype or [float]))
        return Form(_ONE_ARRAY, ((),), (aval,))
    if isinstance(init, types.FunctionType) and init.__closure__ is None:
        try:
            return _cached_form(init, init_args)
        except TypeError:  # arguments that cannot be hashed, such as arrays
            pass
    return _form(init, init_args)


def _is_shape(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and all(isinstance(n, int) for n in x)


def _form(init: Callable[..., Any], init_args: tuple[Any, ...]) -> Form:
    return form_of(jax.eval_shape(lambda key: init(key, *init_args), _key_struct()))


@functools.cache
def _key_struct() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


_cached_form = functools.lru_cache(maxsize=4096)(_form)


def _param_key(key: Any, path: Path) -> Any:
    """The key of the initial value of one parameter: a hash of its path, folded in."""
    digest = hashlib.sha256("/".join(path).encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return key


# -- The public functions --------------------------------------------------------------------


def param(name: str, init: Callable[..., Any], *init_args: Any) -> Any:
    """A parameter of the module (or `scope`) that the program is in.

    Args:
      name: unique in that scope; the same name there is the same parameter.
      init: called as ``init(key, *init_args)``, returns any tree of arrays. The initializers of
        `jax.nn.initializers` fit: ``param("w", jax.nn.initializers.lecun_normal(), (3, 4))``.
      *init_args: static values or arrays.

    Returns:
      The value: during ``init`` what the initializer makes, during ``apply`` what was given.

    Raises:
      MissingStoreError: outside ``init`` and ``apply``.
      MissingParameterError, ParameterMismatchError: if ``apply`` was not given a value of the
        structure and shapes that ``init`` would make.
      ParameterConflictError: if the name is in use for a parameter of another form.
      NameClashError: if the name is in use for a module or scope.
      InitializerDataError: if ``init`` looks at data that comes out of a loop or a vmap.

    The initial value depends on the key given to ``init`` and on the path of the parameter alone:
    the key is folded with the first 8 bytes of the SHA-256 digest of the path.
    """
    used = _compat.user_location()
    if not isinstance(name, str) or not name:
        raise TypeError(f"param wants a non-empty string as name, and was given {name!r}.")
    if not callable(init):
        raise TypeError(
            f"param({name!r}, ...) wants a function init(key, *init_args), and was given {init!r}."
            f'\nTo mend it:\n    jaxstate.param("{name}", lambda key: value)'
        )
    store = ParamAddress((), name, (), None, used).store()
    return store.declare(name, init, init_args, used)


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Opens a level of the tree of parameters by hand.

    The same name opens the same level again. Outside ``init`` and ``apply`` it does nothing.

    >>> import jax, jaxstate
    >>> @jaxstate.parametrized
    ... def net(x):
    ...     with jaxstate.scope("encoder"):
    ...         return x * jaxstate.param("scale", jax.nn.initializers.ones, ())
    >>> net.init(jax.random.key(0), 2.0)
    {'encoder': {'scale': Array(1., dtype=float32)}}
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"scope wants a non-empty string, and was given {name!r}.")
    store = _innermost_store()
    if store is None:
        yield
        return
    with store.scopes.entered(Level(name, None), boundary_of(store)):
        yield


def _innermost_store() -> _Store | None:
    return next((h for h in holders() if isinstance(h, _Store)), None)


class Parametrized:
    """A function with parameters: see `parametrized`."""

    def __init__(self, fn: Callable[..., Any], name: str | None = None) -> None:
        if not callable(fn):
            raise TypeError(f"parametrized wants a function, and was given {fn!r}.")
        if name is not None and (not isinstance(name, str) or not name):
            raise TypeError(f"parametrized wants a non-empty string as name, and got {name!r}.")
        self.fn = fn
        self.name = name or _name_of(fn)
        self._explicit_name = name
        self._token = Token(current_home())
        self._instances = _PerInstance()
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function; inside another parametrized function, as a module of its own."""
        store = _innermost_store()
        if store is None:
            return self.fn(*args, **kwargs)
        with store.scopes.entered(Level(self.name, self._token), boundary_of(store)):
            return self.fn(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Parametrized:
        """As a method: every instance of the class is its own module."""
        if instance is None:
            return self
        return _BoundMethod(self, instance)

    def init(self, key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The initial parameters.

        Nothing of the function itself is computed: it is traced, and of the jaxpr only what the
        initializers need is run.

        Args:
          key: one random key. It also seeds the random stream "default". A dict
            ``{name: key}`` seeds several streams; the parameters take the key of "params", or
            that of "default" if there is none.
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.

        Returns:
          A new nested dict with string keys and arrays.

        Raises:
          TypeError: if ``key`` is not a key.
          InitializerDataError: if an initializer needs data of which only the shape was given.
          Whatever `param` raises.
        """
        param_key, streams = _keys(key, "init")
        arrays, rebuild, abstract = _split_arrays((args, kwargs))

        def forward(param_key: Any, streams: Any, arrays: Any) -> dict[Path, Any]:
            args, kwargs = rebuild(arrays)
            store = _InitStore(self._token, param_key)
            with open_holder(store), _open_streams(streams):
                self.fn(*args, **kwargs)
            return store.values()

        made, shapes = jax.make_jaxpr(forward, return_shape=True)(param_key, streams, arrays)
        operands = jax.tree.leaves((param_key, streams, arrays))
        leaves = _run_slice(made, operands, abstract)
        return _nested(dict(zip(shapes, _in_order(shapes, leaves), strict=True)))

    def apply(self, params: Mapping[str, Any], *args: Any, key: Any = None, **kwargs: Any) -> Any:
        """The function, with the given parameters: pure in ``params``, ``args`` and ``key``.

        Args:
          params: what ``init`` returned, or any dict of that form. Entries that the function does
            not read are left alone.
          *args, **kwargs: passed to the function.
          key: seeds the random stream "default", or ``{name: key}`` seeds several. Without it,
            draws come from the streams that are open outside.

        Returns:
          What the function returns.

        Raises:
          MissingParameterError, ParameterMismatchError: see `param`.
          TypeError: if ``params`` is not a dict, or ``key`` not a key.
        """
        if not isinstance(params, Mapping):
            raise TypeError(
                f"{self.name}.apply wants the parameters as a dict (what init returned), and was"
                f" given {type(params).__name__}.\nTo mend it:\n    y = net.apply(params, x)"
            )
        streams = {} if key is None else _keys(key, "apply")[1]
        with open_holder(_ApplyStore(self._token, params)), _open_streams(streams):
            return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<parametrized {self.name}>"


def parametrized(fn: Callable[..., Any] | None = None, *, name: str | None = None) -> Any:
    """Makes a function with parameters out of one that calls `param`.

    Args:
      fn: any function; a method makes every instance of its class a module of its own.
      name: of the module; by default the function's name.

    Returns:
      A `Parametrized` object. Called inside another parametrized function it runs ``fn`` as a
      module: the same object called twice shares its parameters, two objects do not. Outside it
      offers ``init(key, *args, **kwargs)`` and ``apply(params, *args, key=None, **kwargs)``.

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


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None) or type(fn).__name__
    return re.sub(r"\W", "", name) or "module"


# -- Methods ---------------------------------------------------------------------------------


class _BoundMethod(Parametrized):
    """A parametrized method of one instance."""

    def __init__(self, method: Parametrized, instance: Any) -> None:
        name = method._explicit_name
        if name is None and method.name == "__call__":
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(instance).__name__).lower()
        super().__init__(types.MethodType(method.fn, instance), name)
        self._token = method._instances.token(instance)


class _PerInstance:
    """One token per instance, by identity, for as long as the instance lives."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[Any, Token]] = {}

    def token(self, instance: Any) -> Token:
        entry = self._tokens.get(id(instance))
        if entry is None:
            try:
                alive: Any = weakref.ref(instance, self._forget(id(instance)))
            except TypeError:  # no weak references: keep the instance
                alive = instance
            entry = self._tokens[id(instance)] = (alive, Token(current_home()))
        return entry[1]

    def _forget(self, key: int) -> Callable[[Any], None]:
        tokens = self._tokens
        return lambda _: tokens.pop(key, None) and None


# -- Helpers of init and apply ---------------------------------------------------------------


def _keys(key: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """The key for parameters, and the key of each stream."""
    if not isinstance(key, Mapping):
        key = check_key(key, where)
        return key, {"default": key}
    streams = {name: check_key(k, f"{where}, stream {name!r},") for name, k in key.items()}
    if where == "init" and not {"params", "default"} & streams.keys():
        raise TypeError(
            f"init was given keys for {sorted(streams)}, and needs one for the parameters.\n"
            'To mend it:\n    net.init({"params": key, "dropout": other_key}, x)'
        )
    return streams.get("params", streams.get("default")), streams


@contextmanager
def _open_streams(streams: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, key in streams.items():
            stack.enter_context(rng_stream(key, name))
        yield


def _split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any], bool]:
    """The arrays of a tree; the function that puts others in their place; is any a mere shape."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if _is_dynamic(x)]
    arrays = [leaves[i] for i in where]

    def rebuild(arrays: list[Any]) -> Any:
        full = list(leaves)
        for i, x in zip(where, arrays, strict=True):
            full[i] = x
        return structure.unflatten(full)

    return arrays, rebuild, any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)


def _is_dynamic(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _run_slice(made: Any, operands: Sequence[Any], abstract: bool) -> list[Any]:
    """Evaluates of a jaxpr what its outputs depend on; effects of the rest do not happen."""
    pure, used = sliced(made)
    inputs = [operands[i] for i in used]
    if abstract and any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
        raise InitializerDataError(
            message(
                "An initializer looks at data, and init was given only its shape.",
                fix="""
                params = net.init(key, x)      # an array instead of a ShapeDtypeStruct
                """,
                used=_compat.user_location(),
            )
        )
    return [_compat.as_array(x) for x in _compat.eval_closed_jaxpr(pure, *inputs)]


def _in_order(shapes: dict[Path, Any], leaves: list[Any]) -> Iterator[Any]:
    """The leaves of a dict, which JAX gives in sorted order, in the dict's own order."""
    by_path = dict(zip(sorted(shapes), leaves, strict=True))
    return (by_path[path] for path in shapes)


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
