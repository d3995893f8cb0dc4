"""A network in shards: data and weights are spread over eight devices, and nothing else changes.

    python examples/sharded.py

runs on eight devices that JAX makes out of one CPU. The same file runs on several machines, or on
several processes of one machine, which then have four devices each::

    python examples/sharded.py --process 0 --of 2 --coordinator localhost:12345 &
    python examples/sharded.py --process 1 --of 2 --coordinator localhost:12345

What to look at: the network does not know of any of this. The weights have names, and a table says
over which axis of the mesh a weight of that name is cut. ``jax.jit(net.init_with_state,
out_shardings=...)`` makes each piece on the device that keeps it, so no device ever holds the whole
model. Draws and running statistics are the same numbers as on one device.

The file reads from top to bottom: network, shards, training, report.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxstate

INPUTS, WIDTH, DEPTH = 16, 64, 2
BATCH, STEPS, LEARNING_RATE = 64, 30, 0.05
DROPOUT, MOMENTUM = 0.1, 0.9
DEVICES = 8


# The network, as it would be on one device.


def dense(features, name):
    @jaxstate.parametrized(name=name)
    def dense(x):
        shape = (x.shape[-1], features)
        weights = jaxstate.param("weights", jax.nn.initializers.lecun_normal(), shape)
        return x @ weights + jaxstate.param("bias", jax.nn.initializers.zeros, (features,))

    return dense


@jaxstate.parametrized
def normalize(x):
    """By the mean and variance of the whole batch, of which it keeps running means."""
    mean = jaxstate.variable("mean", jnp.zeros, x.shape[-1:])
    variance = jaxstate.variable("variance", jnp.ones, x.shape[-1:])
    mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * x.mean(0)
    variance.value = MOMENTUM * variance.value + (1 - MOMENTUM) * x.var(0)
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-3)


def dropout(x):
    keep = jaxstate.random.bernoulli(1 - DROPOUT, x.shape)
    return jnp.where(keep, x / (1 - DROPOUT), 0)


def residual_block():
    widen, narrow = dense(4 * WIDTH, "widen"), dense(WIDTH, "narrow")

    @jaxstate.parametrized
    def block(x):
        return x + narrow(dropout(jax.nn.gelu(widen(x))))

    return block


def network():
    embed, head = dense(WIDTH, "embed"), dense(1, "head")
    blocks = [residual_block() for _ in range(DEPTH)]

    @jaxstate.parametrized
    def net(x):
        x = embed(x)
        for block in blocks:
            x = jax.checkpoint(block)(x)
        return head(normalize(x))[:, 0]

    return net


net = network()


# Shards: how an array is cut, by its name. What is not listed is kept whole on every device.

CUTS = {
    "widen/weights": PartitionSpec(None, "model"),
    "widen/bias": PartitionSpec("model"),
    "narrow/weights": PartitionSpec("model", None),
}


def shardings(mesh, tree):
    """The sharding of every array of a nested dict."""

    def of(path, _):
        name = "/".join(entry.key for entry in path[-2:])
        return NamedSharding(mesh, CUTS.get(name, PartitionSpec()))

    return jax.tree.map_with_path(of, tree)


def make_mesh():
    """Two devices along the batch, four along the width."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def init(key, mesh=None):
    """Parameters and running statistics, each piece made where it is kept."""
    x = jax.ShapeDtypeStruct((BATCH, INPUTS), jnp.float32)
    make = lambda key: net.init_with_state(key, x)  # noqa: E731
    wanted = None if mesh is None else shardings(mesh, jax.eval_shape(make, key))
    return jax.jit(make, out_shardings=wanted)(key)


# Training. Each step draws its own batch: inputs, and what a fixed function makes of them.


def make_step(mesh=None):
    def loss(params, state):
        x = jaxstate.random.normal((BATCH, INPUTS))
        if mesh is not None:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))
        y, state = net.apply_with_state(params, state, x)
        return jnp.mean((y - jnp.sin(x.sum(1))) ** 2), state

    @partial(jax.jit, donate_argnums=(0, 1))  # the new parameters take the memory of the old ones
    def step(params, state):
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, state)
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)
        return params, state, value

    return step


def train(mesh=None, steps=STEPS):
    """Parameters, running statistics and the losses of ``steps`` steps; without a mesh, on one
    device."""
    params, state = init(jax.random.key(0), mesh)
    step, losses = make_step(mesh), []
    with jaxstate.rng_stream(jax.random.key(1)):
        for _ in range(steps):
            params, state, value = step(params, state)
            losses.append(float(value))
    return params, state, losses


# Report.


def bytes_per_device(tree):
    """How much of the arrays each device of this process keeps."""
    sizes = dict.fromkeys(jax.local_devices(), 0)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return list(sizes.values())


def whole(tree):
    """The arrays in one piece, on the host."""
    return multihost_utils.process_allgather(tree, tiled=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--process", type=int, default=0, help="the number of this process")
    parser.add_argument("--of", type=int, default=1, help="how many processes there are")
    parser.add_argument("--coordinator", help="host:port of process 0, if there are several")
    parser.add_argument("--save", help="where process 0 puts the trained network, a .npz file")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES // options.of)
    if options.of > 1:
        jax.distributed.initialize(options.coordinator, options.of, options.process)

    params, state, losses = train(make_mesh())
    size = sum(array.nbytes for array in jax.tree.leaves((params, state)))
    print(f"parameters and statistics  {size:,} bytes")
    for i, kept in enumerate(bytes_per_device((params, state))):
        print(f"device {i} keeps             {kept:,} bytes ({kept / size:.0%})")
    print(f"loss                       {losses[0]:.3f}, after {STEPS} steps {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2

    arrays = whole((params, state))  # every process takes part
    if options.save and options.process == 0:
        leaves = jax.tree.leaves(arrays)
        np.savez(options.save, *leaves, losses=np.array(losses))
    if options.of == 1:
        alone = train()
        for found, wanted in zip(jax.tree.leaves(arrays), jax.tree.leaves(alone[:2]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        print("on one device              the same numbers")


if __name__ == "__main__":
    main()
