"""What writes nothing does in an in-place function what it does outside of one."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxstate

X = np.arange(1.0, 5.0, dtype=np.float32)


def one_device_mesh(kind=AxisType.Auto):
    return jax.make_mesh((1,), ("d",), axis_types=(kind,))


def set_mesh(x):
    mesh = one_device_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        y = jax.device_put(x, PartitionSpec("d"))
        return jnp.sin(y), str(jax.typeof(y)), jax.sharding.get_mesh() == mesh


def compiled(x):
    f = jax.jit(lambda x, y: {"sum": x + y}).lower(X, X).compile()
    return f(x * 2, x)


def compiled_with_donation(x):
    f = jax.jit(lambda x: x + 1, donate_argnums=0).lower(X).compile()
    y = x * 2
    return f(y), x


def shard_map_with_branch(x):
    y = x * 2

    @jax.shard_map(mesh=one_device_mesh(), in_specs=PartitionSpec(), out_specs=PartitionSpec())
    def f(x):
        return {"a": x * y, "b": -x} if x.sum() > 0 else {"a": x, "b": x}

    return f(x)


def shard_map(x):
    spec = PartitionSpec("d")
    return jax.shard_map(
        lambda x: x * lax.psum(x, "d"), mesh=one_device_mesh(), in_specs=spec, out_specs=spec
    )(x)


def reference_as_residual(x):
    @jax.custom_vjp
    def stash(ref, x):
        return x

    def backward(ref, g):
        ref[...] = g
        return None, g

    stash.defvjp(lambda ref, x: (x, ref), backward)
    ref = jax.new_ref(jnp.zeros(4))
    jax.grad(jax.jit(lambda ref, x: jnp.sin(stash(ref, jnp.sin(x))).sum()), 1)(ref, x)
    return ref[...]


def placed(x):
    sharding = NamedSharding(one_device_mesh(), PartitionSpec("d"))
    y = jax.device_put(x, sharding)
    made = [
        jnp.ones(4, device=sharding), jnp.zeros(4, device=sharding), jnp.arange(4, device=sharding),
        jnp.full(4, 2.0, device=sharding), jnp.empty(4, device=sharding) * 0, jnp.zeros_like(y),
        jnp.full_like(y, 3), jnp.ones_like(x, device=sharding), jnp.asarray([1.0], device=sharding),
    ]  # fmt: skip
    return made, [m.sharding for m in made], len(y.addressable_shards), y.is_fully_addressable


PROGRAMS = {
    "set_mesh": set_mesh,
    "get_mesh": lambda x: jax.sharding.get_mesh(),
    "compiled": compiled,
    "compiled, with donation": compiled_with_donation,
    "shard_map": shard_map,
    "shard_map with a branch": shard_map_with_branch,
    "a reference as residual": reference_as_residual,
    "placed": placed,
    "device_get": lambda x: jax.device_get({"x": x + 1, "n": 3}),
    "device_get of keys": lambda x: jax.device_get(jax.random.split(jax.random.key(0), 3)),
    "is_deleted": lambda x: (x + 1).is_deleted(),
    "dlpack": lambda x: (jnp.from_dlpack(x + 1), np.from_dlpack(x + 1)),
    "pickle": lambda x: pickle.loads(pickle.dumps(x + 1)),
    "deepcopy": lambda x: copy.deepcopy(x + 1),
    "isinstance": lambda x: isinstance(x + 1, jax.Array | int),
    "callback": lambda x: jax.pure_callback(np.sin, jax.typeof(x), x),
    "sizes": lambda x: jnp.ones(int(x[3])),
    "printed": lambda x: f"{x} {x!r} {x[1]:.2f}",
    "weak types in small precision": lambda x: x.astype(jnp.bfloat16) * jnp.where(x > 1, 1.0, 0.0),
    "a weak scalar": lambda x: x.astype(jnp.bfloat16) * jnp.full(4, 2.0)[0],
    "a weak carry": lambda x: lax.scan(lambda c, _: (c * x, None), jnp.full(4, 1.0), length=2)[0],
    "a counter": lambda x: lax.fori_loop(0, 3, lambda i, c: c * i, x.astype(jnp.int8)),
    "numpy": lambda x: (np.add(x, 1.0), np.sum(x), np.ones(4) + x, np.ones(4) < x),
    "sum": lambda x: sum([np.ones(4), x, x]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_write_nothing(name):
    f = PROGRAMS[name]
    wanted, got = f(jnp.asarray(X)), jaxstate.inplace(f)(jnp.asarray(X))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if isinstance(b, (jax.Array, np.ndarray)):
            assert jax.typeof(a) == jax.typeof(b)
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def test_results_of_compiled_functions_can_be_written():
    @jaxstate.inplace
    def f(x):
        y = compiled(x)["sum"]
        y[0] = 100.0
        return y

    np.testing.assert_array_equal(f(X), [100, 6, 9, 12])


def test_a_traced_array_is_printed_with_its_type():
    @jax.jit
    @jaxstate.inplace
    def f(x):
        assert "float32[4]" in repr(x) and "float32[3]" in f"{[x[1:]]}"
        return x

    f(X)


# -- Rules that read an array which their function does not --------------------------------


def with_rule(m):
    f = jax.custom_vjp(lambda x: x * 1.0)
    f.defvjp(lambda x: (x, None), lambda _, g: (g * m,))
    return f


def with_jvp(m):
    f = jax.custom_jvp(lambda x: x * 1.0)
    f.defjvp(lambda primals, tangents: (primals[0], tangents[0] * m))
    return f


def with_forward_rule(m):
    f = jax.custom_vjp(lambda x: x * 1.0)
    f.defvjp(lambda x: (x * m, x), lambda r, g: (g * r * m,))
    return f


USES = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "vjp": lambda f, x: jax.vjp(f, x)[1](x),
    "checkpoint": lambda f, x: jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x),
    "vmap": lambda f, x: jax.vmap(jax.grad(lambda y: f(y * x).sum()))(x),
}


@pytest.mark.parametrize("rule", [with_rule, with_jvp, with_forward_rule])
@pytest.mark.parametrize("use", USES)
def test_rules_that_read_an_array_of_the_function_around(rule, use):
    def f(x):
        return USES[use](rule(x * 2), x)

    wanted = f(jnp.asarray(X))
    for run in (jaxstate.inplace(f), jax.jit(jaxstate.inplace(f))):
        jax.tree.map(np.testing.assert_allclose, run(X), wanted)


def test_a_rule_reads_what_an_array_holds_when_it_runs():
    @jaxstate.inplace
    def f(x):
        m = x * 2
        g = with_rule(m)
        found = []
        for value in (10.0, 20.0, 30.0):
            m[0] = value
            found.append(jax.grad(lambda x: g(x).sum())(x)[0])
            found.append(jax.jit(jax.grad(lambda x: g(x).sum()))(x)[0])
        return found

    for run in (f, jax.jit(f)):
        assert list(map(float, run(X))) == [10, 10, 20, 20, 30, 30]


# -- Parameters ------------------------------------------------------------------------------


def param(name="w"):
    return jaxstate.param(name, jax.nn.initializers.normal(), (4,))


def with_variable(x):
    v = jaxstate.variable("v", jnp.zeros, (4,))
    v.value = v.value + x
    return v.value * param()


NETWORKS = {
    "here": lambda x: x * param(),
    "jit": lambda x: jax.jit(lambda x: x * param())(x),
    "loop": lambda x: lax.fori_loop(0, 3, lambda i, x: x * param(), x),
    "cond": lambda x: lax.cond(x.sum() > 0, lambda x: x * param(), lambda x: x, x),
    "vmap": lambda x: jax.vmap(lambda c: c * param())(x),
    "grad": lambda x: jax.grad(lambda x: (x * param()).sum())(x),
    "own initializer": lambda x: x * jaxstate.param("w", lambda key: {"a": jnp.full(4, 2.0)})["a"],
    "looks at data": lambda x: x * jaxstate.param("w", lambda key: jnp.zeros(4) + x.sum()),
    "variable": with_variable,
    "module in a module": lambda x: jaxstate.parametrized(lambda x: x * param(), name="m")(x),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_variables_are_born_in_an_inplace_function(name):
    key, x = jax.random.key(0), jnp.asarray(X)

    def results(f):
        net = jaxstate.parametrized(f, name="net")
        params, state = net.init_with_state(key, x)
        shapes = jax.eval_shape(net.init_with_state, key, x)
        made = jax.jit(net.init_with_state)(key, x)
        out = net.apply_with_state(params, state, x)
        gradient = jax.grad(lambda p: net.apply_with_state(p, state, x)[0].sum())(params)
        shapes = jax.tree.map(lambda s: (s.shape, s.dtype.name), shapes)
        return params, state, made, out, gradient, shapes

    got, wanted = results(jaxstate.inplace(NETWORKS[name])), results(NETWORKS[name])
    assert got[-1] == wanted[-1]
    assert not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[:-1], wanted[:-1])
