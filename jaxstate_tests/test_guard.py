"""What is changed in JAX: checked when jaxstate is imported, made whole or not at all, and shared
with other libraries."""

import dataclasses
import gc
import pathlib
import subprocess
import sys
import textwrap
import tomllib
import weakref

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

import jaxstate
from jaxstate._src import _jax
from jaxstate._src._jax import versions

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
    for name in ("jaxstate", "jaxstate._src", "jaxstate._src._jax"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [name.replace(".", "/")]
    return importlib.import_module("jaxstate._src._jax.versions")

versions = alone()
hooks = sys.modules["jaxstate._src._jax.hooks"]

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
        plain = getattr(place.owner, place.name, None)  # a wrapper of ours has no `jvp`
        if place.name == "__new__" or not isinstance(
            plain, (types.FunctionType, types.MethodType)
        ):
            counts[row.path] += 1  # no function
            continue
        @functools.wraps(plain)
        def counted(*args, _plain=plain, _path=row.path, **kwargs):
            counts[_path] += 1
            return _plain(*args, **kwargs)
        is_static = isinstance(place.raw(), staticmethod)
        for other in [place, *map(hooks.place_of, row.also)]:
            setattr(other.owner, other.name, staticmethod(counted) if is_static else counted)
    return counts
"""


def test_functions_of_jax_that_were_imported_before():
    """A jaxpr that `make_jaxpr` has made has the parameters of the module that made it, evaluated
    in another module and after `apply`."""
    shown = run("""
        from jax import make_jaxpr
        from jax.core import eval_jaxpr
        import jax
        import jaxstate

        def scale():
            return jaxstate.param("scale", jax.nn.initializers.ones, ())

        kept = []

        @jaxstate.parametrized
        def part(x):
            kept[:] = [make_jaxpr(lambda x: x * scale())(x)]
            return x * scale()

        def evaluated(x):
            return eval_jaxpr(kept[0].jaxpr, kept[0].consts, x)[0]

        @jaxstate.parametrized
        def whole(x):
            return part(x), scale(), evaluated(x)

        params = {"part": {"scale": 5.0}, "scale": 7.0}
        print(*map(float, whole.apply(params, 3.0)), evaluated(3.0))
    """)
    assert [*map(float, shown.split())] == [15, 7, 15, 15]


FEW = ["jit", "branches", "refused writes"]


@pytest.mark.parametrize(
    "programs", [FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_another_library_may_wrap_the_same_functions(programs):
    """Before jaxstate is imported, and after. The programs of the self-check go through every
    function that is replaced."""
    shown = run(
        WITHOUT_JAXSTATE + COUNTING + f"programs = {programs}",
        """
        inside = wrap_all(hooks)
        forget()
        from jaxstate import selfcheck
        from jaxstate._src import _jax
        outside = wrap_all(_jax)
        selfcheck.PROGRAMS[:] = [
            p for p in selfcheck.PROGRAMS
            if programs is None or p.__name__.replace("_", " ") in programs
        ]
        wrong = [(name, text) for name, text in selfcheck.failures() if text is not None]
        assert not wrong, wrong
        print(*(path for row in _jax.TABLE for path in [row.path]
                if row.since <= _jax.VERSION < row.until and row.group is not _jax.LATER
                and not (inside[path] and outside[path])))
        """,
    )
    if programs is not None:
        return
    unused = set(shown.split())
    assert unused <= BEHIND_FLAGS, " ".join(sorted(unused - BEHIND_FLAGS))


# What programs meet only with flags of JAX, or with primitives that no public function binds; and
# what is called without its cache, as that would keep what it is given, and so without what another
# library has put around the cache.
BEHIND_FLAGS = {
    "jax._src.core:closed_call_p.bind",
    "jax._src.core:closed_call_p.bind_with_trace",
    "jax._src.custom_derivatives:_closure_convert_for_avals",
    "jax._src.hijax:call_hi_primitive_p.bind",
    "jax._src.hijax:call_hi_primitive_p.bind_with_trace",
    "jax._src.hijax:custom_vjp3.__call__",
} if _jax.VERSION < (0, 11) else set()  # fmt: skip


# A snapshot of all that JAX's modules, classes and primitives have, and of the cells of the table.
SNAPSHOT = """
import sys, types, jax, jax.numpy as jnp
from jax._src import core

def snapshot():
    found = {}
    def note(owner, text):
        found[text] = dict(vars(owner))
    for module in [n for n in sys.modules if n.partition(".")[0] == "jax"]:
        note(sys.modules[module], f"{module}:")
        for name, value in list(vars(sys.modules[module]).items()):
            if isinstance(value, type) and value.__module__ == module:
                note(value, f"{module}:{name}.")
            elif isinstance(value, core.Primitive):
                note(value, f"{module}:{name}.")
    return found

def changed(before, after):
    "Whatever can be called, and is another one. (Modules may have been imported since.)"
    return {
        owner + k for owner, old in before.items()
        for new in [after.get(owner, old)] for k in {*old, *new}
        if old.get(k) is not new.get(k) and callable(old.get(k) or new.get(k))
    }
"""


def test_all_that_is_changed_is_in_the_table():
    """And nothing else of JAX's modules, classes and primitives is another one than before."""
    shown = run(
        SNAPSHOT,
        """
        before = snapshot()
        import jaxstate
        from jaxstate._src import _jax
        seen = set()

        @jaxstate.inplace
        def write(x):
            x[0] = 1
            seen.update(changed(before, snapshot()))
            return x

        def assign(tree):
            tree["x"] = 1.0
            seen.update(changed(before, snapshot()))

        write(jnp.zeros(2)), jaxstate.mutate(assign)({"x": 0.0})
        seen |= changed(before, snapshot())
        known = {path for row in _jax.TABLE for path in (row.path, *row.also)}
        # A function is found in modules that import it, and a primitive in several.
        names = {path.partition(":")[2] for path in known}
        names |= {name.replace("eval_jaxpr_p", "call_p") for name in names}  # an alias
        print(*sorted(p for p in seen if p.partition(":")[2] not in names))
        """,
    )
    assert shown.split() == []


def test_a_failed_installation_leaves_jax_as_it_was():
    """Whichever change fails, in whichever group; afterwards everything works."""
    shown = run(
        SNAPSHOT,
        """
        import jaxstate
        from jaxstate._src import _jax

        @jaxstate.inplace
        def write(x):
            x[0] = 1
            return x

        def assign(tree):
            tree["x"] = 1.0

        uses = {
            _jax.IN_PLACE: lambda: write(jnp.zeros(2)),
            _jax.OBJECTS: lambda: jaxstate.mutate(assign)({"x": 0.0}),
        }
        n = 0
        for group, use in uses.items():
            for at in range(0, len(group._wraps), 3):
                place, wraps = [*group._wraps.values()][at]
                def fails(plain):
                    raise MemoryError("no")
                wraps.append(fails)
                before = snapshot()
                try:
                    use()
                    raise AssertionError("installed")
                except MemoryError:
                    pass
                finally:
                    wraps.remove(fails)
                # (Of a class, `__new__` is one that does the same: see `new_of_object`.)
                left = {c for c in changed(before, snapshot()) if not c.endswith("__new__")}
                assert not left, left
                assert group.users == 0 and group.made is None
                jax.make_jaxpr(jax.vmap(jax.grad(lambda x: jnp.sin(x))))(jnp.ones(2))
                n += 1
        for use in uses.values():
            use()
        print(n > 10)
        """,
    )
    assert shown.split() == ["True"]


def test_two_threads_may_be_the_first():
    """Both get what they should, and every place is changed once."""
    shown = run("""
        import sys, threading, jax, jax.numpy as jnp, numpy as np
        import jaxstate
        from jaxstate._src import _jax
        sys.setswitchinterval(1e-6)
        started, go_on, results = threading.Barrier(4), threading.Barrier(4), []
        changed = []

        def all_are_here(group):
            go_on.wait(60)
            changed.append([m.place.key() for m in group.made])

        @jaxstate.inplace
        def write(x):
            y = x + 1
            y[0] = 5
            all_are_here(_jax.IN_PLACE)
            jax.lax.fori_loop(0, 2, lambda i, c: y.__setitem__(i, y[i] * 2) or c, 0)
            return y

        def assign(tree):
            tree["x"] = tree["x"] + 1
            all_are_here(_jax.OBJECTS)

        def one(i):
            started.wait(60)
            if i % 2:
                results.append(np.asarray(write(jnp.zeros(2))).tolist() == [10, 2])
            else:
                results.append(float(jaxstate.mutate(assign)({"x": 1.0})[1]["x"]) == 2)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert _jax.IN_PLACE.users == _jax.OBJECTS.users == 0
        print(results, *(len(places) == len({*places}) > 9 for places in changed))
    """)
    assert shown.strip() == "[True, True, True, True] True True True True"


def test_plain_jax_does_not_pay_for_what_has_been_used():
    """In calls of Python, after in-place functions and objects; and nothing is left in its place.
    Another library's wrapper that was put around ours stays where it is."""
    shown = run("""
        import sys, jax, jax.numpy as jnp, jaxstate
        from jaxstate._src import _jax
        from jax._src import core, api

        def calls(fn):
            n = 0
            def count(frame, event, arg):
                nonlocal n
                n += event == "call"
            sys.setprofile(count)
            fn()
            sys.setprofile(None)
            return n

        def plain():
            f = lambda x: jnp.sin(x * 2).sum() * x.sum()
            return jax.make_jaxpr(jax.vmap(jax.grad(f)))(jnp.ones((3, 3)))

        def write(x):
            x[0] = 1
            return x

        for _ in range(3):
            plain()
        before = calls(plain)
        functions = core.set_current_trace, api._device_get
        jaxstate.inplace(write)(jnp.zeros(2))
        jaxstate.mutate(lambda tree: tree.update(x=1))({"x": 0})
        plain()
        assert (core.set_current_trace, api._device_get) == functions
        after = calls(plain)
        ours = None

        def wrapping(x):
            global ours
            ours = api._device_get
            api._device_get = lambda x: ours(x)
            return write(x)

        for f in (wrapping, write, write):
            out = jaxstate.inplace(f)(jnp.zeros(2))
            assert out.tolist() == [1, 0], out
            plain()
        assert api._device_get.__name__ == "<lambda>" and jax.device_get(jnp.ones(1)) == 1
        api._device_get = ours
        out = jaxstate.inplace(lambda x: jax.device_get(write(x)))(jnp.zeros(2))
        assert out.tolist() == [1, 0] and api._device_get is ours
        print(after / before)
    """)
    assert float(shown) <= 1.03


# -- What is kept ----------------------------------------------------------------------------


def test_classes_and_their_objects_are_not_kept():
    """By what `mutate` notes of classes: frozen or not, with slots, in pytrees or not."""

    def classes():
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Frozen:
            x: jax.Array

        @jax.tree_util.register_pytree_node_class
        class Slots:
            __slots__ = ("__weakref__", "x")

            def __init__(self, x):
                self.x = x

            def tree_flatten(self):
                return (self.x,), None

            @classmethod
            def tree_unflatten(cls, _, children):
                return cls(*children)

        class Plain:
            def __init__(self, x):
                self.x = x

        return [Frozen, Slots, Plain]

    def assign(tree):
        for x in tree:
            x.x = x.x + 1

    from jaxstate._src.tree import objects

    made = classes()
    _, new = jaxstate.mutate(assign)([cls(jnp.zeros(())) for cls in made])
    assert [float(x.x) for x in new] == [1, 1, 1]
    plain = weakref.ref(made[2])  # (JAX keeps the classes that are registered)
    assert plain() in [r() for r in objects._kinds._by_class]
    del made, new
    gc.unfreeze()
    jax.clear_caches()
    gc.collect()
    assert plain() is None
    for noted in (objects._kinds, objects._unknown, objects._children, objects._layouts):
        assert None not in [r() for r in noted._by_class]


def test_the_calls_of_a_jitted_function_are_bounded(monkeypatch):
    """With ever other slots that it uses: the last few are kept, and all are right."""
    from jaxstate._src import _jax
    from jaxstate._src.rules import jitted

    monkeypatch.setattr(jitted._Calls, "ENOUGH", 3)
    slots = [jaxstate.extend.new_slot(jnp.float32(i)) for i in range(6)]

    def read(i, x):
        return x + jaxstate.extend.read(slots[i])

    f = jax.jit(read, static_argnums=0)
    for _ in range(2):
        assert [float(f(i, 1.0)) for i in range(6)] == [1, 2, 3, 4, 5, 6]
    calls = jitted._calls_of(_jax.Jitted(read, f._jit_info))
    assert 0 < len(calls._by_state) <= 3
