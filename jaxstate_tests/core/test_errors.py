"""Every error: what its message says, and that the program it proposes works.

A message names the state, says where it was made and used (a line of `wrong_programs`) and ends
with the lines that mend it; afterwards the library is as before.
"""

import ast
import functools
import pathlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import errors
from jaxstate.extend import StatefulTrace, new_trace
from jaxstate_tests import error_page
from jaxstate_tests.core.wrong_programs import (
    CATALOGUE,
    KEY,
    first,
    net,
    normal,
    pair,
)

pytestmark = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


@pytest.mark.parametrize(
    "error, wrong, mended, match", CATALOGUE, ids=[wrong.__name__ for _, wrong, _, _ in CATALOGUE]
)
def test_the_message_names_the_cause_and_the_mended_program_works(error, wrong, mended, match):
    with pytest.raises(error, match=f"(?s){match}") as caught:
        wrong()
    assert isinstance(caught.value, jaxstate.StateError)
    assert "To mend it:\n    " in str(caught.value)
    assert "wrong_programs.py:" in str(caught.value)
    mended()
    with pytest.raises(jaxstate.MissingStreamError):  # nothing was left open
        jaxstate.next_key()
    with pytest.raises(jaxstate.MissingStoreError):
        jaxstate.param("w", normal, ())


def test_every_error_is_in_the_catalogue():
    assert {error for error, *_ in CATALOGUE} == {
        getattr(errors, name) for name in errors.__all__ if name not in ("StateError", "SowError")
    }


def test_the_message_names_the_transformations_around():
    def body(x, _):
        return jax.vmap(lambda x: x * jaxstate.random.uniform())(x), None

    def f(x):
        return jax.lax.scan(body, x, length=2)[0].sum()

    with pytest.raises(jaxstate.MissingStreamError) as caught:
        jax.jit(jax.grad(f))(jnp.ones(3))
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  under: ")]
    assert re.sub(r" at \S*test_errors.py:\d+", "", line) == (
        "  under: vmap over 3 lanes, in scan of body, in a derivative, in jit of f"
    )
    assert line.count("test_errors.py:") == 2


ROOT = pathlib.Path(__file__).parents[2]
SECTIONS = re.split(r"^## ", error_page.CATALOGUE.read_text(), flags=re.M)[1:]


def strings(source):
    """The string constants of a piece of code, joined where the code joins them."""
    nodes = ast.walk(ast.parse(source))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def shown():
    """What the programs of the documentation look for in messages."""
    code = re.findall(r"^```python\n(.*?)^```$", "".join(SECTIONS), flags=re.M | re.S)
    return strings("\n".join(code))


def messages():
    """The first argument of every call of the builder of messages, with the place of the call."""
    for path in sorted((ROOT / "jaxstate").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "message":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def has_words_of(text, template):
    """Whether 20 characters in a row, or a fixed part of the template, are in the text."""
    words = 20
    return any(
        fixed[i : i + words] in text
        for fixed in strings(ast.unparse(template))
        if len(fixed) >= 10
        for i in range(max(1, len(fixed) - words + 1))
    )


def test_every_error_has_a_section_with_a_program_that_raises_it():
    sections = {section.split("\n")[0]: section for section in SECTIONS}
    assert set(sections) == {*errors.__all__, "Mistakes"}
    for name, section in sections.items():
        if name not in ("StateError", "SowError", "Mistakes"):
            assert (
                f"shows(\n    jaxstate.{name},\n" in section or f"shows(jaxstate.{name}," in section
            )


def test_the_page_is_made_of_the_catalogue():
    """Whose programs raise what it says; and the mended ones run."""
    made = error_page.page()
    if jax.__version_info__ >= (0, 12):  # messages quote the names that JAX has for things
        assert error_page.PAGE.read_text() == made, "python -m jaxstate_tests.error_page"


def test_every_message_is_shown_in_the_documentation():
    """By a program that raises it, and its mended form."""
    found = shown()
    missing = [
        place
        for place, call in messages()
        if not any(has_words_of(text, call.args[0]) for text in found)
    ]
    assert not missing


def test_every_message_says_where_the_program_is():
    for place, call in messages():
        given = {keyword.arg for keyword in call.keywords}
        assert {"fix", "used"} <= given, place


@pytest.mark.parametrize("key", [0, None, jnp.zeros(2), jax.random.split(KEY, 3), "key"])
def test_what_is_not_a_key_is_refused(key):
    for use in (
        lambda: jaxstate.rng_stream(key).__enter__(),
        lambda: net.init(key, 1.0),
        lambda: net.apply({"weight": jnp.ones(3)}, 1.0, key={"default": key}),
    ):
        with pytest.raises(TypeError, match="wants one random key, and was given"):
            use()


def test_other_bad_input_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match="'split' or 'share'"):
        jaxstate.rng_stream(KEY, vmap="each").__enter__()
    for name in ("", "a/b", 3):
        with pytest.raises(TypeError, match="non-empty string without '/'"):
            jaxstate.parametrized(lambda name=name: jaxstate.param(name, normal, ())).init(KEY)
    for count, error in ((-1, ValueError), (2**31, ValueError), (1.5, TypeError)):
        with pytest.raises(error):
            jaxstate.rng_stream(KEY, count=count).__enter__()
    with pytest.raises(TypeError, match="wants a function init"):
        jaxstate.parametrized(lambda: jaxstate.param("w", jnp.ones(3))).init(KEY)
    with pytest.raises(TypeError, match="as a dict"):
        net.apply([jnp.ones(3)], 1.0)
    with pytest.raises(TypeError, match="needs one for the parameters"):
        net.init({"dropout": KEY}, 1.0)
    with pytest.raises(TypeError, match="wants a function"):
        jaxstate.parametrized(3)
    np.testing.assert_array_equal(net.apply({"weight": jnp.ones(3)}, 1.0), np.ones(3))


