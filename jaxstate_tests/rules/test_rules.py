"""The rest of JAX: ahead-of-time compilation, kept jaxprs and pullbacks, and the small wrappers.

Every reference is the same program with its keys folded by hand.
"""

import importlib.util

import jax
import jax.experimental
import jax.export
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

import jaxstate
from jaxstate.extend import new_slot, read, write

ones = jax.nn.initializers.ones


def u(key, *counts):
    """The uniform number that the stream of ``key`` gives at the count (in a lane: counts)."""
    for n in counts:
        key = jax.random.fold_in(key, n)
    return jax.random.uniform(key)


def add_draw(x):
    return x + jaxstate.random.uniform()


def three_draws(x):
    return jax.lax.scan(lambda c, _: (c * add_draw(c), None), x, None, length=3)[0]


def three_draws_by_hand(key, x, first=0):
    for n in range(first, first + 3):
        x = x * (x + u(key, n))
    return x


# -- Ahead of time ---------------------------------------------------------------------------

AHEAD = {
    "lower": lambda f, *args: jax.jit(f).lower(*args).compile(),
    "trace": lambda f, *args: jax.jit(f).trace(*args).lower().compile(),
    "nested": lambda f, *args: jax.jit(jax.jit(f)).lower(*args).compile(),
    "export": lambda f, *args: jax.export.export(jax.jit(f))(*args).call,
}


@pytest.mark.parametrize("way", AHEAD)
def test_state_opened_inside_is_compiled_ahead_of_time(key, way):
    net = jaxstate.parametrized(lambda x: add_draw(x * jaxstate.param("w", ones, ())), name="net")

    def f(params, key_data, x):
        return net.apply(params, x, key=jax.random.wrap_key_data(key_data))

    args = {"w": jnp.float32(3.0)}, jax.random.key_data(key), jnp.float32(2.0)
    compiled = AHEAD[way](f, *args)
    np.testing.assert_allclose(compiled(*args), 6 + u(key, 0), rtol=1e-6)
    with jaxstate.rng_stream(key) as stream:
        np.testing.assert_allclose(compiled(*args), 6 + u(key, 0), rtol=1e-6)
        assert stream.count == 0
    init = AHEAD[way](lambda data, x: net.init(jax.random.wrap_key_data(data), x), *args[1:])
    assert init(*args[1:]) == {"w": 1.0}


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize("way", AHEAD)
def test_state_opened_outside_is_refused_ahead_of_time(key, way):
    slot = new_slot(1.0, name="total")
    x = jnp.float32(2.0)
    with jaxstate.rng_stream(key) as stream:
        with pytest.raises(jaxstate.AheadOfTimeError, match="random stream 'default'"):
            AHEAD[way](add_draw, x)
        assert stream.count == 0
    for f in (lambda x: write(slot, x), lambda x: x * read(slot)):
        with pytest.raises(jaxstate.AheadOfTimeError, match="slot 'total'"):
            AHEAD[way](f, x)

    def inside(x):
        AHEAD[way](lambda x: x * jaxstate.param("w", ones, ()), x)
        return x

    net = jaxstate.parametrized(inside, name="net")
    with pytest.raises(jaxstate.AheadOfTimeError, match="parameter 'w'"):
        net.apply({"w": 1.0}, x)


def test_eval_shape_moves_nothing(key):
    with jaxstate.rng_stream(key) as stream:
        assert jax.eval_shape(three_draws, jnp.float32(1.0)).shape == ()
        assert stream.count == 0


# -- What is kept and used later -------------------------------------------------------------


def test_a_kept_jaxpr_uses_the_state_that_is_open_where_it_is_evaluated(key):
    with jaxstate.rng_stream(jax.random.key(7)) as stream:
        closed = jax.make_jaxpr(three_draws)(0.5)
        assert stream.count == 0

    def run(x):
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0]

    identity = lambda f: f  # noqa: E731
    for transform in (identity, jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f))):
        with jaxstate.rng_stream(key) as stream:
            found = transform(run)(0.5)
            assert stream.count == 3
        wanted = transform(lambda x: three_draws_by_hand(key, x))(0.5)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    with jaxstate.rng_stream(key, count=4) as stream:
        found = jax.extend.core.jaxpr_as_fun(closed)(0.5)[0]
        np.testing.assert_allclose(found, three_draws_by_hand(key, 0.5, 4), rtol=1e-6)


