"""What is measured of every model, in every library: see `FIGURES`."""

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxstate_tests.bench.measure import Side, Timing, compare, trace_side
from jaxstate_tests.bench.models import Model, Net, train_step

BY_HAND = "by hand"


class Figure(NamedTuple):
    """One figure.

    Attributes:
      name: as the table shows it.
      target: the ratio to hand-written JAX that is wanted.
      side: ``side(net, args)`` with the arguments of ``net.forward``.
      by_hand: the same for hand-written JAX, where that does something else; then no other library
        is measured.
    """

    name: str
    target: float
    side: Callable[[Net, tuple[Any, ...]], Side]
    by_hand: Callable[[Net, tuple[Any, ...]], Side] | None = None


def _forward_trace(net: Net, args: tuple[Any, ...]) -> Side:
    return trace_side(net.forward, args)


def _train_trace(net: Net, args: tuple[Any, ...]) -> Side:
    return trace_side(train_step(net), args)


def _init_eager(net: Net, args: tuple[Any, ...]) -> Side:
    return Side(lambda: net.init(args[3], args[2]))


def _init_trace(net: Net, args: tuple[Any, ...]) -> Side:
    return trace_side(net.init, (args[3], args[2]))


def _both(first: Side, second: Side) -> Side:
    return Side(lambda: (first.run(), second.run()), clock=first.clock)


def _init_and_forward_eager(net: Net, args: tuple[Any, ...]) -> Side:
    return _both(_init_eager(net, args), _forward_trace(net, args))


def _init_and_forward_trace(net: Net, args: tuple[Any, ...]) -> Side:
    return _both(_init_trace(net, args), _forward_trace(net, args))


def _eager_apply(net: Net, args: tuple[Any, ...]) -> Side:
    return Side(lambda: net.forward(*args))


def _jitted_step(net: Net, args: tuple[Any, ...]) -> Side:
    step = jax.jit(train_step(net))
    return Side(lambda: step(*args), calls=10)


FIGURES = [
    Figure("forward trace", 1.08, _forward_trace),
    Figure("train-step trace", 1.05, _train_trace),
    Figure("init, eager", 1.2, _init_eager),
    Figure("init, trace", 1.3, _init_trace),
    # By hand init knows the shapes that jaxstate finds by tracing the forward pass.
    Figure("init, eager / + shapes", 0.9, _init_eager, _init_and_forward_eager),
    Figure("init, trace / + shapes", 0.9, _init_trace, _init_and_forward_trace),
    Figure("eager apply", 1.15, _eager_apply),
    Figure("jitted step", 1.0, _jitted_step),
]


def measured(
    models: Mapping[str, Model], libraries: Mapping[str, types.ModuleType], repeats: int
) -> Iterator[tuple[str, Figure, dict[str, Timing]]]:
    """Every figure of every model, with a time for each library that can write it."""
    key = jax.random.key(0)
    for name, model in models.items():
        x = model.input()
        written = {lib: model.written_in(module) for lib, module in libraries.items()}
        nets = {lib: net for lib, net in written.items() if net is not None}
        args = {lib: (*net.init(key, x), x, key) for lib, net in nets.items()}
        for figure in FIGURES:
            sides = {lib: figure.side(net, args[lib]) for lib, net in nets.items()}
            if figure.by_hand is not None:
                by_hand = figure.by_hand(nets[BY_HAND], args[BY_HAND])
                sides = {"jaxstate": sides["jaxstate"], BY_HAND: by_hand}
            yield name, figure, compare(sides, BY_HAND, repeats)


def peak_bytes(net: Net, args: tuple[Any, ...]) -> int:
    """What the compiled train step needs at once, beside nothing: arguments, results, scratch."""
    found = jax.jit(train_step(net)).lower(*args).compile().memory_analysis()
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )  # fmt: skip
