"""Threading: a jaxpr whose state is written becomes one with slots as inputs and outputs.

    { lambda ; x. let n = state_read[count]          { lambda ; n x. let
                  k = fold_in key n           -->                k = fold_in key n
                  m = add n 1                                    m = add n 1
                  state_write[count] m                       in (y, m) }
              in (y,) }

Nothing is traced again: the results of ``state_read`` become inputs and the operand of the last
``state_write`` of each slot becomes an output. `state_of` says which slots a jaxpr uses, `thread`
makes the pure jaxpr; both are cached per jaxpr, so that a jaxpr used a thousand times is compiled
once.

A higher-order primitive becomes stateful with a rule: a function that is called instead of the
bind when a jaxpr among the parameters has state. It reads the slots where it is called, binds the
same primitive with pure jaxprs, and writes the results back. This happens at the first contact,
under whatever trace is current: no transformation of JAX ever sees a jaxpr with state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxstate import _compat
from jaxstate.births import addresses_of, birth_p
from jaxstate.errors import UnsupportedPrimitiveError, message
from jaxstate.slots import Address, any_open
from jaxstate.trace import current_use, one_use, read, read_p, state_effect, write, write_p

__all__ = ["State", "read_all", "register_rule", "state_of", "thread", "write_all", "write_last"]

Addresses = tuple[Address, ...]


class State(NamedTuple):
    """The slots that a jaxpr uses and does not thread."""

    reads: Addresses  # read, never written
    writes: Addresses  # written, and perhaps read

    def __bool__(self) -> bool:
        return bool(self.reads or self.writes)


stateless = State((), ())


def state_of(jaxpr: Any) -> State:
    """The slots that a (closed or open) jaxpr uses: ``(reads, writes)``, two tuples of addresses.

    Raises:
      UnsupportedPrimitiveError: if an equation of the jaxpr has state and no rule.
    """
    return _state_of(jaxpr) if state_effect in jaxpr.effects else stateless


def state_of_all(jaxprs: Iterable[Any]) -> State:
    """The slots that several jaxprs use, as one state."""
    states = [state_of(jaxpr) for jaxpr in jaxprs]
    writes = tuple(dict.fromkeys(a for s in states for a in s.writes))
    reads = tuple(dict.fromkeys(a for s in states for a in s.reads if a not in writes))
    return State(reads, writes)


@_compat.weakref_lru_cache
def _state_of(jaxpr: Any) -> State:
    reads: dict[Address, None] = {}
    writes: dict[Address, None] = {}
    for eqn in _compat.equations(jaxpr):
        if eqn.primitive is read_p or eqn.primitive is birth_p:
            reads.update(dict.fromkeys(addresses_of(eqn)))
        elif eqn.primitive is write_p:
            writes[eqn.params["address"]] = None
        elif state_effect in eqn.effects:
            raise _no_rule(eqn)
    return State(tuple(a for a in reads if a not in writes), tuple(writes))


def _no_rule(eqn: Any) -> Exception:
    """The error for an equation whose jaxprs have state that no rule has threaded."""
    inner = [
        a for j in _compat.jaxprs_in(eqn.params) for s in [state_of(j)] for a in s.reads + s.writes
    ]
    used = ", ".join(sorted({str(a) for a in inner})) or "state"
    return UnsupportedPrimitiveError(
        message(
            f"The higher-order primitive {eqn.primitive.name!r} contains a use of {used}, and"
            " jaxstate has no rule for it.",
            fix="""
            k = jaxstate.next_key()                           # outside, and pass it in
            jaxstate.extend.register_rule(primitive)(rule)    # or make the primitive stateful
            """,
            used=_compat.location_of(eqn),
        )
    )


class Thread(NamedTuple):
    """How to thread slots through a jaxpr.

    Attributes:
      reads: slots to come in, in front of the other inputs.
      writes: slots to come in and go out.
      at: the number of other inputs in front of the incoming ``writes``.
      out_at: the number of other outputs in front of the outgoing ``writes``; None for all.
      out: whether the writes go out at all.
      captures: (input, slot) pairs for the inputs that are captures of ``writes``, seen before the
        first write: what comes in for the slot takes their place. They are counted in ``at``.
    """

    reads: Addresses
    writes: Addresses
    at: int = 0
    out_at: int | None = None
    out: bool = True
    captures: tuple[tuple[int, Address], ...] = ()


def thread(jaxpr: Any, how: Thread, avals: Sequence[Any]) -> Any:
    """The jaxpr with slots as inputs and outputs, and without state equations.

    Args:
      jaxpr: closed or open.
      how: which slots, and where among the inputs and outputs.
      avals: the types of ``how.reads + how.writes``, in that order.

    Returns:
      A jaxpr of the same kind. The same arguments give the same object, so it is compiled once.
    """
    return _thread(jaxpr, how, tuple(avals))


@_compat.weakref_lru_cache
def _thread(jaxpr: Any, how: Thread, avals: tuple[Any, ...]) -> Any:
    addresses = how.reads + how.writes
    incoming = {a: _compat.Var(aval) for a, aval in zip(addresses, avals, strict=True)}
    current: dict[Address, Any] = dict(incoming)
    inputs = list(_compat.invars(jaxpr))
    renamed: dict[Any, Any] = {inputs[i]: incoming[a] for i, a in how.captures}
    eqns = []

    def rename(atom: Any) -> Any:
        return renamed.get(atom, atom) if isinstance(atom, _compat.Var) else atom

    for eqn in _compat.equations(jaxpr):
        if eqn.primitive is read_p or eqn.primitive is birth_p:
            values = [current[a] for a in addresses_of(eqn)]
            renamed.update(zip(eqn.outvars, values, strict=True))
        elif eqn.primitive is write_p:
            current[eqn.params["address"]] = rename(eqn.invars[0])
        elif renamed:
            eqns.append(eqn.replace(invars=[rename(v) for v in eqn.invars]))
        else:
            eqns.append(eqn)
    reads = [incoming[a] for a in how.reads]
    writes = [incoming[a] for a in how.writes]
    outvars = [rename(v) for v in _compat.outvars(jaxpr)]
    captured = {inputs[i] for i, _ in how.captures}
    invars = [*reads, *inputs[: how.at], *writes, *inputs[how.at :]]
    invars = [v for v in invars if v not in captured]
    if how.out:
        out_at = len(outvars) if how.out_at is None else how.out_at
        outvars[out_at:out_at] = [current[a] for a in how.writes]
    return _compat.remade(
        jaxpr, invars=invars, outvars=outvars, eqns=eqns, effs=jaxpr.effects - {state_effect}
    )


def read_all(addresses: Iterable[Address]) -> list[Any]:
    """The current values of the slots that a jaxpr uses, in the place where a rule runs.

    Args:
      addresses: as `state_of` gives them.

    Returns:
      One array per address, typed as a jaxpr takes it.
    """
    use = current_use()
    return [_compat.canonicalize(read(address.renewed(use))) for address in addresses]


def write_all(addresses: Iterable[Address], values: Iterable[Any]) -> None:
    """Writes to the slots that a jaxpr uses, in the place where a rule runs.

    Args:
      addresses: as `state_of` gives them.
      values: one array per address.
    """
    use = current_use()
    for address, value in zip(addresses, values, strict=True):
        write(address.renewed(use), value)


def write_last(addresses: Sequence[Address], outs: Sequence[Any]) -> list[Any]:
    """Writes the last results of a threaded equation to the slots, and returns the others.

    Args:
      addresses: as `state_of` gives them; the last ``len(addresses)`` results are theirs.
      outs: all results.
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
      their values with `read_all`, makes a pure jaxpr with `thread`, binds the same primitive with
      the values as further operands, and hands the further results to `write_all`.
    """

    def register(rule: Rule) -> Rule:
        if primitive not in _rules:
            _compat.wrap_bind(primitive, _one_use_per_bind)
            _compat.wrap_bind_with_trace(primitive, lambda bind: _stateful_bind(primitive, bind))
        _rules[primitive] = rule
        return rule

    return register


# What a client does around the bind of every primitive that has a rule: `arrays` lets it be.
around_binds: list[Callable[..., Any]] = []


def _one_use_per_bind(bind: Callable[..., Any]) -> Callable[..., Any]:
    def one_bind(*args: Any, **params: Any) -> Any:
        if not any_open():
            return bind(*args, **params)
        with one_use(args):
            for around in around_binds:
                return around(bind, args, params)
            return bind(*args, **params)

    return one_bind


def _stateful_bind(primitive: Any, bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not any(state_effect in j.effects for j in _compat.jaxprs_in(params)):
            return bind(trace, args, avals, params)
        with _compat.set_current_trace(trace):
            return _rules[primitive](args, params)

    return bind_with_trace
