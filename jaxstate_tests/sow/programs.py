"""Programs that mark values, and the same programs by hand."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxstate import sow

X = jnp.array([0.3, -0.7, 1.1])


def op(mode):
    def operation(x):
        return x + jnp.tanh(sow("h", jnp.sin(x) * 2, mode=mode)) * 0.5

    return operation


def op_by_hand(x, h):
    h = jnp.sin(x) * 2 if h is None else h
    return x + jnp.tanh(h) * 0.5, h


def operation(x):
    """Without ``sow``."""
    return x + jnp.tanh(jnp.sin(x) * 2) * 0.5


class Program(NamedTuple):
    """One transformation, as a function of an operation ``f(x)`` or ``g(x, h) -> (y, h)``."""

    name: str
    mode: str
    sowing: Any
    by_hand: Any
    reverse: bool = True  # whether reverse mode exists
    planted_derivative: bool = True  # whether it has a derivative with respect to what is planted
    forward: bool = True  # whether forward mode exists


def same(f):
    return f


def custom_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: (g(*primals), 3 * tangents[0]))
    return g


def custom_jvp_by_hand(g):
    f = jax.custom_jvp(lambda x, h: g(x, h))

    @f.defjvp
    def _(primals, tangents):
        y, h = f(*primals)
        return (y, h), (3 * tangents[0], jnp.zeros_like(h))

    return f


def custom_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: (f(x), x), lambda x, ct: (3 * ct * x,))
    return g


def custom_vjp_by_hand(g):
    f = jax.custom_vjp(lambda x, h: g(x, h))

    def backward(residuals, cts):
        x, h = residuals
        return 3 * cts[0] * x, jax.tree.map(jnp.zeros_like, h)

    f.defvjp(lambda x, h: (f(x, h), (x, h)), backward)
    return f


def scan(length=3, **options):
    def sowing(f):
        def body(x, _):
            return f(x), None

        return lambda x: lax.scan(body, x, None, length=length, **options)[0]

    return sowing


def scan_by_hand(length=3, **options):
    return lambda g: lambda x, h: lax.scan(g, x, h, length=length, **options)


def nested_scan(f):
    return scan(2)(scan(3)(f))


def nested_scan_by_hand(g):
    return scan_by_hand(2)(scan_by_hand(3)(g))


def last_of_loop(n):
    def by_hand(g):
        def run(x, h):
            steps = [(x, jnp.zeros_like(x))]
            for _ in range(n):
                steps.append(g(steps[-1][0], h))
            return steps[-1]

        return run

    return by_hand


def while_loop(f):
    def body(s):
        return s[0] + 1, f(s[1])

    return lambda x: lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]


def while_condition(f):
    """The condition sows: one time more than the body runs."""

    def condition(s):
        return (s[0] < 2) & jnp.all(f(s[1]) < 1e9)

    return lambda x: lax.while_loop(condition, lambda s: (s[0] + 1, s[1] * 2), (0, x))[1]


def while_condition_by_hand(g):
    return lambda x, h: (x * 4, g(x * 4, h)[1])


def append_in_python(f):
    return lambda x: f(f(f(x)))


def append_in_python_by_hand(g):
    def run(x, h):
        hs = []
        for i in range(3):
            x, sown = g(x, None if h is None else h[i])
            hs.append(sown)
        return x, jnp.stack(hs)

    return run


def twice_per_step(f):
    return scan(2)(lambda x: f(jax.jit(f)(x) * 2))


def twice_per_step_by_hand(g):
    def body(x, h):
        x, first = g(x, None if h is None else h[0])
        x, second = g(x * 2, None if h is None else h[1])
        return x, jnp.stack([first, second])

    return lambda x, h: lax.scan(body, x, h, length=2)


def cond(f):
    return lambda x: lax.cond(x.sum() > 0, f, lambda x: f(x) * 2, x)


def cond_by_hand(g):
    def run(x, h):
        y, h = g(x, h)
        return jnp.where(x.sum() > 0, y, y * 2), h

    return run


def switch(f):
    branches = [lambda x: x, f, lambda x: f(x) * 2]
    return lambda x: sum(lax.switch(i, branches, x) for i in (0, 2))


def switch_by_hand(g):
    def run(x, h):
        y, h = g(x, h)
        return x + y * 2, h

    return run


def absent(taken):
    def sowing(f):
        return lambda x: lax.cond(jnp.all(x < 9) == taken, f, lambda x: x * 3, x)

    return sowing


def absent_by_hand(taken):
    def by_hand(g):
        return g if taken else lambda x, h: (x * 3, jnp.zeros_like(x))

    return by_hand


def in_some_steps(f):
    def body(i, x):
        return lax.cond(i % 2 == 0, f, lambda x: x * 3, x)

    return lambda x: lax.fori_loop(0, 4, body, x)


def in_some_steps_by_hand(g):
    def run(x, h):
        for _ in range(2):
            x, sown = g(x, h)
            x = x * 3
        return x, sown

    return run


def fori(f):
    return lambda x: lax.fori_loop(0, 3, lambda i, x: f(x), x)


def fori_traced(f):
    return lambda x: jax.jit(lambda n, x: lax.fori_loop(0, n, lambda i, x: f(x), x))(3, x)


def mapped(f):
    return lambda x: lax.map(lambda s: f(x * s), jnp.arange(1.0, 3.0)).sum(0)


def mapped_by_hand(g):
    def run(x, h):
        scales = jnp.arange(1.0, 3.0)
        y, h = lax.map(lambda s: g(x * s[0], s[1]), (scales, h))
        return y.sum(0), h

    return run


def vmapped(f):
    return lambda x: jax.vmap(lambda s: f(x * s))(jnp.arange(1.0, 3.0)).sum(0)


def vmapped_by_hand(g):
    def run(x, h):
        y, h = jax.vmap(lambda s, h: g(x * s, h))(jnp.arange(1.0, 3.0), h)
        return y.sum(0), h

    return run


def compose(*transformations):
    def composed(f):
        for transformation in reversed(transformations):
            f = transformation(f)
        return f

    return composed


PROGRAMS = [
    Program("call", "strict", same, same),
    Program("jit", "strict", jax.jit, same),
    Program("jit in jit", "strict", compose(jax.jit, jax.jit), same),
    Program("checkpoint", "strict", jax.checkpoint, jax.checkpoint),
    Program("checkpoint of jit", "strict", compose(jax.checkpoint, jax.jit), jax.checkpoint),
    Program("custom_jvp", "strict", custom_jvp, custom_jvp_by_hand,
            planted_derivative=False),
    Program("custom_vjp", "strict", custom_vjp, custom_vjp_by_hand,
            planted_derivative=False, forward=False),
    Program("custom_jvp of jit", "strict", compose(custom_jvp, jax.jit), custom_jvp_by_hand,
            planted_derivative=False),
    Program("cond", "strict", cond, cond_by_hand),
    Program("cond of jit", "clobber", compose(cond, jax.jit), cond_by_hand),
    Program("vmap", "strict", vmapped, vmapped_by_hand),
    Program("vmap of vmap", "strict", compose(vmapped, vmapped),
            compose(vmapped_by_hand, vmapped_by_hand)),
    Program("vmap of cond", "strict", compose(vmapped, cond),
            compose(vmapped_by_hand, cond_by_hand)),
    Program("scan", "append", scan(), scan_by_hand()),
    Program("scan, backwards", "append", scan(reverse=True), scan_by_hand(reverse=True)),
    Program("scan, unrolled", "append", scan(unroll=3), scan_by_hand()),
    Program("scan, one step", "append", scan(1), scan_by_hand(1)),
    Program("scan, no steps", "append", scan(0), scan_by_hand(0)),
    Program("scan in scan", "append", nested_scan, nested_scan_by_hand),
    Program("scan of jit of scan", "append", compose(scan(2), jax.jit, scan(3)),
            nested_scan_by_hand),
    Program("scan of checkpoint", "append", compose(scan(), jax.checkpoint),
            compose(scan_by_hand(), jax.checkpoint)),
    Program("scan of cond", "append", compose(scan(), cond), compose(scan_by_hand(), cond_by_hand)),
    Program("scan of vmap", "append", compose(scan(2), vmapped),
            compose(scan_by_hand(2), vmapped_by_hand)),
    Program("vmap of scan", "append", compose(vmapped, scan(2)),
            compose(vmapped_by_hand, scan_by_hand(2))),
    Program("scan of custom_vjp", "append", compose(scan(), custom_vjp),
            compose(scan_by_hand(), custom_vjp_by_hand), planted_derivative=False, forward=False),
    Program("fori_loop", "append", fori, scan_by_hand()),
    Program("map", "append", mapped, mapped_by_hand),
    Program("Python loop", "append", append_in_python, append_in_python_by_hand),
    Program("Python loop of jit", "append", compose(append_in_python, jax.jit),
            append_in_python_by_hand),
    Program("jit of Python loop", "append", compose(jax.jit, append_in_python),
            append_in_python_by_hand),
    Program("custom_jvp of Python loop", "append", compose(custom_jvp, append_in_python),
            compose(custom_jvp_by_hand, append_in_python_by_hand), planted_derivative=False),
    Program("scan, twice per step", "append", twice_per_step, twice_per_step_by_hand),
    Program("Python loop, the last", "clobber", append_in_python, last_of_loop(3)),
    Program("scan, the last", "clobber", scan(), last_of_loop(3)),
    Program("scan in scan, the last", "clobber", nested_scan, last_of_loop(6)),
    Program("scan of no steps, the last", "clobber", scan(0), last_of_loop(0)),
    Program("vmap of scan, the last", "clobber", compose(vmapped, scan()),
            compose(vmapped_by_hand, last_of_loop(3))),
    Program("scan of custom_vjp, the last", "clobber", compose(scan(), custom_vjp),
            compose(last_of_loop(3), custom_vjp_by_hand), planted_derivative=False, forward=False),
    Program("while_loop", "clobber", while_loop, last_of_loop(3), reverse=False),
    Program("while_loop of jit", "clobber", compose(while_loop, jax.jit), last_of_loop(3),
            reverse=False),
    Program("while_loop condition", "clobber", while_condition, while_condition_by_hand,
            reverse=False),
    Program("fori_loop, traced bounds", "clobber", fori_traced, last_of_loop(3), reverse=False),
    Program("switch, sometimes", "cond_clobber", switch, switch_by_hand),
    Program("cond, taken", "cond_clobber", absent(True), absent_by_hand(True)),
    Program("cond, not taken", "cond_clobber", absent(False), absent_by_hand(False)),
    Program("cond in a loop", "cond_clobber", in_some_steps, in_some_steps_by_hand),
]  # fmt: skip


def every_program(test):
    """Every program: a fifth of them in `make test`, another fifth for each property, and all of
    them in `make matrix`."""
    shift = zlib.crc32(test.__name__.encode())
    cells = [
        pytest.param(p, id=p.name, marks=() if (i + shift) % 5 == 0 else pytest.mark.slow)
        for i, p in enumerate(PROGRAMS)
    ]
    return pytest.mark.parametrize("program", cells)(test)


def check(found, wanted):
    found, wanted = jax.tree.leaves_with_path(found), jax.tree.leaves_with_path(wanted)
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, a), (_, b) in zip(found, wanted, strict=True):
        assert jnp.shape(a) == jnp.shape(b), path
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=str(path))


def total(out, h):
    """A scalar that depends on the result and on the collected value."""
    return jnp.sum(out) + jnp.sum(jnp.cos(h))
