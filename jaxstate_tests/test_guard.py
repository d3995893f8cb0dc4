"""What is changed in JAX: checked when jaxstate is imported, made whole or not at all, and shared
with other libraries."""

import pathlib
import subprocess
import sys
import textwrap
import tomllib

import jax
import pytest
from packaging.requirements import Requirement

import jaxstate
from jaxstate._jax import versions

ROOT = pathlib.Path(jaxstate.__file__).parents[1]


def run(*parts):
    """What a program prints that runs in a Python of its own."""
    program = "\n".join(textwrap.dedent(part) for part in parts)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- Versions --------------------------------------------------------------------------------


def jax_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = (Requirement(r) for r in project["dependencies"] if Requirement(r).name == "jax")
    return found.specifier


@pytest.mark.parametrize("version", versions.SUPPORTED)
def test_the_metadata_allows_what_is_supported(version):
    assert version in jax_requirement()


@pytest.mark.parametrize("version", ["0.9.2", "0.10.1", "0.11.0", "0.11.1", "0.13.0"])
def test_the_metadata_excludes_what_cannot_work(version):
    assert version not in jax_requirement()


def test_this_version_is_supported():
    assert jax.__version__ in versions.SUPPORTED


def test_an_untested_version_gives_one_warning():
    shown = run("""
        import warnings, jax
        jax.__version__ = jax.__version__.rpartition(".")[0] + ".99"
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            import jaxstate
        (warning,) = found
        print(warning.category.__name__, jax.__version__ in str(warning.message))
        with jaxstate.rng_stream(jax.random.key(0)):
            jax.jit(jaxstate.next_key)()
    """)
    assert shown.split() == ["UntestedJaxWarning", "True"]


# Before every program below. `alone` imports the check without the rest of jaxstate, so that
# nothing has been changed in JAX.
WITHOUT_JAXSTATE = """
import importlib, sys, types
import jax

def forget():
    for name in [n for n in sys.modules if n.partition(".")[0] == "jaxstate"]:
        del sys.modules[name]

def alone():
    forget()
    for name in ("jaxstate", "jaxstate._jax"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [name.replace(".", "/")]
    return importlib.import_module("jaxstate._jax.versions")

versions = alone()
hooks = sys.modules["jaxstate._jax.hooks"]

def paths():
    for row in hooks.TABLE:
        if row.since <= hooks.VERSION < row.until and row.group is not hooks.LATER:
            yield row.path
    for module, names in versions.USED.items():
        for name, text in names.items():
            if name and versions.is_here(text.partition(": ")[0]):
                yield f"{module}:{name}"
    for path, (when, members) in versions.MEMBERS.items():
        if versions.is_here(when):
            yield from (f"{path}.{member}" for member in members.split())

class broken:
    "Puts something else in a place, or nothing, for a while."
    def __init__(self, place, *other):
        self.place, self.other = place, other
        self.inherited = not place.has_own()
        self.plain = place.get()
        if isinstance(place.owner, type):
            self.plain = vars(place.owner).get(place.name)
    def __enter__(self):
        if self.other:
            setattr(self.place.owner, self.place.name, self.other[0])
        else:
            delattr(self.place.owner, self.place.name)
    def __exit__(self, *_):
        if self.inherited:
            delattr(self.place.owner, self.place.name)
        else:
            setattr(self.place.owner, self.place.name, self.plain)
"""


def test_every_internal_is_looked_at():
    """Without it, or with other parameters, the check says its name. The places that are looked at
    are the whole table, and all that the folder takes from JAX's modules."""
    shown = run(
        WITHOUT_JAXSTATE,
        """
        import collections
        assert versions.problems() == []
        done = collections.Counter()
        known = {row.path for row in hooks.TABLE if row.parameters}
        for path in dict.fromkeys(paths()):
            place, text = hooks.place_of(path), path.replace(":", ".")
            named = lambda: any(p.startswith(text + " ") for p in versions.problems())
            if place.has_own() and place.name != "cell_contents" and not any(
                hasattr(base, place.name)
                for base in getattr(place.owner, "__mro__", (None, type(place.owner)))[1:]
            ):
                with broken(place):
                    assert named(), path
                done["missing"] += 1
            if isinstance(place.get(), (types.FunctionType, types.MethodType)):
                with broken(place, lambda something_else: None):
                    assert named() or path not in known, path
                    done["changed"] += named()
        assert versions.problems() == []
        print(done["missing"], done["changed"])
        """,
    )
    missing, changed = map(int, shown.split())
    assert missing > 180 and changed > 60


