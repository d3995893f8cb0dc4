"""jaxstate."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxstate
from jaxstate.extend import StatefulTrace, new_slot, new_trace, read, write
from jaxstate_tests.features.table import built_in, few_lines

KEY, X = jax.random.key(0), jnp.ones((2, 3))
normal, ones = jax.nn.initializers.normal(), jax.nn.initializers.ones


def dense(features, **metadata):
    @jaxstate.parametrized
    def dense(x):
        return x @ jaxstate.param("w", normal, (x.shape[-1], features), metadata=metadata)

    return dense


def two_layers():
    first, second = dense(4), dense(2)
    return jaxstate.parametrized(lambda x: second(jnp.tanh(first(x))), name="net")


@built_in
def lazy_shapes():
    assert dense(4).init(KEY, X)["w"].shape == (3, 4)


@built_in
def sharing():
    layer = dense(3)
    net = jaxstate.parametrized(lambda x: layer(layer(x)), name="net")
    assert net.init(KEY, X).keys() == {"dense"}


@built_in
def named_streams():
    @jaxstate.parametrized
    def net():
        return jaxstate.param("w", normal, ()), jaxstate.next_key("a"), jaxstate.next_key("b")

    net.init(KEY)


@built_in
def optional_stream():
    def dropout(x):
        key = jaxstate.next_key("dropout", default=None)
        return x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)

    run = jax.jit(dropout)
    assert (run(X) == X).all()
    with jaxstate.rng_stream(KEY, "dropout"):
        assert (run(X) != X).any()


def outputs(next_fun, args, kwargs, context):
    return jaxstate.sow("out", next_fun(*args, **kwargs), mode="append")


@built_in
def interception():
    net = two_layers()
    params = net.init(KEY, X)
    with jaxstate.intercept(lambda f, args, kwargs, _: f(*args, **kwargs) * 0):
        assert (jax.jit(net.apply)(params, X) == 0).all()


@few_lines
def intermediates():
    net = two_layers()
    params = net.init(KEY, X)
    with jaxstate.intercept(outputs):
        y, found = jaxstate.reap(net.apply, nested=True)(params, X)
    assert (found["dense_1"]["out"] == y).all() and found["dense"]["out"].shape[-1] == 4


@built_in
def parameter_hooks():
    net = two_layers()
    params = net.init(KEY, X)
    with jaxstate.intercept(params=lambda f, args, kwargs, _: f(*args, **kwargs) * 0):
        assert (net.apply(params, X) == 0).all()


def marked(x):
    def turn(x, _):
        return jaxstate.sow("h", jnp.sin(x), mode="append"), None

    return lax.scan(turn, x, length=3)[0]


@built_in
def sown_in_loops():
    y, found = jax.jit(jaxstate.reap(marked))(1.0)
    assert found["h"].shape == (3,) and found["h"][-1] == y


@built_in
def planting():
    assert jaxstate.plant(marked)({"h": jnp.array([0.0, 0.0, 5.0])}, 1.0) == 5.0


@built_in
def by_intermediate():
    def f(h):
        return jaxstate.plant(lambda x: jaxstate.sow("h", x) ** 2)({"h": h}, 1.0)

    assert jax.grad(f)(3.0) == 6.0


@built_in
def axes():
    net = dense(4, axes=("embed", "mlp"))
    rules = {"mlp": "model"}
    found = jax.tree.map(lambda m: P(*map(rules.get, m["axes"])), net.metadata(X))
    assert found == {"w": P(None, "model")}


@built_in
def pieces():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", normal, (3, 4), metadata={"spec": P(None, "data")})
        return x @ lax.all_gather(w, "data", axis=1, tiled=True)

    specs = {"w": P(None, "data")}
    init = jax.shard_map(net.init, mesh=mesh, in_specs=(P(), P()), out_specs=specs)
    apply = jax.shard_map(net.apply, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    params = init(KEY, X)
    assert jnp.allclose(apply(params, X), X @ params["w"])


@built_in
def stacks():
    deep = jaxstate.stack(dense(3), 5)
    assert deep.init(KEY, X)["layers"]["w"].shape == (5, 3, 3)


@built_in
def ensembles():
    several = jaxstate.ensemble(dense(4), 5)
    params = several.init(KEY, X)
    assert several.apply(params, X).shape == (5, 2, 4)


@built_in
def loading():
    net = two_layers()
    params = net.init(KEY, X, reuse={"dense_1/w": jnp.ones((4, 2))})
    assert (params["dense_1"]["w"] == 1).all() and (params["dense"]["w"] != 1).all()


@built_in
def flat_names():
    params = two_layers().init(KEY, X)
    flat = jaxstate.flatten_names(params)
    assert flat.keys() == {"dense/w", "dense_1/w"}
    assert jaxstate.unflatten_names(flat).keys() == params.keys()


@built_in
def random_variables():
    @jaxstate.parametrized
    def net():
        return jaxstate.variable("u", normal, (3,), takes_key=True).value

    _, state = net.init_with_state(KEY)
    assert (state["u"] != 0).all()


@built_in
def collections():
    @jaxstate.parametrized
    def net():
        for name in ("a", "b"):
            v = jaxstate.variable(name, jnp.zeros, (), metadata={"collection": name})
            if jaxstate.is_writable(v):
                v.value += 1

    _, state = net.init_with_state(KEY)
    _, state = net.apply_with_state({}, state, mutable=["a"])
    assert state == {"a": 1, "b": 0}


@built_in
def merging():
    def lane(x):
        v = jaxstate.variable("v", lambda: (0.0, 0.0), reduce=(jnp.sum, jnp.max))
        v.value = (x, x)

    net = jaxstate.parametrized(lambda x: jax.vmap(lane)(x), name="net")
    x = jnp.array([1.0, 2.0, 3.0])
    _, state = net.init_with_state(KEY, x)
    assert net.apply_with_state({}, state, x)[1]["v"] == (6.0, 3.0)


@built_in
def names_in_hlo():
    net = two_layers()
    text = jax.jit(net.apply).lower(net.init(KEY, X), X).compile().as_text()
    assert "net/dense_1/dot_general" in text


@built_in
def summaries():
    assert "dense_1/w" in str(two_layers().summary(KEY, X))


@built_in
def in_place():
    @jax.jit
    @jaxstate.inplace
    def squares(n):
        x = jnp.zeros(5)

        def turn(i, c):
            x[i] = i * i
            return c

        lax.fori_loop(0, n, turn, 0)
        return x

    assert squares(3).tolist() == [0, 1, 4, 0, 0]


@built_in
def objects():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Counter:
        n: jax.Array

        def count(self):
            self.n += 1

    def f(counter):
        lax.fori_loop(0, 3, lambda i, c: (counter.count(), c)[1], 0)

    _, after = jax.jit(jaxstate.mutate(f))(Counter(jnp.int32(0)))
    assert after.n == 3


@built_in
def donation():
    buffer = new_slot(jnp.zeros(1_000_000))

    @jax.jit
    def record(i):
        write(buffer, read(buffer).at[i].set(1.0))

    record(0)
    where = read(buffer).unsafe_buffer_pointer()
    record(1)
    assert read(buffer).unsafe_buffer_pointer() == where


@built_in
def traces():
    class Count(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            self.state = self.state + 1
            return super().process_primitive(primitive, args, params)

    with new_trace(Count, state=jnp.int32(0)) as trace:
        jax.jit(lambda x: lax.fori_loop(0, 4, lambda i, x: jnp.sin(x), x))(1.0)
    assert trace.state >= 4


@built_in
def sampling():
    def f(x):
        before = jnp.pad(x, (1, 0))[:-1]
        weights = jax.nn.softmax(jnp.where(jnp.tri(5, dtype=bool), before * before[:, None], -1e9))
        return weights @ before + 1

    x = jaxstate.causal_fixed_point(f, jnp.zeros(5))
    assert jnp.allclose(f(x), x)


@few_lines
def inference():
    """By a program of another package, which knows nothing of the sites."""
    import blackjax

    def model():
        mean = jaxstate.sow("mean", 0.0)
        return -0.5 * mean**2 - 0.5 * (mean - 2.0) ** 2

    def logdensity(sites):
        return jaxstate.plant(model)(sites)

    _, start = jaxstate.reap(model)()
    kernel = blackjax.nuts(logdensity, step_size=0.5, inverse_mass_matrix=jnp.ones(1))
    state = kernel.init(start)
    state, _ = jax.jit(kernel.step)(KEY, state)
    assert jnp.isfinite(state.position["mean"])
