"""Puts random small faults into the package, one at a time, and says which ones the tests notice.

    python -m jaxstate_tests.mutants --number 100 --seed 1

A fault is put into a copy of the repository, and the tests of its area run there until the first
one fails. The same seed gives the same faults for the same code. Faults that were not noticed are
printed as diffs: each is a test that is missing, or changes nothing that anyone can see. Where the
tests do not end in three times the time that they take without a fault, that is said instead.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import copy
import difflib
import itertools
import os
import pathlib
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parent.parent

# The files of an area, and the folders and files of tests that are run for it: first its own, then
# others that use it. A file of the package that is not named here belongs to the core.
AREAS: dict[str, tuple[str, str]] = {
    "random": ("random streams/*", "test_random rules core test_peers fuzz"),
    "params": ("params/*", "params core rules fuzz test_peers test_docs"),
    "in place": ("arrays/*", "arrays core rules fuzz"),
    "sow": ("sow/*", "sow core fuzz"),
    "causal": ("causal/*", "causal"),
    "rules": ("rules/*", "rules core traces test_extend arrays params sow test_random fuzz"),
    "traces": ("traces/*", "traces core test_extend fuzz"),
    "tree": ("tree/*", "tree fuzz"),
    "core": ("*", "core rules traces test_extend test_guard test_random params arrays sow fuzz"),
}
# What `make test` leaves out.
NOT_RUN = ("rules/eight_devices",)
# Not of these areas, or nothing but texts.
LEFT_OUT = "__init__ */__init__ extend errors _jax _jax/*"

SWAPPED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    kind: str
    before: str
    place: tuple[int, int]  # in bytes
    text: str

    @property
    def after(self) -> str:
        start, end = self.place
        source = self.before.encode()
        return (source[:start] + self.text.encode() + source[end:]).decode()

    @property
    def area(self) -> str:
        return area_of(self.path)

    def diff(self) -> str:
        lines = [text.splitlines(keepends=True) for text in (self.before, self.after)]
        return "".join(difflib.unified_diff(*lines, self.path, self.path, n=2))


def matches(path: str, names: str) -> bool:
    parts = pathlib.PurePath(path).with_suffix("").parts[1:]
    inside = "/".join(part for part in parts if part != "_src")
    return any(pathlib.PurePath(inside).match(name) for name in names.split())


def area_of(path: str) -> str:
    return next(area for area, (files, _) in AREAS.items() if matches(path, files))


def tests_of(area: str) -> list[str]:
    places = [ROOT / "jaxstate_tests" / name for name in AREAS[area][1].split()]
    places = [place if place.is_dir() else place.with_suffix(".py") for place in places]
    return [str(place.relative_to(ROOT)) for place in places]


# -- Faults ----------------------------------------------------------------------------------


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """What is replaced, and by what."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "negated condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield "negated condition", test, ast.UnaryOp(ast.Not(), test)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "dropped not", node, node.operand
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield "swapped comparison", node, changed(node, ops=[swap(node.ops[0]), *node.ops[1:]])
    if isinstance(node, ast.BoolOp):
        yield "and for or", node, changed(node, op=swap(node.op))
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield "plus for minus", node, changed(node, op=swap(node.op))
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "changed constant", node, ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "changed constant", node, ast.Constant(node.value + 1)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "dropped call", node, ast.Pass()
    if isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *others = node.args
        if not any(isinstance(arg, ast.Starred) for arg in node.args):
            yield "swapped arguments", node, changed(node, args=[second, first, *others])


def swap(op):
    return SWAPPED[type(op)]()


def changed(node, **fields):
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def of_behaviour(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are not part of an annotation, a text, or the making of an error."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
            continue
        if isinstance(node, ast.FunctionDef) and re.match(
            r"__repr__|__str__|_?describe", node.name
        ):
            continue
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "type_comment", "decorator_list"):
                values = value if isinstance(value, list) else [value]
                stack.extend(v for v in values if isinstance(v, ast.AST))


def mutants_of(path: pathlib.Path) -> Iterator[Mutant]:
    source = path.read_text()
    name = str(path.relative_to(ROOT))
    starts = [0, *itertools.accumulate(map(len, source.encode().splitlines(keepends=True)))]
    for node in of_behaviour(ast.parse(source)):
        for kind, old, new in variants(node):
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            text = ast.unparse(new)
            text = text if isinstance(new, ast.stmt) else f"({text})"
            yield Mutant(name, old.lineno, kind, source, (start, end), text)


