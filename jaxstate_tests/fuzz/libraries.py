"""Random libraries that know nothing of jaxstate, and random state in the functions they are given.

A library is a stack of layers. A layer takes a function ``x -> y`` and gives another. It may

* convert the function first: hoist its closure with `jax.closure_convert`, trace it and evaluate
  the jaxpr with `jax.core.eval_jaxpr` or with an interpreter of its own (`CONVERSIONS`);
* run it in loops, branches, derivatives, custom rules with any option, roots, solves (`RUNS`);
* give it what the conversion found as operands of those, or close over it; use what came back.

What is in the function is a body of statements, as in `call_sequences`, and more: arrays that are
written in place, objects that are assigned to, sown values. By hand the same library is plain
Python: the function is ``(x, s) -> (y, s)``, and it is called as often as the library calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.fuzz import call_sequences as cs
from jaxstate_tests.fuzz import statements_and_ways as ways
from jaxstate_tests.fuzz.random_programs import (
    Arithmetic,
    Body,
    Place,
    Read,
    Scope,
    Statement,
    Write,
    run_by_hand,
    run_stateful,
)

Converted = tuple[Callable[..., Any], list[Any]]


# -- Statements ------------------------------------------------------------------------------


@dataclass(frozen=True)
class WriteArray(Statement):
    """Adds to one element and counts in another, or moves all elements on."""

    shift: bool

    def uses(self, at):
        return {"array"}

    def writes(self, at):
        return {"write array"}

    def facts(self, facts):
        return {"array", "writes", "writes shared", "writes v"}

    def stateful(self, x, tools):
        if self.shift:
            tools.array[1:] = tools.array[:-1]
            tools.array[0] = x
        else:
            tools.array[1] += x
            tools.array[2] += 1.0
        return x

    def by_hand(self, x, s, at):
        a, b, c = s["array"]
        return x, {**s, "array": [x, a, b] if self.shift else [a, b + x, c + 1.0]}


@dataclass(frozen=True)
class ReadArray(Statement):
    def uses(self, at):
        return {"array"}

    def facts(self, facts):
        return {"array"}

    def stateful(self, x, tools):
        return x + 0.1 * jnp.sum(tools.array)

    def by_hand(self, x, s, at):
        return x + 0.1 * sum(s["array"]), s


@dataclass(frozen=True)
class Assign(Statement):
    """An attribute of an object."""

    def uses(self, at):
        return {"object"}

    def writes(self, at):
        return {"write object"}

    def facts(self, facts):
        return {"object", "writes", "writes shared", "writes v"}

    def stateful(self, x, tools):
        tools.object["n"] = 0.5 * tools.object["n"] + x
        return x + 0.1 * tools.object["n"]

    def by_hand(self, x, s, at):
        n = 0.5 * s["object"] + x
        return x + 0.1 * n, {**s, "object": n}


@dataclass(frozen=True)
class Sow(Statement):
    """The last value that is marked with the name."""

    def uses(self, at):
        return {"sown"}

    def writes(self, at):
        return {"write sown"}

    def facts(self, facts):
        return {"sown"}

    def stateful(self, x, tools):
        return jaxstate.sow("sown", x, mode="clobber")

    def by_hand(self, x, s, at):
        return x, {**s, "sown": x}


@dataclass(frozen=True)
class Given(Statement):
    """The argument, untouched."""

    def stateful(self, x, tools):
        return x

    def by_hand(self, x, s, at):
        return x, s


# -- What a library does with a function before it runs it ------------------------------------


def unconverted(f, x) -> Converted:
    return f, []


def closure_converted(f, x) -> Converted:
    return jax.closure_convert(f, x)


def traced(f, x) -> Converted:
    closed = jax.make_jaxpr(f)(x)
    return lambda x: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0], []


def hoisted(f, x) -> Converted:
    closed = jax.make_jaxpr(f)(x)
    return lambda x, *consts: jax.core.eval_jaxpr(closed.jaxpr, consts, x)[0], closed.consts


def interpreted(f, x) -> Converted:
    closed = jax.make_jaxpr(f)(x)
    return lambda x, *consts: interpret(closed.jaxpr, consts, x)[0], closed.consts


def jaxpr_function(f, x) -> Converted:
    closed = jax.make_jaxpr(f)(x)
    return lambda x: core.jaxpr_as_fun(closed)(x)[0], []


def partially_evaluated(f, x) -> Converted:
    """The leaves of a pullback, as libraries that save residuals have them."""
    y, back = jax.vjp(f, x)
    leaves, tree = jax.tree.flatten(back)
    ct = jnp.ones_like(y)
    return lambda x, y, *leaves: y + x * jax.tree.unflatten(tree, leaves)(ct)[0], [y, *leaves]


def interpret(jaxpr, consts, *args):
    """One equation after the other; calls are inlined."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in ("jit", "pjit", "closed_call") and inner is not None:
            outs = interpret(inner.jaxpr, inner.consts, *operands)
        else:
            outs = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


