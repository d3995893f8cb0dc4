"""Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp

from jaxstate_tests.features.table import built_in, few_lines

KEY, X = jax.random.key(0), jnp.ones((2, 3))


def net_of(*sizes):
    return hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(sizes)(x)))


@built_in
def ready_layers():
    assert hk.transform(lambda x: hk.MultiHeadAttention(2, 3, w_init_scale=1.0)(x, x, x)).init(
        KEY, X
    )


@built_in
def lazy_shapes():
    assert net_of(4).init(KEY, X)["mlp/~/linear_0"]["w"].shape == (3, 4)


@built_in
def sharing():
    def net(x):
        layer = hk.Linear(3)
        return layer(layer(x))

    assert hk.transform(net).init(KEY, X).keys() == {"linear"}


@few_lines
def named_streams():
    def net():
        streams = {n: hk.PRNGSequence(jax.random.fold_in(hk.next_rng_key(), i))
                   for i, n in enumerate("ab")}  # fmt: skip
        return next(streams["a"]), next(streams["b"])

    hk.transform(net).apply({}, KEY)


@built_in
def optional_stream():
    def net(x):
        key = hk.maybe_next_rng_key()
        return x if key is None else x * jax.random.bernoulli(key, 0.5, x.shape)

    apply = jax.jit(hk.transform(net).apply)
    assert (apply({}, None, X) == X).all() and (apply({}, KEY, X) != X).any()


def on_calls(change):
    """An interceptor of what modules return, which leaves their constructors alone."""

    def interceptor(f, args, kwargs, context):
        y = f(*args, **kwargs)
        return y if context.method_name != "__call__" else change(context.module.module_name, y)

    return interceptor


@built_in
def interception():
    net = net_of(4, 2)
    params = net.init(KEY, X)
    with hk.intercept_methods(on_calls(lambda name, y: 0 * y)):
        assert (net.apply(params, X) == 0).all()


@few_lines
def intermediates():
    net, found = net_of(4, 2), {}

    def run(params, x):
        found.clear()
        with hk.intercept_methods(on_calls(lambda name, y: found.setdefault(name, y))):
            return net.apply(params, x), dict(found)

    y, outputs = jax.jit(run)(net.init(KEY, X), X)
    assert (outputs["mlp/~/linear_1"] == y).all()


@built_in
def parameter_hooks():
    def zero(f, value, context):
        return f(value) * 0

    def net(x):
        with hk.custom_getter(zero):
            return hk.Linear(4)(x)

    net = hk.transform(net)
    assert (net.apply(net.init(KEY, X), None, X) == 0).all()


@few_lines
def sown_in_loops():
    def net(x):
        def turn(x, _):
            hk.set_state("h", jnp.sin(x))
            return jnp.sin(x), hk.get_state("h")

        hk.set_state("h", x)
        x, h = hk.scan(turn, x, None, length=3)
        hk.set_state("all", h)
        return x

    y, state = hk.transform_with_state(net).apply({}, {}, None, jnp.float32(1.0))
    assert state["~"]["all"].shape == (3,) and state["~"]["all"][-1] == y


def of_last(change):
    return on_calls(lambda name, y: change(y) if name == "mlp/~/linear_1" else y)


@few_lines
def planting():
    net = net_of(4, 2)
    with hk.intercept_methods(of_last(jnp.zeros_like)):
        assert (net.apply(net.init(KEY, X), X) == 0).all()


@few_lines
def by_intermediate():
    net = net_of(4, 2)
    params = net.init(KEY, X)

    def run(h):
        with hk.intercept_methods(of_last(lambda y: h)):
            return net.apply(params, X).sum()

    assert (jax.grad(run)(jnp.ones((2, 2))) == 1).all()


@built_in
def stacks():
    net = hk.transform(lambda x: hk.layer_stack(5)(lambda x: hk.Linear(3)(x))(x))
    [layer] = net.init(KEY, X).values()
    assert layer["w"].shape == (5, 3, 3)


@few_lines
def ensembles():
    net = net_of(4)
    params = jax.vmap(net.init, (0, None))(jax.random.split(KEY, 5), X)
    assert jax.vmap(net.apply, (0, None))(params, X).shape == (5, 2, 4)


@few_lines
def loading():
    net = net_of(4, 2)
    made = net.init(KEY, X)
    given = {"mlp/~/linear_1": {"w": jnp.ones((4, 2))}}
    params = hk.data_structures.merge(made, given)
    assert (params["mlp/~/linear_1"]["w"] == 1).all() and params.keys() == made.keys()


@few_lines
def flat_names():
    params = net_of(4).init(KEY, X)
    flat = {f"{m}/{n}": w for m, n, w in hk.data_structures.traverse(params)}
    back = {}
    for name, w in flat.items():
        module, _, n = name.rpartition("/")
        back.setdefault(module, {})[n] = w
    assert back.keys() == params.keys()


@built_in
def random_variables():
    def net():
        return hk.get_state("u", (3,), init=hk.initializers.RandomNormal())

    _, state = hk.transform_with_state(net).init(KEY)
    assert (jax.tree.leaves(state)[0] != 0).all()


@few_lines
def merging():
    def lane(x):
        hk.set_state("sum", jax.lax.psum(x, "lanes"))

    def net(x):
        hk.set_state("sum", jnp.float32(0))
        hk.vmap(lane, axis_name="lanes", split_rng=False)(x)

    x = jnp.array([1.0, 2.0, 3.0])
    _, state = hk.transform_with_state(net).apply({}, {}, None, x)
    assert state["~"]["sum"] == 6.0


@built_in
def names_in_hlo():
    net = net_of(4, 2)
    params = net.init(KEY, X)
    assert "linear_1" in jax.jit(net.apply).lower(params, X).compile().as_text()


@built_in
def summaries():
    assert "linear_0" in hk.experimental.tabulate(net_of(4))(X)
