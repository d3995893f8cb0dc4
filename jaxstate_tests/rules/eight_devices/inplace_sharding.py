"""A write leaves an array where it is, and of the sharding that its type says."""

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxstate
import jaxstate.extend
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [PartitionSpec("d"), PartitionSpec(None, "d"), PartitionSpec()])
def test_state_on_several_devices_is_written_in_its_memory(kind, spec):
    shape = (1 << 10, 1 << 9)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))

    def memory():
        """Of what there is of that shape, without a look at the state."""
        like = [x for x in jax.live_arrays() if x.shape == shape]
        return {s.data.unsafe_buffer_pointer() for x in like for s in x.addressable_shards}

    with jax.set_mesh(mesh):
        keys, values = [
            jaxstate.extend.new_slot(jax.device_put(np.full(shape, n, np.float32), spec))
            for n in (1, 2)
        ]

        @jax.jit
        def f(x):
            jaxstate.extend.write(keys, jaxstate.extend.read(keys) + x)
            jaxstate.extend.write(values, 2 * jaxstate.extend.read(values))

        f(1.0), f(1.0), f(1.0)
        before = memory()
        f(1.0), f(1.0)
        assert memory() == before
        held = [jaxstate.extend.read(keys), jaxstate.extend.read(values).addressable_data(3)]
        part = held[1].shape
        f(1.0), f(1.0)
        assert memory() != before
        np.testing.assert_array_equal(held[0], np.full(shape, 6))
        np.testing.assert_array_equal(held[1], np.full(part, 64))
        np.testing.assert_array_equal(jaxstate.extend.read(keys), np.full(shape, 8))
        np.testing.assert_array_equal(jaxstate.extend.read(values), np.full(shape, 256))
        assert jaxstate.extend.read(keys).sharding.is_equivalent_to(held[0].sharding, 2)


def test_arrays_with_parts_in_common():
    """An array of several devices may have an array of one device as a part, and nobody knows."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    n = 1 << 18
    parts = [jax.device_put(np.full(n, i, np.float32), jax.devices()[i]) for i in range(2)]
    x = jaxstate.array(parts[0] + 0)
    x[0] = 5.0
    split = NamedSharding(mesh, PartitionSpec("d"))
    whole = jax.make_array_from_single_device_arrays(
        (2 * n,), split, [jax.numpy.asarray(x), parts[1]]
    )
    f = jax.jit(lambda: x.__setitem__(1, 7.0))
    for i in range(3):
        x[2] = 6.0 + i
        f()
    np.testing.assert_array_equal(whole, [5.0, *[0.0] * (n - 1), *[1.0] * n])
    np.testing.assert_array_equal(x[:4], [5, 7, 8, 0])
