"""Metadata, and collections of variables.

The reference for a tree of metadata is written by hand; for what may be written it is the program
with its state handed on by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxstate
from jaxstate_tests.params.networks import assert_trees_close, assert_trees_equal, normal, zeros

X = jnp.ones((2, 4))
SHAPE = jax.ShapeDtypeStruct((2, 4), jnp.float32)
refusal = pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")


def with_rule(f):
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: (f(*primals), *tangents))
    return f


WHERE = {
    "here": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "scan": lambda f, x: lax.scan(lambda x, _: (jax.jit(f)(x), None), x, length=2)[0],
    "while": lambda f, x: lax.while_loop(lambda x: x.sum() < 0, f, x),
    "cond": lambda f, x: lax.cond(x.sum() > 0, lambda x: x, f, x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "custom_jvp": lambda f, x: with_rule(f)(x),
}


@jaxstate.parametrized
def layer(x):
    w = jaxstate.param("w", normal, (4, 4), metadata={"axes": ("embed", "mlp")})
    shift = jaxstate.variable("shift", jnp.zeros, (4,), metadata={"collection": "cache"})
    return jnp.tanh(x @ w + shift.value) + jaxstate.param("b", zeros, (4,))


@pytest.mark.parametrize("where", WHERE)
def test_the_tree_has_the_paths_of_init(key, where):
    other = jaxstate.parametrized(layer.fn, name="other")
    net = jaxstate.parametrized(lambda x: layer(WHERE[where](other, x)), name="net")
    part = {"w": {"axes": ("embed", "mlp")}, "b": {}}
    wanted = {"other": part, "layer": part}
    state = {name: {"shift": {"collection": "cache"}} for name in wanted}
    for x in (X, SHAPE):
        assert net.metadata(x) == net.shaped(x).metadata() == wanted
        assert net.metadata_with_state(x) == (wanted, state)
    for made, found in zip(
        net.init_with_state(key, X), net.metadata_with_state(SHAPE), strict=True
    ):
        assert jax.tree.structure(made) == jax.tree.structure(found)


def test_nothing_is_computed_and_nothing_changed(key):
    ran = []

    def initial(key, shape):
        jax.debug.callback(lambda: ran.append(None))
        return normal(key, shape)

    def net(metadata):
        def net(x):
            draw = jaxstate.random.normal(stream="noise")
            return x * jaxstate.param("w", initial, (4,), metadata=metadata) * draw

        return jaxstate.parametrized(net)

    plain, described = net(None), net({"decay": 0.1})
    assert described.metadata(SHAPE) == {"w": {"decay": 0.1}}
    assert plain.metadata(SHAPE) == {"w": {}}
    assert ran == []
    assert_trees_equal(plain.init(key, X), described.init(key, X))
    keys = {"noise": key}
    jaxprs = [jax.make_jaxpr(lambda p, n=n: n.apply(p, X, key=keys))({"w": X[0]})
              for n in (plain, described)]  # fmt: skip
    assert str(jaxprs[0]) == str(jaxprs[1])


def test_any_static_value_for_each_array_of_any_tree():
    box = linen.with_partitioning(jax.nn.initializers.ones, ("embed", "mlp"))

    @jaxstate.parametrized
    def net(x):
        jaxstate.param("tree", lambda key: {"a": X, "b": [X, X]}, metadata={"decay": False})
        jaxstate.param("spec", normal, (4, 4), metadata=PartitionSpec("a", None))
        jaxstate.param("word", normal, (2,), metadata="frozen")
        jaxstate.param("names", lambda key: [X, X], metadata=("a", "b"))
        return jaxstate.param("box", box, (4, 4)).unbox()

    assert net.metadata(X) == {
        "tree": {"a": {"decay": False}, "b": [{"decay": False}, {"decay": False}]},
        "spec": PartitionSpec("a", None),
        "word": "frozen",
        "names": [("a", "b"), ("a", "b")],
        "box": linen.Partitioned({}, ("embed", "mlp")),
    }
    shapes = jax.eval_shape(net.init, jax.random.key(0), X)
    assert linen.get_partition_spec(shapes)["box"] == PartitionSpec("embed", "mlp")
    net.metadata(X)["tree"]["a"]["decay"] = True  # the caller's own
    assert net.metadata(X)["tree"]["a"] == {"decay": False}


def test_copies_put_their_axis_in_front():
    @jaxstate.parametrized
    def block(x):
        w = jaxstate.param("w", normal, (4, 4), metadata={"axes": ("embed", "mlp"), "decay": True})
        b = jaxstate.param("b", zeros, (4,), metadata={"axes": PartitionSpec("mlp")})
        n = jaxstate.variable("n", jnp.zeros, (), metadata={"axes": (), "collection": "counts"})
        n.value += 1
        return jnp.tanh(x @ w + b) * jaxstate.param("s", normal, ())

    stack = jaxstate.stack(block, 2, axis="layers")
    members = jaxstate.ensemble(stack, 3, axis="members")
    unnamed = jaxstate.ensemble(block, 3, in_axes=0)
    net = jaxstate.parametrized(lambda x: (jax.jit(members)(x), unnamed(jnp.stack([x] * 3))))

    def tree(*axes):
        params = {"w": {"axes": (*axes, "embed", "mlp"), "decay": True},
                  "b": {"axes": PartitionSpec(*axes, "mlp")}, "s": {}}  # fmt: skip
        return params, {"n": {"axes": axes, "collection": "counts"}}

    assert stack.metadata_with_state(X) == (
        {"layers": tree("layers")[0]}, {"variables": tree("layers")[1]}
    )  # fmt: skip
    inner, inner_state = tree("members", "layers")
    alone, alone_state = tree(None)
    params, state = net.metadata_with_state(SHAPE)
    assert params == {
        "ensemble": {"members": {"layers": inner}}, "ensemble_1": {"members": alone}
    }  # fmt: skip
    assert state == {
        "ensemble": {"variables": {"variables": inner_state}},
        "ensemble_1": {"variables": alone_state},
    }
    shapes = jax.eval_shape(net.init, jax.random.key(0), SHAPE)
    ranks = jax.tree.map(lambda x, m: x.ndim == len(m.get("axes", range(x.ndim))), shapes, params)
    assert all(jax.tree.leaves(ranks))


@refusal
def test_two_uses_of_one_parameter():
    def net(*metadata, where):
        def use(x, m):
            return x * jaxstate.param("w", normal, (4,), metadata=m)

        def net(x):
            for m in metadata:
                x = WHERE[where](lambda x, m=m: use(x, m), x)
            return x

        return jaxstate.parametrized(net)

    for where in ("here", "jit", "scan"):
        for metadata in ((None, {"a": 1}), ({"a": 1}, None), ({"a": 1}, {"a": 1})):
            assert net(*metadata, where=where).metadata(X) == {"w": {"a": 1}}
        with pytest.raises(
            jaxstate.ParameterConflictError, match=r"metadata {'a': 1} and {'a': 2}"
        ):
            net({"a": 1}, {"a": 2}, where=where).metadata(X)
    twice = jaxstate.parametrized(lambda x: [
        jaxstate.variable("v", jnp.zeros, (), metadata={"collection": c}) for c in "ab"
    ])  # fmt: skip
    with pytest.raises(jaxstate.VariableConflictError, match=r"'a'.*'b'"):
        twice.metadata(X)


@refusal
@pytest.mark.parametrize("make", [
    lambda m: jaxstate.param("w", normal, (), metadata=m),
    lambda m: jaxstate.variable("w", jnp.zeros, (), metadata=m),
], ids=["param", "variable"])  # fmt: skip
@pytest.mark.parametrize("wrap", [np.asarray, jnp.asarray, jax.jit(lambda x: x)])
def test_arrays_are_no_metadata(make, wrap):
    net = jaxstate.parametrized(lambda x: make({"scale": [wrap(2.0)]}))
    for run in (net.metadata, jax.jit(lambda x: net.init(jax.random.key(0), x))):
        with pytest.raises(TypeError, match=r"(?s)metadata of 'w' is static.*metadata=\{"):
            run(X)


@refusal
@pytest.mark.parametrize("collection", [3, ["a"], ("a",), PartitionSpec("a")])
def test_a_collection_has_a_name(collection):
    net = jaxstate.parametrized(
        lambda x: jaxstate.variable("n", jnp.zeros, (), metadata={"collection": collection}).value
    )
    state = {"n": jnp.float32(0)}
    runs = (
        lambda: net.init(jax.random.key(0), X),
        lambda: net.metadata(X),
        lambda: net.apply_with_state({}, state, X, mutable=["a"]),
    )
    for run in runs:
        with pytest.raises(TypeError, match="in one collection, which has a string as name"):
            run()


# -- What it is for --------------------------------------------------------------------------


def test_logical_axes_become_shardings_and_masks(key):
    @jaxstate.parametrized
    def mlp(x):
        def init(name, shape, axes, **facts):
            return jaxstate.param(name, normal, shape, metadata={"axes": axes, **facts})

        w = init("w", (4, 8), ("embed", "mlp"))
        b = init("b", (8,), ("mlp",), decay=False)
        return jnp.tanh(x @ w + b) @ init("out", (8, 2), ("mlp", None), trainable=False)

    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = {"mlp": "model", "embed": None}
    metadata = mlp.metadata(SHAPE)
    shardings = jax.tree.map(
        lambda m: NamedSharding(mesh, PartitionSpec(*map(rules.get, m["axes"]))), metadata
    )
    params = jax.jit(mlp.init, out_shardings=shardings)(key, X)
    specs = {"w": (None, "model"), "b": ("model",), "out": ("model", None)}
    assert {name: tuple(x.sharding.spec) for name, x in params.items()} == specs

    decays = jax.tree.map(lambda m: m.get("decay", True), metadata)
    labels = jax.tree.map(lambda m: "on" if m.get("trainable", True) else "off", metadata)
    optimizer = optax.chain(
        optax.add_decayed_weights(0.1, mask=decays),
        optax.multi_transform({"on": optax.sgd(1.0), "off": optax.set_to_zero()}, labels),
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert_trees_close(updates, {**zero, "w": -0.1 * params["w"]})


# -- Collections -----------------------------------------------------------------------------

IN_COLLECTION = [(True, "abn"), (False, ""), ("a", "a"), (["b"], "b"), ({"a", "b"}, "ab"), ([], "")]


def writes(x):
    """Each of three variables, if it may be written, and what it is."""
    found = {}
    for name in "abn":
        metadata = None if name == "n" else {"collection": name}
        v = jaxstate.variable(name, jnp.zeros, (), metadata=metadata)
        if jaxstate.is_writable(v):
            v.value = v.value + x
        found[name] = v.value
    return sum(found.values())


@pytest.mark.parametrize(("mutable", "names"), IN_COLLECTION)
@pytest.mark.parametrize("where", [
    "here", "scan", "stack",
    *(pytest.param(w, marks=pytest.mark.slow) for w in ("jit", "cond", "grad", "checkpoint")),
])  # fmt: skip
def test_what_is_mutable_is_written(where, mutable, names):
    block = jaxstate.parametrized(lambda x: x + writes(x), name="block")
    deep = jaxstate.stack(block, 2)
    run = {**WHERE, "cond": lambda f, x: lax.cond(x > 0, f, lambda x: x, x),
           "stack": lambda f, x: deep(x)}[where]  # fmt: skip
    net = jaxstate.parametrized(lambda x: run(block, x), name="net")
    start, path = jnp.float32(0), ("block",)
    if where == "stack":
        start, path = jnp.zeros(2), ("stack", "variables")
    state = {name: start + i for i, name in enumerate("abn")}

    def by_hand(x):
        now = {name: jnp.atleast_1d(v) for name, v in state.items()}
        for turn in range(2 if where in ("scan", "stack") else 1):
            i = turn if where == "stack" else 0
            now = {n: v.at[i].add(x) if n in names else v for n, v in now.items()}
            x = x + sum(v[i] for v in now.values())
        return x, jax.tree.map(lambda v: v.reshape(start.shape), now)

    def tree(x):
        for name in reversed(path):
            x = {name: x}
        return x

    wanted, after = by_hand(jnp.float32(1.5))
    if where == "grad":
        wanted = jax.grad(lambda x: by_hand(x)[0])(jnp.float32(1.5))
    given = {"stack": {"layers": {}}}, tree(state), jnp.float32(1.5)
    assert_trees_close(net.apply_with_state(*given, mutable=mutable), (wanted, tree(after)))


@refusal
def test_writes_and_questions_that_are_refused():
    def write(x):
        n = jaxstate.variable("n", jnp.zeros, (), metadata={"collection": "counts"})
        n.value += 1
        return n

    net, state = jaxstate.parametrized(write), {"n": jnp.float32(0)}
    with pytest.raises(jaxstate.ReadOnlyVariableError, match=(
        r"(?s)'n' was written under apply_with_state with mutable=\['cache'\], and it is in"
        r" collection 'counts'.*mutable=\['cache', 'counts'\].*is_writable\(n\)"
    )):  # fmt: skip
        net.apply_with_state({}, state, X, mutable=["cache"])
    with pytest.raises(jaxstate.ReadOnlyVariableError, match=r"mutable=\[\], and it is in coll"):
        net.apply_with_state({}, state, X, mutable=False)
    plain = jaxstate.parametrized(
        lambda x: setattr(jaxstate.variable("n", jnp.zeros, ()), "value", x)
    )
    with pytest.raises(jaxstate.ReadOnlyVariableError, match=r"(?s)in no coll.*mutable=True"):
        plain.apply_with_state({}, state, 1.0, mutable="counts")
    for run in (net.apply, jax.jit(net.apply)):
        with pytest.raises(jaxstate.ReadOnlyVariableError, match=r"(?s)under apply,.*is_writable"):
            run({}, X, state=state)
    for bad in (3, ["a", 3], None):
        with pytest.raises(TypeError, match=r'(?s)names of collections.*mutable=\["statistics"\]'):
            net.apply_with_state({}, state, X, mutable=bad)
    handle, _ = net.apply_with_state({}, state, X)
    with pytest.raises(jaxstate.ClosedStateError, match="'n'"):
        jaxstate.is_writable(handle)
    with pytest.raises(TypeError, match="wants what variable"):
        jaxstate.is_writable(state)
