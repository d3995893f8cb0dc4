"""Parameters that are cut: what a device of a shard_map has of them.

The reference has the parameters among the arguments of the mapped function, with their specs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.params.networks import normal
from jaxstate_tests.rules.eight_devices.common import KEY, MODES, P, close, explicit_mesh, mesh

X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
SPEC = P(None, ("a", "b"))
both = pytest.mark.parametrize("mode", MODES)


@jaxstate.parametrized
def dense(x):
    """Rows of ``x`` are cut over the devices, and so are the columns of ``w`` and ``v``."""
    w = jaxstate.param("w", normal, (4, 16), metadata={"spec": SPEC})
    v = jaxstate.param("v", normal, (16, 4), metadata={"spec": P("b")})
    b = jaxstate.param("b", normal, (4,))
    return with_pieces({"w": w, "v": v, "b": b}, x)


def with_pieces(p, x):
    assert p["w"].shape == (4, 2) and p["v"].shape == (4, 4)
    h = jnp.tanh(x @ lax.all_gather(p["w"], ("a", "b"), axis=1, tiled=True))
    return h @ lax.all_gather(p["v"], "b", tiled=True) + p["b"]


SPECS = {"w": SPEC, "v": P("b"), "b": P()}


def mapped(f, in_specs, out_specs=P(("a", "b")), **kwargs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **kwargs)


ROWS = P(("a", "b"))
outside = jaxstate.parametrized(lambda x: mapped(dense, ROWS)(x), name="outside")
by_hand = mapped(with_pieces, (SPECS, ROWS))


def test_init_and_metadata_outside_of_the_shard_map_are_of_the_whole():
    params = outside.init(KEY, X)
    assert jax.tree.map(jnp.shape, params["dense"]) == {"w": (4, 16), "v": (16, 4), "b": (4,)}
    metadata = outside.metadata(X)["dense"]
    assert jax.tree.map(lambda m: m.get("spec", P()), metadata) == SPECS
    alone = jaxstate.parametrized(lambda: jaxstate.param("w", normal, (4, 16)), name="dense")
    whole = jaxstate.parametrized(lambda: alone(), name="outside")
    close(params["dense"]["w"], whole.init(KEY)["dense"]["w"])


@pytest.mark.leaks_allowed("all_gather of a slice of what f closes over leaks in JAX, by hand too")
@pytest.mark.parametrize(("wrap", "mode"), [
    (lambda f: f, lambda f: f), (jax.checkpoint, lambda f: f), (jax.jit, jax.jit),
    (lambda f: lambda x: lax.scan(lambda x, _: (f(x), None), x, length=2)[0], jax.jit),
], ids=["here", "checkpoint", "jit", "scan"])  # fmt: skip
def test_apply_around_the_shard_map_and_inside(mode, wrap):
    """With derivatives, which are pieces where the parameters are."""
    params = outside.init(KEY, X)["dense"]
    inner = jaxstate.parametrized(lambda x: wrap(dense)(x), name="inner")
    around = jaxstate.parametrized(lambda x: mapped(lambda x: wrap(dense)(x), ROWS)(x))

    def loss(f):
        return mode(jax.value_and_grad(lambda p, x: (f(p, x) ** 2).sum(), (0, 1)))(params, X)

    wanted = loss(mapped(lambda p, x: wrap(lambda x: with_pieces(p, x))(x), (SPECS, ROWS)))
    close(loss(lambda p, x: around.apply({"dense": p}, x)), wanted)
    in_shards = mapped(inner.apply, ({"dense": SPECS}, ROWS))
    close(loss(lambda p, x: in_shards({"dense": p}, x)), wanted)


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_init_on_the_devices_makes_their_pieces(mode, check_vma):
    init = mapped(dense.init, (P(), ROWS), SPECS, check_vma=check_vma)
    params = mode(init)(KEY, X)
    wanted = jaxstate.parametrized(lambda x: mapped(dense.fn, ROWS)(x)).init(KEY, X)
    close(params, wanted)
    assert params["w"].addressable_shards[0].data.shape == (4, 2)


def specs_of(net, *args):
    """As a tree of the parameters, from metadata that is asked for on the devices."""
    found = []
    jax.eval_shape(mapped(lambda *args: found.append(net.metadata(*args)), ROWS, P()), *args)
    return jax.tree.map(lambda m: m.get("spec", P()), found[0])


def test_stacks_and_ensembles():
    block = jaxstate.parametrized(lambda x: x + dense(x), name="block")
    deep, several = jaxstate.stack(block, 3), jaxstate.ensemble(dense, 3)
    net = jaxstate.parametrized(lambda x: several(deep(x)).sum(0))
    stacked = jax.tree.map(lambda spec: P(None, *spec), SPECS)
    specs = specs_of(net, X)
    assert specs == {"stack": {"layers": {"dense": {**stacked, "b": P()}}},
                     "ensemble": {"members": {**stacked, "b": P()}}}  # fmt: skip
    params = jax.jit(mapped(net.init, (P(), ROWS), specs))(KEY, X)
    layers, members = params["stack"]["layers"]["dense"], params["ensemble"]["members"]
    assert layers["w"].shape == members["w"].shape == (3, 4, 16)
    assert layers["w"].addressable_shards[0].data.shape == (3, 4, 2)

    def wanted(layers, members, x):
        for i in range(3):
            x = x + with_pieces(jax.tree.map(lambda p, i=i: p[i], layers), x)
        return sum(with_pieces(jax.tree.map(lambda p, i=i: p[i], members), x) for i in range(3))

    reference = mapped(wanted, (stacked, stacked, ROWS))
    apply = mapped(net.apply, (specs, ROWS))
    close(jax.jit(apply)(params, X), jax.jit(reference)(layers, members, X), atol=1e-5)


@pytest.mark.parametrize("copies", [jaxstate.stack, jaxstate.ensemble])
def test_copies_of_what_is_cut_are_applied_inside(copies):
    net = jaxstate.parametrized(lambda x: mapped(copies(dense, 2), ROWS, P(None, "a"))(x))
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"'dense' are cut.*outside of"):
        net.init(KEY, X)


def collectives(f, *args):
    text = jax.jit(f).lower(*args).compile().as_text()
    names = ("all-gather(", "all-reduce(", "reduce-scatter(", "all-to-all(", "collective-permute(")
    return {name: text.count(name) for name in names}


def test_apply_inside_compiles_to_the_collectives_of_the_program_by_hand():
    params = outside.init(KEY, X)["dense"]
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), params, SPECS
    )

    def step(f):
        return jax.grad(lambda p: (mapped(f, (SPECS, ROWS))(p, X) ** 2).sum())

    found, wanted = (collectives(step(f), params) for f in (dense.apply, with_pieces))
    assert found == wanted and sum(found.values()) >= 3


def test_an_explicit_mesh():
    def f(p, x):
        return jax.shard_map(
            dense.apply, mesh=explicit_mesh, in_specs=(SPECS, ROWS), out_specs=ROWS
        )(p, x)

    params = outside.init(KEY, X)["dense"]
    wanted = by_hand(params, X)
    with jax.set_mesh(explicit_mesh):
        p = jax.tree.map(jax.reshard, params, SPECS)
        close(np.asarray(jax.jit(f)(p, jax.reshard(X, ROWS))), np.asarray(wanted))


def test_only_the_axes_of_the_shard_map_cut():
    def half(x):
        w = jaxstate.param("w", normal, (4, 16), metadata={"spec": SPEC})
        return x @ w

    net = jaxstate.parametrized(lambda x: jax.shard_map(
        half, mesh=mesh, in_specs=P(), out_specs=P(None, "b"), axis_names={"b"})(x))  # fmt: skip
    params = net.init(KEY, X)
    close(jax.jit(net.apply)(params, X), X @ params["w"])


@pytest.mark.parametrize(("shape", "spec", "says"), [
    ((6, 4), P("b"), "6 elements in 4 equal pieces"),
    ((8,), P(None, "b"), "an array of 1 axes"),
])  # fmt: skip
def test_cuts_that_cannot_be(shape, spec, says):
    def add(x):
        return x + jaxstate.param("w", normal, shape, metadata={"spec": spec}).sum()

    net = jaxstate.parametrized(lambda x: mapped(add, ROWS)(x))
    with pytest.raises(jaxstate.ParameterMismatchError, match=says):
        net.init(KEY, X)


def test_a_piece_of_another_shape_is_refused():
    params = outside.init(KEY, X)["dense"]
    with pytest.raises(jaxstate.ParameterMismatchError, match=r"'w' is float32\[4,16\].*\[4,2\]"):
        mapped(dense.apply, ({**SPECS, "w": P()}, ROWS))(params, X)
