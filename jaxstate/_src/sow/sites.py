"""Sown values as slots: what the rules have to know of `sow.harvest`.

A value that is sown is an *event*: the n-th use of a name in the place where it happens (a jaxpr
under construction, or the ``reap`` itself). An event has one slot per leaf of its value. A ``reap``
is the holder of slots that are written, a ``plant`` of slots that are read; so everything that
carries slots carries sown values. Four things are special about them:

* The type is part of the address, so a slot exists before anything is written. Then it is zero.
* Going outwards, an address changes: a vmap, and with ``mode="append"`` a scan, gives the type a
  leading axis (`Site.over`), and the event gets the number that is next where the jaxpr is bound
  (`SownAddress.renewed`).
* How often an event may happen is checked where it is numbered, and by loops and branches
  (`Address.check_repeats`, `Address.check_absence`).
* A function with a custom derivative rule hands them out, and need not take them in.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.core.resolve import destination
from jaxstate._src.core.slots import Address, AllLanes, Holder, holders, open_holder
from jaxstate._src.params.paths import Path, program
from jaxstate._src.params.places import following, path_since
from jaxstate.errors import (
    BranchSowError,
    ClosedStateError,
    RepeatedSowError,
    SowMismatchError,
    UnsupportedPrimitiveError,
    message,
)

__all__ = [
    "Scope",
    "Site",
    "SownAddress",
    "SownHolder",
    "holder_of",
    "numbered",
    "placed_like",
    "reaps_inside",
    "types_of",
]

Kind = Literal["reap", "plant"]
CLOBBER = ("clobber", "cond_clobber")


class Site(NamedTuple):
    """One use of ``sow``, as seen by one ``reap`` or ``plant``.

    Attributes:
      tree: structure of the value.
      types: of the leaves, with the axes of the loops and lanes inside.
      n: how many events of the name were before it in the same place.
      reaps: for ``plant``, how many calls of ``reap`` inside of it are around the event. What they
        hand on may be sown again, as another event.
      path: of the module or scope that sows, for a ``reap`` or ``plant`` that is nested.
      at: the `SownHolder.ordinal` of that ``reap`` or ``plant``, if it is not the innermost one
        that may want the name.
    """

    kind: Kind
    tag: str
    name: str
    mode: str
    tree: Any
    types: tuple[Any, ...]
    n: int = 0
    reaps: int = 0
    path: Path | None = None
    at: int | None = None

    def over(self, *sizes: int) -> Site:
        """The event as seen from outside of loops or lanes."""
        types = [_jax.ShapedArray((*sizes, *t.shape), t.dtype) for t in self.types]
        return self._replace(types=tuple(types))

    def addresses(self, made: str) -> list[SownAddress]:
        """One address per leaf."""
        return [SownAddress(self, leaf, made) for leaf in range(len(self.types))]

    def full_name(self) -> str:
        """The name, after the path if there is one."""
        return "/".join((*(self.path or ()), self.name))

    def shown(self) -> str:
        """The value's structure, with the types of the leaves."""
        leaves = [_Shown(t.str_short()) for t in self.types]
        return str(self.tree.unflatten(leaves[: self.tree.num_leaves]))


class Scope(NamedTuple):
    """What a ``reap`` or ``plant`` is about.

    Attributes:
      tag: which calls of ``sow``.
      nested: whether values are in a nested dict, by path.
      allow: paths that are wanted, or None for all.
      block: paths that are not.
    """

    tag: str
    nested: bool
    allow: tuple[Path, ...] | None
    block: tuple[Path, ...]

    @classmethod
    def given(cls, function: str, tag: str, nested: bool, allow: Any, block: Any) -> Scope:
        """From the arguments of ``reap`` or ``plant``."""
        check_tag(function, tag)
        return cls(
            tag,
            nested,
            None if allow is None else _paths(function, "allow", allow),
            () if block is None else _paths(function, "block", block),
        )

    @property
    def chooses(self) -> bool:
        return self.allow is not None or bool(self.block)

    def wants(self, path: Path) -> bool:
        """Whether a value of that path and name is wanted."""

        def is_listed(paths: tuple[Path, ...]) -> bool:
            return any(p == path[-1:] or p == path[: len(p)] for p in paths)

        return (self.allow is None or is_listed(self.allow)) and not is_listed(self.block)


