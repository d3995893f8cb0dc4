"""The benchmarks run, on small models; what they measure is not looked at."""

import json

import jax
import pytest

from jaxstate_tests.bench import models
from jaxstate_tests.bench.__main__ import main
from jaxstate_tests.bench.measure import Side, compare


@pytest.mark.leaks_allowed("jax.new_ref leaves traces behind, and every call is slower")
def test_quick_run_writes_a_json_that_can_be_compared(tmp_path, capsys):
    main(["--quick", "--repeats", "1", "--only", "mlp: ", "--out", str(tmp_path)])
    written = tmp_path / f"jax-{jax.__version__}.json"
    rows = json.loads(written.read_text())["rows"]
    assert [r["name"] for r in rows if "memory" in r["name"]] == ["mlp: memory of a step"]
    assert {r["target"] for r in rows} > {1.05, 1.15}
    capsys.readouterr()
    main(["--compare", str(written), str(written)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split()[-1] == "1.00"
    assert len(lines) == 3 + len(rows)


def test_names_are_shown_without_measuring(capsys):
    main(["--list", "--only", "import"])
    assert capsys.readouterr().out.split() == ["import,", "against", "30", "ms", "1.00"]


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(models, "PEERS", {"by hand": "by_hand", "Gone": "no_such_library"})
    found, missing = models.libraries()
    assert list(found) == ["by hand"]
    assert missing["Gone"].startswith("ModuleNotFoundError")


def test_ratio_is_to_the_reference():
    sides = {"slow": Side(lambda: sum(range(100_000)), 3), "fast": Side(lambda: 0, 3)}
    timings = compare(sides, "fast", 3)
    assert timings["fast"].ratio == 1
    assert timings["slow"].ratio > 10
