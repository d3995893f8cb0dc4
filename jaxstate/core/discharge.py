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

A higher-order primitive becomes stateful with a rule: a function that is called instead of the
bind when a jaxpr among the parameters has state. It reads the slots where it is called, binds the
same primitive with pure jaxprs, and writes the results back. This happens at the first contact,
under whatever trace is current: no transformation of JAX ever sees a jaxpr with state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxstate import _jax
from jaxstate.core.capture import StateTracer
from jaxstate.core.initializers import addresses_of, init_p
from jaxstate.core.resolve import (
    begin_use,
    current_use,
    end_use,
    read_each,
    read_p,
    read_since,
    read_stored,
    state_effect,
    write_each,
    write_p,
)
from jaxstate.core.slots import Address, any_known, any_open
from jaxstate.errors import (
    DeviceWriteError,
    HostCallbackError,
    SlotTypeError,
    UnsupportedPrimitiveError,
    message,
)

__all__ = ["State", "discharge", "read_all", "register_rule", "state_of", "write_all", "write_last"]

Addresses = tuple[Address, ...]


class State(NamedTuple):
    """The slots that a jaxpr uses and that are no inputs or outputs of it yet."""

    reads: Addresses  # read, never written
    writes: Addresses  # written, and perhaps read

    def __bool__(self) -> bool:
        return bool(self.reads or self.writes)


stateless = State((), ())


def state_of(jaxpr: Any) -> State:
    """The slots that a jaxpr uses.

    Args:
      jaxpr: closed or open.

    Returns:
      ``(reads, writes)``, two tuples of addresses: slots that are only read, and those that are
      written.

    Raises:
      UnsupportedPrimitiveError: if an equation of the jaxpr has state and no rule.
    """
    return _contents(jaxpr).state if state_effect in jaxpr.effects else stateless


def state_of_all(jaxprs: Iterable[Any]) -> State:
    """The slots that several jaxprs use, as one state."""
    states = [state_of(jaxpr) for jaxpr in jaxprs]
    if len(states) == 1:
        return states[0]
    writes = dict.fromkeys([a for s in states for a in s.writes])
    reads = dict.fromkeys([a for s in states for a in s.reads if a not in writes])
    return State(tuple(reads), tuple(writes))


class Captured(NamedTuple):
    """An input of a jaxpr that is the capture of a slot which may be written."""

    at: int
    address: Address
    version: int


class Computed(NamedTuple):
    """A read of a slot whose capture a jaxpr makes of its inputs."""

    eqn: int  # its number
    address: Address
    version: int


class _Contents(NamedTuple):
    """What the equations of a jaxpr do with slots.

    Attributes:
      state: the slots that are no inputs or outputs.
      order: all slots, in the order of first use.
      replaced: those that are written and not read.
      captures: see `_captures_of`.
      captured_reads: the numbers of the equations that read a slot of which an input of the jaxpr
        is the capture.
      captured: these inputs.
      computed: the other reads with an operand.
    """

    state: State
    order: Addresses
    replaced: frozenset[Address]
    captures: dict[Any, Any]
    captured_reads: frozenset[int]
    captured: tuple[Captured, ...]
    computed: tuple[Computed, ...]


_uses_slots = frozenset({read_p, init_p, write_p})


@_jax.weakref_lru_cache
def _contents(jaxpr: Any) -> _Contents:
    order: dict[Address, None] = {}
    read: dict[Address, None] = {}
    reads: dict[Address, None] = {}
    writes: dict[Address, None] = {}
    of_captures = []
    for i, eqn in enumerate(_jax.equations(jaxpr)):
        if eqn.primitive in _uses_slots:
            is_captured = eqn.primitive is read_p and bool(eqn.invars)
            if is_captured:
                of_captures.append((i, eqn))
            for address in addresses_of(eqn):
                order[address] = None
                if eqn.primitive is write_p:
                    writes[address] = None
                else:
                    read[address] = None
                    if not is_captured:
                        reads[address] = None
        elif eqn.effects and state_effect in eqn.effects:
            jaxprs = _jax.jaxprs_in(eqn.params)
            raise _no_rule(eqn.primitive.name, jaxprs, _jax.location_of(eqn))
    captures = _captures_of(jaxpr, [eqn for _, eqn in of_captures], writes)
    captured_reads, captured, computed = set(), [], []
    places = {v: i for i, v in enumerate(_jax.invars(jaxpr))} if of_captures else {}
    for i, eqn in of_captures:
        address, version, (operand,) = eqn.params["address"], eqn.params["version"], eqn.invars
        if isinstance(operand, _jax.Var) and operand in captures:
            captured_reads.add(i)
            if captures[operand] in places:
                captured.append(Captured(places[captures[operand]], address, version))
        else:
            reads[address] = None
            computed.append(Computed(i, address, version))
    return _Contents(
        State(tuple([a for a in reads if a not in writes]), tuple(writes)),
        tuple(order),
        frozenset([a for a in writes if a not in read]),
        captures,
        frozenset(captured_reads),
        tuple(captured),
        tuple(computed),
    )


