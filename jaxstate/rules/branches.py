"""cond and switch: every branch takes and returns all slots that any of them uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxstate import _compat
from jaxstate.births import bear
from jaxstate.slots import Address
from jaxstate.thread import (
    Thread,
    read_all,
    register_rule,
    state_of,
    thread,
    uses_of,
    write_last,
)


@register_rule(_compat.cond_p)
def _cond(args: Any, params: dict[str, Any]) -> list[Any]:
    """A slot that a branch leaves alone passes through it."""
    index, *operands = args
    uses = reads, writes, outs = uses_of(params["branches"])
    for branch in params["branches"]:
        bear(branch, operands)
        _check_absent(writes, branch)
    slots = read_all(uses.ins)
    avals = [_compat.typeof(s) for s in slots]
    how = Thread(reads, writes, outs=outs, once=True)
    branches = tuple(thread(j, how, avals) for j in params["branches"])
    results = _compat.cond_p.bind(index, *slots, *operands, **dict(params, branches=branches))
    return write_last(uses.results, results)


def _check_absent(writes: Sequence[Address], branch: Any) -> None:
    written = state_of(branch).writes
    for address in writes:
        if address not in written:
            address.check_absence()
