"""A transformer in shards: its weights name their axes, and a table says how these are cut.

    python examples/sharded_transformer.py              # an automatic mesh
    python examples/sharded_transformer.py --explicit   # the types of arrays say how they are cut

runs on eight devices that JAX makes out of one CPU: two along the axis "data", over which the batch
is cut, four along "model". Each weight is cut twice. Over "model" each device has some of the heads
and of the hidden units (tensor parallelism). Over "data" the devices keep parts of what all of them
need, and gather it where it is used (FSDP).

What to look at: the network says nothing of its parameters but their axes. The shardings are made
of the metadata in three lines, and the step that is compiled is the one that passes all parameters
by hand (`jaxstate_tests/rules/eight_devices/transformer.py` compares them).

The file reads from top to bottom: mesh, network, shards, training, report.
"""

import argparse
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxstate

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS = 64, 64, 4, 256, 3
BATCH, LENGTH, STEPS = 16, 32, 20
LEARNING_RATE, MOMENTUM, DROPOUT = 0.05, 0.9, 0.1
DEVICES = 8


# The mesh. With explicit axes, the result of a product says how it is cut; with automatic ones the
# compiler is told, and finds out the rest.


def make_mesh(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def is_explicit():
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def cut(x, *spec):
    """``x``, with its axes cut over those of the mesh."""
    change = jax.reshard if is_explicit() else jax.lax.with_sharding_constraint
    return change(x, P(*spec))


def product(formula, x, w, *spec):
    """``einsum``, with the axes of the result cut over those of the mesh."""
    if is_explicit():
        return jnp.einsum(formula, x, w, out_sharding=P(*spec))
    return cut(jnp.einsum(formula, x, w), *spec)


# The network.


def weight(name, axes, *shape):
    """A weight, gathered over "data", where only a part of it is kept."""
    init = jax.nn.initializers.variance_scaling(1, "fan_in", "normal", in_axis=0)
    w = jaxstate.param(name, init, shape, metadata={"axes": axes})
    return cut(w, *(None if RULES[axis] == "data" else RULES[axis] for axis in axes))


def normalize(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


@jaxstate.parametrized
def attention(x):
    shape, axes = (WIDTH, HEADS, WIDTH // HEADS), ("embed", "heads", "head")
    q, k, v = (
        product("bse,ehd->bshd", x, weight(name, axes, *shape), "data", None, "model")
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    y = jnp.einsum("bhst,bthd->bshd", weights, v)
    out = weight("out", ("heads", "head", "embed"), HEADS, WIDTH // HEADS, WIDTH)
    return product("bshd,hde->bse", y, out, "data")


@jaxstate.parametrized
def mlp(x):
    up = weight("up", ("embed", "mlp"), WIDTH, HIDDEN)
    down = weight("down", ("mlp", "embed"), HIDDEN, WIDTH)
    x = jax.nn.gelu(product("bse,em->bsm", x, up, "data", None, "model"))
    return product("bsm,me->bse", x, down, "data")


def dropout(x):
    keep = cut(jaxstate.random.bernoulli(1 - DROPOUT, x.shape), "data")
    return jnp.where(keep, x / (1 - DROPOUT), 0)


@jaxstate.parametrized
def block(x):
    x = x + dropout(attention(normalize(x)))
    return x + dropout(mlp(normalize(x)))


blocks = jaxstate.stack(block, LAYERS, checkpoint=True, axis="layers")


@jaxstate.parametrized(name="transformer")
def net(tokens):
    """The logits of the next tokens, for each position."""
    letters = cut(jax.nn.one_hot(tokens, VOCABULARY), "data", None, "model")
    embedding = weight("embedding", ("vocabulary", "embed"), VOCABULARY, WIDTH)
    x = blocks(product("bsv,ve->bse", letters, embedding, "data"))
    head = weight("head", ("embed", "vocabulary"), WIDTH, VOCABULARY)
    return product("bse,ev->bsv", normalize(x), head, "data", None, "model")


# Shards: over which axis of the mesh each named axis is cut.

RULES = {
    "embed": "data", "heads": "model", "mlp": "model", "vocabulary": "model",
    "head": None, "layers": None,
}  # fmt: skip


def shardings(mesh, tokens):
    def of(m):
        return NamedSharding(mesh, P(*map(RULES.get, m["axes"])))

    return jax.tree.map(of, net.metadata(tokens))


# Training, with one step that is compiled for the mesh that is set.


def loss_of(logits, tokens):
    """Of predicting each token from those before."""
    letters = cut(jax.nn.one_hot(tokens[:, 1:], VOCABULARY), "data", None, "model")
    return -(jax.nn.log_softmax(logits[:, :-1]) * letters).sum(-1).mean()


def updated(params, velocity, gradients):
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradients)
    params = jax.tree.map(lambda p, v: p - LEARNING_RATE * v, params, velocity)
    return params, velocity


def step(params, velocity, key, tokens):
    def loss(params):
        return loss_of(net.apply(params, tokens, key=key), tokens)

    value, gradients = jax.value_and_grad(loss)(params)
    return *updated(params, velocity, gradients), value


def make_data(key):
    """Texts that count upwards from somewhere, in steps of one to three."""
    first, by = jax.random.randint(key, (2, BATCH, 1), 0, VOCABULARY)
    return (first + (by % 3 + 1) * jnp.arange(LENGTH)) % VOCABULARY


def start(mesh):
    """Parameters, velocity and tokens, each piece made where it is kept."""
    tokens = jax.device_put(make_data(jax.random.key(1)), NamedSharding(mesh, P("data")))
    params = jax.jit(net.init, out_shardings=shardings(mesh, tokens))(jax.random.key(0), tokens)
    return params, jax.tree.map(jnp.zeros_like, params), tokens


def train(mesh):
    with jax.set_mesh(mesh):
        params, velocity, tokens = start(mesh)
        run = jax.jit(step, donate_argnums=(0, 1))
        losses, compiled = [], None
        for i in range(STEPS):
            args = params, velocity, jax.random.key(i), tokens
            compiled = compiled or run.lower(*args).compile()
            params, velocity, value = compiled(*args)
            losses.append(float(value))
    return params, losses, compiled


# Report.


def collectives(compiled):
    """How often each collective operation stands in a compiled program."""
    names = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
    text = compiled.as_text()
    return {name: len(re.findall(rf"\b{name}(-start)?\(", text)) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explicit", action="store_true", help="a mesh with explicit axes")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)

    params, losses, compiled = train(
        make_mesh(AxisType.Explicit if options.explicit else AxisType.Auto)
    )
    print(jaxstate.summary(params))
    memory = compiled.memory_analysis()
    print(f"\nloss            {losses[0]:.3f}, after {STEPS} steps {losses[-1]:.3f}")
    print(f"collectives     {collectives(compiled)}")
    print(f"flops           {compiled.cost_analysis()['flops']:,.0f} on each device")
    print(f"arguments       {memory.argument_size_in_bytes:,} bytes on each device")
    print(f"temporaries     {memory.temp_size_in_bytes:,} bytes on each device")
    assert losses[-1] < losses[0] / 1.5


if __name__ == "__main__":
    main()
