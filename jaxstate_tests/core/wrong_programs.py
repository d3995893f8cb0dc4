"""Programs that are wrong, and the same programs as the messages of their errors mend them."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxstate
from jaxstate import errors
from jaxstate.extend import StatefulTrace, new_slot, new_trace, read, write

normal = jax.nn.initializers.normal()
KEY = jax.random.key(0)


def draw(x=None):
    return jaxstate.random.uniform()


def missing_stream():
    with jaxstate.rng_stream(KEY, "dropout"):
        jax.jit(lambda: jaxstate.next_key("dropuot"))()


def mended_missing_stream():
    with jaxstate.rng_stream(KEY, "dropout"):
        jax.jit(lambda: jaxstate.next_key("dropout"))()


def closed_stream():
    with jaxstate.rng_stream(KEY) as stream:
        stream.next_key()
    stream.next_key()


def mended_closed_stream():
    with jaxstate.rng_stream(KEY) as stream:
        stream.next_key()
    with jaxstate.rng_stream(stream.key, count=stream.count) as stream:
        stream.next_key()
        assert stream.count == 2


def lanes_share_a_count():
    with jaxstate.rng_stream(KEY, vmap="share"):
        jax.vmap(lambda p: jax.lax.cond(p, draw, lambda: 0.0))(jnp.array([True, False]))


def mended_lanes_share_a_count():
    with jaxstate.rng_stream(KEY, vmap="split"):
        jax.vmap(lambda p: jax.lax.cond(p, draw, lambda: 0.0))(jnp.array([True, False]))


def split_under_jacfwd():
    with jaxstate.rng_stream(KEY):
        jax.hessian(lambda x: (x**2).sum() * draw())(jnp.ones(2))


def mended_split_under_jacfwd():
    with jaxstate.rng_stream(KEY, vmap="share"):
        jax.hessian(lambda x: (x**2).sum() * draw())(jnp.ones(2))


def param_outside():
    jaxstate.param("w", normal, ())


def mended_param_outside():
    net = jaxstate.parametrized(lambda: jaxstate.param("w", normal, ()))
    net.apply(net.init(KEY))


def weight(x):
    return x * jaxstate.param("weight", normal, (3,))


net = jaxstate.parametrized(weight)
jitted = jaxstate.parametrized(jax.jit(weight))
first, second = jaxstate.parametrized(weight), jaxstate.parametrized(weight)
pair = jaxstate.parametrized(lambda x: second(first(x)), name="pair")


def missing_parameter():
    net.apply({"wieght": jnp.ones(3)}, 1.0)


def missing_parameter_jitted():
    jitted.apply({"wieght": jnp.ones(3)}, 1.0)


def wrong_shape():
    net.apply({"weight": jnp.ones(4)}, 1.0)


def wrong_shape_jitted():
    jitted.apply({"weight": jnp.ones(4)}, 1.0)


def a_dict_for_an_array():
    net.apply({"weight": {"a": jnp.ones(3)}}, 1.0)


def mended_parameters():
    net.apply(net.init(KEY, 1.0), 1.0)


def conflict():
    def f(x):
        jaxstate.param("w", normal, (2,))
        return jax.jit(lambda: jaxstate.param("w", normal, (3,)))()

    jaxstate.parametrized(f).init(KEY, 1.0)


def mended_conflict():
    def f(x):
        jaxstate.param("w", normal, (2,))
        with jaxstate.scope("second"):
            return jax.jit(lambda: jaxstate.param("w", normal, (3,)))()

    jaxstate.parametrized(f).init(KEY, 1.0)


def clash():
    def f(x):
        with jaxstate.scope("a"):
            jaxstate.param("w", normal, ())
        return jaxstate.param("a", normal, ())

    jaxstate.parametrized(f).init(KEY, 1.0)


def mended_clash():
    def f(x):
        with jaxstate.scope("a_part"):
            jaxstate.param("w", normal, ())
        return jaxstate.param("a", normal, ())

    jaxstate.parametrized(f).init(KEY, 1.0)


def data_from_a_loop():
    def f(xs):
        def body(c, x):
            return c + x * jaxstate.param("s", lambda key: x), None

        return jax.lax.scan(body, 0.0, xs)[0]

    jaxstate.parametrized(f).init(KEY, jnp.ones(3))


def mended_data_from_a_loop():
    def f(xs):
        def body(c, x):
            return c + x * jaxstate.param("s", lambda key: xs[0]), None

        return jax.lax.scan(body, 0.0, xs)[0]

    assert jaxstate.parametrized(f).init(KEY, jnp.ones(3)) == {"s": 1.0}


def initializer_draws():
    jaxstate.parametrized(lambda: jaxstate.param("s", lambda key: draw())).init(KEY)


def mended_initializer_draws():
    jaxstate.parametrized(lambda: jaxstate.param("s", jax.random.uniform)).init(KEY)


def lanes_write():
    slot = new_slot(0.0)
    jax.vmap(lambda x: write(slot, x))(jnp.arange(3.0))


def mended_lanes_write():
    slot = new_slot(0.0)
    write(slot, jax.vmap(lambda x: x)(jnp.arange(3.0)).mean())


def slot_type():
    slot = new_slot(0.0)
    jax.lax.fori_loop(0, 3, lambda i, _: write(slot, i), None)


def mended_slot_type():
    slot = new_slot(0.0)
    jax.lax.fori_loop(0, 3, lambda i, _: write(slot, i.astype(jnp.float32)), None)


def slot_of_an_ended_function():
    slots = []

    @jax.jit
    def f(x):
        slots.append(new_slot(x))

    f(1.0)
    read(slots[0])


def mended_slot_of_an_ended_function():
    slot = new_slot(0.0)
    jax.jit(lambda x: write(slot, x))(1.0)
    assert read(slot) == 1.0


def no_rule():
    @jax.custom_batching.sequential_vmap
    def f(x):
        return x + draw()

    with jaxstate.rng_stream(KEY):
        jax.jit(jax.vmap(f))(jnp.ones(2))


def mended_no_rule():
    @jax.custom_batching.sequential_vmap
    def f(x, u):
        return x + u

    with jaxstate.rng_stream(KEY):
        jax.jit(lambda x: f(x, draw()))(1.0)


def ahead_of_time():
    with jaxstate.rng_stream(KEY):
        jax.jit(draw).lower()


def mended_ahead_of_time():
    def inside(key):
        with jaxstate.rng_stream(key):
            return draw()

    jax.jit(inside).lower(KEY).compile()(KEY)


def on_a_device(f):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(1))


def devices_write():
    slot = new_slot(0.0, name="total")
    on_a_device(lambda x: (write(slot, x.sum()), x)[1])


def mended_devices_write():
    slot = new_slot(0.0, name="total")
    on_a_device(lambda x: (write(slot, jax.lax.pmean(x.sum(), "d")), x)[1])
    assert read(slot) == 1.0


def differentiates_a_converted_closure(read):
    @jaxstate.inplace
    def run(x):
        f, consts = jax.closure_convert(read(x), 1.0)
        x[0] = 2.0
        return jax.grad(lambda consts: f(1.0, *consts))(consts)

    run(jnp.ones(2))


def drawn_on_the_host():
    def draw_on_the_host():
        return np.asarray(jax.random.key_data(jaxstate.next_key()))

    @jax.jit
    def f():
        y = jax.pure_callback(draw_on_the_host, jax.ShapeDtypeStruct((2,), jnp.uint32))
        return y, draw()

    with jaxstate.rng_stream(KEY):
        f()


def mended_drawn_on_the_host():
    @jax.jit
    def f():
        key = jax.random.key_data(jaxstate.next_key())
        y = jax.pure_callback(np.asarray, jax.ShapeDtypeStruct((2,), jnp.uint32), key)
        return y, draw()

    with jaxstate.rng_stream(KEY) as stream:
        f()
        assert stream.count == 2


def operand_was_written():
    differentiates_a_converted_closure(lambda x: lambda t: t * x.sum())


def mended_operand_was_written():
    def read(x):
        y = x.copy()
        return lambda t: t * y.sum()

    differentiates_a_converted_closure(read)


def rule_has_no_derivative():
    @jax.custom_jvp
    def f(x):
        return x * jaxstate.param("w", normal, ())

    f.defjvp(lambda p, t: (f(*p), t[0]))
    net = jaxstate.parametrized(f)
    jax.grad(lambda p: net.apply(p, 1.0))(net.init(KEY, 1.0))


def mended_rule_has_no_derivative():
    @jax.custom_jvp
    def f(x, w):
        return x * w

    f.defjvp(lambda p, t: (f(*p), t[0] + t[1]))
    net = jaxstate.parametrized(lambda x: f(x, jaxstate.param("w", normal, ())))
    jax.grad(lambda p: net.apply(p, 1.0))(net.init(KEY, 1.0))


class CountSines(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        if primitive.name == "sin":
            self.state["sines"] += 1
        return super().process_primitive(primitive, args, params)


def state_of_a_trace_in_jit():
    with new_trace(CountSines, state={"sines": jnp.int32(0)}) as trace:
        jax.jit(lambda x: jnp.sin(x) * trace.state["sines"])(1.0)


def mended_state_of_a_trace_in_jit():
    with new_trace(CountSines, state={"sines": jnp.int32(0)}) as trace:
        assert jax.jit(jnp.sin)(1.0) * trace.state["sines"] == jnp.sin(1.0)


def static_state_in_a_loop():
    with new_trace(CountSines, state={"sines": 0}):
        jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), 1.0)


def mended_static_state_in_a_loop():
    with new_trace(CountSines, state={"sines": jnp.int32(0)}) as trace:
        jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x), 1.0)
    assert trace.state["sines"] == 3


class SinesInAnAttribute(StatefulTrace):
    sines = 0

    def process_primitive(self, primitive, args, params):
        self.sines += primitive.name == "sin"
        return super().process_primitive(primitive, args, params)


def attribute_of_a_trace_in_jit():
    with new_trace(SinesInAnAttribute):
        jax.jit(jnp.sin)(1.0)


def counting(**options):
    def counting(xs):
        n = jaxstate.variable("n", jnp.zeros, (), **options)

        def lane(x):
            n.value = n.value + x

        jax.vmap(lane)(xs)

    return jaxstate.parametrized(counting)


def reading(x):
    return x * jaxstate.variable("factor", jnp.ones, ()).value


def no_state():
    jaxstate.parametrized(jax.jit(reading)).apply({}, 1.0)


def mended_no_state():
    net = jaxstate.parametrized(jax.jit(reading))
    params, state = net.init_with_state(KEY, 1.0)
    net.apply(params, 1.0, state=state)


def wrong_state():
    jaxstate.parametrized(reading).apply({}, 1.0, state={"factor": jnp.ones(3)})


def variables_conflict():
    def f(x):
        jaxstate.variable("v", jnp.zeros, (2,))
        jax.jit(lambda: jaxstate.variable("v", jnp.zeros, (3,)).value)()

    jaxstate.parametrized(f).init_with_state(KEY, 1.0)


def mended_variables_conflict():
    def f(x):
        jaxstate.variable("v", jnp.zeros, (2,))
        jax.jit(lambda: jaxstate.variable("v_2", jnp.zeros, (3,)).value)()

    jaxstate.parametrized(f).init_with_state(KEY, 1.0)


def written_under_apply():
    counting(reduce=jnp.mean).apply({}, jnp.ones(3), state={"n": 0.0})


def mended_written_under_apply():
    _, state = counting(reduce=jnp.mean).apply_with_state({}, {"n": 0.0}, jnp.arange(3.0))
    assert state == {"n": 1.0}


def lanes_write_a_variable():
    counting().apply_with_state({}, {"n": 0.0}, jnp.arange(3.0))


def sow_twice_as(mode):
    def f(x):
        for _ in range(2):
            x = jaxstate.sow("h", 2 * x, mode=mode)
        return x

    return jaxstate.reap(jax.jit(f))(1.0)[1]


def sown_twice():
    sow_twice_as("strict")


def mended_sown_twice():
    assert sow_twice_as("append")["h"].tolist() == [2.0, 4.0]
    assert sow_twice_as("clobber")["h"] == 4.0


def sow_in_loop(loop, mode):
    def body(i, x):
        return jaxstate.sow("h", 2 * x, mode=mode)

    return jaxstate.reap(lambda x: loop(body, x))(1.0)[1]


def scanned(body, x):
    return jax.lax.fori_loop(0, 2, body, x)


def while_loop(body, x):
    return jax.lax.while_loop(lambda x: x < 4.0, lambda x: body(0, x), x)


def sown_in_a_scan():
    sow_in_loop(scanned, "strict")


def mended_sown_in_a_scan():
    assert sow_in_loop(scanned, "append")["h"].tolist() == [2.0, 4.0]


def appended_in_a_while_loop():
    sow_in_loop(while_loop, "append")


def mended_appended_in_a_while_loop():
    assert sow_in_loop(while_loop, "clobber")["h"] == 4.0


def sow_in_branch(mode, x=1.0):
    def positive(x):
        return jaxstate.sow("h", 2 * x, mode=mode)

    return jaxstate.reap(lambda x: jax.lax.cond(x > 0, positive, lambda x: x, x))(x)[1]


def sown_in_one_branch():
    sow_in_branch("clobber")


def mended_sown_in_one_branch():
    assert sow_in_branch("cond_clobber")["h"] == 2.0
    assert sow_in_branch("cond_clobber", -1.0)["h"] == 0.0


def sown_with_two_types():
    @jaxstate.reap
    def f(x):
        jaxstate.sow("h", x, mode="clobber")
        jax.jit(lambda: jaxstate.sow("h", {"a": x}, mode="clobber"))()

    f(1.0)


def sown_with_two_modes():
    @jaxstate.reap
    def f(x):
        jaxstate.sow("h", x, mode="clobber")
        jaxstate.sow("h", x, mode="append")

    f(1.0)


def mended_sown_with_two_types():
    @jaxstate.reap
    def f(x):
        jaxstate.sow("h", x, mode="clobber")
        jaxstate.sow("h_1", {"a": x})

    assert f(1.0)[1] == {"h": 1.0, "h_1": {"a": 1.0}}


def planted(value, times=1):
    def f(x):
        for _ in range(times):
            x = jaxstate.sow("h", 2 * x, mode="append")
        return x

    return jaxstate.plant(f)({"h": value}, jnp.ones(3))


def planted_of_another_shape():
    planted(jnp.ones(4))


def planted_of_another_structure():
    planted([jnp.ones(3)])


def planted_of_another_dtype():
    planted(jnp.ones(3, jnp.int32))


def planted_too_few():
    planted(jnp.ones((2, 3)), times=3)


def planted_too_many():
    planted(jnp.ones((4, 3)), times=3)


def mended_planted():
    assert planted(np.full(3, 5.0)).tolist() == [5.0, 5.0, 5.0]
    assert planted(jnp.arange(9.0).reshape(3, 3), times=3).tolist() == [6.0, 7.0, 8.0]


@jaxstate.inplace
def write_by_mask(x):
    x[x > 0] = jnp.ones(2)


@jaxstate.inplace
def mended_write_by_mask(x):
    x[jnp.nonzero(x > 0, size=2)] = jnp.ones(2)


def vector_by_traced_mask():
    jax.jit(write_by_mask)(jnp.arange(3.0))


def mended_vector_by_traced_mask():
    jax.jit(mended_write_by_mask)(jnp.arange(3.0))


def uncovered():
    pair.parameters_from({first: {"weight": jnp.ones(3)}}, 1.0)


def mended_uncovered():
    pair.init(KEY, 1.0, reuse={first: {"weight": jnp.ones(3)}})


def unused_reuse():
    pair.init(KEY, 1.0, reuse={net: {"weight": jnp.ones(3)}})


def mended_unused_reuse():
    pair.init(KEY, 1.0, reuse={second: {"weight": jnp.ones(3)}})


def structure_in_a_loop():
    jaxstate.mutate(lambda tree: jax.lax.fori_loop(0, 3, lambda i, _: tree.update(new=i), None))({})


def mended_structure_in_a_loop():
    def f(tree):
        tree["new"] = 0
        jax.lax.fori_loop(0, 3, lambda i, _: tree.update(new=i), None)

    assert jaxstate.mutate(f)({})[1]["new"] == 2


def add_one(tree):
    tree["x"] = tree["x"] + 1


def a_lane_is_a_copy():
    jaxstate.mutate(jax.vmap(add_one))({"x": jnp.zeros(3)})


def mended_a_lane_is_a_copy():
    assert jax.vmap(jaxstate.mutate(add_one))({"x": jnp.zeros(3)})[1]["x"].sum() == 3


def a_part_of_a_part():
    jaxstate.mutate(lambda tree: add_one(tree["part"]), deep=False)({"part": {"x": jnp.zeros(3)}})


def mended_a_part_of_a_part():
    _, new = jaxstate.mutate(add_one, deep=False)({"x": jnp.zeros(3)})
    assert new["x"].sum() == 3


def a_sequence_that_is_not_causal(shift=0):
    jaxstate.causal_fixed_point(lambda x: 1 + jnp.pad(x, (shift, 0))[: len(x)], jnp.zeros(3))


def mended_a_sequence_that_is_not_causal():
    a_sequence_that_is_not_causal(shift=1)


CATALOGUE = [
    (errors.MaskedWriteError, vector_by_traced_mask, mended_vector_by_traced_mask,
     "shape \\(3,\\)"),
    (errors.MissingStreamError, missing_stream, mended_missing_stream,
     r"'dropuot', and no stream of that name is open. Did you mean 'dropout'?"),
    (errors.ClosedStateError, closed_stream, mended_closed_stream, "after its 'with' block ended"),
    (errors.ClosedStateError, slot_of_an_ended_function, mended_slot_of_an_ended_function,
     "made inside a transformed function that has ended"),
    (errors.LaneWriteError, lanes_share_a_count, mended_lanes_share_a_count,
     "drew from random stream 'default' a different number of times"),
    (errors.SplitStreamError, split_under_jacfwd, mended_split_under_jacfwd, 'vmap="share"'),
    (errors.MissingStoreError, param_outside, mended_param_outside, "outside init and apply"),
    (errors.MissingParameterError, missing_parameter, mended_parameters,
     "no parameter 'weight'.* The nearest name is 'wieght'.*wanted: float32\\[3\\]"),
    (errors.MissingParameterError, missing_parameter_jitted, mended_parameters,
     "no parameter 'weight'.* The nearest name is 'wieght'.*wanted: float32\\[3\\]"),
    (errors.ParameterMismatchError, wrong_shape, mended_parameters,
     "'weight' is float32\\[4\\], and the function wants float32\\[3\\]"),
    (errors.ParameterMismatchError, wrong_shape_jitted, mended_parameters,
     "'weight' is float32\\[4\\], and the function wants float32\\[3\\]"),
    (errors.ParameterMismatchError, a_dict_for_an_array, mended_parameters,
     "'weight' is \\{'a': float32\\[3\\]\\}, and the function wants float32\\[3\\]"),
    (errors.MissingVariableError, no_state, mended_no_state, "'factor' was used, and apply was"),
    (errors.VariableMismatchError, wrong_state, mended_no_state,
     "'factor' is float32\\[3\\], and the function wants float32\\[\\]"),
    (errors.VariableConflictError, variables_conflict, mended_variables_conflict,
     "'v' is used twice, as float32\\[2\\] and as float32\\[3\\].*made: .*used: "),
    (errors.ReadOnlyVariableError, written_under_apply, mended_written_under_apply,
     "'n' was written under apply"),
    (errors.LaneWriteError, lanes_write_a_variable, mended_written_under_apply,
     "into variable 'n', which they share.*reduce=jnp.mean"),
    (errors.ParameterConflictError, conflict, mended_conflict,
     "'w' is used twice, as float32\\[2\\] and as float32\\[3\\].*made: .*used: "),
    (errors.NameClashError, clash, mended_clash, "'a' is a scope opened by hand already"),
    (errors.InitializerDataError, data_from_a_loop, mended_data_from_a_loop, "out of a loop"),
    (errors.InitializerDataError, initializer_draws, mended_initializer_draws, "uses state"),
    (errors.LaneWriteError, lanes_write, mended_lanes_write, "vmap over 3 lanes"),
    (errors.SlotTypeError, slot_type, mended_slot_type,
     "has type float32\\[\\], and was written with one of type int32\\[\\]"),
    (errors.UnsupportedPrimitiveError, no_rule, mended_no_rule, "custom_vmap_call"),
    (errors.AheadOfTimeError, ahead_of_time, mended_ahead_of_time, "compiled ahead of time"),
    (errors.HostCallbackError, drawn_on_the_host, mended_drawn_on_the_host,
     "count of random stream 'default'.* was changed while a compiled call"),
    (errors.DeviceWriteError, devices_write, mended_devices_write, "slot 'total'.*mesh axes d"),
    (errors.CustomRuleStateError, rule_has_no_derivative, mended_rule_has_no_derivative,
     "parameter 'w', and is differentiated with respect to it"),
    (errors.ConvertedClosureError, operand_was_written, mended_operand_was_written,
     "a writable array was written since"),
    (errors.TraceStateError, state_of_a_trace_in_jit, mended_state_of_a_trace_in_jit,
     "a CountSines was used inside a function that JAX is transforming"),
    (errors.TraceStateError, static_state_in_a_loop, mended_static_state_in_a_loop,
     "is {'sines': 0} before a scan and {'sines': 1} after it"),
    (errors.TraceStateError, attribute_of_a_trace_in_jit, mended_static_state_in_a_loop,
     "SinesInAnAttribute.sines was assigned while the trace was inside"),


    (errors.RepeatedSowError, sown_twice, mended_sown_twice,
     "'h' was sown twice with mode='strict'.*made: .*again: "),
    (errors.RepeatedSowError, sown_in_a_scan, mended_sown_in_a_scan,
     "mode='strict' in a loop.*mode=\"append\""),
    (errors.RepeatedSowError, appended_in_a_while_loop, mended_appended_in_a_while_loop,
     "mode='append' in a while_loop.*mode=\"clobber\""),
    (errors.BranchSowError, sown_in_one_branch, mended_sown_in_one_branch,
     "'h' was sown with mode='clobber' as float32\\[\\] in one branch"),
    (errors.SowMismatchError, sown_with_two_types, mended_sown_with_two_types,
     "'h' was sown as float32\\[\\] and as {'a': float32\\[\\]}"),
    (errors.SowMismatchError, sown_with_two_modes, mended_sown_with_two_types,
     "with mode='clobber' and with mode='append'"),
    (errors.PlantMismatchError, planted_of_another_shape, mended_planted,
     "planted as 'h' is float32\\[4\\], and what is sown there is float32\\[3\\]"),
    (errors.PlantMismatchError, planted_of_another_structure, mended_planted,
     "planted as 'h' is \\[float32\\[3\\]\\], and"),
    (errors.PlantMismatchError, planted_of_another_dtype, mended_planted, "'h' is int32\\[3\\]"),
    (errors.PlantMismatchError, planted_too_few, mended_planted,
     "sown at least 3 times .*a value of shape \\(2, 3\\) was planted"),
    (errors.PlantMismatchError, planted_too_many, mended_planted,
     "sown 3 times .*a value of shape \\(4, 3\\) was planted"),
    (errors.UncoveredParameterError, uncovered, mended_uncovered,
     r"nothing for 1 of the parameters of 'pair': 'weight_1/weight' \(float32\[3\]\)"),
    (errors.StructureChangeError, structure_in_a_loop, mended_structure_in_a_loop,
     r"structure of tree\['new'\] was changed inside a loop"),
    (errors.CopyWriteError, a_lane_is_a_copy, mended_a_lane_is_a_copy,
     r"tree\['x'\].*is a copy.*jax.vmap\(jaxstate.mutate"),
    (errors.FrozenPartError, a_part_of_a_part, mended_a_part_of_a_part,
     r"tree\['part'\]\['x'\] was assigned.*deep=False"),
    (errors.UnusedReuseError, unused_reuse, mended_unused_reuse,
     "nothing in common with 'pair'"),
    (errors.NotCausalError, a_sequence_that_is_not_causal, mended_a_sequence_that_is_not_causal,
     r"f\(x\)\[0\] depends on x\[0\]"),
]  # fmt: skip
