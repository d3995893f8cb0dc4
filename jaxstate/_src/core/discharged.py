"""What most rules do: a jaxpr with its slots as inputs and outputs, ready to be bound.

    c = discharged_call(jaxpr, args);   return c.results(call_p.bind(*c.operands, jaxpr=c.jaxpr))

A rule for a primitive with another layout (`scan`, `while`, branches) takes the steps itself, in
this order, each where the primitive is bound:

1. `state_of` or `uses_of`: which slots.
2. `initialize`: parameters that are first used in the jaxpr are made, from data at hand.
3. `refreshed`: an operand that is the value of a slot which was read when the jaxpr was built is
   read again. (An array in place may have been written since.)
4. `superseded`, for loops: such operands of slots that the loop writes are dropped, since from the
   second turn on the carried value is meant.
5. `read_all`, `discharge`, the bind, and `write_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.core.contents import (
    Addresses,
    refreshed,
    state_of,
    superseded,
    uses_of,
)
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all, write_last
from jaxstate._src.core.initializers import initialize

__all__ = ["Discharged", "carried_values", "discharged_call", "discharged_loop"]


class Discharged(NamedTuple):
    """A jaxpr whose slots are inputs and outputs.

    Attributes:
      jaxpr: what to bind the primitive with.
      operands: a list: the values of slots, and what the primitive had as operands.
      n_consts: how many operands are constants, in front; only of a loop.
      n_read: how many operands are values of slots.
      written: the slots whose new values are results too: the last ones of a call, the first of a
        loop.
      once: whether the jaxpr is run at most once: a call.
    """

    jaxpr: Any
    operands: list[Any]
    n_consts: int
    n_read: int
    written: Addresses
    once: bool

    def results(self, outs: Sequence[Any]) -> list[Any]:
        """Writes the slots. Returns the results that the primitive had without state."""
        if self.once:
            return write_last(self.written, list(outs))
        write_all(self.written, outs[: len(self.written)])
        return list(outs[len(self.written) :])


def discharged_call(jaxpr: Any, args: Sequence[Any]) -> Discharged:
    """For a primitive that runs its jaxpr once, or not at all, with its operands as the inputs.

    To be called in a rule (see `register_rule`), under the trace of the bind.

    Args:
      jaxpr: the `jax.extend.core.ClosedJaxpr` among the parameters.
      args: the operands of the primitive.

    Returns:
      A `Discharged`. Its ``operands`` are the values of slots and then ``args``.
    """
    uses = reads, writes, outs = uses_of([jaxpr])
    initialize(jaxpr, args)
    args = refreshed(jaxpr, args, writes=uses.results)
    slots = read_all(uses.ins)
    how = Layout(reads, writes, outs=outs, once=True)
    pure = discharge(jaxpr, how, [_jax.typeof(s) for s in slots])
    return Discharged(pure, [*slots, *args], 0, len(slots), uses.results, True)


def discharged_loop(jaxpr: Any, args: Sequence[Any], n_consts: int) -> Discharged:
    """For a primitive that runs its jaxpr any number of times: (constants, carry) -> carry.

    To be called in a rule (see `register_rule`), under the trace of the bind. Slots that are only
    read become constants, the others are carried.

    Args:
      jaxpr: the `jax.extend.core.ClosedJaxpr` among the parameters, a turn of the loop.
      args: the operands of the primitive: constants, and then what is carried.
      n_consts: how many constants.

    Returns:
      A `Discharged`, with the new number of constants.
    """
    reads, writes = state_of(jaxpr)
    consts, carry = args[:n_consts], args[n_consts:]
    initialize(jaxpr, [*consts, *[None] * len(carry)], writes)
    consts = refreshed(jaxpr, consts, writes=writes)
    dropped = superseded(jaxpr, writes)
    slots = carried_values(reads, writes)
    how = Layout(reads, writes, at=n_consts, out_at=0, dropped=dropped)
    pure = discharge(jaxpr, how, [_jax.typeof(s) for s in slots])
    constants, carried = slots[: len(reads)], slots[len(reads) :]
    consts = [*constants, *(x for i, x in enumerate(consts) if i not in dropped)]
    operands = [*consts, *carried, *carry]
    return Discharged(pure, operands, len(consts), len(slots), writes, False)


def carried_values(reads: Addresses, writes: Addresses) -> list[Any]:
    """The values of slots that a loop reads, and that it writes: these are of the mesh, as they are
    after a turn."""
    values = read_all(reads + writes)
    if _jax.abstract_mesh().empty:
        return values
    return [*values[: len(reads)], *map(_jax.with_mesh, values[len(reads) :])]
