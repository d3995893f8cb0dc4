"""Batch norm: statistics that are variables, in all that a training step does."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.params.counting import (
    KEY,
    assert_same,
    both,
    ones,
)

# -- Batch norm ------------------------------------------------------------------------------


def statistics(x, axis_name=None):
    mean, square = x.mean(0), (x**2).mean(0)
    if axis_name:
        mean, square = lax.pmean((mean, square), axis_name)
    return mean, square - mean**2


def batch_norm(axis_name=None):
    @jaxstate.parametrized
    def batch_norm(x):
        scale = jaxstate.param("scale", ones, x.shape[-1:])
        running = jaxstate.variable("mean", jnp.zeros, x.shape[-1:])
        running_var = jaxstate.variable("var", jnp.ones, x.shape[-1:])
        mean, var = statistics(x, axis_name)
        running.value = 0.9 * running.value + 0.1 * mean
        running_var.value = 0.9 * running_var.value + 0.1 * var
        return scale * (x - mean) / jnp.sqrt(var + 1e-5)

    return batch_norm


def batch_norm_by_hand(p, s, x, axis_name=None):
    mean, var = statistics(x, axis_name)
    s = {"mean": 0.9 * s["mean"] + 0.1 * mean, "var": 0.9 * s["var"] + 0.1 * var}
    return p["scale"] * (x - mean) / jnp.sqrt(var + 1e-5), s


def model(norm, wrap=lambda f: f):
    norms = [norm, batch_norm()]

    @jaxstate.parametrized
    def model(x):
        x = jnp.tanh(wrap(norms[0])(x) @ jnp.ones((3, 3)))
        return norms[1](jax.checkpoint(jnp.sin)(x))

    return model


def model_by_hand(p, s, x):
    y, first = batch_norm_by_hand(p["batch_norm"], s["batch_norm"], x)
    x = jnp.tanh(y @ jnp.ones((3, 3)))
    y, second = batch_norm_by_hand(p["batch_norm_1"], s["batch_norm_1"], jnp.sin(x))
    return y, {"batch_norm": first, "batch_norm_1": second}


BATCH = jax.random.normal(jax.random.key(1), (8, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_batch_norm_in_a_plain_value_and_grad_body(wrap):
    net = model(batch_norm(), wrap)
    params, state = net.init_with_state(KEY, BATCH)

    def loss(apply):
        def run(params, state):
            y, state = apply(params, state, BATCH)
            return jnp.sum(y**3), state

        return jax.value_and_grad(run, has_aux=True)

    wanted = loss(model_by_hand)(params, state)
    for step in both(loss(net.apply_with_state)):
        assert_same(step(params, state), wanted, rtol=2e-4, atol=2e-4)


def test_value_and_grad_inside_the_state():
    """The derivative of a part of the function: no `has_aux`, the statistics are just there."""
    norm = batch_norm()

    @jaxstate.parametrized
    def step(x):
        return jax.value_and_grad(lambda x: jnp.sum(norm(x) ** 3))(x)

    def by_hand(p, s, x):
        def loss(x):
            y, new = batch_norm_by_hand(p["batch_norm"], s["batch_norm"], x)
            return jnp.sum(y**3), {"batch_norm": new}

        (y, s), g = jax.value_and_grad(loss, has_aux=True)(x)
        return (y, g), s

    params, state = step.init_with_state(KEY, BATCH)
    for apply in both(step.apply_with_state):
        wanted = by_hand(params, state, BATCH)
        assert_same(apply(params, state, BATCH), wanted, rtol=2e-4, atol=2e-5)


def test_batch_norm_in_a_scan_of_micro_batches():
    norm = batch_norm()

    @jaxstate.parametrized
    def net(batches):
        return lax.scan(lambda c, x: (c + jnp.sum(norm(x) ** 3), None), 0.0, batches)[0]

    def by_hand(p, s, batches):
        def body(carry, x):
            c, s = carry
            y, s = batch_norm_by_hand(p, s, x)
            return (c + jnp.sum(y**3), s), None

        return lax.scan(body, (0.0, s), batches)[0]

    batches = BATCH.reshape(2, 4, 3)
    params, state = net.init_with_state(KEY, batches)

    def wanted_loss(params, state):
        y, s = by_hand(params["batch_norm"], state["batch_norm"], batches)
        return y, {"batch_norm": s}

    wanted = jax.value_and_grad(wanted_loss, has_aux=True)(params, state)
    for step in both(
        jax.value_and_grad(lambda p, s: net.apply_with_state(p, s, batches), has_aux=True)
    ):
        assert_same(step(params, state), wanted, rtol=2e-4, atol=2e-4)


def test_batch_norm_over_lanes_with_pmean_equals_one_batch():
    norm = batch_norm("lanes")

    @jaxstate.parametrized
    def net(x):
        return jax.vmap(norm, axis_name="lanes")(x.reshape(4, 2, 3)).reshape(8, 3)

    params, state = net.init_with_state(KEY, BATCH)
    y, new = batch_norm_by_hand(params["batch_norm"], state["batch_norm"], BATCH)
    for apply in both(net.apply_with_state):
        assert_same(apply(params, state, BATCH), (y, {"batch_norm": new}), rtol=1e-4, atol=1e-5)
