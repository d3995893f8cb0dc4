"""Ensembles: the reference is `jax.vmap` of a network that is given its parameters and state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.params.networks import (
    assert_trees_close,
    assert_trees_equal,
    dense,
    dense_by_hand,
    normal,
    shapes,
)
from jaxstate_tests.params.test_stack import key_of

N = 3
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
XS = jnp.stack([X, 2 * X, 3 * X])


@jaxstate.parametrized
def net(x, scale=1.0):
    return scale * jnp.tanh(dense(4)(x))


def net_by_hand(p, x, scale=1.0):
    return scale * jnp.tanh(dense_by_hand(p["dense"], x))


def member_keys(key, path="members"):
    return jax.vmap(jax.random.fold_in, (None, 0))(key_of(key, path), jnp.arange(N))


def test_init_is_that_of_each_member(key):
    several = jaxstate.ensemble(net, N)
    params = several.init(key, jax.ShapeDtypeStruct(X.shape, X.dtype))
    by_hand = jax.vmap(net.init, (0, None))(member_keys(key), X)
    assert_trees_close(params, {"members": by_hand})
    assert shapes(jax.eval_shape(several.init, key, X)) == shapes(params)
    outer = jaxstate.parametrized(lambda x: several(x), name="outer")
    inside = jax.jit(outer.init)(key, X)["ensemble"]["members"]
    by_hand = jax.vmap(net.init, (0, None))(member_keys(key, "ensemble/members"), X)
    assert_trees_close(inside, by_hand)


WRAP = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda x: lax.scan(lambda x, _: (f(x).mean(0), None), x, length=2)[0],
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, -x])),
    "cond": lambda f: lambda x: lax.cond(x.sum() < 9, f, lambda x: jnp.stack([x] * N), x),
}


@pytest.mark.parametrize("wrap", WRAP)
def test_apply_and_derivatives_are_those_of_vmap(key, wrap):
    several = jaxstate.ensemble(net, N)
    outer = jaxstate.parametrized(lambda x: WRAP[wrap](lambda x: several(x, scale=0.5))(x))
    params = outer.init(key, X)

    def by_hand(p, x):
        members = lambda x: jax.vmap(lambda p: net_by_hand(p, x, 0.5))(p["ensemble"]["members"])  # noqa: E731
        return WRAP[wrap](members)(x)

    assert_trees_close(outer.apply(params, X), by_hand(params, X))
    slopes = [jax.jit(jax.grad(lambda p, x, f=f: (f(p, x) ** 2).sum(), (0, 1)))(params, X)
              for f in (outer.apply, by_hand)]  # fmt: skip
    assert_trees_close(*slopes)


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), jnp.stack([3 * tangents[0]] * N)))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (3 * ct.sum(0),))
    return g


@pytest.mark.parametrize("rule", [custom_jvp, custom_vjp])
def test_members_are_made_inside_functions_with_custom_rules(key, rule):
    @jaxstate.parametrized
    def counting(x):
        turns = jaxstate.variable("turns", normal, (), takes_key=True)
        turns.value += 1
        return turns.value * jnp.tanh(x @ jaxstate.param("w", normal, (4, 4)))

    several = jaxstate.ensemble(counting, N)
    outer = jaxstate.parametrized(lambda x: rule(several)(x), name="outer")
    plain = jaxstate.parametrized(lambda x: several(x), name="outer")
    params, state = outer.init_with_state(key, X)
    assert_trees_close((params, state), plain.init_with_state(key, X))

    def loss(x):
        out = outer.apply_with_state(params, state, x)
        return out[0].sum(), out

    slope, out = jax.jit(jax.grad(loss, has_aux=True))(X)
    after = {"ensemble": {"variables": {"turns": state["ensemble"]["variables"]["turns"] + 1}}}
    w, turns = params["ensemble"]["members"]["w"], after["ensemble"]["variables"]["turns"]
    assert_trees_close(out, (turns[:, None, None] * jnp.tanh(X @ w), after))
    assert_trees_close(slope, jnp.full_like(X, 3.0 * N))


IN_AXES = {
    "shared": (None, (None, None), X, 2.0),
    "all": (0, (0, 0), XS, jnp.arange(3.0)),
    "one": ((0, None), (0, None), XS, 2.0),
    "another axis": ((None, 1), (None, 1), X, jnp.ones((2, 3))),
    "a tree": (({"x": 0, "y": None}, None), ({"x": 0, "y": None}, None), {"x": XS, "y": X}, 2.0),
}


@pytest.mark.parametrize("axes", IN_AXES)
def test_arguments_of_each_member(key, axes):
    @jaxstate.parametrized
    def net(x, y):
        x = x["x"] + x["y"] if isinstance(x, dict) else x
        mean = jaxstate.param("mean", lambda key, x: x.mean(0), x)  # looks at a member's own data
        return (x - mean) @ jaxstate.param("w", normal, (4, 2)) * y.sum()

    in_axes, by_argument, x, y = IN_AXES[axes]
    x, y = jax.tree.map(jnp.asarray, (x, y))
    several = jaxstate.ensemble(net, N, in_axes)
    params = several.init(key, x, y)
    wanted = jax.vmap(net.init, (0, *by_argument))(member_keys(key), x, y)
    assert_trees_close(params, {"members": wanted})
    assert_trees_close(
        several.apply(params, x, y), jax.vmap(net.apply, (0, *by_argument))(wanted, x, y)
    )


def test_static_arguments_stay_what_they_are(key):
    @jaxstate.parametrized
    def net(x, mode, *, scale):
        assert mode == "train" and scale == 2
        return x * jaxstate.param("s", normal, ()) * scale

    several = jaxstate.ensemble(net, N, (0, None))
    params = several.init(key, XS, "train", scale=2)
    s = params["members"]["s"][:, None, None]
    np.testing.assert_allclose(several.apply(params, XS, "train", scale=2), 2 * s * XS, rtol=1e-6)


# -- Variables, draws, collectives -----------------------------------------------------------


@jaxstate.parametrized
def tracked(x):
    w = jaxstate.param("w", normal, (4, 4))
    start = jaxstate.variable("start", lambda: 2 * w)
    noise = jaxstate.variable("noise", normal, (4,), takes_key=True)
    mean = jaxstate.variable("mean", jnp.zeros, (4,))
    x = jnp.tanh(x @ (w + start.value) + jaxstate.random.normal(x.shape)) + noise.value
    mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
    return x + mean.value


def tracked_by_hand(params, state, x, key):
    def member(p, s, i):
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), 0), x.shape)
        y = jnp.tanh(x @ (p["w"] + s["start"]) + noise) + s["noise"]
        mean = 0.9 * s["mean"] + 0.1 * y.mean(0)
        return y + mean, {**s, "mean": mean}

    y, state = jax.vmap(member)(params["members"], state["variables"], jnp.arange(N))
    return y, {"variables": state}


def test_each_member_has_its_own_variables_and_draws(key):
    several = jaxstate.ensemble(tracked, N)
    params, state = jax.jit(several.init_with_state)(key, X)
    noise = [normal(key_of(k, "noise"), (4,)) for k in member_keys(key, "variables")]
    wanted = {"start": 2 * params["members"]["w"], "noise": jnp.stack(noise),
              "mean": jnp.zeros((N, 4))}  # fmt: skip
    assert_trees_close(state, {"variables": wanted})

    def with_slopes(f):
        def loss(p, s):
            out = f(p, s)
            return sum(map(jnp.sum, jax.tree.leaves(out))), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, state)

    # The members share one draw of the stream outside.
    assert_trees_close(
        with_slopes(lambda p, s: several.apply_with_state(p, s, X, key=key)),
        with_slopes(lambda p, s: tracked_by_hand(p, s, X, jax.random.fold_in(key, 0))),
    )


def test_members_in_a_stack_and_stacks_in_members(key):
    scaled = jaxstate.parametrized(lambda x: x * jaxstate.param("s", normal, ()), name="scaled")
    voting = jaxstate.parametrized(
        lambda x, several=jaxstate.ensemble(scaled, N): several(x).mean(0), name="voting"
    )
    deep = jaxstate.stack(voting, 2)
    params = deep.init(key, X)
    s = params["layers"]["ensemble"]["members"]["s"]
    assert s.shape == (2, N)
    np.testing.assert_allclose(deep.apply(params, X), X * s.mean(1).prod(), rtol=1e-5)

    several = jaxstate.ensemble(jaxstate.stack(scaled, 2), N)
    params = several.init(key, X)
    s = params["members"]["layers"]["s"]
    np.testing.assert_allclose(several.apply(params, X), X * s.prod(1)[:, None, None], rtol=1e-5)


def test_collectives_between_members(key):
    centered = jaxstate.parametrized(
        lambda x: (y := x * jaxstate.param("s", normal, ())) - lax.pmean(y, "members")
    )
    several = jaxstate.ensemble(centered, N, axis_name="members")
    params = several.init(key, X)
    y = X * params["members"]["s"][:, None, None]
    np.testing.assert_allclose(several.apply(params, X), y - y.mean(0), atol=1e-6)


def test_unstack_and_restack(key):
    several = jaxstate.ensemble(tracked, N)
    params, state = jax.jit(several.init_with_state)(key, X)
    members, states = several.unstack(params), several.unstack(state)
    assert_trees_equal(members[1], jax.tree.map(lambda x: x[1], params["members"]))
    assert_trees_equal(states[2], jax.tree.map(lambda x: x[2], state["variables"]))
    assert_trees_equal(several.restack(members), params)
    assert_trees_equal(several.restack(states, variables=True), state)
    trained = [tracked.init(jax.random.key(i), X) for i in range(N)]
    loaded = several.init(key, X, reuse={several: several.restack(trained)})
    assert_trees_equal(several.unstack(loaded), trained)
    with pytest.raises(ValueError, match="has 3 members, and was given 2"):
        several.restack(members[1:])
    for wrong in (None, [1], {"layers": params["members"]}, {"ensemble": params}):
        with pytest.raises(TypeError, match="unstack wants the parameters as init makes them"):
            several.unstack(wrong)
    for wrong in (jnp.ones((4, 2)), 1.0):  # of another ensemble, or of none
        with pytest.raises(ValueError, match=r"has 3 members, and was given 'members/w' of shape"):
            several.unstack({"members": {"w": wrong}})
    for wrong in (None, 3, params):
        with pytest.raises(TypeError, match="restack wants a list of trees"):
            several.restack(wrong)
    for other in ({"w": members[0]["w"], "b": 1.0}, {"w": jnp.ones(3)}):
        with pytest.raises(ValueError, match="alike: number 2 is"):
            several.restack([*members[:2], other])
    assert jaxstate.ensemble(tracked, np.int64(N)).n == N


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_is_refused(key):
    for bad in (0, -1, 2.0, None, True):
        with pytest.raises(ValueError, match="number of members"):
            jaxstate.ensemble(net, bad)
    with pytest.raises(TypeError, match=r"ensemble wants a parametrized object.*"):
        jaxstate.ensemble(lambda x: x, 2)
    with pytest.raises(ValueError, match=r"in_axes=\(0, None\).*called with 1 positional"):
        jaxstate.ensemble(net, N, (0, None)).init(key, XS)
    for bad in ("x", {"x": 0}, 1.0):
        with pytest.raises(TypeError, match=r"in_axes=.*wants None, an integer, or a tuple"):
            jaxstate.ensemble(net, N, bad).init(key, XS)
    with pytest.raises(ValueError, match=r"inconsistent sizes|axis"):
        jaxstate.ensemble(net, N, 0).init(key, X)
    tracked_members = jaxstate.ensemble(tracked, N)
    params, state = jax.jit(tracked_members.init_with_state)(key, X)
    two = jax.tree.map(lambda x: x[:2], params)
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"members.*float32\[2,4,4\]"):
        tracked_members.apply(two, X, key=key, state=state)
    lanes = jaxstate.parametrized(lambda xs: jax.vmap(tracked_members)(xs), name="lanes")
    with pytest.raises(jaxstate.LaneWriteError, match="ensemble/variables/mean"):
        lanes.apply_with_state({"ensemble": params}, {"ensemble": state}, XS, key=key)
