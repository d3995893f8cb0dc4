"""The stores of ``init``, which makes parameters and variables, and of ``apply``, which is given
them.

* `InitStore` makes an entry when an address of it is resolved for the first time.
* `ApplyStore` looks it up in the given dicts.

In a custom derivative rule, `entries.RuleStore` stands for either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxstate import _compat
from jaxstate.births import Birth, bear_at, birth_p, trace_initializer
from jaxstate.entries import Entry, EntryAddress, Store
from jaxstate.errors import InitializerDataError, message, nearest
from jaxstate.forms import Form
from jaxstate.names import Layers, Path, Token
from jaxstate.slots import Cell, Holder, holders
from jaxstate.trace import boundary_of, notes_of, read

__all__ = ["ApplyStore", "InitStore"]


class InitStore(Store):
    """Parameters and variables being made."""

    def __init__(self, root: Token, key: Any) -> None:
        super().__init__(root)
        self.key = key
        self.key_aval = _compat.typeof(key)
        self.mesh = _compat.abstract_mesh()

    def signature(self) -> Hashable:
        return ("init", self.key_aval)

    def aval(self, address: EntryAddress) -> Any:  # type: ignore[override]
        form = self.entry(address).form
        assert form is not None
        return form.avals[form.leaves.index(address.leaf)]

    def varies_over(self, address: EntryAddress, read: Any) -> frozenset[Any]:  # type: ignore[override]
        """All there are: to read would be to make it, and nobody sees what ``init`` computes."""
        return _compat.device_axes()

    def declare(
        self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]
    ) -> tuple[Form, list[Any]]:
        with _compat.out_of_devices(self.mesh):
            birth, data = trace_initializer(
                lambda *keys: address.initial(init, init_args, *keys),
                *([self.key_aval] if address.takes_key else []),
            )
        addresses = address.leaves(birth.form, birth)
        layers = self.layers()
        path = self.path(layers, address)
        entry = layers.entry(path, address.kind)
        if entry is not None:
            if entry.form != birth.form:
                raise address.conflict(path, entry.used, entry.form, birth.form)
        elif data:
            bear_at(addresses, birth, data)
        return birth.form, addresses

    def cell(self, address: EntryAddress) -> Cell:  # type: ignore[override]
        entry = self.entry(address)
        if not entry.cells:
            assert address.birth is not None
            self._make(entry, address, ())
        return entry.cells[address.leaf]

    def _make(self, entry: Entry, address: EntryAddress, data: Sequence[Any]) -> None:
        birth = address.birth
        assert birth is not None
        path = self.path(Layers([self.layer]), address)
        with _compat.set_current_trace(self.anchor), _compat.out_of_devices(self.mesh):
            keys = [_param_key(self.key, path)] if address.takes_key else []
            leaves = [_compat.as_array(value) for value in birth.run(data, *keys)]
        entry.initial = dict(zip(birth.form.leaves, leaves, strict=True))
        entry.cells = {leaf: Cell(value) for leaf, value in entry.initial.items()}

    def bear(self, addresses: Sequence[Any], birth: Birth, data: Sequence[Any]) -> list[Any]:
        layers = self.layers()
        address = addresses[0].having(birth=birth)
        path = self.path(layers, address)
        if layers.entry(path, address.kind) is None:
            entry = self.entry(address)
            data = [_lowered(d, address) for d in map(_compat.canonicalize, data)]
            boundary = boundary_of(self)
            if boundary is None:
                self._make(entry, address, data)
            elif isinstance(boundary, Holder):
                raise _data_in_custom_rule(address)
            elif self._devices_are_inside():
                raise _data_on_devices(address)
            else:
                keys = tuple(a.seen_from(boundary) for a in addresses)
                leaves = _compat.stage(boundary, birth_p, data, dict(addresses=keys, birth=birth))
                notes_of(boundary).values.update(zip(keys, leaves, strict=True))
        return [read(a) for a in addresses]

    def _devices_are_inside(self) -> bool:
        """Whether the program is in a shard_map that the store is outside of."""
        inside = (h for h in holders() if h.age > self.age)
        return any(h.outside is not None and not h.is_boundary for h in inside)

    def initial_values(self, kind: str) -> dict[Path, Any]:
        """What all entries of a kind start with: full path of each leaf -> value."""
        return {
            (*path, *leaf): value
            for path, entry in self.layer.entries.items()
            if entry.kind == kind
            for leaf, value in entry.initial.items()
        }


class ApplyStore(Store):
    """Given parameters and variables.

    Args:
      root: the module that is applied.
      params: a nested dict.
      state: a nested dict of the variables, or None if none was given.
      writable: whether the variables may be written.
    """

    def __init__(
        self,
        root: Token,
        params: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        writable: bool = False,
    ) -> None:
        super().__init__(root)
        self.writable = writable
        self._given = {"parameter": params, "variable": state}
        leaves, tree = jax.tree.flatten(self._given)
        types = tuple(_compat.typeof(x) if _compat.is_array_like(x) else type(x) for x in leaves)
        self._signature = ("apply", writable, tree, types)

    def signature(self) -> Hashable:
        return self._signature

    def declare(
        self, address: Any, init: Callable[..., Any], init_args: tuple[Any, ...]
    ) -> tuple[Form, list[Any]]:
        if self._given[address.kind] is None:
            raise address.not_given()
        wanted = address.form_of_initial(init, init_args, self.forms)
        layers = self.layers()
        path = self.path(layers, address)
        entry = self.entry(address)
        if entry.form is None:
            inside = layers.layers[0] is not self.layer
            guess_or_find = self._guess if inside else self._found
            entry.form = guess_or_find(address, path, wanted)
        elif not entry.form.same_shapes(wanted):
            raise address.conflict(path, entry.used, entry.form, wanted)
        return entry.form, address.leaves(entry.form, None)

    def aval(self, address: EntryAddress) -> Any:  # type: ignore[override]
        form = self.entry(address).form
        return form.avals[form.leaves.index(address.leaf)] if form else address.wanted

    def cell(self, address: EntryAddress) -> Cell:  # type: ignore[override]
        entry = self.entry(address)
        cell = entry.cells.get(address.leaf)
        if cell is None:
            path = self.path(Layers([self.layer]), address)
            value = self._leaf(address, (*path, *address.leaf), address.wanted)
            value = entry.initial[address.leaf] = address.as_stored(value)
            cell = entry.cells[address.leaf] = Cell(value)
        return cell

    def state(self) -> dict[str, Any]:
        """The variables as they are now: a new dict of the form of the given one."""
        state = _copied(self._given["variable"] or {})
        for path, entry in self.layer.entries.items():
            for leaf, cell in entry.cells.items():
                if entry.kind == "variable" and cell.value is not entry.initial[leaf]:
                    *above, name = *path, *leaf
                    node = state
                    for level in above:
                        node = node[level]
                    node[name] = cell.value
        return state

    def _found(self, address: EntryAddress, path: Path, wanted: Form) -> Form:
        """The form of what was given; an error if it is not of the wanted structure and shapes."""
        values = [self._leaf(address, (*path, *leaf), wanted) for leaf in wanted.leaves]
        found = Form(wanted.tree, wanted.leaves, tuple(map(address.type_as_stored, values)))
        if not found.same_shapes(wanted):
            raise address.mismatch(path, str(found), str(wanted))
        return found

    def _guess(self, address: EntryAddress, path: Path, wanted: Form) -> Form:
        """The form of what was given, as far as a jaxpr under construction can know it.

        The names that count are given out when that jaxpr is bound, and what is found then is
        compared with the guess. The function says all but the dtypes. Those of the entry at
        ``path``, if it fits, or of the only entry of that name and shape, are right unless
        jaxprs are bound in another order than they were traced.
        """
        given = _arrays(self._given[address.kind] or {})
        known = {path: address.type_as_stored(x) for path, x in given}
        return Form(wanted.tree, wanted.leaves, tuple(
            _guess_type((*path, *leaf), len(leaf) + 1, aval, known)
            for leaf, aval in zip(wanted.leaves, wanted.avals, strict=True)
        ))  # fmt: skip

    def _leaf(self, address: EntryAddress, path: Path, wanted: Any) -> Any:
        """The array at ``path``; an error that says what was ``wanted`` (a form or a type)."""
        node: Any = self._given[address.kind]
        for i, name in enumerate(path):
            if not isinstance(node, Mapping) or name not in node:
                raise _missing(address, path, i, node, wanted)
            node = node[name]
        if isinstance(node, Mapping) or not _compat.is_array_like(node):
            found = f"a dict with {sorted(node)}" if isinstance(node, Mapping) else repr(node)
            raise address.mismatch(path, found, _shown(wanted))
        return node


def _guess_type(path: Path, n: int, wanted: Any, known: Mapping[Path, Any]) -> Any:
    def fits(other: Path) -> bool:
        return other[-n:] == path[-n:] and known[other].shape == wanted.shape

    if path in known and fits(path):
        return known[path]
    dtypes = {known[other].dtype for other in known if fits(other)}
    return _compat.ShapedArray(wanted.shape, dtypes.pop() if len(dtypes) == 1 else wanted.dtype)


def _missing(address: EntryAddress, path: Path, i: int, node: Any, wanted: Any) -> Exception:
    """The error for a path of which element ``i`` is not in ``node``."""
    names = sorted(map(str, node)) if isinstance(node, Mapping) else []
    close = nearest(path[i], names)
    where = f"in {'/'.join(path[:i])!r}" if i else "at the top"
    return address.missing_error(
        message(
            f"apply was given no {address.kind} {'/'.join(path)!r}: {path[i]!r} is not among what"
            f" is {where}: {', '.join(map(repr, names)) or 'nothing'}."
            + (f" The nearest name is {close!r}." if close else ""),
            fix=address.fix_by_init,
            wanted=_shown(wanted),
            used=address.used,
        )
    )


def _lowered(data: Any, address: EntryAddress) -> Any:
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


def _data_in_custom_rule(address: EntryAddress) -> Exception:
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


def _data_on_devices(address: EntryAddress) -> Exception:
    return InitializerDataError(
        message(
            f"The initializer of {address} looks at data inside a shard_map, where every device has"
            " its own, and the devices share what it makes.",
            fix="""
            w = jaxstate.param("w", init, xs)     # before the call of the mapped function, from xs
            """,
            used=address.used,
        )
    )


def _shown(wanted: Any) -> str:
    return str(wanted) if isinstance(wanted, Form) else wanted.str_short()


def _arrays(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The arrays of a nested dict, with their paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _arrays(value, (*path, name))
        elif _compat.is_array_like(value):
            yield (*path, name), value


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as new dicts of the same arrays."""
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _param_key(key: Any, path: Path) -> Any:
    """The key of the initial value of one parameter: a hash of its path, folded in."""
    digest = hashlib.sha256("/".join(path).encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return key
