"""The stores of parameters: what is open while ``init`` makes them and ``apply`` reads them.

A parameter is found by its *address*: the modules and scopes that were entered, relative to the
jaxpr (or custom rule) in which it is used, and its name. The store completes the address with the
place where that jaxpr is bound, and gives out names (`jaxstate.names`).

* `InitStore` makes a parameter when an address of it is resolved for the first time.
* `ApplyStore` looks it up in the given dict.
* `_RuleStore` stands for either in a custom derivative rule, which is given the values as operands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxstate import _compat
from jaxstate.births import Birth, bear_at, birth_p, trace_initializer
from jaxstate.errors import (
    InitializerDataError,
    MissingParameterError,
    MissingStoreError,
    ParameterConflictError,
    ParameterMismatchError,
    message,
    nearest,
)
from jaxstate.forms import Form, wanted_form
from jaxstate.names import Home, Layer, Layers, Level, Path, ScopeStack, Token
from jaxstate.slots import Address, Cell, Holder, holders
from jaxstate.trace import boundaries, boundary_of, notes_of, read

__all__ = ["ApplyStore", "InitStore", "ParamAddress", "Store", "current_home", "innermost_store"]


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

    def store(self) -> Store:
        for holder in holders():
            if isinstance(holder, Store):
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
        assert isinstance(store, InitStore)
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


class Store(Holder):
    """The parameters of one ``init`` or ``apply``, while it runs."""

    def __init__(self, root: Token) -> None:
        super().__init__()
        self.layer = Layer()
        self.layer.paths[root] = ()
        self.scopes = ScopeStack()
        self.forms: dict[Any, Form] = {}  # see `wanted_form`

    def knows(self, address: Address) -> bool:
        return isinstance(address, ParamAddress)

    def layers(self) -> Layers:
        """The names visible here: of the boundaries around the program, then the store's own."""
        return Layers([*(self._layer_of(b) for b in boundaries(self)), self.layer])

    def _layer_of(self, boundary: Any) -> Layer:
        extra = boundary.extra if isinstance(boundary, Holder) else notes_of(boundary).extra
        return extra.setdefault(self, Layer())

    def without_values(self) -> _RuleStore:
        return _RuleStore(self.signature())

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

    def run(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Runs a module that is called; some stores look at what goes in and comes out."""
        return module.fn(*args, **kwargs)

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


class InitStore(Store):
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


class ApplyStore(Store):
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
        wanted = wanted_form(init, init_args, self.forms)
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


class _RuleStore(Store):
    """Stands for the parameters in a custom derivative rule, which is given their values."""

    def __init__(self, signature: Hashable) -> None:
        super().__init__(Token(None))
        self._signature = signature

    def signature(self) -> Hashable:
        return self._signature

    def declare(self, name: str, init: Any, init_args: tuple[Any, ...], used: str) -> Any:
        return self._value(name, wanted_form(init, init_args, self.forms), None, used)


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


def _param_key(key: Any, path: Path) -> Any:
    """The key of the initial value of one parameter: a hash of its path, folded in."""
    digest = hashlib.sha256("/".join(path).encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return key


def innermost_store() -> Store | None:
    return next((h for h in holders() if isinstance(h, Store)), None)
