"""docs/comparison.md has the table of features, and each cell that says that it works does."""

import pathlib

import jax
import pytest

from jaxstate_tests.features.table import COLUMNS, FEATURES, PACKAGES, is_installed, programs, table

PAGE = (pathlib.Path(__file__).parents[1] / "docs/comparison.md").read_text()
INSTALLED = [column for column in COLUMNS if is_installed(column)]
# What other libraries do changes with their versions, and not with ours.
CELLS = [
    pytest.param(column, name, marks=[pytest.mark.slow] * (column != "of_jaxstate"))
    for column in INSTALLED
    for name in programs(column)
]


@pytest.mark.leaks_allowed("the other libraries leak tracers; ours are checked elsewhere")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("column", "name"), CELLS)
def test_a_feature_works(column, name):
    with jax.checking_leaks.func(False):
        programs(column)[name]()


def test_every_program_is_one_of_a_row():
    for column in INSTALLED:
        assert programs(column).keys() <= FEATURES.keys(), column
    assert PACKAGES.keys() <= COLUMNS.keys()


@pytest.mark.skipif(len(INSTALLED) < len(COLUMNS), reason="the page is about all of them")
def test_the_page_has_the_table():
    assert "\n".join(table()) in PAGE
