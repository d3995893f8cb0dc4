"""What a function assigns to a copy of an object, which JAX hands it, is returned or an error.

The expected numbers are those of Python, where a loop is a loop and a jitted function the function.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxstate
from jaxstate import mutate
from jaxstate_tests.tree.cells import RUNS, Cell, f32, loop, numbers

leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


# -- Copies ----------------------------------------------------------------------------------

COPIES = {
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "jvp": lambda f: lambda t: jax.jvp(f, (t,), (t,))[1],
    "vjp": lambda f: lambda t: jax.vjp(f, t)[0],
    "linearize": lambda f: lambda t: jax.linearize(f, t)[0],
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "vmap": lambda f: jax.vmap(f, in_axes=None, axis_size=2),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f), in_axes=None, axis_size=2),
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}


@leaks_allowed
@pytest.mark.parametrize("run", ["mutate", "jit outside"])
@pytest.mark.parametrize("transform", COPIES)
def test_what_is_assigned_to_a_copy_is_an_error(transform, run):
    def reads(t):
        return t["w"] * 2

    def writes(t):
        t["calls"] = t["calls"] + 1
        return t["w"] * 2

    def in_a_loop(t):
        loop(2, lambda i: t.update(calls=t["calls"] + 1))
        return t["w"] * 2

    tree = {"w": f32(1), "calls": f32(0)}
    run = RUNS[run]
    found, new = run(lambda t: COPIES[transform](reads)(t))(tree)
    assert numbers(found) == numbers(COPIES[transform](reads)(tree)) and numbers(new) == [0.0, 1.0]
    for f in (writes, in_a_loop):
        with pytest.raises(jaxstate.CopyWriteError, match=r"tree\['calls'\].*would be lost"):
            run(lambda t, f=f: COPIES[transform](f)(t))(tree)


def with_rule(f):
    """A function with a rule, of the argument alone."""
    f = jax.custom_vjp(f)
    f.defvjp(lambda c: (c.n * 2, c), lambda c, g: (jax.tree.map(lambda x: g * 2, c),))
    return f


def with_tangents(f):
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: (primals[0].n * 2, tangents[0].n * 2))
    return f


def converted(f):
    def call(cell):
        g, consts = jax.closure_convert(f, cell)
        return g(cell, *consts)

    return call


def on_devices(f):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


def with_lanes(f):
    f = jax.custom_batching.custom_vmap(f)
    f.def_vmap(lambda size, batched, cell: (cell.n * 2, batched[0].n))
    return f


def traced(f):
    """As libraries evaluate what JAX traces for them."""

    def call(cell):
        trace = jax.jit(f).trace(cell)
        (out,) = jax.core.eval_jaxpr(trace.jaxpr.jaxpr, trace.jaxpr.consts, *jax.tree.leaves(cell))
        return jax.tree.unflatten(jax.tree.structure(trace.out_info), [out])

    return call


def evaluated(f):
    def call(cell):
        jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(cell)
        (out,) = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(cell))
        return jax.tree.unflatten(jax.tree.structure(shapes), [out])

    return call


def with_residual(f):
    """The function is linear in an argument that is not used."""
    call = jax.custom_derivatives.linear_call
    return lambda cell: call(lambda cell, x: f(cell) + 0 * x, lambda cell, x: x, cell, f32(0))


def on_host(f):
    module = importlib.import_module("jax.experimental.compute_on")
    decorate = getattr(module, "compute_on2", module.compute_on)  # its name until jax 0.10
    space = jax.memory.Space.Device
    return decorate(f, compute_type="device_host", out_memory_spaces=space)


def in_a_group(f):
    groups = importlib.import_module("jax.experimental.scheduling_groups")
    return groups.scheduling_group("g")(f)


def in_order(f):
    overlap = importlib.import_module("jax.experimental.overlap")
    return overlap.program_order(f, enforce=False)


# Functions with an argument that JAX hands out as a copy.
HANDED = {
    "jit.trace": traced,
    "make_jaxpr": evaluated,
    "linear_call": with_residual,
    "compute_on": on_host,
    "scheduling_group": in_a_group,
    "custom_vjp": with_rule,
    "custom_jvp": with_tangents,
    "custom_vmap": with_lanes,
    "closure_convert": converted,
    "shard_map": on_devices,
    "custom_vjp in grad": lambda f: lambda c: (jax.grad(with_rule(f))(c), with_rule(f)(c))[1],
}
if importlib.util.find_spec("jax.experimental.overlap"):
    HANDED["program_order"] = in_order


@leaks_allowed
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("how", HANDED)
def test_what_a_function_assigns_to_its_argument_is_lost_or_returned(how, run):
    transform, run = HANDED[how], RUNS[run]

    def reads(cell):
        return cell.n * 2

    def writes(cell):
        cell.add(1.0)
        return cell.n * 2

    def scratch(cell):
        other = Cell(cell.n)  # an object of its own
        other.add(1.0)
        return cell.n * 2

    example = {"c": Cell(f32(3)), "d": Cell(f32(5))}
    for f in (reads, scratch):
        out, new = run(lambda t, f=f: transform(f)(t["c"]))(example)
        assert out == 6 and numbers(new) == [3.0, 5.0]
    with pytest.raises(jaxstate.CopyWriteError, match=r"tree\['c'\]\.n was assigned"):
        run(lambda t: transform(writes)(t["c"]) and None)(example)

    def fresh(t):  # an object that is none of the tree
        transform(writes)(Cell(f32(1), 7))
        return t["c"].n

    if how != "custom_vjp in grad":
        assert run(fresh)(example)[0] == 3


@leaks_allowed
@pytest.mark.parametrize("run", RUNS)
def test_functions_that_are_called_with_the_object_itself_assign_to_it(run):
    def adds(cell):
        cell.add(1.0)
        return cell.n * 2

    by_hand = {"jit": jax.jit, "checkpoint": jax.checkpoint, "checkify": checkify.checkify}
    for name, transform in by_hand.items():
        out, new = RUNS[run](lambda t, f=transform: f(adds)(t["c"]))({"c": Cell(f32(3))})
        assert (out[1] if name == "checkify" else out) == 8 and numbers(new) == [4.0]


@leaks_allowed
def test_shapes_are_those_of_a_function_that_assigns_to_its_argument():
    def adds(cell):
        cell.add(1.0)
        return cell.n * 2

    def f(t):
        found = jax.eval_shape(adds, t["c"]), jax.jit(adds).eval_shape(t["c"])
        with pytest.raises(jaxstate.CopyWriteError):  # and not what was traced for the shapes
            jax.jit(adds).trace(t["c"])
        return [jnp.zeros(s.shape, s.dtype) for s in found]

    out, new = mutate(f)({"c": Cell(f32(3))})
    assert [x.shape for x in out] == [(), ()] and numbers(new) == [3.0]


@leaks_allowed
@pytest.mark.parametrize("run", RUNS)
def test_a_copy_that_is_returned_is_what_the_function_hands_back(run):
    def returns(cell):
        cell.add(1.0)
        return cell

    def f(t):
        t["c"] = on_devices(returns)(t["c"])
        t["d"] = converted(returns)(t["d"])
        loop(2, lambda i: t["c"].add(1.0))

    _, new = RUNS[run](f)({"c": Cell(f32(3)), "d": Cell(f32(5))})
    assert numbers(new) == [6.0, 6.0]


@leaks_allowed
@pytest.mark.parametrize("how", ["scan", "map"])
def test_the_turns_of_a_scan_get_parts_of_their_own(how):
    def total(cell):
        return cell.n.sum()

    def writes(cell):
        cell.add(1.0)
        return cell.n.sum()

    def over(f):
        if how == "map":
            return lambda t: jax.lax.map(f, t["c"])
        return lambda t: jax.lax.scan(lambda c, x: (c, f(x)), None, xs=t["c"])[1]

    tree = {"c": Cell(jnp.arange(3.0))}
    assert mutate(over(total))(tree)[0].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(jaxstate.CopyWriteError, match=r"\.n was assigned"):
        mutate(over(writes))(tree)


@leaks_allowed
def test_gradients_of_functions_with_rules_with_respect_to_objects():
    def f(t):
        return jax.grad(lambda c: with_rule(lambda c: c.n * 2)(c) * t["a"])(t["c"]).n

    for run in RUNS.values():
        assert run(f)({"a": f32(3), "c": Cell(f32(5))})[0] == 6.0


@leaks_allowed
def test_a_frozen_copy_says_what_it_is():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Fixed:
        n: Any

    def f(t):
        t["c"].n = t["c"].n + 1
        jax.tree.map(lambda x: x, t["c"]).n = f32(0)

    with pytest.raises(dataclasses.FrozenInstanceError) as error:
        mutate(f)({"c": Fixed(f32(1))})
    assert "a copy of one, as jax.tree.map makes it" in error.value.__notes__[0]


@leaks_allowed
@pytest.mark.parametrize("trace", ["closure_convert", "make_jaxpr"])
def test_what_was_traced_for_another_structure_says_so(trace):
    def f(t, x):
        if trace == "closure_convert":
            g, consts = jax.closure_convert(lambda x: x * t["c"].n, x)
            t["new"] = Cell(f32(1))
            return g(x, *consts)
        jaxpr = jax.make_jaxpr(lambda x: x * t["c"].n)(x)
        t["new"] = Cell(f32(1))
        return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)

    with pytest.raises(jaxstate.ClosedStateError, match="the tree had another structure"):
        mutate(f)({"c": Cell(f32(2))}, f32(3))


@leaks_allowed
def test_kernels_and_exports_refuse_objects():
    def kernel(use):
        def f(t):
            def body(x_ref, y_ref):
                y_ref[...] = x_ref[...] * 2
                use(t)

            shape = jax.ShapeDtypeStruct((2,), jnp.float32)
            return pl.pallas_call(body, out_shape=shape, interpret=True)(jnp.ones(2))

        return f

    pl = pytest.importorskip("jax.experimental.pallas")
    tree = {"c": Cell(f32(2))}
    assert mutate(kernel(lambda t: None))(tree)[0].tolist() == [2.0, 2.0]
    for use in (lambda t: t["c"].n * 2, lambda t: setattr(t["c"], "n", f32(1))):
        with pytest.raises(jaxstate.UnsupportedPrimitiveError, match=r"tree\['c'\].n.*Pallas"):
            mutate(kernel(use))(tree)
    with pytest.raises(jaxstate.AheadOfTimeError, match=r"tree\['c'\].n"):
        mutate(lambda t: jax.export.export(jax.jit(lambda: t["c"].add(1.0)))())(tree)


@leaks_allowed
def test_a_carry_that_goes_in_as_a_copy():
    def f(tree):
        def body(i, w):
            w["x"] = w["x"] + 1
            return jax.tree.map(lambda x: 2 * x, w)

        return jax.lax.fori_loop(0, 2, body, tree["w"])

    with pytest.raises(jaxstate.CopyWriteError, match=r"would be lost"):
        mutate(f)({"w": {"x": f32(1)}})


# -- Custom rules and devices ----------------------------------------------------------------


def with_a_rule(tree):
    @jax.custom_vjp
    def f(x):
        tree["n"] = tree["n"] + 1
        return x * tree["w"]

    f.defvjp(lambda x: (f(x), tree["w"]), lambda w, ct: (2 * ct * w,))
    return f


# How often the function runs, the value, and the derivative.
RULES = {
    "call": (lambda f: (f(2.0), 0.0), (1.0, 6.0, 0.0)),
    "grad": (lambda f: jax.value_and_grad(f)(2.0), (1.0, 6.0, 6.0)),
    "jit": (lambda f: (jax.jit(f)(2.0), 0.0), (1.0, 6.0, 0.0)),
    "grad of jit": (lambda f: jax.value_and_grad(jax.jit(f))(2.0), (1.0, 6.0, 6.0)),
    "scan": (
        lambda f: (jax.lax.scan(lambda c, _: (f(c), None), 2.0, None, length=2)[0], 0.0),
        (2.0, 18.0, 0.0),
    ),
    "vmap": (lambda f: (jax.vmap(lambda _: f(2.0))(jnp.arange(2.0))[1], 0.0), (1.0, 6.0, 0.0)),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("how", RULES)
def test_functions_with_rules_assign(how, run):
    call, wanted = RULES[how]
    out, new = RUNS[run](lambda tree: call(with_a_rule(tree)))({"n": f32(0), "w": f32(3)})
    assert (float(new["n"]), *map(float, out)) == wanted


@leaks_allowed
@pytest.mark.parametrize("run", RUNS)
def test_devices(run):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    x = jnp.arange(float(len(jax.devices())))

    def over_devices(f):
        return lambda tree: jax.shard_map(
            lambda x: f(tree, x), mesh=mesh, in_specs=spec, out_specs=spec
        )(x)

    def count(tree, x):
        tree["n"] = tree["n"] + 1
        return x * tree["n"]

    def differ(tree, x):
        tree["n"] = tree["n"] + x[0]
        return x

    y, new = RUNS[run](over_devices(count))({"n": f32(1)})
    np.testing.assert_array_equal(y, 2 * x)
    assert new["n"] == 2
    with pytest.raises(jaxstate.DeviceWriteError, match=r"tree\['n'\]"):
        RUNS[run](over_devices(differ))({"n": f32(1)})
    with pytest.raises(jaxstate.DeviceWriteError, match=r"tree\['n'\].*pmap"):
        mutate(lambda tree: jax.pmap(lambda x: count(tree, x))(x))({"n": f32(1)})
