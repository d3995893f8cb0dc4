"""Stacks: one set of parameters per turn of a scan.

Row "layers in a loop" of the acceptance list. The reference is a Python loop over n blocks.
"""

import hashlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.params.networks import (
    assert_trees_close,
    assert_trees_equal,
    dense,
    dense_by_hand,
    lecun,
    normal,
    shapes,
)

N = 4
X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


@jaxstate.parametrized
def block(x, scale=1.0):
    h = jnp.tanh(dense(5)(x))
    return x + scale * dense(3)(h)


def block_by_hand(p, x, scale=1.0):
    h = jnp.tanh(dense_by_hand(p["dense"], x))
    return x + scale * dense_by_hand(p["dense_1"], h)


def loop(params, x, scale=1.0):
    for i in range(N):
        x = block_by_hand(jax.tree.map(lambda p, i=i: p[i], params["layers"]), x, scale)
    return x


def key_of(key, path):
    """The documented key of a parameter."""
    digest = hashlib.sha256(path.encode()).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return key


def test_init_stacks_what_each_layer_would_make(key):
    deep = jaxstate.stack(block, N)
    params = deep.init(key, X)
    assert shapes(params) == {
        "layers": {"dense": {"w": (N, 3, 5), "b": (N, 5)}, "dense_1": {"w": (N, 5, 3), "b": (N, 3)}}
    }
    for i, layer in enumerate(deep.unstack(params)):
        k = jax.random.fold_in(key_of(key, "layers"), i)
        wanted = {
            "dense": {"w": lecun(key_of(k, "dense/w"), (3, 5)), "b": jnp.zeros(5)},
            "dense_1": {"w": lecun(key_of(k, "dense_1/w"), (5, 3)), "b": jnp.zeros(3)},
        }
        assert_trees_close(layer, wanted)
    w = params["layers"]["dense"]["w"]
    assert len({float(x) for x in w[:, 0, 0]}) == N
    assert_trees_equal(jaxstate.stack(block, N + 2).init(key, X)["layers"]["dense"]["w"][:N], w)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert_trees_equal(deep.init(key, shape), params)
    assert_trees_close(jax.jit(deep.init)(key, X), params)
    assert shapes(jax.eval_shape(deep.init, key, shape)) == shapes(params)
    net = jaxstate.parametrized(lambda x: deep(x), name="net")
    w = net.init(key, X)["stack"]["layers"]["dense"]["w"]
    k = jax.random.fold_in(key_of(key, "stack/layers"), 1)
    np.testing.assert_allclose(w[1], lecun(key_of(k, "dense/w"), (3, 5)), rtol=1e-6)


@pytest.mark.parametrize("options", [
    {}, {"checkpoint": True}, {"unroll": 2},
    {"checkpoint": jax.checkpoint_policies.checkpoint_dots},
], ids=["plain", "checkpoint", "unroll", "policy"])  # fmt: skip
def test_apply_and_derivatives_equal_a_python_loop(key, options):
    deep = jaxstate.stack(block, N, **options)
    params = deep.init(key, X)
    f = lambda p, x: (deep.apply(p, x, scale=0.5) ** 2).sum()  # noqa: E731
    g = lambda p, x: (loop(p, x, 0.5) ** 2).sum()  # noqa: E731
    assert_trees_close(deep.apply(params, X), loop(params, X))
    for d in (lambda f: f, jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f, (0, 1)))):
        assert_trees_close(d(f)(params, X), d(g)(params, X))
    lanes = jnp.stack([X, 2 * X])
    assert_trees_close(jax.vmap(f, (None, 0))(params, lanes), jax.vmap(g, (None, 0))(params, lanes))
    jvp = lambda f: jax.jvp(lambda x: f(params, x), (X,), (X,))[1]  # noqa: E731
    assert_trees_close(jvp(f), jvp(g))


