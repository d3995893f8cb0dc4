"""Reuse of trained parts by object identity, and explicit init and apply inside a body.

Rows "reuse", "nested explicit apply" and "combinators" of the acceptance list. The reference is the
same network with its parameters placed by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.params.networks import (
    assert_trees_close,
    assert_trees_equal,
    dense,
    dense_by_hand,
    normal,
    scaled,
    shapes,
)

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def assert_same_arrays(a, b):
    """The very arrays, not copies."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(x is y for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# -- parameters_from -------------------------------------------------------------------------


def test_parts_are_found_by_identity(key):
    a, b = dense(5), dense(2)
    net = jaxstate.parametrized(lambda x: b(jnp.tanh(a(x))), name="net")
    pa, pb = a.init(key, X), b.init(key, jnp.ones((4, 5)))
    params = net.parameters_from({b: pb, a: pa}, X)
    assert list(params) == ["dense", "dense_1"]
    assert_same_arrays(params, {"dense": pa, "dense_1": pb})
    wanted = dense_by_hand(pb, jnp.tanh(dense_by_hand(pa, X)))
    np.testing.assert_allclose(net.apply_from({b: pb, a: pa}, X), wanted, rtol=1e-6)
    by_shape = net.parameters_from({b: pb, a: pa}, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert_same_arrays(by_shape, params)


def test_parts_of_parts_are_reused_wherever_they_are(key):
    leaf = dense(3)
    middle = jaxstate.parametrized(lambda x: leaf(x) + dense(3)(x), name="middle")
    net = jaxstate.parametrized(lambda x: middle(leaf(x)), name="net")
    # Alone, middle has leaf as "dense" and the layer it makes as "dense_1". In net, leaf has its
    # place outside of middle, and the layer that middle makes is "dense".
    p = middle.init(key, X)
    assert list(p) == ["dense", "dense_1"]
    params = net.parameters_from({middle: p}, X)
    assert_same_arrays(params, {"dense": p["dense"], "middle": {"dense": p["dense_1"]}})
    other = leaf.init(jax.random.key(1), X)
    later = net.parameters_from({middle: p, leaf: other}, X)
    assert_same_arrays(later, {"dense": other, "middle": {"dense": p["dense_1"]}})
    assert_same_arrays(net.parameters_from({leaf: other, middle: p}, X), params)


def test_layers_that_a_function_makes_keep_their_order(key):
    shared = dense(3)
    part = jaxstate.parametrized(lambda x: dense(3)(shared(dense(3)(x))), name="part")
    net = jaxstate.parametrized(lambda x: part(shared(x)), name="net")
    p = part.init(key, X)
    assert list(p) == ["dense", "dense_1", "dense_2"]  # made, shared, made
    params = net.parameters_from({part: p}, X)
    assert_same_arrays(
        params, {"dense": p["dense_1"], "part": {"dense": p["dense"], "dense_1": p["dense_2"]}}
    )


def test_a_network_may_be_its_own_source(key):
    a = dense(3)

    @jaxstate.parametrized
    def net(x):
        with jaxstate.scope("inner"):
            x = dense(3)(a(x))
        return x * jaxstate.param("tree", lambda key: {"s": jnp.ones(()), "t": jnp.ones(3)})["s"]

    p = net.init(key, X)
    assert_same_arrays(net.parameters_from({net: p}, X), p)
    other = a.init(jax.random.key(1), X)
    mixed = net.parameters_from({net: p, a: other}, X)
    assert_same_arrays(mixed, {**p, "inner": {**p["inner"], "dense": other}})


def test_a_larger_network_gives_its_parts(key):
    predict = dense(3)
    scale = scaled()

    @jaxstate.parametrized
    def loss(x, y):
        return jnp.mean((scale(predict(x)) - y) ** 2)

    @jaxstate.parametrized
    def accuracy(x, y):
        return jnp.mean(predict(x) > y)

    p = loss.init(key, X, X)
    assert_same_arrays(accuracy.parameters_from({loss: p}, X, X), {"dense": p["dense"]})
    wanted = jnp.mean(dense_by_hand(p["dense"], X) > X)
    assert accuracy.apply_from({loss: p}, X, X) == wanted
    # Called in another way than the network: its arguments are said.
    assert_same_arrays(predict.parameters_from({loss.shaped(X, X): p}, X), p["dense"])
    with pytest.raises(jaxstate.UnusedReuseError, match=r"(?s)'loss'.*does not call.*shaped"):
        predict.parameters_from({loss: p}, X)


@pytest.mark.parametrize("wrap", [
    jax.jit,
    jax.checkpoint,
    lambda f: lambda x: jax.lax.fori_loop(0, 2, lambda i, x: f(x), x),
    lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x),
    lambda f: lambda x: jax.vmap(f)(x),
    lambda f: lambda x: jax.grad(lambda x: f(x).sum())(x),
], ids=["jit", "checkpoint", "fori_loop", "cond", "vmap", "grad"])  # fmt: skip
def test_parts_under_transformations(key, wrap):
    leaf = dense(3)
    middle = jaxstate.parametrized(lambda x: jnp.tanh(dense(3)(leaf(x))), name="middle")
    wrapped = wrap(middle)  # one function: traced before, in the networks that were called before
    net = jaxstate.parametrized(lambda x: dense(3)(wrapped(x)) + leaf(x), name="net")
    p, fresh = middle.init(key, X), net.init(jax.random.key(1), X)
    params = net.init(jax.random.key(1), X, reuse={middle: p})
    assert list(params) == list(fresh)
    assert_same_arrays(params["middle"], p)
    assert_trees_equal(params["dense"], fresh["dense"])
    assert_trees_equal(middle.parameters_from({net: params}, X), p)
    assert_trees_equal(leaf.parameters_from({net: params}, X), p["dense"])


