"""Batch norm over eight devices is that on one: the same outputs, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.rules.eight_devices.common import (
    ALL,
    AXES,
    KEY,
    MODES,
    P,
    close,
    mesh,
    sharding,
)

ones = jax.nn.initializers.ones
BATCH = np.asarray(jax.random.normal(jax.random.key(1), (16, 3)))
MOMENTUM = 0.9


def batch_norm(*axis_names, reduce=None):
    """Normalizes by the statistics of the batch, which lies on the axes; keeps running means."""

    @jaxstate.parametrized
    def batch_norm(x):
        scale = jaxstate.param("scale", ones, x.shape[-1:])
        mean = jaxstate.variable("mean", jnp.zeros, x.shape[-1:], reduce=reduce)
        square = jaxstate.variable("square", jnp.ones, x.shape[-1:], reduce=reduce)
        m, s = x.mean(0), (x**2).mean(0)
        for name in axis_names:
            m, s = jax.lax.pmean((m, s), name)
        mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * m
        square.value = MOMENTUM * square.value + (1 - MOMENTUM) * s
        return scale * (x - m) / jnp.sqrt(s - m**2 + 1e-3)

    return batch_norm


def by_hand(scale, state, x):
    m, s = x.mean(0), (x**2).mean(0)
    state = {
        "mean": MOMENTUM * state["mean"] + (1 - MOMENTUM) * m,
        "square": MOMENTUM * state["square"] + (1 - MOMENTUM) * s,
    }
    return scale * (x - m) / jnp.sqrt(s - m**2 + 1e-3), state


def cost(y):
    return (y**3).sum() + (y * jnp.arange(y.size).reshape(y.shape)).mean()


PARAMS = {"batch_norm": {"scale": jnp.array([1.0, 2.0, 3.0])}}
STATE = {"batch_norm": {"mean": jnp.array([0.5, 0.0, -0.5]), "square": jnp.array([1.0, 2.0, 1.0])}}


def on_devices(f, **kwargs):
    return jax.shard_map(f, mesh=mesh, in_specs=ALL, out_specs=ALL, **kwargs)


def around(net):
    """The shard_map is inside of the network: parameters and statistics are outside of it."""

    def run(params, state, x):
        return net.apply_with_state(params, state, x)

    return run


def inside(norm):
    """The network is inside of the shard_map: parameters and statistics are its arguments."""
    net = jaxstate.parametrized(lambda x: norm(x), name="net")

    def run(params, state, x):
        f = lambda p, s, x: net.apply_with_state(p, s, x)  # noqa: E731
        specs = dict(in_specs=(P(), P(), ALL), out_specs=(ALL, P()))
        return jax.shard_map(f, mesh=mesh, **specs)(params, state, x)

    return run


def network(norm, **kwargs):
    return jaxstate.parametrized(lambda x: on_devices(norm, **kwargs)(x), name="net")


def micro_batches(norm):
    """Each device takes its part of the batch in two steps of a scan."""

    def f(x):
        return jax.lax.scan(lambda _, x: (None, norm(x)), None, x.reshape(2, -1, 3))[1].reshape(
            x.shape
        )

    return f


def micro_batches_by_hand(scale, state, x):
    """What two steps over eight devices see: the first and second halves of the devices' parts."""
    parts = x.reshape(8, 2, -1, 3)
    outs = []
    for step in range(2):
        y, state = by_hand(scale, state, parts[:, step].reshape(-1, 3))
        outs.append(y.reshape(8, -1, 3))
    return jnp.stack(outs, 1).reshape(x.shape), state


norm = batch_norm(AXES)
PROGRAMS = {
    "shard_map in the network": (around(network(norm)), by_hand),
    "network in the shard_map": (inside(norm), by_hand),
    "jit on the devices": (around(network(jax.jit(norm))), by_hand),
    "checkpoint on the devices": (around(network(jax.checkpoint(norm))), by_hand),
    "checkpoint of the shard_map": (
        around(jaxstate.parametrized(jax.checkpoint(on_devices(norm)), name="net")), by_hand
    ),
    "micro-batches": (around(network(micro_batches(norm))), micro_batches_by_hand),
    "micro-batches, network inside": (inside(micro_batches(norm)), micro_batches_by_hand),
}  # fmt: skip


