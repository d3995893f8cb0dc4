"""The faults of `make mutants` are what they say, and the same for a seed."""

import ast

import pytest

from jaxstate_tests import mutants

SOURCE = """
def f(a, b):
    g(a, b)
    if a < 1 and not b:
        return a + b
"""
FAULTS = {
    "dropped call": ("g(a, b)", "pass"),
    "swapped arguments": ("g(a, b)", "g(b, a)"),
    "negated condition": ("a < 1 and not b", "not (a < 1 and not b)"),
    "and for or": ("and", "or"),
    "swapped comparison": ("<", "<="),
    "changed constant": ("1", "2"),
    "dropped not": ("not b", "b"),
    "plus for minus": ("+", "-"),
}


def test_the_faults_of_a_function(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "f.py"
    path.write_text(SOURCE)
    found = {m.kind: ast.dump(ast.parse(m.after)) for m in mutants.mutants_of(path)}
    wanted = {kind: ast.dump(ast.parse(SOURCE.replace(*c))) for kind, c in FAULTS.items()}
    assert found == wanted


@pytest.mark.parametrize("area", mutants.AREAS)
def test_a_seed_names_the_same_faults(area):
    chosen = mutants.choose(5, 1, [area])
    assert chosen == mutants.choose(5, 1, [area]) != mutants.choose(5, 2, [area])
    assert mutants.tests_of(area)
    assert all((mutants.ROOT / name).exists() for name in mutants.tests_of(area))
    for mutant in chosen:
        assert ast.dump(ast.parse(mutant.before)) != ast.dump(ast.parse(mutant.after))
        assert mutant.area == area
