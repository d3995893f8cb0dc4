from jaxstate import rules as _rules
from jaxstate.params import Parametrized, param, parametrized, scope
from jaxstate.random import next_key, rng_stream