# -- Mistakes ------------------------------------------------------------------------------------


def in_a_network(use):
    def function(x):
        use(jaxstate.variable("v", jnp.zeros, (3,)), x)

    jaxstate.parametrized(function).init_with_state(KEY, jnp.ones(3))


@pytest.mark.parametrize(
    "use",
    [
        lambda v, x: v + 1,
        lambda v, x: 1 + v,
        lambda v, x: x * v,
        lambda v, x: v @ x,
        lambda v, x: -v,
        lambda v, x: v[0],
        lambda v, x: v == 0,
        lambda v, x: v != x,
        lambda v, x: v < 1,
        lambda v, x: 1 if v else 0,
        lambda v, x: [0, 1][v],
        lambda v, x: float(v),
        lambda v, x: len(v),
        lambda v, x: list(v),
        lambda v, x: np.sin(v),
        lambda v, x: v.__setitem__(0, 1),
    ],
)
def test_a_handle_is_not_taken_for_its_value(use):
    with pytest.raises(
        TypeError, match=r"'v' was used as if it were its value .*\n(.*\n)*.*v\.value"
    ):
        in_a_network(use)


@pytest.mark.parametrize(
    "wrap",
    [jaxstate.parametrized, jaxstate.inplace, jaxstate.mutate, jaxstate.reap, jaxstate.plant],
    ids=lambda wrap: wrap.__name__,
)
def test_what_runs_later_is_refused_where_it_is_wrapped(wrap):
    def generator(self, x):
        yield x

    async def coroutine(self, x):
        return x

    async def both(self, x):
        yield x

    class Callable:
        __call__ = generator

    later = [generator, coroutine, both, Callable()]
    for fn in [*later, *(functools.partial(fn, None) for fn in later)]:
        with pytest.raises(TypeError, match=f"{wrap.__name__} wants a function that runs when it"):
            wrap(fn)
    wrap(lambda x: [x for _ in range(3)])


def test_handles_are_compared_by_identity():
    def use(v, x):
        assert v == v and v in {v} and v in [0, v][1:]
        assert (v != v) is False

    in_a_network(use)


class ScaledSines(StatefulTrace):
    factor = 2.0

    def process_primitive(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        return out * self.factor if primitive.name == "sin" else out


def test_an_attribute_of_a_trace_counts_for_functions_that_were_traced_before():
    @jax.jit
    def f(x):
        return jax.lax.fori_loop(0, 2, lambda i, x: jnp.sin(x), x)

    def by_hand(factor):
        x = 0.5
        for _ in range(2):
            x = factor * np.sin(x)
        return x

    with new_trace(ScaledSines) as trace:
        for factor in (2.0, 3.0, 2.0, -1.0):
            trace.factor = factor
            np.testing.assert_allclose(f(0.5), by_hand(factor), rtol=1e-6)


def test_a_nest_of_400_modules():
    def around(inner):
        @jaxstate.parametrized
        def module(x):
            return inner(x)

        return module

    nest = first
    for _ in range(400):
        nest = around(nest)
    params = nest.init(KEY, 1.0)
    out, state = nest.apply_with_state(params, {}, 2.0)
    weight = params
    for _ in range(400):
        (weight,) = weight.values()
    np.testing.assert_array_equal(out, 2.0 * weight["weight"])
    np.testing.assert_array_equal(nest.apply(params, 2.0), out)
    assert state == {}
    assert len(nest.summary(KEY, 1.0).scopes) == 401


def test_a_module_of_a_python_module_is_pickled_by_name():
    assert pickle.loads(pickle.dumps(net)) is net
    assert pickle.loads(pickle.dumps({"pair": [pair, first]})) == {"pair": [pair, first]}


@pytest.mark.parametrize("make", [lambda: jaxstate.rng_stream(KEY), lambda: jaxstate.scope("s")])
def test_what_is_not_opened_is_warned_of_where_it_is_dropped(make):
    with pytest.warns(UserWarning, match="never opened: 'with' opens it") as caught:
        make()
    assert caught[0].filename == __file__


def test_what_is_opened_is_not_warned_of():
    with jaxstate.rng_stream(KEY), jaxstate.scope("s"):
        pass

    @jaxstate.scope("encoder")
    def encode(x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, ())

    params = jaxstate.parametrized(lambda x: encode(encode(x))).init(KEY, 1.0)
    assert params == {"encoder": {"w": 1.0}}


def test_an_error_in_an_initializer_says_of_what():
    def wrong(key):
        return jnp.ones(3) @ jnp.ones(4)

    with pytest.raises(TypeError, match="contracting") as caught:
        jaxstate.parametrized(lambda: jaxstate.param("w", wrong)).init(KEY)
    assert any("initializer of parameter 'w'" in note for note in caught.value.__notes__)


def test_a_type_error_of_the_program_stays_what_it_is():
    def wrong(x):
        return x + "1"

    f = jaxstate.parametrized(wrong)
    for run in (lambda: f(1.0), lambda: f.init(KEY, 1.0), lambda: f.apply({}, 1.0)):
        with pytest.raises(TypeError, match="unsupported operand"):
            run()
