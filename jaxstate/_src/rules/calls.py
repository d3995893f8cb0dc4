"""checkpoint and other calls: the operands of the equation are the inputs of its jaxpr.

y = remat[f] x      -->      s = read;  y, s' = remat[f threaded] s x;  write s'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.contents import refreshed, uses_of
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_rule


def _call(primitive: Any, name: str) -> Callable[[Any, dict[str, Any]], list[Any]]:
    """The rule of a primitive whose parameter ``name`` is its jaxpr; of the others only
    ``exclude_mask`` counts operands, and only ``out_memory_spaces`` counts results."""

    def rule(args: Any, params: dict[str, Any]) -> list[Any]:
        uses = reads, writes, outs = uses_of([params[name]])
        initialize(params[name], args)
        args = refreshed(params[name], args, writes=uses.results)
        slots = read_all(uses.ins)
        how = Layout(reads, writes, outs=outs, once=True)
        jaxpr = discharge(params[name], how, [_jax.typeof(s) for s in slots])
        threaded = dict(params, **{name: jaxpr})
        if "out_memory_spaces" in params:
            spaces = (jax.memory.Space.Device,) * len(uses.results)
            threaded["out_memory_spaces"] = params["out_memory_spaces"] + spaces
        if "exclude_mask" in params:  # operands that need not wait for what is before the call
            threaded["exclude_mask"] = (False,) * len(slots) + params["exclude_mask"]
        return write_last(uses.results, primitive.bind(*slots, *args, **threaded))

    return rule


for _primitive, _name in (
    (_jax.remat_p, "jaxpr"),
    (_jax.call_p, "call_jaxpr"),
    (_jax.compute_on_p, "jaxpr"),
    (_jax.xla_metadata_call_p, "jaxpr"),
    (_jax.program_order_p, "call_jaxpr"),
):
    if _primitive is not None:
        register_rule(_primitive)(_call(_primitive, _name))
