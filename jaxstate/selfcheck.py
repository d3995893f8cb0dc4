"""``python -m jaxstate.selfcheck``: small programs that go through every place where jaxstate comes
between JAX and a program, each compared with the same program with its state passed by hand.

It says whether jaxstate works with the JAX that is installed: exit status 0 if it does.
"""

from __future__ import annotations

import importlib
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.sharding import Mesh, PartitionSpec

from jaxstate import (
    SplitStreamError,
    UnsupportedPrimitiveError,
    __version__,
    _jax,
    array,
    inplace,
    mutate,
    next_key,
    param,
    parametrized,
    rng_stream,
)

__all__ = ["failures", "main"]

Pairs = Iterator[tuple[Any, Any]]
PROGRAMS: list[Callable[[], Pairs]] = []

KEY_DATA = 7
X = np.arange(6.0, dtype=np.float32).reshape(2, 3) / 7


def program(fun: Callable[[], Pairs]) -> Callable[[], Pairs]:
    """A program yields what it computes, and what it should."""
    PROGRAMS.append(fun)
    return fun


def noise() -> Any:
    return jax.random.uniform(next_key())


def by_hand(n: int) -> Any:
    """Draw number ``n``."""
    return jax.random.uniform(jax.random.fold_in(jax.random.key(KEY_DATA), n))


def drawn(fun: Callable[..., Any], *args: Any) -> Any:
    """The result, and how often it has drawn."""
    with rng_stream(jax.random.key(KEY_DATA)) as stream:
        out = fun(*args)
        return out, int(stream.count)


# -- State through transformations -----------------------------------------------------------


@program
def jit() -> Pairs:
    f = jax.jit(lambda x: x * noise())
    wanted = 2 * by_hand(0), 2 * by_hand(1)
    yield drawn(lambda: (f(2.0), f(2.0))), (wanted, 2)
    f.clear_cache()  # type: ignore[attr-defined]
    yield drawn(lambda: (f(2.0), f(2.0))), (wanted, 2)
    yield jax.jit(jnp.sin).lower(1.0).compile()(1.0), jnp.sin(1.0)
    yield drawn(jax.jit(lambda x: f(x) + noise()), 2.0), (2 * by_hand(0) + by_hand(1), 2)


@program
def loops() -> Pairs:
    sums = sum(by_hand(n) for n in range(3))
    yield drawn(lambda: lax.scan(lambda c, _: (c + noise(), None), 0.0, length=3)[0]), (sums, 3)
    yield drawn(lambda: lax.fori_loop(0, 3, lambda i, c: c + noise(), 0.0)), (sums, 3)
    step = lambda c: (c[0] + 1, c[1] + noise())  # noqa: E731
    yield drawn(lambda: lax.while_loop(lambda c: c[0] < 3, step, (0, 0.0))[1]), (sums, 3)


@program
def branches() -> Pairs:
    two = lambda: noise() + noise()  # noqa: E731
    f = jax.jit(lambda p: lax.cond(p, noise, two))
    yield drawn(f, True), (by_hand(0), 1)
    yield drawn(f, False), (by_hand(0) + by_hand(1), 2)
    yield drawn(jax.jit(lambda i: lax.switch(i, [noise, two])), 1), (by_hand(0) + by_hand(1), 2)


@program
def derivatives() -> Pairs:
    f = lambda x: jnp.sin(x) * noise()  # noqa: E731
    slope = jnp.cos(0.5) * by_hand(0)
    for how in (jax.grad(f), jax.grad(jax.checkpoint(f)), jax.jacrev(f)):
        yield drawn(how, 0.5), (slope, 1)
    yield drawn(lambda: jax.jvp(f, (0.5,), (1.0,))[1]), (slope, 1)
    yield drawn(lambda: jax.linearize(f, 0.5)[1](1.0)), (slope, 1)
    try:
        drawn(jax.jacfwd(f), 0.5)
        yield "no error", "SplitStreamError"
    except SplitStreamError:
        pass


@program
def vmap() -> Pairs:
    def lanes(fun: Callable[[Any], Any]) -> Any:
        return jax.vmap(fun)(jnp.arange(3.0))

    def share() -> Any:
        with rng_stream(jax.random.key(KEY_DATA), vmap="share"):
            return lanes(lambda x: x * noise())

    yield share(), jnp.arange(3) * by_hand(0)
    out, count = drawn(lanes, lambda x: noise())
    yield (len(set(out.tolist())), count), (3, 1)


