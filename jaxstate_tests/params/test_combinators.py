"""The combinators of ``examples/combinators.py`` against the same networks written by hand."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.params.networks import assert_trees_close, normal, shapes

PATH = pathlib.Path(__file__).parents[2] / "examples/combinators.py"
spec = importlib.util.spec_from_file_location("combinators", PATH)
combinators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(combinators)

X = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)
Y = jnp.arange(4.0)


@jaxstate.parametrized
def linear(x):
    return x @ jaxstate.param("w", normal, (3,)) + jaxstate.param("b", normal, ())


@jaxstate.parametrized
def loss(x, y):
    return jnp.mean((linear(x) - y) ** 2)


def loss_by_hand(p, x, y):
    return jnp.mean((x @ p["linear"]["w"] + p["linear"]["b"] - y) ** 2)


def squares(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def check(net, by_hand, params, *args):
    """apply and its derivative, jitted and not."""
    for f, g in ((net.apply, by_hand), (jax.grad(net.apply), jax.grad(by_hand))):
        assert_trees_close(f(params, *args), g(params, *args))
        assert_trees_close(jax.jit(f)(params, *args), g(params, *args))


def test_regularized(key):
    net = combinators.Regularized(loss, lambda p: jnp.abs(p["linear"]["w"]).sum())
    params = net.init(key, X, Y)
    assert shapes(params) == {"model": {"linear": {"w": (3,), "b": ()}}}
    check(net, lambda p, x, y: loss_by_hand(p["model"], x, y)
          + jnp.abs(p["model"]["linear"]["w"]).sum(), params, X, Y)  # fmt: skip


def test_l2_regularized(key):
    net = combinators.L2Regularized(loss, 0.1)
    params = net.init(key, X, Y)
    check(net, lambda p, x, y: loss_by_hand(p["model"], x, y) + 0.05 * squares(p), params, X, Y)


def test_reparametrized(key):
    def doubled():
        return jaxstate.parametrized(lambda w: w * jaxstate.param("by", normal, ()), name="doubled")

    net = combinators.Reparametrized(loss, doubled)
    params = net.init(key, X, Y)
    assert shapes(params) == {
        "model": {"linear": {"w": (3,), "b": ()}},
        "doubled": {"by": ()},
        "doubled_1": {"by": ()},
    }

    def by_hand(p, x, y):
        b, w = p["model"]["linear"]["b"], p["model"]["linear"]["w"]
        scaled = {"b": b * p["doubled"]["by"], "w": w * p["doubled_1"]["by"]}
        return loss_by_hand({"linear": scaled}, x, y)

    check(net, by_hand, params, X, Y)


def test_a_reparametrization_may_look_at_the_weights(key):
    net = combinators.Reparametrized(combinators.linear, combinators.normalized)
    params = net.init(key, X[0])
    w = params["model"]["w"]
    np.testing.assert_allclose(params["normalized"]["length"], jnp.linalg.norm(w), rtol=1e-6)
    np.testing.assert_allclose(net.apply(params, X[0]), w @ X[0], rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_batched(key, axis):
    net = combinators.Batched(combinators.linear, axis)
    x = X if axis == 0 else X.T
    params = net.init(key, x)
    assert shapes(params) == {"linear": {"w": (3,)}}
    np.testing.assert_allclose(net.apply(params, x), X @ params["linear"]["w"], rtol=1e-6)
    total = jaxstate.parametrized(lambda x: net(x).sum(), name="total")
    p = total.init(key, x)
    found = jax.grad(total.apply)(p, x)["batched"]["linear"]["w"]
    np.testing.assert_allclose(found, X.sum(0), rtol=1e-6)
    by_identity = net.parameters_from({combinators.linear: params["linear"]}, x)
    assert_trees_close(by_identity, params)


def test_combinators_of_combinators(key):
    net = combinators.L2Regularized(combinators.L2Regularized(loss, 0.1), 0.2)
    params = net.init(key, X, Y)
    check(net, lambda p, x, y: loss_by_hand(p["model"]["model"], x, y) + 0.15 * squares(p),
          params, X, Y)  # fmt: skip


def test_the_example_trains(capsys):
    combinators.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last < first / 10
