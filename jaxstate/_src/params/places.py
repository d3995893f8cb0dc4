"""Where the program is, for the program: `path`, and what follows the path.

The modules and scopes that the program is in are known to it by name before their names are given
out (`paths.NameTables.path_now`). A jaxpr that was traced in one scope may be used in another. So
what depends on the path makes it a part of JAX's cache keys, as long as it is open (`following`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from jaxstate._src.core.boundaries import innermost_boundary
from jaxstate._src.core.slots import (
    Address,
    Holder,
    around_functions,
    open_holder,
    signature_changed,
    signature_parts,
)
from jaxstate._src.params.paths import Entered, Path, PathElement, Root, program

__all__ = ["following", "path", "path_of", "path_since"]


def path() -> tuple[str, ...]:
    """The modules and scopes that the program is in, by name, outermost first.

    In ``init`` and ``apply`` it begins with those that the program was in when it called them; what
    comes then is the path of the parameters that the program makes there. The layers of a `stack`
    are in ``(..., "stack", "layers")``.

    A module that has not used a parameter or variable yet has no name. It is told the one that it
    would get, which is another one only if a module of the same name comes before it with its
    first parameter.

    A function that is traced once and used in several scopes would say the path of the first. So
    from when this is first asked in a jaxpr that a module or scope is around, JAX traces functions
    once for each scope.

    >>> import jax, jaxstate
    >>> @jaxstate.parametrized
    ... def layer(x):
    ...     print("/".join(jaxstate.path()))
    ...     return x * jaxstate.param("w", jax.nn.initializers.ones, ())
    >>> @jaxstate.parametrized
    ... def net(x):
    ...     with jaxstate.scope("encoder"):
    ...         return layer(x)
    >>> y = net.apply({"encoder": {"layer": {"w": 2.0}}}, 1.0)
    encoder/layer
    """
    entries = program.entries
    if entries and not (program.followers or program.always_followed):
        boundary = innermost_boundary()
        if any(entered.place is not boundary for entered in entries):
            # This jaxpr may be used in another scope: from now on, it is traced again there.
            type(program).always_followed = True
    return path_of(entries)


def path_of(entries: Sequence[Entered]) -> Path:
    """The names of levels that the program is in, of all there are from the outermost."""
    names: Path = ()
    start = 0
    for i in range(len(entries), 0, -1):
        told = entries[i - 1].told
        if told is not None:
            names, start = told, i
            break
    for i in range(start + 1, len(entries) + 1):
        if i < len(entries):
            store = entries[i].store
            if store is entries[start].store and not isinstance(entries[i].level, Root):
                continue
        names += _names_in_store(entries[start:i])
        start = i
    return names


def _names_in_store(entries: Sequence[Entered]) -> Path:
    levels = [entered.level for entered in entries]
    if not levels or entries[0].store is None:
        return tuple([level.base for level in levels])
    store = entries[0].store
    return store.layers().path_now(levels, store.is_given)


def path_since(n: int) -> Path:
    """The path, relative to where the program was when it was in ``n`` levels."""
    before, now = path_of(program.entries[:n]), path_of(program.entries)
    return now[len(before) :] if now[: len(before)] == before else now


class _Follower(Holder):
    """Says that something open looks at the path of the program. (It has no slots.)

    Attributes:
      entries: where the program is in a function that runs later, as the rules of derivatives do;
        None where the program itself says it.
    """

    entries: list[Entered] | None = None

    def knows(self, address: Address) -> bool:
        return False

    def without_values(self) -> _Follower:
        follower, now = _Follower(), program.entries
        follower.entries = [_told(path_of(now[: i + 1])) for i in range(len(now))]
        return follower

    remains = without_values  # anew for each function


def _told(path: Path) -> Entered:
    entered = Entered(None, PathElement("", None), None)
    entered.told = path
    return entered


@contextmanager
def following() -> Iterator[None]:
    """For a while, functions are traced for each scope in which they are used."""
    with open_holder(_Follower()):
        program.followers += 1
        signature_changed()
        try:
            yield
        finally:
            program.followers -= 1
            signature_changed()


@contextmanager
def _where_it_was_called(holder: Holder) -> Iterator[None]:
    found = (h.entries for h in reversed(holder.below) if isinstance(h, _Follower))
    known = next((entries for entries in found if entries is not None), None)
    if known is None:
        yield
        return
    now, program.entries = program.entries, list(known)
    program.followers += 1
    try:
        yield
    finally:
        program.entries = now
        program.followers -= 1


around_functions.append(_where_it_was_called)


def _signature() -> Hashable:
    if not program.entries or not (program.followers or program.always_followed):
        return None
    # A jitted function that makes a module makes another one in its next call, with another name.
    # (Of names that are given out in a jaxpr under construction, nothing is left when it ends.)
    last = program.entries[-1]
    n = 0
    if last.store is not None:
        n = len(last.store.layer.paths)
        if last.boundary is not None:
            n += len(last.store.layer_of(last.boundary).paths)
    return "path", path_of(program.entries), n


signature_parts.append(_signature)
