"""State for JAX: random streams, parameters and slots that go through every transformation."""

from jaxstate import extend, random, rules
from jaxstate.errors import (
    BranchSowError,
    ClosedStateError,
    CustomRuleStateError,
    InitializerDataError,
    LaneWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    NameClashError,
    ParameterConflictError,
    ParameterMismatchError,
    PlantMismatchError,
    RepeatedSowError,
    SlotTypeError,
    SowError,
    SowMismatchError,
    SplitStreamError,
    StateError,
    TraceStateError,
    UnsupportedPrimitiveError,
)
from jaxstate.params import Parametrized, param, parametrized, scope
from jaxstate.random import Stream, next_key, rng_stream
from jaxstate.sow import plant, reap, sow

__version__ = "0.1.0"

__all__ = [
    "BranchSowError",
    "ClosedStateError",
    "CustomRuleStateError",
    "InitializerDataError",
    "LaneWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "NameClashError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "Parametrized",
    "PlantMismatchError",
    "RepeatedSowError",
    "SlotTypeError",
    "SowError",
    "SowMismatchError",
    "SplitStreamError",
    "StateError",
    "Stream",
    "TraceStateError",
    "UnsupportedPrimitiveError",
    "extend",
    "next_key",
    "param",
    "parametrized",
    "plant",
    "random",
    "reap",
    "rng_stream",
    "rules",
    "scope",
    "sow",
]
