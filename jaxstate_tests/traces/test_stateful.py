"""Traces with state: every operation comes to them, wherever it is, once for each time it runs."""

import collections

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import StatefulTrace, current_trace, new_slot, new_trace, read, write

# -- Traces ----------------------------------------------------------------------------------


class Idle(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        return super().process_primitive(primitive, args, params)


class CountOps(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        self.state["ops"] += 1
        return super().process_primitive(primitive, args, params)


class SumSines(StatefulTrace):
    """Adds up what the sine is taken of."""

    def process_primitive(self, primitive, args, params):
        if primitive.name == "sin":
            self.state = self.state + jnp.sum(args[0])
        return super().process_primitive(primitive, args, params)


class Negate(StatefulTrace):
    """Stateless: sin becomes its negative."""

    def process_primitive(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        return -out if primitive.name == "sin" else out


def counted(f, *args):
    with new_trace(CountOps, state={"ops": jnp.int32(0)}) as trace:
        out = f(*args)
    return int(trace.state["ops"]), out


# -- An independent count: a jaxpr run step by step, its loops and branches in Python ---------


class Reference:
    def __init__(self):
        self.ops = 0

    def count(self, f, *args):
        """The operations of ``f`` as it runs on ``args``, which are arrays."""
        self.run(jax.make_jaxpr(f)(*args), args)
        return self.ops

    def run(self, jaxpr, args):
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        values = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
        values |= dict(zip(inner.invars, args, strict=True))

        def read(v):
            return v.val if isinstance(v, jax.extend.core.Literal) else values[v]

        for eqn in inner.eqns:
            outs = self.step(eqn, [read(v) for v in eqn.invars])
            values |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in inner.outvars]

    def step(self, eqn, args):
        p = eqn.params
        match eqn.primitive.name:
            case "jit" | "pjit" | "closed_call" | "checkpoint" | "remat" | "remat2":
                return self.run(p["jaxpr"], args)
            case "custom_jvp_call" | "custom_vjp_call":
                return self.run(p["call_jaxpr"], args)
            case "custom_vmap_call":
                return self.run(p["call"], args)
            case "cond":
                return self.run(p["branches"][int(args[0])], args[1:])
            case "while":
                n, m = p["cond_nconsts"], p["body_nconsts"]
                cond, body, carry = args[:n], args[n : n + m], args[n + m :]
                while self.run(p["cond_jaxpr"], [*cond, *carry])[0]:
                    carry = self.run(p["body_jaxpr"], [*body, *carry])
                return carry
            case "scan":
                return self.scan(p, args, [v.aval for v in eqn.outvars])
        self.ops += 1
        out = eqn.primitive.bind(*args, **p)
        return out if eqn.primitive.multiple_results else [out]

    def scan(self, p, args, avals):
        if "num_consts" in p:
            n, m = p["num_consts"], p["num_carry"]
        else:
            consts, carry, _ = p["ft_in"].unpack()
            n, m = len(consts), len(carry)
        consts, carry, xs = args[:n], args[n : n + m], args[n + m :]
        rows = []
        order = 1 - 2 * p["reverse"]
        for t in range(p["length"])[::order]:
            outs = self.run(p["jaxpr"], [*consts, *carry, *(x[t] for x in xs)])
            carry, row = outs[:m], outs[m:]
            rows.append(row)
        if not rows:
            return [*carry, *(jnp.zeros(a.shape, a.dtype) for a in avals[m:])]
        return [*carry, *(jnp.stack(ys) for ys in zip(*rows[::order], strict=True))]


def with_rule():
    sine = jax.custom_jvp(lambda x: jnp.sin(x))
    sine.defjvp(lambda p, t: (jnp.sin(p[0]), 3.0 * t[0]))
    return sine


# -- Programs --------------------------------------------------------------------------------


def step(x):
    return jnp.sin(x) * 2.0


@jax.custom_jvp
def cube(x):
    return x * x * x


@cube.defjvp
def _cube_jvp(primals, tangents):
    return cube(primals[0]), 5.0 * tangents[0]  # wrong on purpose: whoever drops the rule shows


@jax.custom_vjp
def twice(x):
    return x + x


twice.defvjp(lambda x: (x + x, None), lambda _, g: (7.0 * g,))


def loop_of_branches(x):
    def body(c, t):
        return jax.lax.cond(c.sum() > 0, lambda c: jnp.cos(c) * t - 1.0, lambda c: c + t, c), c

    return jax.lax.scan(body, x, jnp.arange(1.0, 6.0))


PROGRAMS = {
    "jit": jax.jit(step),
    "jit in jit": jax.jit(lambda x: jax.jit(step)(x) + 1.0),
    "scan": lambda x: jax.lax.scan(lambda c, t: (step(c) * t, c), x, jnp.arange(3.0)),
    "reverse": lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, None, 3, reverse=True),
    "zero steps": lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, None, 0),
    "fori": lambda x: jax.lax.fori_loop(0, 4, lambda i, c: step(c) + i, x),
    "while": lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 50.0, lambda c: c * 2.0 + 1.0, x),
    "cond": lambda x: jax.lax.cond(x[0] > 0, lambda x: step(step(x)), lambda x: x, x),
    "switch": lambda x: jax.lax.switch(jnp.int32(1), [jnp.sin, step, jnp.cos], x),
    "checkpoint": jax.checkpoint(step),
    "custom_jvp": cube,
    "custom_vjp": twice,
    "relu": jax.nn.relu,
    "where": lambda x: jnp.where(x > 0, x, step(x)),
    "vmap": jax.vmap(step),
    "branches in a loop": loop_of_branches,
    "jit of a loop of branches": jax.jit(loop_of_branches),
    "sort": lambda x: jnp.sort(x)[::-1],
    "associative_scan": lambda x: jax.lax.associative_scan(jnp.add, x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_counts_the_operations_that_run(name):
    x = jnp.array([0.3, -0.2, 0.9])
    f = PROGRAMS[name]
    wanted = Reference().count(f, x)
    # Eagerly a function is whatever JAX makes of it: compare programs, that is jitted functions.
    n, out = counted(jax.jit(f), x)
    assert n == wanted
    jax.tree.map(np.testing.assert_allclose, out, f(x))


@pytest.mark.parametrize("name", ["scan", "while", "checkpoint", "custom_jvp", "custom_vjp"])
def test_counts_what_a_derivative_runs(name):
    x = jnp.array([0.3, -0.2, 0.9])
    f = jax.jit(jax.jacfwd(PROGRAMS[name]) if name == "while" else total_gradient(PROGRAMS[name]))
    wanted = Reference().count(f, x)
    n, out = counted(f, x)
    assert n == wanted
    jax.tree.map(np.testing.assert_allclose, out, f(x))


def total_gradient(f):
    return jax.grad(lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(x))))


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_idle_trace_changes_nothing(name):
    x = jnp.array([0.3, -0.2, 0.9])
    f = PROGRAMS[name]

    def watched(x):
        with new_trace(Idle, state={"unused": np.zeros(3)}):
            return f(x)

    found, wanted = jax.make_jaxpr(watched)(x), jax.make_jaxpr(f)(x)
    assert without_addresses(found) == without_addresses(wanted)
    jax.tree.map(np.testing.assert_array_equal, watched(x), f(x))
    if name != "while":
        wanted = total_gradient(f)(x)
        np.testing.assert_array_equal(total_gradient(watched)(x), wanted)
        with new_trace(Idle):
            np.testing.assert_array_equal(total_gradient(f)(x), wanted)


