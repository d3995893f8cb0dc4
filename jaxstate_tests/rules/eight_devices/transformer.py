"""The step of `examples/sharded_transformer.py` is compiled to the same program as that by hand.

By hand, the parameters are passed from function to function, the layers are scanned with the number
of draws in the carry, and the shardings are written out for each weight.
"""

import collections
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from jaxstate_tests.rules.eight_devices.common import P, close

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples/sharded_transformer.py"


def load_example():
    spec = importlib.util.spec_from_file_location("sharded_transformer", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()
cut, product = example.cut, example.product

SPECS = {
    "embedding": P("model", "data"),
    "stack": {
        "layers": {
            "attention": {
                **dict.fromkeys(("query", "key", "value"), P(None, "data", "model", None)),
                "out": P(None, "model", None, "data"),
            },
            "mlp": {"up": P(None, "data", "model"), "down": P(None, "model", "data")},
        }
    },
    "head": P("data", "model"),
}


def dropout(x, key, n):
    keep = cut(jax.random.bernoulli(jax.random.fold_in(key, n), 0.9, x.shape), "data")
    return jnp.where(keep, x / 0.9, 0)


def normalize(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def attention(p, x):
    def projected(w):
        return product("bse,ehd->bshd", x, cut(w, None, "model", None), "data", None, "model")

    q, k, v = projected(p["query"]), projected(p["key"]), projected(p["value"])
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / jnp.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    y = jnp.einsum("bhst,bthd->bshd", weights, v)
    return product("bshd,hde->bse", y, cut(p["out"], "model", None, None), "data")


def mlp(p, x):
    up, down = cut(p["up"], None, "model"), cut(p["down"], "model", None)
    return product(
        "bsm,me->bse",
        jax.nn.gelu(product("bse,em->bsm", x, up, "data", None, "model")),
        down,
        "data",
    )


def forward(params, tokens, key):
    @jax.checkpoint
    def layer(carry, p):
        x, n = carry
        x = x + dropout(attention(p["attention"], normalize(x)), key, n)
        x = x + dropout(mlp(p["mlp"], normalize(x)), key, n + 1)
        return (x, n + 2), None

    letters = cut(jax.nn.one_hot(tokens, example.VOCABULARY), "data", None, "model")
    embedding = cut(params["embedding"], "model", None)
    x = product("bsv,ve->bse", letters, embedding, "data")
    (x, _), _ = jax.lax.scan(layer, (x, jnp.int32(0)), params["stack"]["layers"])
    head = cut(params["head"], None, "model")
    return product("bse,ev->bsv", normalize(x), head, "data", None, "model")


def step(params, velocity, key, tokens):
    def loss(params):
        return example.loss_of(forward(params, tokens, key), tokens)

    value, gradients = jax.value_and_grad(loss)(params)
    return *example.updated(params, velocity, gradients), value


def compiled_with_results(step, args):
    compiled = jax.jit(step).lower(*args).compile()
    return compiled, compiled(*args)


def operations(compiled):
    """How often each operation stands in a program, with each type of result."""
    return collections.Counter(re.findall(r" = (\S+ [a-z-]+)\(", compiled.as_text()))


@pytest.mark.leaks_allowed("the leak checker forgets what is compiled")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_step_is_the_step_by_hand(axis_type):
    mesh = example.make_mesh(axis_type)
    with jax.set_mesh(mesh):
        params, velocity, tokens = example.start(mesh)
        for x, spec in zip(*map(jax.tree.leaves, (params, SPECS)), strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
        args = params, velocity, jax.random.key(2), tokens
        ours, results = compiled_with_results(example.step, args)
        theirs, wanted = compiled_with_results(step, args)
    close(results, wanted)

    found = example.collectives(ours)
    assert found == example.collectives(theirs) and found["all-gather"] and found["all-reduce"]
    assert operations(ours) == operations(theirs)
    assert ours.cost_analysis()["flops"] == theirs.cost_analysis()["flops"]
    memory, by_hand = ours.memory_analysis(), theirs.memory_analysis()
    assert memory.temp_size_in_bytes == by_hand.temp_size_in_bytes
    assert memory.argument_size_in_bytes == by_hand.argument_size_in_bytes
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    kept = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params)]
    assert sum(kept) == whole / 8
    small = tokens.addressable_shards[0].data.nbytes + 8
    assert memory.argument_size_in_bytes == 2 * whole / 8 + small


def test_no_device_makes_the_whole_model():
    mesh = example.make_mesh(AxisType.Auto)
    tokens = jax.ShapeDtypeStruct((example.BATCH, example.LENGTH), np.int32)
    with jax.set_mesh(mesh):
        shardings = example.shardings(mesh, tokens)
        make = jax.jit(example.net.init, out_shardings=shardings)
        memory = make.lower(jax.random.key(0), tokens).compile().memory_analysis()
    whole = 4 * 155_648
    assert memory.output_size_in_bytes < whole / 8 + 1000
    assert memory.temp_size_in_bytes < whole
