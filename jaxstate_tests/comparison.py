"""What becomes of state that plain JAX transformations stand in front of, in several libraries.

    python -m jaxstate_tests.comparison

prints the tables of docs/comparison.md. A *layer* of each library does one thing with the state of
that library (draws a number, counts a call, uses a parameter), and is called under a transformation
of plain JAX that knows nothing of the library. What has to come out is known without any of them:
how often the layer is called, and what the function is with its parameter passed by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jax import lax

import jaxstate
from jaxstate_tests.bench import models
from jaxstate_tests.bench.measure import python_calls, trace_of
from jaxstate_tests.bench.models import libraries, train_step

KEY = jax.random.key(0)
W = jnp.float32(1.5)
X = jnp.arange(1.0, 5.0)


# -- Plain JAX -------------------------------------------------------------------------------


def jitted(layer, x):
    run = jax.jit(lambda x: layer(x))
    return run(run(x))


def turns_of_while(layer, x):
    def body(c):
        return c[0] + 1, layer(c[1])

    return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1]


def pulled_back(layer, x):
    y, pullback = jax.vjp(layer, x)
    pullback(y)
    return y


def pulled_back_by_jit(layer, x):
    return jax.jit(lambda x: pulled_back(layer, x))(x)


def with_a_rule(layer, x):
    def forward(x):
        return layer(x), None

    run = jax.custom_vjp(lambda x: layer(x))
    run.defvjp(forward, lambda _, g: (g,))
    return pulled_back(run, x)


# How a function calls a layer, and how often. `vmap` has two lanes, which are rows of the result.
TRANSFORMATIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "nothing, three calls": (lambda layer, x: layer(layer(layer(x))), 3),
    "`jit`, called twice": (jitted, 2),
    "`scan`, three steps": (
        lambda layer, x: lax.scan(lambda x, _: (layer(x), None), x, length=3)[0],
        3,
    ),
    "`fori_loop`, three turns": (lambda f, x: lax.fori_loop(0, 3, lambda i, x: f(x), x), 3),
    "`while_loop`, three turns": (turns_of_while, 3),
    "`cond`": (lambda layer, x: lax.cond(x[0] > 0, layer, lambda x: x, x), 1),
    "`checkpoint`": (lambda layer, x: jax.checkpoint(lambda x: layer(x))(x), 1),
    "`vjp`": (pulled_back, 1),
    "`vjp` of `checkpoint`": (
        lambda layer, x: pulled_back(jax.checkpoint(lambda x: layer(x)), x),
        1,
    ),
    "`vjp` in `jit`": (pulled_back_by_jit, 1),
    "`vjp` of `scan` of `checkpoint`": (
        lambda f, x: pulled_back(
            lambda x: lax.scan(lambda x, _: (jax.checkpoint(f)(x), None), x, length=3)[0], x
        ),
        3,
    ),
    "`custom_vjp`": (with_a_rule, 1),
    "`vmap`, two lanes": (lambda layer, x: jax.vmap(layer)(jnp.stack([x, x])), 1),
}


# -- Libraries -------------------------------------------------------------------------------


class LeakedTracer(Exception):
    """State is left as a value of a trace that has ended."""


def known(state):
    """What a library says its state is, if these are values."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
        raise LeakedTracer
    return state


def pushed(number, x):
    return jnp.concatenate([number[None], x[:-1]])


def uniform(key):
    return jax.random.uniform(key, ())


class Jaxstate:
    def draws(call):
        with jaxstate.rng_stream(KEY):
            return call(lambda x: pushed(jaxstate.random.uniform(()), x))

    def count(call):
        @jaxstate.parametrized
        def layer(x):
            jaxstate.variable("n", jnp.zeros, (), jnp.int32).value += 1
            return x

        net = jaxstate.parametrized(lambda: call(layer), name="net")
        _, state = net.init_with_state(KEY)
        return jax.tree.leaves(known(net.apply_with_state({}, known(state))[1]))[0]

    def value(call):
        @jaxstate.parametrized
        def layer(x):
            return x * jaxstate.param("w", jax.nn.initializers.ones, ())

        net = jaxstate.parametrized(lambda: call(layer), name="net")
        tree = jax.tree.structure(known(net.init(KEY)))
        return lambda w: net.apply(tree.unflatten([w]))