@pytest.mark.parametrize("mode", [lambda f: f, jax.jit])
def test_pullbacks_and_linear_maps_are_used_twice_and_after_the_stream_has_closed(key, mode):
    with jaxstate.rng_stream(key) as stream:
        y, pull = jax.vjp(mode(three_draws), 0.5)
        y2, push = jax.linearize(mode(three_draws), 0.5)
        inside = pull(1.0)[0], push(1.0)
        assert stream.count == 6
    for found, first, derivatives in ((y, 0, (pull(1.0)[0], inside[0], pull(1.0)[0])),
                                      (y2, 3, (push(1.0), inside[1], push(1.0)))):  # fmt: skip
        wanted, slope = jax.value_and_grad(three_draws_by_hand, 1)(key, 0.5, first)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        np.testing.assert_allclose(derivatives, [slope] * 3, rtol=1e-6)


@pytest.mark.parametrize("mode", [lambda f: f, jax.jit])
def test_pullbacks_and_linear_maps_stay_when_the_state_changes(mode):
    """They are those of the state at the time of the function, also if it is written since."""
    slot = new_slot(2.0)

    def f(x):
        v = jaxstate.variable("v", jnp.ones, ())
        w = jaxstate.param("w", ones, ())
        v.value = v.value * x
        write(slot, read(slot) + x)
        return w * v.value * read(slot) * x

    def by_hand(x, w, v, s):
        return w * (v * x) * (s + x) * x

    @jaxstate.parametrized
    def net(x):
        maps = []
        for _ in range(2):
            y, pull = jax.vjp(mode(f), x)
            z, push = jax.linearize(mode(f), x)
            maps.append((y, z, pull, push))
        write(slot, 100.0)
        jaxstate.variable("v", jnp.ones, ()).value = jnp.float32(7)
        twice = [(pull(2.0)[0], pull(1.0)[0], push(2.0), push(1.0)) for *_, pull, push in maps]
        return [pair[:2] for pair in maps], twice

    x, w, v, s = 1.5, 3.0, 0.5, 2.0
    values, derivatives = [], []
    for _ in range(4):
        y, slope = jax.value_and_grad(by_hand)(x, w, v, s)
        values.append(y)
        derivatives += [2 * slope, slope]
        v, s = v * x, s + x
    (found, twice), state = net.apply_with_state({"w": w}, {"v": 0.5}, x)
    np.testing.assert_allclose(np.ravel(found), values, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(twice), derivatives, rtol=1e-6)
    assert state == {"v": 7.0} and read(slot) == 100.0


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_a_converted_closure_draws_where_it_is_called(key):
    with jaxstate.rng_stream(key) as stream:
        converted, consts = jax.closure_convert(add_draw, 1.0)
        assert stream.count == 0
        for n in range(2):
            np.testing.assert_allclose(converted(1.0, *consts), 1 + u(key, n), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(converted)(1.0, *consts), 1 + u(key, 2), rtol=1e-6)
    with pytest.raises(jaxstate.MissingStreamError):
        converted(1.0, *consts)


# -- custom_vmap -----------------------------------------------------------------------------


def with_vmap_rule(f, rule=None):
    g = jax.custom_batching.custom_vmap(lambda x: f(x))
    g.def_vmap(rule or (lambda size, batched, x: (100 * x, batched[0])))
    return g


def test_a_function_with_a_rule_for_lanes_draws_outside_of_a_vmap(key):
    def by_hand(x):
        return three_draws_by_hand(key, x)

    f = with_vmap_rule(three_draws)
    derivative = lambda f: lambda x: jax.jvp(f, (x,), (2.0,))[1]  # noqa: E731
    for transform in (lambda f: f, jax.jit, derivative, lambda f: jax.jit(derivative(f))):
        with jaxstate.rng_stream(key) as stream:
            found = transform(f)(0.5)
            assert stream.count == 3
        np.testing.assert_allclose(found, transform(by_hand)(0.5), rtol=1e-6)