def without_addresses(jaxpr):
    """The text of a jaxpr, without the functions of custom rules, which print where they live."""
    lines = str(jaxpr).splitlines()
    return [line for line in lines if "<" not in line and "name=" not in line]


# -- What authors override ---------------------------------------------------------------------


class AlsoCounts:
    """Of no trace class: for traces to inherit from."""

    def process_primitive(self, primitive, args, params):
        self.state["ops"] += 1
        return super().process_primitive(primitive, args, params)


class CountsByInheritance(AlsoCounts, Idle):
    pass


class CountCalls(StatefulTrace):
    """Looks at nothing but what is made of other operations."""

    def process_higher_order(self, primitive, args, params):
        self.state["ops"] += 1
        return super().process_higher_order(primitive, args, params)


class CountRules(StatefulTrace):
    def process_custom_jvp_call(self, *args, **params):
        self.state["ops"] += 1
        return super().process_custom_jvp_call(*args, **params)

    def process_custom_vjp_call(self, *args, **params):
        self.state["ops"] += 1
        return super().process_custom_vjp_call(*args, **params)


@pytest.mark.parametrize("jit", [False, True])
def test_any_method_may_be_overridden_alone_and_in_any_class(jit):
    def f(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: cube(twice(step(x))), x)

    f = jax.jit(f) if jit else f
    ops = Reference().count(f, 0.1)
    for cls, wanted in [(CountsByInheritance, ops), (CountCalls, 1 + jit), (CountRules, 6)]:
        with new_trace(cls, state={"ops": jnp.int32(0)}) as trace:
            found = f(0.1)
        np.testing.assert_allclose(found, f(0.1), rtol=1e-6)
        assert trace.state["ops"] == wanted


