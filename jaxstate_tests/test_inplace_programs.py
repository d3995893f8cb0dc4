"""Random NumPy programs give NumPy's results: eagerly, jitted, with loops of `jax.lax`, per lane.

``JAXSTATE_EXAMPLES`` sets the number of programs.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxstate
from jaxstate_tests.numpy_programs import LAX, PYTHON, initial, programs, run

EXAMPLES = int(os.environ.get("JAXSTATE_EXAMPLES", "12"))
LANES = 2

slow_examples = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize="JAXSTATE_EXAMPLES" not in
    os.environ, suppress_health_check=list(HealthCheck),
)  # fmt: skip


def expected(program, seed):
    return run(program, initial(seed), PYTHON)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def in_jax(way):
    """A function that makes a pure function of the arrays of a program."""

    def program_in_jax(program):
        return jaxstate.inplace(lambda arrays: run(program, arrays, way))

    return program_in_jax


def arrays_of(seed):
    return jax.tree.map(jnp.asarray, initial(seed))


# Branches of Python do not take traced conditions, so Python's blocks run eagerly only.
@pytest.mark.parametrize(
    "way, jitted",
    [(PYTHON, False), (LAX, False), (LAX, True)],
    ids=["python", "lax", "lax in jit"],
)
def test_programs_give_what_numpy_gives(way, jitted):
    @slow_examples
    @given(programs(), st.integers(0, 9))
    def check(program, seed):
        f = in_jax(way)(program)
        arrays = arrays_of(seed)
        before = jax.tree.map(np.array, arrays)
        assert_same(dict((jax.jit(f) if jitted else f)(arrays)), expected(program, seed))
        jax.tree.map(np.testing.assert_array_equal, arrays, before)

    check()


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_programs_per_lane_give_what_numpy_gives_for_each(jitted):
    @slow_examples
    @given(programs(), st.integers(0, 9))
    def check(program, seed):
        f = jax.vmap(in_jax(LAX)(program))
        stacked = jax.tree.map(
            lambda *xs: jnp.stack(xs), *(arrays_of(seed + k) for k in range(LANES))
        )
        found = (jax.jit(f) if jitted else f)(stacked)
        for k in range(LANES):
            assert_same({n: x[k] for n, x in found.items()}, expected(program, seed + k))

    check()


def test_programs_in_lanes_inside_an_inplace_function():
    """The vmap is inside, and the arrays of its lanes are arguments and arrays born there."""

    @slow_examples
    @given(programs(), st.integers(0, 9))
    def check(program, seed):
        @jaxstate.inplace
        def f(stacked):
            return jax.vmap(lambda arrays: run(program, arrays, LAX))(stacked)

        stacked = jax.tree.map(
            lambda *xs: jnp.stack(xs), *(arrays_of(seed + k) for k in range(LANES))
        )
        found = f(stacked)
        for k in range(LANES):
            assert_same({n: x[k] for n, x in found.items()}, expected(program, seed + k))

    check()