def test_the_rule_for_lanes_is_called_as_it_was_written(key):
    """With the arguments of the function and no more, whatever the function reads."""
    slot = new_slot(5.0)

    def rule(size, batched, *args):
        (x,) = args
        assert size == 3 and batched == [True] and x.shape == (3,)
        return 100 * x, True

    def f(x):
        return x * read(slot) * jaxstate.param("w", ones, ())

    net = jaxstate.parametrized(lambda x: with_vmap_rule(f, rule)(x), name="net")
    params = {"w": 2.0}
    assert net.apply(params, 3.0) == 30.0
    assert jax.jit(net.apply)(params, 3.0) == 30.0
    x = jnp.arange(3.0)
    lanes = jax.vmap(net.apply, (None, 0))
    for run in (lanes, jax.jit(lanes), jax.vmap(jax.jit(net.apply), (None, 0))):
        np.testing.assert_allclose(run(params, x), 100 * x)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_the_rule_for_lanes_cannot_say_is_refused(key):
    x = jnp.arange(3.0)
    slot = new_slot(0.0)

    def writes_in_rule(size, batched, x):
        write(slot, 1.0)
        return x, True

    def draws_in_rule(size, batched, x):
        return x + jaxstate.random.uniform((size,)), True

    for f, match in (
        (with_vmap_rule(add_draw), "count of random stream 'default' is written"),
        (with_vmap_rule(lambda x: (write(slot, 1.0), x)[1]), "slot 'slot' is written"),
        (with_vmap_rule(lambda x: x, draws_in_rule), "A rule of custom_vmap uses"),
        (with_vmap_rule(lambda x: x, writes_in_rule), "A rule of custom_vmap uses"),
    ):
        for run in (jax.vmap(f), jax.jit(jax.vmap(f)), jax.vmap(jax.jit(f))):
            with jaxstate.rng_stream(key, vmap="share") as stream:
                with pytest.raises(jaxstate.UnsupportedPrimitiveError, match=match):
                    run(x)
                assert stream.count == 0
    assert read(slot) == 0.0


# -- Kernels ---------------------------------------------------------------------------------


def in_pallas(f):
    def kernel(x_ref, out_ref):
        out_ref[...] = f(x_ref[...])

    return lambda x: pallas.pallas_call(kernel, out_shape=x, interpret=True)(x)


def in_partitioning(f):
    from jax.experimental.custom_partitioning import custom_partitioning

    g = custom_partitioning(f)
    g.def_partition(
        partition=lambda *_: None,
        infer_sharding_from_operands=lambda *_: None,
        sharding_rule="i->i",
    )
    return g


KERNELS = {
    "reduce": lambda f: lambda x: jax.lax.reduce(x, 0.0, lambda a, b: f(a + b), (0,)),
    "reduce_window": lambda f: (
        lambda x: jax.lax.reduce_window(x, 0.0, lambda a, b: f(a + b), (2,), (1,), "VALID")
    ),
    "at[].apply": lambda f: lambda x: x.at[0].apply(f),
    "pallas_call": in_pallas,
    "custom_partitioning": in_partitioning,
}


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mode", [lambda f: f, jax.jit])
def test_state_in_a_kernel_is_refused(key, name, mode):
    x, slot = jnp.arange(4.0), new_slot(0.0)
    match = "reduction" if name in ("reduce", "reduce_window", "at[].apply") else "kernel|partition"

    def run(f):
        return mode(KERNELS[name](f))(x)

    with jaxstate.rng_stream(key) as stream:
        with pytest.raises(jaxstate.UnsupportedPrimitiveError, match=match):
            run(add_draw)
        assert stream.count == 0
        if name in ("reduce", "at[].apply"):
            run(lambda y: y + 1.0)  # no state: no error
    with pytest.raises(jaxstate.UnsupportedPrimitiveError, match=match):
        run(lambda y: (write(slot, 1.0), y)[1])
    assert read(slot) == 0.0
    net = jaxstate.parametrized(
        lambda: run(lambda y: y * jaxstate.param("w", ones, ())), name="net"
    )
    with pytest.raises(jaxstate.UnsupportedPrimitiveError, match=match):
        net.apply({"w": 2.0})


# -- Wrappers, modes, callbacks, refs --------------------------------------------------------


def compute_on(f):
    import jax.experimental.compute_on as module

    decorate = getattr(module, "compute_on2", module.compute_on)  # its name until jax 0.10
    space = jax.memory.Space.Device
    return decorate(f, compute_type="device_host", out_memory_spaces=space)


def named(f):
    def g(x):
        with jax.named_scope("inside"):
            return jax.named_call(f, name="call")(x)

    return g


def platform(f):
    return lambda x: jax.lax.platform_dependent(x, cpu=f, default=lambda x: 0 * x)


def grouped(f):
    import jax.experimental.scheduling_groups as module

    return module.scheduling_group("group")(f)


def ordered(**options):
    def wrap(f):
        import jax.experimental.overlap as module

        return module.program_order(f, **options)

    return wrap


