"""A stream whose draws are made on all devices, on one, on some: it is bound to none of them.

And some of the programs of `regions.py`, which every run of the tests has.
"""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.rules.eight_devices import regions
from jaxstate_tests.rules.eight_devices.common import ALL, KEY, P, X, explicit_mesh, fold, mesh

DEVICES = jax.devices()


def some(*devices):
    return jax.sharding.Mesh(np.array([DEVICES[i] for i in devices]), "a")


# The places of what a call is given.
PLACES = {
    "NumPy": None,
    "one device": DEVICES[0],
    "another device": DEVICES[3],
    "all devices": NamedSharding(mesh, ALL),
    "all devices, whole": NamedSharding(mesh, P()),
    "half": NamedSharding(some(0, 1, 2, 3), P("a")),
    "the other half": NamedSharding(some(4, 5, 6, 7), P("a")),
    "explicit": NamedSharding(explicit_mesh, ALL),
}


def noisy(x):
    return x + jaxstate.random.uniform()


def in_scan(f):
    return lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0]


WAYS = {
    "jit": jax.jit(noisy),
    "scan": in_scan(noisy),
    "jit of scan": jax.jit(in_scan(noisy)),
    "cond": lambda x: jax.lax.cond(True, noisy, lambda x: x, x),
    "checkpoint": jax.checkpoint(noisy),
}


def placed(place):
    return X if PLACES[place] is None else jax.device_put(X, PLACES[place])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_one_stream_in_all_places(way, make):
    key = make(0)
    with jaxstate.rng_stream(key) as stream:
        n = 0
        for place in itertools.chain(PLACES, reversed(PLACES)):
            x = placed(place)
            found = WAYS[way](x)
            assert (
                not isinstance(x, jax.Array) or found.sharding.device_set == x.sharding.device_set
            )
            wanted = X + jax.random.uniform(fold(n, key=key))
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
            k = jaxstate.next_key()  # where a key is that is drawn by hand
            np.testing.assert_array_equal(jax.random.key_data(k), fold_data(key, n + 1))
            assert not k.committed
            n += 2
        assert stream.count == n


def fold_data(key, n):
    return jax.random.key_data(jax.random.fold_in(key, n))


@pytest.mark.parametrize("place", ["another device", "all devices, whole", "explicit"])
def test_the_count_is_where_the_key_is(place):
    """So a program that has brought its key to the devices transfers nothing more."""
    spec = PLACES[place] if place != "explicit" else NamedSharding(explicit_mesh, P())
    key, x, f = jax.device_put(KEY, spec), placed(place), jax.jit(noisy)
    with jaxstate.rng_stream(key) as stream, jax.transfer_guard("disallow"):
        for _ in range(2):
            f(x)
            jaxstate.next_key()
            assert stream.count.sharding.device_set == x.sharding.device_set
    assert stream.count == 4


def test_a_stream_around_and_inside_of_a_mesh():
    f = jax.jit(noisy)
    x = jax.device_put(X, NamedSharding(explicit_mesh, ALL))
    with jaxstate.rng_stream(KEY) as stream:
        jaxstate.next_key()
        with jax.set_mesh(explicit_mesh):
            found = [f(x), f(x)]
            jaxstate.next_key()
            with jaxstate.rng_stream(fold(7)) as inner:
                other = f(x)
                assert inner.count == 1
        found.append(f(placed("one device")))
        assert stream.count == 5
        assert jax.typeof(stream.count).sharding.mesh.empty
    for n, y in zip((1, 2, 4), found, strict=True):
        np.testing.assert_allclose(y, X + jax.random.uniform(fold(n)), rtol=1e-6)
    np.testing.assert_allclose(other, X + jax.random.uniform(fold(7, 0)), rtol=1e-6)


def uses():
    here = PLACES["one device"]
    slot = new_slot(jax.device_put(X, here), name="total")

    def add(x):
        write(slot, read(slot) + x)
        return x

    yield "slot 'total'", lambda x: jax.jit(add)(x)
    yield "slot 'total'", lambda x: jax.jit(lambda x: x * read(slot))(x)

    def draw(x):
        with jaxstate.rng_stream(jax.device_put(KEY, here), "noise"):
            return jax.jit(lambda x: x + jaxstate.random.uniform(stream="noise"))(x)

    yield "the key of random stream 'noise'", draw

    def scaled(x):
        w = jaxstate.param("w", jax.nn.initializers.ones, ())
        return w * x

    net = jaxstate.parametrized(lambda x: jax.jit(scaled)(x), name="net")
    yield "parameter 'w'", lambda x: net.apply({"w": jax.device_put(np.float32(1), here)}, x)


@pytest.mark.parametrize("i", range(4))
def test_errors_about_devices_name_what_is_elsewhere(i):
    name, use = list(uses())[i]
    with pytest.raises(ValueError, match=rf"argument {name} of .*argument x of "):
        use(placed("another device"))


@pytest.mark.parametrize("use", ["draws", "sharded slot", "variables", "sown values"])
@pytest.mark.parametrize(
    "region, around", [("auto", "scan"), ("explicit", "jit"), ("loop in auto", "jit of scan")]
)
def test_a_region_changes_no_value(region, around, use):
    regions.check(region, around, use)
