"""A module that a call of an object makes is, in every call of that object, the same one.

The references thread two weights by hand.
"""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate

KEY = jax.random.key(3)
X = jnp.float32(0.7)


def scale(name="scale"):
    """A new module."""

    @jaxstate.parametrized(name=name)
    def module(x):
        return x * jaxstate.param("s", jax.nn.initializers.uniform(2.0), ())

    return module


class Scale:
    @jaxstate.parametrized(name="scale")
    def __call__(self, x):
        return x * jaxstate.param("s", jax.nn.initializers.uniform(2.0), ())


class Pair:
    """An instance that makes an instance, and asks for one method by another."""

    def __init__(self):
        self.part = Scale()

    @jaxstate.parametrized(name="scale")
    def __call__(self, x):
        return self.part(x)


def in_loop(x):
    return lax.fori_loop(0, 1, lambda i, x: scale()(x), x)


# What makes a module and uses it: function of the input -> (result, name of the module's parameter).
MAKERS = {
    "function": lambda x: scale()(x),
    "instance": lambda x: Scale()(x),
    "instance in an instance": lambda x: Pair()(x),
    "in jit": lambda x: jax.jit(lambda x: scale()(x))(x),
    "in one cached jit": jax.jit(lambda x: scale()(x)),
    "in one cached jit, an instance": jax.jit(lambda x: Scale()(x)),
    "in one cached jit in another": jax.jit(lambda x: CACHED(x)),
    "in checkpoint": jax.checkpoint(lambda x: scale()(x)),
    "in a loop": in_loop,
    "in a module that is made": lambda x: jaxstate.parametrized(MAKERS["function"], name="scale")(x),
    "in a vmap": lambda x: jax.vmap(lambda x: scale()(x))(x[None])[0],
    "in a branch": lambda x: lax.cond(x > -100, lambda x: scale()(x), lambda x: x, x),
    "copied": lambda x: __import__("copy").copy(OUTSIDE)(x),
}  # fmt: skip
CACHED = jax.jit(lambda x: scale()(x))
OUTSIDE = scale()


def calls(f, x):
    """Four calls, which differ in what stands around them."""
    x = f(x)
    x = jax.jit(f)(x)
    return lax.cond(x > 0, f, lambda x: x, f(x))


def scanned(f, x):
    return lax.scan(lambda x, _: (f(x), f(x)), x, None, length=3)[0]


def until(f, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]


# What calls an object three or four times.
CALLERS = {
    "Python loop": lambda f, x: functools.reduce(lambda x, _: f(x), range(3), x),
    "fori_loop": lambda f, x: lax.fori_loop(0, 3, lambda i, x: f(x), x),
    "scan": scanned,
    "while_loop": until,
    "one jitted, called twice": lambda f, x: (lambda g: g(g(x)))(jax.jit(f)),
    "jit, then plain": lambda f, x: f(jax.jit(f)(f(x))),
    "checkpoint": lambda f, x: (lambda g: g(g(x)))(jax.checkpoint(f)),
    "branches and others": calls,
    "vmap": lambda f, x: jax.vmap(f)(jnp.stack([x, f(x)])).sum(),
    "grad": lambda f, x: f(x) + jax.grad(lambda x: f(f(x)))(x),
    "loop in loop": lambda f, x: lax.fori_loop(
        0, 2, lambda i, x: lax.fori_loop(0, 2, lambda j, x: f(x), f(x)), x
    ),
}  # fmt: skip


def twice(make):
    """An object with two modules, made whenever it is called."""

    @jaxstate.parametrized
    def enc(x):
        return jnp.sin(make(x)) + make(x)

    return enc


def leaves_in_order(params):
    """The weights, those of the first module first."""
    return jax.tree.leaves(params)


@pytest.mark.parametrize("call", CALLERS)
@pytest.mark.parametrize("make", MAKERS)
def test_every_call_of_an_object_has_the_modules_of_the_first(make, call):
    enc, run = twice(MAKERS[make]), CALLERS[call]
    net = jaxstate.parametrized(lambda x: run(enc, x), name="net")
    params = net.init(KEY, X)
    assert list(params) == ["enc"] and list(params["enc"]) == ["scale", "scale_1"]
    a, b = jax.tree.leaves(params)

    def by_hand(x):
        return jnp.sin(x * a) + x * b

    wanted = run(by_hand, X)
    np.testing.assert_allclose(net.apply(params, X), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(net.apply)(params, X), wanted, rtol=1e-5)
    gc.collect()
    np.testing.assert_allclose(net.apply(params, X), wanted, rtol=1e-5)
