"""Sowing: what is reaped and planted equals a program that returns and takes it by hand.

Acceptance, section "Sowing": modes in every transformation, the algebra of reap and plant, values
sown in derivative code.

A program is written twice: ``sowing``, where an operation sows ``h``, and ``by_hand``, where the
operation takes ``h`` (None for the one it computes) and returns it beside its result.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate import plant, reap, sow
from jaxstate.extend import StatefulTrace, new_slot, new_trace, read, write
from jaxstate_tests.sow.programs import (
    PROGRAMS,
    X,
    check,
    every_program,
    op,
    op_by_hand,
    operation,
    same,
    scan,
    scan_by_hand,
    total,
)

# -- Values ----------------------------------------------------------------------------------


@every_program
def test_reaped_values_are_those_returned_by_hand(program):
    f = program.sowing(op(program.mode))
    out, h = program.by_hand(op_by_hand)(X, None)
    wanted = out, {"h": h}
    jitted = jax.jit(f)
    jitted(X)  # traced outside of any reap
    for reaped in (reap(f), jax.jit(reap(f)), reap(jitted), reap(jax.jit(jax.jit(f)))):
        check(reaped(X), wanted)
        check(reaped(X), wanted)  # from the caches
    check(jitted(X), out)  # and outside again


@every_program
def test_nothing_is_left_in_the_jaxpr(program):
    without = jax.make_jaxpr(program.sowing(operation))(X)
    assert str(jax.make_jaxpr(program.sowing(op(program.mode)))(X)) == str(without)
    text = str(jax.make_jaxpr(reap(program.sowing(op(program.mode))))(X))
    assert "state_" not in text and "sow" not in text


@every_program
def test_lanes_are_on_the_leading_axis(program):
    f, xs = program.sowing(op(program.mode)), jnp.stack([X, X / 2, X + 0.1, X * 2])
    out, h = jax.vmap(lambda x: program.by_hand(op_by_hand)(x, None))(xs)
    check(jax.vmap(reap(f))(xs), (out, {"h": h}))
    if "Python loop" in program.name and "last" not in program.name:
        h = jnp.moveaxis(h, 0, 1)  # several values in one place are stacked outermost
    for reaped in (reap(jax.vmap(f)), reap(jax.jit(jax.vmap(f))), reap(jax.vmap(jax.jit(f)))):
        check(reaped(xs), (out, {"h": h}))


# -- Planted values --------------------------------------------------------------------------


def to_plant(program):
    return jnp.cos(3 * program.by_hand(op_by_hand)(X, None)[1]) + 0.1


@every_program
def test_planted_values_are_those_passed_by_hand(program):
    f, h = program.sowing(op(program.mode)), to_plant(program)
    out = program.by_hand(op_by_hand)(X, h)[0]
    jitted = jax.jit(f)
    jitted(X)
    check(plant(f)({"h": h}, X), out)
    check(plant(jitted)({"h": h}, X), out)
    check(plant(jitted)({"h": h}, X), out)
    check(jax.jit(plant(f))({"h": h}, X), out)
    check(jitted(X), program.by_hand(op_by_hand)(X, None)[0])


@every_program
def test_a_reap_collects_what_is_planted(program):
    f, h = program.sowing(op(program.mode)), to_plant(program)
    wanted = program.by_hand(op_by_hand)(X, h)
    for both in (reap(plant(f)), plant(reap(f)), reap(plant(jax.jit(f)))):
        out, sown = both({"h": h}, X)
        check((out, sown["h"]), wanted)


@every_program
def test_lanes_of_planted_values_are_on_the_leading_axis(program):
    if "Python loop" in program.name and "last" not in program.name:
        pytest.skip("there the lanes are the second axis: see test_lanes_are_on_the_leading_axis")
    f, h, xs = program.sowing(op(program.mode)), to_plant(program), jnp.stack([X, X / 2])
    hs = jnp.stack([h, h * 2])
    out = jax.vmap(program.by_hand(op_by_hand))(xs, hs)[0]
    check(plant(jax.vmap(f))({"h": hs}, xs), out)
    check(jax.vmap(lambda h, x: plant(f)({"h": h}, x))(hs, xs), out)


# -- Derivatives -----------------------------------------------------------------------------


@every_program
def test_derivatives_of_reap_are_those_by_hand(program):
    f = reap(program.sowing(op(program.mode)))

    def sowing(x):
        out, sown = f(x)
        return total(out, sown["h"])

    def by_hand(x):
        return total(*program.by_hand(op_by_hand)(x, None))

    if program.forward:
        check(jax.jvp(sowing, (X,), (X * 2,)), jax.jvp(by_hand, (X,), (X * 2,)))
    if program.reverse:
        check(jax.grad(sowing)(X), jax.grad(by_hand)(X))
        check(jax.jit(jax.grad(sowing))(X), jax.grad(by_hand)(X))


@every_program
def test_reap_of_a_derivative_collects_the_primal_values(program):
    f = program.sowing(op(program.mode))
    jitted = jax.jit(f)
    by_hand = program.by_hand(op_by_hand)

    h = by_hand(X, None)[1]
    if program.forward:
        (out, _), (tangent, _) = jax.jvp(lambda x: by_hand(x, None), (X,), (X * 2,))
        for g in (f, jitted):
            check(reap(lambda x, g=g: jax.jvp(g, (x,), (x * 2,)))(X), ((out, tangent), {"h": h}))
    if not program.reverse:
        return
    slope = jax.grad(lambda x: by_hand(x, None)[0].sum())(X)
    for g in (f, jitted):
        slope_of = jax.grad(lambda x, g=g: g(x).sum())
        check(reap(slope_of)(X), (slope, {"h": h}))
        check(reap(jax.jit(slope_of))(X), (slope, {"h": h}))
        check(jax.jit(reap(slope_of))(X), (slope, {"h": h}))
    check(reap(jax.jacrev(f))(X)[1], {"h": h})
    check(reap(jax.linearize)(f, X)[1], {"h": h})


@every_program
def test_grad_of_plant_is_the_derivative_by_an_intermediate(program):
    if not (program.reverse and program.planted_derivative):
        pytest.skip("there is none by hand either")
    f, h = program.sowing(op(program.mode)), to_plant(program)
    wanted = jax.grad(lambda h, x: program.by_hand(op_by_hand)(x, h)[0].sum(), (0, 1))(h, X)
    for g in (f, jax.jit(f), jax.checkpoint(f)):
        check(jax.grad(lambda h, x, g=g: plant(g)({"h": h}, x).sum(), (0, 1))(h, X), wanted)


def test_forward_over_reverse_through_reap_and_plant():
    f = scan()(op("append"))

    def hessian(f):
        return jax.jacfwd(jax.jacrev(f))

    def by_hand(x):
        return total(*scan_by_hand()(op_by_hand)(x, None))

    check(hessian(lambda x: total(reap(f)(x)[0], reap(f)(x)[1]["h"]))(X), hessian(by_hand)(X))
    out, sown = reap(hessian(f))(X)
    check(out, hessian(lambda x: by_hand(x) * 0 + scan_by_hand()(op_by_hand)(x, None)[0])(X))
    check(sown, {"h": scan_by_hand()(op_by_hand)(X, None)[1]})


# -- Rules of custom_vjp ---------------------------------------------------------------------


def test_what_a_forward_rule_sows_is_collected_once():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), sow("residual", x * 3)), lambda r, ct: (ct * r,))
    for g in (jax.grad(f), jax.jit(jax.grad(f)), jax.value_and_grad(f)):
        assert reap(g)(2.0)[1] == {"residual": 6.0}
    assert reap(jax.vmap(jax.grad(f)))(X)[1]["residual"] == pytest.approx(X * 3)
    assert reap(f)(2.0)[1] == {}


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_a_rule_that_sows_other_names_than_its_function_is_an_error_where_it_runs_late():
    @jax.custom_vjp
    def more(x):
        return jnp.sin(x)

    @jax.custom_vjp
    def less(x):
        return sow("h", jnp.sin(x))

    more.defvjp(lambda x: (more(x), sow("r", x)), lambda r, ct: (ct * r,))
    less.defvjp(lambda x: (jnp.sin(x), x), lambda r, ct: (ct * r,))
    for f in (more, less):
        with pytest.raises(jaxstate.CustomRuleStateError, match=r"value sown as '[rh]'"):
            reap(jax.grad(jax.jit(f)))(1.0)


# -- Scopes and names ------------------------------------------------------------------------


def test_without_a_reap_a_value_is_returned_as_it_is():
    value = {"a": X, "b": (1, None)}
    assert sow("h", value) is value
    assert reap(lambda: sow("h", value), tag="other")() == (value, {})
    assert plant(lambda: sow("h", value))({"other": X}) is value


def test_the_inner_of_two_reaps_takes_what_is_sown_in_it():
    def f(x):
        y, inner = reap(jax.jit(lambda x: sow("h", x * 2)))(x)
        return sow("h", y * inner["h"])

    for g in (f, jax.jit(f)):
        check(reap(g)(3.0), (36.0, {"h": 36.0}))
    check(reap(reap(f))(3.0), ((36.0, {"h": 36.0}), {}))


def test_tags_are_collected_and_planted_each_for_itself():
    def f(x):
        return sow("h", sow("h", x * 2, tag="a") * 3, tag="b")

    for g in (f, jax.jit(f)):
        check(reap(reap(g, tag="a"), tag="b")(1.0), ((6.0, {"h": 2.0}), {"h": 6.0}))
        check(plant(reap(g, tag="b"), tag="a")({"h": 5.0}, 1.0), (15.0, {"h": 15.0}))
        check(reap(g)(1.0), (6.0, {}))


def test_of_nested_plants_the_innermost_that_has_the_name_decides():
    f = jax.jit(lambda: sow("a", jnp.float32(1)) + sow("b", jnp.float32(2)))
    g = plant(lambda: plant(f)({"a": 10.0}))
    assert g({"a": 100.0, "b": 200.0}) == 210.0


def test_one_jitted_function_serves_many_scopes():
    f = jax.jit(lambda x: sow("h", x * 2, mode="append"))

    def two(x):
        return f(f(x))

    check(f(1.0), 2.0)
    check(reap(f)(1.0), (2.0, {"h": 2.0}))
    check(reap(two)(1.0), (4.0, {"h": jnp.array([2.0, 4.0])}))
    check(plant(f)({"h": 5.0}, 1.0), 5.0)
    check(plant(two)({"h": jnp.array([5.0, 6.0])}, 1.0), 6.0)
    check(reap(f)(3.0), (6.0, {"h": 6.0}))
    check(f(1.0), 2.0)


def test_a_reap_in_a_loop_body_is_a_program_of_its_own():
    def body(x, _):
        y, sown = reap(jax.jit(lambda x: sow("h", jnp.sin(x))))(x)
        sow("cos", jnp.cos(x), mode="append")
        return y, sown["h"]

    def by_hand(x, _):
        return jnp.sin(x), (jnp.sin(x), jnp.cos(x))

    x, (sines, cosines) = lax.scan(by_hand, X, length=3)
    check(reap(lambda x: lax.scan(body, x, length=3))(X), ((x, sines), {"cos": cosines}))


# -- Values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "clobber", "append", "cond_clobber"])
@pytest.mark.parametrize("transform", [same, jax.jit, jax.checkpoint], ids=["call", "jit", "remat"])
def test_trees_of_any_dtype_are_collected_and_planted(transform, mode):
    def make(x):
        return {"a": (x, jnp.int32(3)), "key": jax.random.key(7), "none": None, "b": x > 0}

    @transform
    def f(x):
        value = sow("tree", make(x), mode=mode)
        sow("nothing", (), mode=mode)
        return value["a"][0] * value["a"][1]

    out, sown = reap(f)(X)
    keys = sown["tree"].pop("key"), (wanted := make(X)).pop("key")
    check((out, sown), (X * 3, {"tree": wanted, "nothing": ()}))
    assert keys[0] == keys[1]
    planted = make(X * 2) | {"a": (X * 2, jnp.int32(5))}
    check(plant(f)({"tree": planted, "nothing": ()}, X), X * 10)


def test_clobber_leaves_what_was_sown_before_where_nothing_follows():
    def f(x, steps, taken):
        sow("loop", x, mode="clobber")

        def step(i):
            sow("loop", x * i, mode="clobber")
            return i + 1

        lax.while_loop(lambda i: i < steps, step, 1)
        sow("branch", x, mode="cond_clobber")
        lax.cond(taken, lambda: sow("branch", x * 9, mode="cond_clobber"), lambda: x)
        return x

    for g in (reap(f), reap(jax.jit(f)), jax.jit(reap(f))):
        check(g(2, 4, True)[1], {"loop": 6, "branch": 18})
        check(g(2, 0, False)[1], {"loop": 2, "branch": 2})
    xs, steps, taken = jnp.array([2, 2]), jnp.array([4, 0]), jnp.array([True, False])
    check(
        reap(jax.vmap(f))(xs, steps, taken)[1],
        {"loop": jnp.array([6, 2]), "branch": jnp.array([18, 2])},
    )


def test_a_value_that_nobody_uses_is_collected():
    def f(x):
        def body(x, _):
            sow("unused", jnp.exp(x), mode="append")
            return x, None

        jax.checkpoint(lambda x: sow("also", x * 2))(x)
        return lax.scan(body, x, length=2)[0]

    check(reap(f)(X)[1], {"unused": jnp.stack([jnp.exp(X)] * 2), "also": X * 2})
    check(reap(jax.grad(lambda x: f(x).sum()))(X)[1]["also"], X * 2)


def test_names_keep_the_order_of_the_program():
    def f(x):
        for name in "cab":
            sow(name, x)

    assert list(reap(f)(1.0)[1]) == list("cab")


def test_a_jaxpr_that_is_evaluated_sows_each_time():
    def f(x):
        sow("h", (x, x * 2), mode="append")
        return x + 1

    jaxprs = []

    def twice(x):
        for g in (f, jax.jit(f)):
            jaxprs.append(jax.make_jaxpr(g)(x))
            for _ in range(2):
                (x,) = jax.core.eval_jaxpr(jaxprs[-1].jaxpr, jaxprs[-1].consts, x)
        return x

    xs = jnp.arange(4.0)
    check(reap(twice)(0.0), (4.0, {"h": (xs, xs * 2)}))
    with pytest.raises(
        jaxstate.ClosedStateError, match=r"made inside jaxstate\.reap, and sows 'h'"
    ):
        jax.core.eval_jaxpr(jaxprs[0].jaxpr, jaxprs[0].consts, 0.0)


# -- Beside other state ----------------------------------------------------------------------


def test_draws_parameters_and_slots_beside_sown_values(key):
    count = new_slot(jnp.int32(0), name="count")

    @jaxstate.parametrized
    def layer(x):
        w = jaxstate.param("w", lambda key: jnp.full(3, 0.5))
        write(count, read(count) + 1)
        return sow("h", x * w + jaxstate.random.normal((3,)), mode="append")

    @jaxstate.parametrized
    def net(x):
        return jax.jit(lambda x: lax.fori_loop(0, 3, lambda i, x: layer(x), x))(x)

    def by_hand(x, n):
        h = x * 0.5 + jax.random.normal(jax.random.fold_in(key, n), (3,))
        return h, h

    params = net.init(key, X)
    write(count, 0)
    wanted, hs = lax.scan(by_hand, X, jnp.arange(3))
    check(reap(lambda x: net.apply(params, x, key=key))(X), (wanted, {"h": hs}))
    assert read(count) == 3
    check(plant(lambda x: net.apply(params, x, key=key))({"h": hs * 2}, X), hs[-1] * 2)
    with jaxstate.rng_stream(key) as outside:
        draw = reap(jax.jit(lambda x: sow("h", x + jaxstate.random.normal((3,)))))
        check(draw(X)[1]["h"], X + jax.random.normal(jax.random.fold_in(key, 0), (3,)))
        assert outside.count == 1


class Count(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        if primitive.name == "sin":
            self.state += 1
        return super().process_primitive(primitive, args, params)


@pytest.mark.parametrize("name", ["jit", "scan", "scan, twice per step", "cond", "while_loop"])
def test_traces_around_and_inside_of_reap_and_plant(name):
    program = next(p for p in PROGRAMS if p.name == name)
    f, by_hand = program.sowing(op(program.mode)), program.by_hand(op_by_hand)
    out, h = by_hand(X, None)

    def counted(g):
        def run(*args):
            with new_trace(Count, state=jnp.int32(0)) as trace:
                return g(*args), trace.state

        return run

    sines = {"jit": 1, "scan": 3, "scan, twice per step": 4, "cond": 1, "while_loop": 3}[name]
    check(counted(reap(f))(X), ((out, {"h": h}), sines))
    check(reap(counted(f))(X), ((out, sines), {"h": h}))
    p = to_plant(program)
    check(plant(counted(f))({"h": p}, X)[0], by_hand(X, p)[0])
    check(counted(plant(f))({"h": p}, X)[0], by_hand(X, p)[0])


def test_a_failed_call_leaves_nothing_open():
    def f(x):
        sow("h", x)
        raise KeyError("mine")

    with pytest.raises(KeyError):
        reap(jax.jit(f))(1.0)
    with pytest.raises(KeyError):
        plant(f)({"h": 1.0}, 1.0)
    assert sow("h", X) is X
    check(reap(op("strict"))(X)[1]["h"], jnp.sin(X) * 2)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mode is one of 'strict', 'append'"):
        sow("h", X, mode="last")
    with pytest.raises(TypeError, match="a name is a string"):
        sow(3, X)
    with pytest.raises(TypeError, match="wants a dict from names to values"):
        plant(op("strict"))(X)
    with pytest.raises(TypeError, match="wants a dict from names to values"):
        plant(op("strict"))({3: X}, X)
    for make in (reap, plant):
        for wrong in (None, 3, {"h": X}):
            with pytest.raises(TypeError, match=f"{make.__name__} wants a function"):
                make(wrong)
        for wrong in (None, X, ["h"]):
            with pytest.raises(TypeError, match=f"{make.__name__} wants a string as tag"):
                make(op("strict"), wrong)
    with pytest.raises(TypeError, match="sow wants a string as tag"):
        sow("h", X, tag=3)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_a_backward_rule_does_not_sow():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), x), lambda x, ct: (sow("ct", ct),))
    with pytest.raises(jaxstate.CustomRuleStateError, match="'ct'"):
        reap(jax.grad(f))(1.0)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_devices_sow_one_value_outside_and_their_own_inside():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec("d")

    def mapped(f):
        return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)

    for f in (mapped(op("strict")), jax.jit(mapped(op("strict")))):
        with pytest.raises(jaxstate.DeviceWriteError):
            reap(f)(X)

    def total(x):
        def body(c, _):
            return sow("h", 2 * c, mode="append"), None

        return x * jax.lax.scan(body, jax.lax.psum(x.sum(), "d"), None, length=2)[0]

    for f in (mapped(total), jax.jit(mapped(total))):
        check(reap(f)(X), (4 * X * X.sum(), {"h": X.sum() * jnp.array([2.0, 4.0])}))
    for program in (p for p in PROGRAMS if p.name in ("scan", "cond", "jit")):
        f = reap(program.sowing(op(program.mode)))
        inside = mapped(lambda x, f=f: f(x)[1]["h"])
        check(inside(X), program.by_hand(op_by_hand)(X, None)[1])


# -- Values that are handed on ---------------------------------------------------------------


def handed_on(mode):
    """Programs that sow what a ``reap`` inside has collected; the same by hand, as functions
    of x and of the value ``h`` that every site gives (None: what it is given); what is reaped."""

    def inner(x):
        return sow("a", 3 * x, mode=mode)

    def once(x):
        out, sown = reap(inner)(x)
        return out + sow("a", sown["a"], mode=mode)

    def twice(x):
        out, sown = reap(once)(x)
        return out + sow("a", sown["a"], mode=mode)

    def jitted(x):
        out, sown = jax.jit(reap(jax.jit(inner)))(x)
        return out + sow("a", sown["a"], mode=mode)

    yield once, lambda x, h: 2 * (3 * x if h is None else h), 3.0
    yield twice, lambda x, h: 3 * (3 * x if h is None else h), 3.0
    yield jitted, lambda x, h: 2 * (3 * x if h is None else h), 3.0
    yield jax.jit(twice), lambda x, h: 3 * (3 * x if h is None else h), 3.0


@pytest.mark.parametrize("mode", ["strict", "append", "clobber", "cond_clobber"])
@pytest.mark.parametrize("i", range(4))
def test_values_that_are_handed_on_can_be_planted(i, mode):
    program, by_hand, value = list(handed_on(mode))[i]
    out, sown = reap(program)(1.0)
    check((out, sown), (by_hand(1.0, None), {"a": value}))
    for values in (sown, {"a": 5.0}):
        wanted = by_hand(1.0, float(values["a"]))
        check(plant(program)(values, 1.0), wanted)
        check(jax.jit(plant(program))(values, 1.0), wanted)
    slope = jax.grad(lambda h: plant(program)({"a": h}, 1.0))(5.0)
    check(slope, by_hand(1.0, 1.0))


def test_several_values_that_are_handed_on_can_be_planted():
    def steps(x):
        return jax.lax.scan(lambda c, _: (sow("a", 3 * c, mode="append"), None), x, length=3)[0]

    def program(x):
        out, sown = reap(steps)(x)
        return out + sow("a", sown["a"], mode="append").sum()

    out, sown = reap(program)(1.0)
    check((out, sown), (27.0 + 39.0, {"a": np.array([3.0, 9.0, 27.0], np.float32)}))
    check(plant(program)(sown, 1.0), 66.0)
    check(plant(program)({"a": jnp.array([1.0, 2.0, 4.0])}, 1.0), 4.0 + 7.0)

    def in_python(x):
        for _ in range(2):
            _, sown = reap(lambda x: sow("a", 3 * x, mode="append"))(x)
            x = x + sow("a", sown["a"], mode="append")
        return x

    out, sown = reap(in_python)(1.0)
    check((out, sown), (16.0, {"a": np.array([3.0, 12.0], np.float32)}))
    check(plant(in_python)(sown, 1.0), 16.0)
    with pytest.raises(jaxstate.PlantMismatchError, match="2 times"):
        plant(in_python)({"a": jnp.ones(3)}, 1.0)


# -- Weak types ------------------------------------------------------------------------------


SCALED = {
    "a scalar of Python": lambda x: x * sow("s", 2.0),
    "an integer": lambda x: x * sow("s", 2),
    "a weak array": lambda x: x * sow("s", jnp.asarray(2.0)),
    "a tree": lambda x: x * sow("s", {"a": 2.0, "b": x})["a"],
    "jit": jax.jit(lambda x: x * sow("s", 2.0)),
    "vmap": jax.vmap(lambda x: x * sow("s", 2.0)),
    "checkpoint": jax.checkpoint(lambda x: x * sow("s", 2.0)),
    "scan": lambda x: jax.lax.scan(
        lambda c, _: (c * sow("s", 2.0, mode="append"), None), x, length=2
    )[0],
    "cond": lambda x: jax.lax.cond(True, lambda: x * sow("s", 2.0), lambda: x / sow("s", 4.0)),
    "a weak carry": lambda x: (
        x * jax.lax.scan(lambda c, _: (sow("s", c, mode="clobber"), None), 2.0, length=2)[0]
    ),
    "a strong array": lambda x: x * sow("s", jnp.float32(2.0)),
}


@pytest.mark.parametrize("name", SCALED)
def test_planted_values_give_way_as_the_sown_ones_do(name):
    f, x = SCALED[name], jnp.ones(2, jnp.bfloat16)
    wanted = f(x)  # without a plant `sow` returns what it is given
    _, sown = reap(f)(x)
    for planted in (plant(f)(sown, x), jax.jit(plant(f))(sown, x)):
        assert planted.dtype == wanted.dtype
        np.testing.assert_array_equal(planted, wanted)


# -- Branches that sow values of different types ---------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "append", "clobber", "cond_clobber"])
def test_branches_with_values_of_different_shapes_take_the_advice(mode):
    def f(x, name, mode):
        def long():
            return sow(name, jnp.full(3, x), mode=mode).sum()

        return jax.lax.cond(x > 0, lambda: sow("a", jnp.full(2, x), mode=mode).sum(), long)

    with pytest.raises(
        jaxstate.BranchSowError, match=r"as float32\[2\].*and as float32\[3\]"
    ) as error:
        reap(lambda x: f(x, "a", mode))(1.0)
    assert "sow('a', value, mode=\"cond_clobber\")" in str(error.value)
    assert "sow('a_1', value, mode=\"cond_clobber\")" in str(error.value)
    out, sown = reap(lambda x: f(x, "a_1", "cond_clobber"))(1.0)
    check((out, sown), (2.0, {"a": np.ones(2), "a_1": np.zeros(3)}))
