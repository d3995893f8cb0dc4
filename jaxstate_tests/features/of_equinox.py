"""Equinox: models are trees, and hide no state."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxstate_tests.features.table import built_in, few_lines

KEY, X = jax.random.key(0), jnp.ones((2, 3))


def net(key=KEY):
    return eqx.nn.MLP(3, 2, 4, 1, key=key)


@built_in
def ready_layers():
    assert eqx.nn.MultiheadAttention(2, 4, key=KEY)(*[jnp.ones((3, 4))] * 3).shape == (3, 4)


@built_in
def sharing():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            embedding = eqx.nn.Embedding(5, 3, key=KEY)
            head = eqx.nn.Linear(3, 5, use_bias=False, key=KEY)
            self.shared = eqx.nn.Shared(
                (embedding, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight
            )

    assert len(jax.tree.leaves(eqx.filter(Tied(), eqx.is_array))) == 1


@few_lines
def named_streams():
    keys = dict(zip("ab", jax.random.split(KEY), strict=True))
    assert keys["a"] is not keys["b"]


@built_in
def optional_stream():
    layer = eqx.nn.Dropout(0.5)
    assert (layer(X, key=KEY) != X).any()
    assert (eqx.nn.inference_mode(layer)(X) == X).all()


@few_lines
def interception():
    class Zero(eqx.Module):
        of: eqx.Module

        def __call__(self, x, key=None):
            return self.of(x) * 0

    wrapped = eqx.tree_at(lambda m: m.layers, net(), replace_fn=lambda m: tuple(map(Zero, m)))
    assert (wrapped(X[0]) == 0).all()


@few_lines
def intermediates():
    class Noted(eqx.Module):
        of: eqx.Module
        notes: list = eqx.field(static=True)

        def __call__(self, x, key=None):
            self.notes.append(self.of(x))
            return self.notes[-1]

    def run(model, x):
        notes = []
        noted = tuple(Noted(layer, notes) for layer in model.layers)
        return eqx.tree_at(lambda m: m.layers, model, noted)(x), notes

    y, notes = eqx.filter_jit(run)(net(), X[0])
    assert len(notes) == 2 and (notes[1] == y).all()


@few_lines
def parameter_hooks():
    zeros = eqx.tree_at(lambda m: m.layers[1].weight, net(), replace_fn=jnp.zeros_like)
    assert (zeros(X[0]) == zeros.layers[1].bias).all()


@few_lines
def planting():
    model = eqx.tree_at(lambda m: m.layers[1], net(), lambda x, key=None: jnp.zeros(2))
    assert (model(X[0]) == 0).all()


@few_lines
def by_intermediate():
    def f(h):
        return eqx.tree_at(lambda m: m.layers[1], net(), lambda x, key=None: h)(X[0]).sum()

    assert (jax.grad(f)(jnp.ones(2)) == 1).all()


@few_lines
def pieces():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = eqx.nn.Linear(3, 4, use_bias=False, key=KEY)

    def run(layer, x):
        weight = lax.all_gather(layer.weight, "data", tiled=True)
        return x @ weight.T

    apply = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
    assert jnp.allclose(apply(layer, X), jax.vmap(layer)(X))


@few_lines
def stacks():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(jax.random.split(KEY, 5))
    arrays, static = eqx.partition(layers, eqx.is_array)
    y, _ = lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), X[0], arrays)
    assert y.shape == (3,)


@built_in
def ensembles():
    members = eqx.filter_vmap(net)(jax.random.split(KEY, 5))
    run = eqx.filter_vmap(lambda model, x: model(x), in_axes=(eqx.if_array(0), None))
    assert run(members, X[0]).shape == (5, 2)


@few_lines
def loading():
    model = eqx.tree_at(lambda m: m.layers[1].weight, net(), jnp.ones((2, 4)))
    assert (model.layers[1].weight == 1).all()


@few_lines
def flat_names():
    arrays, static = eqx.partition(net(), eqx.is_array)
    leaves, tree = jax.tree.flatten_with_path(arrays)
    flat = {jax.tree_util.keystr(path): x for path, x in leaves}
    assert ".layers[1].weight" in flat
    assert eqx.combine(jax.tree.unflatten(tree, flat.values()), static)(X[0]).shape == (2,)


@few_lines
def random_variables():
    class Layer(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self, key):
            self.index = eqx.nn.StateIndex(jax.random.normal(key, (3,)))

    layer, state = eqx.nn.make_with_state(Layer)(KEY)
    assert (state.get(layer.index) != 0).all()


@built_in
def names_in_hlo():
    """Of the layers that come with it."""
    arrays, static = eqx.partition(net(), eqx.is_array)
    run = jax.jit(lambda arrays, x: eqx.combine(arrays, static)(x))
    assert "eqx.nn.MLP" in run.lower(arrays, X[0]).compile().as_text()


@few_lines
def merging():
    class Lane(eqx.Module):
        index: eqx.nn.StateIndex

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.float32(0))

        def __call__(self, x, state):
            return state.set(self.index, lax.psum(x, "lanes"))

    lane, state = eqx.nn.make_with_state(Lane)()
    run = jax.vmap(lane, in_axes=(0, None), out_axes=None, axis_name="lanes")
    assert run(jnp.array([1.0, 2.0, 3.0]), state).get(lane.index) == 6.0


@built_in
def summaries():
    assert "weight" in eqx.tree_pformat(net())


@built_in
def static_parts():
    model = net()
    assert callable(model.activation)
    assert eqx.filter_jit(lambda model, x: model(x))(model, X[0]).shape == (2,)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)


@built_in
def donation():
    step = eqx.filter_jit(lambda x: x + 1, donate="all")
    x = jnp.zeros(1000)
    where = x.unsafe_buffer_pointer()
    assert step(x).unsafe_buffer_pointer() == where
