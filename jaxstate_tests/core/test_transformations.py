"""What works inside what: each kind of state under each transformation, as `docs/limits.md` says.

Each entry of `TRANSFORMATIONS` takes a function ``f`` that uses state, and puts it under a
transformation.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxstate
from jaxstate.extend import new_slot, read, write

xs = jnp.arange(1.0, 4.0)


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (ct,))
    return g


def custom_vmap(f):
    g = jax.custom_batching.custom_vmap(lambda x: f(x))
    g.def_vmap(lambda size, batched, x: (f(x), batched[0]))
    return g


def loop(f):
    return lambda x: jax.lax.fori_loop(0, 3, lambda i, x: f(x), x)


def while_loop(f):
    def body(s):
        return s[0] + 1, f(s[1])

    return lambda x: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


def while_condition(f):
    def condition(s):
        return (s[0] < 3) & (jnp.sum(f(s[1])) > -1e9)

    return lambda x: jax.lax.while_loop(condition, lambda s: (s[0] + 1, s[1]), (0, x))[1]


def linear_solve(f):
    def operator(v):
        return 2 * v + 0 * f(v)

    def solve(operator, b):
        return b - operator(b) / 4

    return lambda x: jax.lax.custom_linear_solve(operator, x, solve, symmetric=True)


def root(f):
    def solve(g, x0):
        return x0 - g(x0)

    return lambda x: jax.lax.custom_root(lambda v: v - x + 0 * f(v), x, solve, lambda g, y: y)


def shard_map(f):
    spec = PartitionSpec("d")
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


def closure_convert(f):
    def g(x):
        converted, constants = jax.closure_convert(f, x)
        return converted(x, *constants)

    return g


def lower(f):
    return lambda x: jax.jit(f).lower(x)


TRANSFORMATIONS = {
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(jax.jit(f)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=3)[0],
    "fori_loop": loop,
    "map": lambda f: lambda x: jax.lax.map(lambda _: f(x), xs)[0],
    "associative_scan": lambda f: (
        lambda x: jax.lax.associative_scan(lambda a, b: f(a) + b, jnp.stack([x, x, x]))[2]
    ),
    "while_loop": while_loop,
    "while_loop condition": while_condition,
    "cond": lambda f: lambda x: jax.lax.cond(jnp.sum(x) > 0, f, lambda x: x, x),
    "switch": lambda f: lambda x: jax.lax.switch(1, [lambda x: x, f], x),
    "vmap": lambda f: lambda x: jax.vmap(lambda c: f(x * c))(xs)[0],
    "vmap of vmap": lambda f: lambda x: jax.vmap(jax.vmap(f))(jnp.ones((2, 2, 3)))[0, 0],
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x))),
    "grad of scan": lambda f: jax.grad(lambda x: jnp.sum(TRANSFORMATIONS["scan"](f)(x))),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[1](x)[0],
    "jacrev": lambda f: lambda x: jax.jacrev(f)(x)[0],
    "jacfwd": lambda f: lambda x: jax.jacfwd(f)(x)[0],
    "hessian": lambda f: lambda x: jax.hessian(lambda x: jnp.sum(f(x) ** 2))(x)[0],
    "checkpoint": jax.checkpoint,
    "grad of checkpoint": lambda f: jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x))),
    "custom_jvp": custom_jvp,
    "grad of custom_jvp": lambda f: jax.grad(lambda x: jnp.sum(custom_jvp(f)(x))),
    "custom_vjp": custom_vjp,
    "grad of custom_vjp": lambda f: jax.grad(lambda x: jnp.sum(custom_vjp(f)(x))),
    "closure_convert": closure_convert,
    "custom_root": root,
    "custom_root in jit": lambda f: jax.jit(root(f)),
    "custom_linear_solve": linear_solve,
    "cg": lambda f: lambda x: jax.scipy.sparse.linalg.cg(lambda v: 2 * v + 0 * f(v), x)[0],
    "custom_vmap": custom_vmap,
    "custom_vmap in jit": lambda f: jax.jit(custom_vmap(f)),
    "vmap of custom_vmap": lambda f: lambda x: jax.vmap(custom_vmap(f))(jnp.ones((3, 3)))[0],
    "shard_map": shard_map,
    "shard_map in jit": lambda f: jax.jit(shard_map(f)),
    "pmap": lambda f: lambda x: jax.pmap(f)(x[None])[0],
    "lower": lower,
    "reduce": lambda f: (
        lambda x: jax.lax.reduce(x, 0.0, lambda a, b: a + b + 0 * jnp.sum(f(jnp.ones(3))), (0,))
    ),
}


def draws(transformation, vmap="split"):
    with jaxstate.rng_stream(jax.random.key(0), vmap=vmap) as stream:
        transformation(lambda x: x + jaxstate.random.normal((3,)))(xs)
        return int(stream.count)


def network(transformation):
    def f(x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, (3,))

    return jaxstate.parametrized(lambda x: transformation(f)(x), name="network")


def parameter_read(transformation):
    network(transformation).apply({"w": jnp.ones(3)}, xs)
    return "yes"


def parameter_made(transformation):
    assert network(transformation).init(jax.random.key(0), xs)["w"].shape == (3,)
    return "yes"


def slot_writes(transformation):
    slot = new_slot(jnp.int32(0))

    def f(x):
        write(slot, read(slot) + 1)
        return x * 1.0

    transformation(f)(xs)
    return int(read(slot))


def outcome(use, *args):
    try:
        return use(*args)
    except Exception as error:
        return type(error).__name__


USES = [
    draws,
    lambda transformation: draws(transformation, "share"),
    parameter_read,
    parameter_made,
    slot_writes,
]
# How often the function runs, where that is not once.
COUNTS = dict.fromkeys(("scan", "fori_loop", "map", "while_loop", "grad of scan"), 3)
COUNTS |= {"while_loop condition": 4, "associative_scan": 2}
UNSUPPORTED = "UnsupportedPrimitiveError"
EXCEPTIONS = {
    "jacfwd": ["SplitStreamError", 1, "yes", "yes", 1],
    "hessian": ["SplitStreamError", 1, "yes", "yes", 1],
    "vmap of custom_vmap": [UNSUPPORTED, UNSUPPORTED, "yes", "yes", UNSUPPORTED],
    "shard_map": [1, 1, "yes", "yes", 1],
    "shard_map in jit": [1, 1, "yes", "yes", 1],
    "pmap": [1, 1, "yes", "yes", "DeviceWriteError"],
    "lower": ["AheadOfTimeError"] * 5,
    "reduce": [UNSUPPORTED] * 5,
}


@pytest.mark.leaks_allowed("errors hold tracers")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_works_inside_what(name):
    row = [outcome(use, TRANSFORMATIONS[name]) for use in USES]
    if name == "cg":  # a solver calls its operator as often as it likes
        assert row[2:4] == ["yes", "yes"] and row[0] == row[1] == row[4] > 0
        return
    n = COUNTS.get(name, 1)
    assert row == EXCEPTIONS.get(name, [n, n, "yes", "yes", n])


def test_the_page_has_the_table():
    page = (pathlib.Path(__file__).parents[2] / "docs/limits.md").read_text()
    rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", page, flags=re.M)
    shown = {name: cells.split(" | ") for name, cells in rows}
    assert shown.keys() == TRANSFORMATIONS.keys()
    for name, cells in shown.items():
        if name != "cg":
            n = COUNTS.get(name, 1)
            expected = EXCEPTIONS.get(name, [n, n, "yes", "yes", n])
            plain = [re.sub(r"^\[(\w+)\]\(.*\)$", r"\1", cell) for cell in cells]
            assert plain == list(map(str, expected)), name
