"""State for JAX: random streams, parameters and slots that go through every transformation."""

from jaxstate import extend, random, rules
from jaxstate.errors import (
    ClosedStateError,
    CustomRuleStateError,
    InitializerDataError,
    LaneWriteError,
    MaskedWriteError,
    MissingParameterError,
    MissingStoreError,
    MissingStreamError,
    NameClashError,
    ParameterConflictError,
    ParameterMismatchError,
    SlotTypeError,
    SplitStreamError,
    StateError,
    UnsupportedPrimitiveError,
)
from jaxstate.inplace import array, inplace
from jaxstate.params import Parametrized, param, parametrized, scope
from jaxstate.random import Stream, next_key, rng_stream

__version__ = "0.1.0"

__all__ = [
    "ClosedStateError",
    "CustomRuleStateError",
    "InitializerDataError",
    "LaneWriteError",
    "MaskedWriteError",
    "MissingParameterError",
    "MissingStoreError",
    "MissingStreamError",
    "NameClashError",
    "ParameterConflictError",
    "ParameterMismatchError",
    "Parametrized",
    "SlotTypeError",
    "SplitStreamError",
    "StateError",
    "Stream",
    "UnsupportedPrimitiveError",
    "array",
    "extend",
    "inplace",
    "next_key",
    "param",
    "parametrized",
    "random",
    "rng_stream",
    "rules",
    "scope",
]
