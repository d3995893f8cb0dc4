"""Random programs, each in two styles: with jaxstate, and with all its state passed by hand.

A program is a body and the modules it may call. A body is a tuple of statements about a float32
scalar ``x``. A statement knows two ways to run:

* ``stateful(x, tools)`` uses jaxstate, and returns the new ``x``;
* ``by_hand(x, s, at)`` is given all state in the dict ``s``, and returns the new ``x`` and ``s``.

``s`` has, as strings: ``"key NAME"`` and ``"count NAME"`` of each random stream, ``"slot a"`` and
``"slot b"``, and ``"param PATH"`` and ``"variable PATH"``. A variable is written in lanes as its
last name says: "r" is reduced to a mean, "v" and the one that is used by a handle are shared.

`programs` is the strategy of hypothesis. It knows what JAX refuses (reverse mode through
``while_loop``) and what jaxstate does (lanes that write into what they share), and makes nothing of
the kind, so that each program has a result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

import jaxstate
from jaxstate.extend import new_slot, read, write

normal = jax.nn.initializers.normal(1.0)

SPLIT_STREAMS = ("default", "dropout")
SHARED_STREAM = "shared"
STREAMS = (*SPLIT_STREAMS, SHARED_STREAM)
HANDLE = "h"
INITIAL = {"v": 0.4, "r": -0.2, HANDLE: 0.3}

Body = tuple["Statement", ...]


@dataclass
class Tools:
    """What a stateful program was made with: slots, a handle, modules, functions jitted once."""

    slots: dict[str, Any]
    handle: Any
    modules: tuple[Any, ...]
    jitted: dict[int, Any] = field(default_factory=dict)

    def jit(self, statement: Statement) -> Any:
        """One jitted function per statement, also if the statement runs in several places."""
        if id(statement) not in self.jitted:
            self.jitted[id(statement)] = jax.jit(partial(run_stateful, statement.body, self))
        return self.jitted[id(statement)]


class Place(NamedTuple):
    """Where in the tree of parameters a program by hand is, and where its modules are at home."""

    path: str
    bodies: tuple[Body, ...]
    homes: Mapping[int, str]

    def inside(self, name: str) -> Place:
        return self._replace(path=f"{self.path}{name}/")

    def module(self, number: int) -> Place:
        return self._replace(path=self.homes[number])


class Statement:
    """One step of a program. The statements inside of it are in ``body`` or ``bodies``."""

    def inside(self) -> tuple[Body, ...]:
        return ()

    def uses(self, at: Place) -> set[str]:
        """The state that the statement touches, or what is inside of it."""
        return set().union(*(used(body, at) for body in self.inside()))

    def stateful(self, x: Any, tools: Tools) -> Any:
        raise NotImplementedError

    def by_hand(self, x: Any, s: Any, at: Place) -> tuple[Any, Any]:
        raise NotImplementedError


def run_stateful(body: Body, tools: Tools, x: Any) -> Any:
    for statement in body:
        x = statement.stateful(x, tools)
    return x


def run_by_hand(body: Body, at: Place, x: Any, s: Any) -> tuple[Any, Any]:
    for statement in body:
        x, s = statement.by_hand(x, s, at)
    return x, s


def used(body: Body, at: Place) -> set[str]:
    """The state that a body touches."""
    return set().union(*(statement.uses(at) for statement in body))


# -- Without anything inside -----------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic(Statement):
    factor: float

    def stateful(self, x, tools):
        return jnp.sin(x) * self.factor + 0.3

    def by_hand(self, x, s, at):
        return jnp.sin(x) * self.factor + 0.3, s


def draw_by_hand(s, stream):
    u = jax.random.uniform(jax.random.fold_in(s[f"key {stream}"], s[f"count {stream}"]))
    return u, {**s, f"count {stream}": s[f"count {stream}"] + 1}


@dataclass(frozen=True)
class Draw(Statement):
    stream: str

    def uses(self, at):
        return {f"key {self.stream}", f"count {self.stream}"}

    def stateful(self, x, tools):
        return x + 0.5 * jaxstate.random.uniform(stream=self.stream)

    def by_hand(self, x, s, at):
        u, s = draw_by_hand(s, self.stream)
        return x + 0.5 * u, s


@dataclass(frozen=True)
class Parameter(Statement):
    name: str

    def uses(self, at):
        return {f"param {at.path}{self.name}"}

    def stateful(self, x, tools):
        return jnp.cos(x * jaxstate.param(self.name, normal, ()))

    def by_hand(self, x, s, at):
        return jnp.cos(x * s[f"param {at.path}{self.name}"]), s


def changed(old, x, how):
    """The value that is written: of ``x``, of both, or of the old value alone."""
    return {"set": jnp.tanh(x), "add": 0.7 * old + 0.1 * x, "scale": 0.5 * old + 0.2}[how]


@dataclass(frozen=True)
class Read(Statement):
    slot: str

    def uses(self, at):
        return {f"slot {self.slot}"}

    def stateful(self, x, tools):
        return x - 0.4 * read(tools.slots[self.slot])

    def by_hand(self, x, s, at):
        return x - 0.4 * s[f"slot {self.slot}"], s


@dataclass(frozen=True)
class Write(Statement):
    slot: str
    how: str

    def uses(self, at):
        return {f"slot {self.slot}"}

    def stateful(self, x, tools):
        slot = tools.slots[self.slot]
        write(slot, jnp.tanh(x) if self.how == "set" else changed(read(slot), x, self.how))
        return x

    def by_hand(self, x, s, at):
        name = f"slot {self.slot}"
        return x, {**s, name: changed(s[name], x, self.how)}


@dataclass(frozen=True)
class Variable(Statement):
    name: str

    def _key(self, at):
        return f"variable {HANDLE if self.name == HANDLE else at.path + self.name}"

    def uses(self, at):
        return {self._key(at)}

    def _variable(self, tools):
        if self.name == HANDLE:
            return tools.handle
        reduce = jnp.mean if self.name == "r" else None
        return jaxstate.variable(self.name, jnp.full, (), INITIAL[self.name], reduce=reduce)


@dataclass(frozen=True)
class ReadVariable(Variable):
    def stateful(self, x, tools):
        return x - 0.6 * self._variable(tools).value

    def by_hand(self, x, s, at):
        return x - 0.6 * s[self._key(at)], s


@dataclass(frozen=True)
class WriteVariable(Variable):
    how: str

    def stateful(self, x, tools):
        variable = self._variable(tools)
        variable.value = changed(0.0 if self.how == "set" else variable.value, x, self.how)
        return x

    def by_hand(self, x, s, at):
        return x, {**s, self._key(at): changed(s[self._key(at)], x, self.how)}


# -- One body inside, run once ---------------------------------------------------------------


@dataclass(frozen=True)
class Call(Statement):
    """jit, checkpoint, grad ... of the body."""

    body: Body

    def inside(self):
        return (self.body,)


class Jit(Call):
    def stateful(self, x, tools):
        return tools.jit(self)(x)

    def by_hand(self, x, s, at):
        return jax.jit(partial(run_by_hand, self.body, at))(x, s)


@dataclass(frozen=True)
class JitTwice(Call):
    """One jitted function, called in two scopes."""

    scopes: tuple[str, str]

    def uses(self, at):
        return set().union(*(used(self.body, at.inside(name)) for name in self.scopes))

    def stateful(self, x, tools):
        for name in self.scopes:
            with jaxstate.scope(name):
                x = tools.jit(self)(x)
        return x

    def by_hand(self, x, s, at):
        for name in self.scopes:
            x, s = jax.jit(partial(run_by_hand, self.body, at.inside(name)))(x, s)
        return x, s


@dataclass(frozen=True)
class Scope(Call):
    name: str

    def uses(self, at):
        return used(self.body, at.inside(self.name))

    def stateful(self, x, tools):
        with jaxstate.scope(self.name):
            return run_stateful(self.body, tools, x)

    def by_hand(self, x, s, at):
        return run_by_hand(self.body, at.inside(self.name), x, s)


@dataclass(frozen=True)
class Module(Statement):
    """A call of one of the program's modules."""

    number: int

    def uses(self, at):
        return used(at.bodies[self.number], at.module(self.number))

    def stateful(self, x, tools):
        return tools.modules[self.number](x, tools)

    def by_hand(self, x, s, at):
        return run_by_hand(at.bodies[self.number], at.module(self.number), x, s)