CONVERSIONS = {
    "none": unconverted,
    "closure_convert": closure_converted,
    "eval_jaxpr": traced,
    "hoisted": hoisted,
    "interpreter": interpreted,
    "jaxpr_as_fun": jaxpr_function,
}


# -- How a library runs it: ``step(x, *consts) -> y`` ----------------------------------------


def directly(step, x, *consts):
    return step(x, *consts)


def jitted(step, x, *consts):
    return jax.jit(step)(x, *consts)


def checkpointed(step, x, *consts):
    return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_saveable)(x, *consts)


def scanned(step, x, *consts):
    def turn(carry, t):
        x, *consts = carry
        y = step(x + t, *consts)
        return (y, *consts), y

    (x, *_), ys = lax.scan(turn, (x, *consts), jnp.array([0.0, 0.1], jnp.float32))
    return x + jnp.sum(ys)


def repeated(step, x, *consts):
    def turn(_, c):
        return (step(*c), *c[1:])

    return lax.fori_loop(0, 2, turn, (x, *consts))[0]


def looped(step, x, *consts):
    """The condition calls the function too."""

    def go_on(c):
        n, x, *consts = c
        return (step(x, *consts) > -1e9) & (n < 2)

    def turn(c):
        n, x, *consts = c
        return (n + 1, step(x, *consts), *consts)

    return lax.while_loop(go_on, turn, (jnp.int32(0), x, *consts))[1]


def looped_by_hand(f, touched, x, s):
    for _ in range(2):
        _, s = f(x, s)
        x, s = f(x, s)
    _, s = f(x, s)
    return x, s


def chosen(step, x, *consts):
    """The other branch returns what it was given."""
    return lax.cond(x > 0.3, step, lambda x, *consts: x, x, *consts)


def chosen_by_hand(f, touched, x, s):
    return f(x, s) if x > 0.3 else (x, s)


def equal_branches(step, x, *consts):
    return lax.switch(jnp.int32(jnp.floor(3 * x)), [step, step], x, *consts)


def handed_back(step, x, *consts):
    """A jitted function returns the constants beside the result, and they are used once more."""

    @jax.jit
    def run(x, *consts):
        return step(x, *consts), consts

    x, consts = run(x, *consts)
    return step(x, *consts)


def twice_by_hand(f, touched, x, s):
    return f(*f(x, s))


def no_cotangents(consts):
    return [None] * len(consts)


def custom_vjp(step, x, *consts, **options):
    """Everything is an operand."""
    g = jax.custom_vjp(lambda x, *consts: step(x, *consts))

    def forward(x, *consts):
        if options.get("symbolic_zeros"):
            x, consts = x.value, [c.value for c in consts]
        return g(x, *consts), None

    def backward(_, ct):
        ct = jnp.zeros(()) if isinstance(ct, SymbolicZero) else ct
        return (3.0 * ct, *no_cotangents(consts))

    g.defvjp(forward, backward, **options)
    return g(x, *consts)


def custom_vjp_nondiff(step, x, *consts):
    """The function is an argument, as `jax.custom_vjp` has it for solvers."""
    g = jax.custom_vjp(lambda step, x, *consts: step(x, *consts), nondiff_argnums=(0,))
    g.defvjp(
        lambda step, x, *consts: (g(step, x, *consts), None),
        lambda step, _, ct: (3.0 * ct, *no_cotangents(consts)),
    )
    return g(step, x, *consts)


def loop_with_rule(step, x, *consts):
    """As a solver with an adjoint of its own: a while loop inside of the rule."""
    g = jax.custom_vjp(lambda x, *consts: looped(step, x, *consts))
    g.defvjp(
        lambda x, *consts: (g(x, *consts), None),
        lambda _, ct: (3.0 * ct, *no_cotangents(consts)),
    )
    return g(x, *consts)


def loop_with_rule_by_hand(f, touched, x, s):
    return ways.custom_by_hand(lambda x, s: looped_by_hand(f, touched, x, s), touched, x, s)


