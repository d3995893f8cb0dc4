"""The law, over a matrix held as data: run(T(f)) equals the program with its state passed by hand.

{draws, parameter read, parameter born, slot write, slot read after write, variable read, written,
read after written, reduced over lanes} x {every transformation, every ordered pair of them} x
{eager, under an outer jit} x {init, apply}.

`make test` runs all single transformations and a fixed sample of the pairs; `make matrix` all.
What cannot work is computed by `expected_error`, so that no cell is skipped.
"""

import hashlib
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.programs import OPERATIONS, TRANSFORMATIONS, changing, normal, variable

KEY = jax.random.key(7)
X, V = jnp.float32(0.6), jnp.float32(0.4)


def in_sample(*names):
    """One pair in 120 is part of `make test`, chosen by a hash of its name, and all of a few."""
    if all(name in ("vmap", "grad", "jit", "custom_vjp") for name in names[1:]):
        return True
    return zlib.crc32("/".join(names).encode()) % 120 == 0


def cells():
    for op in OPERATIONS:
        for t in TRANSFORMATIONS:
            yield pytest.param(op, (t,), id=f"{op.name}-{t.name}")
        for outer, inner in itertools.product(TRANSFORMATIONS, repeat=2):
            names = op.name, outer.name, inner.name
            marks = () if in_sample(*names) else (pytest.mark.slow,)
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
    return None


def initial_parameter(key, path):
    """The documented derivation: two words of the path's SHA-256 digest, folded into the key."""
    digest = hashlib.sha256(path.encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return normal(key, ())


def run_stateful(op, transformations):
    def run(x, w, v):
        slot = new_slot(jnp.float32(0.4))

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
    def run(x, w, v):
        f = op.by_hand
        draws = op.draws
        for t in reversed(transformations):
            f = t.by_hand(f, draws)
            draws = draws and t.name != "eval_shape"
        s = {"key": KEY, "count": jnp.int32(0), "slot": jnp.float32(0.4)}
        with changing(op.changes):
            y, s = f(x, {**s, "w": w, "v": v, "mean": v})
        return y, {name: s[name] for name in ("count", "slot", "v", "mean")}

    return run


def outcome(run, *args):
    """The result of a program, or the type of the error that it raises."""
    try:
        return jax.tree.map(np.asarray, run(*args))
    except Exception as e:
        return type(e)


def assert_same(found, wanted):
    if isinstance(wanted, type) or isinstance(found, type):
        assert found == wanted
        return
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("op, transformations", list(cells()))
def test_equals_the_program_with_its_state_passed_by_hand(op, transformations):
    stateful, by_hand = run_stateful(op, transformations), run_by_hand(op, transformations)
    w = initial_parameter(KEY, "w")
    error = expected_error(op, transformations)

    for mode in (lambda f: f, jax.jit):
        wanted = error or outcome(mode(by_hand), X, w, V)
        # An exception holds tracers in its traceback, and the leak checker reports those instead.
        with jax.checking_leaks.func(not isinstance(wanted, type)):
            assert_same(outcome(mode(stateful), X, w, V), wanted)
    if (op.has_param or op.variable) and not isinstance(wanted, type):
        check_init(op, transformations, w)
        check_gradient(stateful, by_hand, transformations, w)


def check_gradient(stateful, by_hand, transformations, w):
    """With respect to the parameter and the variables, by reverse mode, eagerly and jitted.

    The rule of a function with a custom rule says nothing about state that the function reads:
    where that derivative is asked for, it is refused.
    """
    names = [t.name for t in transformations]
    run = names[: names.index("eval_shape")] if "eval_shape" in names else names
    refused = "custom_jvp" in run or "custom_vjp" in run

    for mode in (lambda f: f, jax.jit):
        wanted = outcome(mode(jax.grad(total(by_hand), (0, 1))), w, V)
        with jax.checking_leaks.func(not (refused or isinstance(wanted, type))):
            found = outcome(mode(jax.grad(total(stateful), (0, 1))), w, V)
        if not (refused and found is jaxstate.CustomRuleStateError):
            assert_same(found, wanted)


def total(run):
    def loss(w, v):
        y, s = run(X, w, v)
        return y + s["v"] + 2 * s["mean"]

    return loss


def check_init(op, transformations, w):
    """The parameter is born inside, with the value that its key and path give; a variable too, and
    it is not written.

    What `jax.eval_shape` sees never runs, and makes nothing.
    """
    unused = any(t.name == "eval_shape" for t in transformations)
    wanted = {"w": np.asarray(w)} if op.has_param and not unused else {}
    made = op.variable and (op.has_handle or not unused)
    state = {op.variable: np.asarray(V)} if made else {}

    @jaxstate.parametrized
    def net(x):
        return transformed(op, transformations, None)(x)

    for mode in (lambda f: f, jax.jit):
        assert_same(outcome(mode(net.init), KEY, X), wanted)
        assert_same(outcome(mode(net.init_with_state), KEY, X), (wanted, state))
