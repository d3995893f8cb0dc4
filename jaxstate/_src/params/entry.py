"""What is known of one parameter or variable, and where the program is that uses it."""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.memory import cell_of
from jaxstate._src.core.notes import notes_of
from jaxstate._src.core.resolve import read_at
from jaxstate._src.core.slots import Cell, Holder
from jaxstate._src.core.specs import Leaf, Spec
from jaxstate._src.params.paths import FrameId, NameTables, Path, PathElement
from jaxstate.errors import ClosedStateError, NameClashError, message

__all__ = [
    "OUTSIDE", "Entry", "Located", "Use", "current_home", "home_of", "made_and_kept",
    "made_and_over",
]  # fmt: skip


OUTSIDE = FrameId()  # outside of any boundary: directly in the store


def home_of(boundary: Any) -> FrameId:
    """The home of what is made inside a boundary; None stands for the store itself."""
    if boundary is None:
        return OUTSIDE
    extra = boundary.extra if isinstance(boundary, Holder) else notes_of(boundary).extra
    frame = extra.get(FrameId)
    return extra.setdefault(FrameId, FrameId()) if frame is None else frame


def current_home() -> FrameId | None:
    """The home of what is made here; None outside of any jaxpr under construction."""
    here = _jax.current_trace()
    for trace in () if here is _jax.eval_trace else _jax.chain(here):
        if isinstance(trace, _jax.StagingTrace):
            return home_of(trace)
    return None


class Entry:
    """What is known of one parameter or variable: path, form, who used it first, leaves.

    The form is None if only a leaf was used so far, by a jaxpr that expects a form. The metadata is
    None if nobody gave any, or nobody looks at it.
    """

    __slots__ = (
        "__weakref__",
        "cells",
        "expected",
        "initial",
        "kind",
        "metadata",
        "path",
        "spec",
        "used",
    )

    def __init__(
        self, kind: str, path: Path, spec: Spec | None, expected: Spec | None, used: str
    ) -> None:
        self.kind = kind
        self.metadata: Any = None
        self.path = path
        self.spec = spec
        self.expected = expected
        self.used = used
        self.cells: dict[Leaf, Cell] = {}
        self.initial: dict[Leaf, Any] = {}

    def new_cell(self, value: Any) -> Cell:
        """A cell of it. What the program writes may be written in its memory."""
        return cell_of(value, _jax.typeof(value)) if self.kind == "variable" else Cell(value)

    def without_values(self) -> Entry:
        """A new entry of which the same is known."""
        entry = Entry(self.kind, self.path, self.spec, self.expected, self.used)
        entry.metadata = self.metadata
        return entry


class Located:
    """Where an address is, seen from the program.

    Attributes:
      here: whether nothing of JAX stands between the program and the store (`Store.is_here`).
      layers: the names visible to the program.
      path: of the entry, among these.
    """

    __slots__ = ("here", "layers", "path")  # (a NamedTuple takes longer to make)

    def __init__(self, here: bool, layers: NameTables, path: Path) -> None:
        self.here = here
        self.layers = layers
        self.path = path


class Use:
    """One use of a parameter or variable by the program.

    Attributes:
      form: of the entry.
      addresses: of its leaves.
      entry: the entry, if the store is here (`Store.is_here`) and has the cells of all leaves.
    """

    __slots__ = ("addresses", "entry", "spec")

    def __init__(self, spec: Spec, addresses: list[Any], entry: Entry | None) -> None:
        self.spec = spec
        self.addresses = addresses
        self.entry = entry

    def values(self) -> list[Any]:
        """The current values of the leaves."""
        if self.entry is None:
            return [read_at(a) for a in self.addresses]
        cells = self.entry.cells
        return [cells[a.leaf].value for a in self.addresses]


def made_and_kept(level: PathElement) -> Exception:
    return NameClashError(
        message(
            f"A module {level.base!r} that an earlier call of a module made, and that is kept, is"
            " used after this call of that module has made another one. They would be the same: the"
            " first one of a name that a call makes is the same module in each call.",
            fix="""
            layer = dense(8)                # what is kept: outside, or in __init__
            def block(x): return layer(x)
            """,
            used=_jax.user_location(),
        )
    )


def made_and_over(address: Any) -> Exception:
    return ClosedStateError(
        message(
            f"{address} was made inside a transformed function that has ended.",
            fix=f"""
            {address.name} = jaxstate.variable("{address.name}", ...)   # the same one, here
            """,
            used=address.used,
        )
    )
