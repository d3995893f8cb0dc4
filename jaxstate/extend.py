"""The extension point: traces with state, slots, and rules for primitives of your own.

A *slot* is one array of state. It lives where it was made, and code further in (inside jit, scan,
while, cond, grad, vmap, checkpoint ...) reads and writes it as if it were a Python variable:

    steps = jaxstate.extend.new_slot(jnp.int32(0), name="steps")

    @jax.jit
    def step(x):
        jaxstate.extend.write(steps, jaxstate.extend.read(steps) + 1)
        return x * 2

A *stateful trace* sees every operation, wherever it happens, and carries state from one to the
next: see `StatefulTrace`.

A higher-order primitive of another package becomes stateful with `register_rule`.

Random streams and parameters are clients of the same engine.
"""

from jaxstate._src.core.contents import refreshed, state_of, superseded
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all, write_last
from jaxstate._src.core.discharged import Discharged, discharged_call, discharged_loop
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.refs import Slot, new_slot, read, write
from jaxstate._src.core.registry import register_rule
from jaxstate._src.traces.stateful import StatefulTrace, current_trace, new_trace

__all__ = [
    "Discharged",
    "Layout",
    "Slot",
    "StatefulTrace",
    "current_trace",
    "discharge",
    "discharged_call",
    "discharged_loop",
    "initialize",
    "new_slot",
    "new_trace",
    "read",
    "read_all",
    "refreshed",
    "register_rule",
    "state_of",
    "superseded",
    "write",
    "write_all",
    "write_last",
]


def __dir__() -> list[str]:
    return __all__