class Checkpoint(Call):
    def stateful(self, x, tools):
        return jax.checkpoint(partial(run_stateful, self.body, tools))(x)

    def by_hand(self, x, s, at):
        return jax.checkpoint(partial(run_by_hand, self.body, at))(x, s)


class Derivative(Call):
    """``transform(f, x)`` of ``f: x -> (y, aux)`` gives a value and ``aux``."""

    def stateful(self, x, tools):
        return self.transform(lambda x: (run_stateful(self.body, tools, x), ()), x)[0]

    def by_hand(self, x, s, at):
        return self.transform(lambda x: run_by_hand(self.body, at, x, s), x)


class Grad(Derivative):
    def transform(self, f, x):
        return jax.grad(f, has_aux=True)(x)


class Vjp(Derivative):
    """The backward pass is run twice."""

    def transform(self, f, x):
        y, back, aux = jax.vjp(f, x, has_aux=True)
        return y + back(jnp.float32(0.4))[0] - back(jnp.float32(0.1))[0], aux


class Jvp(Derivative):
    def transform(self, f, x):
        y, t, aux = jax.jvp(f, (x,), (jnp.float32(0.5),), has_aux=True)
        return y + t, aux


class Linearize(Derivative):
    def transform(self, f, x):
        y, linear, aux = jax.linearize(f, x, has_aux=True)
        return y + linear(jnp.float32(0.5)) - linear(jnp.float32(0.2)), aux


