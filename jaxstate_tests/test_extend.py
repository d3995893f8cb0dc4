"""Slots: state that only some operations touch."""

import weakref

import jax
import jax.extend
import jax.interpreters.mlir
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import extend
from jaxstate.extend import new_slot, read, write


def bump(slot, by=1.0):
    write(slot, read(slot) + by)


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
def test_a_counter_counts_the_steps(steps):
    slot = new_slot(0.0)
    loops = [
        lambda n: jax.lax.fori_loop(0, n, lambda i, _: bump(slot), None),
        lambda n: jax.lax.while_loop(lambda i: i < n, lambda i: (bump(slot), i + 1)[1], 0),
        lambda n: jax.lax.while_loop(lambda i: (bump(slot), i < n)[1], lambda i: i + 1, 0),
    ]
    for loop, extra in zip(loops, (0, 0, 1), strict=True):
        for run in (loop, jax.jit(loop)):
            write(slot, 0.0)
            run(steps)
            assert read(slot) == steps + extra


def test_a_write_two_jits_down_is_seen_after_the_call():
    slot = new_slot(1.0)
    jax.jit(lambda: jax.jit(lambda: bump(slot, 4.0))())()
    assert read(slot) == 5.0


def test_a_cond_function_reads_what_the_body_writes():
    slot = new_slot(0.0)

    def run(limit):
        return jax.lax.while_loop(lambda c: read(slot) < limit, lambda c: (bump(slot), c + 1)[1], 0)

    assert jax.jit(run)(3.0) == 3
    assert read(slot) == 3.0


def test_tangents_go_through_state():
    def f(x):
        slot = new_slot(x)

        def body(c, t):
            write(slot, jnp.sin(read(slot)) * t)
            return c, None

        jax.lax.scan(body, None, jnp.arange(1.0, 4.0))
        return jax.jit(lambda: read(slot) ** 2)()

    def by_hand(x):
        for t in jnp.arange(1.0, 4.0):
            x = jnp.sin(x) * t
        return x**2

    for d in (jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.grad(jax.grad(jax.jit(f)))):
        np.testing.assert_allclose(d(f)(0.7), d(by_hand)(0.7), rtol=1e-5)
        np.testing.assert_allclose(jax.jit(d(f))(0.7), d(by_hand)(0.7), rtol=1e-5)


def test_what_leaves_a_differentiated_function_is_the_value():
    slot = new_slot(0.0)

    def f(x):
        write(slot, x * x)
        return jax.jit(lambda: read(slot))() * x

    np.testing.assert_allclose(jax.grad(f)(3.0), 27.0)
    assert read(slot) == 9.0 and not isinstance(read(slot), jax.core.Tracer)
    np.testing.assert_allclose(jax.hessian(f)(3.0), 18.0)


def test_a_value_without_tangent_replaces_one_with():
    slot = new_slot(0.0)

    def f(x):
        write(slot, x * 2)
        write(slot, jax.lax.stop_gradient(read(slot)))
        return read(slot) * x

    np.testing.assert_allclose(jax.grad(f)(3.0), 6.0)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(3.0), 6.0)


def test_slots_in_custom_rules_without_any_stream():
    slot = new_slot(0.0)

    @jax.custom_jvp
    def f(x):
        bump(slot)
        return x * 2

    @f.defjvp
    def rule(primals, tangents):
        bump(slot, 10.0)
        return primals[0] * 2, tangents[0] * 3

    jax.jit(lambda x: f(x))(1.0)
    assert read(slot) == 1.0
    assert jax.grad(jax.jit(f))(1.0) == 3.0
    assert read(slot) == 11.0


def test_a_slot_made_inside_a_vmap_has_a_value_per_lane():
    def lane(x):
        slot = new_slot(x)
        jax.lax.fori_loop(0, 2, lambda i, _: bump(slot, x), None)
        return read(slot)

    np.testing.assert_allclose(jax.jit(jax.vmap(lane))(jnp.arange(3.0)), 3 * jnp.arange(3.0))


def test_a_slot_that_is_dropped_frees_its_array_at_once():
    def made():
        slot = new_slot(jnp.zeros(1000))
        jax.jit(lambda: bump(slot))()
        return weakref.ref(slot), weakref.ref(read(slot))

    dropped, value = made()
    assert dropped() is None and value() is None