WRAPPERS = {
    "compute_on": compute_on, "named_call": named, "platform_dependent": platform,
    "scheduling_group": grouped,
}  # fmt: skip
if importlib.util.find_spec("jax.experimental.overlap"):
    WRAPPERS |= {
        "program_order": ordered(enforce=True),
        "program_order, some arguments": ordered(enforce=False, exclude_argnames="x"),
    }


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_draws_like_the_function_in_it(key, name):
    wrapped = WRAPPERS[name](three_draws)
    for transform in (jax.jit, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        with jaxstate.rng_stream(key) as stream:
            found = transform(wrapped)(0.5)
            assert stream.count == 3
        wanted = transform(lambda x: three_draws_by_hand(key, x))(0.5)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def lane(key, *lanes):
    """The first uniform number of the streams of lanes of a vmap that draws first from ``key``."""
    return jnp.stack([u(jax.random.fold_in(key, 0), i, 0) for i in lanes])


def test_functions_made_of_vmap_draw_per_lane(key):
    x = jnp.arange(4.0)
    remainder = u(jax.random.fold_in(key, 1), 0, 0)
    for run, wanted, count in (
        (lambda x: jax.lax.map(add_draw, x, batch_size=3),
         x + jnp.append(lane(key, 0, 1, 2), remainder), 2),
        (jnp.vectorize(add_draw), x + lane(key, 0, 1, 2, 3), 1),
        (lambda x: jnp.piecewise(x, [x < 2], [add_draw, lambda x: x]),
         x + jnp.where(x < 2, lane(key, 0, 1, 2, 3), 0), 1),
    ):  # fmt: skip
        for mode in (lambda f: f, jax.jit):
            with jaxstate.rng_stream(key) as stream:
                np.testing.assert_allclose(mode(run)(x), wanted, rtol=1e-6)
                assert stream.count == count


def test_debugging_modes_change_nothing(key):
    wanted, slope = jax.value_and_grad(three_draws_by_hand, 1)(key, 0.5)
    for mode in (jax.disable_jit(), jax.debug_nans(True), jax.debug_key_reuse(True)):
        with mode:
            for transform, result in ((jax.jit, wanted), (lambda f: jax.grad(jax.jit(f)), slope)):
                with jaxstate.rng_stream(key) as stream:
                    np.testing.assert_allclose(transform(three_draws)(0.5), result, rtol=1e-6)
                    assert stream.count == 3
    with jax.enable_x64(True), jaxstate.rng_stream(key) as stream:
        assert jax.jit(three_draws)(jnp.float64(0.5)).dtype == jnp.float64
        assert stream.count == 3 and stream.count.dtype == jnp.int32


def test_a_combination_draws_as_often_as_an_associative_scan_calls_it(key):
    x, drawn = jnp.arange(5.0), []

    def by_hand(a, b):
        drawn.append(u(key, len(drawn)))
        return a * 0.5 + b + drawn[-1]

    def combine(a, b):
        return a * 0.5 + b + jaxstate.random.uniform()

    wanted = jax.lax.associative_scan(by_hand, x)
    for mode in (lambda f: f, jax.jit):
        with jaxstate.rng_stream(key) as stream:
            found = mode(lambda x: jax.lax.associative_scan(combine, x))(x)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
            assert stream.count == len(drawn)


def test_what_is_computed_at_compile_time_moves_the_state(key):
    """In a jitted function the state is not known when that is traced: JAX computes it later."""
    slot = new_slot(0.0)

    @jax.jit
    def f(x):
        with jax.ensure_compile_time_eval():
            write(slot, read(slot) + 1)
            w = jaxstate.param("w", ones, ()) * 2
            y = jaxstate.random.uniform()
        return w * x + y * read(slot)

    net = jaxstate.parametrized(lambda x: f(x), name="net")
    assert net.init(key, 1.0) == {"w": 1.0}
    with jaxstate.rng_stream(key) as stream:
        for n, w in enumerate((3.0, 4.0)):
            found = net.apply({"w": w}, 5.0)
            np.testing.assert_allclose(found, 10 * w + u(key, n) * (n + 1), rtol=1e-6)
            assert stream.count == read(slot) == n + 1
        with jax.ensure_compile_time_eval():
            np.testing.assert_allclose(jaxstate.random.uniform(), u(key, 2))


def test_nans_are_reported_and_leave_the_state_as_it_was(key):
    @jax.jit
    def f(x):
        return jnp.log(x) * jaxstate.random.uniform()

    with jax.debug_nans(True), jaxstate.rng_stream(key) as stream:
        with pytest.raises(FloatingPointError), jax.checking_leaks.func(False):
            f(-1.0)
        assert stream.count == 0
        np.testing.assert_allclose(f(2.0), jnp.log(2.0) * u(key, 0), rtol=1e-6)
        assert stream.count == 1


def test_debugging_modes_change_nothing_for_parameters_variables_and_lanes(key):
    @jaxstate.parametrized
    def net(xs):
        total = jaxstate.variable("total", jnp.zeros, (), reduce=jnp.sum)

        def body(x, _):
            total.value = total.value + x
            return x * jaxstate.param("w", ones, ()) + jaxstate.random.uniform(), None

        return jax.vmap(lambda x: jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0])(xs)

    def by_hand(w, xs):
        ys, totals = [], []
        for i, x in enumerate(xs):
            total = 1.0
            for n in range(2):
                total, x = total + x, x * w + u(jax.random.fold_in(key, 0), i, n)
            ys, totals = [*ys, x], [*totals, total]
        return jnp.stack(ys), {"total": jnp.stack(totals).sum()}

    def loss(apply, w):
        y, state = apply(w)
        return (y**2).sum() + state["total"], (y, state)

    xs = jnp.arange(3.0)
    run = lambda w: net.apply_with_state({"w": w}, {"total": 1.0}, xs, key=key)  # noqa: E731
    wanted = jax.value_and_grad(lambda w: loss(lambda w: by_hand(w, xs), w), has_aux=True)(3.0)
    for mode in (jax.disable_jit(), jax.debug_nans(True), jax.debug_key_reuse(True)):
        with mode:
            step = jax.jit(jax.value_and_grad(lambda w: loss(run, w), has_aux=True))
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), step(3.0), wanted
            )


