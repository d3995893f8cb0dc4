"""`causal_fixed_point` of random causal functions."""

import os

import jax
import numpy as np
import pytest

from jaxstate import causal_fixed_point
from jaxstate_tests.causal.random_programs import random_function
from jaxstate_tests.causal.test_fixed_point import by_hand

QUICK = 4
SEEDS = int(os.environ.get("FUZZ_PROGRAMS", "40"))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, marks=[pytest.mark.slow] * (i >= QUICK)) for i in range(SEEDS)],
)
def test_the_sequence_is_that_of_the_whole_function(seed):
    """Half of them are jitted."""
    f, x = random_function(seed)
    run = jax.jit if seed % 2 else lambda f: f
    found = run(lambda x: causal_fixed_point(f, x))(x + 1)
    wanted = by_hand(f, x, range(len(x)))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3, err_msg=f.__name__)
