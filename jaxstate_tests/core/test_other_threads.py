"""State of another thread: plain JAX does not notice it, and who uses it finds it.

What JAX calls and traces is noted beside a slot that another thread has made, and without one. Each
case runs on a thread of its own, which has no slots from other tests.
"""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import linear_call
from jax.sharding import Mesh, PartitionSpec

import jaxstate
from jaxstate.extend import new_slot, read, write

pytestmark = pytest.mark.leaks_allowed("caches are looked at, and the leak checker has none")


def on_another_thread(make):
    kept = []
    thread = threading.Thread(target=lambda: kept.append(make()))
    thread.start()
    thread.join()
    return kept[0]


class Noted:
    """A function whose calls are noted."""

    def __init__(self, log, name, fun):
        self.log, self.fun = log, fun
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args):
        self.log.append(self.__name__)
        return self.fun(*args)


def with_jvp(note, x):
    f = jax.custom_jvp(note("f", lambda x: 2 * x))
    f.defjvp(note("rule", lambda p, t: (f(*p), 3 * t[0])))
    return f(x)


def with_vjp(note, x, **options):
    f = jax.custom_vjp(note("f", lambda x: 2 * x))
    f.defvjp(note("fwd", lambda x: (f(x), x)), note("bwd", lambda _, ct: (3 * ct,)), **options)
    return f(x)


def with_remat(note, x):
    return with_vjp(note, x, optimize_remat=True)


def solved(note, x):
    operator = note("operator", lambda v: (2 + jnp.sin(x)) * v)

    def solve(operator, b):
        return b / operator(jnp.ones_like(b))

    return lax.custom_linear_solve(operator, x, solve, transpose_solve=solve)


def root(note, x):
    g = note("g", lambda y: y - x / 2)
    return lax.custom_root(g, x, lambda g, y: y - g(y), lambda g, y: y / g(jnp.ones_like(y)))


def converted(note, x):
    f = note("f", lambda x: 2 * x)
    for _ in range(2):
        h, consts = jax.closure_convert(f, x)
        x = h(x, *consts)
    return x


def traced(note, x):
    f = note("f", lambda x: 2 * x)
    for _ in range(2):
        (x,) = jax.core.eval_jaxpr(jax.make_jaxpr(f)(x).jaxpr, (), x)
    return x


def on_devices(note, x):
    spec = PartitionSpec("d")
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    f = note("f", lambda x: 2 * x)
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)(x[None])[0]


def in_lanes(note, x):
    f = jax.custom_batching.custom_vmap(note("f", lambda x: 2 * x))
    f.def_vmap(note("rule", lambda size, batched, x: (2 * x, batched[0])))
    return jax.vmap(f)(jnp.stack([x, x]))[0]


def linear(note, x):
    f, transpose = note("f", lambda r, x: r * x), note("transpose", lambda r, x: r * x)
    return linear_call(f, transpose, jnp.float32(2), x)


def looped(note, x):
    """Under `jax.disable_jit` and a derivative, JAX tries the condition in Python first."""
    go_on = note("go on", lambda x: x < 3)
    with jax.disable_jit():
        return lax.while_loop(go_on, note("turn", lambda x: 2 * x), x)


PROGRAMS = [
    with_jvp, with_vjp, with_remat, solved, root, converted, traced, on_devices, in_lanes, linear,
    looped,
]  # fmt: skip
AROUND = {"": lambda f: f, "jit": jax.jit, "grad": jax.grad, "make_jaxpr": jax.make_jaxpr}


def observed(program, around):
    """What it gives, what is called, and the equations."""
    log = []
    jax.clear_caches()
    if program is looped and around == "grad":
        return None  # JAX has no reverse mode

    def note(name, fun):
        return Noted(log, name, fun)

    y = AROUND[around](lambda x: program(note, x))(jnp.float32(0.5))
    return re.sub(r"0x\w+|\w+_thunk=.*", "", str(y)), log


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_plain_jax_does_not_notice_the_slots_of_another_thread(program):
    def all_of_them():
        return [observed(program, around) for around in AROUND]

    before = on_another_thread(all_of_them)
    slot = on_another_thread(lambda: new_slot(0.0))
    array = on_another_thread(lambda: jaxstate.array(jnp.ones(2)))
    after = on_another_thread(all_of_them)
    del slot, array
    assert after == before


