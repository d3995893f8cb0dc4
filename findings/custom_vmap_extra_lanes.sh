#!/usr/bin/env bash
# jax 0.10.2 (and 0.11.2, 0.12.0.1): under vmap, the derivative of a function with a custom_vmap rule
# has a lane axis too many, without an error.
#
# The rule below is a valid one: whatever it is given, it returns a value per lane and says so. If an
# operand has lanes and its tangent has none, JAX calls the rule for the operands that have lanes in
# both (here none), inside of a vmap over the others. The result then has lanes of the rule and lanes
# of that vmap, and JAX keeps both axes (jax/_src/custom_batching.py, custom_vmap_jvp).
#
# Seen:  shape (3, 3) for the value and the tangent of a function of scalars over three lanes.
# By hand, and with a rule that says False where no operand has lanes: shape (3,).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def lanes_of(says_lanes):
    f = custom_vmap(jnp.sin)

    @f.def_vmap
    def rule(size, in_batched, x):
        if says_lanes:
            return jnp.sin(x if in_batched[0] else jnp.full(size, x)), True
        return jnp.sin(x), in_batched[0]

    def derivative(x):
        return jax.jvp(f, (x,), (jnp.float32(1),))

    return [y.shape for y in jax.vmap(derivative)(jnp.arange(3.0))]


assert jax.__version__ == "0.10.2"
print("a rule that always gives lanes:", lanes_of(True))
print("a rule that gives them if it has some:", lanes_of(False))
assert lanes_of(True) == [(3, 3), (3, 3)], "JAX has changed"
assert lanes_of(False) == [(3,), (3,)]
PYTHON
