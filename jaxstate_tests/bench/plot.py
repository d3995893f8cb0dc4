"""The table as a picture: one point for each library, one line for each figure."""

import pathlib
from collections.abc import Sequence

from jaxstate_tests.bench.table import Row


def draw(path: pathlib.Path, title: str, rows: Sequence[Row]) -> None:
    """Writes the picture to a file; the ratios are on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.25 * len(rows)), layout="constrained")
    sides = list(dict.fromkeys(side for r in rows for side in list(r.ratios)[1:]))
    places = range(len(rows))
    for side in sides:
        points = [
            (r.ratios[side], y) for y, r in zip(places, rows, strict=True) if side in r.ratios
        ]
        axes.plot(*zip(*points, strict=True), "o", alpha=0.5, label=side)
    axes.plot([r.reached for r in rows], places, "k|", markersize=12, label="jaxstate")
    axes.plot([r.target for r in rows], places, "r<", markersize=4, label="target")
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.set_yticks(list(places), [r.name for r in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ratio to hand-written JAX")
    axes.set_title(title)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
