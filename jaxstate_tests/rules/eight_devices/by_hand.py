"""The training of `examples/sharded.py` on one device, written without jaxstate."""

import importlib.util
import pathlib
from functools import partial

import jax
import jax.numpy as jnp

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples/sharded.py"


def load_example():
    spec = importlib.util.spec_from_file_location("sharded", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense(p, x):
    return x @ p["weights"] + p["bias"]


@partial(jax.checkpoint, static_argnums=2)
def block(p, x, rate, key):
    y = jax.nn.gelu(dense(p["widen"], x))
    y = jnp.where(jax.random.bernoulli(key, 1 - rate, y.shape), y / (1 - rate), 0)
    return x + dense(p["narrow"], y)


def train(example, params, state, steps):
    """What `example.train` returns, from the parameters and the state it starts with."""
    momentum = example.MOMENTUM

    def loss(params, state, keys):
        x = jax.random.normal(keys[0], (example.BATCH, example.INPUTS))
        y = dense(params["embed"], x)
        for i in range(example.DEPTH):
            y = block(params[f"block_{i}" if i else "block"], y, example.DROPOUT, keys[1 + i])
        mean, variance = y.mean(0), y.var(0)
        old = state["normalize"]
        state = {
            "normalize": {
                "mean": momentum * old["mean"] + (1 - momentum) * mean,
                "variance": momentum * old["variance"] + (1 - momentum) * variance,
            }
        }
        y = dense(params["head"], (y - mean) / jnp.sqrt(variance + 1e-3))[:, 0]
        return jnp.mean((y - jnp.sin(x.sum(1))) ** 2), state

    @jax.jit
    def step(params, state, keys):
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, state, keys)
        params = jax.tree.map(lambda p, g: p - example.LEARNING_RATE * g, params, gradients)
        return params, state, value

    losses, draws = [], 1 + example.DEPTH
    for n in range(steps):
        keys = [jax.random.fold_in(jax.random.key(1), n * draws + i) for i in range(draws)]
        params, state, value = step(params, state, keys)
        losses.append(float(value))
    return params, state, losses
