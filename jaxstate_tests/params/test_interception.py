"""Interception equals the program in which the interceptor's work is written by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate._src.params.paths import Entered, program

KEY = jax.random.key(0)
X = jnp.array([0.3, -0.7, 1.1])
uniform = jax.nn.initializers.uniform(2.0)


def scaling(name="layer"):
    """A new layer."""

    @jaxstate.parametrized(name=name)
    def layer(x):
        return jnp.tanh(x * jaxstate.param("w", uniform, ()))

    return layer


def doubled(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    return 2 * y if context.name == "layer" else y


def gained(next_fun, args, kwargs, context):
    """Gives every layer a parameter."""
    y = next_fun(*args, **kwargs)
    return y * jaxstate.param("gain", uniform, ()) if context.name == "layer" else y


def while_loop(f):
    return lambda x: lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1])), (0, x))[1]


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), 3 * tangents[0]))
    return g


no_reverse = "JAX has no reverse mode through a while loop"
no_rule = "a custom rule says nothing about derivatives with respect to parameters"

# Where the layer is called, and why there are no gradients, if there are none.
INSIDE = {
    "plain": (lambda f: f, None),
    "jit": (jax.jit, None),
    "checkpoint": (jax.checkpoint, None),
    "scan": (lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, length=3)[0], None),
    "while": (while_loop, no_reverse),
    "cond": (lambda f: lambda x: lax.cond(x.sum() > 0, f, jnp.sin, x), None),
    "vmap": (jax.vmap, None),
    "grad": (lambda f: jax.grad(lambda x: f(x).sum()), None),
    "custom_jvp": (custom_jvp, no_rule),
    "jit of a scan": (
        lambda f: jax.jit(lambda x: lax.scan(lambda c, _: (jax.jit(f)(c), None), x, length=2)[0]),
        None,
    ),
}
OUTSIDE = {
    "apply": lambda run: run,
    "jit": jax.jit,
    "grad": lambda run: jax.grad(lambda p, x: run(p, x).sum()),
    "vmap": lambda run: lambda p, x: jax.vmap(run, (None, 0))(p, jnp.stack([x, 2 * x])),
}


def quickly(inside, outside):
    return outside == "jit" or (inside, outside) in {("scan", "grad"), ("cond", "vmap")}


@pytest.mark.parametrize(
    "inside, outside",
    [
        pytest.param(i, o, marks=() if quickly(i, o) else pytest.mark.slow)
        for i in INSIDE
        for o in OUTSIDE
    ],
)
def test_interceptors_equal_the_program_by_hand(inside, outside):
    wrap, no_gradient = INSIDE[inside]
    if outside == "grad" and no_gradient:
        pytest.skip(no_gradient)
    layer = scaling()
    net = jaxstate.parametrized(lambda x: wrap(layer)(x) + 1, name="net")

    def by_hand(params, x):
        p = params["layer"]
        return wrap(lambda x: 2 * (jnp.tanh(x * p["w"]) * p["gain"]))(x) + 1

    with jaxstate.intercept(doubled), jaxstate.intercept(gained):
        params = net.init(KEY, X)
        found = OUTSIDE[outside](net.apply)(params, X)
    assert params["layer"].keys() == {"w", "gain"}
    # (A custom rule keeps what it closes over.)
    wanted = jax.checking_leaks.func(False)(OUTSIDE[outside](by_hand))(params, X)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_compiled_functions_are_those_of_the_interceptor_that_is_open():
    layer = scaling()
    net = jaxstate.parametrized(lambda x: jax.jit(layer)(x), name="net")
    params = net.init(KEY, X)
    plain = jnp.tanh(X * params["layer"]["w"])
    for run in (net.apply, jax.jit(net.apply)):
        for _ in range(2):
            np.testing.assert_allclose(run(params, X), plain, rtol=1e-6)
            for factor, interceptors in ((2, [doubled]), (4, [doubled, doubled])):
                with jaxstate.intercept(interceptors[0]):
                    if len(interceptors) == 2:
                        with jaxstate.intercept(interceptors[1]):
                            y = run(params, X)
                    else:
                        y = run(params, X)
                np.testing.assert_allclose(y, factor * plain, rtol=1e-6)


@pytest.mark.leaks_allowed("the checker keeps no traces, and here they are counted")
def test_one_interceptor_is_traced_once():
    layer, calls = scaling(), []

    class Counter:
        def hook(self, next_fun, args, kwargs, context):
            calls.append(context.path)
            return next_fun(*args, **kwargs)

    counter = Counter()
    net = jaxstate.parametrized(lambda x: layer(layer(x)), name="net")
    params = net.init(KEY, X)
    run = jax.jit(net.apply)
    for _ in range(3):
        with jaxstate.intercept(counter.hook):
            run(params, X)
    assert calls == [(), ("layer",), ("layer",)]


def test_the_context_says_what_is_called_in_every_scope_of_a_shared_function():
    seen = []

    def look(next_fun, args, kwargs, context):
        assert context.kind != "module" or context.path == jaxstate.path()
        seen.append((context.kind, context.name, "/".join(context.path), context.module.name))
        return next_fun(*args, **kwargs)

    class Layer:
        @jaxstate.parametrized
        def __call__(self, x):
            return x * jaxstate.param("w", uniform, ())

    first, second = scaling(), scaling()
    block = jaxstate.parametrized(lambda x: Layer()(x), name="block")
    shared = jax.jit(lambda x: block(x))
    deep = jaxstate.stack(jaxstate.parametrized(lambda x: scaling("part")(x), name="block"), 2)

    @jaxstate.parametrized
    def net(x):
        with jaxstate.scope("encoder"):
            x = first(x)
        x = shared(second(x))
        jaxstate.variable("n", jnp.zeros, ())
        return deep(x)

    params, state = net.init_with_state(KEY, X)
    with jaxstate.intercept(look, params=look, variables=look):
        net.apply(params, X, state=state)
    seen = list(dict.fromkeys(seen))  # a function may be traced twice
    w = "parameter", "w"
    in_stack = [s for s in seen if s[2].startswith("stack")]
    assert [s for s in seen if s not in in_stack] == [
        ("module", "net", "", "net"),
        ("module", "layer", "encoder/layer", "layer"),
        (*w, "encoder/layer/w", "layer"),
        ("module", "layer", "layer", "layer"),
        (*w, "layer/w", "layer"),
        ("module", "block", "block", "block"),
        ("module", "layer", "block/layer", "layer"),
        (*w, "block/layer/w", "layer"),
        ("variable", "n", "n", "net"),
    ]
    assert in_stack[0] == ("module", "stack", "stack", "stack")
    assert set(in_stack[1:]) == {
        ("parameter", "layers", "stack/layers", "stack"),
        ("module", "block", "stack/layers", "block"),
        ("module", "part", "stack/layers/part", "part"),
        (*w, "stack/layers/part/w", "part"),
    }


def test_paths_are_those_of_the_parameters():
    """Also where one jitted function is used in two scopes, and where it makes a module."""
    seen = []

    def look(next_fun, args, kwargs, context):
        if context.kind == "parameter":
            seen.append(context.path)
        return next_fun(*args, **kwargs)

    making = jax.jit(lambda x: scaling("made")(x))
    layers = [scaling(), scaling()]

    @jaxstate.parametrized
    def net(x):
        for name, layer in zip("ab", layers, strict=True):
            with jaxstate.scope(name):
                x = making(jax.jit(layer)(making(x)))
        return layers[0](layers[1](x))

    def paths(tree):
        return {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

    params = net.init(KEY, X)
    with jaxstate.intercept(params=look):
        assert paths(net.init(KEY, X)) == paths(params) == set(seen)
        seen.clear()
        net.apply(params, X)
    assert paths(params) == set(seen)


def test_modules_without_parameters_have_a_name_each():
    seen = []

    def look(next_fun, args, kwargs, context):
        seen.append("/".join(context.path))
        return next_fun(*args, **kwargs)

    relus = [jaxstate.parametrized(jax.nn.relu, name="relu") for _ in range(2)]

    @jaxstate.parametrized
    def net(x):
        for relu in (*relus, *relus):
            x = jax.jit(relu)(x)
        with jaxstate.scope("end"):
            return relus[0](x)

    with jaxstate.intercept(look):
        net.apply({}, X)
    assert list(dict.fromkeys(seen)) == ["", "relu", "relu_1", "end/relu"]


# -- What an interceptor calls ---------------------------------------------------------------


def test_the_innermost_is_called_first_and_what_it_calls_comes_to_those_around_it():
    order = []

    def marking(mark):
        helper = jaxstate.parametrized(lambda x: x + 1, name=f"helper_of_{mark}")

        def hook(next_fun, args, kwargs, context):
            order.append((mark, context.name))
            return helper(next_fun(*args, **kwargs))

        return hook

    inner = jaxstate.parametrized(lambda x: 2 * x, name="inner")
    outer = jaxstate.parametrized(lambda x: inner(x), name="outer")
    with jaxstate.intercept(marking("a")), jaxstate.intercept(marking("b")):
        # outside of init and apply too
        y = outer(1.0)
    # inner: 2 + a's helper + b's helper, around which a adds its own
    assert order == [
        ("b", "outer"), ("a", "outer"),
        ("b", "inner"), ("a", "inner"), ("a", "helper_of_b"),
        ("a", "helper_of_b"),
    ]  # fmt: skip
    assert y == 2 + 2 * 3


def test_next_fun_may_be_called_twice_or_not_at_all():
    layer = scaling()
    net = jaxstate.parametrized(lambda x: layer(x) + 1, name="net")
    params = net.init(KEY, X)

    def antithetic(next_fun, args, kwargs, context):
        if context.name != "layer":
            return next_fun(*args)
        return next_fun(args[0]) - 3 * next_fun(2 * args[0])

    with jaxstate.intercept(antithetic):
        y = net.apply(params, X)
    w = params["layer"]["w"]
    np.testing.assert_allclose(y, jnp.tanh(w * X) - 3 * jnp.tanh(2 * w * X) + 1, rtol=1e-6)

    with jaxstate.intercept(lambda f, args, kwargs, c: f(*args) if c.path == () else 7.0):
        assert net.init(KEY, X) == {}
        assert net.apply({}, X) == 8.0


def test_a_traced_value_is_put_in_the_place_of_an_activation():
    """Its gradient is that with respect to the activation."""
    layer = scaling()
    net = jaxstate.parametrized(lambda x: (layer(x) ** 2).sum(), name="net")
    params = net.init(KEY, X)

    def patched(h):
        def patch(next_fun, args, kwargs, context):
            return h if context.path == ("layer",) else next_fun(*args, **kwargs)

        with jaxstate.intercept(patch):
            return net.apply(params, X)

    np.testing.assert_allclose(jax.grad(patched)(X), 2 * X, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(patched))(X), 2 * X, rtol=1e-6)


# -- Parameters and variables ----------------------------------------------------------------


def test_parameters_are_cast_by_name():
    def half(next_fun, args, kwargs, context):
        value = next_fun(*args)
        return value.astype(jnp.bfloat16) if context.name == "w" else value

    layer = scaling()
    net = jaxstate.parametrized(
        lambda x: layer(x) * jaxstate.param("scale", uniform, ()), name="net"
    )
    with jaxstate.intercept(params=half):
        params = net.init(KEY, X)
        y = jax.jit(net.apply)(params, X.astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}

    @jax.jit
    def by_hand(x, w, scale):
        return jnp.tanh(x.astype(jnp.bfloat16) * w.astype(jnp.bfloat16)) * scale

    np.testing.assert_array_equal(y, by_hand(X, params["layer"]["w"], params["scale"]))


def test_a_parameter_is_made_of_others():
    """Weight normalization: the parameters that the hook makes do not come to it again."""

    def normalized(next_fun, args, kwargs, context):
        init, *init_args = args
        v = next_fun(init, *init_args)
        gain = jaxstate.param(f"{context.name}_gain", jax.nn.initializers.ones, v.shape[-1:])
        return gain * v / jnp.linalg.norm(v, axis=0)

    @jaxstate.parametrized
    def dense(x):
        return x @ jaxstate.param("w", jax.nn.initializers.normal(), (3, 2))

    net = jaxstate.parametrized(
        lambda x: lax.fori_loop(0, 2, lambda i, y: y + dense(x), jnp.zeros(2))
    )
    with jaxstate.intercept(params=normalized):
        params = net.init(KEY, X)
        y = net.apply(params, X)
        grads = jax.grad(lambda p: net.apply(p, X).sum())(params)
    v, gain = params["dense"]["w"], params["dense"]["w_gain"]

    def by_hand(v, gain):
        return 2 * (X @ (gain * v / jnp.linalg.norm(v, axis=0)))

    np.testing.assert_allclose(y, by_hand(v, gain), rtol=1e-6)
    dv, dgain = jax.grad(lambda *p: by_hand(*p).sum(), (0, 1))(v, gain)
    np.testing.assert_allclose(grads["dense"]["w"], dv, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["dense"]["w_gain"], dgain, rtol=1e-5)


def test_parameters_and_variables_are_made_otherwise():
    def zeros(next_fun, args, kwargs, context):
        init, *init_args = args
        return next_fun(lambda *key: jnp.zeros_like(init(*key, *init_args)))

    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.ones, (), jnp.int32)
        n.value += 1
        return x * jaxstate.param("w", jax.nn.initializers.ones, (3,)) + n.value

    with jaxstate.intercept(params=zeros, variables=zeros):
        params, state = net.init_with_state(KEY, X)
        y, state_after = net.apply_with_state(params, state, X)
    assert (params["w"] == jnp.zeros(3)).all() and state == {"n": 0} and state_after == {"n": 1}
    assert (y == 1).all()


# -- With the rest ---------------------------------------------------------------------------


def test_reuse_and_summaries_see_what_interceptors_make():
    layer = scaling()
    net = jaxstate.parametrized(lambda x: layer(x), name="net")
    with jaxstate.intercept(gained):
        made = layer.init(KEY, X)
        # as a network of its own it is called "layer" too
        assert net.parameters_from({layer: made}, X) == {"layer": made}
        assert [row.path for row in net.summary(KEY, X).rows] == ["layer/gain", "layer/w"]


def test_with_random_streams_and_in_a_stack():
    """Noise in each layer: the draws are those of the loop by hand."""

    def noisy(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        return y + jaxstate.random.normal(y.shape) if context.name == "layer" else y

    layer = scaling()
    deep = jaxstate.stack(jaxstate.parametrized(lambda x: layer(x), name="block"), 3)
    params = deep.init(KEY, X)
    with jaxstate.intercept(noisy):
        y = jax.jit(deep.apply)(params, X, key=KEY)
    wanted = X
    for i, w in enumerate(params["layers"]["layer"]["w"]):
        noise = jax.random.normal(jax.random.fold_in(KEY, i), X.shape)
        wanted = jnp.tanh(wanted * w) + noise
    np.testing.assert_allclose(y, wanted, rtol=1e-6)


@pytest.mark.parametrize("given", [
    {}, {"modules": 3}, {"params": "w"}, {"variables": jnp.ones(2)}, {"modules": lambda x: x},
    {"params": lambda next_fun, args, kwargs: None},
])  # fmt: skip
def test_what_is_no_interceptor_is_refused_where_it_is_given(given):
    with pytest.raises(TypeError, match="intercept wants a function"):
        jaxstate.intercept(**given)


@pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")
def test_what_interceptors_hand_on_and_back_is_checked():
    @jaxstate.parametrized
    def net(x):
        jaxstate.variable("n", jnp.zeros, ())
        return x * jaxstate.param("w", uniform, ())

    def nothing(next_fun, args, kwargs, context):
        next_fun(*args, **kwargs)

    def without_init(next_fun, args, kwargs, context):
        return next_fun(None)

    for kind, name in (("params", "w"), ("variables", "n")):
        for hook, text in ((nothing, f"made None of .*'{name}'"), (without_init, f"'{name}', ...")):
            with pytest.raises(TypeError, match=text), jaxstate.intercept(**{kind: hook}):
                net.init(KEY, X)


def test_an_interceptor_is_opened_once_for_each_with_and_each_call():
    layer = jaxstate.parametrized(lambda x: x + 1, name="layer")
    opening = jaxstate.intercept(doubled)
    for _ in range(2):
        with opening:
            assert layer(1.0) == 4
            with opening:
                assert layer(1.0) == 8
    assert layer(1.0) == 2
    decorated = jaxstate.intercept(doubled)(lambda n: layer(1.0) if n == 0 else decorated(n - 1))
    assert (decorated(0), decorated(1), layer(1.0)) == (4, 8, 2)
    with pytest.warns(UserWarning, match="never opened: 'with' opens it"):
        jaxstate.intercept(doubled)


@pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")
def test_after_an_error_all_is_as_before():
    layer = scaling()
    net = jaxstate.parametrized(lambda x: layer(x), name="net")
    params = net.init(KEY, X)

    def fails(next_fun, args, kwargs, context):
        next_fun(*args, **kwargs)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), jaxstate.intercept(fails):
        jax.jit(net.apply)(params, X)
    with jaxstate.intercept(doubled):
        with pytest.raises(jaxstate.MissingParameterError):
            jax.jit(net.apply)({}, X)
        np.testing.assert_allclose(
            net.apply(params, X), 2 * jnp.tanh(X * params["layer"]["w"]), rtol=1e-6
        )
    np.testing.assert_allclose(net.apply(params, X), jnp.tanh(X * params["layer"]["w"]), rtol=1e-6)
    assert not program.entries and not program.followers


# -- The path, and the names of operations ---------------------------------------------------


def test_the_path_in_every_kind_of_place():
    seen = []

    def note(x):
        seen.append("/".join(jaxstate.path()))
        return x

    layer = jaxstate.parametrized(
        lambda x: note(x) * jaxstate.param("w", uniform, ()), name="layer"
    )

    @jaxstate.parametrized
    def net(x):
        note(x)
        with jaxstate.scope("a"):
            return note(layer(x))

    assert jaxstate.path() == ()
    params = net.init(KEY, X)
    with jaxstate.scope("run"):
        net.apply(params, X)
    assert seen[-3:] == ["run", "run/a/layer", "run/a"]
    assert jaxstate.path() == ()


def test_the_path_in_a_jitted_function_that_two_scopes_share(monkeypatch):
    monkeypatch.setattr(type(program), "always_followed", False)
    is_in_b = jax.jit(lambda x: x * 0 + ("b" in jaxstate.path()))
    nested = jax.jit(lambda x: lax.fori_loop(0, 1, lambda i, x: is_in_b(x), x))

    for f in (is_in_b, nested):

        @jaxstate.parametrized
        def net(x, f=f):
            found = []
            for name in "abab":
                with jaxstate.scope(name):
                    found.append(f(x))
            return found

        for apply in (net.apply, jax.jit(net.apply)):
            assert [float(x) for x in apply({}, 0.0)] == [0, 1, 0, 1]


@pytest.mark.leaks_allowed("the checker keeps no traces, and here they are counted")
def test_operations_are_named_after_modules_and_scopes_and_nothing_else_changes(monkeypatch):
    traced = []

    @jax.jit
    def shared(x):
        traced.append(x)
        return jnp.cos(x)

    layers = [scaling(), scaling()]
    deep = jaxstate.stack(jaxstate.parametrized(lambda x: scaling("part")(x), name="block"), 2)

    @jaxstate.parametrized
    def net(x):
        with jaxstate.scope("encoder"):
            x = shared(layers[0](x))
        with jaxstate.scope("decoder"):
            x = shared(layers[1](x))
        x = layers[1](layers[0](x))
        return deep(lax.fori_loop(0, 2, lambda i, x: scaling()(x), x))

    params = net.init(KEY, X)
    traced.clear()
    jax.clear_caches()
    run = jax.jit(lambda params, x: net.apply(params, x))
    text = run.lower(params, X).compile().as_text()
    names = {m for n in re.findall(r'op_name="([^"]*)"', text) for m in [n.replace("jit(", "")]}
    for path in ("net/encoder/layer/", "net/decoder/layer/", "stack/", "/layers/part/"):
        assert any(path in name for name in names), (path, names)
    assert any(re.search("while/body.*/layer/", name) for name in names)
    assert len(traced) == 1

    with monkeypatch.context() as without_names:
        without_names.setattr(Entered, "_name_operations", lambda self: None)
        without = jax.jit(lambda params, x: net.apply(params, x))
        assert str(jax.make_jaxpr(without)(params, X)) == str(jax.make_jaxpr(run)(params, X))
        assert without.lower(params, X).as_text() == run.lower(params, X).as_text()


def test_a_call_costs_few_python_calls():
    """Of a module without parameters, with all that it means to be one."""
    import sys

    modules = [jaxstate.parametrized(lambda x: x, name="module") for _ in range(50)]
    with_modules = jaxstate.parametrized(
        lambda x: functools.reduce(lambda x, m: m(x), modules, x), name="net"
    )
    without = jaxstate.parametrized(
        lambda x: functools.reduce(lambda x, m: x, modules, x), name="net"
    )

    def calls(f):
        n = 0

        def count(frame, event, arg):
            nonlocal n
            n += event == "call"

        f()
        sys.setprofile(count)
        try:
            f()
        finally:
            sys.setprofile(None)
        return n

    def per_module(run):
        return (calls(lambda: run(with_modules)) - calls(lambda: run(without))) / len(modules)

    assert per_module(lambda net: net.apply({}, 1.0)) < 32
    assert per_module(lambda net: jax.eval_shape(lambda: net.apply({}, 1.0))) < 50
