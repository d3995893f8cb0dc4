"""The deterministic figures of the benchmarks: what is traced and compiled is what one would write
by hand, and the work of tracing grows like the program.

The programs are those of `jaxstate_tests.bench`, in small sizes. By hand, parameters, statistics,
keys and counts are passed and returned explicitly.
"""

import contextlib
import re
from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import jaxstate
from jaxstate_tests.bench import measure, nets, programs
from jaxstate_tests.bench.measure import python_calls
from jaxstate_tests.bench.models import QUICK, train_step
from jaxstate_tests.bench.peers import by_hand, with_jaxstate

pytestmark = pytest.mark.optimized


def equations(jaxpr):
    """How often each primitive occurs in a jaxpr and all jaxprs inside."""
    counts = Counter()
    for eqn in jaxpr.eqns:
        counts[eqn.primitive.name] += 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            counts += equations(getattr(inner, "jaxpr", inner))
    return counts


def constants(jaxpr):
    """The constants of a closed jaxpr and of all jaxprs inside."""
    found = list(getattr(jaxpr, "consts", ()))
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += constants(inner)
    return found


def operations(fun, *args):
    """How often each operation occurs in the compiled program."""
    text = jax.jit(lambda *args: fun(*args)).lower(*args).compile().as_text()
    return Counter(re.findall(r"= \S+ ([a-z][\w-]*)\(", text))


def check_counts(ours, hand, *args):
    """Both functions have the same equations, and compile to the same operations."""
    jaxpr = jax.make_jaxpr(lambda *args: ours(*args))(*args)
    found = equations(jaxpr)
    assert found == equations(jax.make_jaxpr(lambda *args: hand(*args))(*args))
    assert not [name for name in found if name.startswith("state_")]
    assert not [c for c in constants(jaxpr) if jnp.shape(c)]
    assert operations(ours, *args) == operations(hand, *args)


def check_equal(ours, hand):
    assert jax.tree.structure(ours) == jax.tree.structure(hand)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(hand), strict=True):
        assert a.dtype == b.dtype
        assert (a == b).all()


# -- Models ----------------------------------------------------------------------------------


def both(name):
    """A model with jaxstate and by hand, and arguments for either."""
    model, key = QUICK[name], jax.random.key(0)
    ours, hand = model.written_in(with_jaxstate), model.written_in(by_hand)
    x = model.input()
    return ours, hand, (*hand.init(key, x), x, key)


@pytest.mark.parametrize("name", QUICK)
def test_init_and_forward_are_those_by_hand(name, key):
    ours, hand, args = both(name)
    check_equal(ours.init(key, args[2]), args[:2])
    check_equal(ours.forward(*args), hand.forward(*args))


@pytest.mark.parametrize("name", QUICK)
def test_forward_has_the_equations_and_operations_of_the_function_by_hand(name):
    ours, hand, args = both(name)
    check_counts(ours.forward, hand.forward, *args)


@pytest.mark.parametrize("name", QUICK)
def test_train_step_has_the_equations_and_operations_of_the_one_by_hand(name):
    ours, hand, args = both(name)
    check_counts(train_step(ours), train_step(hand), *args)


# -- Other programs --------------------------------------------------------------------------

PAIRS = {
    "parameters": nets.many_parameters(30),
    "modules": nets.many_modules(10),
    "variables in a scan": nets.many_variables(10),
    "levels": nets.deep(30),
    "jitted levels": nets.jitted_deep(5),
    "scan of a scan of a cond": nets.nested_loops(3),
    "loop of writes": nets.loop_of_writes(5, 10),
}


@pytest.mark.parametrize("name", PAIRS)
def test_program_is_that_by_hand(name):
    ours, hand, args = PAIRS[name]
    check_equal(ours(*args), hand(*args))
    check_counts(ours, hand, *args)


def test_jit_of_apply_equals_apply():
    ours, _, args = both("mlp")
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(ours.forward)(*args), ours.forward(*args))),
                    strict=True):  # fmt: skip
        assert jnp.allclose(a, b, atol=1e-6)


# -- Traces ----------------------------------------------------------------------------------


