"""Statements that use state, and the ways to use a function, each also by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

import jaxstate
from jaxstate_tests.fuzz.random_programs import (
    Body,
    Place,
    Read,
    Scope,
    Statement,
    Write,
    changed,
    run_by_hand,
)

normal = jax.nn.initializers.normal(1.0)
SPLIT_STREAMS = ("default", "dropout")
STREAMS = (*SPLIT_STREAMS, "shared")
INITIAL = {"v": 0.4, "r": -0.2}
SLOTS = {"a": 0.2, "b": -0.3}
# The contexts in which state is refused or lost today.
KNOWN_CONTEXTS = ()


@dataclass(frozen=True)
class Draw(Statement):
    stream: str

    def uses(self, at):
        return {f"key {self.stream}", f"count {self.stream}"}

    def facts(self, facts):
        return {"draws", f"draws {self.stream}"}

    def stateful(self, x, world):
        return x + 0.5 * jaxstate.random.uniform((), jnp.float32, stream=self.stream)

    def by_hand(self, x, s, at):
        key, count = s[f"key {self.stream}"], s[f"count {self.stream}"]
        u = jax.random.uniform(jax.random.fold_in(key, count), (), jnp.float32)
        return x + 0.5 * u, {**s, f"count {self.stream}": count + 1}


def scaled(scale: float) -> Callable[..., Any]:
    """An initializer that is made anew, and says that it is one of JAX's."""

    @functools.wraps(normal)
    def initialize(key, shape, dtype):
        return scale * normal(key, shape, dtype)

    return initialize


SCALES = {"w": 1.0, "u": 1.0, "tenfold": 10.0, "half": 0.5}


def parameter(name: str) -> Any:
    initialize = normal if SCALES[name] == 1.0 else scaled(SCALES[name])
    return jnp.asarray(jaxstate.param(name, initialize, (), jnp.float32), jnp.float32)


@dataclass(frozen=True)
class Parameter(Statement):
    name: str

    def uses(self, at):
        return {f"param {at.path}{self.name}"}

    def facts(self, facts):
        return {"params"}

    def stateful(self, x, world):
        return jnp.cos(x * parameter(self.name))

    def by_hand(self, x, s, at):
        return jnp.cos(x * s[f"param {at.path}{self.name}"]), s


@dataclass(frozen=True)
class OnlyParameter(Parameter):
    """The parameter is the result, nothing is done with it."""

    def facts(self, facts):
        return {"params", "forwards"}

    def stateful(self, x, world):
        return parameter(self.name)

    def by_hand(self, x, s, at):
        return s[f"param {at.path}{self.name}"], s


@dataclass(frozen=True)
class LaneRule(Statement):
    """A function without state that has a rule of its own for lanes."""

    def facts(self, facts):
        return {"while", "lane rule"}  # reverse mode does not exist in JAX

    def stateful(self, x, world):
        f = custom_vmap(lambda x: jnp.sin(x))
        f.def_vmap(lambda size, batched, x: (jnp.sin(x), batched[0]))
        return f(x)

    def by_hand(self, x, s, at):
        return jnp.sin(x), s


@dataclass(frozen=True)
class Variable(Statement):
    name: str

    def uses(self, at):
        return {f"variable {at.path}{self.name}"}

    def facts(self, facts):
        return {"variables"}

    def variable(self):
        reduce = jnp.mean if self.name == "r" else None
        initial = INITIAL[self.name]
        return jaxstate.variable(self.name, jnp.full, (), initial, jnp.float32, reduce=reduce)


@dataclass(frozen=True)
class ReadVariable(Variable):
    def stateful(self, x, world):
        return x - 0.6 * self.variable().value

    def by_hand(self, x, s, at):
        return x - 0.6 * s[f"variable {at.path}{self.name}"], s


@dataclass(frozen=True)
class WriteVariable(Variable):
    how: str

    def writes(self, at):
        return {f"write {name}" for name in self.uses(at)}

    def facts(self, facts):
        lanes = {"writes shared"} if self.name != "r" and self.how != "scale" else set()
        diverging = {"writes v"} if self.name != "r" else set()
        return {"variables", "writes"} | lanes | diverging

    def stateful(self, x, world):
        variable = self.variable()
        variable.value = changed(0.0 if self.how == "set" else variable.value, x, self.how)
        return x

    def by_hand(self, x, s, at):
        key = f"variable {at.path}{self.name}"
        return x, {**s, key: changed(s[key], x, self.how)}


