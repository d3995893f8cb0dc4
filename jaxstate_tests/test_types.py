"""What tools and people see of the public names. (`make types` runs the type checkers.)"""

import ast
import dataclasses
import doctest
import functools
import inspect
import pathlib
import pickle
import pydoc
import re
import typing

import jax
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.typed_programs import functions, layers

SAMPLERS = sorted(set(jaxstate.random.__all__) - {"Stream", "next_key", "rng_stream"})
# Options that JAX 0.10 does not have. What is declared is what the newest JAX has.
NEWER = {"method"} if jax.__version_info__ < (0, 11) else set()


@pytest.mark.parametrize("program", [layers, functions], ids=lambda p: p.__name__.split(".")[-1])
def test_a_program_that_type_checkers_accept_runs(program):
    program.main()


def parameters(signature):
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_has_the_signature_of_jax_without_the_key(name):
    sample = getattr(jaxstate.random, name)
    key, *expected = parameters(inspect.signature(getattr(jax.random, name)))
    assert key[0] == "key"
    stream = ("stream", inspect.Parameter.KEYWORD_ONLY, "default")
    assert parameters(inspect.signature(sample)) == [*expected, stream]
    declared = parameters(inspect.signature(sample.__wrapped__, follow_wrapped=False))
    known = {p[0] for p in expected} | {"stream"}
    assert [p for p in declared if p[0] in known or p[0] not in NEWER] == [*expected, stream]
    annotations = typing.get_type_hints(sample.__wrapped__)
    assert annotations.keys() == {name for name, *_ in declared} | {"return"}


def test_every_sampler_of_jax_is_there():
    def takes_a_key(fn):
        return next(iter(inspect.signature(fn).parameters), None) == "key"

    no_samplers = {"clone", "fold_in", "split"}
    functions = {
        name
        for name, fn in vars(jax.random).items()
        if not name.startswith("_") and inspect.isfunction(inspect.unwrap(fn)) and takes_a_key(fn)
    }
    assert functions - no_samplers == set(SAMPLERS)


def f(x, times: int, *, scale=2.0):
    return jaxstate.sow("h", x * times * scale)


@pytest.mark.parametrize(
    "wrap, before",
    [
        (jaxstate.parametrized, []),
        (jaxstate.inplace, []),
        (jaxstate.mutate, []),
        (jaxstate.reap, []),
        (functools.partial(jaxstate.reap, tag="other"), []),
        (jaxstate.plant, ["values"]),
    ],
)
def test_a_wrapped_function_keeps_its_name_and_its_parameters(wrap, before):
    wrapped = wrap(f)
    assert wrapped.__name__ == "f" and wrapped.__module__ == __name__
    signature = inspect.signature(wrapped)
    added = list(signature.parameters)[: len(before)]
    assert added == before
    assert parameters(signature)[len(before) :] == parameters(inspect.signature(f))


def test_the_package_says_that_it_is_typed():
    assert (pathlib.Path(jaxstate.__file__).parent / "py.typed").is_file()


PUBLIC_MODULES = [jaxstate, jaxstate.random, jaxstate.extend]


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda m: m.__name__)
def test_dir_and_star_show_what_is_public(module):
    shown = [name for name in dir(module) if not name.startswith("__")]
    assert shown == sorted(module.__all__)
    assert all(hasattr(module, name) for name in shown)


def test_the_help_of_the_package_begins_with_all_that_can_be_called():
    [table] = [part for part in jaxstate.__doc__.split("\n\n") if part.startswith("    ")]
    shown = [name for line in table.splitlines() for name in line[:44].split(",")]
    classes = {name for name, value in vars(jaxstate).items() if inspect.isclass(value)}
    assert sorted(name.strip() for name in shown) == sorted(set(jaxstate.__all__) - classes)


def test_help_shows_how_a_network_is_called():
    """And copies are called as the block is."""
    for value, shown in (
        (net, "net(x)"),
        (Owner().part, "part(x)"),
        (jaxstate.stack(net, 2), "stack(x)"),
        (jaxstate.ensemble(net, 2, name="members"), "members(x)"),
    ):
        text = pydoc.render_doc(value, renderer=pydoc.plaintext)
        assert f"\n{shown}\n    What this " in text
        assert "_src" not in text and "_forward" not in text


