"""State for JAX: random streams, parameters and slots that go through every transformation."""

from jaxstate import extend, random, rules
from jaxstate.errors import (
    AheadOfTimeError,
    ClosedStateError,
    CustomRuleStateError,
    DeviceWriteError,
    InitializerDataError,
    LaneWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    MissingVariableError,
    NameClashError,
    ParameterConflictError,
    ParameterMismatchError,
    ReadOnlyVariableError,
    SlotTypeError,
    SplitStreamError,
    StateError,
    TraceStateError,
    UnsupportedPrimitiveError,
    VariableConflictError,
    VariableMismatchError,
)
from jaxstate.params import Parametrized, param, parametrized, scope
from jaxstate.random import Stream, next_key, rng_stream
from jaxstate.variables import Variable, variable

__version__ = "0.1.0"

__all__ = [
    "AheadOfTimeError",
    "ClosedStateError",
    "CustomRuleStateError",
    "DeviceWriteError",
    "InitializerDataError",
    "LaneWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "MissingVariableError",
    "NameClashError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "Parametrized",
    "ReadOnlyVariableError",
    "SlotTypeError",
    "SplitStreamError",
    "StateError",
    "Stream",
    "TraceStateError",
    "UnsupportedPrimitiveError",
    "Variable",
    "VariableConflictError",
    "VariableMismatchError",
    "extend",
    "next_key",
    "param",
    "parametrized",
    "random",
    "rng_stream",
    "rules",
    "scope",
    "variable",
]
