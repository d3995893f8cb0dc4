"""cond and switch: every branch takes and returns all slots that any of them uses."""

from __future__ import annotations

from typing import Any

from jaxstate import _compat
from jaxstate.births import bear
from jaxstate.thread import Thread, read_all, register_rule, state_of_all, thread, write_last


@register_rule(_compat.cond_p)
def _cond(args: Any, params: dict[str, Any]) -> list[Any]:
    """A slot that a branch leaves alone passes through it."""
    index, *operands = args
    reads, writes = state_of_all(params["branches"])
    for branch in params["branches"]:
        bear(branch, operands)
    slots = read_all(reads + writes)
    avals = [_compat.typeof(s) for s in slots]
    branches = tuple(thread(j, Thread(reads, writes), avals) for j in params["branches"])
    outs = _compat.cond_p.bind(index, *slots, *operands, **dict(params, branches=branches))
    return write_last(writes, outs)
