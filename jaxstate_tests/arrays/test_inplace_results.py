"""What a transformed function returns of an array from outside: its value when the function ends.

It may have written the array, or only read it, and return views of it. And what functions with
custom rules return that write their own arguments.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxstate
from jaxstate import inplace
from jaxstate_tests.sampling import part_of_product

X = np.arange(4, dtype=np.float32)


def custom_jvp(body):
    f = jax.custom_jvp(lambda t: body())
    f.defjvp(lambda primals, tangents: (f(*primals), f(*primals)))
    return f(1.0)


def custom_vjp(body):
    f = jax.custom_vjp(lambda t: body())
    f.defvjp(lambda t: (f(t), None), lambda _, cts: (jnp.zeros(()),))
    return f(1.0)


def converted(body):
    f, constants = jax.closure_convert(lambda t: body(), 1.0)
    return f(1.0, *constants)


def on_devices(body):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    return jax.shard_map(lambda _: body(), mesh=mesh, in_specs=P(), out_specs=P())(1.0)


def carried(body):
    start = (jnp.zeros(4), jnp.zeros(4), jnp.zeros(3), jnp.zeros((2, 2)))
    return lax.scan(lambda c, _: (body(), None), start, None, length=1)[0]


BODIES = {
    "jit": lambda body: jax.jit(body)(),
    "jit of jit": lambda body: jax.jit(lambda: jax.jit(body)())(),
    "carry of a scan": carried,
    "step of a scan": lambda body: jax.tree.map(
        lambda y: y[0], lax.scan(lambda _, x: (None, body()), None, length=1)[1]
    ),
    "map": lambda body: jax.tree.map(lambda y: y[0], lax.map(lambda _: body(), jnp.arange(1))),
    "cond": lambda body: lax.cond(True, body, body),
    "switch": lambda body: lax.switch(1, [body, body]),
    "checkpoint": lambda body: jax.checkpoint(body)(),
    "closure_convert": converted,
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "shard_map": on_devices,
    "vmap": lambda body: jax.tree.map(lambda y: y[0], jax.vmap(lambda _: body())(jnp.arange(1))),
    "jvp": lambda body: jax.jvp(lambda t: body(), (1.0,), (1.0,))[0],
    "vjp": lambda body: jax.vjp(lambda t: body(), 1.0)[0],
    "auxiliary": lambda body: jax.grad(lambda t: (t, body()), has_aux=True)(1.0)[1],
}
MODES = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.tree.map(lambda y: y[1], jax.vmap(f)(jnp.stack([x, x]))),
    "jit of vmap": lambda f: MODES["vmap"](jax.jit(f)),
    "in a jit": lambda f: lambda x: jaxstate.inplace(lambda x: jax.jit(f)(x))(x),
}


def returned(x):
    return x, x, x[1:], x.reshape(2, 2).T


@pytest.mark.parametrize(("body", "mode"), part_of_product(2, BODIES, MODES))
def test_what_was_written(body, mode):
    def run(x):
        def write():
            x[2] = 30
            x[:2] += 1
            return returned(x)

        out = BODIES[body](write)
        x[0] = 7  # after the body: the results are arrays of their own
        out[0][3] = 8
        return out, x

    def in_numpy(x):
        x[2] = 30
        x[:2] += 1
        out = jax.tree.map(np.copy, returned(x))
        x[0] = 7
        out[0][3] = 8
        return out, x

    found = MODES[mode](inplace(run))(jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, found, in_numpy(X.copy()))


@pytest.mark.parametrize(("body", "mode"), part_of_product(2, BODIES, MODES))
def test_what_was_only_read(body, mode):
    def run(x):
        x[2] = 30
        out = BODIES[body](lambda: returned(x))
        x[0] = 7
        return out, x

    def in_numpy(x):
        x[2] = 30
        out = jax.tree.map(np.copy, returned(x))
        x[0] = 7
        return out, x

    found = MODES[mode](inplace(run))(jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, found, in_numpy(X.copy()))


def test_a_cached_function_returns_what_the_array_is_now():
    x = jaxstate.array(jnp.asarray(X))
    f = jax.jit(lambda: x)
    before = f()
    x[0] = 50
    assert before[0] == 0 and f()[0] == 50
    assert inplace(lambda x: (f := jax.jit(lambda: x), f(), x.fill(5), f())[3])(X)[0] == 5


def test_a_condition_that_is_an_array_from_outside():
    @inplace
    def run():
        goes_on, n = jnp.array(True), jnp.zeros(1)

        def body(i):
            n[0] += 1
            goes_on[...] = i < 2
            return i + 1

        return lax.while_loop(lambda _: goes_on, body, 0), n

    for f in (run, jax.jit(run)):
        turns, n = f()
        assert turns == 3 and n[0] == 3


WITHOUT_DERIVATIVE = ("custom_jvp", "custom_vjp", "carry of a scan")  # (it has another structure)


@pytest.mark.parametrize("body", [b for b in BODIES if b not in WITHOUT_DERIVATIVE])
def test_derivatives_of_results(body):
    def loss(y):
        t = jnp.zeros(4)

        def write():
            t[2] = y * y
            return t

        return BODIES[body](write).sum()

    for f in (jax.grad(inplace(loss)), jax.jit(jax.grad(inplace(loss)))):
        assert f(3.0) == 6.0
    assert jax.jvp(inplace(loss), (3.0,), (1.0,))[1] == 6.0


# -- Functions with custom rules that write their arguments ------------------------------------


def add_one(a):
    b = a
    b += 1
    return b * 1


def with_vjp():
    f = jax.custom_vjp(add_one)
    f.defvjp(lambda a: (add_one(a), None), lambda _, ct: (ct,))
    return f


def with_jvp():
    f = jax.custom_jvp(add_one)
    f.defjvp(lambda primals, tangents: (add_one(*primals), tangents[0]))
    return f


DERIVATIVES = {
    "vjp": lambda f, x: jax.vjp(f, x)[0],
    "linearize": lambda f, x: jax.linearize(f, x)[0],
    "jvp": lambda f, x: jax.jvp(f, (x,), (jnp.ones_like(x),))[0],
    "vjp in a loop": lambda f, x: jax.vjp(
        lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0], x
    )[0],
    "vjp in lanes": lambda f, x: jax.vmap(lambda x: jax.vjp(f, x)[0])(x[None])[0],
}


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("jitted", [False, True], ids=["", "jitted rule"])
@pytest.mark.parametrize("make", [with_vjp, with_jvp])
def test_rules_write_their_arguments_in_a_derivative_inside(make, jitted, derivative, mode):
    if make is with_vjp and derivative == "jvp":
        make = with_jvp  # a custom_vjp function has no forward mode
    rule = jax.jit(make()) if jitted else make()
    run = inplace(lambda x: (DERIVATIVES[derivative](rule, x), x))
    y, x = MODES[mode](run)(jnp.asarray(X))
    np.testing.assert_array_equal(y, X + 1)
    np.testing.assert_array_equal(x, X)  # what a function is given is its own


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("inside", [False, True], ids=["derivative outside", "derivative inside"])
def test_a_residual_that_was_written(inside, mode):
    f = jax.custom_vjp(lambda a: 2 * a)

    def fwd(a):
        tail = a[1:]
        tail[1] = 30.0
        a[0] = -1.0
        return 2 * a, a

    f.defvjp(fwd, lambda residual, ct: (residual * ct,))
    total = lambda x: f(x).sum()  # noqa: E731
    run = inplace(lambda x: jax.grad(total)(x)) if inside else jax.grad(inplace(total))
    np.testing.assert_array_equal(MODES[mode](run)(jnp.asarray(X)), [-1, 1, 30, 3])
