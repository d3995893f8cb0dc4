"""shard_map and pmap: per-device streams, replicated parameters. Runs on eight host devices."""

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

slot = new_slot(0.0)
jax.config.update("jax_check_tracer_leaks", False)  # it reports tracers in tracebacks
for mode in (lambda f: f, jax.jit):
    with pytest.raises(jaxstate.UnsupportedPrimitiveError):
        mode(mapped(lambda x: (write(slot, x.sum()), x)[1]))(x)
print("ok")
"""


def test_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, check=False, capture_output=True, text=True
    )
    assert out.stdout == "ok\n", out.stderr[-3000:]
