"""The table, the JSON, and the comparison of two of them."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxstate_tests.bench.measure import Timing


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: of what was measured.
      target: the ratio that is wanted.
      ratios: for each side its ratio to the reference; ours is the first.
      seconds: for each side, the reference included.
    """

    name: str
    target: float
    ratios: dict[str, float]
    seconds: dict[str, float]

    @property
    def reached(self) -> float:
        return next(iter(self.ratios.values()))

    @property
    def is_met(self) -> bool:
        return self.reached <= self.target * (1 + TOLERANCE)


# Times of the same program differ by so much between two runs.
TOLERANCE = 0.05


def row(name: str, target: float, timings: Mapping[str, Timing], reference: str) -> Row:
    return Row(
        name,
        target,
        {side: t.ratio for side, t in timings.items() if side != reference},
        {side: t.seconds for side, t in timings.items()},
    )


def show_header() -> None:
    print(f"{'':44}{'time':>10}{'ratio':>8}{'target':>8}   {'':4} others")


def show(row: Row) -> None:
    time = _time(next(iter(row.seconds.values()))) if row.seconds else ""
    others = ", ".join(f"{k} {v:.2f}" for k, v in list(row.ratios.items())[1:])
    verdict = "met" if row.is_met else "MISS"
    line = f"{row.name:44}{time:>10}{row.reached:8.2f}{row.target:8.2f}   {verdict:4} {others}"
    print(line.rstrip(), flush=True)


def _time(seconds: float) -> str:
    if seconds >= 1e-3:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} us"


def save(path: pathlib.Path, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
    contents = {"about": dict(about), "rows": [r._asdict() for r in rows]}
    path.write_text(json.dumps(contents, indent=1) + "\n")


def load(path: pathlib.Path) -> tuple[dict[str, Any], list[Row]]:
    contents = json.loads(path.read_text())
    return contents["about"], [Row(**r) for r in contents["rows"]]


def show_comparison(old: pathlib.Path, new: pathlib.Path) -> None:
    """What changed between two runs, of two commits."""
    (about_old, rows_old), (about_new, rows_new) = load(old), load(new)
    before = {r.name: r for r in rows_old}
    print(f"old: {about_old}\nnew: {about_new}")
    print(f"{'ratio':44}{'old':>8}{'new':>8}{'new/old':>9}")
    for r in rows_new:
        if r.name in before:
            was = before[r.name].reached
            print(f"{r.name:44}{was:8.2f}{r.reached:8.2f}{r.reached / was:9.2f}")