class CustomRule(Call):
    """A rule that is not the derivative, so that its loss shows."""

    def by_hand(self, x, s, at):
        """With all state as floats, and no residuals: JAX itself mixes them up in nested rules."""
        touched = {name: s[name] for name in self.uses(at)}

        def run(x, floats):
            y, after = run_by_hand(self.body, at, x, jax.tree.map(from_floats, floats, touched))
            return y, jax.tree.map(as_floats, after)

        floats = jax.tree.map(as_floats, touched)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), floats)
        y, floats = self.with_rule(run, zeros)(x, floats)
        return y, {**s, **jax.tree.map(from_floats, floats, touched)}


def as_floats(x):
    """A float, a count or a key as floats that are exact."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.float32(x)
    bits = jax.random.key_data(x)
    return jnp.float32(jnp.stack([bits >> 16, bits & 0xFFFF]))


def from_floats(floats, like):
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return lax.convert_element_type(floats, like.dtype)
    high, low = jnp.uint32(floats)
    return jax.random.wrap_key_data(high << 16 | low)


class CustomJvp(CustomRule):
    def stateful(self, x, tools):
        f = jax.custom_jvp(partial(run_stateful, self.body, tools))
        f.defjvp(lambda p, t: (run_stateful(self.body, tools, *p), 3.0 * t[0]))
        return f(x)

    def with_rule(self, run, zeros):
        f = jax.custom_jvp(run)

        @f.defjvp
        def rule(primals, tangents):
            y, s = run(*primals)
            return (y, s), (3.0 * tangents[0], jax.tree.map(jnp.asarray, zeros))

        return f


class CustomVjp(CustomRule):
    def stateful(self, x, tools):
        f = jax.custom_vjp(partial(run_stateful, self.body, tools))
        f.defvjp(lambda x: (run_stateful(self.body, tools, x), None), lambda _, g: (3.0 * g,))
        return f(x)

    def with_rule(self, run, zeros):
        f = jax.custom_vjp(run)
        f.defvjp(lambda x, s: (run(x, s), None), lambda _, g: (3.0 * g[0], zeros))
        return f


class CustomVmap(Call):
    """Outside of a vmap, where the rule is not asked."""

    def stateful(self, x, tools):
        f = jax.custom_batching.custom_vmap(partial(run_stateful, self.body, tools))
        f.def_vmap(_no_rule)
        return f(x)

    def by_hand(self, x, s, at):
        f = jax.custom_batching.custom_vmap(partial(run_by_hand, self.body, at))
        f.def_vmap(_no_rule)
        return f(x, s)


def _no_rule(*args):
    raise AssertionError("not under a vmap")


# -- Loops and branches ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scan(Call):
    length: int
    reverse: bool

    def stateful(self, x, tools):
        def step(x, t):
            x = run_stateful(self.body, tools, x + t)
            return x, x

        options = dict(length=self.length, reverse=self.reverse)
        x, ys = lax.scan(step, x, 0.1 * jnp.arange(self.length), **options)
        return x + jnp.sum(ys)

    def by_hand(self, x, s, at):
        def step(carry, t):
            x, s = carry
            x, s = run_by_hand(self.body, at, x + t, s)
            return (x, s), x

        options = dict(length=self.length, reverse=self.reverse)
        (x, s), ys = lax.scan(step, (x, s), 0.1 * jnp.arange(self.length), **options)
        return x + jnp.sum(ys), s


def _turns(x):
    return jnp.clip(jnp.int32(4 * x), 0, 3)


class Fori(Call):
    """As many turns as ``x`` says, at most three."""

    def stateful(self, x, tools):
        return lax.fori_loop(0, _turns(x), lambda _, x: run_stateful(self.body, tools, x), x)

    def by_hand(self, x, s, at):
        run = partial(run_by_hand, self.body, at)
        return lax.fori_loop(0, _turns(x), lambda _, c: run(*c), (x, s))


@dataclass(frozen=True)
class While(Call):
    """The same; the condition may draw or write too."""

    condition_draws: bool
    condition_writes: bool

    def uses(self, at):
        drawn = {"key default", "count default"} if self.condition_draws else set()
        return super().uses(at) | drawn | ({"slot a"} if self.condition_writes else set())

    def stateful(self, x, tools):
        turns = _turns(x)

        def go_on(carry):
            i, _ = carry
            more = jnp.float32(0.0)
            if self.condition_draws:
                more = jaxstate.random.uniform()
            if self.condition_writes:
                write(tools.slots["a"], read(tools.slots["a"]) + 1.0)
            return i + more < turns

        def turn(carry):
            i, x = carry
            return i + 1, run_stateful(self.body, tools, x)

        return lax.while_loop(go_on, turn, (jnp.int32(0), x))[1]

    def by_hand(self, x, s, at):
        turns = _turns(x)

        def condition(i, s):
            more = jnp.float32(0.0)
            if self.condition_draws:
                more, s = draw_by_hand(s, "default")
            if self.condition_writes:
                s = {**s, "slot a": s["slot a"] + 1.0}
            return i + more < turns, s

        def turn(carry):
            _, i, x, s = carry
            x, s = run_by_hand(self.body, at, x, s)
            go_on, s = condition(i + 1, s)
            return go_on, i + 1, x, s

        go_on, s = condition(jnp.int32(0), s)
        _, _, x, s = lax.while_loop(lambda c: c[0], turn, (go_on, jnp.int32(0), x, s))
        return x, s


@dataclass(frozen=True)
class Switch(Statement):
    """``cond`` if there are two branches."""

    bodies: tuple[Body, ...]
    at: float

    def inside(self):
        return self.bodies

    def _choose(self, x, branches, *operands):
        if len(branches) == 2:
            return lax.cond(x > self.at, *branches, *operands)
        return lax.switch(jnp.int32(3 * (x - self.at)), branches, *operands)

    def stateful(self, x, tools):
        return self._choose(x, [partial(run_stateful, b, tools) for b in self.bodies], x)

    def by_hand(self, x, s, at):
        return self._choose(x, [partial(run_by_hand, b, at) for b in self.bodies], x, s)


@dataclass(frozen=True)
class Vmap(Call):
    """Lanes see the state outside, draw their own keys, and have slots of their own to write."""

    lanes: int

    def uses(self, at):
        return super().uses(at) - {"slot a"} | {"slot b"}

    def stateful(self, x, tools):
        def lane(x):
            own = {"a": new_slot(x), "b": new_slot(read(tools.slots["b"]))}
            y = run_stateful(self.body, replace(tools, slots=own, jitted={}), x)
            return y + read(own["a"]) - read(own["b"])

        return jnp.mean(jax.vmap(lane)(x + 0.2 * jnp.arange(self.lanes)))

    def by_hand(self, x, s, at):
        streams = {}
        inside = used(self.body, at)
        drawn = [name for name in SPLIT_STREAMS if f"count {name}" in inside]
        for name in drawn:
            key, count = f"key {name}", f"count {name}"
            region = jax.random.fold_in(s[key], s[count])
            s = {**s, count: s[count] + 1}
            streams[key] = jax.vmap(jax.random.fold_in, (None, 0))(region, jnp.arange(self.lanes))
            streams[count] = jnp.zeros(self.lanes, jnp.int32)

        shared = [name for name in s if name.startswith("variable") or name == "count shared"]

        def lane(x, stream):
            y, own = run_by_hand(self.body, at, x, {**s, **stream, "slot a": x})
            return y + own["slot a"] - own["slot b"], {name: own[name] for name in shared}

        y, after = jax.vmap(lane)(x + 0.2 * jnp.arange(self.lanes), streams)
        for name, lanes in after.items():
            after[name] = jnp.mean(lanes, axis=0) if _is_reduced(name) else lanes[0]
        return jnp.mean(y), {**s, **after}


def _is_reduced(name):
    return name.split("/")[-1].split(" ")[-1] == "r"


# -- Programs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A body, and the bodies of the modules it calls. A module calls only those before it."""

    modules: tuple[Body, ...]
    body: Body

    @functools.cached_property
    def place(self) -> Place:
        """The root, with the home of each module: where it is called first, as the text goes."""
        homes: dict[int, str] = {}
        _find_homes(self.body, Place("", self.modules, homes))
        return Place("", self.modules, homes)

    @functools.cached_property
    def entries(self) -> list[str]:
        """The parameters and variables of the program."""
        uses = used(self.body, self.place) | {f"variable {HANDLE}"}
        return sorted(name for name in uses if name.split(" ")[0] in ("param", "variable"))

    def has(self, *kinds: type) -> bool:
        """Whether a statement of one of these kinds is in it, at any depth."""
        return any(_anywhere(body, kinds) for body in (self.body, *self.modules))

    def stateful(self) -> Any:
        """A function ``(x, slots) -> y`` for inside a parametrized function."""
        modules = tuple(
            jaxstate.parametrized(
                lambda x, tools, body=body: run_stateful(body, tools, x), name=f"m{i}"
            )
            for i, body in enumerate(self.modules)
        )

        def run(x, slots):
            handle = jaxstate.variable(HANDLE, jnp.full, (), INITIAL[HANDLE])
            return run_stateful(self.body, Tools(slots, handle, modules), x)

        return run

    def by_hand(self, x: Any, s: Any) -> tuple[Any, Any]:
        return run_by_hand(self.body, self.place, x, s)


