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

A *kind of state* of your own, which a program finds by what it is and not by an object that it
holds, is an `Address` and a `Holder`. The address says in a jaxpr what is meant; the holder has the
cells, and `open_holder` opens it for a block. Random streams are written on this alone:

    class Named(Address):
        threaded = True                     # a program may write it

        def __init__(self, name):
            self.name = name

        def __eq__(self, other):
            return type(other) is Named and other.name == self.name

        def __hash__(self):
            return hash(self.name)

        def missing(self):
            return KeyError(f"no {self.name} is open")

    class Counter(Holder):
        def __init__(self, name):
            super().__init__()
            self.address, self.counted = Named(name), Cell(jnp.int32(0))

        def knows(self, address):
            return address == self.address

        def cell(self, address):
            return self.counted

        def signature(self):                # a part of the keys of JAX's caches
            return "counter", self.address

    def count(name):                        # anywhere in a program
        write_at(Named(name), read_at(Named(name)) + 1)
"""

from jaxstate._src.core.boundaries import holders_outside
from jaxstate._src.core.contents import refreshed, state_of, superseded
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all, write_last
from jaxstate._src.core.discharged import Discharged, discharged_call, discharged_loop
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.refs import Slot, new_slot, read, write
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.resolve import read_at, write_at
from jaxstate._src.core.slots import Address, Cell, Holder, Lane, holders, open_holder
from jaxstate._src.traces.stateful import StatefulTrace, current_trace, new_trace

__all__ = [
    "Address",
    "Cell",
    "Discharged",
    "Holder",
    "Lane",
    "Layout",
    "Slot",
    "StatefulTrace",
    "current_trace",
    "discharge",
    "discharged_call",
    "discharged_loop",
    "holders",
    "holders_outside",
    "initialize",
    "new_slot",
    "new_trace",
    "open_holder",
    "read",
    "read_all",
    "read_at",
    "refreshed",
    "register_rule",
    "state_of",
    "superseded",
    "write",
    "write_all",
    "write_at",
    "write_last",
]


def __dir__() -> list[str]:
    return __all__