class Haiku:
    def draws(call):
        return hk.transform(lambda: call(lambda x: pushed(uniform(hk.next_rng_key()), x))).apply(
            {}, KEY
        )

    def count(call):
        class Layer(hk.Module):
            def __call__(self, x):
                hk.set_state("n", hk.get_state("n", (), jnp.int32, init=jnp.zeros) + 1)
                return x

        net = hk.transform_with_state(lambda: call(Layer()))
        _, state = net.init(KEY)
        state = jax.tree.map(jnp.zeros_like, known(state))
        return jax.tree.leaves(known(net.apply({}, state, None)[1]))[0]

    def value(call):
        class Layer(hk.Module):
            def __call__(self, x):
                return x * hk.get_parameter("w", (), init=jnp.ones)

        net = hk.without_apply_rng(hk.transform(lambda: call(Layer())))
        tree = jax.tree.structure(known(net.init(KEY)))
        return lambda w: net.apply(tree.unflatten([w]))


class Linen:
    def net(call, layer):
        class Net(nn.Module):
            @nn.compact
            def __call__(self):
                return call(layer())

        return Net()

    def draws(call):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return pushed(uniform(self.make_rng("draws")), x)

        return Linen.net(call, Layer).apply({}, rngs={"draws": KEY})

    def count(call):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                n = self.variable("state", "n", lambda: jnp.int32(0))
                n.value += 1
                return x

        net = Linen.net(call, Layer)
        state = jax.tree.map(jnp.zeros_like, known(net.init(KEY)))
        return jax.tree.leaves(known(net.apply(state, mutable=["state"])[1]))[0]

    def value(call):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return x * self.param("w", nn.initializers.ones, ())

        net = Linen.net(call, Layer)
        tree = jax.tree.structure(known(net.init(KEY)))
        return lambda w: net.apply(tree.unflatten([w]))


class Nnx:
    def draws(call):
        class Layer(nnx.Module):
            def __init__(self):
                self.rngs = nnx.Rngs(0)

            def __call__(self, x):
                return pushed(uniform(self.rngs()), x)

        return call(Layer())

    def count(call):
        class Layer(nnx.Module):
            def __init__(self):
                self.n = nnx.Variable(jnp.int32(0))

            def __call__(self, x):
                self.n.set_value(self.n.get_value() + 1)
                return x

        layer = Layer()
        call(layer)
        return layer.n.get_value()

    def value(call):
        class Layer(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(W)

            def __call__(self, x):
                return x * self.w.get_value()

        graph, params = nnx.split(Layer())
        tree = jax.tree.structure(params)
        return lambda w: call(nnx.merge(graph, tree.unflatten([w])))


class NumPyro:
    def draws(call):
        with numpyro.handlers.seed(rng_seed=0):
            return call(lambda x: pushed(uniform(numpyro.prng_key()), x))

    count = None  # it has no state of this kind that a model may keep

    def value(call):
        def model(w):
            with numpyro.handlers.substitute(data={"w": w}):
                return call(lambda x: x * numpyro.param("w", 1.0))

        return model


class References:
    """``jax.new_ref``, which is JAX's own."""

    def draws(call):
        data = jax.new_ref(jax.random.key_data(KEY))

        def layer(x):
            key, now = jax.random.split(jax.random.wrap_key_data(data[...]))
            data[...] = jax.random.key_data(key)
            return pushed(uniform(now), x)

        return call(layer)

    def count(call):
        n = jax.new_ref(jnp.int32(0))

        def layer(x):
            n[...] += 1
            return x

        call(layer)
        return n[...]

    def value(call):
        def net(w):
            ref = jax.new_ref(w)
            return call(lambda x: x * ref[...])

        return net


LIBRARIES = {
    "jaxstate": Jaxstate,
    "Haiku": Haiku,
    "linen": Linen,
    "NNX": Nnx,
    "NumPyro": NumPyro,
    "`jax.new_ref`": References,
}
DISTRIBUTIONS = ("jax", "dm-haiku", "flax", "numpyro")


# -- What comes out --------------------------------------------------------------------------


def outcome_of_draws(library, call, calls):
    x = np.atleast_2d(library.draws(call))[:, :calls]
    different = len(np.unique(x))
    return "right" if different == x.size else f"**wrong**: {different} of {x.size} differ"


def outcome_of_count(library, call, calls):
    n = int(library.count(call))
    return "right" if n == calls else f"**wrong**: {n}"


def outcome_of_value(library, call, calls):
    def by_hand(w):
        return call(lambda x: x * w)

    try:
        wanted = jax.value_and_grad(lambda w: by_hand(w).sum())(W)
    except ValueError:  # no derivative of a while loop, or by what a rule closes over
        wanted = by_hand(W).sum(), None
    net = library.value(call)
    if wanted[1] is None:
        found = net(W).sum(), None
    else:
        found = jax.value_and_grad(lambda w: net(w).sum())(W)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5), found, wanted)
    return "right" if all(jax.tree.leaves(same)) else "**wrong**"


