"""Random libraries around random state give what they give with the state passed by hand.

`make test` runs 100 of them, the same every time. ``make fuzz PROGRAMS=libraries`` runs new ones
for as long as asked, and prints the seed; a counterexample becomes a test of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

import jaxstate
from jaxstate_tests.fuzz import call_sequences as cs
from jaxstate_tests.fuzz import libraries
from jaxstate_tests.fuzz.fuzzing import drawn, fuzz


def check(program, x, mode):
    entries = {entry: cs.initial(entry) for entry in program.entries}
    if mode == "init":
        born = program.init(x)
        if "forwards" in program.facts:  # then a library may drop what was there before
            entries = {name: entries[name] for name in born}
        return assert_same(born, entries)
    given = {name: jnp.float32(v) for name, v in cs.given(program.entries, 1).items()}
    run, by_hand = MODES[mode](program)
    result = found(program, mode, run, x, given)
    if result is None:
        assert "rule" in program.facts
    else:
        assert_same(result, by_hand(jnp.float32(x), given))


MODES = {
    "init": None,
    "eager": lambda program: (program.stateful, program.by_hand),
    "jit": lambda program: (jax.jit(program.stateful), program.by_hand),
    "derivative": lambda program: derivatives(program, 0),
    "of parameters too": lambda program: derivatives(program, (0, 1)),
}
X = st.sampled_from([np.float32(0.6), np.float32(-0.4)])
ARGUMENTS = (libraries.programs(), X, st.sampled_from(sorted(MODES)))


def found(program, mode, run, *args):
    """None where a derivative is asked of a custom rule that does not say what it is.

    JAX has errors of its own where a library closes over what is differentiated, and where a
    function with ``optimize_remat`` closes over a tracer.
    """
    refusals = [jaxstate.CustomRuleStateError]
    if mode == "of parameters too":
        refusals.append(jax.errors.UnexpectedTracerError)
    try:
        return run(*args)
    except tuple(refusals):
        return None
    except Exception as error:
        is_of_jax = "No constant handler for type: <class 'jax." in str(error)
        if is_of_jax and {"custom_vjp, optimize_remat", "closes over"} <= program.facts:
            return None
        if type(error).__name__ != "CustomVJPException":
            raise
        return None


def derivatives(program, argnums):
    """Of all that comes out: in reverse mode where JAX can, else along one direction."""

    def total(apply):
        def of(x, entries):
            y, s = apply(x, entries)
            leaves = jax.tree.leaves({n: v for n, v in s.items() if not n.startswith("count")})
            return y + sum((0.3 + 0.1 * i) * value for i, value in enumerate(leaves))

        return of

    def along(f):
        def run(x, entries):
            if argnums == 0:
                return jax.jvp(lambda x: f(x, entries), (x,), (jnp.ones_like(x),))[1]
            return jax.jvp(f, (x, entries), jax.tree.map(jnp.ones_like, (x, entries)))[1]

        return run

    both = total(program.stateful), total(program.by_hand)
    if "while" not in program.facts:
        run, by_hand = (jax.grad(f, argnums) for f in both)
    else:
        assume("custom_vjp" not in program.facts)
        run, by_hand = map(along, both)
    return jax.jit(run), by_hand


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert not isinstance(a, jax.core.Tracer)
        assert jnp.shape(a) == jnp.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.leaks_allowed("a refusal holds tracers in its traceback")
def test_libraries():
    drawn(0, 100, *ARGUMENTS)(check)


@pytest.mark.slow
@pytest.mark.leaks_allowed("a refusal holds tracers in its traceback")
def test_fuzz():
    fuzz(check, *ARGUMENTS)
