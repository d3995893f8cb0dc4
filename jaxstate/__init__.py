from jaxstate import rules as _rules
from jaxstate.random import next_key, rng_stream