@pytest.mark.leaks_allowed("the test keeps a slot beyond the function that made it")
@pytest.mark.parametrize("transform", [jax.vmap, jax.grad, jax.jit])
def test_a_slot_ends_with_the_function_that_made_it(transform):
    slots = []

    def f(x):
        slots.append(new_slot(x))
        return x

    transform(f)(jnp.ones(2) if transform is jax.vmap else 1.0)
    with pytest.raises(jaxstate.ClosedStateError, match="that has ended"):
        read(slots[0])


def test_lanes_may_write_one_value_and_not_several():
    slot = new_slot(0.0)

    def lane(x):
        bump(slot)
        return x * read(slot)

    np.testing.assert_allclose(jax.vmap(lane)(jnp.arange(3.0)), jnp.arange(3.0))
    assert read(slot) == 1.0
    with pytest.raises(jaxstate.LaneWriteError, match="vmap over 3 lanes"):
        jax.vmap(lambda x: write(slot, x))(jnp.arange(3.0))
    assert read(slot) == 1.0


@pytest.mark.parametrize("value", [jnp.zeros(2), jnp.int32(1), 1j])
def test_a_write_of_another_type_is_refused_where_it_happens(value):
    slot = new_slot(0.0, name="total")
    with pytest.raises(
        jaxstate.SlotTypeError, match="'total' has type float32\\[\\], and was written with"
    ):
        jax.jit(lambda: write(slot, value))()
    assert read(slot) == 0.0


def test_a_rule_makes_a_foreign_primitive_stateful():
    """A primitive that calls a jaxpr, as another package would define it."""
    call_p = jax.extend.core.Primitive("foreign_call")
    call_p.multiple_results = True

    def evaluate(*args, jaxpr):
        return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args)

    call_p.def_impl(evaluate)
    call_p.def_effectful_abstract_eval(lambda *_, jaxpr: (list(jaxpr.out_avals), jaxpr.effects))
    jax.interpreters.mlir.register_lowering(
        call_p, jax.interpreters.mlir.lower_fun(evaluate, multiple_results=True)
    )

    def foreign_call(f, x):
        closed = jax.make_jaxpr(f)(x)
        return call_p.bind(x, jaxpr=closed)[0]

    slot = new_slot(0.0)

    def f(x):
        bump(slot, x)
        return x * 2

    with pytest.raises(jaxstate.UnsupportedPrimitiveError, match="foreign_call"):
        jax.jit(lambda x: foreign_call(f, x))(1.0)

    @extend.register_rule(call_p)
    def rule(args, params):
        reads, writes = extend.state_of(params["jaxpr"])
        slots = extend.read_all(reads + writes)
        how = extend.Layout(reads, writes)
        jaxpr = extend.discharge(params["jaxpr"], how, [jax.typeof(s) for s in slots])
        outs = call_p.bind(*slots, *args, jaxpr=jaxpr)
        n = len(outs) - len(writes)
        extend.write_all(writes, outs[n:])
        return outs[:n]

    assert jax.jit(lambda x: foreign_call(f, x))(1.0) == 2.0
    assert foreign_call(f, 2.0) == 4.0
    assert read(slot) == 3.0