def test_derivatives_and_compilation_of_apply_from(key):
    a, b = dense(5), dense(1)
    net = jaxstate.parametrized(lambda x: b(jnp.tanh(a(x))).sum(), name="net")
    pa, pb = a.init(key, X), b.init(key, jnp.ones((4, 5)))
    by_hand = lambda pa, pb: dense_by_hand(pb, jnp.tanh(dense_by_hand(pa, X))).sum()  # noqa: E731
    found = lambda pa, pb: net.apply_from({a: pa, b: pb}, X)  # noqa: E731
    for d in (jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f))):
        assert_trees_close(d(found)(pa, pb), d(by_hand)(pa, pb))
    lanes = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), pb)
    assert_trees_close(
        jax.vmap(found, (None, 0))(pa, lanes), jax.vmap(by_hand, (None, 0))(pa, lanes)
    )


def test_draws_need_no_stream_to_find_parts(key):
    a = dense(3)

    @jaxstate.parametrized
    def net(x):
        keep = jax.vmap(lambda x: jaxstate.random.bernoulli(0.5, x.shape, stream="dropout"))(x)
        return a(jnp.where(keep, x, 0)) + jaxstate.random.normal()

    p = a.init(key, X)
    assert_same_arrays(net.parameters_from({a: p}, X), {"dense": p})
    keys = {"default": key, "dropout": jax.random.key(1)}
    found = net.apply_from({a: p}, X, key=keys)
    np.testing.assert_array_equal(found, net.apply({"dense": p}, X, key=keys))
    with jaxstate.rng_stream(key) as stream:
        net.parameters_from({a: p}, X)
        assert stream.count == 0


def test_bound_methods_and_modules_made_in_a_jitted_function(key):
    class Block:
        @jaxstate.parametrized
        def __call__(self, x):
            return x * jaxstate.param("s", normal, ())

    one, two = Block(), Block()
    net = jaxstate.parametrized(lambda x: two.__call__(one.__call__(x)), name="net")
    p = {"s": jnp.float32(2)}
    params = net.init(key, 1.0, reuse={two.__call__: p})
    assert params["block_1"]["s"] is p["s"]

    @jax.jit
    def inside(p, x):
        a, b = scaled("a"), scaled("b")
        net = jaxstate.parametrized(lambda x: b(a(x)))
        return net.parameters_from({b: p, a: p}, x)

    assert_trees_equal(inside(p, 1.0), {"a": p, "b": p})


