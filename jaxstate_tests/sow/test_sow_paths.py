"""What is sown in modules and scopes, by path: it equals what the program returns by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate import plant, reap, scope, sow

KEY = jax.random.key(0)
X = jnp.array([0.3, -0.7, 1.1])
uniform = jax.nn.initializers.uniform(2.0)


def layer(mode="append", name="layer"):
    """A new layer, which sows what is in it under a name that all have."""

    @jaxstate.parametrized(name=name)
    def layer(x):
        return jnp.tanh(sow("h", x * jaxstate.param("w", uniform, ()), mode=mode))

    return layer


def by_hand(x, w, h=None):
    h = x * w if h is None else h
    return jnp.tanh(h), h


def scanned(f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, length=2)[0]


def scanned_by_hand(f):
    return lambda x, w, h: lax.scan(
        lambda x, h: f(x, w, h), x, h, length=None if h is not None else 2
    )


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), 3 * tangents[0]))
    return g


INSIDE = {
    "plain": (lambda f: f, lambda f: f),
    "jit": (jax.jit, lambda f: f),
    "checkpoint": (jax.checkpoint, lambda f: f),
    "scan": (scanned, scanned_by_hand),
    "jit in a scan": (lambda f: scanned(jax.jit(f)), scanned_by_hand),
    "vmap": (jax.vmap, lambda f: f),
    "custom_jvp": (custom_jvp, lambda f: f),
}


def same_tree(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert not isinstance(a, jax.core.Tracer)
        assert jnp.shape(a) == jnp.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-6)


OUTSIDE = {
    "call": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x])),
}


@pytest.mark.parametrize(
    "inside, outside",
    [
        pytest.param(i, o, marks=() if o == "jit" or i == "scan" else pytest.mark.slow)
        for i in INSIDE
        for o in OUTSIDE
    ],
)
def test_layers_of_one_function_sow_and_are_planted_each_in_its_place(inside, outside):
    wrap, wrap_by_hand = INSIDE[inside]
    first, second = layer(), layer()

    @jaxstate.parametrized
    def net(x):
        with scope("encoder"):
            x = wrap(first)(x)
        return wrap(second)(sow("h", x + 1))

    def run_by_hand(params, x, sown=None):
        f = wrap_by_hand(by_hand)
        planted = sown or {"encoder": {"layer": {"h": None}}, "h": None, "layer": {"h": None}}
        w = params["encoder"]["layer"]["w"]
        x, h1 = f(x, w, planted["encoder"]["layer"]["h"])
        h = x + 1 if planted["h"] is None else planted["h"]
        y, h2 = f(h, params["layer"]["w"], planted["layer"]["h"])
        return y, {"encoder": {"layer": {"h": h1}}, "h": h, "layer": {"h": h2}}

    params = net.init(KEY, X)
    out, sown = OUTSIDE[outside](reap(net.apply, nested=True))(params, X)
    same_tree((out, sown), OUTSIDE[outside](run_by_hand)(params, X))

    planted = {"layer": jax.tree.map(lambda x: x + 1, run_by_hand(params, X)[1]["layer"])}
    out = OUTSIDE[outside](lambda p, x: plant(net.apply, nested=True)(planted, p, x))(params, X)

    def planted_by_hand(params, x):
        given = {"encoder": {"layer": {"h": None}}, "h": None, **planted}
        return run_by_hand(params, x, given)[0]

    same_tree(out, OUTSIDE[outside](planted_by_hand)(params, X))


def test_gradients_with_respect_to_what_is_planted_in_one_of_two_modules():
    first, second = layer("strict"), layer("strict")
    net = jaxstate.parametrized(lambda x: second(first(x)).sum(), name="net")
    params = net.init(KEY, X)
    out, sown = reap(jax.jit(net.apply), nested=True)(params, X)
    w = params["layer_1"]["w"]
    found = jax.grad(lambda sown: plant(jax.jit(net.apply), nested=True)(sown, params, X))(
        {"layer": sown["layer"]}
    )
    by_hand = jax.grad(lambda h: jnp.tanh(jnp.tanh(h) * w).sum())(sown["layer"]["h"])
    same_tree(found, {"layer": {"h": by_hand}})
    assert plant(net.apply, nested=True)(sown, params, X) == out


def test_a_stack_has_the_paths_and_axes_of_its_parameters():
    deep = jaxstate.stack(jaxstate.parametrized(lambda x: x + layer()(x), name="block"), 3)
    net = jaxstate.parametrized(lambda x: deep(x).sum(), name="net")
    params = net.init(KEY, X)
    _, sown = reap(jax.jit(net.apply), nested=True)(params, X)

    def step(x, w):
        return x + jnp.tanh(x * w), x * w

    w = params["stack"]["layers"]["layer"]["w"]
    same_tree(sown, {"stack": {"layers": {"layer": {"h": lax.scan(step, X, w)[1]}}}})
    _, of_grad = reap(jax.grad(net.apply), nested=True)(params, X)
    same_tree(of_grad, sown)


def test_all_outputs_of_all_modules_in_two_lines():
    first, second = layer(), layer()
    relu = jaxstate.parametrized(jax.nn.relu, name="relu")

    @jaxstate.parametrized
    def net(x):
        with scope("encoder"):
            x = relu(first(x))
        return relu(jnp.concatenate([second(x), x]))

    params = net.init(KEY, X)

    def keep(f, args, kwargs, context):
        return sow("out", f(*args, **kwargs), tag="outputs")

    with jaxstate.intercept(keep):
        out, outputs = reap(jax.jit(net.apply), "outputs", nested=True)(params, X)
    h1 = jnp.tanh(X * params["encoder"]["layer"]["w"])
    x = jax.nn.relu(h1)
    h2 = jnp.tanh(x * params["layer"]["w"])
    y = jax.nn.relu(jnp.concatenate([h2, x]))
    wanted = {
        "encoder": {"layer": {"out": h1}, "relu": {"out": x}},
        "layer": {"out": h2},
        "out": y,
        "relu": {"out": y},
    }
    same_tree(outputs, wanted)
    same_tree(out, y)


def test_scopes_are_levels_outside_of_apply_too():
    shared = jax.jit(lambda x: sow("h", 2 * x))

    def f(x):
        for name in "ab":
            with scope(name):
                x = shared(x)
        with scope("a"), scope("c"):
            return shared(x)

    with scope("around"):  # paths are relative to where reap is called
        out, sown = reap(f, nested=True)(1.0)
    assert sown == {"a": {"h": 2, "c": {"h": 8}}, "b": {"h": 4}} and out == 8
    assert plant(f, nested=True)({"b": {"h": 5.0}}, 1.0) == 10
    assert plant(jax.jit(f), nested=True)({"b": {"c": {"h": 5.0}}, "h": 3.0}, 1.0) == 8
    with pytest.raises(jaxstate.RepeatedSowError):
        reap(f)(1.0)


@pytest.mark.parametrize(
    "chosen, wanted",
    [
        (dict(allow=["k"]), {"k": 2, "enc": {"part": {"k": 4}}}),
        (dict(allow=["enc"]), {"enc": {"h": 3, "part": {"k": 4}}}),
        (dict(allow=["enc/h", ("k",)]), {"k": 2, "enc": {"h": 3, "part": {"k": 4}}}),
        (dict(allow=[("enc", "part")]), {"enc": {"part": {"k": 4}}}),
        (dict(block=["enc"]), {"h": 1, "k": 2}),
        (dict(block=["h"]), {"k": 2, "enc": {"part": {"k": 4}}}),
        (dict(allow=["k"], block=["enc/part"]), {"k": 2}),
        (dict(allow=[]), {}),
        (dict(block=[]), {"h": 1, "k": 2, "enc": {"h": 3, "part": {"k": 4}}}),
    ],
)
def test_what_is_wanted_is_said_by_names_and_paths(chosen, wanted):
    one_more = jax.jit(lambda x: sow("k", sow("h", x + 1) + 1))

    def f(x):
        x = one_more(x)
        with scope("enc"):
            x = sow("h", x + 1)
            with scope("part"):
                return sow("k", x + 1)

    assert reap(f, nested=True, **chosen)(0.0)[1] == wanted
    flat = jax.tree.leaves(wanted)
    if len(flat) == len({k for k in ("h", "k") if k in str(wanted)}):
        assert sorted(reap(f, **chosen)(0.0)[1].values()) == sorted(flat)
    # What is planted is what is wanted.
    values = {"h": 10.0, "k": 20.0, "enc": {"h": 30.0, "part": {"k": 40.0}}}
    planted = reap(lambda x: plant(f, nested=True, **chosen)(values, x), nested=True)(0.0)[1]
    for path in (("h",), ("k",), ("enc", "h"), ("enc", "part", "k")):
        found, given, is_wanted = planted, values, wanted
        for name in path:
            found, given, is_wanted = found[name], given[name], (is_wanted or {}).get(name)
        assert (found == given) == (is_wanted is not None)


def test_the_reap_around_gets_what_the_inner_one_does_not_want():
    @jax.jit
    def f(x):
        with scope("a"):
            x = sow("h", x + 1)
        with scope("b"):
            return sow("h", 2 * x)

    inner = reap(f, nested=True, allow=["b"])
    (out, sown), rest = reap(inner, nested=True)(0.0)
    assert (out, sown, rest) == (2, {"b": {"h": 2}}, {"a": {"h": 1}})
    (out, sown), rest = reap(reap(f, block=["a"]), block=["b"])(0.0)
    assert (out, sown, rest) == (2, {"h": 2}, {"h": 1})
    # and so it is with plant
    again = plant(plant(f, nested=True), nested=True)
    assert again({"a": {"h": 5.0}}, {"b": {"h": 7.0}}, 0.0) == 7
    assert again({"a": {"h": 5.0}, "b": {"h": 1.0}}, {"b": {"h": 7.0}}, 0.0) == 7
    assert again({"a": {"h": 5.0}}, {}, 0.0) == 10


def test_a_module_that_is_called_twice_sows_twice_in_one_place():
    one = layer("strict")
    net = jaxstate.parametrized(lambda x: one(one(x)), name="net")
    params = net.init(KEY, X)
    with pytest.raises(jaxstate.RepeatedSowError, match="'layer/h' was sown twice"):
        reap(net.apply, nested=True)(params, X)
    many = layer("append")
    net = jaxstate.parametrized(lambda x: many(many(x)), name="net")
    _, sown = reap(net.apply, nested=True)(params, X)
    w = params["layer"]["w"]
    same_tree(sown, {"layer": {"h": jnp.stack([X * w, jnp.tanh(X * w) * w])}})


def test_errors_say_the_path():
    def in_scope(x):
        with scope("a"):
            return sow("h", x)

    def f(x):
        sow("a", x)
        with scope("a"):
            return sow("h", x)

    with pytest.raises(jaxstate.NameClashError, match="'a' is a value that is sown, and a module"):
        reap(f, nested=True)(1.0)
    with pytest.raises(jaxstate.PlantMismatchError, match="planted as 'a/h' is"):
        plant(in_scope, nested=True)({"a": {"h": jnp.ones(2)}}, 1.0)
    with pytest.raises(TypeError, match="plant wants a dict"):
        plant(f, nested=True)([1.0], 1.0)
    for make in (reap, plant):
        for wrong in ("h", [3], 3):
            for argument in ("allow", "block"):
                with pytest.raises(
                    TypeError, match=f"wants a list of names and paths as {argument}"
                ):
                    make(f, **{argument: wrong})


def test_values_that_are_dicts_are_values():
    def f(x):
        with scope("a"):
            return sow("h", {"p": x, "q": {"r": 2 * x}})

    _, sown = reap(f, nested=True)(1.0)
    assert sown == {"a": {"h": {"p": 1, "q": {"r": 2}}}}
    assert plant(f, nested=True)({"a": {"h": {"p": 5.0, "q": {"r": 6.0}}}}, 1.0) == {
        "p": 5, "q": {"r": 6},
    }  # fmt: skip


def custom_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (g(x), x), lambda x, ct: (3 * ct,))
    return g


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
@pytest.mark.parametrize("custom", [custom_jvp, custom_vjp])
def test_derivative_rules_that_run_later_sow_where_their_function_is_called(custom, wrap):
    parts = [custom(lambda x: jnp.tanh(sow("h", 2 * x))) for _ in range(2)]
    layers = [jaxstate.parametrized(part, name="layer") for part in parts]
    net = jaxstate.parametrized(lambda x: layers[1](layers[0](x)).sum(), name="net")
    grads, sown = reap(jax.grad(lambda x: wrap(net.apply)({}, x)), nested=True)(X)
    h = jnp.tanh(2 * X)
    same_tree(sown, {"layer": {"h": 2 * X}, "layer_1": {"h": 2 * h}})
    np.testing.assert_allclose(grads, jnp.full(3, 9.0))
