"""Prints the table of `jaxstate_tests.bench`."""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxstate

REPEATS, CALLS = 31, 200

Side = Callable[[], float]  # runs one side of a comparison, returns seconds per call


def clock(run: Callable[[], Any], calls: int = CALLS) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def pure_call() -> tuple[Side, Side]:
    """A pure jitted function, inside an open stream and outside."""
    f, x = jax.jit(lambda x: x * 2 + 1), jnp.float32(1)

    def inside() -> float:
        with jaxstate.rng_stream(jax.random.key(0)):
            return clock(lambda: f(x))

    return inside, lambda: clock(lambda: f(x))


def one_draw() -> tuple[Side, Side]:
    """A jitted function that draws once; by hand with the key and the count passed and returned."""
    key, x = jax.random.key(0), jnp.float32(1)
    stateful = jax.jit(lambda x: x + jax.random.uniform(jaxstate.next_key()))
    by_hand = jax.jit(
        lambda x, key, count: (x + jax.random.uniform(jax.random.fold_in(key, count)), count + 1)
    )

    def with_stream() -> float:
        with jaxstate.rng_stream(key):
            return clock(lambda: stateful(x))

    def with_count() -> float:
        count = jnp.int32(0)

        def step() -> None:
            nonlocal count
            _, count = by_hand(x, key, count)

        return clock(step)

    return with_stream, with_count


def eager_key() -> tuple[Side, Side]:
    """``next_key()`` against ``fold_in`` with a Python count."""
    key = jax.random.key(0)

    def with_stream() -> float:
        with jaxstate.rng_stream(key):
            return clock(jaxstate.next_key)

    def with_count() -> float:
        counts = iter(range(CALLS))
        return clock(lambda: jax.random.fold_in(key, next(counts)))

    return with_stream, with_count


def trace_apply() -> tuple[Side, Side]:
    """Tracing a 20-layer perceptron: ``apply`` against parameters passed by hand."""
    lecun = jax.nn.initializers.lecun_normal()
    zeros = jax.nn.initializers.zeros

    def layer() -> Any:
        @jaxstate.parametrized
        def dense(x: Any) -> Any:
            w = jaxstate.param("w", lecun, (x.shape[-1], 64))
            return jnp.tanh(x @ w + jaxstate.param("b", zeros, (64,)))

        return dense

    layers = [layer() for _ in range(20)]

    @jaxstate.parametrized
    def net(x: Any) -> Any:
        for f in layers:
            x = f(x)
        return x

    x = jnp.ones((8, 64))
    params = net.init(jax.random.key(0), x)

    def by_hand(params: Any, x: Any) -> Any:
        for name in ["dense", *(f"dense_{i}" for i in range(1, 20))]:
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return x

    def side(f: Callable[..., Any]) -> Side:
        return lambda: clock(lambda: jax.make_jaxpr(lambda p, x: f(p, x))(params, x), calls=1)

    return side(net.apply), side(by_hand)


PROGRAMS = [
    ("pure jitted call inside a stream", pure_call),
    ("jitted call with one draw", one_draw),
    ("next_key() eagerly", eager_key),
    ("trace of apply, 20 layers", trace_apply),
]


def main() -> None:
    print(f"Python {sys.version.split()[0]}, jax {jax.__version__}, {jax.devices()[0].platform}")
    print(f"{'us per call':36}{'jaxstate':>10}{'by hand':>10}{'ratio':>8}")
    for name, program in PROGRAMS:
        sides = program()
        for side in sides:  # compile
            side()
        times = [[side() for side in sides] for _ in range(REPEATS)]
        ours, theirs = (statistics.median(t) * 1e6 for t in zip(*times, strict=True))
        print(f"{name:36}{ours:10.1f}{theirs:10.1f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
