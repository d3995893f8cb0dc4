"""Flax linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from jaxstate_tests.features.table import built_in, few_lines

KEY, X = jax.random.key(0), jnp.ones((2, 3))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4)(x))
        return nn.Dense(2)(x)


net = Net()


@built_in
def ready_layers():
    assert nn.MultiHeadDotProductAttention(num_heads=3).init(KEY, X[None])


@built_in
def lazy_shapes():
    assert nn.Dense(4).init(KEY, X)["params"]["kernel"].shape == (3, 4)


@built_in
def sharing():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3)
            return layer(layer(x))

    assert Twice().init(KEY, X)["params"].keys() == {"Dense_0"}


@built_in
def named_streams():
    class Draws(nn.Module):
        def __call__(self):
            return self.make_rng("a"), self.make_rng("b")

    Draws().init(KEY)  # a stream that is not given is that of the parameters


@built_in
def optional_stream():
    class Dropout(nn.Module):
        def __call__(self, x):
            if not self.has_rng("dropout"):
                return x
            return x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)

    assert (Dropout().apply({}, X) == X).all()
    assert (Dropout().apply({}, X, rngs={"dropout": KEY}) != X).any()


@built_in
def interception():
    variables = net.init(KEY, X)
    with nn.intercept_methods(lambda f, args, kwargs, _: f(*args, **kwargs) * 0):
        assert (net.apply(variables, X) == 0).all()


@built_in
def intermediates():
    y, state = net.apply(net.init(KEY, X), X, capture_intermediates=True)
    assert (state["intermediates"]["Dense_1"]["__call__"][0] == y).all()


@built_in
def parameter_hooks():
    class Zeros(nn.Module):
        @nn.compact
        def __call__(self, x):
            def zero(variables):
                return jax.tree.map(jnp.zeros_like, variables)

            return nn.map_variables(nn.Dense, "params", zero, init=True)(4)(x)

    variables = Zeros().init(KEY, X)
    assert (Zeros().apply(variables, X) == 0).all()


class Turn(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        self.sow("intermediates", "h", jnp.sin(x))
        return jnp.sin(x), None


@built_in
def sown_in_loops():
    deep = nn.scan(Turn, variable_axes={"intermediates": 0}, length=3)()
    (y, _), state = deep.apply({}, jnp.float32(1.0), None, mutable=["intermediates"])
    assert state["intermediates"]["h"][0].shape == (3,) and state["intermediates"]["h"][0][-1] == y


@few_lines
def planting():
    def replace(f, args, kwargs, context):
        y = f(*args, **kwargs)
        return jnp.zeros_like(y) if context.module.name == "Dense_1" else y

    variables = net.init(KEY, X)
    with nn.intercept_methods(replace):
        assert (net.apply(variables, X) == 0).all()


@built_in
def by_intermediate():
    class Perturbed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.perturb("h", x) ** 2

    variables = Perturbed().init(KEY, 3.0)
    slope = jax.grad(lambda v: Perturbed().apply(v, 3.0))(variables)
    assert slope["perturbations"]["h"] == 6.0


@built_in
def axes():
    init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    variables = jax.eval_shape(nn.Dense(4, kernel_init=init).init, KEY, X)
    specs = nn.logical_to_mesh(nn.get_partition_spec(variables), (("embed", None), ("mlp", "m")))
    assert specs["params"]["kernel"] == P(None, "m")


@built_in
def stacks():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3)(x), None

    deep = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)()
    assert deep.init(KEY, X, None)["params"]["Dense_0"]["kernel"].shape == (5, 3, 3)


@built_in
def ensembles():
    several = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
        in_axes=None, axis_size=5,
    )(4)  # fmt: skip
    assert several.apply(several.init(KEY, X), X).shape == (5, 2, 4)


@few_lines
def loading():
    flat = flatten_dict(net.init(KEY, X), sep="/")
    assert "params/Dense_1/kernel" in flat
    variables = unflatten_dict({**flat, "params/Dense_1/kernel": jnp.ones((4, 2))}, sep="/")
    assert (variables["params"]["Dense_1"]["kernel"] == 1).all()


@built_in
def flat_names():
    variables = net.init(KEY, X)
    flat = flatten_dict(variables, sep="/")
    assert jax.tree.structure(unflatten_dict(flat, sep="/")) == jax.tree.structure(variables)


@built_in
def random_variables():
    class State(nn.Module):
        @nn.compact
        def __call__(self):
            init = lambda: jax.random.normal(self.make_rng("params"), (3,))  # noqa: E731
            return self.variable("state", "u", init).value

    assert (State().init(KEY)["state"]["u"] != 0).all()


@built_in
def collections():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self):
            for name in ("a", "b"):
                v = self.variable(name, "n", lambda: jnp.float32(0))
                if self.is_mutable_collection(name):
                    v.value += 1

    state = jax.tree.map(jnp.zeros_like, Counts().init(KEY))
    _, changed = Counts().apply(state, mutable=["a"])
    assert changed == {"a": {"n": 1}}


@few_lines
def merging():
    class Lane(nn.Module):
        @nn.compact
        def __call__(self, x):
            v = self.variable("state", "sum", lambda: jnp.float32(0))
            v.value = jax.lax.psum(x, "lanes")

    lanes = nn.vmap(Lane, variable_axes={"state": None}, in_axes=0, axis_name="lanes")()
    x = jnp.array([1.0, 2.0, 3.0])
    assert lanes.apply(lanes.init(KEY, x), x, mutable=["state"])[1]["state"]["sum"] == 6.0


@built_in
def names_in_hlo():
    text = jax.jit(net.apply).lower(net.init(KEY, X), X).compile().as_text()
    assert "Net/Dense_1" in text


@built_in
def summaries():
    assert "Dense_1" in nn.tabulate(net, KEY)(X)
