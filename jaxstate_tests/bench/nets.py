"""Programs that stress one thing, with jaxstate and by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxstate
from jaxstate_tests.bench.peers.by_hand import numbered

ONES = jax.nn.initializers.ones


class Pair(NamedTuple):
    """Two functions that do the same.

    Attributes:
      ours: with jaxstate.
      by_hand: with all state passed and returned.
      args: for either.
    """

    ours: Callable[..., Any]
    by_hand: Callable[..., Any]
    args: tuple[Any, ...]


def _module(fn: Callable[..., Any], name: str) -> Any:
    return jaxstate.parametrized(name=name)(fn)


def _pair(net: Any, by_hand: Callable[..., Any]) -> Pair:
    x, key = jnp.float32(0.3), jax.random.key(0)
    params, state = net.init_with_state(key, x)

    def ours(params: Any, state: Any, x: Any, key: Any) -> Any:
        return net.apply_with_state(params, state, x, key=key)

    return Pair(ours, by_hand, (params, state, x, key))


def many_parameters(n: int) -> Pair:
    """``n`` parameters in one level."""

    def net(x: Any) -> Any:
        for i in range(n):
            x = x + jaxstate.param(f"w{i}", ONES, ())
        return x

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        for i in range(n):
            x = x + params[f"w{i}"]
        return x, state

    return _pair(_module(net, "net"), by_hand)


def many_modules(n: int) -> Pair:
    """``n`` modules of one name, each with a parameter."""

    def level(x: Any) -> Any:
        return x + jaxstate.param("b", ONES, ())

    modules = [_module(level, "level") for _ in range(n)]

    def net(x: Any) -> Any:
        for module in modules:
            x = module(x)
        return x

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        for name in numbered("level", n):
            x = x + params[name]["b"]
        return x, state

    return _pair(_module(net, "net"), by_hand)


def many_variables(n: int) -> Pair:
    """``n`` variables, all of them updated in a scan (of a new function each time, which JAX has to
    trace)."""

    def net(x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            for i in range(n):
                total = jaxstate.variable(f"v{i}", jnp.zeros, ())
                total.value += x
            return x, None

        return jax.lax.scan(body, x, length=3)[0]

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            state, x = carry
            return ({name: value + x for name, value in state.items()}, x), None

        (state, x), _ = jax.lax.scan(body, (state, x), length=3)
        return x, state

    return _pair(_module(net, "net"), by_hand)


def jits_in_a_row(n: int) -> Pair:
    """``n`` jitted functions, each with a parameter."""

    def net(x: Any) -> Any:
        for i in range(n):
            x = jax.jit(lambda x, i=i: x + jaxstate.param(f"w{i}", ONES, ()))(x)
        return x

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        for i in range(n):
            x = jax.jit(lambda x, w: x + w)(x, params[f"w{i}"])
        return x, state

    return _pair(_module(net, "net"), by_hand)


def _jitted(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return jax.jit(lambda x: f(x))


def _scanned(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, length=2)[0]


def _nested(n: int, around: Callable[[Any], Any]) -> Pair:
    """A parameter under ``n`` transformations; by hand their functions close over it."""

    def under_all(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for _ in range(n):
            f = around(f)
        return f

    def net(x: Any) -> Any:
        return under_all(lambda x: x + jaxstate.param("w", ONES, ()))(x)

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        return under_all(lambda x: x + params["w"])(x), state

    return _pair(_module(net, "net"), by_hand)


def nested_jits(n: int) -> Pair:
    """A parameter under ``n`` jitted functions."""
    return _nested(n, _jitted)


def nested_scans(n: int) -> Pair:
    """A parameter in ``n`` nested scans."""
    return _nested(n, _scanned)


def assigned_leaves(n: int) -> Pair:
    """``n`` leaves of a tree, all of them assigned in a loop."""

    def ours(tree: Any) -> Any:
        def assign(tree: Any) -> None:
            def body(i: Any, _: Any) -> None:
                for name in tree:
                    tree[name] = tree[name] + 1.0

            jax.lax.fori_loop(0, 3, body, None)

        return jaxstate.mutate(assign)(tree)[1]

    def by_hand(tree: Any) -> Any:
        def body(i: Any, tree: Any) -> Any:
            return {name: x + 1.0 for name, x in tree.items()}

        return jax.lax.fori_loop(0, 3, body, tree)

    return Pair(ours, by_hand, ({f"x{i}": jnp.float32(i) for i in range(n)},))


def writes_through_a_view(n: int, size: int) -> Pair:
    """``n`` elements of the inside of a square array, written through a view in a loop."""

    @jaxstate.inplace
    def ours(u: Any) -> Any:
        inside = u[1:-1, 1:-1]

        def body(i: Any, _: Any) -> None:
            inside[i, i] = inside[i, i] + 1.0

        jax.lax.fori_loop(0, n, body, None)
        return u

    def by_hand(u: Any) -> Any:
        def body(i: Any, u: Any) -> Any:
            return u.at[i + 1, i + 1].set(u[i + 1, i + 1] + 1.0)

        return jax.lax.fori_loop(0, n, body, u)

    return Pair(ours, by_hand, (jnp.zeros((size, size)),))


def deep(n: int, around: Callable[[Any], Any] = lambda f: f) -> Pair:
    """``n`` levels, each with a parameter, and each ``around(level)``."""

    def innermost(x: Any) -> Any:
        return x + jaxstate.param("b", ONES, ())

    module = _module(innermost, "level")
    for _ in range(n - 1):

        def level(x: Any, inner: Any = module) -> Any:
            return around(inner)(x + jaxstate.param("b", ONES, ()))

        module = _module(level, "level")

    def descend(params: Any, x: Any) -> Any:
        x = x + params["b"]
        inner = params.get("level")
        return x if inner is None else nested(inner, x)

    nested = around(descend)
    return _pair(module, lambda params, state, x, key: (descend(params, x), state))


def jitted_deep(n: int) -> Pair:
    """The same with a ``jit`` around every level but the outermost."""
    return deep(n, jax.jit)


def nested_loops(n: int) -> Pair:
    """A scan of a scan of a cond that draws and counts."""

    @jaxstate.parametrized
    def net(x: Any) -> Any:
        count = jaxstate.variable("count", jnp.zeros, (), jnp.int32)

        def draw(x: Any) -> Any:
            count.value += 1
            return x + jax.random.uniform(jaxstate.next_key())

        def step(x: Any, _: Any) -> Any:
            return jax.lax.cond(x > 1, draw, lambda x: 2 * x, x), None

        def outer(x: Any, _: Any) -> Any:
            return jax.lax.scan(step, x, length=n)[0], None

        return jax.lax.scan(outer, x, length=n)[0]

    def by_hand(params: Any, state: Any, x: Any, key: Any) -> Any:
        def draw(drawn: Any, count: Any, x: Any) -> Any:
            x = x + jax.random.uniform(jax.random.fold_in(key, drawn))
            return drawn + 1, count + 1, x

        def step(carry: Any, _: Any) -> Any:
            _, _, x = carry
            return jax.lax.cond(x > 1, draw, lambda d, c, x: (d, c, 2 * x), *carry), None

        def outer(carry: Any, _: Any) -> Any:
            return jax.lax.scan(step, carry, length=n)[0], None

        start = (jnp.int32(0), state["count"], x)
        _, count, x = jax.lax.scan(outer, start, length=n)[0]
        return x, {"count": count}

    return _pair(net, by_hand)


def loop_of_writes(n: int, size: int) -> Pair:
    """A loop that writes ``n`` elements of an array."""

    @jaxstate.inplace
    def ours(x: Any) -> Any:
        def body(i: Any, _: Any) -> None:
            x[i + 1] = x[i] + 1

        jax.lax.fori_loop(0, n, body, None)
        return x

    def by_hand(x: Any) -> Any:
        return jax.lax.fori_loop(0, n, lambda i, x: x.at[i + 1].set(x[i] + 1), x)

    return Pair(ours, by_hand, (jnp.zeros(size),))
