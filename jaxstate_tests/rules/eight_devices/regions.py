"""State in regions where axes of the mesh have another type: `auto_axes` and `explicit_axes`.

A program is a region, what stands around the region, and what is used inside. The reference is the
same program with its state in Python variables, on one device and without a mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import constant
from jax.sharding import NamedSharding

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.rules.eight_devices.common import KEY, P, close, explicit_mesh, fold, mesh

X = np.arange(32, dtype=np.float32).reshape(4, 8) / 32


# -- Regions ---------------------------------------------------------------------------------


def auto(f):
    return jax.sharding.auto_axes(f, axes=("a", "b"), out_sharding=P("a", None))


def auto_in_part(f):
    return jax.sharding.auto_axes(f, axes="b", out_sharding=P("a", None))


def explicit(f):
    return jax.sharding.explicit_axes(f, axes=("a", "b"), in_sharding=P("a", None))


def explicit_in_auto(f):
    return auto(lambda x: explicit(f)(x))


def loop_in_auto(f):
    def loop(x):
        return jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]

    return auto(loop)


def loop(f):
    return lambda x: f(f(x))


# Name: the mesh outside, the region, and what it is without a mesh.
REGIONS = {
    "auto": (explicit_mesh, auto, lambda f: f),
    "auto in part": (explicit_mesh, auto_in_part, lambda f: f),
    "explicit": (mesh, explicit, lambda f: f),
    "explicit in auto": (explicit_mesh, explicit_in_auto, lambda f: f),
    "loop in auto": (explicit_mesh, loop_in_auto, loop),
}


# -- What is around --------------------------------------------------------------------------


def in_scan(f):
    def run(x):
        return jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0]

    return run


def in_while(f):
    def run(x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, f(s[1])), (0, x))[1]

    return run


def in_cond(f):
    return lambda x: jax.lax.cond(x.sum() > -1, f, lambda x: x, x)


def three_times(f):
    return lambda x: f(f(f(x)))


# Name: what is around the region, and what it is without JAX.
AROUND = {
    "nothing": (lambda f: f, lambda f: f),
    "jit": (jax.jit, lambda f: f),
    "scan": (in_scan, three_times),
    "jit of scan": (lambda f: jax.jit(in_scan(f)), three_times),
    "while": (in_while, three_times),
    "cond": (in_cond, lambda f: f),
    "checkpoint": (jax.checkpoint, lambda f: f),
    "jit of checkpoint of scan": (lambda f: jax.jit(jax.checkpoint(in_scan(f))), three_times),
    "twice": (lambda f: jax.jit(lambda x: f(f(x))), lambda f: lambda x: f(f(x))),
}


# -- What is used inside ---------------------------------------------------------------------


def draws(run):
    with jaxstate.rng_stream(KEY) as stream:
        y = run(lambda x: x + jaxstate.random.uniform((4, 8)))
        after = jax.random.key_data(jaxstate.next_key())
        return y, after, stream.count


def draws_by_hand(run):
    n = 0

    def f(x):
        nonlocal n
        n += 1
        return x + jax.random.uniform(fold(n - 1), (4, 8))

    y = run(f)
    return y, jax.random.key_data(fold(n)), n + 1


def typed_draws(run):
    """The key is one of the mesh."""
    here = jax.sharding.get_mesh()
    with jaxstate.rng_stream(jax.device_put(KEY, NamedSharding(here, P()))) as stream:
        y = run(lambda x: x + jaxstate.random.uniform((4, 8)))
        after = jax.random.key_data(jaxstate.next_key())
        return y, after, stream.count


def slot_of(value):
    def use(run):
        slot = new_slot(value())

        def f(x):
            write(slot, 0.5 * read(slot) + x)
            return x + jnp.cos(read(slot))

        y = run(f)
        outside = jax.jit(lambda: read(slot) + 1.0)()
        return y, outside, read(slot)

    return use


def slot_by_hand(run):
    value = jnp.ones((4, 8))

    def f(x):
        nonlocal value
        value = 0.5 * value + x
        return x + jnp.cos(value)

    return run(f), value + 1.0, value


def sharded_slot():
    return jax.device_put(
        np.ones((4, 8), np.float32), NamedSharding(jax.sharding.get_mesh(), P("a"))
    )


def of_net(run, use):
    def f(x):
        w = jaxstate.param("w", constant(0.125), (8, 8))
        mean = jaxstate.variable("mean", jnp.zeros, ())
        mean.value = 0.9 * mean.value + 0.1 * x.mean()
        return jnp.sin(x @ w - mean.value)

    net = jaxstate.parametrized(lambda x: run(f), name="net")
    params, state = net.init_with_state(KEY, X)
    return use(net, params, state)


def of_net_by_hand(run, use):
    def apply(w, mean):
        def f(x):
            nonlocal mean
            mean = 0.9 * mean + 0.1 * x.mean()
            return jnp.sin(x @ w - mean)

        return run(f), mean

    return use(apply, jnp.full((8, 8), 0.125), jnp.float32(0))


def variables(run):
    def use(net, params, state):
        return jax.jit(net.apply_with_state)(params, state, X), net.apply_with_state(
            params, state, X
        )

    return of_net(run, use)


def variables_by_hand(run):
    def use(apply, w, mean):
        y, mean = apply(w, mean)
        return ((y, {"mean": mean}),) * 2

    return of_net_by_hand(run, use)


def gradients(run):
    def use(net, params, state):
        return jax.jit(jax.grad(lambda p: net.apply_with_state(p, state, X)[0].sum()))(params)["w"]

    return of_net(run, use)


def gradients_by_hand(run):
    return of_net_by_hand(run, lambda f, w, mean: jax.grad(lambda w: f(w, mean)[0].sum())(w))


def sown(run):
    def f(x):
        return jnp.sin(jaxstate.sow("x", x, mode="cond_clobber"))

    return jaxstate.reap(lambda: run(f))()


def sown_by_hand(run):
    last = None

    def f(x):
        nonlocal last
        last = x
        return jnp.sin(x)

    return run(f), {"x": last}


USES = {
    "draws": (draws, draws_by_hand),
    "draws with a key of the mesh": (typed_draws, draws_by_hand),
    "slot": (slot_of(lambda: jnp.ones((4, 8))), slot_by_hand),
    "slot of NumPy": (slot_of(lambda: np.ones((4, 8), np.float32)), slot_by_hand),
    "sharded slot": (slot_of(sharded_slot), slot_by_hand),
    "variables": (variables, variables_by_hand),
    "gradients": (gradients, gradients_by_hand),
    "sown values": (sown, sown_by_hand),
}


def cases():
    for region in REGIONS:
        for around in AROUND:
            for use in USES:
                if use == "gradients" and around == "while":
                    continue  # JAX has none
                if use.startswith("slot") and region == "explicit in auto":
                    continue  # what is written there is sharded, and the slot is not: see below
                yield region, around, use


@pytest.mark.parametrize("region, around, use", list(cases()))
def test_a_region_changes_no_value(region, around, use):
    check(region, around, use)


def check(region, around, use):
    mesh_outside, enter, without_mesh = REGIONS[region]
    transform, in_python = AROUND[around]
    program, by_hand = USES[use]
    wanted = by_hand(lambda f: in_python(without_mesh(f))(X))
    with jax.set_mesh(mesh_outside):
        x = jax.device_put(X, NamedSharding(mesh_outside, P("a", None)))
        found = program(lambda f: transform(enter(f))(x))
        axis_types = {t for leaf in jax.tree.leaves(found) for t in types_of(leaf)}
        assert axis_types <= set(mesh_outside.axis_types)
    close(found, wanted)


# What an initializer looks at, and the initializers of a parameter and of a variable.
INITIALIZERS = {
    "key": lambda x: (jax.nn.initializers.normal(), (8, 8)),
    "key, of the program": lambda x: (lambda key: jax.random.normal(key, (8, 8)) * 2,),
    "data": lambda x: (lambda key, x: jax.random.normal(key, x.shape) + x.max(), x.max(0)),
    "constant": lambda x: (jax.nn.initializers.ones, (8, 8)),
}


def in_lanes(f):
    """The batch axis of ``X`` is not cut in the lanes, so that each lane has the same types."""
    return lambda x: jax.vmap(f, 1, 1)(jnp.stack([x, x], 1))[:, 0]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("around", ["nothing", "jit of scan", "cond", "lanes"])
def test_parameters_and_variables_that_a_region_makes_are_those_of_one_device(region, around):
    """Their types are those of the mesh in which ``init`` is called."""
    mesh_outside, enter, _ = REGIONS[region]
    transform = in_lanes if around == "lanes" else AROUND[around][0]

    def net_of(wrap, x, names):
        def f(x):
            for name in names:
                args = INITIALIZERS[name](x)
                jaxstate.param(f"p {name}", *args)
                jaxstate.variable(f"v {name}", *args, takes_key=True)
            return x

        return jaxstate.parametrized(lambda: wrap(f)(x), name="net")

    names = ["key", "key, of the program", "constant"]
    if around == "nothing" and "loop" not in region:
        names.append("data")
    wanted = net_of(lambda f: f, X, names).init_with_state(KEY)
    with jax.set_mesh(mesh_outside):
        x = jax.device_put(X, NamedSharding(mesh_outside, P("a", None)))
        net = net_of(lambda f: transform(enter(f)), x, names)
        of_mesh = jax.device_put(KEY, NamedSharding(mesh_outside, P()))
        for found in (net.init_with_state(KEY), jax.jit(net.init_with_state)(of_mesh)):
            close(found, wanted)
            axis_types = {t for leaf in jax.tree.leaves(found) for t in types_of(leaf)}
            assert axis_types <= set(mesh_outside.axis_types)


def types_of(x):
    found = jax.typeof(x).sharding.mesh
    return () if found.empty else found.axis_types


@pytest.mark.parametrize("around", ["scan", "jit of scan", "while", "cond"])
def test_a_loop_that_shards_a_slot_in_another_way_names_it(around):
    transform, _ = AROUND[around]
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(X, NamedSharding(explicit_mesh, P("a", None)))
        slot = new_slot(jnp.ones((4, 8)), name="total")
        with pytest.raises(jaxstate.SlotTypeError, match=r"slot 'total'.*4@a,8.*\n") as error:
            transform(lambda x: (write(slot, read(slot) + x), x)[1])(x)
        assert "jax.sharding.reshard(value, jax.P" in str(error.value)


@pytest.mark.parametrize("around", ["scan", "jit of scan", "while", "cond"])
def test_sown_values_that_are_sharded(around):
    transform, by_hand = AROUND[around]
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(X, NamedSharding(explicit_mesh, P("a", None)))
        found = sown(lambda f: transform(f)(x))
    close(found, sown_by_hand(lambda f: by_hand(f)(X)))
