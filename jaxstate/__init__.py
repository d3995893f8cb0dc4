"""State for JAX: random streams, parameters, variables, arrays written in place, sown values and
slots that go through every transformation.

    parametrized, param, scope, variable    functions with parameters and variables
    stack, ensemble, summary, intercept     copies of them, tables of them, functions around them
    flatten_names, unflatten_names          parameters by name: "encoder/dense/w"
    path, is_writable                       where the program is, and what it may do there
    rng_stream, next_key, random            random streams, and the samplers of `jax.random` on them
    inplace, array                          arrays that are written in place
    mutate                                  objects whose parts are assigned
    sow, reap, plant                        values in the middle of a program
    causal_fixed_point                      sampling from models of sequences
    extend                                  slots, traces and rules of your own

What is public is in ``dir(jaxstate)``, `jaxstate.random` and `jaxstate.extend`. The packages inside
of this one are how it is made, and may change in any release.
"""

from jaxstate import _jax, extend, random
from jaxstate import rules as _rules  # noqa: F401  they register themselves
from jaxstate.arrays.inplace import array, inplace
from jaxstate.causal.fixed_point import causal_fixed_point
from jaxstate.errors import (
    AheadOfTimeError,
    BranchSowError,
    ClosedStateError,
    ConvertedClosureError,
    CopyWriteError,
    CustomRuleStateError,
    DeviceWriteError,
    FrozenPartError,
    HostCallbackError,
    InitializerDataError,
    LaneWriteError,
    MaskedWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    MissingVariableError,
    NameClashError,
    NotCausalError,
    ParameterConflictError,
    ParameterMismatchError,
    PlantMismatchError,
    ReadOnlyVariableError,
    RepeatedSowError,
    SlotTypeError,
    SowError,
    SowMismatchError,
    SplitStreamError,
    StateError,
    StructureChangeError,
    TraceStateError,
    UncoveredParameterError,
    UnsupportedPrimitiveError,
    UnusedReuseError,
    VariableConflictError,
    VariableMismatchError,
)
from jaxstate.params.ensemble import Ensemble, ensemble
from jaxstate.params.interception import Intercepted, intercept
from jaxstate.params.metadata import Metadata
from jaxstate.params.names import flatten_names, unflatten_names
from jaxstate.params.param import param, scope
from jaxstate.params.parametrized import Parametrized, parametrized
from jaxstate.params.places import path
from jaxstate.params.reuse import Shaped
from jaxstate.params.stack import Stack, stack
from jaxstate.params.summary import ParameterRow, ScopeRow, Summary, summary
from jaxstate.params.variables import Variable, is_writable, variable
from jaxstate.sow.harvest import plant, reap, sow
from jaxstate.streams.stream import Stream, next_key, rng_stream
from jaxstate.tree.mutate import mutate

__version__ = "0.1.0"

# All of jaxstate is there, so what it changes in JAX can be.
_jax.ALWAYS.install()

__all__ = [
    "AheadOfTimeError",
    "BranchSowError",
    "ClosedStateError",
    "ConvertedClosureError",
    "CopyWriteError",
    "CustomRuleStateError",
    "DeviceWriteError",
    "Ensemble",
    "FrozenPartError",
    "HostCallbackError",
    "InitializerDataError",
    "Intercepted",
    "LaneWriteError",
    "MaskedWriteError",
    "Metadata",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "MissingVariableError",
    "NameClashError",
    "NotCausalError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "ParameterRow",
    "Parametrized",
    "PlantMismatchError",
    "ReadOnlyVariableError",
    "RepeatedSowError",
    "ScopeRow",
    "Shaped",
    "SlotTypeError",
    "SowError",
    "SowMismatchError",
    "SplitStreamError",
    "Stack",
    "StateError",
    "Stream",
    "StructureChangeError",
    "Summary",
    "TraceStateError",
    "UncoveredParameterError",
    "UnsupportedPrimitiveError",
    "UnusedReuseError",
    "Variable",
    "VariableConflictError",
    "VariableMismatchError",
    "array",
    "causal_fixed_point",
    "ensemble",
    "extend",
    "flatten_names",
    "inplace",
    "intercept",
    "is_writable",
    "mutate",
    "next_key",
    "param",
    "parametrized",
    "path",
    "plant",
    "random",
    "reap",
    "rng_stream",
    "scope",
    "sow",
    "stack",
    "summary",
    "unflatten_names",
    "variable",
]


def __dir__() -> list[str]:
    return __all__
