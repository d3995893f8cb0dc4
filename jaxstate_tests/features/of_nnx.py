"""Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxstate_tests.features.table import built_in, few_lines

KEY, X = jax.random.key(0), jnp.ones((2, 3))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def net():
    return Net(nnx.Rngs(0))


@built_in
def ready_layers():
    assert nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False)(jnp.ones((1, 2, 4))).size


@built_in
def sharing():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state({"first": layer, "second": layer}))) == 2


@built_in
def named_streams():
    rngs = nnx.Rngs(0, a=1)
    assert rngs.a() is not rngs.b()  # "b" is that of the default


@built_in
def optional_stream():
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.eval()
    assert (layer(X) == X).all()
    layer.train()
    assert (layer(X) != X).any()


@few_lines
def interception():
    def zeroed(module):
        return lambda x: module(x) * 0

    model = net()
    model.first, model.second = zeroed(model.first), zeroed(model.second)
    assert (model(X) == 0).all()


@built_in
def intermediates():
    run = nnx.capture(net(), nnx.Intermediate, method_outputs=nnx.Intermediate)
    y, found = run(X)
    assert any((x == y).all() for x in jax.tree.leaves(found["second"]))


@few_lines
def parameter_hooks():
    model = net()
    graph, params = nnx.split(model)
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert (nnx.merge(graph, zeros)(X) == 0).all()


class Turn(nnx.Module):
    def __call__(self, x):
        self.sow(nnx.Intermediate, "h", jnp.sin(x))
        return jnp.sin(x)


@few_lines
def sown_in_loops():
    @nnx.scan(in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0), length=3)
    def run(x, _):
        turn = Turn()
        y = turn(x)
        return y, nnx.state(turn, nnx.Intermediate)

    y, found = run(jnp.float32(1.0), None)
    assert jax.tree.leaves(found)[0].shape == (3,) and jax.tree.leaves(found)[0][-1] == y


@few_lines
def planting():
    model = net()
    model.second = lambda x: jnp.zeros((2, 2))
    assert (model(X) == 0).all()


@few_lines
def by_intermediate():
    def f(h):
        model = net()
        model.second = lambda x: h
        return model(X).sum()

    assert (jax.grad(f)(jnp.ones((2, 2))) == 1).all()


@built_in
def axes():
    init = nnx.with_metadata(nnx.initializers.normal(), sharding_names=(None, "model"))
    with nnx.use_eager_sharding(False):
        layer = nnx.eval_shape(lambda: nnx.Linear(3, 4, kernel_init=init, rngs=nnx.Rngs(0)))
    assert nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value() == P(None, "model")


@built_in
def pieces():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cuts = nnx.StateSharding({nnx.PathContains("kernel"): P(None, "data"), ...: P("data")})

    @nnx.shard_map(mesh=mesh, in_specs=(cuts, P("data")), out_specs=P("data"))
    def run(layer, x):
        return x @ jax.lax.all_gather(layer.kernel[...], "data", axis=1, tiled=True)

    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert jnp.allclose(run(layer, X), X @ layer.kernel[...])


@built_in
def stacks():
    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(3, 3, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    assert run(X, make(nnx.Rngs(0))).shape == X.shape


@built_in
def ensembles():
    @nnx.split_rngs(splits=5)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(3, 4, rngs=rngs)

    assert nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(make(nnx.Rngs(0)), X).shape == (
        5, 2, 4,
    )  # fmt: skip


@built_in
def loading():
    model = net()
    nnx.update(model, {"second": {"kernel": jnp.ones((4, 2))}})
    assert (model.second.kernel[...] == 1).all()


@built_in
def flat_names():
    flat = nnx.to_flat_state(nnx.state(net()))
    assert ("second", "kernel") in {path for path, _ in flat}
    assert nnx.from_flat_state(flat)["second"].keys() == {"kernel", "bias"}


@built_in
def random_variables():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.u = nnx.Variable(jax.random.normal(rngs(), (3,)))

    assert (Layer(nnx.Rngs(0)).u[...] != 0).all()


@few_lines
def collections():
    class A(nnx.Variable):
        pass

    class B(nnx.Variable):
        pass

    class Counts(nnx.Module):
        def __init__(self):
            self.a, self.b = A(jnp.float32(0)), B(jnp.float32(0))

        def __call__(self):
            self.a[...] += 1
            self.b[...] += 1

    model = Counts()
    before = nnx.state(model, B)
    before = jax.tree.map(jnp.copy, before)
    model()
    nnx.update(model, before)
    assert model.a[...] == 1 and model.b[...] == 0


@built_in
def names_in_hlo():
    graph, params = nnx.split(net())
    run = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    assert "Linear" in run.lower(params, X).compile().as_text()


@few_lines
def merging():
    class Statistics(nnx.Module):
        def __init__(self):
            self.sum = nnx.Variable(jnp.float32(0))

    model = Statistics()

    @nnx.vmap(in_axes=(None, 0), axis_name="lanes")
    def run(model, x):
        model.sum[...] = jax.lax.psum(x, "lanes")

    run(model, jnp.array([1.0, 2.0, 3.0]))
    assert model.sum[...] == 6.0


@built_in
def summaries():
    assert "second" in nnx.tabulate(net(), X)


@built_in
def objects():
    class Counter(nnx.Module):
        def __init__(self):
            self.n = nnx.Variable(jnp.int32(0))

        def count(self):
            self.n[...] += 1

    counter = Counter()

    @nnx.jit
    def f(counter):
        nnx.fori_loop(0, 3, lambda i, c: (c.count(), c)[1], counter)

    f(counter)
    assert counter.n[...] == 3


@built_in
def static_parts():
    model = net()
    model.name = "a text"
    assert nnx.jit(lambda model, x: model(x))(model, X).shape == (2, 2)


@built_in
def donation():
    model = net()

    @nnx.jit(donate_argnames="model")
    def step(model):
        nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.Param)))

    step(model)
    assert (model.second.bias[...] == 1).all()
