"""checkpoint and other calls: the operands of the equation are the inputs of its jaxpr.

y = remat[f] x      -->      s = read;  y, s' = remat[f threaded] s x;  write s'
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.discharged import discharged_call
from jaxstate._src.core.registry import register_rule


def _call(primitive: Any, name: str) -> Callable[[Any, dict[str, Any]], list[Any]]:
    """The rule of a primitive whose parameter ``name`` is its jaxpr; of the others only
    ``exclude_mask`` counts operands, and only ``out_memory_spaces`` counts results."""

    def rule(args: Any, params: dict[str, Any]) -> list[Any]:
        call = discharged_call(params[name], args)
        threaded = dict(params, **{name: call.jaxpr})
        if "out_memory_spaces" in params:
            spaces = (jax.memory.Space.Device,) * len(call.written)
            threaded["out_memory_spaces"] = params["out_memory_spaces"] + spaces
        if "exclude_mask" in params:  # operands that need not wait for what is before the call
            threaded["exclude_mask"] = (False,) * call.n_read + params["exclude_mask"]
        return call.results(primitive.bind(*call.operands, **threaded))

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
