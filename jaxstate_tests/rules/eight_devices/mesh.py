"""shard_map and pmap: streams per device, replicated parameters, one slot for all devices.

What is in `devices.py` goes through all kinds of meshes and nestings; this is the part that every
run of the tests has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.rules.eight_devices.common import (
    AXES,
    KEY,
    MODES,
    P,
    X,
    close,
    mapped,
    mesh,
    uniform,
)  # fmt: skip

ONES, SMALL = np.ones(8, np.float32), X / 64

both = pytest.mark.parametrize("mode", MODES)


def lanes(f):
    """``f`` for each of the eight devices."""
    return np.array([f(i) for i in range(8)])


# -- Streams: the stream has drawn once before, so the count of the shard_map is 1 -----------


def check_draws(run, wanted, **options):
    with jaxstate.rng_stream(KEY, **options) as stream:
        jaxstate.next_key()
        close(np.asarray(run(ONES)), wanted)
        assert stream.count == 2


def three_draws(x):
    def turn(c, _):
        return c + jaxstate.random.uniform((1,)), None

    u = jaxstate.random.uniform((1,))
    return x * u + jax.lax.scan(turn, jnp.zeros_like(x) * x, None, length=2)[0]


def one_draw(x):
    return x * jaxstate.random.uniform((1,))


@jax.custom_jvp
def ruled(x):
    return one_draw(x)


ruled.defjvp(lambda p, t: (ruled(*p), t[0]))


def vjp(f):
    return lambda x: jax.vjp(f, x)[0]


def linearized(f):
    return lambda x: jax.linearize(jax.jit(f), x)[0]


THREE_DRAWS = {
    "eagerly": mapped(three_draws),
    "jit": jax.jit(mapped(three_draws)),
    "not checked": jax.jit(mapped(three_draws, check_vma=False)),
    "pmap": jax.pmap(lambda x: three_draws(x[None])[0]),
    "vjp": vjp(mapped(three_draws)),
    "linearize": linearized(mapped(three_draws)),
}


@pytest.mark.parametrize("name", THREE_DRAWS)
def test_every_device_draws_its_own(name):
    wanted = lanes(lambda i: sum(uniform(1, i, n, shape=(1,))[0] for n in range(3)))
    check_draws(THREE_DRAWS[name], wanted)


@pytest.mark.parametrize("name", THREE_DRAWS)
def test_all_devices_draw_the_same_from_a_stream_that_they_share(name):
    wanted = lanes(lambda i: sum(uniform(1, n, shape=(1,))[0] for n in range(3)))
    check_draws(THREE_DRAWS[name], wanted, vmap="share")


FIRST = [uniform(1, i, 0, shape=(1,))[0] for i in range(8)]


@both
def test_the_derivative_has_the_draws(mode):
    check_draws(mode(jax.grad(lambda x: mapped(one_draw)(x).sum())), np.array(FIRST))


@both
def test_draws_in_a_custom_rule_and_in_lanes_on_the_devices(mode):
    check_draws(mode(mapped(ruled)), np.array(FIRST))
    in_lanes = mapped(jax.vmap(lambda y: y * jaxstate.random.uniform()))
    check_draws(mode(in_lanes), lanes(lambda i: uniform(1, i, 0, 0, 0)))


def test_devices_in_a_scan_and_in_lanes():
    def turns(x):
        return jax.lax.scan(lambda c, _: (c, mapped(ruled)(x)), 0, length=2)[1][1]

    with jaxstate.rng_stream(KEY) as stream:
        close(np.asarray(jax.jit(turns)(ONES)), np.array(FIRST))
        assert stream.count == 2
    with jaxstate.rng_stream(KEY) as stream:
        found = jax.jit(jax.vmap(mapped(ruled)))(np.stack([ONES, ONES]))
        wanted = [lanes(lambda i: uniform(0, lane, 0, i, 0, shape=(1,))[0]) for lane in range(2)]
        close(np.asarray(found), np.stack(wanted))
        assert stream.count == 1


# -- Parameters ------------------------------------------------------------------------------


@both
def test_a_parameter_is_one_for_all_devices(mode):
    ones = jax.nn.initializers.ones
    net = jaxstate.parametrized(mapped(lambda x: x * jaxstate.param("w", ones, ())))
    assert net.init(KEY, ONES) == {"w": 1.0}
    params, apply = {"w": jnp.float32(3)}, mode(net.apply)
    close(np.asarray(apply(params, ONES)), 3 * ONES)
    assert jax.grad(lambda p: apply(p, ONES).sum())(params) == {"w": 8.0}


# -- Slots: one value for all devices, in as P(), out as P() ---------------------------------


class Tracking:
    """A running mean over all devices, and a count in a loop."""

    def __init__(self, at=2.0):
        self.mean, self.steps = new_slot(at, name="mean"), new_slot(jnp.int32(0), name="steps")

    def __call__(self, x):
        write(self.mean, 0.5 * read(self.mean) + jax.lax.pmean(x.mean(), AXES))

        def turn(c, _):
            write(self.steps, read(self.steps) + 1)
            write(self.mean, read(self.mean) + 0.25 * jax.lax.psum(c.sum(), AXES))
            return c * read(self.mean), None

        return jax.lax.scan(turn, x, None, length=3)[0]

    def count(self, x):
        write(self.steps, read(self.steps) + 1)
        return x * read(self.steps)

    def state(self):
        assert not isinstance(read(self.mean), jax.core.Tracer)
        return float(read(self.mean)), int(read(self.steps))


def tracking_by_hand(m, n, x):
    m = 0.5 * m + x.mean()
    for _ in range(3):
        n, m = n + 1, m + 0.25 * x.sum()
        x = x * m
    return x, m, n


def check(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize(
    "mode", [*MODES, jax.checkpoint, lambda f: jax.jit(jax.jit(f))],
    ids=["eagerly", "jit", "checkpoint", "jit of jit"],
)  # fmt: skip
def test_a_slot_written_by_all_devices(mode):
    tracking = Tracking()
    run = mode(mapped(tracking))
    for _ in range(2):  # the second call is a cached one
        wanted, *state = tracking_by_hand(*tracking.state(), SMALL)
        check(run(SMALL), wanted)
        check(tracking.state(), tuple(state))

    tracking = Tracking()

    def twice(x):
        return jax.lax.scan(lambda c, _: (mapped(tracking)(c), None), x, None, length=2)[0]

    found = mode(twice)(SMALL)
    wanted, *state = tracking_by_hand(2.0, 0, SMALL)
    wanted, *state = tracking_by_hand(*state, wanted)
    check((found, tracking.state()), (wanted, tuple(state)))


@both
def test_one_write_for_all_lanes_and_a_slot_of_each_lane(mode):
    tracking, rows = Tracking(), np.stack([X, X + 1])
    check(mode(jax.vmap(mapped(tracking.count)))(rows), rows)
    assert read(tracking.steps) == 1

    def lane(x):
        own = new_slot(x.sum(), name="own")

        def body(x):
            write(own, read(own) * 2 + jax.lax.psum(x.sum(), AXES))
            return x * read(own)

        return mapped(body)(x), read(own)

    total = 3 * rows.sum(1)
    check(mode(jax.vmap(lane))(rows), (rows * total[:, None], total))


def test_over_one_axis_and_in_another_shard_map():
    def over(axis, f, mesh):
        return jax.shard_map(f, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis})

    tracking = Tracking()
    count = tracking.count
    check(jax.jit(over("a", count, mesh))(X), X)
    assert read(tracking.steps) == 1

    def inner(x):
        return over("b", count, jax.sharding.get_abstract_mesh())(x)

    outer = over("a", lambda x: count(inner(count(x))), mesh)
    check(jax.jit(outer)(X), X * 2 * 3 * 4)
    assert read(tracking.steps) == 4


@both
def test_a_stream_and_a_slot(mode):
    tracking = Tracking()
    run = mapped(lambda x: tracking.count(x) * jaxstate.random.uniform((1,)))
    check_draws(mode(run), np.array(FIRST))
    assert read(tracking.steps) == 1


@both
def test_a_slot_that_is_only_read(mode):
    slot = new_slot(2.0)
    for run in (
        mapped(lambda x: x * read(slot), check_vma=False),
        jax.pmap(lambda x: x * read(slot)),
    ):
        check(mode(run)(X), 2 * X)


DERIVATIVES = {
    "grad": jax.grad,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x + 1,))[1],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
}


@pytest.mark.leaks_allowed("JAX leaks in such programs without state, too")
@both
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_tangents_go_through_a_slot(mode, derivative):
    tracking, d = Tracking(), DERIVATIVES[derivative]

    def through(x):
        write(tracking.mean, x[0] * 3)
        return (mapped(tracking)(x) * read(tracking.mean)).sum()

    def through_by_hand(x):
        y, m, _ = tracking_by_hand(x[0] * 3, 0, x)
        return (y * m).sum()

    check(mode(d(through))(SMALL), d(through_by_hand)(SMALL))
    check(tracking.state(), tracking_by_hand(0.0, 0, SMALL)[1:])


REFUSED = {
    "varies over the mesh axes a, b": lambda write: mapped(lambda x: (write(x.sum()), x)[1]),
    "check_vma=False": lambda write: mapped(lambda x: (write(1.0), x)[1], check_vma=False),
    "pmap is one": lambda write: jax.pmap(lambda x: (write(1.0), x)[1]),
}


@pytest.mark.leaks_allowed("a refusal holds tracers in its traceback")
@both
@pytest.mark.parametrize("message", REFUSED)
def test_a_write_that_is_not_one_for_all_devices_is_refused(mode, message):
    slot = new_slot(0.0)
    run = REFUSED[message](lambda value: write(slot, value))
    with pytest.raises(jaxstate.DeviceWriteError, match=message):
        mode(run)(ONES)
    assert read(slot) == 0


@both
def test_a_slot_of_which_devices_and_lanes_have_their_own(mode):
    calls = new_slot(jnp.int32(0), lanes=lambda before, values: before + (values - before).sum(0))

    def f(x):
        write(calls, read(calls) + 1)
        return x

    wanted = 0
    for run, times in (
        (mapped(f), 8),
        (mapped(f, check_vma=False), 8),
        (mapped(jax.vmap(f)), 8),
        (lambda x: jax.vmap(lambda _: mapped(f)(x))(X[:2]), 16),
    ):
        mode(run)(SMALL)
        wanted += times
        assert read(calls) == wanted
    jax.pmap(f)(SMALL)
    assert read(calls) == wanted + 8
