"""Parameters: names, sharing, birth, and apply as a pure function."""

import copy
import dataclasses
import importlib
import pickle
import subprocess
import sys
import threading
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.core.test_matrix import initial_parameter
from jaxstate_tests.params.networks import (
    assert_trees_close,
    assert_trees_equal,
    dense,
    dense_by_hand,
    lecun,
    net,
    net_by_hand,
    normal,
    scaled,
    shapes,
)

# -- The example of the documentation --------------------------------------------------------


def test_a_layer_in_a_loop_and_one_in_a_jit(key):
    x = jax.random.normal(key, (4, 8))
    params = net.init(key, x)
    assert shapes(params) == {
        "dense": {"w": (8, 8), "b": (8,)},
        "dense_1": {"w": (8, 1), "b": (1,)},
    }
    assert type(params) is dict and all(type(v) is dict for v in params.values())
    assert_trees_close(net.apply(params, x), net_by_hand(params, x))
    assert_trees_close(jax.jit(net.apply)(params, x), net_by_hand(params, x))
    loss = lambda f: lambda p: (f(p, x) ** 2).sum()  # noqa: E731
    for d in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        assert_trees_close(d(loss(net.apply))(params), jax.grad(loss(net_by_hand))(params))


def test_the_jaxpr_of_apply_has_the_equations_of_the_hand_written_function(key):
    x = jnp.ones((4, 8))
    params = net.init(key, x)

    def by_hand(p, x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(dense_by_hand(p["dense"], x)), x)
        return jax.jit(dense_by_hand)(p["dense_1"], x)

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from equations(sub)

    found, wanted = (jax.make_jaxpr(f)(params, x) for f in (net.apply, by_hand))
    assert list(equations(found)) == list(equations(wanted))
    assert found.consts == []
    gradients = (
        jax.make_jaxpr(jax.grad(lambda p, f=f: f(p, x).sum()))(params) for f in (net.apply, by_hand)
    )
    found, wanted = gradients
    assert sorted(equations(found)) == sorted(equations(wanted))


# -- Names -----------------------------------------------------------------------------------


def test_names_follow_first_use_and_stay_when_a_layer_is_added(key):
    a, b, c = dense(2), dense(3), dense(4)
    x = jnp.ones(2)
    two = jaxstate.parametrized(lambda x: b(a(x)))
    three = jaxstate.parametrized(lambda x: c(b(a(x))))
    p2, p3 = two.init(key, x), three.init(key, x)
    assert list(p2) == ["dense", "dense_1"] and list(p3) == ["dense", "dense_1", "dense_2"]
    assert_trees_equal({k: p3[k] for k in p2}, p2)


def test_scopes_by_hand(key):
    @jaxstate.parametrized
    def f(x):
        with jaxstate.scope("encoder"):
            x = dense(2)(x)
        with jaxstate.scope("decoder"), jaxstate.scope("inner"):
            x = x * jaxstate.param("s", normal, ())
        with jaxstate.scope("encoder"):
            return x + jaxstate.param("shift", normal, ())

    p = f.init(key, jnp.ones(2))
    assert shapes(p) == {
        "encoder": {"dense": {"w": (2, 2), "b": (2,)}, "shift": ()},
        "decoder": {"inner": {"s": ()}},
    }
    np.testing.assert_array_equal(
        p["decoder"]["inner"]["s"], initial_parameter(key, "decoder/inner/s")
    )
    f.apply(p, jnp.ones(2))


def test_the_value_depends_on_key_and_path_only(key):
    def forwards(x):
        return x * jaxstate.param("a", normal, ()) + jaxstate.param("b", normal, ())

    def backwards(x):
        b = jaxstate.param("b", normal, ())
        jaxstate.param("new", normal, (3,))
        return jax.jit(lambda: x * jaxstate.param("a", normal, ()) + b)()

    p, q = (jaxstate.parametrized(f).init(key, 1.0) for f in (forwards, backwards))
    assert p["a"] == q["a"] == initial_parameter(key, "a")
    assert p["b"] == q["b"] == initial_parameter(key, "b")


