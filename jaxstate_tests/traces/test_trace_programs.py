"""Traces around random programs: an idle one changes nothing, and one that counts counts right.

The count is compared with that of `Reference`, which runs the jaxpr of the program step by step,
with its loops and branches in Python.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxstate.extend import new_slot, new_trace, read
from jaxstate_tests.fuzz.fuzzing import drawn
from jaxstate_tests.fuzz.random_programs import (
    Arithmetic,
    Checkpoint,
    CustomJvp,
    CustomVjp,
    CustomVmap,
    Draw,
    Fori,
    Grad,
    Jit,
    Program,
    Read,
    Vmap,
    While,
    programs,
)
from jaxstate_tests.fuzz.test_random_programs import initial, stateful
from jaxstate_tests.traces.test_stateful import Idle, Reference

X = jnp.float32(0.6)
NO_STATE = {"ops": jnp.int32(0)}


# JAX folds the first two for Python numbers where it can: a program has more of them eagerly. The
# others compute nothing: a jaxpr says by them that a custom rule knows no derivative by its state.
NOT_COUNTED = {
    "convert_element_type", "broadcast_in_dim", "state_of_custom_rule", "stop_gradient"
}  # fmt: skip


class Operations(Idle):
    """Counts operations."""

    def process_primitive(self, primitive, args, params):
        self.state["ops"] += primitive.name not in NOT_COUNTED
        return super().process_primitive(primitive, args, params)


class StepByStep(Reference):
    def step(self, eqn, args):
        self.ops -= eqn.primitive.name in NOT_COUNTED
        return super().step(eqn, args)


class Nobody:
    """A trace that is none."""

    state = NO_STATE

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def idle():
    return new_trace(Idle, state=NO_STATE)


def counting():
    return new_trace(Operations, state=NO_STATE)


# -- Where the trace is opened: outside or inside of the program's state ----------------------


def entries_of(program):
    return {entry: initial(entry) for entry in program.entries}


def outside(program, open_trace):
    apply, _ = stateful(program)

    def run(x):
        with open_trace() as trace:
            y, s = apply(x, entries_of(program))
        return y, s, trace.state

    return run


def inside(program, open_trace):
    def watch(body):
        def watched(x, slots):
            with open_trace() as trace:
                y = body(x, slots)
            return y, trace.state

        return watched

    apply, _ = stateful(program, watch)

    def run(x):
        (y, state), s = apply(x, entries_of(program))
        return y, s, state

    return run


PLACES = [outside, inside]


def gradient(f):
    return jax.value_and_grad(lambda x: (f(x)[0], f(x)[1:]), has_aux=True)


TRANSFORMS = {
    "none": lambda f: f,
    "grad": gradient,
    "vmap": lambda f: lambda x: jax.vmap(f)(x + jnp.arange(3.0)),
}


# -- Checks ----------------------------------------------------------------------------------


def outcome(f, *args):
    """The result of a program, or the type of the error that it raises."""
    try:
        return f(*args)
    except Exception as error:
        return type(error)


def operations(jaxpr):
    """What a jaxpr consists of: how often it has which operation on operands of which types.

    Which operands these are is left out, as is what jits and rules are given: an unused value of a
    slot may be missing there, and the order of slots may be another one.
    """
    found = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [operations(j) for j in jaxprs_in_params(eqn.params)]
        if inner:
            found[eqn.primitive.name, tuple(map(frozenset, map(Counter.items, inner)))] += 1
        else:
            params = re.sub("0x[0-9a-f]+", "", str(eqn.params))
            types = [str(v.aval) for v in (*eqn.invars, *eqn.outvars)]
            found[eqn.primitive.name, tuple(types), params] += 1
    return found


def loops(program):
    """Whether it has a loop of as many turns as the data says."""
    return program.has(While, Fori)


def loops_over_lanes(program):
    """Under a trace, such a loop has one condition for all lanes, as it has when it is compiled."""
    return loops(program) and program.has(Vmap)


def check_idle(program):
    for place in PLACES:
        plain, watched = place(program, Nobody), place(program, idle)
        for name, transform in TRANSFORMS.items():
            if loops(program) if name == "vmap" else loops_over_lanes(program):
                continue
            made = [outcome(jax.make_jaxpr(jax.jit(transform(f))), X) for f in (watched, plain)]
            found, wanted = (j if isinstance(j, type) else operations(j) for j in made)
            assert found == wanted
        for transform in (lambda f: f, jax.jit, gradient):
            assert_same(outcome(transform(watched), X), outcome(transform(plain), X))


def assert_same(found, wanted):
    if isinstance(found, type) or isinstance(wanted, type):
        assert found == wanted
    else:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def check_counts(program):
    xs = X + 0.3 * jnp.arange(3.0)
    plain = jax.jit(inside(program, Nobody))
    if isinstance(outcome(plain, X), type) or loops_over_lanes(program):
        return
    wanted = [StepByStep().count(plain, x) for x in xs]
    with counting() as trace:
        plain(X)
    assert int(trace.state["ops"]) == wanted[0]

    around = StepByStep().count(jax.jit(inside(Program((), ()), Nobody)), X)
    counted = inside(program, counting)
    wanted = [n - around for n in wanted]
    assert int(jax.jit(counted)(X)[-1]["ops"]) == wanted[0]
    if not program.has(CustomVmap):  # which cannot count under a vmap
        assert jax.jit(jax.vmap(counted))(xs)[-1]["ops"].tolist() == wanted


EXAMPLES = 6
CHUNKS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]


@pytest.mark.leaks_allowed("JAX's errors are compared, and their tracebacks hold tracers")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("check", [check_idle, check_counts], ids=lambda f: f.__name__)
def test_random_programs_under_a_trace(check, chunk):
    @drawn(chunk, EXAMPLES, programs(depth=3))
    def run(program):
        with jax.checking_leaks.func(False):
            check(program)


FOUND = {
    "a rule in a trace that has seen a jit": (Draw("default"), CustomJvp(body=(Draw("default"),))),
    "a backward rule under the trace": (
        Grad(body=(Jit(body=(Arithmetic(0.5),)), CustomVjp(body=(Arithmetic(0.5),)))),
    ),
    "a rule in a loop over lanes": (
        Grad(
            body=(
                Vmap(body=(Checkpoint(body=(Read("b"), Arithmetic(1.3))),), lanes=3),
                CustomVjp(body=(Read("b"), Vmap(body=(Draw("default"),), lanes=3))),
            )
        ),
    ),
}


@pytest.mark.leaks_allowed("JAX's errors are compared, and their tracebacks hold tracers")
@pytest.mark.parametrize("body", FOUND.values(), ids=FOUND)
def test_programs_that_went_wrong(body):
    program = Program((), body)
    with jax.checking_leaks.func(False):
        check_idle(program)
        check_counts(program)


# -- Derivatives under a trace ---------------------------------------------------------------


@jax.custom_vjp
def scaled(x):
    return jax.jit(jnp.sin)(x)


scaled.defvjp(lambda x: (jax.jit(jnp.sin)(x), x), lambda x, g: (jax.jit(jnp.cos)(x) * g,))
checkpointed = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))


def over_lanes(f):
    return lambda x: jnp.sum(jax.vmap(f)(jnp.stack([x, x + x])))


DERIVATIVES = {
    "rule": scaled,
    "rule of checkpoint": lambda x: scaled(checkpointed(x)),
    "rule of lanes": lambda x: scaled(over_lanes(checkpointed)(x)),
    "lanes of a rule": over_lanes(lambda x: scaled(checkpointed(x))),
    "rule of a scan": lambda x: scaled(
        jax.lax.scan(lambda c, _: (scaled(c), None), x, None, length=3)[0]
    ),
    "rule in a jit": jax.jit(lambda x: scaled(jax.jit(scaled)(x))),
    "rule in a branch": lambda x: jax.lax.cond(x > 0, lambda x: scaled(scaled(x)), jnp.cos, x),
    "relu": lambda x: jax.nn.relu(scaled(jax.nn.relu(x))),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_under_a_trace_with_its_rules_counts_once(name):
    f = jax.grad(DERIVATIVES[name])
    alive = new_slot(jnp.float32(1.0))  # while there is a slot, rules are looked at for its use

    def counted(x):
        with counting() as trace:
            y = f(x)
        return y, trace.state["ops"]

    wanted = StepByStep().count(jax.jit(f), X)
    for mode in (lambda f: f, jax.jit):
        y, ops = mode(counted)(X)
        np.testing.assert_allclose(y, f(X), rtol=1e-6)
        assert int(ops) == wanted
    assert read(alive) == 1.0
