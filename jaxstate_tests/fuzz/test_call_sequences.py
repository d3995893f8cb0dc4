"""Random sequences of calls of shared functions and modules equal the same calls in plain Python.

`make test` runs 100 of them, the same every time. ``make fuzz PROGRAMS=sequences`` runs new ones
for as long as asked, and prints the seed; a counterexample becomes a test of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.fuzz import call_sequences as cs
from jaxstate_tests.fuzz.fuzzing import drawn, fuzz


def check(sequence):
    world, by_hand = cs.World(sequence.program), cs.ByHand(sequence.program)
    try:
        for action in sequence.actions:
            wanted = by_hand.do(action)
            try:
                found = world.do(action)
            except jaxstate.CustomRuleStateError:
                facts = sequence.program.facts[action.number]
                assert facts & {"custom_jvp", "custom_vjp"}, action
                return
            assert_same(found, wanted, action)
            assert_same(world.state(), by_hand.state(), action)
    finally:
        world.close()


def assert_same(found, wanted, action):
    assert jax.tree.structure(found) == jax.tree.structure(wanted), action
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert not isinstance(a, jax.core.Tracer), action
        assert jnp.shape(a) == jnp.shape(b), action
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(action))


CHUNKS = 5


@pytest.mark.leaks_allowed("the leak checker empties the caches that are tested")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_call_sequences(chunk):
    drawn(chunk, 100 // CHUNKS, cs.sequences(length=5))(check)


@pytest.mark.slow
@pytest.mark.leaks_allowed("the leak checker empties the caches that are tested")
def test_fuzz():
    fuzz(check, cs.sequences())