def custom_jvp(step, x, *consts, **options):
    g = jax.custom_jvp(lambda x, *consts: step(x, *consts))

    def rule(primals, tangents):
        t = tangents[0]
        t = jnp.zeros(()) if isinstance(t, SymbolicZero) else t
        return g(*primals), 3.0 * t

    g.defjvp(rule, **options)
    return g(x, *consts)


def custom_jvp_nondiff(step, x, *consts):
    g = jax.custom_jvp(lambda step, x, *consts: step(x, *consts), nondiff_argnums=(0,))
    g.defjvp(lambda step, primals, tangents: (g(step, *primals), 3.0 * tangents[0]))
    return g(step, x, *consts)


def custom_gradient(step, x, *consts):
    @jax.custom_gradient
    def g(x, *consts):
        return step(x, *consts), lambda ct: (3.0 * ct, *map(jnp.zeros_like, consts))

    return g(x, *consts)


def root(step, x, *consts):
    """Of ``y - x / 2 - f(y) / 10``, by two steps; the derivative is the implicit one."""

    def solve(g, y):
        for _ in range(2):
            y = y - g(y)
        return y

    def g(y):
        return y - 0.5 * x - 0.1 * step(y, *consts)

    return lax.custom_root(g, x, solve, lambda g, y: y / g(jnp.float32(1.0)))


def root_by_hand(f, touched, x, s):
    """The derivative by one step of Newton's method at the solution, with the state at entry."""
    y, after = x, s
    for _ in range(2):
        fy, after = f(y, after)
        y = 0.5 * x + 0.1 * fy
    y = lax.stop_gradient(y)

    def g(y):
        return y - 0.5 * x - 0.1 * f(y, s)[0]

    gy, slope = jax.value_and_grad(g)(y)
    y = y - (gy - lax.stop_gradient(gy)) / lax.stop_gradient(slope)
    return y, ways.without_derivatives(after, touched)


def linear_solve(step, x, *consts):
    def operator(v):
        c = step(jnp.float32(0.5), *consts)
        return (2.0 + c**2) * v

    def solve(operator, b):
        return b / operator(jnp.ones_like(b))

    return lax.custom_linear_solve(operator, x, solve, symmetric=True)


def linear_solve_by_hand(f, touched, x, s):
    c, after = f(jnp.float32(0.5), s)
    return x / (2.0 + c**2), ways.without_derivatives(after, touched)


def value_and_grad(step, x, *consts):
    y, dx = jax.value_and_grad(step)(x, *consts)
    return y + 0.5 * dx


def pulled_back(step, x, *consts):
    """By the leaves of the pullback, handed through a jitted function."""
    y, back = jax.vjp(lambda x: step(x, *consts), x)
    leaves, tree = jax.tree.flatten(back)
    pull = jax.jit(lambda ct, leaves: jax.tree.unflatten(tree, leaves)(ct)[0])
    return y + 0.5 * pull(jnp.ones_like(y), leaves)


def linearized(step, x, *consts):
    y, along = jax.linearize(lambda x: step(x, *consts), x)
    converted, hoisted = jax.closure_convert(along, x)
    return y + 0.5 * converted(jnp.ones_like(x), *hoisted)


def in_lanes(step, x, *consts):
    xs = x + 0.2 * jnp.arange(ways.LANES, dtype=jnp.float32)
    return jnp.mean(jax.vmap(step, (0, *(None for _ in consts)))(xs, *consts))


@dataclass(frozen=True)
class Run:
    stateful: Callable[..., Any]
    by_hand: Callable[..., tuple[Any, Any]]
    not_with: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()


DIVERGES = frozenset({"diverges"})
RULE = frozenset({"rule"})
VJP = frozenset({"rule", "custom_vjp"})
# What JAX refuses to differentiate twice (``optimize_remat``), or differentiates then as if it had
# no rule (`jax.custom_gradient`), or whose second derivative by hand is not that of the first one
# (a root that is not exact).
FIRST_ORDER = frozenset({"first order"})
DERIVATIVE = ways.REVERSE | FIRST_ORDER


def with_options(run, **options):
    return lambda step, x, *consts: run(step, x, *consts, **options)