def count_equations(jaxpr):
    return sum(
        1 + sum(map(count_equations, jax.extend.core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def test_tracing_takes_as_long_for_a_deep_stack_as_for_one_layer(key):
    traced = []

    @jaxstate.parametrized
    def counted(x):
        traced.append(None)
        return block(x)

    sizes, traces = set(), set()
    for n in (2, 50):
        deep = jaxstate.stack(counted, n)
        params = jax.eval_shape(deep.init, key, X)
        traced.clear()
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: deep.apply(p, X).sum()))(params)
        sizes.add(count_equations(jaxpr.jaxpr))
        traces.add(len(traced))
    assert len(sizes) == len(traces) == 1


def test_checkpoint_keeps_less(key):
    def saved(**options):
        deep = jaxstate.stack(block, 16, **options)
        params = deep.init(key, X)
        _, vjp = jax.vjp(lambda p: deep.apply(p, X), params)
        return sum(x.size for x in jax.tree.leaves(vjp) if x.shape[:1] == (16,))

    assert saved(checkpoint=True) < saved()


def test_draws_are_those_of_a_python_loop(key):
    @jaxstate.parametrized
    def noisy(x):
        return x * jaxstate.param("s", normal, ()) + jaxstate.random.normal(x.shape)

    net = jaxstate.parametrized(
        lambda x, deep=jaxstate.stack(noisy, N): deep(x) + jaxstate.random.normal(), name="net"
    )
    params = net.init(key, X)
    k = jax.random.key(7)

    def by_hand(p, x):
        for i in range(N):
            s = p["stack"]["layers"]["s"][i]
            x = x * s + jax.random.normal(jax.random.fold_in(k, i), x.shape)
        return x + jax.random.normal(jax.random.fold_in(k, N))

    assert_trees_close(net.apply(params, X, key=k), by_hand(params, X))
    f, g = (lambda p, f=f: f(p).sum() for f in (lambda p: net.apply(p, X, key=k),
                                              lambda p: by_hand(p, X)))  # fmt: skip
    assert_trees_close(jax.jit(jax.grad(f))(params), jax.grad(g)(params))
    deep = jaxstate.stack(noisy, N, checkpoint=True)
    with jaxstate.rng_stream(k) as stream:
        jax.grad(lambda p: deep.apply(p, X).sum())(deep.init(key, X))
        assert stream.count == N


def test_streams_of_other_names(key):
    @jaxstate.parametrized
    def dropped(x):
        keep = jaxstate.random.bernoulli(0.5, x.shape, stream="dropout")
        return jnp.where(keep, x, 0) * jaxstate.param("s", normal, ())

    deep = jaxstate.stack(dropped, N)
    keys = {"params": key, "dropout": jax.random.key(3)}
    params = deep.init(keys, X)
    found = deep.apply(params, X, key={"dropout": keys["dropout"]})
    x = X
    for i in range(N):
        keep = jax.random.bernoulli(jax.random.fold_in(keys["dropout"], i), 0.5, X.shape)
        x = jnp.where(keep, x, 0) * params["layers"]["s"][i]
    np.testing.assert_allclose(found, x, rtol=1e-6)


def test_unstack_and_restack(key):
    deep = jaxstate.stack(block, N)
    params = deep.init(key, X)
    layers = deep.unstack(params)
    x = X
    for p in layers:
        x = block.apply(p, x)
    np.testing.assert_allclose(deep.apply(params, X), x, rtol=1e-5)
    assert_trees_equal(deep.restack(layers), params)
    blocks = [block.init(jax.random.key(i), X) for i in range(N)]
    assert_trees_equal(deep.unstack(deep.restack(blocks)), blocks)
    with pytest.raises(ValueError, match="has 4 layers, and was given 3"):
        deep.restack(layers[1:])


def test_trees_as_carry_stacks_of_stacks_and_reuse(key):
    @jaxstate.parametrized
    def cell(state, by):
        w = jaxstate.param("w", normal, (3,))
        return {"h": state["h"] * w + by, "n": state["n"] + 1}

    inner = jaxstate.stack(cell, 2, name="inner")
    outer = jaxstate.stack(inner, 3)
    state = {"h": X, "n": jnp.int32(0)}
    params = outer.init(key, state, 2.0)
    assert shapes(params) == {"layers": {"layers": {"w": (3, 2, 3)}}}
    h = X
    for i in range(3):
        for j in range(2):
            h = h * params["layers"]["layers"]["w"][i, j] + 2.0
    found = outer.apply(params, state, 2.0)
    assert_trees_close(found, {"h": h, "n": jnp.int32(6)})

    deep = jaxstate.stack(block, N)
    net = jaxstate.parametrized(lambda x: dense(2)(deep(x)), name="net")
    p = deep.init(jax.random.key(1), X)
    params = net.init(key, X, reuse={deep: p})
    assert_trees_equal(params["stack"], p)
    assert_trees_equal(deep.parameters_from({net: params}, X), p)


def test_stacks_inside_transformations(key):
    deep = jaxstate.stack(block, N)

    @jaxstate.parametrized
    def net(x):
        x = jax.lax.fori_loop(0, 2, lambda i, x: deep(x), x)
        return jax.jit(jax.checkpoint(deep))(x)

    params = net.init(key, X)
    wanted = X
    for _ in range(3):
        wanted = loop(params["stack"], wanted)
    assert_trees_close(net.apply(params, X), wanted)


def custom_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (3 * ct,))
    return g


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), 3 * tangents[0]))
    return g