@dataclass(frozen=True)
class Use(Statement):
    """A definition, used in one of `WAYS`."""

    number: int
    way: str

    def uses(self, at):
        body = at.bodies[self.number]
        inside = at.module(self.number) if self.number in at.homes else at
        return set().union(*(statement.uses(inside) for statement in body))

    def facts(self, facts):
        return facts[self.number] | {self.way} | WAYS[self.way].makes

    def stateful(self, x, world):
        return world.function(self.number, self.way)(x)

    def by_hand(self, x, s, at):
        body = at.bodies[self.number]
        inside = at.module(self.number) if self.number in at.homes else at
        touched = self.uses(at) | written(body, inside)
        return WAYS[self.way].by_hand(lambda x, s: run_by_hand(body, inside, x, s), touched, x, s)

    def writes(self, at):
        inside = at.module(self.number) if self.number in at.homes else at
        return written(at.bodies[self.number], inside)


@dataclass(frozen=True)
class Fresh(Statement):
    """The k-th module that is made in a call of a definition, and a parameter of it."""

    k: int
    name: str

    def _inside(self, at):
        return at.inside(f"fresh_{self.k}" if self.k else "fresh"), Parameter(self.name)

    def uses(self, at):
        inside, statement = self._inside(at)
        return statement.uses(inside)

    def facts(self, facts):
        return {"fresh", "params"}

    def stateful(self, x, world):
        def run(x):
            return Parameter(self.name).stateful(x, world)

        return jaxstate.parametrized(run, name="fresh")(x)

    def by_hand(self, x, s, at):
        inside, statement = self._inside(at)
        return statement.by_hand(x, s, inside)


def written(body: Body, at: Place) -> set[str]:
    """What may be written, as far as it has derivatives, each after the word "write"."""
    found: set[str] = set()
    for statement in body:
        if isinstance(statement, Scope):
            found |= written(statement.body, at.inside(statement.name))
        elif isinstance(statement, Write):
            found |= {f"write {name}" for name in statement.uses(at)}
        elif hasattr(statement, "writes"):
            found |= statement.writes(at)
    return found


def facts_of(statement: Statement, facts: list[set[str]]) -> set[str]:
    """What a statement does, as far as it decides where it may stand."""
    if isinstance(statement, Write):
        return {"writes", "writes shared", "writes v", "slots"}
    if isinstance(statement, Read):
        return {"slots", "reads"}
    if isinstance(statement, Scope):
        return set().union(*(facts_of(s, facts) for s in statement.body))
    return statement.facts(facts) if hasattr(statement, "facts") else set()


@dataclass(frozen=True)
class Way:
    """With jaxstate: given the function ``x -> y``. By hand: ``(x, s) -> (y, s)``, and what it
    touches."""

    stateful: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
    by_hand: Callable[..., tuple[Any, Any]]
    not_with: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()


def directly(f, touched, x, s):
    return f(x, s)


def scan(f):
    def step(x, t):
        y = f(x + t)
        return y, y

    def run(x):
        x, ys = lax.scan(step, x, jnp.array([0.0, 0.1], jnp.float32))
        return x + jnp.sum(ys)

    return run


def scan_by_hand(f, touched, x, s):
    total = 0.0
    for t in (0.0, 0.1):
        x, s = f(x + jnp.float32(t), s)
        total = total + x
    return x + total, s


def fori(f):
    def step(i, x):
        return f(x)

    return lambda x: lax.fori_loop(0, 2, step, x)


def fori_by_hand(f, touched, x, s):
    return f(*f(x, s))


def while_loop(f):
    def go_on(c):
        return c[0] < 2.5

    def turn(c):
        return (c[0] + 1.0, f(c[1]))

    return lambda x: lax.while_loop(go_on, turn, (jnp.clip(x, 0.0, 2.0), x))[1]


def while_by_hand(f, touched, x, s):
    turns = jnp.clip(x, 0.0, 2.0)
    while turns < 2.5:
        turns = turns + 1.0
        x, s = f(x, s)
    return x, s


def cond(f):
    def other(x):
        return 0.5 * x

    return lambda x: lax.cond(x > 0.3, f, other, x)


def cond_by_hand(f, touched, x, s):
    return f(x, s) if x > 0.3 else (0.5 * x, s)


def same_branches(f):
    return lambda x: lax.cond(x > 0.3, f, f, x)


def switch(f):
    def other(x):
        return 0.5 * x

    return lambda x: lax.switch(jnp.int32(jnp.floor(3 * x)), [f, other, f], x)


def switch_by_hand(f, touched, x, s):
    return (0.5 * x, s) if int(jnp.clip(jnp.int32(jnp.floor(3 * x)), 0, 2)) == 1 else f(x, s)


def value_and_grad(f):
    g = jax.value_and_grad(f)

    def run(x):
        y, dx = g(x)
        return y + 0.5 * dx

    return run


def grad_by_hand(f, touched, x, s):
    (y, s), dx = jax.value_and_grad(lambda x: f(x, s), has_aux=True)(x)
    return y + 0.5 * dx, s


