"""State for JAX: random streams, parameters, variables, arrays written in place, sown values and
slots that go through every transformation."""

from jaxstate import extend, random, rules
from jaxstate.arrays.inplace import array, inplace
from jaxstate.errors import (
    AheadOfTimeError,
    BranchSowError,
    ClosedStateError,
    ConvertedClosureError,
    CopyWriteError,
    CustomRuleStateError,
    DeviceWriteError,
    InitializerDataError,
    LaneWriteError,
    MaskedWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    MissingVariableError,
    NameClashError,
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
from jaxstate.params.interception import Intercepted, intercept
from jaxstate.params.parametrized import Parametrized, param, parametrized, scope
from jaxstate.params.places import path
from jaxstate.params.reuse import Shaped
from jaxstate.params.stack import Stack, stack
from jaxstate.params.summary import ParameterRow, ScopeRow, Summary, summary
from jaxstate.params.variables import Variable, variable
from jaxstate.random import Stream, next_key, rng_stream
from jaxstate.sow.harvest import plant, reap, sow
from jaxstate.tree.mutate import mutate

__version__ = "0.1.0"

__all__ = [
    "AheadOfTimeError",
    "BranchSowError",
    "ClosedStateError",
    "ConvertedClosureError",
    "CopyWriteError",
    "CustomRuleStateError",
    "DeviceWriteError",
    "InitializerDataError",
    "Intercepted",
    "LaneWriteError",
    "MaskedWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "MissingVariableError",
    "NameClashError",
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
    "extend",
    "inplace",
    "intercept",
    "mutate",
    "next_key",
    "param",
    "parametrized",
    "path",
    "plant",
    "random",
    "reap",
    "rng_stream",
    "rules",
    "scope",
    "sow",
    "stack",
    "summary",
    "variable",
]
