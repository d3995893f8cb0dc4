"""State for JAX: random streams, parameters and slots that go through every transformation."""

from jaxstate import extend, random, rules
from jaxstate.errors import (
    ClosedStateError,
    CopyWriteError,
    CustomRuleStateError,
    InitializerDataError,
    LaneWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    NameClashError,
    ParameterConflictError,
    ParameterMismatchError,
    SlotTypeError,
    SplitStreamError,
    StateError,
    StructureChangeError,
    UncoveredParameterError,
    UnsupportedPrimitiveError,
    UnusedReuseError,
)
from jaxstate.mutate import mutate
from jaxstate.params import Parametrized, param, parametrized, scope
from jaxstate.random import Stream, next_key, rng_stream
from jaxstate.reuse import Shaped
from jaxstate.stack import Stack, stack
from jaxstate.summary import ParameterRow, ScopeRow, Summary, summary

__version__ = "0.1.0"

__all__ = [
    "ClosedStateError",
    "CopyWriteError",
    "CustomRuleStateError",
    "InitializerDataError",
    "LaneWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "NameClashError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "ParameterRow",
    "Parametrized",
    "ScopeRow",
    "Shaped",
    "SlotTypeError",
    "SplitStreamError",
    "Stack",
    "StateError",
    "Stream",
    "StructureChangeError",
    "Summary",
    "UncoveredParameterError",
    "UnsupportedPrimitiveError",
    "UnusedReuseError",
    "extend",
    "mutate",
    "next_key",
    "param",
    "parametrized",
    "random",
    "rng_stream",
    "rules",
    "scope",
    "stack",
    "summary",
]