def vjp(f):
    def run(x):
        y, back = jax.vjp(f, x)
        return y + 0.5 * back(jnp.ones_like(y))[0]

    return run


def linearize(f):
    def run(x):
        y, along = jax.linearize(f, x)
        return y + 0.5 * along(jnp.ones_like(x))

    return run


def jvp(f):
    def run(x):
        y, t = jax.jvp(f, (x,), (jnp.ones_like(x),))
        return y + 0.5 * t

    return run


def jvp_by_hand(f, touched, x, s):
    y, t, s = jax.jvp(lambda x: f(x, s), (x,), (jnp.ones_like(x),), has_aux=True)
    return y + 0.5 * t, s


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), 3.0 * tangents[0]))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (3.0 * ct,))
    return g


def optimize_remat(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (3.0 * ct,), optimize_remat=True)
    return g


def custom_by_hand(f, touched, x, s):
    """The value without its derivative, and 3 x without its value."""
    y, after = f(x, s)
    y = lax.stop_gradient(y) + 3.0 * (x - lax.stop_gradient(x))
    return y, without_derivatives(after, touched)


def without_derivatives(s, touched):
    """The state, after what was written to it counts as constant."""
    names = [name.removeprefix("write ") for name in touched if name.startswith("write ")]
    return {**s, **{name: jax.tree.map(lax.stop_gradient, s[name]) for name in names}}


def closure_convert(f):
    def run(x):
        converted, constants = jax.closure_convert(f, x)
        return converted(x, *constants)

    return run


LANES = 2


def vmap(f):
    g = jax.vmap(f)
    return lambda x: jnp.mean(g(x + 0.2 * jnp.arange(LANES, dtype=jnp.float32)))


def vmap_by_hand(f, touched, x, s):
    ys, s = lanes_by_hand(f, touched, [x + jnp.float32(0.2 * i) for i in range(LANES)], s)
    return sum(ys) / LANES, s


def lanes_by_hand(f, touched, xs, s):
    """One lane after the other: each has streams of its own, and starts from what is outside."""
    regions = {}
    for name in SPLIT_STREAMS:
        if f"count {name}" in touched:
            regions[name] = jax.random.fold_in(s[f"key {name}"], s[f"count {name}"])
            s = {**s, f"count {name}": s[f"count {name}"] + 1}
    ys, after = [], []
    for i, x in enumerate(xs):
        own = {f"key {name}": jax.random.fold_in(key, i) for name, key in regions.items()}
        own |= {f"count {name}": 0 for name in regions}
        y, own = f(x, {**s, **own})
        ys.append(y)
        after.append(own)
    changes = {}
    for name in s:
        if name.startswith("variable"):
            lanes = [own[name] for own in after]
            changes[name] = sum(lanes) / len(lanes) if name.endswith("r") else lanes[0]
    return ys, {**s, **changes, "count shared": after[0]["count shared"]}


REVERSE = frozenset({"while"})
FORWARD = frozenset({"custom_vjp"})
IN_LANES = frozenset({"writes shared"})
WAYS = {
    "plain": Way(lambda f: f, directly),
    "jit": Way(jax.jit, directly),
    "checkpoint": Way(jax.checkpoint, directly),
    "closure_convert": Way(closure_convert, directly),
    "scan": Way(scan, scan_by_hand),
    "fori": Way(fori, fori_by_hand),
    "while": Way(while_loop, while_by_hand, makes=frozenset({"diverges"})),
    "cond": Way(cond, cond_by_hand, makes=frozenset({"diverges"})),
    "same branches": Way(same_branches, directly, makes=frozenset({"diverges"})),
    "switch": Way(switch, switch_by_hand, makes=frozenset({"diverges"})),
    "grad": Way(value_and_grad, grad_by_hand, REVERSE),
    "vjp": Way(vjp, grad_by_hand, REVERSE),
    "jvp": Way(jvp, jvp_by_hand, FORWARD),
    "linearize": Way(linearize, grad_by_hand, REVERSE | FORWARD),
    "custom_jvp": Way(custom_jvp, custom_by_hand),
    "custom_vjp": Way(custom_vjp, custom_by_hand, makes=FORWARD),
    "optimize_remat": Way(optimize_remat, custom_by_hand, makes=FORWARD),
    "vmap": Way(vmap, vmap_by_hand, IN_LANES),
}


def refused(needs: frozenset[str], facts: set[str]) -> bool:
    """Whether JAX or jaxstate says no to what does this, where that is not to be."""
    lanes = needs & IN_LANES and "diverges" in facts and facts & {"writes v", "draws shared"}
    return bool(needs & facts or lanes)
