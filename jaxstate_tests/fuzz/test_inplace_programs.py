"""Random NumPy programs give NumPy's results: eagerly, jitted, with loops of `jax.lax`, per lane.

`make test` runs 200 of them, the same every time. ``make fuzz PROGRAMS=numpy`` runs new ones for as
long as asked, and prints the seed; a counterexample becomes a test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxstate
from jaxstate_tests.fuzz.fuzzing import drawn, fuzz
from jaxstate_tests.fuzz.numpy_programs import LAX, NUMPY, PYTHON, programs, run
from jaxstate_tests.fuzz.numpy_statements import initial

LANES = 2
EXAMPLES = 200


def in_jax(program, way):
    return lambda arrays: run(program, arrays, way)


def stacked(seed):
    lanes = [initial(seed + k) for k in range(LANES)]
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *lanes)


def alone(transform, way):
    """A run of the program on the arrays of one seed."""

    def results(program, seed):
        return [(seed, transform(jaxstate.inplace(in_jax(program, way)))(initial(seed)))]

    return results


def per_lane(transform):
    """A run in the lanes of a vmap, on the arrays of as many seeds."""

    def results(program, seed):
        found = jax.tree.map(np.asarray, transform(in_jax(program, LAX))(stacked(seed)))
        return [(seed + k, {n: x[k] for n, x in found.items()}) for k in range(LANES)]

    return results


def same(f):
    return f


# Branches of Python do not take traced conditions, so Python's blocks run eagerly only.
MODES = {
    "python": alone(same, PYTHON),
    "lax": alone(same, LAX),
    "lax in jit": alone(jax.jit, LAX),
    "vmap": per_lane(lambda f: jax.vmap(jaxstate.inplace(f))),
    "jit of vmap": per_lane(lambda f: jax.jit(jax.vmap(jaxstate.inplace(f)))),
    "vmap inside": per_lane(lambda f: jaxstate.inplace(jax.vmap(f))),
    "scan inside": per_lane(lambda f: jaxstate.inplace(lambda xs: jax.lax.map(f, xs))),
}


def check(program, seed, mode):
    # JAX keeps a derivative rule, and with it the tracers of a vmap that the rule closes over.
    with jax.checking_leaks.func("custom_jvp" not in repr(program)):
        results = MODES[mode](program, seed)
    for number, found in results:
        arrays = initial(number)
        wanted = run(program, arrays, NUMPY)
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            assert found[name].dtype == array.dtype, name
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_programs_give_what_numpy_gives(mode):
    @drawn(list(MODES).index(mode), EXAMPLES // len(MODES), programs(), st.integers(0, 9))
    def run(program, seed):
        check(program, seed, mode)


@pytest.mark.slow
def test_fuzz():
    fuzz(check, programs(), st.integers(0, 9), st.sampled_from(sorted(MODES)))
