"""Random programs, each in two styles: with jaxstate, and with all its state passed by hand.

A program is a tuple of statements about a float32 scalar ``x``. A statement knows two ways to run:

* ``stateful(x, slots)`` uses jaxstate, and returns the new ``x``;
* ``by_hand(x, s)`` is given all state in the dict ``s``, and returns the new ``x`` and ``s``.

``s`` has the key and count of a random stream, the values of the slots "a" and "b" and of the
parameter "w". `programs` is the strategy of hypothesis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax
from jax.custom_derivatives import zero_from_primal

import jaxstate
from jaxstate.extend import new_slot, read, write

normal = jax.nn.initializers.normal(1.0)

Program = tuple["Statement", ...]


class Statement:
    """One step of a program. The statements inside of it are in ``body`` or ``bodies``."""

    def inside(self) -> tuple[Program, ...]:
        return ()

    def uses(self) -> set[str]:
        """The state that the statement touches, or what is inside of it."""
        return set().union(*(used(p) for p in self.inside()))

    def stateful(self, x: Any, slots: Any) -> Any:
        raise NotImplementedError

    def by_hand(self, x: Any, s: Any) -> tuple[Any, Any]:
        raise NotImplementedError


def run_stateful(program: Program, slots: Any, x: Any) -> Any:
    for statement in program:
        x = statement.stateful(x, slots)
    return x


def run_by_hand(program: Program, x: Any, s: Any) -> tuple[Any, Any]:
    for statement in program:
        x, s = statement.by_hand(x, s)
    return x, s


def anywhere(program: Program, test: Any) -> bool:
    """Whether ``test`` holds for a statement of the program, at any depth."""
    return any(
        test(statement) or any(anywhere(p, test) for p in statement.inside())
        for statement in program
    )


def draws(program: Program) -> bool:
    return anywhere(program, lambda s: isinstance(s, Draw) or getattr(s, "condition_draws", False))


def used(program: Program) -> set[str]:
    """The state that a program touches."""
    return set().union(*(statement.uses() for statement in program))


# -- Without anything inside -----------------------------------------------------------------


@dataclass(frozen=True)
class Arithmetic(Statement):
    factor: float

    def stateful(self, x, slots):
        return jnp.sin(x) * self.factor + 0.3

    def by_hand(self, x, s):
        return jnp.sin(x) * self.factor + 0.3, s


@dataclass(frozen=True)
class Draw(Statement):
    def uses(self):
        return {"key", "count"}

    def stateful(self, x, slots):
        return x + 0.5 * jaxstate.random.uniform()

    def by_hand(self, x, s):
        u = jax.random.uniform(jax.random.fold_in(s["key"], s["count"]))
        return x + 0.5 * u, {**s, "count": s["count"] + 1}


@dataclass(frozen=True)
class Parameter(Statement):
    def uses(self):
        return {"w"}

    def stateful(self, x, slots):
        return jnp.cos(x * jaxstate.param("w", normal, ()))

    def by_hand(self, x, s):
        return jnp.cos(x * s["w"]), s


@dataclass(frozen=True)
class Read(Statement):
    slot: str

    def uses(self):
        return {self.slot}

    def stateful(self, x, slots):
        return x - 0.4 * read(slots[self.slot])

    def by_hand(self, x, s):
        return x - 0.4 * s[self.slot], s


@dataclass(frozen=True)
class Write(Statement):
    slot: str

    def uses(self):
        return {self.slot}

    def stateful(self, x, slots):
        write(slots[self.slot], jnp.tanh(x))
        return x

    def by_hand(self, x, s):
        return x, {**s, self.slot: jnp.tanh(x)}


@dataclass(frozen=True)
class Update(Statement):
    slot: str

    def uses(self):
        return {self.slot}

    def stateful(self, x, slots):
        write(slots[self.slot], 0.7 * read(slots[self.slot]) + 0.1 * x)
        return x

    def by_hand(self, x, s):
        return x, {**s, self.slot: 0.7 * s[self.slot] + 0.1 * x}


# -- One program inside, run once ------------------------------------------------------------


@dataclass(frozen=True)
class Call(Statement):
    """jit, checkpoint, grad ... of the body."""

    body: Program

    def inside(self):
        return (self.body,)


class Jit(Call):
    def stateful(self, x, slots):
        return jax.jit(partial(run_stateful, self.body, slots))(x)

    def by_hand(self, x, s):
        return jax.jit(partial(run_by_hand, self.body))(x, s)


class Checkpoint(Call):
    def stateful(self, x, slots):
        return jax.checkpoint(partial(run_stateful, self.body, slots))(x)

    def by_hand(self, x, s):
        return jax.checkpoint(partial(run_by_hand, self.body))(x, s)


class Grad(Call):
    def stateful(self, x, slots):
        return jax.grad(partial(run_stateful, self.body, slots))(x)

    def by_hand(self, x, s):
        return jax.grad(lambda x: run_by_hand(self.body, x, s), has_aux=True)(x)


class Jvp(Call):
    def stateful(self, x, slots):
        y, t = jax.jvp(partial(run_stateful, self.body, slots), (x,), (jnp.float32(0.5),))
        return y + t

    def by_hand(self, x, s):
        f = partial(run_by_hand, self.body)
        y, t, s = jax.jvp(lambda x: f(x, s), (x,), (jnp.float32(0.5),), has_aux=True)
        return y + t, s


class CustomJvp(Call):
    """A rule that is not the derivative, so that its loss shows."""

    def stateful(self, x, slots):
        f = jax.custom_jvp(partial(run_stateful, self.body, slots))
        f.defjvp(lambda p, t: (run_stateful(self.body, slots, *p), 3.0 * t[0]))
        return f(x)

    def by_hand(self, x, s):
        touched = {name: s[name] for name in used(self.body)}
        f = jax.custom_jvp(partial(run_by_hand, self.body))

        @f.defjvp
        def rule(primals, tangents):
            y, s = run_by_hand(self.body, *primals)
            return (y, s), (3.0 * tangents[0], jax.tree.map(zero_from_primal, s))

        y, touched = f(x, touched)
        return y, {**s, **touched}


class CustomVjp(Call):
    def stateful(self, x, slots):
        f = jax.custom_vjp(partial(run_stateful, self.body, slots))
        f.defvjp(lambda x: (run_stateful(self.body, slots, x), None), lambda _, g: (3.0 * g,))
        return f(x)

    def by_hand(self, x, s):
        touched = {name: s[name] for name in used(self.body)}
        f = jax.custom_vjp(partial(run_by_hand, self.body))
        f.defvjp(
            lambda x, s: (run_by_hand(self.body, x, s), s),
            lambda s, g: (3.0 * g[0], jax.tree.map(zero_from_primal, s)),
        )
        y, touched = f(x, touched)
        return y, {**s, **touched}


# -- Loops and branches ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scan(Call):
    length: int
    reverse: bool

    def stateful(self, x, slots):
        def step(x, t):
            x = run_stateful(self.body, slots, x + t)
            return x, x

        options = dict(length=self.length, reverse=self.reverse)
        x, ys = lax.scan(step, x, 0.1 * jnp.arange(self.length), **options)
        return x + jnp.sum(ys)

    def by_hand(self, x, s):
        def step(carry, t):
            x, s = carry
            x, s = run_by_hand(self.body, x + t, s)
            return (x, s), x

        options = dict(length=self.length, reverse=self.reverse)
        (x, s), ys = lax.scan(step, (x, s), 0.1 * jnp.arange(self.length), **options)
        return x + jnp.sum(ys), s


@dataclass(frozen=True)
class While(Call):
    """As many turns as ``x`` says, at most three; the condition may draw or write too."""

    condition_draws: bool
    condition_writes: bool

    def uses(self):
        condition = {"key", "count"} if self.condition_draws else set()
        return super().uses() | condition | ({"a"} if self.condition_writes else set())

    def _turns(self, x):
        return jnp.clip(jnp.int32(4 * x), 0, 3)

    def stateful(self, x, slots):
        turns = self._turns(x)

        def go_on(carry):
            i, _ = carry
            more = jnp.float32(0.0)
            if self.condition_draws:
                more = jaxstate.random.uniform()
            if self.condition_writes:
                write(slots["a"], read(slots["a"]) + 1.0)
            return i + more < turns

        def turn(carry):
            i, x = carry
            return i + 1, run_stateful(self.body, slots, x)

        return lax.while_loop(go_on, turn, (jnp.int32(0), x))[1]

    def by_hand(self, x, s):
        turns = self._turns(x)

        def condition(i, s):
            more = jnp.float32(0.0)
            if self.condition_draws:
                more = jax.random.uniform(jax.random.fold_in(s["key"], s["count"]))
                s = {**s, "count": s["count"] + 1}
            if self.condition_writes:
                s = {**s, "a": s["a"] + 1.0}
            return i + more < turns, s

        def turn(carry):
            _, i, x, s = carry
            x, s = run_by_hand(self.body, x, s)
            go_on, s = condition(i + 1, s)
            return go_on, i + 1, x, s

        go_on, s = condition(jnp.int32(0), s)
        _, _, x, s = lax.while_loop(lambda c: c[0], turn, (go_on, jnp.int32(0), x, s))
        return x, s


@dataclass(frozen=True)
class Cond(Statement):
    yes: Program
    no: Program
    at: float

    def inside(self):
        return self.yes, self.no

    def stateful(self, x, slots):
        branches = [partial(run_stateful, p, slots) for p in (self.yes, self.no)]
        return lax.cond(x > self.at, *branches, x)

    def by_hand(self, x, s):
        branches = [partial(run_by_hand, p) for p in (self.yes, self.no)]
        return lax.cond(x > self.at, *branches, x, s)


@dataclass(frozen=True)
class Vmap(Call):
    """Lanes see the state outside, draw their own keys, and have slots of their own to write."""

    lanes: int

    def uses(self):
        return super().uses() - {"a"} | {"b"}

    def stateful(self, x, slots):
        def lane(x):
            own = {"a": new_slot(x), "b": new_slot(read(slots["b"]))}
            y = run_stateful(self.body, own, x)
            return y + read(own["a"]) - read(own["b"])

        return jnp.mean(jax.vmap(lane)(x + 0.2 * jnp.arange(self.lanes)))

    def by_hand(self, x, s):
        streams = {}
        if draws(self.body):
            region = jax.random.fold_in(s["key"], s["count"])
            s = {**s, "count": s["count"] + 1}
            keys = jax.vmap(jax.random.fold_in, (None, 0))(region, jnp.arange(self.lanes))
            streams = {"key": keys, "count": jnp.zeros(self.lanes, jnp.int32)}

        def lane(x, stream):
            y, own = run_by_hand(self.body, x, {**s, **stream, "a": x})
            return y + own["a"] - own["b"]

        return jnp.mean(jax.vmap(lane)(x + 0.2 * jnp.arange(self.lanes), streams)), s


# -- The strategy ----------------------------------------------------------------------------

_names = st.sampled_from(["a", "b"])

_leaves = st.one_of(
    st.builds(Arithmetic, st.sampled_from([0.5, 0.9, 1.3])),
    st.just(Draw()),
    st.just(Draw()),
    st.just(Parameter()),
    st.builds(Read, _names),
    st.builds(Write, _names),
    st.builds(Update, _names),
)


def _bodies(depth: int) -> Any:
    return st.lists(_statements(depth), min_size=1, max_size=2).map(tuple)


def _statements(depth: int) -> Any:
    if depth == 0:
        return _leaves
    body = st.deferred(lambda: _bodies(depth - 1))
    once = [st.builds(kind, body) for kind in (Jit, Checkpoint, Grad, Jvp, CustomJvp, CustomVjp)]
    return st.one_of(
        _leaves,
        *once,
        st.builds(Scan, body, st.integers(0, 3), st.booleans()),
        st.builds(While, body, st.booleans(), st.booleans()),
        st.builds(Cond, body, body, st.sampled_from([-0.2, 0.4])),
        st.builds(Vmap, body, st.integers(1, 3)),
    )


def programs(depth: int = 5) -> Any:
    """Programs nested at most ``depth`` deep."""
    return _bodies(depth)
