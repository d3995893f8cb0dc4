"""The table of the front page says what happens.

Every cell is run: a program that counts its calls in one kind of state, under one transformation.
A "yes" has to count as often as the transformation runs the function.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "index.md"
X = jnp.arange(1.0, 4.0)


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (ct,))
    return g


def scan(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0]


def while_loop(f):
    def body(carry):
        return carry[0] + 1, f(carry[1])

    return lambda x: jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def shard_map(f):
    spec = jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


# How often each runs its function.
TRANSFORMATIONS = {
    "jit": (jax.jit, 1),
    "scan": (scan, 3),
    "fori_loop": (lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda i, x: f(x), x), 3),
    "while_loop": (while_loop, 3),
    "cond": (lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x), 1),
    "switch": (lambda f: lambda x: jax.lax.switch(1, [lambda x: x, f], x), 1),
    "vmap": (lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x])), 1),
    "grad": (lambda f: jax.grad(lambda x: f(x).sum()), 1),
    "vjp": (lambda f: lambda x: jax.vjp(f, x)[1](x), 1),
    "jvp": (lambda f: lambda x: jax.jvp(f, (x,), (x,)), 1),
    "checkpoint": (lambda f: jax.grad(lambda x: jax.checkpoint(f)(x).sum()), 1),
    "custom_jvp": (lambda f: jax.grad(lambda x: custom_jvp(f)(x).sum()), 1),
    "custom_vjp": (lambda f: jax.grad(lambda x: custom_vjp(f)(x).sum()), 1),
    "shard_map": (shard_map, 1),
}


def draws(transform, own):
    with jaxstate.rng_stream(jax.random.key(0)) as stream:
        transform(lambda x: x * jaxstate.random.uniform())(X)
    return stream.count


def parameters(transform, own):
    def layer(x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, (3,))

    net = jaxstate.parametrized(lambda x: transform(layer)(x), name="net")
    params = net.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, params) == {"w": (3,)}
    w = 2 * params["w"]
    for run in (net.apply, jax.jit(net.apply)):
        wanted = transform(lambda x: x * w)(X)
        jax.tree.map(np.testing.assert_array_equal, run({"w": w}, X), wanted)
    return "yes"


def variables(transform, own):
    @jaxstate.parametrized
    def net(x):
        calls = jaxstate.variable("calls", jnp.zeros, ())

        def layer(x):
            calls.value += x[0] if own else 1
            return 2 * x

        return transform(layer)(x)

    return net.apply_with_state({}, {"calls": 0.0}, X)[1]["calls"]


def arrays(transform, own):
    @jaxstate.inplace
    def run(x):
        calls = jnp.zeros(2)

        def f(x):
            calls[1] += x[0] if own else 1
            return 2 * x

        transform(f)(x)
        return calls[1]

    return run(X)


def objects(transform, own):
    def run(tree):
        def f(x):
            tree["calls"] += x[0] if own else 1
            return 2 * x

        transform(f)(X)

    return jaxstate.mutate(run)({"calls": 0.0})[1]["calls"]


def sown(transform, own):
    def f(x):
        return 2 * jaxstate.sow("h", x if own else jnp.ones(3), mode="cond_clobber")

    _, values = jaxstate.reap(transform(f))(X)
    assert values["h"].shape[-1:] == (3,)
    return "yes"


WRITES = (variables, arrays, objects)
COLUMNS = [(draws,), (parameters,), WRITES, (sown,)]
ERRORS = {"vmap": jaxstate.LaneWriteError, "shard_map": jaxstate.DeviceWriteError}


def table():
    """The cells of each transformation in the table."""
    found = {}
    for line in PAGE.read_text().splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", first) if line.startswith("|") else ():
            found[name] = cells
    return found


def test_the_table_has_every_transformation():
    assert set(table()) == set(TRANSFORMATIONS)


@pytest.mark.leaks_allowed("errors, whose tracebacks hold tracers")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_cell_is_true(name):
    transform, n = TRANSFORMATIONS[name]
    for kinds, cell in zip(COLUMNS, table()[name], strict=True):
        for kind in kinds:
            counts = kind in WRITES
            assert kind(transform, False) == (n if counts or kind is draws else "yes")
            if cell.startswith("yes"):
                own = kind(transform, True)
                assert not counts or own == sum(2**i for i in range(n))
            else:
                assert cell == "one²"
                with pytest.raises(ERRORS[name]):
                    kind(transform, True)


@pytest.mark.leaks_allowed("errors, whose tracebacks hold tracers")
@pytest.mark.parametrize("name", ["custom_jvp", "custom_vjp"])
def test_the_third_footnote(name):
    """And not under a transformation without a rule."""
    for other in (name, "checkpoint"):
        transform, _ = TRANSFORMATIONS[other]
        f = lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, (3,))  # noqa: E731
        net = jaxstate.parametrized(lambda x, t=transform, f=f: t(f)(x).sum(), name="net")
        derivative = jax.grad(net.apply)
        if other == name:
            with pytest.raises(jaxstate.CustomRuleStateError):
                derivative({"w": jnp.ones(3)}, X)
        else:
            np.testing.assert_array_equal(derivative({"w": jnp.ones(3)}, X)["w"], np.ones(3))
