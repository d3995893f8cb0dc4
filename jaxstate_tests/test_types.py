"""What tools and people see of the public names. (`make types` runs the type checkers.)"""

import functools
import inspect
import pathlib
import re
import typing

import jax
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