def _captures_of(jaxpr: Any, reads: Iterable[Any], written: Collection[Address]) -> dict[Any, Any]:
    """The inputs of a jaxpr, and what is read of slots of which they are the captures: variable ->
    input. What is read may be an operand of the next such read: an argument that can be written.

    Args:
      reads: the equations of the jaxpr that read a slot and have an operand.
      written: slots that are written while the jaxpr is used.
    """
    constants = _jax.constvars(jaxpr)
    if _jax.is_closed(jaxpr):  # a value among them is read anew, as nothing depends on it
        pairs = zip(constants, _jax.consts_of(jaxpr), strict=True)
        constants = [v for v, c in pairs if type(c) is StateTracer]
    captures: dict[Any, Any] = {v: v for v in (*constants, *_jax.invars(jaxpr))}
    for eqn in reads:
        if eqn.params["address"] not in written:
            operand = eqn.invars[0]
            if isinstance(operand, _jax.Var) and operand in captures:
                captures[eqn.outvars[0]] = captures[operand]
    return captures


def settled_captures(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an equation, without the reads that are what was captured for certain."""
    stateful = [j for j in _jax.jaxprs_in(params) if state_effect in j.effects]
    if not any(_contents(jaxpr).computed for jaxpr in stateful):
        return params
    if _jax.may_run_again(_jax.current_trace()):
        return params  # what comes later may write before this runs again
    writes, use = state_of_all(stateful).writes, current_use()

    def settled(jaxpr: Any) -> Any:
        current = tuple(
            i
            for i, address, version in _contents(jaxpr).computed
            if address not in writes and address.renewed(use).version() == version
        )
        return _without_reads(jaxpr, current) if current else jaxpr

    return _jax.with_jaxprs(params, settled)


@_jax.weakref_lru_cache
def _without_reads(jaxpr: Any, numbers: tuple[int, ...]) -> Any:
    """The jaxpr with the operands of some of its reads in the place of their results."""
    eqns = _jax.equations(jaxpr)
    renamed = {eqns[i].outvars[0]: eqns[i].invars[0] for i in numbers}

    def rename(atom: Any) -> Any:
        return renamed.get(atom, atom) if isinstance(atom, _jax.Var) else atom

    kept = [
        eqn.replace(invars=[rename(v) for v in eqn.invars])
        for i, eqn in enumerate(eqns)
        if i not in numbers
    ]
    has_state = any(state_effect in eqn.effects for eqn in kept)
    return _jax.remade(
        jaxpr, invars=_jax.invars(jaxpr), outvars=[rename(v) for v in _jax.outvars(jaxpr)],
        eqns=kept, effs=jaxpr.effects if has_state else jaxpr.effects - {state_effect},
    )  # fmt: skip


def reading_captures(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an equation, whose jaxprs have no captures among their constants.

    JAX hoists what a function closes over, but not where it transposes an equation: what a backward
    rule closes over are constants of the jaxpr that it is called in.
    """
    return _jax.with_jaxprs(params, _reading_captures)


@_jax.weakref_lru_cache
def _reading_captures(jaxpr: Any) -> Any:
    if not _jax.is_closed(jaxpr) or StateTracer not in map(type, _jax.consts_of(jaxpr)):
        return jaxpr

    def read_of(constant: Any) -> Any:
        if type(constant) is not StateTracer:
            return None
        params = dict(address=constant.address, aval=constant.aval, version=0)
        return read_p, params, {state_effect}

    return _jax.with_computed_constants(jaxpr, read_of)


def captured_inputs(jaxpr: Any) -> tuple[Captured, ...]:
    """The inputs of a jaxpr of which its reads say what slots they are (`resolve.read_since`)."""
    return _contents(jaxpr).captured


def superseded(jaxpr: Any, writes: Sequence[Address]) -> tuple[int, ...]:
    """The inputs that are captures of slots which a loop writes: the carried value is meant."""
    if state_effect not in jaxpr.effects:
        return ()
    return _superseded(jaxpr, frozenset(writes))


@_jax.weakref_lru_cache
def _superseded(jaxpr: Any, writes: frozenset[Address]) -> tuple[int, ...]:
    eqns, written = _jax.equations(jaxpr), {*writes, *_contents(jaxpr).state.writes}
    reads = [e for e in eqns if e.primitive is read_p and e.invars]
    if not reads:
        return ()
    captures = _captures_of(jaxpr, reads, written)
    of_captures = {id(eqn) for eqn in reads}
    used = [v for e in eqns if id(e) not in of_captures for v in e.invars]
    used = [v for v in (*used, *_jax.outvars(jaxpr)) if isinstance(v, _jax.Var)]
    kept = {captures[v] for v in used if v in captures}
    operands = [e.invars[0] for e in reads if e.params["address"] in writes]
    meant = {captures[v] for v in operands if isinstance(v, _jax.Var) and v in captures}
    return tuple([i for i, v in enumerate(_jax.invars(jaxpr)) if v in meant and v not in kept])


def refreshed(jaxpr: Any, operands: Sequence[Any], writes: Sequence[Address] = ()) -> Sequence[Any]:
    """The operands of a jaxpr that is about to be bound, with captures as they are now.

    Args:
      jaxpr: closed or open.
      operands: its inputs, or the first of them.
      writes: slots that the equation writes: what comes in for them takes the place of captures.
    """
    if state_effect not in jaxpr.effects:
        return operands
    captured = captured_inputs(jaxpr)
    if not captured:
        return operands
    use, operands, written = current_use(), list(operands), set(writes)
    for i, address, version in captured:
        if address not in written and i < len(operands):
            operands[i] = read_since(address.renewed(use), operands[i], version)
    return operands


class Uses(NamedTuple):
    """The slots that jaxprs use, sorted by where their values go."""

    reads: Addresses  # in
    writes: Addresses  # in and out
    outs: Addresses  # only out: each of the jaxprs writes them, and none reads them before

    @property
    def ins(self) -> Addresses:
        """What comes in, in this order."""
        return self.reads + self.writes

    @property
    def results(self) -> Addresses:
        """What goes out, in this order."""
        return self.writes + self.outs


def uses_of(jaxprs: Sequence[Any]) -> Uses:
    """The slots that jaxprs use which run at most once, one of them."""
    reads, writes = state_of_all(jaxprs)
    if not writes:
        return Uses(reads, (), ())
    replaced = frozenset.intersection(*[_replaced(jaxpr) for jaxpr in jaxprs])
    outs = tuple([a for a in writes if a in replaced])
    return Uses(reads, tuple([a for a in writes if a not in replaced]), outs)


def _replaced(jaxpr: Any) -> frozenset[Address]:
    """The slots that a jaxpr writes without having read them."""
    return _contents(jaxpr).replaced if state_effect in jaxpr.effects else frozenset()


def settle(addresses: Sequence[Address], writes: Addresses) -> None:
    """Makes sure that different addresses mean different slots in the place where a rule runs.

    Modules get their names here, in the order of ``addresses``, that of the program.

    Raises:
      StateError: if two addresses mean one slot, and one of them is written. What reads the one
        would not see what is written to the other.
    """
    use = current_use()
    first: dict[Any, Address] = {}
    for address in addresses:
        if not address.may_alias:
            continue
        other = first.setdefault(address.renewed(use).meaning_here(), address)
        if other is address or other == address:
            continue
        if address in writes or other in writes:
            raise address.aliased(other)


def settle_jaxprs(jaxprs: Iterable[Any]) -> None:
    """`settle` for the slots that jaxprs use."""
    stateful = [jaxpr for jaxpr in jaxprs if state_effect in jaxpr.effects]
    addresses = [a for jaxpr in stateful for a in in_order(jaxpr) if a.may_alias]
    if len(addresses) > 1:
        settle(addresses, state_of_all(stateful).writes)


def in_order(jaxpr: Any) -> Addresses:
    """The slots that a jaxpr uses, in the order of first use."""
    return _contents(jaxpr).order


def _no_rule(name: str, jaxprs: Iterable[Any], used: str) -> Exception:
    """The error for an operation whose jaxprs have state that no rule has threaded."""
    inner = [a for j in jaxprs for s in [state_of(j)] for a in s.reads + s.writes]
    uses = ", ".join(sorted({str(a) for a in inner})) or "state"
    return UnsupportedPrimitiveError(
        message(
            f"The higher-order primitive {name!r} contains a use of {uses}, and jaxstate has no"
            " rule for it.",
            fix="""
            k = jaxstate.next_key()                           # outside, and pass it in
            jaxstate.extend.register_rule(primitive)(rule)    # or make the primitive stateful
            """,
            used=used,
        )
    )


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
    written = {*how.writes, *how.outs}
    captured_reads = _contents(jaxpr).captured_reads
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
            (current[eqn.params["address"]],) = rename(eqn.invars)
        elif i in captured_reads and eqn.params["address"] not in written:
            (renamed[eqn.outvars[0]],) = rename(eqn.invars)
        elif eqn.primitive in _uses_slots:
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
    if _binds.seen is not None:
        _binds.seen.update((a, read_stored(a)) for a in here if not a.in_objects)
    return read_each(here)


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
    seen = _binds.seen or {}
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


# -- Rules -----------------------------------------------------------------------------------

Rule = Callable[..., Any]

_rules: dict[Any, Rule] = {}


def register_rule(primitive: Any) -> Callable[[Rule], Rule]:
    """Makes a higher-order primitive stateful.

    The rule is called as ``rule(args, params)`` instead of the bind, with the trace of the bind
    current, when a jaxpr among ``params`` uses state. It returns what the bind would.

    Args:
      primitive: a `jax.extend.core.Primitive` with jaxprs among its parameters.

    Returns:
      A decorator for the rule. Typically a rule asks `state_of` which slots the jaxpr uses, takes
      their values with `read_all`, makes a pure jaxpr with `discharge`, binds the same primitive
      with the values as further operands, and hands the further results to `write_all`.

    Here for a primitive that calls its jaxpr once:

    >>> from jaxstate.extend import Layout, discharge, read_all, register_rule, state_of, write_last
    >>> def rule_for(call_p):
    ...     @register_rule(call_p)
    ...     def rule(args, params):
    ...         reads, writes = state_of(params["jaxpr"])
    ...         slots = read_all(reads + writes)
    ...         how = Layout(reads, writes, once=True)
    ...         jaxpr = discharge(params["jaxpr"], how, [jax.typeof(s) for s in slots])
    ...         return write_last(writes, call_p.bind(*slots, *args, jaxpr=jaxpr))
    """

    def register(rule: Rule) -> Rule:
        if primitive not in _rules:
            has_state = _has_state_of_jit if primitive is _jax.jit_p else _has_state
            _jax.wrap_bind(primitive, lambda bind: _one_use_per_bind(bind, has_state))
            _jax.wrap_bind_with_trace(
                primitive, lambda bind: _stateful_bind(primitive, bind, has_state)
            )
        _rules[primitive] = rule
        return rule

    return register


def has_rule(primitive: Any) -> bool:
    """Whether a higher-order primitive has been made stateful with `register_rule`."""
    return primitive in _rules


# What a client does around the bind of every primitive that has a rule: `arrays` lets it be.
around_binds: list[Callable[..., Any]] = []

# Called before a rule reads and writes slots.
before_rules: list[Callable[[], None]] = []


class _Binds(threading.local):
    """The binds of primitives with rules that are in progress.

    Attributes:
      depth: how many. What is traced meanwhile are jaxprs, and no functions of a program.
      seen: what was read of slots, where the innermost one runs a compiled program; else None.
    """

    depth = 0
    seen: dict[Address, Any] | None = None


_binds = _Binds()


@contextmanager
def watched(is_run: bool = True) -> Iterator[None]:
    """Where slots are read, a compiled program is run, and they are written: `write_all` raises if
    they were written since `read_all`. (Nothing is watched unless ``is_run``.)"""
    seen, _binds.seen = _binds.seen, {} if is_run else None
    try:
        yield
    finally:
        _binds.seen = seen


def in_bind() -> bool:
    """Whether a primitive is being bound that has a rule."""
    return _binds.depth > 0


@contextmanager
def out_of_bind() -> Iterator[None]:
    """For a function of a program that is called from inside a bind."""
    depth, _binds.depth = _binds.depth, 0
    try:
        yield
    finally:
        _binds.depth = depth


def _one_use_per_bind(
    bind: Callable[..., Any],
    has_state: Callable[[dict[str, Any]], bool],
    runs_jaxprs: bool = True,
) -> Callable[..., Any]:
    def one_bind(*args: Any, **params: Any) -> Any:
        if not any_known():
            return bind(*args, **params)
        _binds.depth += runs_jaxprs
        uses = None
        try:
            if StateTracer in map(type, args) or has_state(params):
                uses = begin_use(args)
            for around in around_binds:
                return around(bind, args, params)
            return bind(*args, **params)
        finally:
            _binds.depth -= runs_jaxprs
            if uses is not None:
                end_use(uses)

    return one_bind


def _stateful_bind(
    primitive: Any, bind: Callable[..., Any], has_state: Callable[[dict[str, Any]], bool]
) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not has_state(params) or isinstance(trace, _jax.TransparentTrace):
            return bind(trace, args, avals, params)  # such a trace runs the jaxprs, state and all
        with _jax.set_current_trace(trace):
            for notice in before_rules:
                notice()
            params = settled_captures(reading_captures(params))
            if not has_state(params):
                return bind(trace, args, avals, params)
            settle_jaxprs(list(_jax.jaxprs_in(params)))
            with watched(trace is _jax.eval_trace):
                return _rules[primitive](args, params)

    return bind_with_trace


def _has_state(params: dict[str, Any]) -> bool:
    for jaxpr in _jax.jaxprs_in(params):  # noqa: SIM110 (at every bind: no generator)
        if jaxpr.effects and state_effect in jaxpr.effects:
            return True
    return False


def _has_state_of_jit(params: dict[str, Any]) -> bool:
    """The same without a look at the other parameters: much of JAX's own library is jitted."""
    effects = params["jaxpr"].effects
    return bool(effects) and state_effect in effects


_hidden_rules: dict[Any, Rule] = {}


def register_hidden_rule(kind: Any) -> Callable[[Rule], Rule]:
    """Makes an operation of `jax.experimental.hijax` stateful, which hides its jaxprs in an object.

    The rule is called as ``rule(args, prim)`` like one of `register_rule`.

    Args:
      kind: the class of the object; None if this version of JAX does not have it.

    Returns:
      A decorator for the rule.
    """

    def register(rule: Rule) -> Rule:
        if kind is not None:
            _hidden_rules[kind] = rule
        return rule

    return register


def _hidden_stateful_bind(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        prim = params["_prim"]
        if isinstance(trace, _jax.StagingTrace) and any_open():
            with _jax.set_current_trace(trace):
                _look_into(prim)
        hidden = list(_jax.hidden_jaxprs(prim))
        if not any(state_effect in x.effects for x in [prim, *hidden]):
            return bind(trace, args, avals, params)
        rule = _hidden_rules.get(type(prim))
        if rule is None:
            raise _no_rule(type(prim).__name__, hidden, _jax.user_location())
        with _jax.set_current_trace(trace):
            settle_jaxprs(hidden)
            return rule(args, prim)

    return bind_with_trace


def _one_use_per_hidden_bind(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_values(*args: Any, **params: Any) -> Any:  # JAX does not look at these operands
        return bind(*map(_jax.resolved, args), **params)

    return _one_use_per_bind(bind_values, lambda params: True, runs_jaxprs=False)


class _HiddenEffect(_jax.Effect):
    """What an operation has whose ``expand`` uses state: it is not dropped where nobody uses its
    result."""

    def __repr__(self) -> str:
        return "a use of jaxstate state in the expand of an operation of jax.experimental.hijax"

    def __hash__(self) -> int:
        return hash(_HiddenEffect)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HiddenEffect)


_hidden_effect = _HiddenEffect()
_jax.allow_effect_everywhere_but_in_compiled_code(_HiddenEffect)


def _look_into(prim: Any) -> None:
    """Notes whether the ``expand`` of a user's operation uses state.

    JAX calls it when it compiles the jaxpr that is built now: for what is called at top level,
    before that call returns. State that is open at top level is still open then.

    Raises:
      UnsupportedPrimitiveError: for any other state.
    """
    if not _jax.is_of_user(prim):
        return
    jaxpr, constants = _jax.expanded(prim)
    captured = [c.address for c in constants if type(c) is StateTracer]
    state = state_of(jaxpr)
    used = [*state.writes, *state.reads]
    inside = [a for a in used if not _is_at_top_level(a.holder())]
    if captured or inside:
        raise UnsupportedPrimitiveError(
            message(
                f"The expand method of {type(prim).__name__} uses {(captured + inside)[0]}. JAX"
                " calls it when it compiles the function that is traced here, and that state is not"
                " open then.",
                fix="""
                k = jaxstate.next_key()             # outside of expand:
                w = jaxstate.param("w", ...)
                y = Operation(...)(x, k, w)         # and pass it in
                """,
                used=_jax.user_location(),
            )
        )
    if used or _hidden_effect in jaxpr.effects:
        prim.effects = prim.effects | {_hidden_effect}


def _is_at_top_level(holder: Any) -> bool:
    if holder.is_boundary or holder.outside is not None:
        return False
    return not any(isinstance(t, _jax.StagingTrace) for t in _jax.chain(holder.anchor))


_jax.wrap_bind(_jax.call_hi_primitive_p, _one_use_per_hidden_bind)
_jax.wrap_bind_with_trace(_jax.call_hi_primitive_p, _hidden_stateful_bind)
