"""Parameters by name: loaded into a network that makes the rest, and flat as files have them.

The reference is the tree that `init` makes without them, with the given arrays put in by hand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from safetensors.numpy import load, save

import jaxstate
from jaxstate_tests.params.networks import assert_trees_equal, dense, normal

X = jnp.ones((2, 3))
encoder = jaxstate.parametrized(lambda x: dense(4)(jnp.tanh(dense(3)(x))), name="encoder")
deep = jaxstate.stack(jaxstate.parametrized(lambda x: x + dense(4)(x), name="block"), 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Affine:
    scale: jax.Array
    shifts: list[jax.Array]


def affine(key, n):
    return Affine(jax.random.normal(key, (n,)), [jnp.zeros(n), jnp.ones(n)])


@jaxstate.parametrized
def net(x):
    x = deep(jax.lax.fori_loop(0, 1, lambda i, y: encoder(x), jnp.zeros((2, 4))))
    p = jaxstate.param("affine", affine, 4)
    boxed = linen.with_partitioning(jax.nn.initializers.ones, ("a",))
    return (
        jax.jit(dense(2))(x * p.scale + p.shifts[0]) + jaxstate.param("boxed", boxed, (2,)).unbox()
    )


W = jnp.full((3, 4), 7.0)
B = np.full(4, 8.0, np.float32)
AFFINE = Affine(jnp.full(4, 2.0), [jnp.full(4, 3.0), jnp.full(4, 4.0)])


def put(params, path, value):
    """A copy of nested dicts with the value at the path."""
    first, *rest = path
    return {**params, first: put(params[first], rest, value) if rest else value}


GIVEN = {
    "one array": ({"encoder/dense_1/w": W}, [(("encoder", "dense_1", "w"), W)]),
    "part of a scope": (
        {"encoder": {"dense_1": {"w": W, "b": B}}},
        [(("encoder", "dense_1", "w"), W), (("encoder", "dense_1", "b"), jnp.asarray(B))],
    ),
    "slashes inside": ({"encoder": {"dense_1/w": W}}, [(("encoder", "dense_1", "w"), W)]),
    "a value of another type": ({"affine": AFFINE}, [(("affine",), AFFINE)]),
    "part of a stack": (
        {"stack": {"layers": {"dense": {"b": jnp.ones((2, 4))}}}},
        [(("stack", "layers", "dense", "b"), jnp.ones((2, 4)))],
    ),
    "a box": ({"boxed/value": 5 * jnp.ones(2)},
              [(("boxed",), linen.Partitioned(5 * jnp.ones(2), ("a",)))]),
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
def test_the_rest_is_made(key, given):
    reuse, replaced = GIVEN[given]
    wanted = net.init(key, X)
    for path, value in replaced:
        wanted = put(wanted, path, value)
    assert_trees_equal(net.init(key, X, reuse=reuse), wanted)


def test_arguments_of_a_compiled_function_by_name(key):
    reuse = {name: x for given in ("one array", "part of a stack", "a value of another type")
             for name, x in GIVEN[given][0].items()}  # fmt: skip
    found = jax.jit(lambda key, x, reuse: net.init(key, x, reuse=reuse))(key, X, reuse)
    assert_trees_equal(found, net.init(key, X, reuse=reuse))


def test_part_of_a_value_that_is_a_tree(key):
    made = net.init(key, X)
    params = net.init(key, X, reuse={"affine/shifts/1": AFFINE.shifts[1]})
    shifts = [made["affine"].shifts[0], AFFINE.shifts[1]]
    assert_trees_equal(params, {**made, "affine": Affine(made["affine"].scale, shifts)})


def test_names_and_modules_together(key):
    trained = encoder.init(jax.random.key(1), X)
    params = net.init(key, X, reuse={encoder: trained, "encoder/dense_1/w": W})
    wanted = {**trained, "dense_1": {**trained["dense_1"], "w": W}}
    assert_trees_equal(params, {**net.init(key, X), "encoder": wanted})
    params = net.init(key, X, reuse={"encoder/dense_1/w": W, encoder: trained})
    assert_trees_equal(params["encoder"], trained)
    params = net.init(key, X, reuse={"encoder/dense_1/w": 2 * W, "encoder": {"dense_1": {"w": W}}})
    assert_trees_equal(params["encoder"]["dense_1"]["w"], W)


def test_initializers_of_the_rest_and_of_variables_see_what_was_given(key):
    @jaxstate.parametrized
    def copied(x):
        w = jaxstate.param("w", lambda key: {"a": jnp.zeros(2), "b": jnp.zeros(2)})
        c = jaxstate.param("c", lambda key, w: w + 1, w["b"])
        return c + jaxstate.variable("v", lambda: w["a"] + 2).value

    params, state = copied.init_with_state(key, 0.0, reuse={"w/b": jnp.ones(2)})
    wanted = {"w": {"a": jnp.zeros(2), "b": jnp.ones(2)}, "c": 2 * jnp.ones(2)}
    assert_trees_equal((params, state), (wanted, {"v": 2 * jnp.ones(2)}))


def test_all_by_name_and_its_derivative(key):
    one = dense(2)
    params = one.init(key, X)
    flat = {"w": params["w"], "b": params["b"]}
    assert_trees_equal(one.parameters_from(flat, X), params)
    slope = jax.grad(lambda flat: (one.apply_from(flat, X) ** 2).sum())(flat)
    by_hand = jax.grad(lambda p: ((X @ p["w"] + p["b"]) ** 2).sum())(flat)
    assert_trees_equal(slope, by_hand)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize(("reuse", "error", "says"), [
    ({"encoder/dense_2/w": W}, jaxstate.UnusedReuseError,
     r"(?s)'encoder/dense_2/w', and 'net' has no parameter.*It has 'encoder/dense_1/w'"),
    ({"encoder": {"dense_1": {"w": W, "v": W}}}, jaxstate.UnusedReuseError, "dense_1/v"),
    ({"encoder": W}, jaxstate.UnusedReuseError, "'encoder'"),
    ({"encoder": {}}, jaxstate.UnusedReuseError, "reuse has nothing in 'encoder'"),
    ({"encoder/dense/w": W}, jaxstate.ParameterMismatchError,
     r"'encoder/dense/w', reused from 'encoder/dense/w', is float32\[3,4\].*float32\[3,3\]"),
    ({"encoder/dense/b": jax.random.split(jax.random.key(0), 3)},
     jaxstate.ParameterMismatchError, r"is key<fry>\[3\], and the function wants float32\[3\]"),
    ({encoder: {}}, jaxstate.MissingParameterError, "reuse has no parameter"),
    ({"encoder/dense/w": "w"}, jaxstate.ParameterMismatchError, "is 'w'"),
    ({3: W}, TypeError, "objects or names"),
], ids=["name", "extra", "scope", "nothing", "shape", "random keys", "empty module", "no array",
        "key"])  # fmt: skip
def test_what_fits_nothing_is_an_error(key, reuse, error, says):
    with pytest.raises(error, match=says):
        net.init(key, X, reuse=reuse)


# -- Flat names ------------------------------------------------------------------------------


def test_flat_names_through_a_file(key):
    params = net.init(key, X)
    flat = jaxstate.flatten_names(params)
    assert sorted(flat) == sorted([
        "encoder/dense/w", "encoder/dense/b", "encoder/dense_1/w", "encoder/dense_1/b",
        "stack/layers/dense/w", "stack/layers/dense/b", "affine/scale", "affine/shifts/0",
        "affine/shifts/1", "dense/w", "dense/b", "boxed/value",
    ])  # fmt: skip
    read = load(save({name: np.asarray(x) for name, x in flat.items()}))
    other = jax.random.key(1)
    assert_trees_equal(net.init(other, X, reuse=read), params)
    shapes = jax.eval_shape(net.init, other, X)
    assert_trees_equal(jaxstate.unflatten_names(read, like=shapes), params)
    part = {name: x for name, x in read.items() if name.startswith("encoder")}
    assert_trees_equal(jaxstate.unflatten_names(part), {"encoder": params["encoder"]})
    assert_trees_equal(
        net.init(other, X, reuse=part), {**net.init(other, X), "encoder": params["encoder"]}
    )


def test_names_that_do_not_fit():
    with pytest.raises(ValueError, match="two arrays have the name 'a/b'"):
        jaxstate.flatten_names({"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="'a' is an array, and has 'a/b'"):
        jaxstate.unflatten_names({"a/b": 1, "a": 2})
    with pytest.raises(ValueError, match=r"'weight' is not in flat. The nearest name is 'weights'"):
        jaxstate.unflatten_names({"weights": 1}, like={"weight": 0})
    with pytest.raises(ValueError, match="'b' is not in like"):
        jaxstate.unflatten_names({"a": 1, "b": 2}, like={"a": 0})
    for wrong in (None, [1], jnp.ones(2), {1: 2}):
        for like in (None, {"a": 0}):
            with pytest.raises(TypeError, match="a dict from names to arrays"):
                jaxstate.unflatten_names(wrong, like)


def test_a_stack_is_filled_layer_by_layer(key):
    scaled = jaxstate.parametrized(lambda x: x * jaxstate.param("s", normal, (3,)), name="scaled")
    three = jaxstate.stack(scaled, 3)
    layers = [scaled.init(jax.random.key(i), X) for i in range(3)]
    outer = jaxstate.parametrized(lambda x: three(x), name="outer")
    params = outer.init(key, X, reuse={"stack": three.restack(layers)})
    assert_trees_equal(params["stack"]["layers"]["s"], jnp.stack([x["s"] for x in layers]))
