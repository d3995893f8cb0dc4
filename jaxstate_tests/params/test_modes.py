"""What a function does only at times: draws from a stream that may be closed, writes what may be
read only, follows a user context. And the keys that one key of `init` is enough for.

The reference is the function that does it, or does not, with its keys in arguments.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import jaxstate
from jaxstate_tests.params.networks import assert_trees_close, normal
from jaxstate_tests.params.test_stack import key_of

X = jnp.linspace(0.5, 1.0, 3)


def with_rule(f):
    f = jax.custom_vjp(f)
    f.defvjp(lambda x: jax.vjp(f.fun, x), lambda pullback, ct: pullback(ct))
    return f


def sharded(f):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                         check_vma=False)  # fmt: skip


# Each with the keys that its draws get, from that of the stream.
fold = jax.random.fold_in
WRAP = {
    "here": (lambda f: f, lambda k: [fold(k, 0)]),
    "jit": (jax.jit, lambda k: [fold(k, 0)]),
    "scan": (lambda f: lambda x: lax.scan(lambda x, _: (f(x), None), x, length=2)[0],
             lambda k: [fold(k, 0), fold(k, 1)]),
    "while": (lambda f: lambda x: lax.while_loop(lambda c: c[0] < 2,
                                                 lambda c: (c[0] + 1, f(c[1])), (0, x))[1],
              lambda k: [fold(k, 0), fold(k, 1)]),
    "cond": (lambda f: lambda x: lax.cond(x[0] > 9, lambda x: x, f, x), lambda k: [fold(k, 0)]),
    "vmap": (lambda f: lambda x: jax.vmap(f)(x[None])[0],
             lambda k: [fold(fold(fold(k, 0), 0), 0)]),
    "checkpoint": (jax.checkpoint, lambda k: [fold(k, 0)]),
    "custom_vjp": (with_rule, lambda k: [fold(k, 0)]),
    "shard_map": (sharded, lambda k: [fold(fold(fold(k, 0), 0), 0)]),
}  # fmt: skip


def mostly_slow(all_cases, *quick):
    return [pytest.param(x, marks=() if x in quick else pytest.mark.slow) for x in all_cases]


@pytest.mark.parametrize("where", mostly_slow(WRAP, "jit", "scan", "custom_vjp"))
def test_dropout_is_on_where_its_stream_is_open(where, key):
    def dropout(x):
        k = jaxstate.next_key("dropout", default=None)
        return jnp.sin(x) if k is None else x * jax.random.uniform(k, x.shape)

    wrap, keys = WRAP[where]
    run = wrap(dropout)

    def loss(x):
        y = run(x)
        return y.sum(), y

    def by_hand(x):
        y = x
        for k in keys(key):
            y = y * jax.random.uniform(k, x.shape) if is_open else jnp.sin(y)
        return y.sum(), y

    def values(f):
        runs = [f] if where == "while" else [f, jax.jit(jax.grad(f, has_aux=True))]
        found = []
        for run in runs:
            with jaxstate.rng_stream(key, "dropout" if is_open else "other"):
                found.append(run(X))
        return found

    for is_open in (False, True, False):  # the functions are cached by the time they change
        assert_trees_close(values(loss), values(jax.jit(lambda x, is_open=is_open: by_hand(x))))


def test_the_default_is_what_is_returned_and_other_streams_do_not_count(key):
    default = object()
    with jaxstate.rng_stream(key, "other") as other:
        assert jaxstate.next_key("dropout", default=default) is default
        assert jaxstate.next_key(default=None) is None
        assert other.count == 0
    with pytest.raises(jaxstate.MissingStreamError):
        jaxstate.next_key("dropout")
    with pytest.raises(TypeError, match="takes no key"):
        jaxstate.next_key(key, default=None)


def test_apply_draws_if_it_is_given_a_key(key):
    @jaxstate.parametrized
    def net(x):
        k = jaxstate.next_key("dropout", default=None)
        return x * jaxstate.param("s", normal, ()) * (1 if k is None else jax.random.uniform(k))

    deep = jaxstate.stack(net, 2)
    params = deep.init(key, X)
    s = params["layers"]["s"]
    for apply in (deep.apply, jax.jit(deep.apply)):
        np.testing.assert_allclose(apply(params, X), X * s[0] * s[1], rtol=1e-6)
        u = [jax.random.uniform(fold(key, i)) for i in range(2)]
        wanted = X * s[0] * s[1] * u[0] * u[1]
        np.testing.assert_allclose(apply(params, X, key={"dropout": key}), wanted, rtol=1e-6)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_a_kernel_draws_nothing_and_says_so_if_it_should(key):
    def add(x, y):
        k = jaxstate.next_key("dropout", default=None)
        return x + y if k is None else x * y

    def total(x):
        return lax.reduce(x, np.float32(0), add, (0,))

    with jaxstate.rng_stream(key):
        np.testing.assert_allclose(total(X), X.sum(), rtol=1e-6)
    with (
        jaxstate.rng_stream(key, "dropout"),
        pytest.raises(jaxstate.UnsupportedPrimitiveError, match="which is a kernel"),
    ):
        total(X)


# -- Keys of init ----------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "kind"), [
    ("scan", jax.random.key),
    *(pytest.param(where, kind, marks=pytest.mark.slow) for where, kind in (
        ("here", jax.random.PRNGKey), ("jit", jax.random.key), ("checkpoint", jax.random.PRNGKey),
        ("custom_vjp", jax.random.key),
    )),
])  # fmt: skip
def test_one_key_of_init_is_enough_for_streams_and_variables(where, kind):
    @jaxstate.parametrized
    def part(x):
        jaxstate.next_key("noise")
        u = jaxstate.variable("u", normal, (3,), takes_key=True)
        own = jaxstate.variable("own", lambda key, n: [jax.random.bits(key), jnp.zeros(n)], 2,
                                takes_key=True)  # fmt: skip
        u.value = u.value + 1
        return x * u.value * jaxstate.param("w", normal, (3,)) + own.value[1].sum()

    @jaxstate.parametrized
    def net(x):
        drawn = jaxstate.random.normal((3,), stream="noise")
        start = jaxstate.param("start", lambda key, drawn: drawn, drawn)
        return WRAP[where][0](part)(x + start)

    key = kind(3)
    params, state = net.init_with_state(key, X)
    noise = fold(key_of(key, "/noise"), 0)
    np.testing.assert_array_equal(params["start"], jax.random.normal(noise, (3,)))
    assert_trees_close(params["part"]["w"], normal(key_of(key, "part/w"), (3,)))
    assert_trees_close(state["part"]["u"], normal(key_of(key, "part/u"), (3,)))
    assert state["part"]["own"][0] == jax.random.bits(key_of(key, "part/own"))
    assert_trees_close(jax.jit(net.init_with_state)(key, X), (params, state))
    # Given streams are not replaced, and apply needs no key for a variable.
    given, _ = net.init_with_state({"params": key, "noise": kind(5)}, X)
    np.testing.assert_array_equal(given["start"], jax.random.normal(fold(kind(5), 0), (3,)))
    with jaxstate.rng_stream(kind(5), "noise"):
        outside, _ = net.init_with_state(key, X)
        np.testing.assert_array_equal(outside["start"], given["start"])
    _, after = net.apply_with_state(params, state, X, key={"noise": key})
    turns = 2 if where == "scan" else 1
    assert_trees_close(after["part"]["u"], state["part"]["u"] + turns)


def test_streams_of_init_in_lanes_and_on_devices(key):
    """An initial value that looks at draws shows them."""

    @jaxstate.parametrized
    def net(x):
        drawn = jax.vmap(lambda x: jaxstate.random.normal(stream="noise"))(x)
        shared = jax.jacfwd(lambda x: x * jaxstate.random.normal(stream="noise"))(1.0)
        sharded(lambda x: x + jaxstate.random.normal(stream="noise"))(x)
        return jaxstate.param("w", lambda key, *x: jnp.concatenate(x), drawn, shared[None])

    noise = key_of(key, "/noise")
    lanes = [jax.random.normal(fold(fold(fold(noise, 0), i), 0)) for i in range(3)]
    wanted = [*lanes, jax.random.normal(fold(noise, 1))]
    np.testing.assert_allclose(net.init(key, X)["w"], jnp.stack(wanted), rtol=1e-6)
    assert [row.path for row in net.summary(key, X).rows] == ["w"]
    assert net.metadata(X) == {"w": {}}


def test_the_key_of_a_name_is_documented(key):
    """By the digest of the name after a slash, whose first 8 bytes are folded in."""
    digest = hashlib.sha256(b"/noise").digest()
    wanted = key
    for word in np.frombuffer(digest[:8], "<u4"):
        wanted = fold(wanted, word)
    assert key_of(key, "/noise") == wanted


def test_streams_have_strings_as_names(key):
    net = jaxstate.parametrized(lambda x: x)
    for wrong in (3, None, ("a",)):
        with pytest.raises(TypeError, match="init wants a dict from names of streams to keys"):
            net.init({"params": key, wrong: key}, X)
        for run in (
            net.apply,
            jax.jit(lambda *given, k=wrong, **_: net.apply(*given, key={k: key})),
        ):
            with pytest.raises(TypeError, match="apply wants a dict from names of streams to keys"):
                run({}, X, key={wrong: key})


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_an_initializer_that_takes_no_key(key):
    net = jaxstate.parametrized(lambda x: jaxstate.variable("u", 3, takes_key=True))
    with pytest.raises(TypeError, match=r"wants a function init\(key, \*init_args\)"):
        net.init(key, X)
    net = jaxstate.parametrized(lambda x: jaxstate.variable("u", normal, (3,)).value)
    with pytest.raises(TypeError):
        net.init_with_state(key, X)


# -- Modes -----------------------------------------------------------------------------------

training = jax.make_user_context(default_value=False)


@pytest.mark.parametrize(
    "where",
    mostly_slow(["here", "jit", "scan", "cond", "vmap", "checkpoint", "stack"], "scan", "stack"),
)
def test_a_user_context_is_a_mode_that_caches_know(where, key):
    @jaxstate.parametrized
    def layer(x):
        steps = jaxstate.variable("steps", jnp.zeros, ())
        if training.value:
            steps.value += 1
            return 2 * x + steps.value
        return 3 * x

    deep = jaxstate.stack(layer, 2)
    f = (lambda x: deep(x)) if where == "stack" else WRAP[where][0](layer)
    net = jaxstate.parametrized(f, name="net")
    params, state = net.init_with_state(key, X)
    apply = jax.jit(net.apply_with_state)
    turns = 2 if where in ("scan", "stack") else 1
    for is_training in (False, True, False, True):
        with training(is_training):
            for run in (net.apply_with_state, apply):
                y, after = run(params, state, X)
                (steps,) = jax.tree.leaves(after)
                if not is_training:
                    np.testing.assert_allclose(y, X * 3**turns, rtol=1e-6)
                    assert not steps.any()
                    continue
                wanted = X
                for turn in range(turns):
                    wanted = 2 * wanted + (1 if where == "stack" else turn + 1)
                np.testing.assert_allclose(y, wanted, rtol=1e-6)
                assert steps.sum() == turns


def test_a_user_context_around_draws_at_top_level(key):
    @jax.jit
    def noisy(x):
        return x + jaxstate.random.normal() if training.value else x

    with jaxstate.rng_stream(key) as stream:
        for _ in range(2):
            assert noisy(1.0) == 1.0
            with training(True):
                wanted = 1.0 + jax.random.normal(fold(key, stream.count))
                np.testing.assert_allclose(noisy(1.0), wanted, rtol=1e-6)
        assert stream.count == 2