def test_eager_loop_of_stateful_calls_traces_once(key):
    traces = 0

    @jax.jit
    def f(x):
        nonlocal traces
        traces += 1
        return x + jax.random.uniform(jaxstate.next_key())

    x = jnp.float32(0)
    with jaxstate.rng_stream(key) as stream:
        for _ in range(1000):
            x = f(x)
    assert (traces, stream.count) == (1, 1000)


def test_eager_loop_of_applies_traces_once():
    traces = 0

    @jaxstate.parametrized
    def net(x):
        count = jaxstate.variable("count", jnp.zeros, ())

        @jax.jit
        def f(x):
            count.value += x
            return x

        return f(x)

    @jax.jit
    def step(state, x):
        nonlocal traces
        traces += 1
        return net.apply_with_state({}, state, x)[1]

    state = {"count": jnp.float32(0)}
    for _ in range(1000):
        state = step(state, 1.0)
    assert (traces, state["count"]) == (1, 1000)


# -- The work of tracing ---------------------------------------------------------------------


# The calls of one more element when there are ten times as many, against one more of a few:
# linear growth is 1. (Jitted levels are not here: each hands on the parameters of all levels
# inside, so they are quadratic by hand too.)
@pytest.mark.leaks_allowed("the leak checker's own calls grow with the number of objects")
@pytest.mark.parametrize(
    ("make", "n"),
    [
        pytest.param(nets.many_parameters, 20, id="parameters"),
        pytest.param(nets.many_modules, 10, id="modules"),
        pytest.param(nets.many_variables, 10, id="variables in a scan"),
        pytest.param(nets.deep, 5, id="levels"),
        pytest.param(nets.nested_jits, 4, id="nested jits"),
        pytest.param(nets.nested_scans, 4, id="nested scans"),
    ],
)
def test_trace_grows_like_the_program(make, n):
    few, more, many, many_more = (traced(make(k)) for k in (n, 2 * n, 10 * n, 11 * n))
    assert many_more - many <= 1.1 * (more - few)


def traced(pair, fun=None):
    """The calls that it takes to trace one side of a pair."""
    trace = measure.trace_of(fun or pair.ours, pair.args)
    trace()
    return python_calls(trace)


# How many calls one more element costs, by hand = 1: the most of the supported versions of JAX, and
# a little more.
@pytest.mark.leaks_allowed("the leak checker's own calls grow with the number of objects")
@pytest.mark.parametrize(
    ("make", "most"),
    [
        pytest.param(nets.many_parameters, 1.25, id="parameters"),
        pytest.param(nets.many_modules, 1.45, id="modules"),
        pytest.param(nets.many_variables, 2.05, id="variables in a scan"),
        pytest.param(nets.deep, 1.45, id="levels"),
        pytest.param(nets.jits_in_a_row, 1.3, id="jits in a row"),
        pytest.param(nets.nested_jits, 1.2, id="nested jits"),
        pytest.param(nets.nested_scans, 1.2, id="nested scans"),
    ],
)
def test_more_of_a_program_costs_little_more_than_by_hand(make, most):
    few, many = make(6), make(12)
    ours = traced(many) - traced(few)
    assert ours <= most * (traced(many, many.by_hand) - traced(few, few.by_hand))


# -- The work of a call ------------------------------------------------------------------------


def calls_of_one(side):
    """The calls that one more call makes, when all that can be remembered is."""
    with side.setup() if side.setup else contextlib.nullcontext():
        for _ in range(4):
            side.run()
        return python_calls(side.run)


@pytest.mark.leaks_allowed("the leak checker empties the caches that are counted")
@pytest.mark.parametrize(
    ("make", "most"), [(programs.one_draw, 19), (programs.one_update, 15)], ids=["draw", "update"]
)
def test_a_jitted_call_with_state_is_few_calls_more(make, most):
    sides = make()
    ours, hand = calls_of_one(sides["jaxstate"]), calls_of_one(sides["by hand"])
    assert ours - hand <= most


@pytest.mark.leaks_allowed("the leak checker empties the caches that are counted")
@pytest.mark.parametrize(
    "make", [programs.apply_around_jit, programs.variables_around_jit], ids=["params", "variables"]
)
def test_an_apply_around_a_jitted_call_does_not_resolve_each_entry_anew(make):
    few, many = (calls_of_one(make(n)["jaxstate"]) for n in (10, 30))
    assert many == few