USES = {
    "closure_convert": lambda f: lambda x: (lambda h, consts: h(x, *consts))(
        *jax.closure_convert(f, x)
    ),
    "make_jaxpr": lambda f: lambda x: (
        lambda c: jax.core.eval_jaxpr(c.jaxpr, c.consts, x)[0]
    )(jax.make_jaxpr(f)(x)),
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "while_loop": lambda f: lambda x: lax.while_loop(lambda x: f(x) > 99, f, x),
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("around", USES)
def test_the_first_use_of_a_slot_that_another_thread_has_made(around, nested):
    """Each call adds ``x`` to it, and the derivative of what it holds is seen."""
    slot = on_another_thread(lambda: new_slot(jnp.float32(1)))

    def f(x):
        write(slot, read(slot) + x)
        return x * read(slot)

    def run(x):
        g = USES[around](f)
        y = USES[around](g)(x) if nested and around != "while_loop" else g(x)
        return y

    with jax.disable_jit(around == "while_loop"):
        y, dx = jax.jvp(run, (jnp.float32(2),), (jnp.float32(1),))
    assert read(slot) == 3
    wanted = (2.0, 1.0) if around == "while_loop" else (6.0, 5.0)
    np.testing.assert_allclose((y, dx), wanted)


# -- Things that threads share ---------------------------------------------------------------


@jax.jit
def drawn_in_a_loop(x):
    return jax.lax.fori_loop(0, 2, lambda i, x: x + jaxstate.random.normal(), x)


def layer(n):
    @jaxstate.parametrized
    def layer(x):
        return jnp.tanh(x @ jaxstate.param("w", jax.nn.initializers.normal(1.0), (x.shape[-1], n)))

    return layer


@jaxstate.parametrized
def network(x, first=layer(3), last=layer(2)):
    calls = jaxstate.variable("calls", jnp.zeros, ())
    calls.value += 1
    return jax.jit(last)(jax.lax.fori_loop(0, 2, lambda i, x: first(x), x)) + drawn_in_a_loop(0.0)


@jaxstate.inplace
def summed_in_place(x):
    def add(i, total):
        x[i] += total
        return total + x[i]

    return jax.lax.fori_loop(0, 3, add, 0.0), x


def with_a_stream(n):
    with jaxstate.rng_stream(jax.random.key(n)) as stream:
        return [drawn_in_a_loop(n + 0.5) for _ in range(3)], stream.count


def with_parameters(n):
    x = jnp.ones((1, 3))
    params, state = network.init_with_state(jax.random.key(n), x)
    for k in range(3):
        y, state = network.apply_with_state(params, state, x, key=jax.random.key(k))
    return params, state, y


def in_place(n):
    return [summed_in_place(jnp.arange(3.0) + n + k) for k in range(3)]


def with_an_object(n):
    def count(tree):
        def turn(i, c):
            tree["n"] += tree["step"]
            return c

        jax.lax.fori_loop(0, 3, turn, 0)

    return jaxstate.mutate(count)({"n": 0.0, "step": float(n)})


def plain(n):
    return jax.vmap(jax.grad(lambda x: jnp.sin(x) ** n))(jnp.arange(3.0))


WORKS = (with_a_stream, with_parameters, in_place, with_an_object, plain)


def test_threads_that_share_functions_and_networks():
    """At their first use, all at once: as one after the other."""
    jobs = [(work, n) for n in (1, 2) for work in WORKS]
    interval = sys.getswitchinterval()
    jax.clear_caches()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(pool.map(lambda job: job[0](job[1]), jobs))
    finally:
        sys.setswitchinterval(interval)
    for (work, n), result in zip(jobs, found, strict=True):
        wanted = work(n)
        assert jax.tree.structure(result) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