RUNS = {
    "direct": Run(directly, ways.directly),
    "jit": Run(jitted, ways.directly),
    "checkpoint": Run(checkpointed, ways.directly),
    "scan": Run(scanned, ways.scan_by_hand),
    "fori": Run(repeated, ways.fori_by_hand),
    "while": Run(looped, looped_by_hand, makes=frozenset({"while", "diverges", "unsown"})),
    "cond": Run(chosen, chosen_by_hand, frozenset({"sown"}), DIVERGES),
    "switch": Run(equal_branches, ways.directly, makes=DIVERGES),
    "handed back": Run(handed_back, twice_by_hand),
    "custom_vjp": Run(custom_vjp, ways.custom_by_hand, makes=VJP),
    "custom_vjp, optimize_remat": Run(
        with_options(custom_vjp, optimize_remat=True),
        ways.custom_by_hand,
        makes=VJP | FIRST_ORDER,
    ),
    "custom_vjp, symbolic_zeros": Run(
        with_options(custom_vjp, symbolic_zeros=True), ways.custom_by_hand, makes=VJP
    ),
    "custom_vjp, nondiff_argnums": Run(custom_vjp_nondiff, ways.custom_by_hand, makes=VJP),
    "while in custom_vjp": Run(
        loop_with_rule, loop_with_rule_by_hand, makes=VJP | DIVERGES | {"while in lanes"}
    ),
    "custom_jvp": Run(custom_jvp, ways.custom_by_hand, makes=RULE),
    "custom_jvp, symbolic_zeros": Run(
        with_options(custom_jvp, symbolic_zeros=True), ways.custom_by_hand, makes=RULE
    ),
    "custom_jvp, nondiff_argnums": Run(custom_jvp_nondiff, ways.custom_by_hand, makes=RULE),
    "custom_gradient": Run(custom_gradient, ways.custom_by_hand, makes=VJP | FIRST_ORDER),
    "custom_root": Run(
        root, root_by_hand, ways.REVERSE | ways.FORWARD | {"rule", "sown"}, RULE | FIRST_ORDER
    ),
    "custom_linear_solve": Run(
        linear_solve, linear_solve_by_hand, ways.REVERSE | ways.FORWARD | {"rule", "sown"}, RULE
    ),
    "grad": Run(value_and_grad, ways.grad_by_hand, DERIVATIVE),
    "vjp": Run(pulled_back, ways.grad_by_hand, DERIVATIVE),
    "linearize": Run(linearized, ways.grad_by_hand, DERIVATIVE | ways.FORWARD),
    "vmap": Run(in_lanes, ways.vmap_by_hand, ways.IN_LANES | {"sown"}),
}


@dataclass(frozen=True)
class Layer:
    convert: str
    run: str
    closed: bool  # over the constants, instead of handing them on as operands

    def stateful(self, f):
        def g(x):
            h, consts = CONVERSIONS[self.convert](f, x)
            if self.closed and consts:

                def closed_over(x):
                    return h(x, *consts)

                return RUNS[self.run].stateful(closed_over, x)
            return RUNS[self.run].stateful(h, x, *consts)

        return g

    def by_hand(self, f, touched):
        return lambda x, s: RUNS[self.run].by_hand(f, touched, x, s)


@dataclass(frozen=True)
class Library(Statement):
    """A function given to a library, the innermost layer first."""

    layers: tuple[Layer, ...]
    body: Body

    def inside(self):
        return (self.body,)

    def writes(self, at):
        return ways.written(self.body, at)

    def facts(self, facts):
        found = set().union(*(ways.facts_of(s, facts) for s in self.body))
        for layer in self.layers:
            found |= RUNS[layer.run].makes | {layer.run, layer.convert}
            if layer.convert in ("eval_jaxpr", "jaxpr_as_fun") or layer.closed:
                found |= {"closes over"}
            if layer.convert in ("hoisted", "interpreter", "closure_convert") and not layer.closed:
                found |= {"hoists"}
        return found

    def stateful(self, x, tools):
        def f(x):
            return run_stateful(self.body, tools, x)

        for layer in self.layers:
            f = layer.stateful(f)
        return f(x)

    def by_hand(self, x, s, at):
        def f(x, s):
            return run_by_hand(self.body, at, x, s)

        for layer in self.layers:
            f = layer.by_hand(f, self.uses(at) | self.writes(at))
        return f(x, s)


# -- Programs --------------------------------------------------------------------------------


INITIAL_OBJECT = np.float32(0.1)


def beside(run):
    return lambda tree, x: (run(tree, x), tree)


@dataclass
class Tools:
    slots: dict[str, Any]
    array: Any = None
    object: Any = None


