"""State for JAX: random streams, parameters, variables, arrays written in place, sown values and
slots that go through every transformation."""

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
from jaxstate.params.parametrized import Parametrized, param, parametrized, scope
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