@program
def custom_rules() -> Pairs:
    def jvp(primals: Any, tangents: Any) -> Any:
        return primals[0] * noise(), tangents[0] * 5.0

    f = jax.custom_jvp(lambda x: x * noise())
    f.defjvp(jvp)
    yield drawn(f, 2.0), (2 * by_hand(0), 1)
    yield drawn(jax.grad(f), 2.0)[0], 5.0
    for optimized in (False, True):
        g = jax.custom_vjp(lambda x: jnp.sin(x) * noise())
        fwd = lambda x: (jnp.sin(x) * noise(), x)  # noqa: E731
        g.defvjp(fwd, lambda x, ct: (ct * 3.0,), optimize_remat=optimized)
        yield drawn(jax.jit(g), 2.0), (jnp.sin(2.0) * by_hand(0), 1)
        yield drawn(jax.jit(jax.grad(g)), 2.0), (3.0, 1)
    h = jax.custom_batching.custom_vmap(lambda x: x * noise())
    h.def_vmap(lambda size, batched, x: (x * 2.0, True))
    yield drawn(jax.jit(h), 2.0), (2 * by_hand(0), 1)


@program
def other_calls() -> Pairs:
    """Primitives that few programs bind, and rules as JAX has them behind flags."""
    module = importlib.import_module("jax.experimental.compute_on")
    compute_on = getattr(module, "compute_on2", module.compute_on)
    on_host = compute_on(compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
    yield drawn(jax.jit(on_host(lambda x: x * noise())), 2.0), (2 * by_hand(0), 1)

    def linear(x: Any) -> Any:
        call = jax.custom_derivatives.linear_call
        return call(lambda r, x: x * r, lambda r, ct: ct * r, noise(), x)

    yield drawn(jax.jit(linear), 2.0), (2 * by_hand(0), 1)
    groups = importlib.import_module("jax.experimental.scheduling_groups")
    grouped = groups.scheduling_group("f")(lambda x: x * noise())
    yield drawn(jax.jit(grouped), 2.0), (2 * by_hand(0), 1)
    if _jax.program_order_p is not None:
        overlap = importlib.import_module("jax.experimental.overlap")
        ordered = overlap.program_order(lambda x: x * noise(), enforce=False)
        yield drawn(jax.jit(ordered), 2.0), (2 * by_hand(0), 1)
    for flag, kind in (("jax_custom_jvp3", "jvp"), ("jax_custom_vjp3", "vjp")):
        if not hasattr(jax.config, "jax_custom_jvp3"):
            continue  # those of jax 0.10 are not finished
        before = getattr(jax.config, flag)
        jax.config.update(flag, True)
        try:
            f = getattr(jax, f"custom_{kind}")(lambda x: jnp.sin(x) * noise())
            if kind == "jvp":
                f.defjvp(lambda xs, ts: (jnp.sin(xs[0]), ts[0] * 3.0))
            else:
                f.defvjp(lambda x: (jnp.sin(x), None), lambda r, ct: (ct * 3.0,))
            yield drawn(jax.jit(f), 2.0), (jnp.sin(2.0) * by_hand(0), 1)
        finally:
            jax.config.update(flag, before)


@program
def solves() -> Pairs:
    def solved(b: Any) -> Any:
        return lax.custom_linear_solve(
            lambda x: 2 * x, b, lambda f, b: b / 2 + 0 * noise(), symmetric=True
        )

    yield drawn(solved, 3.0), (1.5, 1)
    yield drawn(jax.grad(solved), 3.0)[0], 0.5

    def transposed(b: Any) -> Any:
        half = lambda f, b: b / 2 + 0 * noise()  # noqa: E731
        return lax.custom_linear_solve(lambda x: 2 * x, b, half, half)

    yield drawn(jax.grad(transposed), 3.0)[0], 0.5

    def root(a: Any) -> Any:
        newton = lambda f, x: lax.fori_loop(0, 20, lambda i, x: (x + a / x) / 2, x)  # noqa: E731
        squared = lambda x: x * x - a + 0 * noise()  # noqa: E731
        return lax.custom_root(squared, 1.0, newton, lambda g, y: y / g(1.0))

    yield drawn(root, 4.0)[0], 2.0
    yield drawn(jax.grad(root), 4.0)[0], 0.25


@program
def devices() -> Pairs:
    mesh = Mesh(np.array(jax.devices()[:1]), ("i",))
    spec = PartitionSpec("i")
    f = jax.shard_map(lambda x: x * noise(), mesh=mesh, in_specs=spec, out_specs=spec)
    out, count = drawn(jax.jit(f), jnp.ones(2))
    yield (out.shape, count, bool(out[0] == out[1])), ((2,), 1, True)


@program
def closures() -> Pairs:
    @parametrized
    def net(x: Any) -> Any:
        w = param("w", jax.nn.initializers.ones, ())
        converted, consts = jax.closure_convert(lambda y: y * w, x)
        traced: Any = jax.make_jaxpr(lambda y: y * param("w", jax.nn.initializers.ones, ()))(x)
        return converted(x, *consts) + core.eval_jaxpr(
            getattr(traced, "jaxpr", traced), traced.consts, x
        )[0]  # fmt: skip

    params = net.init(jax.random.key(0), 3.0)
    yield params, {"w": 1.0}
    yield net.apply({"w": 2.0}, 3.0), 12.0


@program
def kernels() -> Pairs:
    yield drawn(lambda: lax.reduce(X, 0.0, lambda a, b: a + b, (0, 1))), (X.sum(), 0)
    both = lambda a, b: (a[0] + b[0], a[1] * b[1])  # noqa: E731
    yield drawn(lambda: lax.reduce((X, X), (0.0, 1.0), both, (0, 1))[0]), (X.sum(), 0)
    try:
        drawn(lambda: lax.reduce(X, 0.0, lambda a, b: a + b + noise(), (0, 1)))
        yield "no error", "UnsupportedPrimitiveError"
    except UnsupportedPrimitiveError:
        pass


# -- Arrays written in place -----------------------------------------------------------------


def in_place(fun: Callable[..., Any]) -> list[Callable[..., Any]]:
    return [inplace(fun), jax.jit(inplace(fun))]


@program
def writes() -> Pairs:
    def body(x: Any) -> Any:
        y = jnp.full(3, 2.0) + jnp.full_like(x[0], 1)
        y[1:] += x[1, 1:]

        def step(i: Any, c: Any) -> Any:
            y[i] = y[i] * 2
            return c + y[i]

        total = lax.fori_loop(0, 3, step, 0.0)
        return y, total, y.astype(int), jnp.broadcast_to(y, (1, 3)), jax.device_put(y)

    y = 2 * np.array([3, 3 + X[1, 1], 3 + X[1, 2]], np.float32)
    for f in in_place(body):
        yield f(X), (y, y.sum(), y.astype(int), y[None], y)


@program
def refused_writes() -> Pairs:
    def write(x: Any) -> Any:
        try:
            x[0] = 1.0
        except TypeError as error:
            return float(any("jaxstate" in note for note in getattr(error, "__notes__", ())))
        return 2.0

    yield (write(jnp.zeros(2)), jax.jit(write)(jnp.zeros(2))), (1.0, 1.0)


@program
def writes_in_transformations() -> Pairs:
    def squared(r: Any) -> Any:
        r[0] = r[1] ** 2
        return r * 2

    def body(x: Any) -> Any:
        def loss(r: Any, s: Any) -> Any:
            return squared(r)[0] * s[0], r

        grads, aux = jax.grad(loss, has_aux=True)(x[0], x[1])
        pushed = jax.jvp(squared, (x[0],), (jnp.ones(3),))[1]
        once = jax.linearize(squared, x[0])[1](jnp.ones(3))
        shared = jax.vmap(lambda a, b: a * b, in_axes=(0, None))(x, x[0])
        return jax.vmap(squared)(x), grads, aux, pushed, once, shared

    rows = 2 * X
    rows[:, 0] = 2 * X[:, 1] ** 2
    grads = np.array([0, 4 * X[0, 1] * X[1, 0], 0], np.float32)
    aux = np.array([X[0, 1] ** 2, X[0, 1], X[0, 2]], np.float32)
    pushed = np.array([4 * X[0, 1], 2, 2], np.float32)
    for f in in_place(body):
        yield f(X), (rows, grads, aux, pushed, pushed, X * X[0])


@program
def writes_in_rules() -> Pairs:
    f = jax.custom_jvp(lambda x: x * 2)
    f.defjvp(lambda xs, ts: (f(xs[0]), ts[0] * xs[0]))
    g = jax.custom_vjp(lambda x: x * 2)
    g.defvjp(lambda x: (x * 2, x), lambda x, ct: (ct * x,))

    def body(x: Any) -> Any:
        x[0] = 3.0
        return jax.grad(lambda y: f(y).sum())(x), jax.grad(lambda y: g(y).sum())(x), jax.jit(g)(x)

    y = np.array([3, X[0, 1], X[0, 2]], np.float32)
    for h in in_place(body):
        yield h(X[0]), (y, y, 2 * y)


@program
def writes_at_top_level() -> Pairs:
    compiled = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
    mesh = Mesh(np.array(jax.devices()[:1]), ("i",))
    key = jax.random.split(jax.random.key(0), 2)
    yield [jax.random.key_data(k) for k in key.copy()], jax.random.key_data(key)

    def body(x: Any) -> Any:
        x[0] = 1
        first, _ = list(key)
        with jax.set_mesh(mesh):
            named = tuple(jax.sharding.get_mesh().axis_names)
        same = jax.random.key_data(key.copy())[0] == jax.random.key_data(first)
        return compiled(x), np.asarray(jax.device_get(x)), bool(same.all()), named

    out, fetched, same, named = inplace(body)(jnp.zeros(3))
    yield (out, fetched, same, named), ([2, 1, 1], [1, 0, 0], True, ("i",))
    loose = array(jnp.zeros(2))

    @jax.jit
    def visit(i: Any) -> Any:
        loose[i] += 1
        return loose.sum()

    yield [visit(0), visit(1), visit(0)], [1.0, 2.0, 3.0]
    yield loose, [2.0, 1.0]


# -- Objects ---------------------------------------------------------------------------------


@program
def objects() -> Pairs:
    def body(tree: Any, n: Any) -> Any:
        def add(i: Any, c: Any) -> Any:
            tree["total"] += 1.0
            return c

        lax.fori_loop(0, 2, add, 0)
        lax.scan(lambda c, i: (add(i, c), None), 0, length=2)
        lax.while_loop(lambda i: i < 2, lambda i: add(i, i + 1), 0)
        lax.cond(n > 0, lambda: add(0, None), lambda: None)
        lax.switch(1, [lambda: None, lambda: add(0, None)])
        out = jax.jit(lambda t: t["total"] * 2)(tree)
        for shape_of in (jax.eval_shape, lambda f, t: jax.jit(f).eval_shape(t)):
            out += jnp.zeros(shape_of(lambda t: t["total"], tree).shape)
        slope = jax.grad(jax.checkpoint(lambda s, t: s * t["total"]))(1.0, tree)
        lanes = jax.vmap(lambda t, y: t["total"] + y, in_axes=(None, 0))(tree, jnp.arange(2.0))
        doubled = jax.custom_batching.custom_vmap(lambda y: 2 * y)
        doubled.def_vmap(lambda size, batched, y: (2 * y, True))
        lanes = jax.vmap(doubled)(lanes) / 2
        mapped = jax.pmap(lambda y: y + 1)(jnp.zeros(1))
        lanes = lanes + mapped[0] - 1
        jax.debug.callback(lambda t: None, tree)
        return out, slope, lanes

    tree = {"total": jnp.float32(0)}
    wanted = (16.0, 8.0, [8.0, 9.0]), {"total": 8.0}
    yield mutate(body)(tree, 1), wanted
    yield jax.jit(mutate(body))(tree, 1), wanted
    yield tree, {"total": 0.0}


# -- Running them ----------------------------------------------------------------------------


def _is_close(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(_is_close(got[k], wanted[k]) for k in wanted)
    if isinstance(wanted, (tuple, list)) and not hasattr(got, "dtype"):
        return len(got) == len(wanted) and all(map(_is_close, got, wanted))
    if isinstance(wanted, str):
        return got == wanted
    got, wanted = np.asarray(got), np.asarray(wanted)
    return got.shape == wanted.shape and np.allclose(got, wanted, rtol=1e-5)


def failures() -> Iterator[tuple[str, str | None]]:
    """Runs the programs: the name of each, and what is wrong with it, or None."""
    for run in PROGRAMS:
        name = run.__name__.replace("_", " ")
        try:
            wrong = [pair for pair in run() if not _is_close(*pair)]
        except Exception:
            yield name, traceback.format_exc(limit=-4)
        else:
            yield name, "\n".join(f"{got}\n  is not\n{w}" for got, w in wrong) if wrong else None


def main() -> int:
    print(
        f"jaxstate {__version__}, JAX {_jax.HERE}, Python"
        f" {platform.python_version()}, on {jax.devices()[0].device_kind}"
    )
    bad = 0
    for name, wrong in failures():
        print(f"    {'ok    ' if wrong is None else 'WRONG '} {name}", flush=True)
        if wrong is not None:
            bad += 1
            print("        " + wrong.replace("\n", "\n        "))
    print("passed" if not bad else f"{bad} of {len(PROGRAMS)} programs are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
