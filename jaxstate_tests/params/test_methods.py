"""Parametrized methods: every instance is a module."""

import copy
import dataclasses
import inspect
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import jaxstate

# -- Methods -----------------------------------------------------------------------------------


class Scale:
    @jaxstate.parametrized
    def dense(self, x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, ())


@dataclasses.dataclass(slots=True, weakref_slot=True)
class SlottedScale:
    size: int = 1

    @jaxstate.parametrized
    def dense(self, x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, (self.size,)).sum()


class ScaleWithNew(Scale):
    def __new__(cls, *sizes):
        self = super().__new__(cls)
        self.sizes = sizes
        return self

    def __init__(self, *sizes):
        super().__init__()


FIRST_USES = {
    "jit": lambda f, x: jax.jit(f)(jax.jit(f)(x)),
    "cached jit": lambda f, x: (lambda g: g(g(x)))(jax.jit(f)),
    "checkpoint": lambda f, x: (lambda g: g(g(x)))(jax.checkpoint(f)),
    "branch, then loop": lambda f, x: jax.lax.fori_loop(
        0, 1, lambda _, x: f(x), jax.lax.cond(True, f, f, x)
    ),
}


@pytest.mark.parametrize("use", FIRST_USES)
@pytest.mark.parametrize("make", [Scale, SlottedScale, ScaleWithNew], ids=lambda c: c.__name__)
def test_an_instance_is_one_module_wherever_its_method_is_used_first(make, use, key):
    def network():
        layer = make()
        return jaxstate.parametrized(
            lambda x: FIRST_USES[use](lambda x: layer.dense(x), x), name="net"
        )

    x, params = jnp.float32(1), {"dense": {"w": 2.0}, "dense_1": {"w": 5.0}}
    if make is SlottedScale:
        params = jax.tree.map(lambda w: jnp.full((1,), w), params)
    assert network().init(key, x).keys() == {"dense"}
    assert network().apply(params, x) == 4  # of a network that was never initialized
    seen = network()
    seen.init(key, x)
    assert seen.apply(params, x) == 4


def test_an_instance_made_in_a_jitted_function_is_one_for_each_call(key):
    f = jax.jit(lambda x: Scale().dense(x))
    net = jaxstate.parametrized(lambda x: f(f(x)), name="net")
    assert net.init(key, 1.0).keys() == {"dense", "dense_1"}


def test_classes_with_parametrized_methods_are_made_as_ever():
    class WithInit:
        def __init__(self, n: int, *, m=3):
            self.n = n

        @jaxstate.parametrized
        def __call__(self, x):
            return x

    class Further(WithInit):
        def __init__(self, z):
            super().__init__(z)

    class Pair(NamedTuple):
        a: int

    class PairWithMethod(Pair):
        @jaxstate.parametrized
        def f(self, x):
            return x

    class PairAsItIs(PairWithMethod):
        pass

    shown = {Scale: "()", SlottedScale: "(size: int = 1) -> None", WithInit: "(n: int, *, m=3)"}
    shown |= {Further: "(z)", PairWithMethod: "(a: int)", ScaleWithNew: "(*sizes)"}
    shown |= {PairAsItIs: "(a: int)"}
    for cls, signature in shown.items():
        assert str(inspect.signature(cls)) == signature
    assert str(inspect.signature(WithInit(1))) == "(x)"
    assert PairWithMethod(3).a == 3 and ScaleWithNew(1, 2).sizes == (1, 2) and Further(4).n == 4
    assert copy.copy(ScaleWithNew(5)).sizes == (5,)
    with pytest.raises(TypeError, match="takes no arguments"):
        Scale(3)
