"""A write leaves an array where it is, and of the sharding that its type says."""

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxstate
from jaxstate_tests.arrays.test_inplace_types import ROWS, WRITES, array, ours


def explicit():
    return jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("jitted", [True, False])
def test_writes_in_an_explicit_mesh(name, jitted):
    writes = WRITES[name]
    with jax.set_mesh(explicit()):
        x = jax.device_put(array(8), PartitionSpec("d", None))
        run = jax.jit if jitted else lambda f: f
        got, want = run(ours(writes))(x), jax.jit(writes[1])(x)
        assert jax.typeof(got) == jax.typeof(x)
        np.testing.assert_array_equal(got, want)

        def loop(x):
            lax.fori_loop(0, 1, lambda i, _: (writes[0](x), None)[1], None)
            return x

        got = jax.jit(jaxstate.inplace(loop))(x)
        assert jax.typeof(got) == jax.typeof(x)
        np.testing.assert_array_equal(got, want)


def test_views_in_an_explicit_mesh_have_the_sharding_of_the_read():
    with jax.set_mesh(explicit()):
        x = jax.device_put(array(8), PartitionSpec("d", "m"))
        reads = (lambda x: x.T, lambda x: x[:, None], lambda x: x.swapaxes(0, 1))
        for read in reads:
            seen = []
            jax.jit(jaxstate.inplace(lambda x, read=read, seen=seen: seen.append(read(x).aval)))(x)
            assert seen[0] == jax.typeof(read(x))


@pytest.mark.parametrize("name", [*WRITES, *ROWS])
def test_an_eager_write_leaves_the_array_where_it_is(name):
    writes = {**WRITES, **ROWS}[name]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(array(8), NamedSharding(mesh, PartitionSpec("d")))
    got = ours(writes)(x)
    assert got.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(got, writes[1](array(8)))
    second = jax.device_put(array(8), jax.devices()[1])
    assert ours(writes)(second).devices() == {jax.devices()[1]}
