"""State inside and outside of one mesh. (With one device, which is all that its types ask for.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxstate
from jaxstate.extend import new_slot, read, write

MODES = {"eagerly": lambda f: f, "jit": jax.jit}
X = jnp.float32(0.7)


def on_devices(f, axis_types=None):
    mesh = jax.make_mesh((1,), ("d",), axis_types)
    spec = PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_what_is_given_to_apply_is_of_no_mesh_wherever_it_is_used_first(first, kind, mode):
    def weight():
        return jaxstate.param("w", jax.nn.initializers.ones, ())

    def total():
        return jaxstate.variable("total", jnp.zeros, ())

    def add(x):
        total().value += x * weight()
        return x * total().value

    @jaxstate.parametrized
    def net(x):
        if first == "outside":
            add(x)
        y = on_devices(add)(x)
        return y + add(x) + weight() * total().value

    def by_hand(w, total, x):
        found = []
        for _ in range(3 if first == "outside" else 2):
            total = total + x * w
            found.append(x * total)
        return found[-2] + found[-1] + w * total, {"total": total}

    run = MODES[mode](lambda w, t: net.apply_with_state({"w": w}, {"total": t}, X))
    (found, state), (wanted, after) = run(kind(1.5), kind(2)), by_hand(1.5, 2.0, X)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(state["total"], after["total"], rtol=1e-6)


WRITES = {
    "element": 1,
    "range": slice(1, None),
    "all": slice(None),
    "steps": slice(None, None, 2),
    "positions": np.array([0, 2]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", WRITES)
@pytest.mark.parametrize("inside", ["value", "array"])
def test_a_value_of_a_mesh_into_an_array_of_none_and_the_other_way_round(inside, index, mode):
    index = WRITES[index]
    explicit = (jax.sharding.AxisType.Explicit,)
    of_mesh = on_devices(lambda x: x, explicit)

    @jaxstate.inplace
    def write(a, value):
        a, value = (a, of_mesh(value)) if inside == "value" else (of_mesh(a), value)
        a[index] = value
        return a

    found = MODES[mode](write)(jnp.zeros(3), X)
    np.testing.assert_array_equal(found, jnp.zeros(3).at[index].set(X))


def of_each_device(f):
    """What it is given varies over the devices."""
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_varies_over_devices_from_the_write_on_that_does(mode):
    """A derivative sums over devices where a value that did not vary becomes one that does."""

    def f(x):
        slot = new_slot(jnp.float32(1))

        def written_and_read(w):
            write(slot, read(slot) * x[0] * w)
            return jax.jit(lambda: read(slot) * x[0] * w)()

        return x + jax.grad(jax.jit(written_and_read))(jnp.float32(2))

    x = np.float32([3])
    wanted = x + jax.grad(lambda w: (1 * x[0] * w) * x[0] * w)(2.0)
    np.testing.assert_allclose(MODES[mode](of_each_device(f))(x), wanted, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_traced_with_a_slot_that_did_not_vary_is_not_used_again_when_it_does(mode):
    def f(x):
        slot = new_slot(jnp.float32(1))
        g = jax.jit(lambda y: read(slot) * y)
        y = g(2.0)
        write(slot, x[0])
        return x + y + g(2.0)

    with pytest.raises(jaxstate.DeviceWriteError, match="varies over the mesh axes d here"):
        MODES[mode](of_each_device(f))(np.ones(1, np.float32))
