"""What is measured beside the models: single operations, loops, and how costs grow.

Each program says with what it is compared, and is data in `PROGRAMS`.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxstate
from jaxstate_tests.bench.measure import Side

CALLS = 200
OURS, BY_HAND, REFS = "jaxstate", "by hand", "jax.new_ref"


class Program(NamedTuple):
    """One comparison.

    Attributes:
      name: as the table shows it.
      target: the ratio that is wanted.
      sides: makes the sides, with times per call; the reference is the second.
    """

    name: str
    target: float
    sides: Callable[[], dict[str, Side]]


def stream() -> Any:
    return jaxstate.rng_stream(jax.random.key(0))


# -- Calls of jitted functions ---------------------------------------------------------------


def pure_call() -> dict[str, Side]:
    """A function without state, in an eager loop inside a stream and outside."""
    f, x = jax.jit(lambda x: x * 2 + 1), jnp.float32(1)
    return {OURS: Side(lambda: f(x), CALLS, stream), "outside": Side(lambda: f(x), CALLS)}


def one_draw() -> dict[str, Side]:
    """An eager loop of calls that draw once; by hand, key and count are passed and returned."""
    key, x = jax.random.key(0), jnp.float32(1)
    draw = jax.jit(lambda x: x + jax.random.uniform(jaxstate.next_key()))
    by_hand = jax.jit(
        lambda x, key, n: (x + jax.random.uniform(jax.random.fold_in(key, n)), n + 1)
    )
    count = jnp.int32(0)
    ref = jax.new_ref(jnp.int32(0))

    @jax.jit
    def with_ref(x: Any) -> Any:
        n = ref[...]
        ref[...] = n + 1
        return x + jax.random.uniform(jax.random.fold_in(key, n))

    def call_by_hand() -> Any:
        nonlocal count
        y, count = by_hand(x, key, count)
        return y

    return {
        OURS: Side(lambda: draw(x), CALLS, stream),
        BY_HAND: Side(call_by_hand, CALLS),
        REFS: Side(lambda: with_ref(x), CALLS),
    }


def one_update() -> dict[str, Side]:
    """An eager loop of calls that update one slot."""
    x = jnp.float32(1)
    slot = jaxstate.extend.new_slot(0.0)
    read, write = jaxstate.extend.read, jaxstate.extend.write

    @jax.jit
    def update(x: Any) -> Any:
        write(slot, read(slot) + x)
        return x * 2

    by_hand = jax.jit(lambda x, total: (x * 2, total + x))
    total = jnp.float32(0)
    ref = jax.new_ref(jnp.float32(0))

    @jax.jit
    def with_ref(x: Any) -> Any:
        ref[...] += x
        return x * 2

    def call_by_hand() -> Any:
        nonlocal total
        y, total = by_hand(x, total)
        return y

    return {
        OURS: Side(lambda: update(x), CALLS),
        BY_HAND: Side(call_by_hand, CALLS),
        REFS: Side(lambda: with_ref(x), CALLS),
    }


def eager_key() -> dict[str, Side]:
    """``next_key()`` against ``fold_in`` with a count in Python."""
    key, count = jax.random.key(0), 0

    def by_hand() -> Any:
        nonlocal count
        count += 1
        return jax.random.fold_in(key, count)

    return {OURS: Side(jaxstate.next_key, CALLS, stream), BY_HAND: Side(by_hand, CALLS)}


# -- Arrays written in place -----------------------------------------------------------------


def eager_write() -> dict[str, Side]:
    """One element of a large array and of a small one."""

    def side(n: int) -> Side:
        x = jaxstate.array(jnp.zeros(n))

        def write() -> Any:
            x[3] = 1.0

        return Side(write, CALLS)

    return {"n = 1e7": side(10**7), "n = 1e3": side(10**3)}


def loop_of_writes() -> dict[str, Side]:
    """A jitted loop that writes 1,000 elements of an array of a million."""
    n, x = 1000, jnp.zeros(10**6)

    @jax.jit
    @jaxstate.inplace
    def ours(x: Any) -> Any:
        def body(i: Any, _: Any) -> None:
            x[i + 1] = x[i] + 1

        jax.lax.fori_loop(0, n, body, None)
        return x

    @jax.jit
    def by_hand(x: Any) -> Any:
        return jax.lax.fori_loop(0, n, lambda i, x: x.at[i + 1].set(x[i] + 1), x)

    return {OURS: Side(lambda: ours(x), 5), BY_HAND: Side(lambda: by_hand(x), 5)}


# -- How costs grow --------------------------------------------------------------------------


def _module(fn: Callable[..., Any], name: str) -> Any:
    return jaxstate.parametrized(name=name)(fn)


def many_parameters(n: int) -> Any:
    """A network of ``n`` parameters in one level."""

    def net(x: Any) -> Any:
        for i in range(n):
            x = x + jaxstate.param(f"w{i}", jax.nn.initializers.ones, ())
        return x

    return _module(net, "net")


def many_modules(n: int) -> Any:
    """A network of ``n`` modules of one name, each with a parameter."""

    def level(x: Any) -> Any:
        return x + jaxstate.param("b", jax.nn.initializers.ones, ())

    modules = [_module(level, "level") for _ in range(n)]

    def net(x: Any) -> Any:
        for module in modules:
            x = module(x)
        return x

    return _module(net, "net")


def many_variables(n: int) -> Any:
    """A network of ``n`` variables, all of them updated in a scan."""

    def body(x: Any, _: Any) -> Any:
        for i in range(n):
            count = jaxstate.variable(f"v{i}", jnp.zeros, ())
            count.value += x
        return x, None

    return _module(lambda x: jax.lax.scan(body, x, length=3)[0], "net")


def deep(n: int) -> Any:
    """A network of ``n`` levels, each with a parameter."""
    inner: Any = lambda x: x  # noqa: E731
    for _ in range(n):

        def level(x: Any, inner: Any = inner) -> Any:
            return inner(x + jaxstate.param("b", jax.nn.initializers.ones, ()))

        inner = _module(level, "level")
    return inner


def jitted_deep(n: int) -> Any:
    """The same with a jit around every level."""
    inner: Any = lambda x: x  # noqa: E731
    for _ in range(n):

        def level(x: Any, inner: Any = inner) -> Any:
            return jax.jit(inner)(x + jaxstate.param("b", jax.nn.initializers.ones, ()))

        inner = _module(level, "level")
    return inner


def trace_of(net: Any) -> Callable[[], Any]:
    """Traces ``apply_with_state`` anew with each call."""
    x = jnp.float32(1)
    params, state = net.init_with_state(jax.random.key(0), x)
    apply = net.apply_with_state

    def trace() -> None:
        jax.make_jaxpr(lambda p, s, x: apply(p, s, x))(params, state, x)

    return trace


def _growth(make: Callable[[int], Any], n: int) -> Callable[[], dict[str, Side]]:
    """Time per element of something ten times as large."""
    return lambda: {
        f"n = {10 * n}": Side(trace_of(make(10 * n)), calls=1),
        f"n = {n}": Side(lambda trace=trace_of(make(n)): [trace() for _ in range(10)] and None),
    }


PROGRAMS = [
    Program("pure jitted call in a stream", 1.0, pure_call),
    Program("jitted call with one draw", 3.0, one_draw),
    Program("jitted call with one update", 3.0, one_update),
    Program("next_key() eagerly", 1.3, eager_key),
    Program("eager write, n = 1e7 / 1e3", 2.0, eager_write),
    Program("loop of writes, n = 1e6", 1.0, loop_of_writes),
    Program("trace, 1000 / 100 parameters", 1.1, _growth(many_parameters, 100)),
    Program("trace, 1000 / 100 modules", 1.1, _growth(many_modules, 100)),
    Program("trace, 1000 / 100 variables in a scan", 1.1, _growth(many_variables, 100)),
    Program("trace, 100 / 10 levels", 1.1, _growth(deep, 10)),
    Program("trace, 100 / 10 jitted levels", 1.1, _growth(jitted_deep, 10)),
]

QUICK = PROGRAMS[:6]


def import_seconds(repeats: int) -> float:
    """What ``import jaxstate`` takes after ``import jax``, in processes of their own."""
    program = (
        "import time, jax; start = time.perf_counter(); import jaxstate;"
        " print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)