@pytest.mark.parametrize("rule", [custom_vjp, custom_jvp])
def test_stacks_are_made_inside_functions_with_custom_rules(key, rule):
    deep = jaxstate.stack(block, N)

    @jaxstate.parametrized
    def net(x):
        return jax.lax.fori_loop(0, 2, lambda i, x: rule(deep)(x), rule(deep)(x))

    params = net.init(key, X)
    assert_trees_close(params, jaxstate.parametrized(lambda x: deep(x), name="net").init(key, X))
    wanted = X
    for _ in range(3):
        wanted = loop(params["stack"], wanted)
    assert_trees_close(net.apply(params, X), wanted)
    slope = jax.grad(lambda x: rule(lambda x: net.apply(params, x))(x).sum())(X)
    assert_trees_close(slope, jnp.full_like(X, 3.0))


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_is_refused(key):
    for bad in (0, -1, 2.0):
        with pytest.raises(ValueError, match="number of layers"):
            jaxstate.stack(block, bad)
    for bad in ("yes", 1, None):
        with pytest.raises(TypeError, match="checkpoint is True, False or a policy"):
            jaxstate.stack(block, 2, checkpoint=bad)
    with pytest.raises(TypeError, match="wants a parametrized object"):
        jaxstate.stack(lambda x: x, 2)
    wider = jaxstate.stack(dense(7), 2)
    with pytest.raises(TypeError, match="into the next one"):
        wider.init(key, X)
    centered = jaxstate.parametrized(
        lambda x: x - jaxstate.param("mean", lambda key, x: x.mean(0), x), name="centered"
    )
    with pytest.raises(jaxstate.InitializerDataError, match="only its shape"):
        jaxstate.stack(centered, 2).init(key, X)
    deep = jaxstate.stack(block, N)
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"layers.*float32\[3,3,5\]"):
        deep.apply(jaxstate.stack(block, 3).init(key, X), X)


# -- Variables -------------------------------------------------------------------------------


@jaxstate.parametrized
def averaging(x):
    w = jaxstate.param("w", normal, (3, 3))
    start = jaxstate.variable("start", lambda: 2 * w)
    with jaxstate.scope("statistics"):
        mean = jaxstate.variable("mean", jnp.zeros, (3,))
    mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
    return jnp.tanh(x @ (w + start.value) + jaxstate.random.normal(x.shape)) + mean.value


def averaging_by_hand(params, state, x, key):
    """The stack of `averaging`, as a Python loop with its state handed on by hand."""
    means = []
    for i in range(N):
        w, start = params["layers"]["w"][i], state["variables"]["start"][i]
        mean = 0.9 * state["variables"]["statistics"]["mean"][i] + 0.1 * x.mean(0)
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        x = jnp.tanh(x @ (w + start) + noise) + mean
        means.append(mean)
    start = state["variables"]["start"]
    return x, {"variables": {"start": start, "statistics": {"mean": jnp.stack(means)}}}


