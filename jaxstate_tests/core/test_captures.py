"""What JAX hands on as it is, an operand or constant that is a result, is the value of its place.

Two modules have a parameter of one name, and different values. A function of the inner one returns
its parameter through something that hands it on; what arrives outside has to be that value, and
its gradient goes to that parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify, sparse

import jaxstate

ones = jax.nn.initializers.ones
KEY = jax.random.key(0)


def own(x=None):
    return jaxstate.param("w", ones, ())


def evaluated(x):
    closed = jax.make_jaxpr(own)(x)
    has_consts = hasattr(closed, "with_consts")  # since jax 0.11 a jaxpr carries its own
    jaxpr = closed.with_consts(()) if has_consts else closed.jaxpr
    return jax.core.eval_jaxpr(jaxpr, closed.consts, x)[0]


def read_equation_by_equation(x):
    """An interpreter of somebody else's: results that are constants are never bound."""
    closed = jax.make_jaxpr(lambda x: (own(), own() * x))(x)
    inner = getattr(closed, "jaxpr", closed)
    env = dict(zip([*inner.constvars, *inner.invars], [*closed.consts, x], strict=True))
    for eqn in inner.eqns:
        env[eqn.outvars[0]] = eqn.primitive.bind(*(env[v] for v in eqn.invars), **eqn.params)
    return env[inner.outvars[0]]


def with_rule(x):
    f = jax.custom_vjp(lambda x, w: w)
    f.defvjp(lambda x, w: (f(x, w), None), lambda _, ct: (jnp.zeros(()), ct))
    return f(x, own())


HANDS_ON = {
    "cond": lambda x: lax.cond(x > 0, own, own, x),
    "cond of two functions": lambda x: lax.cond(x > 0, lambda x: own(), lambda x: own(), x),
    "switch": lambda x: lax.switch(1, [own, own, own], x),
    "cond in a jit": lambda x: jax.jit(lambda x: lax.cond(x > 0, own, own, x))(x),
    "jit in a cond": lambda x: lax.cond(x > 0, jax.jit(own), jax.jit(own), x),
    "jit": jax.jit(own),
    "jit of jit": jax.jit(jax.jit(own)),
    "scan": lambda x: lax.scan(lambda c, _: (own(), None), x, None, length=2)[0],
    "scan, stacked": lambda x: lax.scan(lambda c, _: (c, own()), x, None, length=2)[1][1],
    "fori_loop": lambda x: lax.fori_loop(0, 2, lambda i, c: own(), x),
    "checkpoint": lambda x: jax.checkpoint(own)(x),
    "vmap": lambda x: jax.vmap(lambda x: own())(jnp.stack([x, x]))[1],
    "vmap of cond": lambda x: jax.vmap(lambda p: lax.cond(p, own, own, x))(x > jnp.zeros(2))[0],
    "custom_vjp": with_rule,
    "checkify": lambda x: checkify.checkify(own)(x)[1],
    "sparsify": lambda x: sparse.sparsify(own)(x),
    "closure_convert": lambda x: (lambda f, c: f(x, *c))(*jax.closure_convert(own, x)),
    "a kept jaxpr": evaluated,
    "an interpreter": read_equation_by_equation,
    "linearize": lambda x: jax.linearize(lambda x: own() + 0 * x, x)[0],
}


@pytest.fixture(params=HANDS_ON)
def net(request):
    inner = jaxstate.parametrized(HANDS_ON[request.param], name="inner")

    @jaxstate.parametrized
    def outer(x):
        y = inner(x)
        w = own()
        return y * 1, w * 1

    return inner, outer


PARAMS = {"inner": {"w": jnp.float32(2.0)}, "w": jnp.float32(3.0)}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["called", "jitted"])
def test_a_parameter_that_is_handed_on_is_that_of_its_module(net, wrap):
    inner, outer = net
    assert wrap(outer.apply)(PARAMS, 1.0) == (2.0, 3.0)
    gradient = wrap(jax.grad(lambda p: outer.apply(p, 1.0)[0]))(PARAMS)
    assert (gradient["inner"]["w"], gradient["w"]) == (1.0, 0.0)
    out = wrap(inner.apply)({"w": jnp.float32(2.0)}, 1.0)
    assert isinstance(out, jax.Array) and not isinstance(out, jax.core.Tracer) and out == 2.0


def test_init_makes_a_parameter_that_is_handed_on(net):
    _, outer = net
    params = outer.init(KEY, 1.0)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)


def test_a_kept_jaxpr_has_the_parameters_of_the_place_where_it_was_made():
    @jaxstate.parametrized
    def inner(x):
        converted, consts = jax.closure_convert(lambda x: x * own(), x)
        return lambda x: converted(x, *consts)

    @jaxstate.parametrized
    def outer(x):
        f = inner(x)
        return f(x) + 10 * own()

    assert outer.apply(PARAMS, 1.0) == 32.0
    gradient = jax.grad(lambda p: outer.apply(p, 1.0))(PARAMS)
    np.testing.assert_allclose([gradient["inner"]["w"], gradient["w"]], [1.0, 10.0])


def test_a_jaxpr_that_returns_no_capture_has_no_equation_more():
    net = jaxstate.parametrized(lambda x: jax.jit(lambda x: x * own())(x), name="net")
    jaxpr = jax.make_jaxpr(net.apply)({"w": 2.0}, 1.0)
    by_hand = jax.make_jaxpr(lambda p, x: jax.jit(lambda w, x: x * w)(p["w"], x))({"w": 2.0}, 1.0)
    inner, hand = (j.eqns[0].params["jaxpr"].eqns for j in (jaxpr, by_hand))
    assert [e.primitive.name for e in inner] == [e.primitive.name for e in hand]