def test_a_python_loop_equals_a_scan(key):
    cell = scaled()

    def python(x):
        for _ in range(3):
            x = jnp.sin(cell(x))
        return x

    def scan(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(cell(c)), None), x, None, length=3)[0]

    a, b = jaxstate.parametrized(python), jaxstate.parametrized(scan)
    p = a.init(key, 1.0)
    assert_trees_equal(p, b.init(key, 1.0))
    np.testing.assert_allclose(a.apply(p, 1.0), b.apply(p, 1.0), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["no", "jit", "remat"])
def test_a_module_made_inside_a_function_that_is_called_twice(key, wrap):
    @jaxstate.parametrized
    def f(x):
        g = wrap(lambda x: scaled()(x))
        return g(g(x))

    p = f.init(key, 1.0)
    assert shapes(p) == {"scale": {"s": ()}, "scale_1": {"s": ()}}
    np.testing.assert_allclose(f.apply(p, 2.0), 2 * p["scale"]["s"] * p["scale_1"]["s"], rtol=1e-6)


def test_one_jitted_layer_in_two_scopes(key):
    @jax.jit
    def layer(x):
        return jnp.sin(x * jaxstate.param("s", normal, ()))

    @jaxstate.parametrized
    def f(x):
        for name in ("a", "b"):
            with jaxstate.scope(name):
                x = layer(x)
        return x

    p = f.init(key, 1.0)
    assert shapes(p) == {"a": {"s": ()}, "b": {"s": ()}} and p["a"]["s"] != p["b"]["s"]
    wanted = np.sin(np.sin(p["a"]["s"]) * p["b"]["s"])
    np.testing.assert_allclose(f.apply(p, 1.0), wanted, rtol=1e-6)


def test_one_object_under_two_parents_plain_and_jitted_is_one_entry(key):
    shared = scaled("shared")
    a = jaxstate.parametrized(lambda x: shared(x), name="a")
    b = jaxstate.parametrized(lambda x: jax.jit(shared)(x), name="b")
    f = jaxstate.parametrized(lambda x: a(x) + b(x) ** 2 + shared(x))
    p = f.init(key, 3.0)
    assert shapes(p) == {"a": {"shared": {"s": ()}}}
    s = p["a"]["shared"]["s"]
    np.testing.assert_allclose(f.apply(p, 3.0), 6 * s + 9 * s**2, rtol=1e-6)
    g = jax.grad(lambda p: f.apply(p, 3.0))(p)
    np.testing.assert_allclose(g["a"]["shared"]["s"], 6 + 18 * s, rtol=1e-5)


def test_every_instance_of_a_class_is_its_own_module(key):
    @dataclasses.dataclass
    class LinearMap:
        features: int

        @jaxstate.parametrized
        def __call__(self, x):
            return x @ jaxstate.param("w", lecun, (x.shape[-1], self.features))

        @jaxstate.parametrized
        def twice(self, x):
            return self(self(x))

    one, two = LinearMap(2), LinearMap(2)
    f = jaxstate.parametrized(lambda x: two(one(one(x))))
    p = f.init(key, jnp.ones(2))
    assert shapes(p) == {"linear_map": {"w": (2, 2)}, "linear_map_1": {"w": (2, 2)}}
    x = jnp.arange(2.0)
    w, v = p["linear_map"]["w"], p["linear_map_1"]["w"]
    np.testing.assert_allclose(f.apply(p, x), x @ w @ w @ v, rtol=1e-5)
    assert shapes(one.twice.init(key, x)) == {"linear_map": {"w": (2, 2)}}


def test_layers_of_two_branches_or_of_cond_and_body(key):
    """Their jaxprs are traced before either is bound: neither sees the other's names."""
    x, narrow, wide = jnp.ones(2), dense(3), dense(4)

    def branches(x):
        return jax.lax.cond(x.sum() > 0, lambda x: narrow(x).sum(), lambda x: wide(x).sum(), x)

    def loop(x):
        return jax.lax.while_loop(
            lambda c: (c[0] < 2) & (narrow(x).sum() < 1e9),
            lambda c: (c[0] + 1, c[1] + wide(x).sum()),
            (0, 0.0),
        )[1]

    for f, by_hand in (
        (branches, lambda p: dense_by_hand(p["dense"], x).sum()),
        (loop, lambda p: 2 * dense_by_hand(p["dense_1"], x).sum()),
    ):
        for network in (jaxstate.parametrized(f), jaxstate.parametrized(jax.jit(f), name="f")):
            p = network.init(key, x)
            assert shapes(p) == {
                "dense": {"w": (2, 3), "b": (3,)},
                "dense_1": {"w": (2, 4), "b": (4,)},
            }
            for dtype in (jnp.float32, jnp.bfloat16):
                q = jax.tree.map(lambda a, d=dtype: a.astype(d), p)
                np.testing.assert_allclose(network.apply(q, x), by_hand(q), rtol=1e-2)
            np.testing.assert_allclose(jax.jit(network.apply)(p, x), by_hand(p), rtol=1e-5)


