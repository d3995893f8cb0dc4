"""The law, over a matrix held as data: run(T(f)) equals the program with its state passed by hand.

{draws, parameter read, parameter born, slot write, slot read after write, variable read, written,
read after written, reduced over lanes} x {every transformation, every ordered pair of them} x
{eager, under an outer jit} x {init, apply}.

`make test` runs half of the single transformations and a fixed sample of the pairs, `make matrix`
all.
What cannot work is computed by `expected_error`, so that no cell is skipped.
"""

import hashlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.core.programs import OPERATIONS, TRANSFORMATIONS, changing, normal, variable
from jaxstate_tests.sampling import in_sample


def initial_parameter(key, path):
    """The documented derivation: two words of the path's SHA-256 digest, folded into the key."""
    digest = hashlib.sha256(path.encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return normal(key, ())


KEY = jax.random.key(7)
X, W, V = jnp.float32(0.6), initial_parameter(KEY, "w"), jnp.float32(0.4)
COUNT = jnp.int32(0)


def is_quick(*names):
    """Whether `make test` runs a pair: more of those that are used most."""
    often = all(name in ("vmap", "grad", "jit", "custom_vjp") for name in names[1:])
    return in_sample(4 if often else 400, *names)


def cells():
    for i, op in enumerate(OPERATIONS):
        for k, t in enumerate(TRANSFORMATIONS):
            marks = pytest.mark.slow if (i + k) % 2 else ()
            yield pytest.param(op, (t,), id=f"{op.name}-{t.name}", marks=marks)
        for outer, inner in itertools.product(TRANSFORMATIONS, repeat=2):
            names = op.name, outer.name, inner.name
            marks = () if is_quick(*names) else (pytest.mark.slow,)
            yield pytest.param(op, (outer, inner), id="-".join(names), marks=marks)


def expected_error(op, transformations):
    """The error of a cell that cannot work, or None. The innermost comes first."""
    for t in reversed(transformations):
        if t.name == "eval_shape":
            return None  # nothing happens, so nothing goes wrong further out
        if t.lanes and op.writes:
            return jaxstate.LaneWriteError
        if t.directions and op.draws:
            return jaxstate.SplitStreamError
        # JAX's rule for linear solvers gives each lane its own of what a solver returns beside the
        # solution, also if no operand has lanes.
        if t.directions and op.writes and transformations[-1].name == "linear_solve":
            return jaxstate.LaneWriteError
    return None


def run_stateful(op, transformations):
    def run(x, w, v):
        slot = new_slot(V)

        @jaxstate.parametrized
        def net(x):
            return transformed(op, transformations, slot)(x)

        state = {"v": v, "mean": v}
        with jaxstate.rng_stream(KEY) as stream:
            y, state = net.apply_with_state({"w": w}, state, x)
        return y, {"count": jnp.int32(stream.count), "slot": read(slot), **state}

    return run


def transformed(op, transformations, slot):
    """The stateful program; called inside a parametrized function if it has variables."""
    f = op.stateful(variable("v") if op.has_handle else slot)
    for t in reversed(transformations):
        f = t.stateful(f)
    return f


def run_by_hand(op, transformations):
    changes = set() if any(t.name == "eval_shape" for t in transformations) else op.changes

    def run(x, w, v):
        f = op.by_hand
        draws = op.draws
        for t in reversed(transformations):
            f = t.by_hand(f, draws)
            draws = draws and t.name != "eval_shape"
        s = {"key": KEY, "count": COUNT, "slot": V}
        with changing(changes):
            y, s = f(x, {**s, "w": w, "v": v, "mean": v})
        return y, {name: s[name] for name in ("count", "slot", "v", "mean")}

    return run


class Part(NamedTuple):
    """One thing to compare, as functions of ``(x, w, v)``."""

    found: Callable[..., Any]
    wanted: Callable[..., Any] | type  # or the type of the error
    refused: bool = False  # may be a CustomRuleStateError instead


def parts(op, transformations):
    stateful, by_hand = run_stateful(op, transformations), run_by_hand(op, transformations)
    error = expected_error(op, transformations)
    yield Part(stateful, error or by_hand)
    if (op.has_param or op.variable) and not error:
        gradients = (jax.grad(total(run), (1, 2)) for run in (stateful, by_hand))
        yield Part(*gradients, refuses(transformations))
        yield from initial_parts(op, transformations)


def replay(run):
    """A program that is traced by JAX once, or the type of the error that it raises.

    Some errors come when a program is lowered.
    """
    if is_error(run):
        return run
    try:
        traced = jax.jit(run).trace(X, W, V)
        traced.lower()
    except Exception as e:
        return type(e)

    def again(*args):
        flat = jax.core.eval_jaxpr(traced.jaxpr.jaxpr, traced.jaxpr.consts, *args)
        return jax.tree.unflatten(jax.tree.structure(traced.out_info), flat)

    return again


def is_error(wanted):
    return isinstance(wanted, type)


def total(run):
    def loss(x, w, v):
        y, s = run(x, w, v)
        return y + s["v"] + 2 * s["mean"]

    return loss


def refuses(transformations):
    """The rule of a function with a custom rule says nothing about state that the function reads:
    where that derivative is asked for, it is refused.
    """
    names = [t.name for t in transformations]
    run = names[: names.index("eval_shape")] if "eval_shape" in names else names
    return "custom_jvp" in run or "custom_vjp" in run


def initial_parts(op, transformations):
    """The parameter is born inside, with the value that its key and path give; a variable too, and
    it is not written.

    What `jax.eval_shape` sees never runs, and makes nothing.
    """
    unused = any(t.name == "eval_shape" for t in transformations)
    wanted = {"w": W} if op.has_param and not unused else {}
    made = op.variable and (op.has_handle or not unused)
    state = {op.variable: V} if made else {}

    @jaxstate.parametrized
    def net(x):
        return transformed(op, transformations, None)(x)

    yield Part(lambda x, w, v: net.init(KEY, x), lambda *_: wanted)
    yield Part(lambda x, w, v: net.init_with_state(KEY, x), lambda *_: (wanted, state))


@pytest.mark.parametrize("op, transformations", list(cells()))
def test_equals_the_program_with_its_state_passed_by_hand(op, transformations):
    """Jitted, together with the programs by hand, and eagerly.

    Most of the time goes to XLA: what is jitted is compiled as one program. An error is raised
    alone, and without the leak checker, which reports the tracers that a traceback holds.
    """
    together = []
    with jax.checking_leaks.func(False):
        for part in parts(op, transformations):
            wanted = replay(part.wanted)
            if part.refused or is_error(wanted):
                check_alone(part)
            else:
                together.append((part.found, wanted))
            if is_error(wanted) and not together:
                return  # its gradient is the same error

    def jitted(*args):
        return [(found(*args), wanted(*args)) for found, wanted in together]

    for (run, _), (found, wanted) in zip(together, jax.jit(jitted)(X, W, V), strict=True):
        assert_same(found, wanted)
        assert_same(run(X, W, V), wanted)


def check_alone(part):
    for mode in (lambda f: f, jax.jit):
        found = outcome(mode(part.found))
        if not (part.refused and found is jaxstate.CustomRuleStateError):
            wanted = part.wanted
            assert_same(found, wanted if is_error(wanted) else outcome(mode(wanted)))


def outcome(run):
    """The result of a program, or the type of the error that it raises."""
    try:
        return run(X, W, V)
    except Exception as e:
        return type(e)


def assert_same(found, wanted):
    if is_error(wanted) or is_error(found):
        assert found == wanted
        return
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