@pytest.mark.parametrize("jit", [False, True])
def test_an_attribute_that_would_be_lost_is_an_error(jit):
    class Counter(StatefulTrace):
        def __init__(self):
            super().__init__()
            self.ops, self.names = 0, []

        def process_primitive(self, primitive, args, params):
            self.names.append(primitive.name)
            if primitive.name == "sin":
                self.ops += 1
            return super().process_primitive(primitive, args, params)

    f = jax.jit(jnp.sin) if jit else lambda x: with_rule()(x)
    with jax.checking_leaks.func(False), new_trace(Counter) as trace:
        jax.lax.sin(1.0)
        assert trace.ops == 1
        with pytest.raises(jaxstate.TraceStateError, match=r"Counter\.ops"):
            f(1.0)
        assert trace.ops == 1 and trace.names == ["sin", "sin"]


class Options:
    factor = 2.0


class Scale(StatefulTrace, Options):
    """A sine is ``factor`` times itself."""

    def process_primitive(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        return out * self.factor if primitive.name == "sin" else out


class ScaleToo(Scale):
    pass


@pytest.mark.parametrize("owner", ["trace", ScaleToo, Scale, Options])
def test_an_attribute_that_is_assigned_between_calls_counts(owner, monkeypatch):
    """Of the trace, of its class, and of the classes above that."""

    @jax.jit
    def f(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.jit(jnp.sin)(x), x)

    def wanted(x, factor):
        for _ in range(3):
            x = np.sin(x) * factor
        return x

    with new_trace(ScaleToo) as trace:
        for factor in (2.0, 3.0, 3.0, 4.0):
            if factor != trace.factor:
                target = trace if owner == "trace" else owner
                monkeypatch.setattr(target, "factor", factor, raising=False)
            np.testing.assert_allclose(f(0.5), wanted(0.5, factor), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_a_loop_whose_lanes_end_at_different_times(jit):
    """The loop runs as often as its slowest lane. It steps on with the lanes that go on."""

    class CountDoublings(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            self.state = self.state + int(primitive.name == "mul")
            return super().process_primitive(primitive, args, params)

    def doubled(x, limit):
        return jax.lax.while_loop(
            lambda c: c[0] < limit, lambda c: (c[0] * 2.0, c[1] + limit), (x, jnp.zeros(2))
        )

    f = jax.vmap(doubled)
    f = jax.jit(f) if jit else f
    with new_trace(CountDoublings, state=jnp.int32(0)) as trace:
        x, sums = f(jnp.array([1.0, 4.0, 9.0]), jnp.array([8.0, 100.0, 1.0]))
    assert trace.state == 5
    np.testing.assert_array_equal(x, [8.0, 128.0, 9.0])
    np.testing.assert_array_equal(sums, [[24.0, 24.0], [500.0, 500.0], [0.0, 0.0]])


def test_a_trace_may_close_over_arrays_anywhere():
    """In JAX >= 0.11 the jaxpr of a checkpoint may not."""
    table = np.arange(3.0, dtype=np.float32)

    class Add(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            self.state = self.state + table
            return super().process_primitive(primitive, args, params)

    def body(x, _):
        return jax.checkpoint(step)(x), None

    programs = [
        jax.checkpoint(step),
        jax.jit(step),
        lambda x: jax.lax.scan(body, x, length=2)[0],
        lambda x: jax.lax.cond(x > 0, jax.checkpoint(step), step, x),
    ]
    for f in [*programs, *map(jax.grad, programs)]:
        f = jax.jit(f)
        with new_trace(Add, state=jnp.zeros(3)) as trace:
            out = [f(0.3), f(0.3)]
        np.testing.assert_allclose(out, [f(0.3), f(0.3)], rtol=1e-6)
        np.testing.assert_array_equal(trace.state, 2 * Reference().count(f, 0.3) * table)


# -- State through transformations, against hand-threaded JAX ---------------------------------


def sum_of_sines(x):
    """What `SumSines` makes of four steps, by hand."""

    def body(carry, _):
        x, total = carry
        return (step(x), total + jnp.sum(x)), None

    return jax.lax.scan(body, (x, jnp.float32(0.0)), None, length=4)[0]


@jax.jit
def four_steps(x):
    return jax.lax.fori_loop(0, 4, lambda i, x: step(x), x)


def watched_steps(x):
    with new_trace(SumSines, state=jnp.float32(0.0)) as trace:
        out = four_steps(x)
    return out, trace.state


TRANSFORMS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "jit of jacrev": lambda f: jax.jit(jax.jacrev(f)),
    "hessian": jax.hessian,
    "vmap": lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (c, f(x + c)), x, None, length=2),
    "checkpoint": lambda f: jax.jacrev(jax.checkpoint(f)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_trace_inside_a_transformation(transform):
    x = jnp.array([0.3, -0.2])
    transformed = TRANSFORMS[transform]
    found, wanted = transformed(watched_steps)(x), transformed(sum_of_sines)(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def test_custom_rules_are_kept():
    def f(x):
        with new_trace(CountOps, state={"ops": jnp.int32(0)}):
            return cube(x) + twice(x)

    assert jax.grad(f)(2.0) == 5.0 + 7.0
    assert jax.grad(jax.jit(f))(2.0) == 5.0 + 7.0
    with new_trace(CountOps, state={"ops": jnp.int32(0)}):
        assert jax.grad(jax.jit(lambda x: cube(x) + twice(x)))(2.0) == 5.0 + 7.0


def test_state_goes_through_custom_rules_with_tangents_refused_and_values_kept():
    def f(x):
        with new_trace(SumSines, state=jnp.float32(0.0)) as trace:
            sine = with_rule()
            y = jax.jit(sine)(x) + sine(2.0)
        return y, trace.state

    assert jax.jit(f)(1.0)[1] == 3.0
    assert f(1.0)[1] == 3.0
    assert jax.grad(lambda x: f(x)[0])(1.0) == 3.0


@pytest.mark.parametrize("order", [1, -1])
def test_traces_nest_each_with_its_own_state(order):
    traces = [(SumSines, jnp.float32(0.0)), (CountOps, {"ops": jnp.int32(0)})][::order]

    def f(x):
        with new_trace(traces[0][0], state=traces[0][1]) as a:
            with new_trace(traces[1][0], state=traces[1][1]) as b:
                y = four_steps(x)
        found = {type(t): t.state for t in (a, b)}
        return y, found[SumSines], found[CountOps]["ops"]

    x = jnp.array([0.3, -0.2])
    y, total = sum_of_sines(x)
    ops = Reference().count(four_steps, x)
    for run in (f, jax.jit(f)):
        out, found, n = run(x)
        np.testing.assert_allclose(out, y, rtol=1e-6)
        np.testing.assert_allclose(found, total, rtol=1e-6)
        # What the inner trace computes is part of the program that the outer one sees.
        extra = 4 * 2 if traces[0][0] is CountOps else 0
        assert n == ops + extra


def test_a_trace_may_change_what_an_operation_does():
    def f(x):
        with new_trace(Negate):
            return jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: step(x), x))(x)

    def by_hand(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: -jnp.sin(x) * 2.0, x)

    np.testing.assert_allclose(f(0.3), by_hand(0.3))
    np.testing.assert_allclose(jax.grad(f)(0.3), jax.grad(by_hand)(0.3))


def test_what_a_trace_closes_over_may_be_a_tracer():
    class Scale(StatefulTrace):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def process_primitive(self, primitive, args, params):
            out = super().process_primitive(primitive, args, params)
            return out * self.factor if primitive.name == "sin" else out

    def f(x, factor):
        with new_trace(Scale, factor):
            return jax.checkpoint(four_steps)(x) + jax.lax.cond(x > 0, jnp.sin, jnp.cos, x)

    def by_hand(x, factor):
        y = jax.lax.fori_loop(0, 4, lambda i, x: jnp.sin(x) * factor * 2.0, x)
        return y + jax.lax.cond(x > 0, lambda x: factor * jnp.sin(x), jnp.cos, x)

    for run in (lambda f: f, jax.jit, lambda f: jax.grad(f, (0, 1)),
                lambda f: jax.jit(jax.grad(f, (0, 1)))):  # fmt: skip
        found, wanted = run(f)(0.3, 1.5), run(by_hand)(0.3, 1.5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


# -- The structure of the state ---------------------------------------------------------------


class Record(StatefulTrace):
    """Keeps every sine, by number: a structure that grows; and their names, which are static."""

    def process_primitive(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        if primitive.name == "sin":
            self.state[f"sin{len(self.state) - 1}"] = out
            self.state["names"] = (*self.state["names"], primitive.name)
        return out


def test_the_structure_may_change_across_jit():
    def f(x):
        x = jnp.sin(x)
        return jax.jit(lambda x: jnp.sin(jax.jit(jax.checkpoint(jnp.sin))(x)))(x)

    def recorded(x):
        with new_trace(Record, state={"names": ()}) as trace:
            f(x)
        assert trace.state.pop("names") == ("sin",) * 3
        return trace.state

    def by_hand(x):
        return {
            "sin0": jnp.sin(x),
            "sin1": jnp.sin(jnp.sin(x)),
            "sin2": jnp.sin(jnp.sin(jnp.sin(x))),
        }

    for run in (lambda f: f, jax.jit, jax.jacrev, jax.jacfwd):
        found, wanted = run(recorded)(0.7), run(by_hand)(0.7)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.sin(x), x),
        lambda x: jax.lax.while_loop(lambda x: jnp.sin(x) > 0.5, lambda x: x, x),
        lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x),
        lambda x: with_rule()(x),
    ],
    ids=["fori", "while", "cond", "custom_jvp"],
)
@pytest.mark.parametrize("jit", [False, True])
def test_the_structure_may_not_change_across_a_loop_or_a_branch(f, jit):
    f = jax.jit(f) if jit else f
    with jax.checking_leaks.func(False):
        with new_trace(Record, state={"names": ()}) as trace:
            y = jnp.sin(0.5)
            with pytest.raises(jaxstate.TraceStateError, match="Record"):
                f(y)
            assert list(trace.state) == ["names", "sin0"]
            jnp.sin(y)  # the next operation is as if nothing had happened
    np.testing.assert_allclose(trace.state["sin1"], np.sin(np.sin(0.5)), rtol=1e-6)


def test_a_type_may_change_across_jit_and_not_across_a_loop():
    class Last(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            if primitive.name == "sin":
                self.state = args[0]
            return super().process_primitive(primitive, args, params)

    with new_trace(Last, state=jnp.zeros(3)) as trace:
        jax.jit(lambda x: jnp.sin(jnp.sin(x)))(jnp.ones((2, 2)))
        np.testing.assert_allclose(trace.state, np.sin(np.ones((2, 2))), rtol=1e-6)
        with jax.checking_leaks.func(False), pytest.raises(jaxstate.TraceStateError, match="scan"):
            jax.lax.scan(lambda c, _: (jnp.sin(c), None), jnp.ones(5), None, length=2)
    assert trace.state.shape == (2, 2)


def test_a_loop_returns_what_it_returned():
    class Half(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            out = super().process_primitive(primitive, args, params)
            return out.astype(jnp.float16) if primitive.name == "sin" else out

    with jax.checking_leaks.func(False), new_trace(Half):
        assert jax.jit(jnp.sin)(jnp.float32(1.0)).dtype == jnp.float16
        with pytest.raises(jaxstate.TraceStateError, match="scan"):
            jax.lax.scan(lambda c, _: (jnp.sin(c), None), jnp.float32(1.0), None, length=2)


def test_a_static_part_has_to_be_hashable():
    with pytest.raises(TypeError, match="hash"), new_trace(Idle, state={"a": {1, 2}}):
        pass
    assert current_trace() is None


# -- Where the trace and its state are --------------------------------------------------------


def test_the_state_is_not_at_hand_in_a_function_being_traced():
    with jax.checking_leaks.func(False):
        with new_trace(CountOps, state={"ops": jnp.int32(0)}) as trace:
            for transform in (jax.jit, jax.vmap, jax.grad):
                with pytest.raises(jaxstate.TraceStateError, match="CountOps"):
                    transform(lambda x: x * trace.state["ops"])(jnp.ones(3))
                with pytest.raises(jaxstate.TraceStateError, match="CountOps"):
                    transform(lambda x: setattr(trace, "state", x))(jnp.ones(3))
            assert trace.state["ops"] >= 0


def test_current_trace_is_the_innermost_of_its_class():
    assert current_trace() is None
    with new_trace(CountOps, state={"ops": jnp.int32(0)}) as outer:
        with new_trace(Idle) as inner:
            assert current_trace() is inner
            assert current_trace(CountOps) is outer
            assert current_trace(SumSines) is None
            jax.jit(lambda: jnp.float32(current_trace(CountOps) is outer))()
        assert current_trace() is outer
    assert current_trace() is None


def test_an_error_inside_leaves_no_trace():
    with pytest.raises(ZeroDivisionError), new_trace(Idle):
        raise ZeroDivisionError
    assert current_trace() is None
    assert jax.jit(step)(0.0) == 0.0


def test_a_state_put_back_after_an_error_is_what_counts():
    class Picky(CountOps):
        def process_primitive(self, primitive, args, params):
            if primitive.name == "cos":
                raise ZeroDivisionError
            return super().process_primitive(primitive, args, params)

    one = jnp.float32(1.0)
    f = jax.jit(step)
    with jax.checking_leaks.func(False):
        with new_trace(Picky, state={"ops": jnp.int32(0)}) as trace:
            f(one)
            before = dict(trace.state)
            jax.lax.sin(one)
            with pytest.raises(ZeroDivisionError):
                jax.jit(jnp.cos)(one)
            trace.state = before
            f(one)
    assert trace.state["ops"] == 2 * Reference().count(f, one)


def test_new_trace_wants_a_class_of_traces():
    with pytest.raises(TypeError, match="StatefulTrace"), new_trace(dict):
        pass


def test_the_given_state_is_not_changed():
    state = {"ops": jnp.int32(0)}
    with new_trace(CountOps, state=state) as trace:
        jnp.sin(1.0)
    assert state["ops"] == 0 and trace.state["ops"] > 0


def test_a_jitted_function_is_traced_and_compiled_once_per_trace():
    calls = collections.Counter()

    class Watch(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            calls[primitive.name] += 1
            self.state = self.state + 1
            return super().process_primitive(primitive, args, params)

    f, one = jax.jit(step), jnp.float32(1.0)
    with new_trace(Watch, state=jnp.int32(0)) as trace:
        for _ in range(5):
            f(one)
    assert calls["sin"] == 1
    assert trace.state == 5 * Reference().count(f, one)


# -- Beside other state -----------------------------------------------------------------------


def test_streams_slots_and_parameters_under_a_trace():
    """Each in its place: opened outside of the trace, inside of it, and inside its jaxprs."""
    slot = new_slot(jnp.float32(0.0))

    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", jax.nn.initializers.normal(1.0), ())

        def body(i, x):
            write(slot, read(slot) + w)
            return jnp.sin(x * w) + jaxstate.random.normal()

        return jax.jit(lambda x: jax.lax.fori_loop(0, 3, body, x))(x)

    key = jax.random.key(1)
    params = net.init(key, 0.5)

    def by_hand(w, x):
        total, slot = 0.0, 0.0
        for i in range(3):
            slot += w
            total += x * w
            x = jnp.sin(x * w) + jax.random.normal(jax.random.fold_in(key, i))
        return x, total, slot

    def outside(w, x):
        write(slot, 0.0)
        with jaxstate.rng_stream(key), new_trace(SumSines, state=jnp.float32(0.0)) as trace:
            y = net.apply({"w": w}, x)
        return y, trace.state, read(slot)

    def inside(w, x):
        write(slot, 0.0)
        with new_trace(SumSines, state=jnp.float32(0.0)) as trace, jaxstate.rng_stream(key):
            y = net.apply({"w": w}, x)
        return y, trace.state, read(slot)

    for f in (outside, inside):
        for run in (lambda f: f, jax.jit, jax.jacrev, jax.jacfwd):
            found, wanted = run(f)(params["w"], 0.5), run(by_hand)(params["w"], 0.5)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, wanted)


def test_parameters_are_born_under_a_trace():
    @jaxstate.parametrized
    def net(x):
        def body(i, x):
            return jnp.sin(x * jaxstate.param("w", jax.nn.initializers.normal(1.0), ()))

        return jax.lax.fori_loop(0, 3, body, x)

    wanted = net.init(jax.random.key(0), 0.5)
    with new_trace(CountOps, state={"ops": jnp.int32(0)}):
        assert net.init(jax.random.key(0), 0.5) == wanted

    @jaxstate.parametrized
    def watched(x):
        with new_trace(SumSines, state=jnp.float32(0.0)):
            return net.fn(x)

    assert watched.init(jax.random.key(0), 0.5) == wanted


def test_a_slot_in_the_hands_of_a_trace():
    """State that only some operations touch, at every depth."""
    sines = new_slot(jnp.int32(0))

    class CountSines(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            if primitive.name == "sin":
                write(sines, read(sines) + 1)
            return super().process_primitive(primitive, args, params)

    with new_trace(CountSines):
        four_steps(1.0)
        jnp.sin(1.0)
    assert read(sines) == 5


def test_shard_map_and_linear_solve_under_an_idle_trace():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    f = jax.shard_map(
        lambda x: jax.lax.psum(step(x), "i") * x, mesh=mesh, in_specs=spec, out_specs=spec
    )
    a = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    for run in (f, jax.jit(f), lambda x: jnp.linalg.solve(a, x), jax.jacrev(f)):
        with new_trace(Idle, state=jnp.zeros(3)):
            found = run(jnp.ones(2))
        np.testing.assert_allclose(found, run(jnp.ones(2)), rtol=1e-6)


def test_refs_pass_through():
    def f(x):
        ref = jax.new_ref(jnp.zeros(()))

        def body(i, x):
            ref[...] += x
            return jnp.sin(x)

        x = jax.lax.fori_loop(0, 3, body, x)
        return x, ref[...]

    with new_trace(SumSines, state=jnp.float32(0.0)) as trace:
        found = jax.jit(f)(0.5)
    wanted = f(0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(trace.state, wanted[1], rtol=1e-6)