# -- With variables --------------------------------------------------------------------------


@jaxstate.parametrized
def tracked(x):
    w = jaxstate.param("w", normal, (3,))
    mean = jaxstate.variable("mean", lambda: 2 * w)
    out = x * w + mean.value
    if x.shape[0] > 1:
        mean.value = mean.value + x.mean(0)
    return out


def test_variables_start_from_reused_parameters(key):
    other = dense(2)
    net = jaxstate.parametrized(lambda x: other(tracked(x)), name="net")
    given = {"w": jnp.arange(3.0)}
    params, state = net.init_with_state(key, X, reuse={tracked: given})
    assert_same_arrays(params["tracked"], given)
    assert_trees_equal(params["dense"], net.init(key, X)["dense"])
    assert_trees_equal(state, {"tracked": {"mean": jnp.array([0.0, 2.0, 4.0])}})
    again = net.shaped(X).init_with_state(key, reuse={tracked: given})
    assert_trees_equal(again, (params, state))


def test_apply_from_passes_variables_on(key):
    net = jaxstate.parametrized(lambda x: tracked(x) ** 2, name="net")
    given, state = {"w": jnp.arange(3.0)}, {"tracked": {"mean": jnp.ones(3)}}
    x = X[:1]
    wanted = (np.asarray(x) * np.arange(3.0) + 1) ** 2
    out = net.apply_from({tracked: given}, x, state=state)
    np.testing.assert_allclose(out, wanted, rtol=1e-6)
    out = net.shaped(x).apply_from({tracked: given}, x, state=state)
    np.testing.assert_allclose(out, wanted, rtol=1e-6)
    with pytest.raises(jaxstate.ReadOnlyVariableError):
        net.apply_from({tracked: given}, X, state=state)
    with pytest.raises(jaxstate.MissingVariableError):
        net.apply_from({tracked: given}, x)


# -- init(reuse=...) and shaped --------------------------------------------------------------


def test_init_makes_only_the_rest(key):
    a, b = dense(5), dense(2)
    net = jaxstate.parametrized(lambda x: b(jnp.tanh(a(x))), name="net")
    pa = a.init(jax.random.key(1), X)
    params, fresh = net.init(key, X, reuse={a: pa}), net.init(key, X)
    assert list(params) == list(fresh)
    assert_same_arrays(params["dense"], pa)
    assert_trees_equal(params["dense_1"], fresh["dense_1"])
    made = jax.make_jaxpr(lambda key: net.init(key, X, reuse={a: pa})["dense_1"])(key)
    wanted = jax.make_jaxpr(lambda key: net.init(key, X))(key)
    draws = [str(j).count("random_bits") for j in (made, wanted)]
    assert draws == [1, 2]  # one weight is drawn, not two
    assert shapes(jax.eval_shape(lambda: net.init(key, X, reuse={a: pa}))) == shapes(fresh)
    whole = net.init(key, X, reuse={net: fresh})
    assert_same_arrays(whole, fresh)


def test_initializers_that_look_at_data_see_the_reused_parts(key):
    a = scaled()

    @jaxstate.parametrized
    def net(x):
        y = a(x)
        return y - jaxstate.param("mean", lambda key, y: y.mean(), y)

    params = net.init(key, X + 3, reuse={a: {"s": jnp.float32(10)}})
    np.testing.assert_allclose(params["mean"], 10 * (X + 3).mean(), rtol=1e-6)


def test_reused_parameters_keep_their_dtype(key):
    a = dense(3)
    net = jaxstate.parametrized(lambda x: dense(3)(a(x)), name="net")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), a.init(key, X))
    params = net.init(key, X, reuse={a: half})
    assert_same_arrays(params["dense"], half)
    assert params["dense_1"]["w"].dtype == jnp.float32


