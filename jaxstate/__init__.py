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

What is public is in ``dir(jaxstate)``, `jaxstate.random` and `jaxstate.extend`. The rest, in
``jaxstate._src``, is how it is made, and may change in any release.
"""

import sys as _sys

from jaxstate import extend, random
from jaxstate._src import _jax
from jaxstate._src import rules as _rules  # noqa: F401  they register themselves
from jaxstate._src.arrays.inplace import array, inplace
from jaxstate._src.causal.fixed_point import causal_fixed_point
from jaxstate._src.params.ensemble import Ensemble, ensemble
from jaxstate._src.params.interception import Intercepted, intercept
from jaxstate._src.params.metadata import Metadata
from jaxstate._src.params.names import flatten_names, unflatten_names
from jaxstate._src.params.param import param, scope
from jaxstate._src.params.parametrized import Parametrized, parametrized
from jaxstate._src.params.places import path
from jaxstate._src.params.shaped import Shaped
from jaxstate._src.params.stack import Stack, stack
from jaxstate._src.params.summary import ParameterRow, ScopeRow, Summary, summary
from jaxstate._src.params.variables import Variable, is_writable, variable
from jaxstate._src.public import known_as_public as _known_as_public
from jaxstate._src.sow.harvest import plant, reap, sow
from jaxstate._src.streams.stream import Stream, next_key, rng_stream
from jaxstate._src.tree.mutate import mutate
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


_known_as_public(_sys.modules[__name__])
_known_as_public(extend)
