"""State of another thread: plain JAX does not notice it, and who uses it finds it.

What JAX calls and traces is noted beside a slot that another thread has made, and without one. Each
case runs on a thread of its own, which has no slots from other tests.
"""

import re
import threading

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