def test_state_is_an_operand_of_callbacks(key):
    seen = []

    def f(x):
        y = jaxstate.random.uniform()
        jax.experimental.io_callback(lambda v: seen.append(float(v)), None, y, ordered=True)
        twice = jax.ShapeDtypeStruct((), jnp.float32)
        return x + jax.pure_callback(lambda v: np.float32(2 * v), twice, y)

    with jaxstate.rng_stream(key):
        for n, mode in enumerate((lambda f: f, jax.jit)):
            np.testing.assert_allclose(mode(f)(1.0), 1 + 2 * u(key, n), rtol=1e-6)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [u(key, 0), u(key, 1)], rtol=1e-6)


COMPILED = {
    "jit": lambda f: jax.jit(f)(jnp.float32(1)),
    "scan": lambda f: jax.lax.scan(lambda c, _: (f(c), None), jnp.float32(1), length=2),
    "while": lambda f: jax.lax.while_loop(lambda x: x < 2, lambda x: f(x) + 1, jnp.float32(1)),
    "cond": lambda f: jax.lax.cond(True, f, lambda x: x, jnp.float32(1)),
    "checkpoint": lambda f: jax.checkpoint(f)(jnp.float32(1)),
}


def own_slot():
    slot = new_slot(jnp.float32(0))
    return lambda: read(slot), lambda value: write(slot, value)


def own_array():
    array = jaxstate.array(jnp.float32(0))
    return array.copy, lambda value: array.__setitem__((), value)


@pytest.mark.parametrize("make", [own_slot, own_array])
@pytest.mark.parametrize("call", COMPILED.values(), ids=COMPILED)
def test_what_a_callback_writes_is_not_lost(call, make):
    """The call would overwrite it. To read is allowed, and to write what the call only reads."""
    get, put = make()

    def on_the_host(x):
        put(jnp.float32(100))
        return np.float32(x)

    def f(x, writes=True):
        if writes:
            put(get() + 1)
        x += 0 * get()
        return jax.pure_callback(on_the_host, jax.ShapeDtypeStruct((), jnp.float32), x)

    with pytest.raises(jaxstate.HostCallbackError, match="while a compiled call"):
        jax.block_until_ready(call(f))
    jax.block_until_ready(call(lambda x: f(x, writes=False)))
    assert get() == 100


def test_refs_beside_and_inside_state(key):
    slot, outer = new_slot(0.0), jax.new_ref(jnp.float32(0))

    def f(x):
        ref = jax.new_ref(x)

        def body(_, carry):
            write(slot, read(slot) + 1)
            ref[...] = ref[...] + jaxstate.random.uniform()
            outer[...] = outer[...] + 1
            return carry

        jax.lax.fori_loop(0, 3, body, None)
        return ref[...]

    wanted = 1 + sum(u(key, n) for n in range(3))
    for i, mode in enumerate((lambda f: f, jax.jit)):
        with jaxstate.rng_stream(key) as stream:
            np.testing.assert_allclose(mode(f)(1.0), wanted, rtol=1e-6)
            assert stream.count == 3
        assert read(slot) == outer[...] == 3 * (i + 1)