def test_a_foreign_primitive_under_derivatives_lanes_and_traces():
    """A primitive that runs a jaxpr twice, with rules for derivatives and lanes of its own."""
    twice_p = jax.extend.core.Primitive("foreign_twice")
    twice_p.multiple_results = True

    def run(*args, jaxpr):
        """What a jaxpr returns takes the place of its last inputs."""
        f = jax.extend.core.jaxpr_as_fun(jaxpr)
        outs = f(*args)
        return f(*args[: len(args) - len(outs)], *outs)

    twice_p.def_impl(run)
    twice_p.def_effectful_abstract_eval(lambda *_, jaxpr: (list(jaxpr.out_avals), jaxpr.effects))
    jax.interpreters.mlir.register_lowering(
        twice_p, jax.interpreters.mlir.lower_fun(run, multiple_results=True)
    )

    def jvp(primals, tangents, *, jaxpr):
        tangents = map(jax.interpreters.ad.instantiate_zeros, tangents)
        return jax.jvp(lambda *args: run(*args, jaxpr=jaxpr), tuple(primals), tuple(tangents))

    def batch(args, dims, *, jaxpr):
        outs = jax.vmap(lambda *args: run(*args, jaxpr=jaxpr), in_axes=tuple(dims))(*args)
        return outs, [0] * len(outs)

    jax.interpreters.ad.primitive_jvps[twice_p] = jvp
    jax.interpreters.batching.primitive_batchers[twice_p] = batch

    @extend.register_rule(twice_p)
    def rule(args, params):
        reads, writes = extend.state_of(params["jaxpr"])
        slots = extend.read_all(reads + writes)
        how = extend.Layout(reads, writes, out_at=0)
        jaxpr = extend.discharge(params["jaxpr"], how, [jax.typeof(s) for s in slots])
        outs = twice_p.bind(*slots, *args, jaxpr=jaxpr)
        extend.write_all(writes, outs[: len(writes)])
        return outs[len(writes) :]

    def twice(f, x):
        return twice_p.bind(x, jaxpr=jax.make_jaxpr(f)(x))[0]

    def with_a_slot(x):
        total = new_slot(jnp.float32(0.0))

        def step(x):
            write(total, read(total) + x)
            return jnp.sin(x)

        return twice(step, x) * read(total)

    class Sines(extend.StatefulTrace):
        """Adds up what the sine is taken of."""

        def process_primitive(self, primitive, args, params):
            if primitive.name == "sin":
                self.state = self.state + jnp.sum(args[0])
            return super().process_primitive(primitive, args, params)

    def with_a_trace(x):
        with extend.new_trace(Sines, state=jnp.float32(0.0)) as trace:
            y = twice(jnp.sin, x)
        return y * trace.state

    def by_hand(x):
        return jnp.sin(jnp.sin(x)) * (x + jnp.sin(x))

    xs = jnp.array([0.3, -1.2])
    for f in (with_a_slot, with_a_trace):
        for mode in (lambda f: f, jax.jit):
            for transform in (lambda f: f, jax.grad, jax.jacfwd):
                found, wanted = (mode(transform(g))(xs[0]) for g in (f, by_hand))
                np.testing.assert_allclose(found, wanted, rtol=1e-6)
            np.testing.assert_allclose(mode(jax.vmap(f))(xs), jax.vmap(by_hand)(xs), rtol=1e-6)


class Named(extend.Address):
    """The innermost open `Counter` of a name."""

    __slots__ = ("name",)
    threaded = True

    def __init__(self, name):
        self.name = name

    def __eq__(self, other):
        return type(other) is Named and other.name == self.name

    def __hash__(self):
        return hash(self.name)

    def missing(self):
        return LookupError(f"no counter {self.name!r} is open")


class Counter(extend.Holder):
    """A number; in a vmap every lane has its own, which starts at zero and ends with the lane."""

    def __init__(self, name):
        super().__init__()
        self.address, self.counted = Named(name), extend.Cell(jnp.int32(0))

    def knows(self, address):
        return address == self.address

    def cell(self, address):
        return self.counted

    def lane(self, address, trace, notes):
        return notes.setdefault(self, extend.Lane(jnp.int32(0), None))

    def signature(self):
        return "counter", self.address


def count(name, by=1):
    now = extend.read_at(Named(name)) + by
    extend.write_at(Named(name), now)
    return now


def test_a_kind_of_state_of_ones_own_goes_through_transformations_and_has_lanes():
    def program(xs):
        def body(i, x):
            count("outer", 2)
            return x + count("inner")

        y = jax.jit(lambda x: jax.lax.fori_loop(0, 3, body, x))(jnp.int32(0))
        lanes = jax.vmap(lambda x: x * count("inner", x))(xs)
        slope = jax.grad(lambda x: x * jax.checkpoint(lambda: count("inner"))().astype(float))(1.0)
        return y, lanes, slope

    for f in (program, jax.jit(program)):
        outer, inner, shadowed = Counter("outer"), Counter("inner"), Counter("inner")
        with (
            extend.open_holder(outer),
            extend.open_holder(shadowed),
            extend.open_holder(inner),
        ):
            y, lanes, slope = f(jnp.arange(1, 4))
            assert [h is inner for h in extend.holders()] == [True, False, False]
        assert (int(y), int(slope)) == (1 + 2 + 3, 4)
        assert lanes.tolist() == [1, 4, 9]
        assert [int(h.counted.value) for h in (outer, inner, shadowed)] == [6, 4, 0]
    with pytest.raises(LookupError, match="no counter 'outer' is open"):
        count("outer")
