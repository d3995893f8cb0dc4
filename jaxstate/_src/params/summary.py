"""Summaries: what a network's parameters are, and what comes out of its parts.

    print(jaxstate.summary(params))          # path, shape, dtype, size in bytes, sharding
    print(net.summary(key, x))               # the same before there are any; outputs per scope

A summary is data (`Summary.rows`, `Summary.scopes`) that prints as a table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import boundaries
from jaxstate._src.core.slots import open_holder
from jaxstate._src.params.arguments import split_arrays
from jaxstate._src.params.folded_streams import FoldedStreams
from jaxstate._src.params.names import nested
from jaxstate._src.params.nests import room_for_nests
from jaxstate._src.params.observing import ObservingStore
from jaxstate._src.params.paths import ModuleId, Path
from jaxstate._src.streams.keys import check_key
from jaxstate.errors import called_as

__all__ = ["ParameterRow", "ScopeRow", "Summarizable", "Summary", "summary"]


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One array.

    Attributes:
      path: names, joined with slashes.
      shape: as of the array.
      dtype: as of the array.
      size: the number of elements.
      bytes: all of the array takes; of what is replicated, one copy.
      sharding: a `jax.sharding.Sharding`, or None if it has none yet.
      device_bytes: what one device holds.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    size: int
    bytes: int
    sharding: jax.sharding.Sharding | None
    device_bytes: int


@dataclasses.dataclass(frozen=True)
class ScopeRow:
    """One call of a module, with results of certain shapes.

    Attributes:
      path: of the module; empty for the network itself.
      output: what it returns, with a `jax.ShapeDtypeStruct` for each array.
      size: the number of elements of the parameters in this scope.
      bytes: what these take.
    """

    path: str
    output: Any
    size: int
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """What `summary` gives. Prints as a table.

    Attributes:
      rows: one `ParameterRow` for each array.
      scopes: one `ScopeRow` for each call of a module, in the order in which they return; the
        network itself is the last. Empty for a summary of parameters alone.
    """

    rows: tuple[ParameterRow, ...]
    scopes: tuple[ScopeRow, ...] = ()

    @property
    def total_size(self) -> int:
        """The number of elements of all arrays."""
        return sum(row.size for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """What all arrays take."""
        return sum(row.bytes for row in self.rows)

    @property
    def total_device_bytes(self) -> int:
        """What one device holds of all arrays."""
        return sum(row.device_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [
            ("parameter", "type", "elements", "bytes", "sharding"),
            *(
                (r.path, _type(r.shape, r.dtype), f"{r.size:,}", f"{r.bytes:,}", _sharding(r))
                for r in self.rows
            ),
            ("total", "", f"{self.total_size:,}", f"{self.total_bytes:,}", self._per_device()),
        ]
        tables = [_table(lines, right=(2, 3))]
        if self.scopes:
            calls = [
                (r.path or "(all)", _output(r.output), f"{r.size:,}", f"{r.bytes:,}")
                for r in self.scopes
            ]
            header = ("scope", "output", "elements", "bytes")
            tables.insert(0, _table([header, *calls], right=(2, 3)))
        return "\n\n".join(tables)

    __repr__ = __str__

    def _per_device(self) -> str:
        held = self.total_device_bytes
        return "" if held == self.total_bytes else f"{held:,} bytes per device"


@called_as("print(jaxstate.summary(params))\nprint(net.summary(key, x))      # of a network")
def summary(params: Any) -> Summary:
    """What a tree of parameters is made of.

    Args:
      params: a tree of arrays, or of `jax.ShapeDtypeStruct`s (as `jax.eval_shape` gives).

    Returns:
      A `Summary` with one row for each array. Prints as a table.

    >>> import jax.numpy as jnp, jaxstate
    >>> s = jaxstate.summary({"dense": {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))}})
    >>> [(row.path, row.shape, row.bytes) for row in s.rows], s.total_bytes
    ([('dense/b', (3,), 12), ('dense/w', (2, 3), 24)], 36)
    """
    if isinstance(params, Summarizable):
        raise TypeError(
            f"summary wants a tree of parameters, and was given {params!r}.\n"
            "To mend it:\n    print(net.summary(key, x))\n    print(jaxstate.summary(params))"
        )
    pairs = jax.tree_util.tree_leaves_with_path(params)
    return Summary(tuple(_row(jax.tree_util.keystr(p, simple=True, separator="/"), x)
                         for p, x in pairs))  # fmt: skip


def _row(path: str, x: Any) -> ParameterRow:
    aval = _jax.typeof(x) if _jax.is_array_like(x) else _jax.aval_of(x)
    itemsize = aval.dtype.itemsize
    sharding = None if isinstance(x, _jax.Tracer) else getattr(x, "sharding", None)
    shard = aval.shape if sharding is None else sharding.shard_shape(aval.shape)
    size = math.prod(aval.shape)
    return ParameterRow(
        path, aval.shape, aval.dtype, size, size * itemsize, sharding, math.prod(shard) * itemsize
    )


# -- Of a network ----------------------------------------------------------------------------


class Summarizable:
    """What a parametrized object can say of itself before there are parameters."""

    _as_called: Callable[..., Any]
    _explain: Callable[..., Any]
    _token: ModuleId

    @called_as("print(net.summary(key, x))")
    def summary(self, key: Any, *args: Any, **kwargs: Any) -> Summary:
        """The parameters that ``init`` would make, and the outputs of all modules.

        Nothing is computed: the function is traced.

        Args:
          key: as for ``init``.
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.

        Returns:
          A `Summary`. A module that is called several times has one row for each form of its
          output; inside a ``vmap``, the form is that of one lane.

        Raises:
          Whatever ``init`` raises.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> @jaxstate.parametrized
        ... def scale(x):
        ...     return x * jaxstate.param("s", jax.nn.initializers.ones, x.shape)
        >>> net = jaxstate.parametrized(lambda x: scale(x).sum(), name="net")
        >>> print(net.summary(jax.random.key(0), jnp.ones(3)))
        scope  output      elements  bytes
        scale  float32[3]         3     12
        (all)  float32[]          3     12
        <BLANKLINE>
        parameter  type        elements  bytes  sharding
        scale/s    float32[3]         3     12
        total                         3     12
        """
        if isinstance(key, Mapping):
            key = key.get("params", key.get("default", key))
        key = check_key(key, "summary")
        arrays, rebuild, _ = split_arrays((args, kwargs))
        calls: list[tuple[Path, Any]] = []

        def forward(key: Any, arrays: Any) -> dict[Path, Any]:
            args, kwargs = rebuild(arrays)
            store = _SummaryStore(self._token, key, calls)
            with (
                open_holder(store),
                open_holder(FoldedStreams(key)),
                store.root_entered(self),
                room_for_nests(),
            ):
                try:
                    calls.append(((), _shapes(self._as_called(None)(*args, **kwargs))))
                except Exception as error:
                    self._explain(error, "summary", args, kwargs)
                    raise
            return store.initial_values("parameter")

        with jax.disable_jit(False):  # every branch is traced
            params = jax.eval_shape(forward, key, arrays)
        rows = summary(nested(params)).rows
        return Summary(rows, tuple(_scope_row(path, out, rows) for path, out in _distinct(calls)))


class _SummaryStore(ObservingStore):
    """Parameters that are made to see their types."""

    def __init__(self, root: ModuleId, key: Any, calls: list[tuple[Path, Any]]) -> None:
        super().__init__(root, key)
        self.calls = calls

    looks_at_calls = True

    def returned(self, out: Any) -> None:
        levels = self.scopes.inside(None, *boundaries(self))
        self.calls.append((self.layers().known_path_of(levels), _shapes(out)))


def _shapes(out: Any) -> Any:
    def shape(x: Any) -> Any:
        if not _jax.is_array_like(x):
            return x
        aval = _jax.typeof(x)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return jax.tree.map(shape, out)


def _distinct(calls: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    distinct: list[tuple[Path, Any]] = []
    for path, out in calls:
        shown = _output(out)
        if not any(path == p and shown == _output(o) for p, o in distinct):
            distinct.append((path, out))
    return distinct


def _scope_row(path: Path, out: Any, rows: Sequence[ParameterRow]) -> ScopeRow:
    name = "/".join(path)
    inside = [row for row in rows if not path or row.path.startswith(name + "/")]
    return ScopeRow(name, out, sum(r.size for r in inside), sum(r.bytes for r in inside))


# -- Printing --------------------------------------------------------------------------------


def _type(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]"


def _output(out: Any) -> str:
    def shown(x: Any) -> Any:
        return _Text(_type(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else repr(x))

    return repr(jax.tree.map(shown, out))


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _sharding(row: ParameterRow) -> str:
    sharding = row.sharding
    if isinstance(sharding, NamedSharding):
        return str(sharding.spec)
    if sharding is None or len(sharding.device_set) == 1:
        return ""
    return str(sharding)


def _table(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def cell(text: str, i: int) -> str:
        return text.rjust(widths[i]) if i in right else text.ljust(widths[i])

    return "\n".join("  ".join(cell(t, i) for i, t in enumerate(line)).rstrip() for line in lines)
