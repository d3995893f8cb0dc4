"""Rules that make JAX's higher-order primitives stateful, one file per family.

A rule reads the slots that the jaxprs of an equation use, binds the same primitive with the slots
as further inputs and outputs, and writes the results back. Importing this package registers all
of them.
"""

from jaxstate._src.rules import (
    ahead_of_time,
    batching,
    branches,
    calls,
    derivatives,
    explicit,
    foreign,
    hijax,
    jitted,
    kernels,
    linear_calls,
    loops,
    mesh,
    remat_opt,
    solves,
    traced_derivatives,
)

__all__ = [
    "ahead_of_time",
    "batching",
    "branches",
    "calls",
    "derivatives",
    "explicit",
    "foreign",
    "hijax",
    "jitted",
    "kernels",
    "linear_calls",
    "loops",
    "mesh",
    "remat_opt",
    "solves",
    "traced_derivatives",
]