def check_tag(function: str, tag: Any) -> None:
    if not isinstance(tag, str):
        shown = f"out, sown = jaxstate.{function}(f)(x)"
        if function == "plant":
            shown = "out = jaxstate.plant(f)(values, x)"
        elif function == "sow":
            shown = 'jaxstate.sow("hidden", value, tag="sown")'
        raise TypeError(
            f"{function} wants a string as tag, and was given {tag!r}.\nTo mend it:\n    {shown}"
        )


def _paths(function: str, argument: str, given: Any) -> tuple[Path, ...]:
    is_list = not isinstance(given, str) and isinstance(given, Iterable)
    paths = tuple(given) if is_list else None
    if paths is None or not all(isinstance(p, (str, tuple)) for p in paths):
        raise TypeError(
            f"{function} wants a list of names and paths as {argument}, and was given {given!r}.\n"
            f'To mend it:\n    jaxstate.{function}(f, {argument}=["hidden", "encoder/dense"])'
        )
    return tuple([tuple(p.split("/")) if isinstance(p, str) else p for p in paths])


def types_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Shape and dtype of arrays, and nothing else of their types."""
    avals = map(_jax.typeof, leaves)
    return tuple(_jax.ShapedArray(aval.shape, aval.dtype) for aval in avals)


def holder_of(kind: Kind, tag: str, name: str) -> tuple[SownHolder, int | None] | None:
    """The innermost ``reap`` or ``plant`` that is open and wants what is sown here, and `Site.at`.

    It is asked where the value is sown: only there is all of its path known.
    """
    passed = False
    for holder in holders():
        if isinstance(holder, SownHolder) and (holder.kind, holder.tag) == (kind, tag):
            if holder.wants(name):
                return holder, holder.ordinal if passed else None
            passed = passed or holder.may_want(name)
    return None


def reaps_inside(plant: Holder, tag: str) -> int:
    """How many calls of ``reap`` that take what is sown under the tag are inside of ``plant``."""
    address = SownAddress(Site("reap", tag, "", "", None, ()), 0, "")
    return sum(h.knows(address) for h in itertools.takewhile(lambda h: h is not plant, holders()))


class _Shown(str):
    """A text that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class SownAddress(Address):
    """One leaf of an event. ``made`` says where, for messages."""

    __slots__ = ("leaf", "made", "site")

    threaded = True
    given_if_read = True
    may_be_resharded = True  # before the first value a slot is zero, and sharded in no way

    def __init__(self, site: Site, leaf: int, made: str) -> None:
        self.site = site
        self.leaf = leaf
        self.made = made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SownAddress):
            return False
        return self.leaf == other.leaf and self.site == other.site

    def __hash__(self) -> int:
        return hash((self.site, self.leaf))

    def __repr__(self) -> str:
        return f"the value sown as {self.site.full_name()!r}"

    @property
    def per_step(self) -> Hashable:  # type: ignore[override]
        site = self.site
        if site.mode != "append":
            return None
        return site.kind, site.tag, site.path, site.at, site.name, site.reaps, self.leaf

    def aval(self) -> Any:
        return self.site.types[self.leaf]

    def over(self, *sizes: int) -> SownAddress:
        return SownAddress(self.site.over(*sizes), self.leaf, self.made)

    def renewed(self, use: dict[Any, Any] | None) -> SownAddress:
        """The address with the event's number in the place where its jaxpr is used."""
        key = "sown", self.site
        site = use.get(key) if use is not None else None
        if site is None:
            site = numbered(self.site, self.made, None if use is not None else self.leaf)
        if use is not None:
            use[key] = site
        return SownAddress(site, self.leaf, self.made)

    def missing(self) -> Exception:
        what = "reap" if self.site.kind == "reap" else "plant"
        return ClosedStateError(
            message(
                f"A jaxpr that was made inside jaxstate.{what}, and sows {self.site.name!r}, is"
                " used outside of it.",
                fix=f"""
                jaxpr = jax.make_jaxpr(f)(x)        # outside, where sow does nothing,
                jaxstate.{what}(use)(...)           # or evaluate it inside, tag={self.site.tag!r}
                """,
                made=self.made,
                used=_jax.user_location(),
            )
        )

    def check_repeats(self) -> None:
        mode, name = self.site.mode, self.site.name
        if mode in CLOBBER:
            return
        if mode == "strict":
            what, where = f"{name!r} was sown with mode='strict' in a loop", "that may run it again"
            better = '"append"      # in a scan: one value per step, stacked'
        else:
            what = f"{name!r} was sown with mode='append' in a while_loop"
            where = "whose number of steps is not known, so there is no shape to stack them to"
            better = '"clobber"     # keeps the last value'
        raise RepeatedSowError(
            message(
                f"{what} (or in another primitive {where}).",
                fix=f"""
                jaxstate.sow({name!r}, value, mode={better})
                """,
                made=self.made,
                used=_jax.user_location(),
            )
        )

    def check_absence(self, others: Sequence[Address]) -> None:
        mode, name = self.site.mode, self.site.name
        found = (a.site for a in others if isinstance(a, SownAddress))
        key = self.site._replace(types=(), tree=None, n=0)
        same = (e for e in found if e._replace(types=(), tree=None, n=0) == key)
        other = next(
            (e for e in same if (e.tree, e.types) != (self.site.tree, self.site.types)), None
        )
        if mode == "cond_clobber" and other is None:
            return
        absent = "and not in another (or not as often)"
        if other is not None:
            absent = f"and as {other.shown()} in another"
        clobber = f'jaxstate.sow({name!r}, value, mode="cond_clobber")'
        better = f'jaxstate.sow({name + "_1"!r}, value, mode="cond_clobber")'
        raise BranchSowError(
            message(
                f"{name!r} was sown with mode={mode!r} as {self.site.shown()} in one branch of a"
                f" cond or switch, {absent}.",
                fix=f"""
                {clobber}     # zeros if no branch sows it
                """
                if other is None
                else f"""
                {clobber}       # in one branch,
                {better}     # and with another name in the other
                """,
                made=self.made,
                used=_jax.user_location(),
            )
        )


