"""Runs the tests of other libraries twice, as they are and inside of open state, and compares.

    python -m jaxstate_tests.suites quax flax.linen

The tests are those of the source distributions, in the versions that are installed. A project that
does not publish its tests is given as a checkout: ``--sources FOLDER`` with ``FOLDER/equinox``. A
test that passes as it is and not inside of state is printed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


@dataclass(frozen=True)
class Suite:
    """The tests of a distribution are in ``folders``; some are left out, for a reason."""

    distribution: str
    folders: tuple[str, ...] = ("tests",)
    left_out: tuple[str, ...] = ()


NEEDS_TENSORFLOW = ("jax2tf", "tensorflow")

SUITES = {
    "quax": Suite("quax"),
    "equinox": Suite("equinox"),
    "diffrax": Suite("diffrax", ("test", "tests")),
    "optimistix": Suite("optimistix"),
    "lineax": Suite("lineax"),
    "flax.linen": Suite("flax", ("tests/linen",)),
    "flax.nnx": Suite("flax", ("tests/nnx",)),
    "haiku": Suite("dm-haiku", ("haiku/_src",), NEEDS_TENSORFLOW),
    "chex": Suite("chex", ("chex/_src", "chex"), NEEDS_TENSORFLOW),
    "numpyro": Suite("numpyro", ("test", "tests")),
    "blackjax": Suite("blackjax"),
}


def download(suite: Suite, folder: pathlib.Path) -> pathlib.Path:
    """The source distribution of the installed version."""
    requirement = f"{suite.distribution}=={metadata.version(suite.distribution)}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
    subprocess.run([*command, ":all:", requirement, "--dest", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    return source


def run(
    suite: Suite, source: pathlib.Path, way: str, options: argparse.Namespace
) -> dict[str, str]:
    """The outcome of each test."""
    folders = [name for name in suite.folders if (source / name).is_dir()][:1]
    results = source / f"results-{way}.json"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "jaxstate_tests.suites_plugin", "-o", "addopts="]
    command += ["-o", "python_files=test_*.py *_test.py", "--continue-on-collection-errors"]
    command += [f"--ignore-glob=*{name}*" for name in suite.left_out]
    command += ["-n", str(options.jobs)] if options.jobs > 1 else []
    command += ["-k", options.k] if options.k else []
    environment = {
        **os.environ,
        "JAXSTATE_SUITE": way,
        "JAXSTATE_SUITE_RESULTS": str(results),
        "PYTHONPATH": str(ROOT),
    }
    print(f"{suite.distribution}, {way}: {' '.join(folders)}", flush=True)
    with (source / f"output-{way}.txt").open("w") as output:
        subprocess.run(
            [*command, *folders], cwd=source, env=environment, stdout=output,
            stderr=subprocess.STDOUT, timeout=options.limit,
        )  # fmt: skip
    text = (source / f"output-{way}.txt").read_text()
    print("   ", (text.strip().splitlines() or ["nothing"])[-1], flush=True)
    if not results.exists():
        raise RuntimeError(f"pytest ended without results:\n{text[-4000:]}")
    return json.loads(results.read_text())


def compare(name: str, options: Any) -> bool:
    suite = SUITES[name]
    with tempfile.TemporaryDirectory() as folder:
        if options.sources:
            checkout = pathlib.Path(options.sources, suite.distribution)
            source = pathlib.Path(folder, suite.distribution)
            subprocess.run(["cp", "-r", str(checkout), str(source)], check=True)
        else:
            source = download(suite, pathlib.Path(folder))
        if not any((source / tests).is_dir() for tests in suite.folders):
            print(f"{name}: no tests in {source.name}. Give a checkout: --sources FOLDER")
            return False
        plain = run(suite, source, "plain", options)
        state = run(suite, source, "state", options)
        different = sorted(test for test in plain if state.get(test) != plain[test])
        passed = sum(outcome == "passed" for outcome in plain.values())
        print(f"{name}: {passed} of {len(plain)} pass as they are, {len(different)} are different")
        for test in different:
            print(f"    {test}: {plain[test]}, inside of state {state.get(test, 'not run')}")
        if different and options.output:
            pathlib.Path(options.output).write_text((source / "output-state.txt").read_text())
        return not different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all if none is named")
    parser.add_argument("--sources", help="a folder with a checkout of each distribution")
    parser.add_argument("--jobs", type=int, default=1, help="processes of pytest-xdist")
    parser.add_argument("--limit", type=float, help="seconds for one run of one suite")
    parser.add_argument("--output", help="a file for what pytest says inside of state")
    parser.add_argument("-k", help="as for pytest")
    options = parser.parse_args()
    same = [compare(name, options) for name in options.suites or SUITES]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
