"""Functions whose arguments have the names of those of `init` and `apply`.

A keyword is never lost: the function gets it, or an error says that it would not.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest

import jaxstate

KEY, X = jax.random.key(0), jnp.ones(3)
PARAMS, STATE = {"w": 2.0}, {"v": 1.0}
METHODS = {
    "init": (KEY,),
    "init_with_state": (KEY,),
    "apply": (PARAMS,),
    "apply_with_state": (PARAMS, STATE),
}
# What each takes by name only, or has to refuse as apply does.
TAKEN = {
    "init": {"key", "reuse"},
    "init_with_state": {"key", "reuse"},
    "apply": {"key", "state"},
    "apply_with_state": {"key", "mutable"},
}
NAMES = ("key", "params", "state", "reuse", "mutable")
VALUE = {"z": 3.0}


def scaled(x):
    return x * jaxstate.param("w", jax.nn.initializers.ones, ())


def network(signature, name, found):
    """A network that notes what it gets for the argument called ``name``."""

    def use(x, value):
        found.append(value)
        return scaled(x)

    namespace = {"use": use}
    exec(f"def net({signature}): return use(x, {name})", namespace)
    return jaxstate.parametrized(namespace["net"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_keyword_is_the_functions_or_refused(name, method):
    for signature in (f"x, *, {name}", f"x, *, {name}=None", f"x, {name}=None", f"x, {name}"):
        found = []
        net = network(signature, name, found)
        call = getattr(net, method)
        if name in TAKEN[method]:
            with pytest.raises(TypeError, match=f"net has an argument '{name}', and {method}") as e:
                call(*METHODS[method], X, **{name: VALUE})
            assert "my_" + name in str(e.value)
            assert ("or by position" in str(e.value)) == ("*" not in signature)
        else:
            call(*METHODS[method], X, **{name: VALUE})
            assert found and all(value == VALUE for value in found)
        if "*" not in signature:
            found.clear()
            call(*METHODS[method], X, VALUE)
            assert found and all(jax.tree.structure(v) == jax.tree.structure(VALUE) for v in found)
        if "None" not in signature:
            with pytest.raises(TypeError, match=f"has an argument '{name}', and init and apply"):
                call(*METHODS[method], X)


def test_what_is_missing_is_named_where_it_has_another_name():
    net = jaxstate.parametrized(lambda x, y, key=None: x + y, name="net")
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        net.apply({}, X)


def test_the_first_arguments_may_be_given_by_name():
    net = jaxstate.parametrized(scaled, name="net")
    assert net.init(key=KEY, x=X) == {"w": 1.0}
    assert net.init_with_state(x=X, key=KEY) == ({"w": 1.0}, {})
    assert (net.apply(x=X, params=PARAMS) == 2).all()
    assert (net.apply_with_state(params=PARAMS, state=STATE, x=X)[0] == 2).all()
    assert (net.apply_with_state(PARAMS, x=X, state=STATE)[0] == 2).all()


@pytest.mark.parametrize("method, first", [("init", "key"), ("apply", "params")])
def test_a_first_argument_that_is_missing_or_there_twice(method, first):
    net = jaxstate.parametrized(scaled, name="net")
    with pytest.raises(TypeError, match=rf"net\.{method} was called without {first}"):
        getattr(net, method)()
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{first}'"):
        getattr(net, method)(*METHODS[method], X, **{first: METHODS[method][0]})


def test_tools_are_shown_the_first_arguments_by_name():
    net = jaxstate.parametrized(scaled, name="net")
    for method, names in {
        "init": ["key", "args", "reuse", "kwargs"],
        "init_with_state": ["key", "args", "reuse", "kwargs"],
        "apply": ["params", "args", "key", "state", "kwargs"],
        "apply_with_state": ["params", "state", "args", "key", "mutable", "kwargs"],
    }.items():
        signature = inspect.signature(getattr(net, method))
        assert list(signature.parameters) == names
        first = signature.parameters[names[0]]
        assert first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty
    # So `jax.jit` knows which argument is meant.
    lowered = jax.jit(net.apply, donate_argnames="params").lower({"w": jnp.ones(())}, 1.0)
    (params, x), _ = lowered.args_info
    assert params["w"].donated and not x.donated


@pytest.mark.leaks_allowed("an error, whose traceback holds tracers")
@pytest.mark.parametrize("option, value", [("train", True), ("n", 2)])
@pytest.mark.parametrize("by_name", [True, False])
def test_an_option_that_jit_makes_an_array_is_named(option, value, by_name):
    """And nothing else is, such as a key."""

    def count(x, noise_key, n):
        return sum(x for _ in range(n))

    def branch(x, noise_key, train):
        return 2 * x if train else x

    net = jaxstate.parametrized({"n": count, "train": branch}[option], name="net")
    args, kwargs = ((), {option: value}) if by_name else ((value,), {})
    with pytest.raises(TypeError) as e:
        jax.jit(net.apply)({}, X, KEY, *args, **kwargs)
    notes = "".join(e.value.__notes__)
    assert f"jax.jit(functools.partial(net.apply, {option}=value))" in notes
    assert "noise_key" not in notes
    bound = functools.partial(net.apply, **{option: value})
    assert (jax.jit(bound)({}, X, KEY) == 2 * X).all()
    static = jax.jit(net.apply, static_argnames=option)
    assert (static({}, X, KEY, **{option: value}) == 2 * X).all()


@pytest.mark.leaks_allowed("an error, whose traceback holds tracers")
@pytest.mark.parametrize("copies", [jaxstate.stack, jaxstate.ensemble])
def test_what_happens_in_a_block_is_said_to_happen_there(copies):
    block = jaxstate.parametrized(lambda x: jnp.reshape(scaled(x), (7,)), name="block")
    net = jaxstate.parametrized(lambda x, f=copies(block, 2): f(x), name="net")
    with pytest.raises(TypeError) as e:
        net.init(KEY, X)
    notes = "".join(e.value.__notes__)
    assert f"It happened in the block 'block' of the {copies.__name__}, used: " in notes
    assert "initializer" not in notes


@pytest.mark.parametrize("copies", [jaxstate.stack, jaxstate.ensemble])
def test_a_keyword_that_a_block_would_not_get_is_refused(copies):
    several = copies(jaxstate.parametrized(lambda x, *, key=None: scaled(x), name="block"), 2)
    with pytest.raises(TypeError, match="has an argument 'key', and apply takes key= for itself"):
        several.apply({several.copies: {"w": jnp.ones(2)}}, X, key=KEY)