class SownHolder(Holder):
    """What ``reap`` and ``plant`` have in common.

    In a vmap every lane sows its own value, and outside all of them are one slot.

    Attributes:
      depth: in how many modules and scopes the program was when it was opened.
      ordinal: how many of its kind and tag were open before.
    """

    kind: Kind

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.scope = scope
        self.tag = scope.tag
        self.depth = len(program.entries)
        same = (self.kind, self.tag)
        self.ordinal = sum(isinstance(h, SownHolder) and (h.kind, h.tag) == same for h in holders())

    def knows(self, address: Address) -> bool:
        if not isinstance(address, SownAddress):
            return False
        site = address.site
        if (site.kind, site.tag) != (self.kind, self.tag):
            return False
        return self.may_want(site.name) if site.at is None else site.at == self.ordinal

    def may_want(self, name: str) -> bool:
        """Whether it wants the name, wherever it is sown."""
        return True

    def wants(self, name: str) -> bool:
        """Whether it wants the name, sown here."""
        if not self.may_want(name):
            return False
        return not self.scope.chooses or self.scope.wants((*self.path(), name))

    def path(self) -> Path:
        """The path of the program, relative to where the function was called."""
        return path_since(self.depth)

    def opened(self) -> ExitStack:
        """A context in which it is open."""
        stack = ExitStack()
        stack.enter_context(open_holder(self))
        if self.scope.nested or self.scope.chooses:
            stack.enter_context(following())
        return stack

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> AllLanes | None:
        assert isinstance(address, SownAddress)
        if _jax.lanes_are_directions(trace):
            return None
        return AllLanes(address.over(_jax.lane_count(trace)))

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return UnsupportedPrimitiveError(
            message(
                f"{address} depends on the direction of the derivative that jax.jacfwd or"
                " jax.hessian is computing.",
                fix="""
                jax.jacrev(f)(x)        # sows one value
                """,
                used=_jax.user_location(),
            )
        )