CLASSES = [v for m in (jaxstate, jaxstate.extend) for v in vars(m).values() if inspect.isclass(v)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_names_no_private_module(cls):
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert "_src" not in text.replace("jax._src.core.Trace", "")  # the parent of a StatefulTrace


@pytest.mark.parametrize(
    "cls",
    [
        jaxstate.Variable, jaxstate.Stream, jaxstate.Shaped,
        jaxstate.Parametrized, jaxstate.Stack, jaxstate.Ensemble,
    ],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_help_shows_what_a_handle_can_do_and_no_constructor(cls):
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    shown = re.findall(r"^ \|  (\w+)(?:\(.*)?$", text, flags=re.M)
    assert {name for name in shown if name[0] == "_"} <= {"__call__"}
    assert f"{cls.__name__}(" not in text.partition(" |")[2]
    assert inspect.signature(cls) == inspect.Signature()


@pytest.mark.parametrize(
    "cls, fix",
    [
        (jaxstate.Variable, 'jaxstate.variable("v", init, shape)'),
        (jaxstate.Variable[jax.Array], 'jaxstate.variable("v", init, shape)'),
        (jaxstate.Stream, "with jaxstate.rng_stream(key) as stream:"),
        (jaxstate.Shaped, "net.shaped(x)"),
    ],
)
def test_a_handle_is_not_made_by_a_program(cls, fix):
    with pytest.raises(TypeError, match="is not called by them") as error:
        cls(np.zeros(3))
    assert fix in str(error.value)


def test_doctest_finds_every_example():
    found = [test.name for m in PUBLIC_MODULES for test in doctest.DocTestFinder().find(m)]
    written = set()
    for path in pathlib.Path(jaxstate.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_code = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_code and ">>> " in (ast.get_docstring(node) or ""):
                written.add(node.name)
    assert "parameters_from" in written
    assert written <= {name.rpartition(".")[2] for name in found}


def has_doc(value):
    return not callable(value) or bool(inspect.getdoc(value))


@pytest.mark.parametrize("module", PUBLIC_MODULES, ids=lambda m: m.__name__)
def test_every_public_name_is_explained(module):
    assert [name for name in module.__all__ if not has_doc(getattr(module, name))] == []


@jaxstate.parametrized
def net(x):
    """What this network does."""
    return x * jaxstate.param("w", jax.nn.initializers.ones, ())


class Owner:
    @jaxstate.parametrized
    def part(self, x):
        """What this part does."""
        return x


def private(value):
    # (Generic classes of Python 3.11 have one.)
    return [name for name in dir(value) if re.match("_[^_]", name) and name != "_is_protocol"]


@pytest.mark.parametrize(
    "value", [net, Owner().part, jaxstate.stack(net, 2), net.shaped(1.0)], ids=repr
)
def test_an_object_shows_what_is_public(value):
    assert private(value) == []


def public_objects():
    modules = {id(module) for module in PUBLIC_MODULES}
    for module in (jaxstate, jaxstate.extend):
        for name in module.__all__:
            if id(getattr(module, name)) not in modules:
                yield pytest.param(module, getattr(module, name), id=name)


@pytest.mark.parametrize("module, value", [*public_objects()])
def test_a_public_object_is_known_by_the_name_that_a_program_imports(module, value):
    """To pickles, `help`, tools that look for types, and those that look for the source."""
    assert (value.__module__, value.__qualname__) == (module.__name__, value.__name__)
    assert pickle.loads(pickle.dumps(value)) is value
    assert "jaxstate._src" not in str(value)
    # The parents of a class are where they are.
    assert "_src" not in pydoc.render_doc(value, renderer=pydoc.plaintext).partition("\n\n")[0]
    if not inspect.isclass(value):
        assert f"def {value.__name__}(" in inspect.getsource(value)
        typing.get_type_hints(value)
        return
    typing.get_type_hints(value)
    for method in vars(value).values():
        if inspect.isfunction(method) and hasattr(method, "__code__"):
            assert not method.__module__.startswith("jaxstate._src")


def test_overloads_are_found():
    several = (jaxstate.parametrized, jaxstate.Parametrized.init, jaxstate.Parametrized.apply)
    assert [len(typing.get_overloads(function)) for function in several] == [2, 3, 3]


def test_what_belongs_to_python_keeps_its_name():
    assert {f.__module__ for f in vars(dataclasses).values() if inspect.isfunction(f)} <= {
        "dataclasses", "reprlib", "functools", "types",
    }  # fmt: skip


def test_public_values_are_pickled():
    rows = jaxstate.summary({"dense": {"b": np.zeros(3)}}).rows
    for value in (rows, jaxstate.Metadata(axes=("a",))):
        data = pickle.dumps(value)
        assert pickle.loads(data) == value
        assert b"_src" not in data
