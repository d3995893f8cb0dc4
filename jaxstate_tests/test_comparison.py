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


@plain
@pytest.mark.slow
@pytest.mark.skipif(comparison.versions() not in PAGE, reason="the page is about other versions")
@pytest.mark.parametrize("work", comparison.SPEED)
def test_the_page_says_what_libraries_cost(work):
    """Up to a tenth: what JAX keeps of earlier tests counts too."""
    model = comparison.MODELS[0]
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {work}: {model} |")]
    said = [float(cell) for cell in row.strip("| ").split(" | ")[1:]]
    with jax.checking_leaks.func(False):
        found = comparison.calls(work, model)
    del found["by hand"]
    assert said == pytest.approx([*found.values()], rel=0.1)
