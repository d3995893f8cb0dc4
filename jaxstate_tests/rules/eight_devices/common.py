"""What the tests of this folder share. `test_sharding.py` runs each file in a process of its own
with eight host devices; by hand:

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python -m pytest jaxstate_tests/rules/eight_devices/*.py
"""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

if jax.device_count() != 8:
    raise RuntimeError(__doc__)

P = PartitionSpec
KEY = jax.random.key(0)
X = np.arange(8, dtype=np.float32)  # of NumPy, so that no test can donate it
AXES = ("a", "b")
ALL = P(AXES)

mesh = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2)
explicit_mesh = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Explicit,) * 2)


def sharding(*spec):
    return NamedSharding(mesh, P(*spec))


def mapped(f, **kwargs):
    """``f`` on each of eight devices."""
    return jax.shard_map(f, **(dict(mesh=mesh, in_specs=ALL, out_specs=ALL) | kwargs))


def fold(*counts, key=KEY):
    """The key that comes of ``key`` by one `fold_in` after the other."""
    for n in counts:
        key = jax.random.fold_in(key, n)
    return key


def uniform(*counts, shape=(), key=KEY):
    return jax.random.uniform(fold(*counts, key=key), shape)


def close(found, wanted, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for leaf in jax.tree.leaves(found):
        assert not isinstance(leaf, jax.core.Tracer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def eagerly(f):
    return f


MODES = [eagerly, jax.jit]
