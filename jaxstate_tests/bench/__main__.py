"""``python -m jaxstate_tests.bench``: prints the table, and writes a plot and a JSON."""

import argparse
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax

from jaxstate_tests.bench import programs, table
from jaxstate_tests.bench.figures import BY_HAND, FIGURES, measured, peak_bytes
from jaxstate_tests.bench.measure import Timing, compare
from jaxstate_tests.bench.models import MODELS, QUICK, libraries
from jaxstate_tests.bench.table import Row


def rows(quick: bool, repeats: int, only: str) -> Iterator[Row]:
    """The lines of the table, as they are measured."""
    found, missing = libraries()
    for name, why in missing.items():
        print(f"left out: {name}, which cannot be imported here ({why})")
    chosen = {k: v for k, v in (QUICK if quick else MODELS).items() if only in f"{k}: "}
    for model, figure, timings in measured(chosen, found, repeats):
        yield table.row(f"{model}: {figure.name}", figure.target, timings, BY_HAND)
    for model, sizes in chosen.items():
        key, x = jax.random.key(0), sizes.input()
        nets = {name: sizes.written_in(found[name]) for name in ("jaxstate", BY_HAND)}
        peaks = {
            name: float(peak_bytes(net, (*net.init(key, x), x, key)))
            for name, net in nets.items()
            if net is not None
        }
        ratios = {name: peak / peaks[BY_HAND] for name, peak in peaks.items() if name != BY_HAND}
        yield Row(f"{model}: memory of a step", 1.0, ratios, {})
    for program in programs.QUICK if quick else programs.PROGRAMS:
        if only in program.name:
            sides = program.sides()
            reference = list(sides)[1]
            timings = compare(sides, reference, repeats)
            yield table.row(program.name, program.target, timings, reference)
    if only in "import":
        seconds = programs.import_seconds(1 if quick else 5)
        timing = {"jaxstate": Timing(seconds, seconds / 0.03), "30 ms": Timing(0.03, 1.0)}
        yield table.row("import, against 30 ms", 1.0, timing, "30 ms")


def show_names(quick: bool, only: str) -> None:
    """The lines of the table and the ratios that are wanted, without measuring anything."""
    named = [(f"{m}: {f.name}", f.target) for m in (QUICK if quick else MODELS) for f in FIGURES]
    named += [(p.name, p.target) for p in (programs.QUICK if quick else programs.PROGRAMS)]
    for name, target in [*named, ("import, against 30 ms", 1.0)]:
        if only in name:
            print(f"{name:44}{target:8.2f}")


def commit() -> str:
    """The commit that is checked out, if this is a checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxstate_tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument("--repeats", type=int, help="rounds of each comparison")
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--list", action="store_true", help="show the names, and measure nothing")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench"))
    parser.add_argument(
        "--compare", nargs=2, type=pathlib.Path, metavar=("OLD", "NEW"),
        help="show what changed between two JSON files, and measure nothing",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.compare:
        table.show_comparison(*options.compare)
        return
    if options.list:
        show_names(options.quick, options.only)
        return
    about = {
        "commit": commit(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    table.show_header()
    done = []
    for row in rows(options.quick, options.repeats or (2 if options.quick else 15), options.only):
        table.show(row)
        done.append(row)
    met = statistics.mean(row.is_met for row in done) if done else 0
    print(f"{met:.0%} of {len(done)} targets met, with a tolerance of {table.TOLERANCE:.0%}")
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"jax-{jax.__version__}"
    table.save(options.out / f"{name}.json", about, done)
    try:
        from jaxstate_tests.bench import plot

        plot.draw(options.out / f"{name}.png", ", ".join(map(str, about.values())), done)
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"written to {options.out / name}.*")


if __name__ == "__main__":
    main()
