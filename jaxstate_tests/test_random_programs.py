"""Random programs equal the same programs with their state passed by hand.

`make test` runs 300 of them, the same every time. `make fuzz` runs new ones for as long as asked,
and prints the seed; a counterexample becomes a test below.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.random_programs import (
    CustomJvp,
    CustomVjp,
    anywhere,
    programs,
    run_by_hand,
    run_stateful,
)

KEY = jax.random.key(11)
X = jnp.float32(0.6)
W = jnp.float32(-0.8)


def stateful(program):
    def run(x):
        slots = {"a": new_slot(jnp.float32(0.2)), "b": new_slot(jnp.float32(-0.3))}
        net = jaxstate.parametrized(lambda x: run_stateful(program, slots, x))
        with jaxstate.rng_stream(KEY) as stream:
            y = net.apply({"w": W}, x)
        return y, {"count": stream.count, "a": read(slots["a"]), "b": read(slots["b"])}

    return run


def by_hand(program):
    def run(x):
        s = {"key": KEY, "count": jnp.int32(0), "w": W}
        y, s = run_by_hand(program, x, {**s, "a": jnp.float32(0.2), "b": jnp.float32(-0.3)})
        return y, {"count": s["count"], "a": s["a"], "b": s["b"]}

    return run


def outcome(run, x):
    """The result of a program, or the type of the error that it raises."""
    try:
        return jax.tree.map(np.asarray, run(x))
    except Exception as error:
        if isinstance(error, jaxstate.StateError):
            return error
        return type(error)


def has_custom_rule(program):
    return anywhere(program, lambda s: isinstance(s, CustomJvp | CustomVjp))


def check(program):
    """Eagerly, jitted, and its gradient: values, draws, slots."""
    with jax.checking_leaks.func(False):  # errors of JAX are compared too
        wanted = outcome(jax.jit(by_hand(program)), X)
        for mode in (lambda f: f, jax.jit):
            assert_same(program, outcome(mode(stateful(program)), X), wanted)
        found, wanted = (
            outcome(jax.jit(jax.grad(lambda x, f=f: f(x)[0])), X)
            for f in (stateful(program), by_hand(program))
        )
        assert_same(program, found, wanted)


def assert_same(program, found, wanted):
    if isinstance(found, jaxstate.CustomRuleStateError) and has_custom_rule(program):
        return  # the rule says nothing about a derivative that is asked for: refused, by contract
    if isinstance(wanted, type) or isinstance(found, type | Exception):
        assert found == wanted, (found, wanted)
        return
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


CHUNKS = 10
_settings = settings(
    max_examples=300 // CHUNKS,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@pytest.mark.leaks_allowed("JAX's errors are compared, and their tracebacks hold tracers")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk):
    @seed(chunk)
    @_settings
    @given(programs(depth=3 if chunk < CHUNKS - 2 else 5))
    def run(program):
        check(program)

    run()


@pytest.mark.slow
@pytest.mark.leaks_allowed("JAX's errors are compared, and their tracebacks hold tracers")
def test_fuzz():
    """New programs for as many minutes as the environment variable FUZZ_MINUTES says."""
    minutes = float(os.environ.get("FUZZ_MINUTES", "1"))
    start = int(os.environ.get("FUZZ_SEED") or time.time_ns() % 10**9)
    end = time.monotonic() + 60 * minutes
    number = start
    while time.monotonic() < end:
        print(f"FUZZ_SEED={number}", flush=True)

        @seed(number)
        @settings(_settings, max_examples=100)
        @given(programs())
        def run(program):
            check(program)

        run()
        jax.clear_caches()
        number += 1
    print(f"{100 * (number - start)} programs")
