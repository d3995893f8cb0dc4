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
        n_consts = len(args) - len(params["jaxpr"].out_avals)
        loop = extend.discharged_loop(params["jaxpr"], args, n_consts)
        return loop.results(twice_p.bind(*loop.operands, jaxpr=loop.jaxpr))

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


def foreign(name, times):
    """A primitive that runs a jaxpr so many times, (constants, carry) -> carry, with a rule.

    Returns a function that builds the jaxpr of a function, and one that binds it.
    """
    p = jax.extend.core.Primitive(name)
    p.multiple_results = True

    def run(*args, jaxpr):
        n_consts = len(args) - len(jaxpr.out_avals)
        consts, carry = args[:n_consts], args[n_consts:]
        for _ in range(times):
            carry = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *consts, *carry)
        return carry

    p.def_impl(run)
    p.def_effectful_abstract_eval(lambda *_, jaxpr: (list(jaxpr.out_avals), jaxpr.effects))
    jax.interpreters.mlir.register_lowering(
        p, jax.interpreters.mlir.lower_fun(run, multiple_results=True)
    )

    @extend.register_rule(p)
    def rule(args, params):
        if times == 1:
            call = extend.discharged_call(params["jaxpr"], args)
        else:
            n_consts = len(args) - len(params["jaxpr"].out_avals)
            call = extend.discharged_loop(params["jaxpr"], args, n_consts)
        outs = p.bind(*call.operands, jaxpr=call.jaxpr)
        if times == 1:
            return call.results(outs)
        assert call.n_consts == len(call.operands) - len(call.jaxpr.out_avals)
        return call.results(outs)

    def build(f, x):
        traced = jax.make_jaxpr(f)(x)

        def explicit(consts, x):
            return jax.core.eval_jaxpr(traced.jaxpr, consts, x)

        return traced.consts, jax.make_jaxpr(explicit)(traced.consts, x)

    def bind(consts, jaxpr, x):
        return p.bind(*consts, x, jaxpr=jaxpr)[0]

    return build, bind


FOREIGN = {n: foreign(f"foreign_{n}", n) for n in (1, 3)}
RUN = {"eagerly": lambda f: f, "jit": jax.jit}


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("times", FOREIGN)
def test_a_foreign_primitive_reads_arrays_as_they_are_when_it_is_bound(times, run):
    build, bind = FOREIGN[times]

    def f(a, x, writes):
        def body(y):
            if writes:
                a[1] += a[0]
            return y + a[0] * a[1]

        consts, jaxpr = build(body, x)
        a[0] = 10.0
        return bind(consts, jaxpr, x), a

    def by_hand(a, x, writes):
        a = np.array(a)
        a[0] = 10.0
        for _ in range(times):
            if writes:
                a[1] += a[0]
            x = x + a[0] * a[1]
        return x, a

    for writes in (False, True):
        inplace = jaxstate.inplace(lambda a, x, w=writes: f(a, x, w))
        found = RUN[run](inplace)(jnp.array([2.0, 0.5]), jnp.float32(1.0))
        wanted = by_hand([2.0, 0.5], 1.0, writes)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("run", RUN)
@pytest.mark.parametrize("times", FOREIGN)
def test_a_foreign_primitive_with_parameters_that_look_at_data(times, run, key):
    build, bind = FOREIGN[times]

    @jaxstate.parametrized
    def net(x, data):
        def body(y):
            w = jaxstate.param("w", lambda key: 2 * data)
            steps = jaxstate.variable("steps", jnp.zeros, (), jnp.int32)
            steps.value += 1
            return y * w + jaxstate.random.normal()

        return bind(*build(body, x), x)

    x, data = jnp.float32(1.5), jnp.float32(3.0)
    params, state = RUN[run](net.init_with_state)(key, x, data)
    assert (params, state) == ({"w": 6.0}, {"steps": 0})
    found, state = RUN[run](lambda *args: net.apply_with_state(*args, key=key))(
        params, state, x, data
    )
    for i in range(times):
        x = x * 6.0 + jax.random.normal(jax.random.fold_in(key, i))
    np.testing.assert_allclose(found, x, rtol=1e-6)
    assert state == {"steps": times}


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