@dataclass(frozen=True)
class Program:
    """``inplace``: the array is one of an in-place function, else one of `jaxstate.array`."""

    body: Body
    inplace: bool

    @property
    def facts(self):
        found = set().union(*(ways.facts_of(s, []) for s in self.body))
        return found | {"inplace"} if self.inplace else found

    @property
    def place(self):
        return Place("", (), {})

    @property
    def uses(self):
        return set().union(*(s.uses(self.place) for s in self.body))

    @property
    def entries(self):
        return sorted(n for n in self.uses if n.split(" ")[0] in ("param", "variable"))

    def stateful(self, x, entries):
        """What the program gives, and all state after it."""
        slots = {name: new_slot(jnp.float32(v)) for name, v in ways.SLOTS.items()}
        net = jaxstate.parametrized(lambda x: self.run(x, slots), name="net")
        params, state = cs.nested(entries, "param"), cs.nested(entries, "variable")
        with cs.open_streams(cs.stream_keys(0)) as streams:
            (y, after), state = net.apply_with_state(params, state, x)
            after |= {f"count {name}": stream.count for name, stream in streams.items()}
        after |= {f"slot {name}": read(slot) for name, slot in slots.items()}
        return y, after | cs.flat(state, "variable")

    def init(self, x):
        slots = {name: new_slot(jnp.float32(v)) for name, v in ways.SLOTS.items()}
        net = jaxstate.parametrized(lambda x: self.run(x, slots), name="net")
        with cs.open_streams(cs.stream_keys(0)):
            params, state = net.init_with_state(jax.random.key(11), x)
        return cs.flat(params, "param") | cs.flat(state, "variable")

    def run(self, x, slots):
        uses = self.uses

        def run(tree, x):
            tools = Tools(slots, object=tree)
            if "array" in uses:
                array = jnp.zeros(3, jnp.float32)
                tools.array = array if self.inplace else jaxstate.array(array)
            y = run_stateful(self.body, tools, x)
            # An element is a view, and this a value.
            return y, {"array": [tools.array[i] + 0.0 for i in range(3)]} if "array" in uses else {}

        run = jaxstate.mutate(run) if "object" in uses else beside(run)
        run = jaxstate.reap(jaxstate.inplace(run) if self.inplace else run)
        ((result, tree), sown) = run({"n": INITIAL_OBJECT}, x)
        y, after = result
        return y, after | sown | ({"object": tree["n"]} if "object" in uses else {})

    def by_hand(self, x, entries):
        s = {f"slot {name}": jnp.float32(v) for name, v in ways.SLOTS.items()}
        s |= cs.streams_by_hand(cs.stream_keys(0)) | entries
        s |= {"array": [jnp.float32(0.0)] * 3, "object": jnp.asarray(INITIAL_OBJECT)}
        y, after = run_by_hand(self.body, self.place, x, s)
        hidden = {"key", "param"} | ({"array", "object"} - self.uses)
        return y, {n: v for n, v in after.items() if n.split(" ")[0] not in hidden}


# -- The strategy ----------------------------------------------------------------------------

_hows = st.sampled_from(["set", "add", "scale"])
_leaves = st.one_of(
    st.builds(Arithmetic, st.sampled_from([0.5, 1.3])),
    st.builds(ways.Draw, st.sampled_from(ways.STREAMS)),
    st.builds(ways.Parameter, st.sampled_from(["w", "u"])),
    st.builds(ways.OnlyParameter, st.sampled_from(["w", "u"])),
    st.builds(Read, st.sampled_from(["a", "b"])),
    st.builds(Write, st.sampled_from(["a", "b"]), _hows),
    st.builds(ways.ReadVariable, st.sampled_from(["v", "r"])),
    st.builds(ways.WriteVariable, st.sampled_from(["v", "r"]), _hows),
    st.builds(WriteArray, st.booleans()),
    st.builds(ReadArray),
    st.builds(Assign),
    st.builds(Sow),
    st.builds(Given),
)


@st.composite
def _libraries(draw: Any, depth: int) -> Library:
    body = tuple(draw(_statements(depth - 1)) for _ in range(draw(st.integers(1, 3))))
    facts = set().union(*(ways.facts_of(s, []) for s in body))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        runs = [name for name, run in RUNS.items() if not ways.refused(run.not_with, facts)]
        run = draw(st.sampled_from(runs))
        layers.append(Layer(draw(st.sampled_from(sorted(CONVERSIONS))), run, draw(st.booleans())))
        facts |= RUNS[run].makes
    return Library(tuple(layers), body)


@st.composite
def _statements(draw: Any, depth: int) -> Any:
    kind = draw(st.integers(0, 3))
    if kind == 0 and depth:
        return draw(_libraries(depth))
    if kind == 1:
        return Scope((draw(_leaves),), draw(st.sampled_from(["s", "t"])))
    return draw(_leaves)


@st.composite
def programs(draw: Any) -> Program:
    body = [draw(_libraries(2))]
    if draw(st.booleans()):
        body.append(draw(_statements(1)))
    return Program(tuple(body), draw(st.booleans()))