def test_a_shared_layer_in_two_branches_has_one_place(key):
    layer = scaled()

    def in_scope(x):
        with jaxstate.scope("s"):
            return layer(x)

    net = jaxstate.parametrized(lambda x: jax.lax.cond(x > 0, layer, in_scope, x))
    p = net.init(key, 1.0)
    assert shapes(p) == {"scale": {"s": ()}}
    for x in (2.0, -2.0):
        np.testing.assert_allclose(net.apply(p, x), x * p["scale"]["s"], rtol=1e-6)


@pytest.mark.parametrize(
    "first", [jax.jit, jax.checkpoint, lambda f: f], ids=["jit", "remat", "no"]
)
def test_one_layer_first_transformed_then_plain(key, first):
    layer = scaled()
    net = jaxstate.parametrized(lambda x: first(layer)(x) + layer(x) + jax.jit(layer)(x))
    p = net.init(key, 1.0)
    np.testing.assert_allclose(net.apply(p, 2.0), 6 * p["scale"]["s"], rtol=1e-6)


# -- Apply -----------------------------------------------------------------------------------


def test_two_applies_through_one_cached_function(key):
    traces = []

    @jax.jit
    def layer(x):
        traces.append(x.shape)
        return x * jaxstate.param("s", normal, ())

    f = jaxstate.parametrized(layer)
    p = f.init(key, 2.0)
    del traces[:]
    with jax.checking_leaks.func(False):  # the checker turns JAX's caches off
        for factor in (1.0, 2.0, 3.0):
            q = jax.tree.map(lambda a, k=factor: a * k, p)
            np.testing.assert_allclose(f.apply(q, 2.0), 2 * q["s"], rtol=1e-6)
    assert traces == [()]


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_loop_of_calls_of_one_jitted_stateful_function_traces_it_once(key):
    traces = []

    @jax.jit
    def step(x):
        traces.append(1)
        return x + jaxstate.random.uniform()

    with jaxstate.rng_stream(key) as stream:
        for _ in range(1000):
            step(1.0)
    assert len(traces) == 1 and stream.count == 1000


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_cached_function_whose_parameter_changed_shape(key):
    size = [3]

    @jax.jit
    def f(x):
        return x * jaxstate.param("w", normal, (size[0],)).sum()

    net = jaxstate.parametrized(f)
    p3 = net.init(key, 1.0)
    np.testing.assert_allclose(net.apply(p3, 1.0), p3["w"].sum(), rtol=1e-6)
    size[0] = 5
    p5 = {"w": jnp.arange(5.0)}
    np.testing.assert_allclose(net.apply(p5, 1.0), 10.0)
    size[0] = 3
    np.testing.assert_allclose(net.apply(p3, 1.0), p3["w"].sum(), rtol=1e-6)