def _find_homes(body: Body, at: Place) -> None:
    for statement in body:
        if isinstance(statement, Module):
            if statement.number not in at.homes:
                at.homes[statement.number] = f"{at.path}m{statement.number}/"
                _find_homes(at.bodies[statement.number], at.module(statement.number))
        elif isinstance(statement, JitTwice):
            for name in statement.scopes:
                _find_homes(statement.body, at.inside(name))
        else:
            inside = at.inside(statement.name) if isinstance(statement, Scope) else at
            for inner in statement.inside():
                _find_homes(inner, inside)


def _anywhere(body: Body, kinds: tuple[type, ...]) -> bool:
    return any(
        isinstance(s, kinds) or any(_anywhere(inner, kinds) for inner in s.inside()) for s in body
    )


# -- The strategy ----------------------------------------------------------------------------


class Context(NamedTuple):
    """What stands around a statement."""

    depth: int
    modules: int = 0
    lanes: bool = False
    diverging: bool = False  # lanes may take different ways
    reverse: bool = False
    forward: bool = False

    def deeper(self, **changes: bool) -> Context:
        return self._replace(depth=self.depth - 1, **changes)


_scopes = st.sampled_from(["s", "t"])


@functools.cache
def _leaves(c: Context) -> Any:
    slots, hows = st.sampled_from(["a", "b"]), st.sampled_from(["set", "add", "scale"])
    shared = st.sampled_from(["v", HANDLE])
    leaves = [
        st.builds(Arithmetic, st.sampled_from([0.5, 0.9, 1.3])),
        st.builds(Draw, st.sampled_from(SPLIT_STREAMS if c.diverging else STREAMS)),
        st.builds(Parameter, st.sampled_from(["w", "u"])),
        st.builds(Read, slots),
        st.builds(Write, slots, hows),
        st.builds(ReadVariable, st.sampled_from(["v", "r", HANDLE])),
        st.builds(WriteVariable, st.just("r"), hows),
    ]
    if not c.diverging:
        leaves.append(st.builds(WriteVariable, shared, st.just("scale") if c.lanes else hows))
    if c.modules:
        leaves.append(st.builds(Module, st.integers(0, c.modules - 1)))
    return st.one_of(leaves)


