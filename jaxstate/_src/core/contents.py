"""What a jaxpr does with slots: which it reads, writes, captures and makes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.initializers import addresses_of, init_p
from jaxstate._src.core.primitives import read_p, state_effect, write_p
from jaxstate._src.core.resolve import read_since
from jaxstate._src.core.slots import Address
from jaxstate._src.core.uses import current_use
from jaxstate.errors import UnsupportedPrimitiveError, message

__all__ = [
    "Addresses",
    "Captured",
    "Computed",
    "State",
    "Uses",
    "captured_inputs",
    "contents_of",
    "in_order",
    "no_rule",
    "reading_captures",
    "refreshed",
    "settle",
    "settle_jaxprs",
    "settled_captures",
    "state_of",
    "state_of_all",
    "stateless",
    "superseded",
    "uses_of",
    "uses_slots",
]

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
    return contents_of(jaxpr).state if state_effect in jaxpr.effects else stateless


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


uses_slots = frozenset({read_p, init_p, write_p})


@_jax.weakref_lru_cache
def contents_of(jaxpr: Any) -> _Contents:
    order: dict[Address, None] = {}
    read: dict[Address, None] = {}
    reads: dict[Address, None] = {}
    writes: dict[Address, None] = {}
    of_captures = []
    for i, eqn in enumerate(_jax.equations(jaxpr)):
        if eqn.primitive in uses_slots:
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
            raise no_rule(eqn.primitive.name, jaxprs, _jax.location_of(eqn))
    captures = _captures_of(jaxpr, [eqn for _, eqn in of_captures], writes)
    captured_reads, captured, computed = set(), [], []
    places = {v: i for i, v in enumerate(_jax.invars(jaxpr))} if of_captures else {}
    for i, eqn in of_captures:
        (address,), version, (operand,) = addresses_of(eqn), eqn.params["version"], eqn.invars
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
        if addresses_of(eqn)[0] not in written:
            operand = eqn.invars[0]
            if isinstance(operand, _jax.Var) and operand in captures:
                captures[eqn.outvars[0]] = captures[operand]
    return captures


def settled_captures(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of an equation, without the reads that are what was captured for certain."""
    stateful = [j for j in _jax.jaxprs_in(params) if state_effect in j.effects]
    if not any(contents_of(jaxpr).computed for jaxpr in stateful):
        return params
    if _jax.may_run_again(_jax.current_trace()):
        return params  # what comes later may write before this runs again
    writes, use = state_of_all(stateful).writes, current_use()

    def settled(jaxpr: Any) -> Any:
        current = tuple(
            i
            for i, address, version in contents_of(jaxpr).computed
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
        params = dict(addresses=(constant.address,), avals=(constant.aval,), version=0)
        return read_p, params, {state_effect}

    return _jax.with_computed_constants(jaxpr, read_of)


def captured_inputs(jaxpr: Any) -> tuple[Captured, ...]:
    """The inputs of a jaxpr of which its reads say what slots they are (`resolve.read_since`)."""
    return contents_of(jaxpr).captured


def superseded(jaxpr: Any, writes: Sequence[Address]) -> tuple[int, ...]:
    """The inputs that are captures of slots which a loop writes: the carried value is meant."""
    if state_effect not in jaxpr.effects:
        return ()
    contents = contents_of(jaxpr)
    if not contents.captured_reads and not contents.computed:
        return ()
    return _superseded(jaxpr, frozenset(writes))


@_jax.weakref_lru_cache
def _superseded(jaxpr: Any, writes: frozenset[Address]) -> tuple[int, ...]:
    eqns, written = _jax.equations(jaxpr), {*writes, *contents_of(jaxpr).state.writes}
    reads = [e for e in eqns if e.primitive is read_p and e.invars]
    if not reads:
        return ()
    captures = _captures_of(jaxpr, reads, written)
    of_captures = {id(eqn) for eqn in reads}
    used = [v for e in eqns if id(e) not in of_captures for v in e.invars]
    used = [v for v in (*used, *_jax.outvars(jaxpr)) if isinstance(v, _jax.Var)]
    kept = {captures[v] for v in used if v in captures}
    operands = [e.invars[0] for e in reads if addresses_of(e)[0] in writes]
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
    return contents_of(jaxpr).replaced if state_effect in jaxpr.effects else frozenset()


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
    return contents_of(jaxpr).order


def no_rule(name: str, jaxprs: Iterable[Any], used: str) -> Exception:
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