def test_variables_of_a_block_are_those_of_each_layer(key):
    deep = jaxstate.stack(averaging, N)
    params, state = deep.init_with_state(key, X)
    assert_trees_equal(params, deep.init(key, X))
    w = params["layers"]["w"]
    assert_trees_close(
        state, {"variables": {"start": 2 * w, "statistics": {"mean": jnp.zeros((N, 3))}}}
    )
    by_hand = state
    for k in jax.random.split(key, 2):
        out, state = jax.jit(deep.apply_with_state)(params, state, X, key=k)
        wanted, by_hand = averaging_by_hand(params, by_hand, X, k)
        assert_trees_close((out, state), (wanted, by_hand))
    assert shapes(jax.eval_shape(deep.init_with_state, key, X)[1]) == shapes(state)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=["plain", "checkpoint"])
def test_derivatives_with_variables(key, options):
    deep = jaxstate.stack(averaging, N, **options)
    params, state = deep.init_with_state(key, X)

    def loss(f):
        def value(params, state, x):
            out, state = f(params, state, x)
            return (out**2).sum() + state["variables"]["statistics"]["mean"].sum()

        return jax.grad(value, (0, 1, 2))(params, state, X)

    assert_trees_close(
        loss(lambda *a: deep.apply_with_state(*a, key=key)),
        loss(lambda *a: averaging_by_hand(*a, key)),
        rtol=1e-4,
    )


def test_variables_of_a_stack_inside_a_network_and_a_loop(key):
    deep = jaxstate.stack(averaging, N)
    net = jaxstate.parametrized(
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: deep(x), x), name="net"
    )
    params, state = net.init_with_state(key, X)
    assert_trees_close(state["stack"]["variables"]["start"], 2 * params["stack"]["layers"]["w"])
    out, after = net.apply_with_state(params, state, X, key=key)
    wanted, by_hand = X, state["stack"]
    for i in range(2):
        means = []
        for j in range(N):
            w = 3 * params["stack"]["layers"]["w"][j]
            mean = 0.9 * by_hand["variables"]["statistics"]["mean"][j] + 0.1 * wanted.mean(0)
            noise = jax.random.normal(jax.random.fold_in(key, i * N + j), X.shape)
            wanted = jnp.tanh(wanted @ w + noise) + mean
            means.append(mean)
        by_hand = {"variables": {**by_hand["variables"], "statistics": {"mean": jnp.stack(means)}}}
    assert_trees_close((out, after), (wanted, {"stack": by_hand}))


def test_summary_of_a_stack_with_variables_and_draws(key):
    deep = jaxstate.stack(averaging, N)
    rows = jaxstate.parametrized(lambda x: deep(x), name="net").summary(key, X).rows
    assert [(row.path, row.shape) for row in rows] == [("stack/layers/w", (N, 3, 3))]


def test_variables_that_are_only_read(key):
    @jaxstate.parametrized
    def shifted(x):
        return x + jaxstate.variable("shift", jnp.zeros, (3,)).value

    deep = jaxstate.stack(shifted, N)
    shift = jnp.arange(12.0).reshape(N, 3)
    out = deep.apply({"layers": {}}, X, state={"variables": {"shift": shift}})
    np.testing.assert_allclose(out, X + shift.sum(0), rtol=1e-6)
    with pytest.raises(jaxstate.MissingVariableError):
        deep.apply({"layers": {}}, X)


def test_variables_that_cannot_be_written(key):
    deep = jaxstate.stack(averaging, N)
    params, state = deep.init_with_state(key, X)
    with pytest.raises(jaxstate.ReadOnlyVariableError, match="'mean'"):
        deep.apply(params, X, key=key, state=state)
    net = jaxstate.parametrized(lambda xs: jax.vmap(deep)(xs), name="net")
    lanes, params, state = jnp.stack([X, 2 * X]), {"stack": params}, {"stack": state}
    with pytest.raises(jaxstate.LaneWriteError, match="stack/variables/statistics/mean"):
        net.apply_with_state(params, state, lanes, key=key)