@functools.cache
def _bodies(c: Context) -> Any:
    return st.lists(_statements(c), min_size=1, max_size=2).map(tuple)


@functools.cache
def _statements(c: Context) -> Any:
    if c.depth == 0:
        return _leaves(c)
    body = _bodies(c.deeper())
    forward, reverse = _bodies(c.deeper(forward=True)), _bodies(c.deeper(reverse=True))
    both = _bodies(c.deeper(forward=True, reverse=True))
    branch = _bodies(c.deeper(diverging=c.diverging or c.lanes))
    several = st.lists(branch, min_size=2, max_size=3).map(tuple)
    kinds = [
        st.builds(Jit, body),
        st.builds(JitTwice, body, st.tuples(_scopes, _scopes)),
        st.builds(Scope, body, _scopes),
        st.builds(Checkpoint, body),
        st.builds(Grad, reverse),
        st.builds(Vjp, reverse),
        st.builds(Jvp, forward),
        st.builds(Linearize, both),
        st.builds(CustomJvp, body),
        st.builds(Scan, body, st.integers(0, 3), st.booleans()),
        st.builds(Switch, several, st.sampled_from([-0.2, 0.4])),
        st.builds(Vmap, _bodies(c.deeper(lanes=True)), st.integers(1, 3)),
    ]
    if not c.forward:
        kinds.append(st.builds(CustomVjp, body))
    if not c.reverse:
        kinds += [st.builds(Fori, branch), st.builds(While, branch, st.booleans(), st.booleans())]
        if not c.lanes:
            kinds.append(st.builds(CustomVmap, body))
    return st.one_of(_leaves(c), *kinds)


@st.composite
def programs(draw: Any, depth: int = 5) -> Program:
    """Programs nested at most ``depth`` deep, the modules not counted.

    A module may be called from anywhere, so it has nothing that some place would refuse.
    """
    modules: list[Body] = []
    for _ in range(draw(st.integers(0, 2))):
        anywhere = Context(min(depth, 2), len(modules), True, True, True, True)
        modules.append(draw(_bodies(anywhere)))
    return Program(tuple(modules), draw(_bodies(Context(depth, len(modules)))))