def test_a_jax_without_an_internal_gives_one_error_and_stays_as_it_is():
    """Of modules, classes, functions and methods; also several at once."""
    shown = run(
        WITHOUT_JAXSTATE,
        """
        import contextlib
        kinds = [
            ["jax._src.pjit:_infer_params"],
            ["jax._src.core:trace_ctx", "jax._src.lax.lax:copy_p"],
            ["jax._src.interpreters.partial_eval:DynamicJaxprTrace.emit_eqn"],
            ["jax._src.interpreters.ad:maybe_jvp_tracer", "jax._src.hijax:custom_vjp3"],
            ["jax._src.interpreters.batching:BatchTrace.to_batch_info"],
        ]
        for missing in kinds:
            places = [hooks.place_of(path) for path in missing]
            with contextlib.ExitStack() as stack:
                for place in places:
                    stack.enter_context(broken(place))
                forget()
                try:
                    import jaxstate
                except ImportError as error:
                    assert type(error) is ImportError and error.__context__ is None
                    assert jax.__version__ in str(error) and "0.10.2" in str(error)
                    assert all(path.replace(":", ".") in str(error) for path in missing), error
                else:
                    raise AssertionError(missing)
        with broken(hooks.place_of("jax._src.pjit:_run_python_pjit"), lambda p, other: None):
            forget()
            try:
                import jaxstate
            except ImportError as error:
                assert "takes (p, other), and not (p, args_flat, fun" in str(error)
        forget()
        import jaxstate
        with jaxstate.rng_stream(jax.random.key(0)) as stream:
            jax.jit(jaxstate.next_key)()
        print(stream.count)
        """,
    )
    assert shown.split() == ["1"]


def test_what_is_used_is_what_is_listed():
    """See `jaxstate_tests.internals`, which writes the list."""
    from jaxstate_tests.internals import used_names

    listed = {module: set(names) - {""} for module, names in versions.USED.items()}
    assert {m: n for m, n in used_names().items() if n} == {m: n for m, n in listed.items() if n}


# -- The changes -----------------------------------------------------------------------------


# A wrapper of another library around every function of the table, that counts.
COUNTING = """
import functools, collections
import jax, types

def wrap_all(hooks):
    counts = collections.Counter()
    for row in hooks.TABLE:
        if row.group is hooks.LATER or not row.since <= hooks.VERSION < row.until:
            continue
        place = hooks.place_of(row.path)
        plain = place.get()
        if place.name == "__new__" or not isinstance(
            plain, (types.FunctionType, types.MethodType, jax.custom_jvp)
        ):
            counts[row.path] += 1  # no function
            continue
        @functools.wraps(plain)
        def counted(*args, _plain=plain, _path=row.path, **kwargs):
            counts[_path] += 1
            return _plain(*args, **kwargs)
        for other in [place, *map(hooks.place_of, row.also)]:
            setattr(other.owner, other.name, counted)
    return counts
"""


def test_another_library_may_wrap_the_same_functions():
    """Before jaxstate is imported, and after. The programs of the self-check go through every
    function that is replaced."""
    shown = run(
        WITHOUT_JAXSTATE + COUNTING,
        """
        inside = wrap_all(hooks)
        forget()
        from jaxstate import _jax, selfcheck
        outside = wrap_all(_jax)
        wrong = [(name, text) for name, text in selfcheck.failures() if text is not None]
        assert not wrong, wrong
        print(*(path for row in _jax.TABLE for path in [row.path]
                if row.since <= _jax.VERSION < row.until and row.group is not _jax.LATER
                and not (inside[path] and outside[path])))
        """,
    )
    unused = set(shown.split())
    assert unused <= BEHIND_FLAGS, " ".join(sorted(unused - BEHIND_FLAGS))


# What programs meet only with flags of JAX, or with primitives that no public function binds.
BEHIND_FLAGS: set[str] = set()
