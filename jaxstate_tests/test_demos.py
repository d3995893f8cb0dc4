"""The programs of the gallery that are neither clients of the extension point nor benchmarks."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import language_model
import sandpile


def settled(table, grains):
    table = np.array(table)
    table[len(table) // 2, len(table) // 2] += grains
    while table.max() > 3:
        give = table // 4
        table -= 4 * give
        table[1:] += give[:-1]
        table[:-1] += give[1:]
        table[:, 1:] += give[:, :-1]
        table[:, :-1] += give[:, 1:]
    return table


def test_a_sandpile_is_that_of_numpy_and_the_table_before_is_as_it_was():
    before = jnp.full((13, 13), 2)
    np.testing.assert_array_equal(sandpile.drop(before, 100), settled(before, 100))
    np.testing.assert_array_equal(before, 2)
    tables = jax.vmap(sandpile.drop, (None, 0))(before, jnp.array([1, 30, 300]))
    np.testing.assert_array_equal(tables, [settled(before, n) for n in (1, 30, 300)])


@pytest.fixture(scope="module")
def params():
    with jax.checking_leaks.func(False):
        return language_model.model.init(jax.random.key(0), language_model.data[:8])


def test_what_is_written_with_a_cache_is_the_best_by_the_whole_sequence(params):
    text = language_model.write(params, jax.random.key(1), "The f", 20, temperature=1e-6)
    assert text.startswith("The f") and len(text) == 20
    codes = np.searchsorted(language_model.letters, np.frombuffer(text.encode(), np.uint8))
    best = language_model.model.apply(params, codes).argmax(-1)
    np.testing.assert_array_equal(codes[5:], best[4:-1])


def test_the_model_learns():
    losses = language_model.train(jax.random.key(0), steps=12, batch=4)[1]
    assert losses[-1] < losses[0] - 0.5
