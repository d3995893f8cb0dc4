"""Sowing, reaping, planting: values in the middle of a program, collected or replaced from outside.

    def f(x):
        h = jaxstate.sow("hidden", jnp.sin(x))
        return h * 2

    out, sown = jaxstate.reap(f)(x)                     # sown == {"hidden": sin(x)}
    out = jaxstate.plant(f)({"hidden": h}, x)           # h * 2

``reap`` opens a holder whose slots ``sow`` writes, ``plant`` one whose slots it reads
(`sow.sites`). Without either, ``sow`` returns its argument and that is all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core import resolve
from jaxstate._src.core.refs import ZeroCell, strong
from jaxstate._src.core.slots import Cell
from jaxstate._src.params.paths import Path
from jaxstate._src.sow.sites import (
    Kind,
    Scope,
    Site,
    SownAddress,
    SownHolder,
    check_tag,
    holder_of,
    numbered,
    placed_like,
    reaps_inside,
    types_of,
)
from jaxstate.errors import (
    NameClashError,
    PlantMismatchError,
    called_as,
    check_runs_when_called,
    message,
)

__all__ = ["plant", "reap", "sow"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Mode = Literal["strict", "append", "clobber", "cond_clobber"]
_MODES = ("strict", "append", "clobber", "cond_clobber")


@called_as('x = jaxstate.sow("name", x)')
def sow(name: str, value: T, *, tag: str = "sown", mode: Mode = "strict") -> T:
    """Marks a value, anywhere in a program, for `reap` to collect and `plant` to replace.

    Args:
      name: what the value is collected as.
      value: a tree of arrays of any shapes and dtypes.
      tag: the innermost `reap`, and the innermost `plant` that has the name, of this tag see it.
      mode: what it means to sow the name again.

        * ``"strict"``: it is an error, and so is a loop around it. Every branch of a ``cond`` sows
          the name, or none.
        * ``"append"``: all values are kept. A ``scan`` stacks them along a new leading axis, so
          nested scans nest axes. Several values in one place (a Python loop, two calls) are
          stacked too, in program order; a single one is not. In a ``while_loop`` it is an error.
        * ``"clobber"``: the last value is kept; zeros if a loop that sows it makes no step.
        * ``"cond_clobber"``: the same, and branches of a ``cond`` may lack it. A branch without it
          leaves what was sown before, or zeros if nothing was.

    Returns:
      ``value`` itself, or what `plant` has in its place. Without an active `reap` or `plant` that
      sees it, nothing else happens.

    Raises:
      RepeatedSowError: if the name is sown more often than ``mode`` allows.
      BranchSowError: if a branch lacks the name, and may not.
      SowMismatchError: if the name is sown with another mode, structure, shape or dtype than
        before.
      PlantMismatchError: if the planted value has another structure, shape or dtype.
      TypeError, ValueError: if ``name`` is no string, or ``mode`` none of these.

    The modes are those of ``harvest`` in Oryx (https://github.com/jax-ml/oryx).

    >>> import jax.numpy as jnp, jaxstate
    >>> def f(x):
    ...     return 2 * jaxstate.sow("square", x**2)
    >>> f(3.0)
    18.0
    >>> out, sown = jaxstate.reap(f)(3.0)
    >>> out, float(sown["square"])
    (18.0, 9.0)
    """
    if not isinstance(name, str):
        raise TypeError(
            f'sow: a name is a string, not {name!r}.\nTo mend it:\n    x = jaxstate.sow("name", x)'
        )
    check_tag("sow", tag)
    if mode not in _MODES:
        raise ValueError(f"sow: mode is one of {', '.join(map(repr, _MODES))}, not {mode!r}.")
    planted = _addresses("plant", name, value, tag, mode)
    if planted is not None:
        value = _replaced(planted[0], value)
    reaped = _addresses("reap", name, value, tag, mode)
    if reaped is not None:
        _collect(*reaped)
    return value


def _collect(addresses: list[SownAddress], leaves: list[Any]) -> None:
    for address, leaf in zip(addresses, leaves, strict=True):
        resolve.write_at(address, leaf)


def _replaced(addresses: list[SownAddress], value: Any) -> Any:
    planted = _tree(addresses[0].site, [resolve.read_at(address) for address in addresses])
    # A Python scalar, or what is computed from such only, gives way to the dtype of other operands.
    return jax.tree.map(lambda x, y: _jax.weak(y) if _jax.is_weak(x) else y, value, planted)


def _addresses(
    kind: Kind, name: str, value: Any, tag: str, mode: str
) -> tuple[list[SownAddress], list[Any]] | None:
    """The slots of a value that is sown, and what goes there; None if nobody wants it."""
    found = holder_of(kind, tag, name)
    if found is None:
        return None
    holder, at = found
    made = _jax.user_location()
    leaves = _leaves(jax.tree.map(strong, value))
    site = Site(kind, tag, name, mode, jax.tree.structure(value), types_of(leaves), at=at)
    if holder.scope.nested:
        site = site._replace(path=holder.path())
    if kind == "plant":
        site = site._replace(reaps=reaps_inside(holder, tag))
    return numbered(site, made).addresses(made), leaves


def _leaves(value: Any) -> list[Any]:
    """The leaves of a value; one that says nothing for a tree without any."""
    return jax.tree.leaves(value) or [np.False_]


def _tree(site: Site, leaves: list[Any]) -> Any:
    return site.tree.unflatten(leaves[: site.tree.num_leaves])


# -- Reap ------------------------------------------------------------------------------------


class _Reap(SownHolder):
    """Collects what is sown under a tag."""

    kind = "reap"

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.cells: dict[SownAddress, ZeroCell] = {}

    def cell(self, address: SownAddress) -> Cell:  # type: ignore[override]
        if address not in self.cells:
            self.cells[address] = ZeroCell(self.anchor, address.aval())
        return self.cells[address]

    def without_values(self) -> _Reap:
        return placed_like(self, _Reap(self.scope))

    def signature(self) -> Hashable:
        return "reap", self.scope

    def collected(self) -> dict[str, Any]:
        """What was sown, by name or path, in the order of the first of each."""
        sites: dict[Site, list[Any]] = {}
        for address, cell in self.cells.items():
            if cell.written is not None:
                value = _jax.in_mesh(cell.written)
                sites.setdefault(address.site, []).append((address.leaf, value))
        values: dict[Path, list[Any]] = {}
        for site, leaves in sites.items():
            ordered = [leaf for _, leaf in sorted(leaves, key=lambda pair: pair[0])]
            path = (*(site.path or ()), site.name)
            values.setdefault(path, []).append(_tree(site, ordered))
        tree: dict[str, Any] = {}
        modules: set[Path] = {()}
        for path, several in values.items():
            node = tree
            for i, name in enumerate(path[:-1]):
                if path[: i + 1] in values:
                    raise _module_and_value(path[: i + 1])
                modules.add(path[: i + 1])
                node = node.setdefault(name, {})
            if path in modules:
                raise _module_and_value(path)
            node[path[-1]] = several[0] if len(several) == 1 else jax.tree.map(_stack, *several)
        return tree


def _module_and_value(path: Path) -> Exception:
    return NameClashError(
        message(
            f"{'/'.join(path)!r} is a value that is sown, and a module or scope with others.",
            fix=f"""
            jaxstate.sow("{path[-1]}_value", value)      # another name
            """,
            used=_jax.user_location(),
        )
    )


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves)


@called_as("out, sown = jaxstate.reap(fn)(x)")
def reap(
    fn: Callable[P, R],
    tag: str = "sown",
    *,
    nested: bool = False,
    allow: Iterable[str | Path] | None = None,
    block: Iterable[str | Path] | None = None,
) -> Callable[P, tuple[R, dict[str, Any]]]:
    """Makes a function that also returns the values that are sown while it runs.

    Args:
      fn: a function that calls `sow`, at any depth, inside any transformation.
      tag: which of them to collect.
      nested: whether to give a nested dict by the path of modules and scopes, as ``init`` does for
        parameters: then each has its own names. (Functions are traced for each scope then.)
      allow: collects only these: a name, or the path of a module, scope or value as a string with
        slashes or a tuple, relative to ``fn``.
      block: does not collect these.

    Returns:
      A function with the arguments of ``fn`` that returns ``(fn(...), {name: value})``. It is pure,
      and may be transformed like any other.

      In a ``vmap`` inside of ``fn`` the lanes are on a new leading axis of the value; for ``scan``
      see the modes of `sow`. Of a derivative that is computed inside of ``fn`` the primal value is
      collected. Through the derivative of ``reap(fn)`` itself the values have gradients.

      Of two nested calls of ``reap`` with one tag, the inner one takes what is sown in it.

    Raises:
      NameClashError: if a path is that of a value and of a module.
      TypeError: if ``allow`` or ``block`` is no list of names and paths.
      Whatever `sow` raises, when the function is called.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> def f(x):
    ...     def body(x, _):
    ...         return jaxstate.sow("x", 2 * x, mode="append"), None
    ...     return jax.lax.scan(body, x, length=3)[0]
    >>> out, sown = jaxstate.reap(jax.jit(f))(1.0)
    >>> float(out), sown["x"].tolist()
    (8.0, [2.0, 4.0, 8.0])

    >>> def g(x):
    ...     with jaxstate.scope("first"):
    ...         x = jaxstate.sow("h", x + 1)
    ...     with jaxstate.scope("second"):
    ...         return jaxstate.sow("h", x * 10)
    >>> out, sown = jaxstate.reap(g, nested=True)(1)
    >>> jax.tree.map(int, sown)
    {'first': {'h': 2}, 'second': {'h': 20}}
    """
    check_runs_when_called(fn, "reap")
    scope = Scope.given("reap", tag, nested, allow, block)

    @functools.wraps(fn)
    def reaped(*args: P.args, **kwargs: P.kwargs) -> tuple[R, dict[str, Any]]:
        holder = _Reap(scope)
        with holder.opened():
            out = fn(*args, **kwargs)
            return out, holder.collected()

    return reaped


# -- Plant -----------------------------------------------------------------------------------


class _Plant(SownHolder):
    """Has values for what is sown under a tag."""

    kind = "plant"

    def __init__(self, scope: Scope, values: Mapping[str, Any]) -> None:
        super().__init__(scope)
        self.values = dict(values)

    def may_want(self, name: str) -> bool:
        return self.scope.nested or name in self.values

    def wants(self, name: str) -> bool:
        if not super().wants(name):
            return False
        return not self.scope.nested or name in self._values_at(self.path())

    def _values_at(self, path: Path) -> Mapping[str, Any]:
        node: Any = self.values
        for name in path:
            node = node.get(name)
            if not isinstance(node, Mapping):
                return {}
        return node

    def _value(self, site: Site) -> Any:
        return self._values_at(site.path or ())[site.name]

    def cell(self, address: SownAddress) -> Cell:  # type: ignore[override]
        site, wanted = address.site, address.aval()
        value = self._value(site)
        if jax.tree.structure(value) != site.tree:
            raise _mismatch(site, value, address.made)
        with _jax.set_current_trace(self.anchor):
            leaf = _jax.as_array(_leaves(value)[address.leaf])
            if _jax.is_weak(leaf) and jnp.result_type(leaf, wanted.dtype) == wanted.dtype:
                leaf = leaf.astype(wanted.dtype)
            stacked = _is_stacked(site, leaf, wanted)
            if leaf.dtype != wanted.dtype or leaf.shape[1 if stacked else 0 :] != wanted.shape:
                raise _mismatch(site, value, address.made)
            if site.n >= (leaf.shape[0] if stacked else 1):
                raise _count_mismatch(site, value, f"at least {site.n + 1} times", address.made)
            return Cell(leaf[site.n] if stacked else leaf)

    def check_counts(self) -> None:
        """Raises if more values were planted than sown."""
        records = list(self.extra.values())
        for record in records:
            site = record.outside
            value = self._value(site)
            same = (r for r in records if r.outside.full_name() == site.full_name())
            count = max(r.count for r in same)
            for leaf, wanted in zip(_leaves(value), site.types, strict=False):
                if _is_stacked(site, leaf, wanted) and jnp.shape(leaf)[0] != count:
                    raise _count_mismatch(site, value, f"{count} times", record.made)

    def without_values(self) -> _Plant:
        return placed_like(self, _Plant(self.scope, _names_in(self.values)))

    def signature(self) -> Hashable:
        if not self.scope.nested:
            return "plant", self.scope, frozenset(self.values)
        return "plant", self.scope, _hashable(_names_in(self.values))


def _names_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict without its values."""
    return {
        name: _names_in(value) if isinstance(value, Mapping) else None
        for name, value in values.items()
    }


def _hashable(names: Any) -> Hashable:
    if names is None:
        return None
    return frozenset((name, _hashable(inner)) for name, inner in names.items())


def _is_stacked(site: Site, leaf: Any, wanted: Any) -> bool:
    """Whether a planted leaf has one value for each time that the name is sown."""
    return site.mode == "append" and jnp.ndim(leaf) > len(wanted.shape)


def _mismatch(site: Site, value: Any, made: str) -> Exception:
    found = Site("plant", "", "", "", jax.tree.structure(value), types_of(_leaves(value)))
    return PlantMismatchError(
        message(
            f"The value planted as {site.full_name()!r} is {found.shown()}, and what is sown there"
            f" is {site.shown()}.",
            fix=f"""
            out, sown = jaxstate.reap(f)(x)
            jaxstate.plant(f)({{{site.name!r}: 2 * sown[{site.name!r}]}}, x)    # of that type
            """,
            made=made,
            used=_jax.user_location(),
        )
    )


def _count_mismatch(site: Site, value: Any, times: str, made: str) -> Exception:
    planted = jax.tree.leaves(value)[0]
    return PlantMismatchError(
        message(
            f"{site.full_name()!r} is sown {times} with mode='append' as {site.shown()}, and a"
            f" value of shape {jnp.shape(planted)} was planted.",
            fix=f"""
            jaxstate.plant(f)({{{site.name!r}: jnp.stack(values)}}, x)    # one for each time
            """,
            made=made,
            used=_jax.user_location(),
        )
    )


@called_as('out = jaxstate.plant(fn)({"name": value}, x)')
def plant(
    fn: Callable[P, R],
    tag: str = "sown",
    *,
    nested: bool = False,
    allow: Iterable[str | Path] | None = None,
    block: Iterable[str | Path] | None = None,
) -> Callable[Concatenate[Mapping[str, Any], P], R]:
    """Makes a function in which values that are sown are replaced by given ones.

    Args:
      fn: a function that calls `sow`, at any depth, inside any transformation.
      tag: which of them to replace.
      nested: whether the values are in a nested dict, as `reap` with ``nested=True`` gives it.
      allow: replaces only these; as for `reap`.
      block: does not replace these.

    Returns:
      A function ``(values, *args, **kwargs) -> fn(*args, **kwargs)``, where ``values`` is a dict
      from names to values as `reap` gives them: of the structure, shapes and dtypes that are sown,
      with a leading axis for the lanes of a ``vmap``, and for the steps of a ``scan`` with
      ``mode="append"``. In other modes every step of a loop gets the same value.

      A name that is not in ``values`` keeps its value, and one that is never sown does nothing.
      With `reap` around or inside, the planted values are those that are collected.

    Raises:
      PlantMismatchError: if a value has another structure, shape or dtype than what is sown, or
        another number of values with ``mode="append"``.
      TypeError: if ``values`` is no dict, or ``allow`` or ``block`` no list of names and paths.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> def f(x):
    ...     return jnp.square(jaxstate.sow("h", 3 * x))
    >>> float(jaxstate.plant(f)({"h": 5.0}, 1.0))
    25.0
    >>> float(jax.grad(lambda h: jaxstate.plant(f)({"h": h}, 1.0))(5.0))   # d out / d h
    10.0
    """

    check_runs_when_called(fn, "plant")
    scope = Scope.given("plant", tag, nested, allow, block)

    @functools.wraps(fn)
    def planted(values: Mapping[str, Any], /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise TypeError(f"plant wants a dict from names to values first, not {values!r}.")
        holder = _Plant(scope, values)
        with holder.opened():
            out = fn(*args, **kwargs)
            holder.check_counts()
            return out

    with suppress(TypeError, ValueError):  # not every function has a signature
        planted.__signature__ = _with_values(inspect.signature(fn))  # type: ignore[attr-defined]
    return planted


def _with_values(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a function that is given the planted values first."""
    values = inspect.Parameter("values", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[values, *signature.parameters.values()])
