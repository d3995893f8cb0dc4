"""A model made and trained in shards is the model made and trained on one device."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxstate
from jaxstate_tests.rules.eight_devices import by_hand
from jaxstate_tests.rules.eight_devices.common import close

example = by_hand.load_example()


@pytest.fixture(scope="module")
def mesh():
    return example.make_mesh()


def test_parameters_are_born_in_their_shards(mesh):
    key = jax.random.key(0)
    params, state = example.init(key, mesh)
    alone = example.net.init_with_state(key, np.zeros((example.BATCH, example.INPUTS), np.float32))
    close((params, state), alone, rtol=1e-6)
    cut = {"widen/weights": (64, 64), "widen/bias": (64,), "narrow/weights": (64, 64)}
    for path, array in jax.tree.leaves_with_path((params, state)):
        name = "/".join(entry.key for entry in path[-2:])
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert len(array.addressable_shards) == 8 and shapes == {cut.get(name, array.shape)}


@pytest.mark.optimized
def test_no_device_ever_keeps_the_whole_model(mesh):
    x = jax.ShapeDtypeStruct((example.BATCH, example.INPUTS), np.float32)
    make = lambda key: example.net.init_with_state(key, x)  # noqa: E731
    key = jax.random.key(0)
    shapes = jax.eval_shape(make, key)
    wanted = example.shardings(mesh, shapes)
    memory = jax.jit(make, out_shardings=wanted).lower(key).compile().memory_analysis()
    total = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    kept = example.bytes_per_device(example.init(key, mesh))
    assert len(kept) == 8 and set(kept) == {71_684} and total == 269_828
    assert memory.output_size_in_bytes < 1.01 * kept[0]
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 0.75 * total


def test_training_in_shards_is_training_on_one_device(mesh):
    start = example.init(jax.random.key(0))
    wanted = by_hand.train(example, *start, steps=4)
    for trained in (example.train(mesh, steps=4), example.train(steps=4)):
        close(trained, wanted, rtol=1e-3, atol=1e-5)
    params, state, _ = example.train(mesh, steps=2)
    found = jax.tree.map(lambda x: x.sharding, (params, state))
    for (_, array), sharding in zip(
        jax.tree.leaves_with_path((params, state)), jax.tree.leaves(found), strict=True
    ):
        assert sharding.mesh.size == 8, array
    widen = NamedSharding(mesh, PartitionSpec(None, "model"))
    assert params["block"]["widen"]["weights"].sharding.is_equivalent_to(widen, 2)


def test_the_step_compiled_ahead_of_time_has_the_shardings_it_is_given(mesh):
    params, state = example.init(jax.random.key(0), mesh)
    step = example.make_step(mesh)

    def with_key(params, state, key):
        with jaxstate.rng_stream(key):
            return step(params, state)

    compiled = jax.jit(with_key).lower(params, state, jax.random.key(1)).compile()
    wanted = by_hand.train(example, *example.init(jax.random.key(0)), steps=1)
    *found, value = compiled(params, state, jax.random.key(1))
    close((*found, [float(value)]), wanted, rtol=1e-3, atol=1e-5)