def test_parameters_of_another_dtype(key):
    f = jaxstate.parametrized(jax.jit(lambda x: x * jaxstate.param("w", normal, (3,))))
    p = f.init(key, jnp.ones(3))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float16):
        q = jax.tree.map(lambda a, d=dtype: a.astype(d), p)
        assert f.apply(q, jnp.ones(3, dtype)).dtype == dtype
    numpy = jax.tree.map(np.asarray, p)
    np.testing.assert_array_equal(f.apply(numpy, jnp.ones(3)), p["w"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_parameter_of_another_shape_is_refused_with_the_type_that_is_wanted(dtype):
    ones = jax.nn.initializers.ones
    net = jaxstate.parametrized(lambda: jaxstate.param("w", ones, (3,), jnp.dtype(dtype)))
    for how in (lambda f: f, jax.jit):
        with pytest.raises(jaxstate.StateError, match=rf"wants {dtype}\[3\]"):
            how(net.apply)({"w": jnp.zeros(4, dtype)})


def test_a_parameter_that_is_a_tree(key):
    def init(key, n):
        return {"kernel": normal(key, (n,)), "scales": (jnp.ones(()), jnp.zeros(2))}

    f = jaxstate.parametrized(lambda x: jax.jit(lambda: jaxstate.param("layer", init, 3))())
    p = f.init(key, 0.0)
    assert shapes(p) == {"layer": {"kernel": (3,), "scales": ((), (2,))}}
    value = f.apply(p, 0.0)
    assert jax.tree.structure(value) == jax.tree.structure(init(key, 3))
    np.testing.assert_array_equal(value["kernel"], p["layer"]["kernel"])


def test_keys_of_apply_and_init(key):
    def f(x):
        return x + jaxstate.random.uniform() + jaxstate.random.uniform(stream="dropout")

    net, other = jaxstate.parametrized(f), jax.random.key(5)
    assert net.init({"params": key, "default": key, "dropout": other}, 0.0) == {}
    found = jax.jit(net.apply)({}, 0.0, key={"default": key, "dropout": other})
    wanted = jax.random.uniform(jax.random.fold_in(key, 0)) + jax.random.uniform(
        jax.random.fold_in(other, 0)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_explicit_apply_inside_a_body(key):
    inner = scaled("inner")

    @jaxstate.parametrized
    def outer(x, p1, p2):
        s = jaxstate.param("s", normal, ())
        y = jax.jit(inner.apply)(p1, x) + inner.apply(p2, x) * s
        with_key = jaxstate.parametrized(lambda: jaxstate.random.uniform()).apply({}, key=key)
        return y + with_key

    p1, p2 = {"s": jnp.float32(2)}, {"s": jnp.float32(3)}
    p = outer.init(key, 1.0, p1, p2)
    assert shapes(p) == {"s": ()}
    wanted = 2 + 3 * p["s"] + jax.random.uniform(jax.random.fold_in(key, 0))
    np.testing.assert_allclose(outer.apply(p, 1.0, p1, p2), wanted, rtol=1e-6)


def test_explicit_init_inside_a_body(key):
    inner = scaled("inner")

    @jaxstate.parametrized
    def outer(x):
        return jax.jit(inner.init)(key, x)["s"] * inner(x)

    p = outer.init(key, 1.0)
    wanted = initial_parameter(key, "s") * initial_parameter(key, "inner/s")
    np.testing.assert_allclose(outer.apply(p, 1.0), wanted, rtol=1e-6)


def test_returned_dicts_are_the_users_own(key):
    x = jnp.ones((4, 8))
    params = net.init(key, x)
    before = net.apply(params, x)
    copy = jax.tree.map(lambda a: a, params)
    params["dense"]["w"] = params["dense"]["w"] * 0
    params["unused"] = {"note": "left alone"}
    assert_trees_equal(net.apply(copy, x), before)
    np.testing.assert_allclose(net.apply(params, x), net_by_hand(params, x), rtol=1e-6)


def test_outside_of_init_and_apply_it_is_plain_python(key):
    double = jaxstate.parametrized(lambda x: 2 * x)
    assert double(3) == 6 and jax.jit(double)(3) == 6
    with jaxstate.scope("anything"):
        assert double(3) == 6


def test_disable_jit_finds_the_same_parameters(key):
    a, b = scaled(), scaled()
    net = jaxstate.parametrized(lambda x: jax.lax.cond(x > 0, a, b, x))
    p = net.init(key, 1.0)
    with jax.disable_jit():
        assert_trees_equal(net.init(key, 1.0), p)
        for x, name in ((2.0, "scale"), (-2.0, "scale_1")):
            np.testing.assert_allclose(net.apply(p, x), x * p[name]["s"], rtol=1e-6)


def test_an_initializer_that_reads_a_global(key):
    net = jaxstate.parametrized(lambda: jaxstate.param("w", by_global_size))
    for by_global_size.n in (3, 5):
        assert net.apply(net.init(key)).shape == (by_global_size.n,)


def by_global_size(key):
    return jnp.zeros(by_global_size.n)


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_an_initializer_that_runs_a_forward_pass_for_the_shapes(key, inner):
    """As a module of Flax does: what it computes from the data is thrown away."""

    def init(key, x):
        def forward(key, x):
            w = normal(key, (x.shape[-1], 3))
            return w, jnp.tanh(x @ w)

        return inner(forward)(key, x)[0]

    net = jaxstate.parametrized(
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: x @ jaxstate.param("w", init, x), x)
    )
    x = jnp.ones((2, 3))
    p = net.init(key, x)
    np.testing.assert_allclose(net.apply(p, x), x @ p["w"] @ p["w"], rtol=1e-6)
    lanes = jaxstate.parametrized(jax.vmap(lambda x: x @ jaxstate.param("w", init, x)), name="net")
    assert_trees_equal(lanes.init(key, x), p)


def test_an_initializer_that_closes_over_values_of_a_transformation_around_init(key):
    def initial(scale):
        def f(x):
            def body(i, x):
                return x * jaxstate.param("w", lambda key: scale * normal(key, (3,)))

            return jax.lax.fori_loop(0, 2, body, x)

        return jaxstate.parametrized(f).init(key, jnp.ones(3))["w"]

    w, scales = initial(1.0), jnp.arange(1.0, 4.0)
    for transformed in (jax.vmap(initial), jax.jit(jax.vmap(initial))):
        np.testing.assert_allclose(transformed(scales), scales[:, None] * w, rtol=1e-6)
    for derivative in (jax.jacrev(initial), jax.jacfwd(initial), jax.jit(jax.jacrev(initial))):
        np.testing.assert_allclose(derivative(2.0), w, rtol=1e-6)


def test_copies_are_modules_of_their_own(key):
    layer = scaled()
    for copied in (copy.copy(layer), copy.deepcopy(layer), *copy.deepcopy([layer, layer])):
        net = jaxstate.parametrized(lambda x, copied=copied: copied(layer(x)))
        assert shapes(net.init(key, 1.0)) == {"scale": {"s": ()}, "scale_1": {"s": ()}}
    one, again = copy.deepcopy((layer, layer))
    assert one is again


MODULE = """
import jax, jaxstate

@jaxstate.parametrized
def net(x):
    return x * jaxstate.param("w", jax.nn.initializers.ones, ())

nameless = jaxstate.parametrized(lambda x: net(x), name="other")
deep = jaxstate.stack(net, 3)

class Block:
    def __init__(self, n):
        self.n = n

    @jaxstate.parametrized
    def __call__(self, x):
        return self.n * x * jaxstate.param("w", jax.nn.initializers.ones, ())

    class Inner:
        @jaxstate.parametrized
        def f(self, x):
            return x
"""


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_stands_in_a_module_is_pickled_by_name(protocol, tmp_path, monkeypatch, key):
    (tmp_path / "module_of_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("module_of_nets")
    again = lambda x: pickle.loads(pickle.dumps(x, protocol))  # noqa: E731
    Block = module.Block
    for network in (module.net, module.nameless, module.deep, Block.__call__, Block.Inner.f):
        assert again(network) is network
        assert again([network.apply, network])[0].__self__ is network
    shaped = again(module.net.shaped(jax.ShapeDtypeStruct((), jnp.float32)))
    assert shaped.net is module.net and shaped.init(key) == {"w": 1.0}
    for method in (again(Block(2)).__call__, again(Block(2).__call__)):
        assert method.apply({"w": 3.0}, 5.0) == 30.0
    made_here = [scaled(), jaxstate.stack(scaled(), 2), jaxstate.parametrized(MODULE.count)]
    for network in made_here:
        with pytest.raises(pickle.PicklingError, match="pickled by name"):
            again(network)


async def coroutine(x):
    return x


async def asynchronous(x):
    yield x


class Generating:
    def __call__(self, x):
        yield x

    def method(self, x):
        yield x


LATE = [coroutine, asynchronous, Generating(), Generating().method, lambda x: (yield x)]


@pytest.mark.parametrize("fn", [*LATE, *map(partial, LATE)], ids=range(2 * len(LATE)))
def test_a_function_that_does_not_run_when_it_is_called_is_refused(fn):
    with pytest.raises(TypeError, match="runs when it is called"):
        jaxstate.parametrized(fn)


def test_initializers_may_want_a_raw_key():
    raw = jax.random.PRNGKey(0)
    net = jaxstate.parametrized(
        lambda: jaxstate.param("w", lambda k: normal(jax.random.wrap_key_data(k), (3,)))
    )
    p = net.init(raw)
    assert_trees_equal(net.apply(p), p["w"])


def test_a_parameter_that_is_the_key_of_a_stream(key):
    with jaxstate.rng_stream(key) as stream:
        p = jaxstate.parametrized(lambda: jaxstate.param("k", lambda _: stream.key)).init(key)
    assert not isinstance(p["k"], jax.core.Tracer) and p["k"] == key


def test_a_callable_object_keeps_its_attributes_to_itself(key):
    class Layer:
        def __init__(self):
            self.name, self.init = "mine", "not a method"

        def __call__(self, x):
            return x * jaxstate.param("s", normal, ())

    net = jaxstate.parametrized(Layer(), name="net")
    assert net.name == "net" and shapes(net.init(key, 1.0)) == {"s": ()}
    assert shapes(jaxstate.parametrized(lambda x: net(x)).init(key, 1.0)) == {"net": {"s": ()}}


def test_a_pickled_tree_in_a_new_process(tmp_path, key):
    params = net.init(key, jnp.ones((4, 8)))
    (tmp_path / "params.pkl").write_bytes(pickle.dumps(jax.tree.map(np.asarray, params)))
    program = f"""
import pickle, jax.numpy as jnp
from jaxstate_tests.params.networks import net
params = pickle.load(open({str(tmp_path / "params.pkl")!r}, "rb"))
print(float(net.apply(params, jnp.ones((4, 8))).sum()))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    np.testing.assert_allclose(
        float(out.stdout), net.apply(params, jnp.ones((4, 8))).sum(), rtol=1e-5
    )


def test_threads_do_not_see_each_other(key):
    x = jnp.ones((4, 8))
    params = [net.init(jax.random.key(i), x) for i in range(8)]
    wanted = [np.asarray(net_by_hand(p, x)) for p in params]
    found, gate = {}, threading.Barrier(8)

    def work(i):
        gate.wait()
        found[i] = [np.asarray(net.apply(params[i], x)) for _ in range(5)]

    with jax.checking_leaks.func(False):  # threads do not share the setting
        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [w.start() for w in workers]
        [w.join() for w in workers]
    for i in range(8):
        for y in found[i]:
            np.testing.assert_allclose(y, wanted[i], rtol=1e-5)


def test_an_exception_inside_leaves_nothing_behind(key):
    @jaxstate.parametrized
    def fails(x):
        with jaxstate.scope("inner"):
            jax.jit(lambda: jaxstate.param("s", normal, ()) / 0 if x > 1e9 else 1 // 0)()

    for run in (lambda: fails.init(key, 1.0), lambda: fails.apply({}, 1.0)):
        with pytest.raises(ZeroDivisionError):
            run()
    with pytest.raises(jaxstate.MissingStoreError):
        jaxstate.param("s", normal, ())
    x = jnp.ones((4, 8))
    assert_trees_equal(net.init(key, x), net.init(key, x))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_parameter_that_is_the_result_of_a_jaxpr_is_its_value(jitted):
    """What stands for it in the jaxpr, as a constant, is not given to the program."""

    @jaxstate.parametrized
    def net(x):
        read = lambda _: jaxstate.param("w", jax.nn.initializers.ones, ())  # noqa: E731
        f, constants = jax.closure_convert(read, x)
        made = jax.make_jaxpr(read)(x)
        return f(x, *constants), jax.core.eval_jaxpr(made.jaxpr, made.consts, x)[0]

    apply = jax.jit(net.apply) if jitted else net.apply
    for w in (2.0, 3.0):
        out = apply({"w": jnp.float32(w)}, 1.0)
        assert [type(y) for y in out] == [type(jnp.ones(()))] * 2
        assert out == (w, w)
    assert net.init(jax.random.key(0), 1.0) == {"w": 1.0}