@pytest.mark.leaks_allowed(
    "the checker reports a checkpoint in a jitted shard_map of JAX alone, too"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_eight_devices_are_one(name, mode):
    program, reference = PROGRAMS[name]

    def loss(params, state):
        y, state = program(params, state, BATCH)
        return cost(y), (y, state)

    def loss_by_hand(params, state):
        y, state = reference(params["batch_norm"]["scale"], state["batch_norm"], BATCH)
        return cost(y), (y, {"batch_norm": state})

    wanted = jax.value_and_grad(loss_by_hand, has_aux=True)(PARAMS, STATE)
    found = mode(jax.value_and_grad(loss, has_aux=True))(PARAMS, STATE)
    close(found, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_statistics_per_device_are_averaged_with_reduce(mode, check_vma):
    """Each device normalizes by its own part of the batch; the running statistics are the means."""
    net = network(batch_norm(reduce=jnp.mean), check_vma=check_vma)
    close(net.init_with_state(KEY, BATCH)[1]["batch_norm"]["mean"], jnp.zeros(3))
    scale, state = PARAMS["batch_norm"]["scale"], STATE["batch_norm"]

    def wanted_by_hand(scale):
        y, states = jax.vmap(lambda x: by_hand(scale, state, x))(BATCH.reshape(8, 2, 3))
        means = jax.tree.map(lambda s: s.mean(0), states)
        return y.reshape(16, 3), {"batch_norm": means}

    def apply(scale):
        return net.apply_with_state({"batch_norm": {"scale": scale}}, STATE, BATCH)

    close(mode(apply)(scale), wanted_by_hand(scale), rtol=1e-4, atol=1e-5)
    found = mode(jax.grad(lambda s: cost(apply(s)[0])))(scale)
    close(found, jax.grad(lambda s: cost(wanted_by_hand(s)[0]))(scale), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_the_plain_function_on_a_sharded_batch(mode):
    """No shard_map: the compiler divides the work, and the mean is over the whole batch."""
    plain = jaxstate.parametrized(lambda x: jax.jit(batch_norm())(x), name="net")
    y, state = by_hand(PARAMS["batch_norm"]["scale"], STATE["batch_norm"], BATCH)
    batch = jax.device_put(BATCH, sharding(AXES))
    found = mode(plain.apply_with_state)(PARAMS, STATE, batch)
    close(found, (y, {"batch_norm": state}), rtol=1e-4, atol=1e-5)
    assert found[0].sharding.is_equivalent_to(sharding(AXES), 2)


@pytest.mark.parametrize("mode", MODES)
def test_lanes_on_devices_are_averaged_with_reduce(mode):
    """First the lanes of each device, then the devices."""
    norm = batch_norm(reduce=jnp.mean)
    net = network(lambda x: jax.vmap(norm)(x.reshape(2, -1, 3)).reshape(x.shape))
    batch = np.asarray(jax.random.normal(KEY, (32, 3)))
    scale, state = PARAMS["batch_norm"]["scale"], STATE["batch_norm"]
    y, states = jax.vmap(lambda x: by_hand(scale, state, x))(batch.reshape(16, 2, 3))
    wanted = y.reshape(32, 3), {"batch_norm": jax.tree.map(lambda s: s.mean(0), states)}
    close(mode(net.apply_with_state)(PARAMS, STATE, batch), wanted, rtol=1e-4, atol=1e-5)


def test_pmap_averages_with_reduce():
    net = jaxstate.parametrized(
        lambda x: jax.pmap(batch_norm("i", reduce=jnp.mean), axis_name="i")(x), name="net"
    )
    y, state = by_hand(PARAMS["batch_norm"]["scale"], STATE["batch_norm"], BATCH)
    found, new = net.apply_with_state(PARAMS, STATE, BATCH.reshape(8, 2, 3))
    close((found.reshape(16, 3), new), (y, {"batch_norm": state}), rtol=1e-4, atol=1e-5)