def placed_like(holder: SownHolder, copy: Any) -> Any:
    """``copy``, which stands for ``holder`` elsewhere."""
    copy.depth, copy.ordinal = holder.depth, holder.ordinal
    return copy


# -- Numbers ---------------------------------------------------------------------------------


class _Record:
    """The events of one name in one place."""

    def __init__(self, site: Site, outside: Site, made: str) -> None:
        self.mode = site.mode
        self.tree = site.tree
        self.outside = outside
        self.made = made
        self.count = 0
        self.last: tuple[Site, int] | None = None


def numbered(site: Site, made: str, leaf: int | None = None) -> Site:
    """The event with the number that is next in the place where its slots are.

    ``leaf`` is given for one leaf of an event in a jaxpr that is evaluated equation by equation:
    the leaves of one event come one after the other.

    Raises:
      RepeatedSowError: if the name has been sown before, and may not be again.
      SowMismatchError: if it has been sown with another mode or type.
    """
    notes, vmaps = destination(SownAddress(site, 0, made).holder())
    lanes = [_jax.lane_count(t) for t in vmaps if not _jax.lanes_are_directions(t)]
    outside = site.over(*reversed(lanes))._replace(n=0)
    key = "sown", site.kind, site.tag, site.path, site.at, site.name, site.reaps
    record = notes.get(key)
    if record is None:
        record = notes[key] = _Record(site, outside, made)
    if outside != record.outside:
        raise _mismatch(record, outside, made)
    if leaf is not None:
        last, record.last = record.last, (site, leaf)
        if last is not None and last[0] == site and last[1] < leaf:
            return site._replace(n=max(record.count - 1, 0))
    if site.mode in CLOBBER:
        return site._replace(n=0)
    if site.mode == "strict" and site.reaps:
        return site._replace(n=0)  # the ``reap`` counts
    if site.mode == "strict" and record.count:
        raise _repeated(site, record, made)
    record.count += 1
    return site._replace(n=record.count - 1)


def _repeated(site: Site, record: _Record, made: str) -> Exception:
    return RepeatedSowError(
        message(
            f"{site.full_name()!r} was sown twice with mode='strict'.",
            fix=f"""
            jaxstate.sow({site.name!r}, value, mode="append")      # keeps all values, stacked
            jaxstate.sow({site.name!r}, value, mode="clobber")     # keeps the last
            jaxstate.sow({site.name + "_1"!r}, value)              # another name
            """,
            made=record.made,
            again=made,
            used=_jax.user_location(),
        )
    )


def _mismatch(record: _Record, site: Site, made: str) -> Exception:
    before = record.outside
    if before.mode != site.mode:
        what = f"with mode={before.mode!r} and with mode={site.mode!r}"
    else:
        what = f"as {before.shown()} and as {site.shown()}"
    return SowMismatchError(
        message(
            f"{site.full_name()!r} was sown {what}.",
            fix=f"""
            jaxstate.sow({site.name!r}, value, mode={before.mode!r})     # of one type
            jaxstate.sow({site.name + "_1"!r}, value)                    # or another name
            """,
            made=record.made,
            again=made,
            used=_jax.user_location(),
        )
    )