def choose(number: int, seed: int, areas: Iterable[str]) -> list[Mutant]:
    names = {str(path.relative_to(ROOT)): path for path in (ROOT / "jaxstate").rglob("*.py")}
    found = [
        mutant
        for name in sorted(names)
        if not matches(name, LEFT_OUT) and area_of(name) in areas
        for mutant in mutants_of(names[name])
    ]
    random.Random(seed).shuffle(found)
    return list(itertools.islice(filter(compiles, found), number))


def compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.after, mutant.path, "exec")
    except SyntaxError:
        return False
    return True


# -- Runs ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """``word`` is "noticed", "not noticed" or "no end": the tests ran into the limit."""

    word: str
    by: str
    seconds: float


def run_tests(folder: pathlib.Path, area: str, limit: float) -> Outcome:
    """The tests of an area until the first one fails, in a process that is ended at the limit."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no"]
    command += ["-p", "no:cacheprovider", "-m", "not slow", *tests_of(area)]
    command += [f"--ignore=jaxstate_tests/{name}" for name in NOT_RUN]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Outcome("no end", f"{limit:.0f} s", limit)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    by = failed[1] if failed else (output.strip().splitlines() or [""])[-1]
    word = "noticed" if process.returncode else "not noticed"
    return Outcome(word, by, time.monotonic() - start)


def copy_of_repository(folder: str) -> pathlib.Path:
    target = pathlib.Path(folder)
    for name in ("jaxstate", "jaxstate_tests", "docs", "examples"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


class Runner:
    """Copies of the repository, as many as there are processes."""

    def __init__(self, jobs: int, folder: str):
        self.free: queue.Queue[pathlib.Path] = queue.Queue()
        self.limits: dict[str, float] = {}
        for job in range(jobs):
            self.free.put(copy_of_repository(f"{folder}/{job}"))

    def unchanged(self, area: str) -> Outcome:
        folder = self.free.get()
        try:
            return run_tests(folder, area, 7200)
        finally:
            self.free.put(folder)

    def run(self, mutant: Mutant) -> Outcome:
        folder = self.free.get()
        try:
            (folder / mutant.path).write_text(mutant.after)
            return run_tests(folder, mutant.area, self.limits[mutant.area])
        finally:
            (folder / mutant.path).write_text(mutant.before)
            self.free.put(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--area", choices=sorted(AREAS), action="append")
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")
    parser.add_argument("--limit", type=float, help="seconds; otherwise three times the area's own")
    options = parser.parse_args()
    mutants = choose(options.number, options.seed, options.area or AREAS)
    if options.list:
        print("".join(f"{mutant.kind}\n{mutant.diff()}\n" for mutant in mutants))
        return 0
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        runner = Runner(options.jobs, folder)
        areas = sorted({mutant.area for mutant in mutants})
        if options.limit:
            runner.limits = dict.fromkeys(areas, options.limit)
        else:
            for area, outcome in zip(areas, pool.map(runner.unchanged, areas), strict=True):
                if outcome.word != "not noticed":
                    print(f"the tests of {area} fail without a fault: {outcome.by}")
                    return 1
                runner.limits[area] = 60 + 3 * outcome.seconds
                print(f"{area}: {outcome.seconds:.0f} s without a fault", flush=True)
        futures = {pool.submit(runner.run, mutant): mutant for mutant in mutants}
        words: dict[str, list[Mutant]] = {"noticed": [], "no end": [], "not noticed": []}
        for future in concurrent.futures.as_completed(futures):
            mutant, outcome = futures[future], future.result()
            words[outcome.word].append(mutant)
            where = f"{mutant.path}:{mutant.line} {mutant.kind}"
            print(f"{outcome.word:11} {outcome.seconds:5.0f} s  {where}: {outcome.by}", flush=True)
    for word in ("no end", "not noticed"):
        for mutant in words[word]:
            print(f"\n{word}: {mutant.kind}\n{mutant.diff()}", end="")
    print(", ".join(f"{len(found)} {word}" for word, found in words.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
