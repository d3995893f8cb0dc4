"""docs/comparison.md says what comes out with its versions, and ours is right with all."""

import pathlib

import jax
import pytest

from jaxstate_tests import comparison

PAGE = (pathlib.Path(__file__).parents[1] / "docs/comparison.md").read_text()
plain = pytest.mark.leaks_allowed("the other libraries leak tracers; ours are checked elsewhere")


@plain
@pytest.mark.parametrize("transformation", comparison.TRANSFORMATIONS)
@pytest.mark.parametrize("kind", comparison.KINDS)
def test_jaxstate_is_right(kind, transformation):
    assert comparison.outcome(kind, "jaxstate", transformation) == "right"


@plain
@pytest.mark.skipif(comparison.versions() not in PAGE, reason="the page is about other versions")
@pytest.mark.parametrize("kind", comparison.KINDS)
def test_the_page_says_what_comes_out(kind):
    with jax.checking_leaks.func(False):
        table = "\n".join(comparison.table(kind))
    assert table in PAGE
