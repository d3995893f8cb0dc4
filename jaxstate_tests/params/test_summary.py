"""Summaries of parameters and networks, compared with what NumPy and JAX say of the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxstate
from jaxstate_tests.params.networks import dense, normal, zeros

X = jnp.ones((5, 3))


def test_rows_are_the_arrays(key):
    params = {
        "a": {"w": jnp.ones((2, 3), jnp.bfloat16), "b": np.zeros(3, np.int8)},
        "z": jnp.float32(1),
        "list": [jnp.ones(2), key],
    }
    found = jaxstate.summary(params)
    assert [(r.path, r.shape, str(r.dtype), r.bytes, r.size) for r in found.rows] == [
        ("a/b", (3,), "int8", 3, 3),
        ("a/w", (2, 3), "bfloat16", 12, 6),
        ("list/0", (2,), "float32", 8, 2),
        ("list/1", (), "key<fry>", 8, 1),
        ("z", (), "float32", 4, 1),
    ]
    assert found.total_bytes == 3 + 12 + 8 + 8 + 4 and found.total_size == 13
    text = str(found)
    assert text == repr(found)
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "type", "elements", "bytes", "sharding"]
    assert lines[2].split() == ["a/w", "bfloat16[2,3]", "6", "12"]
    assert lines[-1].split() == ["total", "13", "35"]
    assert jaxstate.summary({}).total_bytes == 0


def test_shapes_are_enough(key):
    net = dense(4)
    shapes = jax.eval_shape(net.init, key, X)
    rows = jaxstate.summary(shapes).rows
    assert [(r.path, r.shape, r.bytes) for r in rows] == [("b", (4,), 16), ("w", (3, 4), 48)]
    inside = []
    jax.jit(lambda p: inside.append(jaxstate.summary(p).total_bytes))(net.init(key, X))
    assert inside == [64]


def test_sharding():
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("data",))
    n = len(devices)
    split = NamedSharding(mesh, PartitionSpec("data"))
    w = jax.device_put(jnp.ones((4 * n, 2)), split)
    found = jaxstate.summary({"w": w})
    assert found.rows[0].sharding == split
    assert found.rows[0].bytes == w.nbytes and found.rows[0].device_bytes == w.nbytes // n
    assert str(split.spec) in str(found)


def test_outputs_per_scope_without_running_anything(key, capfd):
    a, b = dense(4), dense(2)

    @jaxstate.parametrized
    def act(x):
        jax.debug.print("ran")
        return jnp.tanh(x)

    @jaxstate.parametrized
    def pair(x):
        return {"y": a(x), "n": 3}

    @jaxstate.parametrized
    def net(x):
        x = pair(x)["y"]
        with jaxstate.scope("loop"):
            x = jax.lax.fori_loop(0, 3, lambda i, x: act(dense(4)(x)), x)
        x = x + jaxstate.random.normal(x.shape, stream="noise")
        return jax.jit(b)(x), jax.vmap(b)(x)

    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for _ in range(2):  # also when everything was traced before
        found = net.summary(key, shape)
        assert [(r.path, jax.tree.map(jnp.shape, r.output), r.bytes) for r in found.scopes] == [
            ("pair/dense", (5, 4), 64),
            ("pair", {"y": (5, 4), "n": ()}, 64),
            ("loop/dense", (5, 4), 80),
            ("loop/act", (5, 4), 0),
            ("dense", (5, 2), 40),
            ("dense", (2,), 40),
            ("", ((5, 2), (5, 2)), 184),
        ]
        params = net.init({"params": key, "noise": key}, X)
        assert [(r.path, r.shape) for r in found.rows] == [
            ("/".join(k.key for k in path), x.shape)
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        ]
        assert found.total_bytes == sum(x.nbytes for x in jax.tree.leaves(params)) == 184
    assert "ran" not in capfd.readouterr().out
    text = str(found)
    assert "{'n': int32[], 'y': float32[5,4]}" in text and "(float32[5,2], float32[5,2])" in text
    assert text.splitlines()[0].split() == ["scope", "output", "elements", "bytes"]


def test_a_stack_and_a_bound_method(key):
    class Block:
        @jaxstate.parametrized
        def __call__(self, x):
            return x * jaxstate.param("s", normal, (3,)) + jaxstate.param("t", zeros, ())

    deep = jaxstate.stack(Block().__call__, 4)
    found = jaxstate.parametrized(lambda x: deep(x), name="net").summary(key, X)
    assert [(r.path, r.shape) for r in found.rows] == [
        ("stack/layers/s", (4, 3)),
        ("stack/layers/t", (4,)),
    ]
    assert [r.path for r in found.scopes] == ["stack", ""]
    with pytest.raises(TypeError, match="wants one random key"):
        deep.summary(3, X)