KINDS = {"Draws": outcome_of_draws, "Counts": outcome_of_count, "Parameters": outcome_of_value}


def outcome(kind: str, library: str, transformation: str) -> str:
    """ "right", what is wrong, or the error that says that it does not work."""
    transform, calls = TRANSFORMATIONS[transformation]
    if kind == "Counts" and LIBRARIES[library].count is None:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = KINDS[kind]
            return run(LIBRARIES[library], lambda f: transform(lambda x: f(x), X), calls)
    except LeakedTracer:
        return "leaked tracer"
    except Exception as e:
        name = type(e).__name__
        return "error" if name == "Exception" else f"`{name}`"


def table(kind: str) -> Iterator[str]:
    yield "| inside | " + " | ".join(LIBRARIES) + " |"
    yield "|---" * (len(LIBRARIES) + 1) + "|"
    for transformation in TRANSFORMATIONS:
        cells = [outcome(kind, library, transformation) for library in LIBRARIES]
        yield f"| {transformation} | " + " | ".join(cells) + " |"


def versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in DISTRIBUTIONS)


# -- Speed -----------------------------------------------------------------------------------


SPEED = {
    "trace a training step": lambda net, args: trace_of(train_step(net), args),
    "trace `init`": lambda net, args: trace_of(net.init, (args[3], args[2])),
    "run the model without `jit`": lambda net, args: lambda: net.forward(*args),
}
MODELS = ("mlp, width 8", "transformer, width 8", "convnet")


def calls(work: str, model: str) -> dict[str, float]:
    """How many functions of Python and C each library calls for it, by hand = 1."""
    found = {}
    for library, module in libraries()[0].items():
        net = models.MODELS[model].written_in(module)
        if net is None:
            continue
        x = models.MODELS[model].input()
        run = SPEED[work](net, (*net.init(KEY, x), x, KEY))
        for _ in range(3):  # the last time, all is known that may be kept
            found[library] = python_calls(run)
    return {library: n / found["by hand"] for library, n in found.items()}


def table_of_speed() -> Iterator[str]:
    names = [name for name in libraries()[0] if name != "by hand"]
    yield f"| | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for work in SPEED:
        for model in MODELS:
            found = calls(work, model)
            cells = [f"{found[name]:.2f}" if name in found else "" for name in names]
            yield f"| {work}: {model} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(f"With {versions()}:\n")
    for kind in KINDS:
        print(f"## {kind}\n", *table(kind), "", sep="\n")
    print("## Speed\n", *table_of_speed(), sep="\n")
