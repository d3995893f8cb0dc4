"""Timing: all sides of a comparison run in turns in one process.

A round runs every side once, so that what disturbs the machine disturbs all of them. Each round
begins with another side, after a call that is not timed: a garbage collection leaves cold caches to
whoever comes first. A side's figure is the median of its times, a ratio the median of the ratios of
each round.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Run = Callable[[], Any]


class Side(NamedTuple):
    """One side of a comparison.

    Attributes:
      run: what is timed; its result is waited for.
      calls: how often it runs for one time.
      setup: returns a context that is open around the calls, or None.
      clock: counts seconds. What works on one thread only is timed by what that thread works, so
        that other programs on the machine do not count.
    """

    run: Run
    calls: int = 1
    setup: Callable[[], Any] | None = None
    clock: Callable[[], float] = time.perf_counter

    def seconds(self) -> float:
        """Seconds per call."""
        if self.setup is None:
            return self._clock()
        with self.setup():
            return self._clock()

    def _clock(self) -> float:
        run, clock = self.run, self.clock
        if self.calls > 1:
            jax.block_until_ready(run())  # the first call after other programs is slower
        start = clock()
        for _ in range(self.calls):
            out = run()
        jax.block_until_ready(out)
        return (clock() - start) / self.calls


def trace_of(fun: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], None]:
    """Traces ``fun(*args)`` with each call. (Anew: JAX keeps the jaxpr of a function it knows.)"""

    def trace() -> None:
        jax.make_jaxpr(lambda *args: fun(*args))(*args)

    return trace


def trace_side(fun: Callable[..., Any], args: tuple[Any, ...]) -> Side:
    return Side(trace_of(fun, args), clock=time.thread_time)


class Timing(NamedTuple):
    """What was measured of one side.

    Attributes:
      seconds: median per call.
      ratio: to the reference side.
    """

    seconds: float
    ratio: float


def compare(sides: Mapping[str, Side], reference: str, repeats: int) -> dict[str, Timing]:
    """Times every side ``repeats`` times, in turns, after one round that compiles."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides.items())
    for i in range(repeats + 1):
        order = [*order[1:], order[0]]
        gc.collect()
        gc.disable()
        try:
            order[-1][1].seconds()
            for name, side in order:
                seconds = side.seconds()
                if i:
                    times[name].append(seconds)
        finally:
            gc.enable()
    return {
        name: Timing(
            statistics.median(found),
            statistics.median(a / b for a, b in zip(found, times[reference], strict=True)),
        )
        for name, found in times.items()
    }


def python_calls(fun: Callable[[], Any]) -> int:
    """The number of calls of Python and C functions that ``fun()`` makes."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        fun()
    finally:
        sys.setprofile(before)
    return calls
