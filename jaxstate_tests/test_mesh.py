"""shard_map and pmap: per-device streams, replicated parameters, shared slots. Runs on eight host
devices."""

import os
import subprocess
import sys

PROGRAM = r"""
import jax, jax.numpy as jnp, numpy as np, pytest, jaxstate
jax.config.update("jax_check_tracer_leaks", True)
from jax.sharding import AxisType, PartitionSpec as P
from jaxstate.extend import new_slot, write

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
spec, x, key = P(("a", "b")), jnp.ones(8), jax.random.key(0)

def fold(*counts):
    k = key
    for n in counts:
        k = jax.random.fold_in(k, n)
    return k

def body(x):
    def turn(c, _):
        return c + jaxstate.random.uniform((1,)), None
    u = jaxstate.random.uniform((1,))
    return x * u + jax.lax.scan(turn, jnp.zeros_like(x) * x, None, length=2)[0]

def mapped(f=body, **kwargs):
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs)

def by_hand(device_key):
    return sum(jax.random.uniform(jax.random.fold_in(device_key, n), (1,))[0] for n in range(3))

def check(run, wanted, **kwargs):
    with jaxstate.rng_stream(key, **kwargs) as stream:
        jaxstate.next_key()
        np.testing.assert_allclose(run(x), wanted, rtol=1e-6)
        assert stream.count == 2

split = np.array([by_hand(fold(1, i)) for i in range(8)])
shared = np.full(8, by_hand(fold(1)))
pmapped = jax.pmap(lambda x: body(x[None])[0])
for run in (mapped(), jax.jit(mapped()), jax.jit(mapped(check_vma=False)), pmapped,
            lambda x: jax.vjp(mapped(), x)[0], lambda x: jax.linearize(jax.jit(mapped()), x)[0]):
    check(run, split)
    check(run, shared, vmap="share")

us = np.array([jax.random.uniform(fold(1, i, 0), (1,))[0] for i in range(8)])
check(lambda x: jax.grad(lambda x: mapped()(x).sum())(x), us)
check(jax.jit(jax.grad(lambda x: mapped()(x).sum())), us)

net = jaxstate.parametrized(mapped(lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ())))
p = net.init(key, x)
assert p == {"w": 1.0}
q = {"w": jnp.float32(3)}
for apply in (net.apply, jax.jit(net.apply)):
    np.testing.assert_allclose(apply(q, x), 3 * x)
    assert jax.grad(lambda q: apply(q, x).sum())(q) == {"w": 8.0}

# In lanes, around lanes, in a scan, and in a custom rule.
@jax.custom_jvp
def ruled(x):
    return x * jaxstate.random.uniform((1,))

ruled.defjvp(lambda p, t: (ruled(*p), t[0]))
check(jax.jit(mapped(ruled)), us)
check(mapped(ruled), us)
lanes = mapped(lambda x: jax.vmap(lambda y: y * jaxstate.random.uniform())(x))
in_lanes = np.array([jax.random.uniform(fold(1, i, 0, 0, 0)) for i in range(8)])
check(lanes, in_lanes)
check(jax.jit(lanes), in_lanes)
turns = lambda x: jax.lax.scan(lambda c, _: (c, mapped(ruled)(x)), 0, length=2)[1][1]
with jaxstate.rng_stream(key) as stream:
    second = [jax.random.uniform(fold(1, i, 0), (1,))[0] for i in range(8)]
    np.testing.assert_allclose(jax.jit(turns)(x), second, rtol=1e-6)
    assert stream.count == 2
around = jax.vmap(mapped(ruled))
with jaxstate.rng_stream(key) as stream:
    draws = [fold(0, lane, 0, i, 0) for lane in range(2) for i in range(8)]
    wanted = np.array([jax.random.uniform(k, (1,))[0] for k in draws]).reshape(2, 8)
    np.testing.assert_allclose(jax.jit(around)(jnp.stack([x, x])), wanted, rtol=1e-6)
    assert stream.count == 1

# A slot is one value for all devices: in as P(), out as P().
from jaxstate.extend import read
axes = ("a", "b")
data = jnp.arange(8.0)

def tracking(x):
    # a running mean over all devices, and a count in a loop
    write(mean, 0.5 * read(mean) + jax.lax.pmean(x.mean(), axes))
    def turn(c, _):
        write(steps, read(steps) + 1)
        write(mean, read(mean) + 0.25 * jax.lax.psum(c.sum(), axes))
        return c * read(mean), None
    return jax.lax.scan(turn, x, None, length=3)[0]

def tracking_by_hand(m, n, x):
    m = 0.5 * m + x.mean()
    for _ in range(3):
        n, m = n + 1, m + 0.25 * x.sum()
        x = x * m
    return x, m, n

def reset(at=2.0):
    global mean, steps
    mean, steps = new_slot(at, name="mean"), new_slot(jnp.int32(0), name="steps")

def state():
    assert not isinstance(read(mean), jax.core.Tracer)
    return read(mean), read(steps)

def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)

for mode in (lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f))):
    reset()
    run = mode(mapped(tracking))
    for _ in range(2):  # the second call is a cached one
        before = state()
        found = run(data)
        wanted, *wanted_state = tracking_by_hand(*before, data)
        close(found, wanted)
        close(state(), tuple(wanted_state))
    # around: in a scan, and differentiated (with a tangent that comes in through the slot)
    reset()
    def twice(x):
        return jax.lax.scan(lambda c, _: (mapped(tracking)(c), None), x, None, length=2)[0]
    y = mode(twice)(data)
    wanted, m, n = tracking_by_hand(2.0, 0, data)
    wanted, m, n = tracking_by_hand(m, n, wanted)
    close(y, wanted), close(state(), (m, n))
# in a vmap: one write for all lanes; lanes of their own
reset()
def count(x):
    write(steps, read(steps) + 1)
    return x * read(steps)
close(jax.vmap(mapped(count))(jnp.stack([data, data])), jnp.stack([data, data]))
assert read(steps) == 1
def lane(x):
    own = new_slot(x.sum(), name="own")
    def body(x):
        write(own, read(own) * 2 + jax.lax.psum(x.sum(), axes))
        return x * read(own)
    return mapped(body)(x), read(own)
for run in (jax.vmap(lane), jax.jit(jax.vmap(lane))):
    rows = jnp.stack([data, data + 1])
    total = 3 * rows.sum(1)
    close(run(rows), (rows * total[:, None], total))

# only over one axis; a shard_map in another; a stream and a slot; a read alone
reset()
def over(axis, f, mesh):
    spec = P(axis)
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={axis})
half = over("a", lambda x: count(x), mesh)
close(jax.jit(half)(data), data), close(read(steps), 1)
inner = lambda x: over("b", count, jax.sharding.get_abstract_mesh())(x)
outer = over("a", lambda x: count(inner(count(x))), mesh)
close(jax.jit(outer)(data), data * 2 * 3 * 4), close(read(steps), 4)
reset()
both = mapped(lambda x: count(x) * jaxstate.random.uniform((1,)))
for run in (both, jax.jit(both)):
    reset()
    check(run, us)
    assert read(steps) == 1
reset()
for run in (mapped(lambda x: x * read(mean), check_vma=False), jax.pmap(lambda x: x * read(mean))):
    close(run(data), 2 * data), close(jax.jit(run)(data), 2 * data)

# Differentiated. (The leak checker reports such programs of JAX without state, too.)
jax.config.update("jax_check_tracer_leaks", False)
for mode in (lambda f: f, jax.jit):
    for d in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x + 1,))[1],
              lambda f: lambda x: jax.linearize(f, x)[1](x)):
        reset()
        def through(x):
            write(mean, x[0] * 3)
            return (mapped(tracking)(x) * read(mean)).sum()
        def through_by_hand(x):
            y, m, _ = tracking_by_hand(x[0] * 3, 0, x)
            return (y * m).sum()
        close(mode(d(through))(data / 8), d(through_by_hand)(data / 8))
        close(state(), tracking_by_hand(0.0, 0, data / 8)[1:])

slot = new_slot(0.0)
for mode in (lambda f: f, jax.jit):
    with pytest.raises(jaxstate.DeviceWriteError, match="varies over the mesh axes a, b"):
        mode(mapped(lambda x: (write(slot, x.sum()), x)[1]))(x)
    with pytest.raises(jaxstate.DeviceWriteError, match="check_vma=False"):
        mode(mapped(lambda x: (write(slot, 1.0), x)[1], check_vma=False))(x)
    with pytest.raises(jaxstate.DeviceWriteError, match="pmap is one"):
        mode(jax.pmap(lambda x: (write(slot, 1.0), x)[1]))(x)
    assert read(slot) == 0
print("ok")
"""


def test_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, check=False, capture_output=True, text=True
    )
    assert out.stdout == "ok\n", out.stderr[-3000:]
