"""Discharge: a jaxpr with state becomes one with slots as inputs and outputs.

    { lambda ; x. let n = state_read[count]          { lambda ; n x. let
                  k = fold_in key n           -->                k = fold_in key n
                  m = add n 1                                    m = add n 1
                  state_write[count] m                       in (y, m) }
              in (y,) }

Nothing is traced again: the results of ``state_read`` become inputs and the operand of the last
``state_write`` of each slot becomes an output. `state_of` says which slots a jaxpr uses, and
`discharge` makes the pure jaxpr; both are cached per jaxpr, so that a jaxpr used a thousand times
is compiled once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.core.contents import Addresses, contents_of, uses_slots
from jaxstate._src.core.initializers import addresses_of
from jaxstate._src.core.primitives import state_effect, write_p
from jaxstate._src.core.resolve import read_each, read_stored, write_each
from jaxstate._src.core.slots import Address
from jaxstate._src.core.uses import current_use
from jaxstate.errors import DeviceWriteError, HostCallbackError, SlotTypeError, message

__all__ = [
    "Layout",
    "binds",
    "check_place",
    "check_type",
    "discharge",
    "read_all",
    "read_as_stored",
    "watched",
    "write_all",
    "write_last",
    "written_meanwhile",
]


class Layout(NamedTuple):
    """Where slots are among the inputs and outputs of a jaxpr.

    Attributes:
      reads: slots to come in, in front of the other inputs.
      writes: slots to come in and go out.
      at: the number of other inputs in front of the incoming ``writes``.
      out_at: the number of other outputs in front of the outgoing ``writes``; None for all.
      out: whether the writes go out at all.
      lasts: slots to come in, behind the other inputs.
      outs: slots that only go out, behind the other outputs.
      once: whether the primitive runs the jaxpr once, or not at all.
      dropped: the inputs that are captures of ``writes`` (`superseded`); ``at`` counts them.
    """

    reads: Addresses
    writes: Addresses
    at: int = 0
    out_at: int | None = None
    out: bool = True
    lasts: Addresses = ()
    outs: Addresses = ()
    once: bool = False
    dropped: tuple[int, ...] = ()


def discharge(jaxpr: Any, how: Layout, avals: Sequence[Any]) -> Any:
    """The jaxpr with slots as inputs and outputs, and without state equations.

    Args:
      jaxpr: closed or open.
      how: which slots, and where among the inputs and outputs.
      avals: the types of ``how.reads + how.writes + how.lasts``, in that order.

    Returns:
      A jaxpr of the same kind. The same arguments give the same object, so it is compiled once.

    Raises:
      StateError: if a slot may not be used in a jaxpr that runs any number of times, and this one
        may (``how.once`` is False).
    """
    if not how.once:
        for address in how.reads + how.writes:
            address.check_repeats()
    return _thread(jaxpr, how, tuple(avals))


@_jax.weakref_lru_cache
def _thread(jaxpr: Any, how: Layout, avals: tuple[Any, ...]) -> Any:
    addresses = how.reads + how.writes + how.lasts
    incoming = {a: _jax.Var(aval) for a, aval in zip(addresses, avals, strict=True)}
    current: dict[Address, Any] = dict(incoming)
    inputs = list(_jax.invars(jaxpr))
    captured_reads = contents_of(jaxpr).captured_reads
    written = {*how.writes, *how.outs} if captured_reads else ()
    renamed: dict[Any, Any] = {}
    eqns = []

    def rename(atoms: Sequence[Any]) -> list[Any]:
        return [renamed[v] if type(v) is _jax.Var and v in renamed else v for v in atoms]

    def varying_like(like: Any, atom: Any) -> Any:
        """``atom`` as one that varies over the mesh axes over which ``like`` does."""
        if _jax.axes_of(like.aval) <= _jax.axes_of(atom.aval):
            return atom
        eqns.append(_jax.varying_equation(atom, _jax.axes_of(like.aval)))
        return eqns[-1].outvars[0]

    def in_mesh_of(like: Any, atom: Any) -> Any:
        """``atom`` as a value of the mesh of the type ``like``, or of that of the program."""
        if _jax.mesh_of(atom.aval) == _jax.mesh_of(like):
            return atom
        eqn = _jax.mesh_equation(atom, like)
        if eqn is None:
            return atom
        eqns.append(eqn)
        return eqn.outvars[0]

    def as_read(address: Address, outvar: Any) -> Any:
        """What a slot holds, of the mesh and axes of the variable that it is read into."""
        atom = current[address]
        if atom.aval is outvar.aval:
            return atom
        _check_axes(address, atom.aval, outvar.aval)
        return in_mesh_of(outvar.aval, varying_like(outvar, atom))

    def as_it_came(address: Address) -> Any:
        """What a slot holds at the end, of the mesh and sharding that it has at the start."""
        first, last = incoming[address], current[address]
        if last.aval is first.aval:
            return last
        last = in_mesh_of(first.aval, varying_like(first, last))
        if address.may_be_resharded and not _jax.same_sharding(first.aval, last.aval):
            eqns.append(_jax.resharding_equation(last, first.aval))
            last = eqns[-1].outvars[0]
        if not how.once:
            _check_turn(address, first.aval, last.aval)
            check_place(address, first.aval, last.aval, "the body of a loop")
        return last

    for i, eqn in enumerate(_jax.equations(jaxpr)):
        if eqn.primitive is write_p:
            current.update(zip(addresses_of(eqn), rename(eqn.invars), strict=True))
        elif i in captured_reads and addresses_of(eqn)[0] not in written:
            (renamed[eqn.outvars[0]],) = rename(eqn.invars)
        elif eqn.primitive in uses_slots:
            for address, outvar in zip(addresses_of(eqn), eqn.outvars, strict=True):
                renamed[outvar] = as_read(address, outvar)
        elif renamed:
            eqns.append(eqn.replace(invars=rename(eqn.invars)))
        else:
            eqns.append(eqn)

    reads = [incoming[a] for a in how.reads]
    writes = [incoming[a] for a in how.writes]
    lasts = [incoming[a] for a in how.lasts]
    outvars = rename(_jax.outvars(jaxpr))
    dropped = {inputs[i] for i in how.dropped}
    invars = [*reads, *inputs[: how.at], *writes, *inputs[how.at :], *lasts]
    invars = [v for v in invars if v not in dropped]
    if how.out:
        out_at = len(outvars) if how.out_at is None else how.out_at
        outvars[out_at:out_at] = [as_it_came(a) for a in how.writes]
    outvars += [in_mesh_of(None, current[a]) for a in how.outs]
    return _jax.remade(
        jaxpr, invars=invars, outvars=outvars, eqns=eqns, effs=jaxpr.effects - {state_effect}
    )


def _check_axes(address: Address, found: Any, wanted: Any) -> None:
    """A jaxpr traced with a value that is the same on all devices is right only for such."""
    if not address.has_axes:
        return
    axes = sorted(map(str, _jax.axes_of(found) - _jax.axes_of(wanted)))
    if axes:
        raise DeviceWriteError(
            message(
                f"{address} varies over the mesh axes {', '.join(axes)} here, and a function that"
                " was traced before, when it did not, is used again.",
                fix=f"""
                value = jax.lax.pcast(value, {tuple(axes)}, to="varying")   # before the first use
                """,
                used=_jax.user_location(),
            )
        )


def _check_turn(address: Address, first: Any, last: Any) -> None:
    """What a loop carries is, in every turn, the same on all devices or not."""
    axes = sorted(map(str, _jax.axes_of(last) - _jax.axes_of(first)))
    if axes:
        raise DeviceWriteError(
            message(
                f"The body of a loop in a shard_map wrote a value that varies over the mesh axes"
                f" {', '.join(axes)} into {address}, which did not vary before the loop.",
                fix=f"""
                value = jax.lax.pmean(value, {tuple(axes)})     # the same on all, or: before,
                value = jax.lax.pcast(value, {tuple(axes)}, to="varying")
                """,
                used=_jax.user_location(),
            )
        )


def check_place(address: Address, first: Any, last: Any, where: str) -> None:
    """What a loop carries, and what the branches of a ``cond`` return, is of one type: in the same
    memory, and sharded in the same way."""
    if _jax.same_place(first, last):
        return
    if first.memory_space != last.memory_space:
        mended = f"jax.device_put(value, jax.memory.Space.{first.memory_space.name})"
    else:
        mended = f"jax.sharding.reshard(value, jax.P{tuple(first.sharding.spec)})"
    raise SlotTypeError(
        message(
            f"{address} has type {_jax.shown(first)}, and {where} leaves a value of type"
            f" {_jax.shown(last)} in it.",
            fix=f"""
            value = {mended}     # before it is written
            """,
            used=_jax.user_location(),
        )
    )


def read_all(addresses: Sequence[Address]) -> list[Any]:
    """The current values of the slots that a jaxpr uses, in the place where a rule runs.

    Args:
      addresses: as `state_of` gives them.

    Returns:
      One array per address, typed as a jaxpr takes it.

    Raises:
      StateError: if nothing that is open here has such a slot, or its type is not the one for
        which the jaxpr was traced.
    """
    values = [_jax.canonicalize(value) for value in read_as_stored(addresses)]
    for address, value in zip(addresses, values, strict=True):
        if address.wanted is not None:
            check_type(address, address.wanted, value)
    return values


def read_as_stored(addresses: Iterable[Address]) -> list[Any]:
    """`read_all`, for a caller who sees to the types."""
    use = current_use()
    here = [address.renewed(use) for address in addresses]
    seen = _seen_here()
    if seen is not None:
        seen.update((a, read_stored(a)) for a in here if not a.in_objects)
    return read_each(here)


def _seen_here() -> dict[Address, Any] | None:
    """What was read for the compiled program that is run here. (JAX may trace a function when that
    has begun, and what is read in there is no matter of it.)"""
    return binds.seen if _jax.current_trace() is _jax.eval_trace else None


def check_type(address: Address, wanted: Any, value: Any) -> None:
    """Raises if the slot that ``address`` means here is not of the type that a jaxpr expects."""
    if wanted is not None and not _jax.same_type(value, wanted):
        raise address.renewed(current_use()).changed(wanted, value)


def write_all(addresses: Iterable[Address], values: Iterable[Any]) -> None:
    """Writes to the slots that a jaxpr uses, in the place where a rule runs.

    Args:
      addresses: as `state_of` gives them.
      values: one array per address.
    """
    use = current_use()
    here = [address.renewed(use) for address in addresses]
    seen = _seen_here() or {}
    for address in here if seen else ():
        if address in seen and read_stored(address) is not seen[address]:
            raise written_meanwhile(address)
    write_each(here, values)


def written_meanwhile(address: Address) -> Exception:
    """The error for a slot that a rule or call writes, and that somebody wrote since it was read:
    what runs is a compiled program."""
    return HostCallbackError(
        message(
            f"A slot ({address}) was changed while a compiled call (a jitted function, a loop, a"
            " branch) that uses it was running: by a function that the call runs on the host, or by"
            " another thread. The call would overwrite that.",
            fix="""
            key = jaxstate.next_key()                     # use the state in the jitted function,
            y = jax.pure_callback(f, shape, x, key)       # and give the host what it needs
            with lock: f(x)                               # for threads, a threading.Lock
            """,
            used=_jax.user_location(),
        )
    )


def write_last(addresses: Sequence[Address], outs: Sequence[Any]) -> list[Any]:
    """Writes the last results of a threaded equation to the slots, and returns the others.

    Args:
      addresses: as `state_of` gives them; the last ``len(addresses)`` results are theirs.
      outs: all results.

    Returns:
      The results that are not of slots, a list.
    """
    n = len(outs) - len(addresses)
    write_all(addresses, outs[n:])
    return list(outs[:n])


class _Binds(threading.local):
    """The binds of primitives with rules that are in progress.

    Attributes:
      depth: how many. What is traced meanwhile are jaxprs, and no functions of a program.
      seen: what was read of slots at top level, where the innermost one runs a compiled program;
        else None.
    """

    depth = 0
    seen: dict[Address, Any] | None = None


binds = _Binds()


@contextmanager
def watched(is_run: bool = True) -> Iterator[None]:
    """Where slots are read, a compiled program is run, and they are written: `write_all` raises if
    they were written since `read_all`. (Nothing is watched unless ``is_run``.)"""
    seen, binds.seen = binds.seen, {} if is_run else None
    try:
        yield
    finally:
        binds.seen = seen
