"""Imports point up one list, and one file alone knows JAX's internals and versions."""

import ast
import pathlib
import pydoc
import subprocess
import sys

import pytest

import jaxstate

PACKAGE = pathlib.Path(jaxstate.__file__).parent
INSIDE = "_src"
# From below to above. A file imports from the floors below its own, and from the files before it
# in its own folder.
FLOORS = {
    "_jax": [
        "hooks", "internals", "versions", "names", "jaxprs", "types", "meshes", "traces",
        "registries", "tracers", "building", "context", "frames", "params", "solves",
        "custom_rules", "calls", "wrappers_of_calls", "wrappers", "wrappers_in_place",
    ],
    "errors": [],
    "handles": [],
    "core": [
        "slots", "capture", "primitives", "uses", "notes", "lanes", "boundaries",
        "resolve", "specs", "memory", "refs", "initializers", "contents", "discharge", "discharged",
        "registry",
    ],
    "rules": [
        "calls", "loops", "branches", "derivatives", "explicit", "linear_calls", "solves",
        "foreign", "donation", "jitted", "ahead_of_time", "mesh", "batching", "hijax",
        "remat_opt", "traced_derivatives", "kernels",
    ],
    "traces": ["state", "retrace", "stateful"],
    "causal": [
        "knowledge", "program", "regions", "rule", "elementwise", "copies", "mixing", "windows",
        "indices", "recurrences", "table", "fixed_point",
    ],
    "streams": ["keys", "holders", "stream"],
    "random": [],
    "params": [
        "folded_streams", "nests", "paths", "entry", "entries", "places", "interception",
        "interned", "given", "stores", "init_store", "arguments", "names", "observing", "shaped",
        "reuse", "metadata", "pieces", "summary", "methods", "pickling", "misuse", "param",
        "calling", "modules",
        "parametrized", "lanes_of_variables", "variables", "copies", "stack", "ensemble",
    ],
    "sow": ["sites", "harvest"],
    "arrays": [
        "views", "positions", "masked", "updates", "numpy_functions", "activation", "buffers",
        "indices", "protocols", "array", "trace", "boundaries", "inplace",
    ],
    "tree": [
        "objects", "problems", "references", "graph", "node", "looking", "walk", "addresses",
        "entry", "equations", "one_level", "session", "copies", "holding", "frames", "operands",
        "boundaries", "frozen", "mutate",
    ],
    "extend": [],
    "public": [],
    "": [],
    "selfcheck": [],
}  # fmt: skip
# A folder is imported from by its files; what its `__init__` does comes after them.
ORDER = [
    f"{floor}.{name}" if name else floor for floor, names in FLOORS.items() for name in [*names, ""]
]
# Rules do not know each other, but for those of functions that run later: they find their state
# as those of `rules.derivatives` do. And what `rules.jitted` donates is no rule.
SHARED = {"rules.donation", "rules.derivatives", "rules.explicit", "rules.linear_calls"}
FAMILIES = {name for name in ORDER if name.startswith("rules.")} - SHARED
# Of `tree`, which are split next.
LARGE_CLASSES = {"Frame"}
TESTS = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
LARGE_TESTS: set[str] = set()
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / INSIDE / "__init__.py")


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p not in (INSIDE, "__init__"))


def imported_modules(path):
    """The modules of jaxstate that a file imports, by name inside the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jaxstate"):
            parts = node.module.split(".")
            base = ".".join(p for p in parts if p not in ("jaxstate", INSIDE))
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in ORDER else base
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("jaxstate") for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_up_the_list(path):
    me = module_name(path)
    for other in imported_modules(path):
        assert ORDER.index(other) < ORDER.index(me), f"{me} imports {other}"
        assert not (me in FAMILIES and other in FAMILIES), f"{me} imports {other}"


def test_random_streams_are_written_on_the_extension_point_alone():
    """So can somebody else write a kind of state: what they import of the core is exported."""
    for path in FILES:
        if module_name(path).split(".")[0] not in ("random", "streams"):
            continue
        floors = {other.split(".")[0] for other in imported_modules(path)}
        assert floors <= {"_jax", "errors", "handles", "core", "streams", ""}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and "_src.core" in (node.module or ""):
                assert {alias.name for alias in node.names} <= {*jaxstate.extend.__all__}, path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_one_folder_knows_internals_and_versions(path):
    if module_name(path).partition(".")[0] == "_jax":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("jax._src") for a in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("jax._src")
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("_src", "__version_info__")
            assert not (node.attr == "__version__" and getattr(node.value, "id", "") == "jax")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_is_read_at_once(path):
    assert len(path.read_text().splitlines()) <= 600


def test_a_file_of_tests_establishes_one_thing():
    sizes = {p.name: len(p.read_text().splitlines()) for p in TESTS if p.name not in LARGE_TESTS}
    assert not [name for name, size in sizes.items() if size > 800]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_class_has_one_responsibility(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name not in LARGE_CLASSES:
            assert node.end_lineno - node.lineno < 250, node.name


def test_public_names_are_what_init_lists():
    public = {name for name in vars(jaxstate) if not name.startswith("_")}
    submodules = {path.stem for path in PACKAGE.glob("*.py")}
    assert public - (submodules - set(jaxstate.__all__)) == set(jaxstate.__all__)
    assert not any(name in dir(jaxstate) for name in ("core", "rules", "params", "arrays", "tree"))


def test_help_shows_what_is_public():
    """All else is in one package, whose name says that it is private."""
    text = pydoc.render_doc(jaxstate, renderer=pydoc.plaintext)
    contents = text.partition("PACKAGE CONTENTS")[2].partition("CLASSES")[0].split()
    assert contents == ["_src", "(package)", "errors", "extend", "random", "selfcheck"]
    assert all(name in text for name in jaxstate.__all__)


def test_importing_it_changes_nothing_outside_of_state():
    program = """
import jax, jax.numpy as jnp
def f(x):
    return jax.lax.scan(lambda c, _: (jax.jit(jnp.sin)(c), None), x, None, length=3)[0]
before = str(jax.make_jaxpr(jax.grad(f))(1.0))
import jaxstate
assert str(jax.make_jaxpr(jax.grad(f))(1.0)) == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_it_imports_little_else():
    """Of what `import jax` does not: `jax.extend` would import Pallas, a fifth of the time."""
    program = """
import sys, jax, jax.numpy
before = {*sys.modules}
import jaxstate
print(*(name for name in {*sys.modules} - before if name.partition(".")[0] != "jaxstate"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert {*done.stdout.split()} <= {
        "jax._src.compute_on",
        "jax._src.program_order",
        "jax._src.xla_metadata",
        "jax.experimental.scheduling_groups",  # in jax 0.10
    }
