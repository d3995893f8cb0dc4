"""One function that modules and scopes share, with parameters of other types in each."""

import types

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.sampling import part_of_product

# -- Types that a jaxpr was traced for ---------------------------------------------------------


SHARED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "scan": lambda f: (
        lambda body: lambda x: jax.lax.scan(body, x, None, length=1)[0]
    )(lambda x, _: (f(x), None)),
    "fori_loop": lambda f: (lambda body: lambda x: jax.lax.fori_loop(0, 1, body, x))(
        lambda i, x: f(x)
    ),
    "while_loop": lambda f: (
        lambda cond, body: lambda x: jax.lax.while_loop(cond, body, (0, x))[1]
    )(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1]))),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() < 1e9, f, f, x),
    "vmap": lambda f: (lambda g: lambda x: jax.vmap(g)(x[None])[0])(jax.jit(f)),
    "grad": lambda f: (lambda g: lambda x: x + jax.grad(lambda x: g(x).sum())(x))(jax.jit(f)),
    "custom_jvp": lambda f: with_rule(jax.jit(f)),
}  # fmt: skip


def with_rule(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


class Layer:
    def __init__(self, f):
        self.f = f

    @jaxstate.parametrized(name="layer")
    def __call__(self, x):
        return self.f(x)


def scopes_of(f):
    """Programs that use one function in the scopes "a", "b" and "a" again."""

    def by_hand(x):
        for name in ("a", "b", "a"):
            with jaxstate.scope(name):
                x = f(x)
        return x

    def modules(x):
        a, b = (jaxstate.parametrized(lambda x: f(x), name=name) for name in "ab")
        return a(b(a(x)))

    def instances(x):
        a, b = Layer(f), Layer(f)
        return a(b(a(x)))

    def nested(x):
        with jaxstate.scope("deep"), jaxstate.scope("er"):
            return by_hand(x)

    return {
        "scopes": by_hand,
        "modules": modules,
        "instances": instances,
        "in jit": jax.jit(by_hand),
        "in a loop": lambda x: jax.lax.fori_loop(0, 1, lambda i, x: modules(x), x),
        "nested": nested,
    }


W = jnp.arange(9.0).reshape(3, 3) / 8  # exact in all dtypes that are used


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("wrap, program", part_of_product(2, SHARED, scopes_of(None)))
def test_a_function_that_scopes_with_parameters_of_other_types_share(wrap, program, key):
    def layer(x):
        return x + (x @ jaxstate.param("w", jax.nn.initializers.ones, (3, 3))).astype(x.dtype)

    net = jaxstate.parametrized(scopes_of(SHARED[wrap](layer))[program], name="net")
    x = jnp.ones(3)
    params = net.init(key, x)
    tree = jax.tree.structure(params)
    for dtypes in [(jnp.float32, jnp.bfloat16), (jnp.float16,) * 2]:
        a, b = (W.astype(dtype) for dtype in dtypes)

        def by_hand(a, b, x):
            for w in (a, b, a):
                f = lambda x, w=w: x + (x @ w).astype(x.dtype)  # noqa: E731
                x = x + jax.grad(lambda x, f=f: f(x).sum())(x) if wrap == "grad" else f(x)
            return x

        for apply in (net.apply, jax.jit(net.apply)):
            found, wanted = apply(tree.unflatten([a, b]), x), by_hand(a, b, x)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_scopes_with_parameters_of_the_same_types_share_one_trace(key):
    traced = []

    @jax.jit
    def layer(x):
        traced.append(1)
        return x @ jaxstate.param("w", jax.nn.initializers.ones, (3, 3)).astype(x.dtype)

    @jaxstate.parametrized
    def net(x):
        for i in range(6):
            with jaxstate.scope(f"layer{i}"):
                x = layer(x)
        return x

    params = net.init(key, jnp.ones(3))
    del traced[:]
    net.apply(params, jnp.ones(3))
    assert len(traced) == 1
    for i in (1, 3, 5):
        params[f"layer{i}"]["w"] = params[f"layer{i}"]["w"].astype(jnp.bfloat16)
    net.apply(params, jnp.ones(3))
    assert len(traced) == 3


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("shared", ["jit", "scan", "checkpoint"])
def test_a_function_shared_by_scopes_with_weak_and_strong_parameters(shared):
    f = SHARED[shared](lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ()))

    def both(x):
        with jaxstate.scope("a"):
            a = f(x) if shared != "scan" else f(x).astype(jnp.bfloat16)
        with jaxstate.scope("b"):
            return a, f(x)

    net = jaxstate.parametrized(both, name="net")
    x, weak, strong = jnp.bfloat16(1), 2.0, jnp.bfloat16(3)
    for a, b in ((weak, weak), (strong, strong), (weak, strong), (strong, weak)):
        assert net.apply({"a": {"w": a}, "b": {"w": b}}, x) == (a, b)


def test_variables_of_other_types_in_scopes_that_share_a_function(key):
    @jax.jit
    def f(x):
        v = jaxstate.variable("v", jnp.zeros, ())
        v.value = v.value + 1
        return x + v.value

    def both(x):
        for name in "aba":
            with jaxstate.scope(name):
                x = f(x)
        return x

    net = jaxstate.parametrized(both, name="net")
    state = {"a": {"v": jnp.float32(1)}, "b": {"v": jnp.int32(2)}}
    y, new = net.apply_with_state({}, state, 0.0)
    assert y == 2 + 3 + 3 and new == {"a": {"v": 3}, "b": {"v": 3}}
    assert new["a"]["v"].dtype == jnp.float32 and new["b"]["v"].dtype == jnp.int32


def test_parameters_in_a_mapping_that_is_no_pytree():
    layer = jax.jit(lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ()))
    net = jaxstate.parametrized(lambda x: layer(x), name="net")
    for w in (jnp.float32(2), 2.0, jnp.bfloat16(2), jnp.int32(2)):
        out = net.apply(types.MappingProxyType({"w": w}), jnp.bfloat16(1))
        wanted = jnp.bfloat16(1) * w
        assert out == wanted and out.dtype == wanted.dtype


def test_initializers_that_differ_in_the_sign_of_zero(key):
    @jaxstate.parametrized
    def net(x):
        a = jaxstate.param("a", jax.nn.initializers.constant(0.0), ())
        return a, jaxstate.param("b", jax.nn.initializers.constant(-0.0), ())

    params = net.init(key, 1.0)
    assert not np.signbit(params["a"]) and np.signbit(params["b"])