def test_shaped_fixes_the_example(key):
    a, b = dense(5), dense(2)
    net = jaxstate.parametrized(lambda x: b(jnp.tanh(a(x))), name="net")
    shaped = net.shaped(jax.ShapeDtypeStruct(X.shape, X.dtype))
    p = shaped.init(key)
    assert_trees_equal(p, net.init(key, X))
    np.testing.assert_array_equal(shaped.apply(p, X), net.apply(p, X))
    parts = {a: p["dense"], b: p["dense_1"]}
    assert_same_arrays(shaped.parameters_from(parts), p)
    np.testing.assert_array_equal(shaped.apply_from(parts, X[:1]), net.apply(p, X[:1]))
    assert_same_arrays(shaped.init(key, reuse={a: p["dense"]})["dense"], p["dense"])
    assert_same_arrays(a.parameters_from({shaped: p}, X), p["dense"])
    assert repr(shaped) == "<shaped <parametrized net>>"


# -- What is refused -------------------------------------------------------------------------


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_has_no_answer_is_refused_by_name(key):
    a, b = dense(5), dense(2)
    net = jaxstate.parametrized(lambda x: b(jnp.tanh(a(x))), name="net")
    pa = a.init(key, X)
    with pytest.raises(jaxstate.UncoveredParameterError, match=r"(?s)'dense_1/w' \(float32\[5,2\]"):
        net.parameters_from({a: pa}, X)
    with pytest.raises(jaxstate.MissingParameterError, match=r"(?s)'b'.*nearest name is 'bb'"):
        net.parameters_from({a: {"w": pa["w"], "bb": pa["b"]}}, X)
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"(?s)'w'.*float32\[3,4\].*\[3,5\]"):
        net.init(key, X, reuse={a: {**pa, "w": jnp.ones((3, 4))}})
    with pytest.raises(jaxstate.UnusedReuseError, match=r"(?s)nothing in common with 'net'"):
        net.init(key, X, reuse={dense(5): pa})
    for bad in ({3: pa}, {a: [pa]}, pa["w"]):
        with pytest.raises(TypeError, match="reuse wants"):
            net.parameters_from(bad, X)
    unused = scaled()
    params = net.parameters_from({unused: {"s": 1.0}, net: net.init(key, X)}, X)
    assert list(params) == ["dense", "dense_1"]


# -- Explicit init and apply inside a body ---------------------------------------------------


def test_explicit_init_and_apply_have_their_own_parameters_and_keys(key):
    inner = jaxstate.parametrized(
        lambda x: x * jaxstate.param("s", normal, ()) + jaxstate.random.uniform(), name="inner"
    )

    @jaxstate.parametrized
    def outer(x, p1, p2):
        y1 = inner.apply(p1, x, key=jax.random.key(1))
        y2 = jax.jit(inner.apply)(p2, x, key=jax.random.key(2))
        made = inner.init(jax.random.key(3), x)
        y3 = jax.lax.fori_loop(0, 2, lambda i, y: inner.apply(made, y, key=jax.random.key(4)), x)
        y4 = inner(x)  # its own parameters, and the stream of outer
        g = jax.grad(lambda p: inner.apply(p, x, key=jax.random.key(5)))(p1)["s"]
        return jnp.stack([y1, y2, y3, y4, g])

    p1, p2 = {"s": jnp.float32(2)}, {"s": jnp.float32(3)}
    p = outer.init(key, 1.5, p1, p2)
    assert shapes(p) == {"inner": {"s": ()}}

    def draw(key):
        return jax.random.uniform(jax.random.fold_in(key, 0))

    s = inner.init(jax.random.key(3), 1.5)["s"]
    y3 = 1.5
    for _ in range(2):
        y3 = y3 * s + draw(jax.random.key(4))
    wanted = [
        3 + draw(jax.random.key(1)),
        4.5 + draw(jax.random.key(2)),
        y3,
        1.5 * p["inner"]["s"] + draw(key),
        1.5,
    ]
    for f in (outer.apply, jax.jit(outer.apply)):
        np.testing.assert_allclose(f(p, 1.5, p1, p2, key=key), wanted, rtol=1e-6)
