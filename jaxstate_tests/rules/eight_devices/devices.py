"""shard_map and pmap around state and state around them: nested, with all kinds of meshes, in and
around derivatives, loops and lanes.

Every reference is a program of JAX alone, or a loop over devices by hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.rules.eight_devices.common import (
    ALL,
    AXES,
    KEY,
    MODES,
    P,
    X,
    close,
    explicit_mesh,
    fold,
    mapped,
    mesh,
    sharding,
    uniform,
)  # fmt: skip

both = pytest.mark.parametrize("mode", MODES)
checked = pytest.mark.parametrize("check_vma", [True, False])


def add_draw(x):
    return x + jaxstate.random.uniform(x.shape)


# -- Own state of each device ----------------------------------------------------------------


@both
@checked
def test_a_slot_made_on_the_devices_is_one_per_device(mode, check_vma):
    def f(x):
        own = new_slot(x.sum(), name="own")

        def turn(c, _):
            write(own, read(own) * 2 + c.sum())
            return c + 1, None

        jax.lax.scan(turn, x, None, length=3)
        jax.jit(lambda: write(own, read(own) + 1))()
        jax.lax.cond(x.sum() > 3, lambda: write(own, 0.0), lambda: None)
        return read(own)[None]

    def by_hand(x):
        own = x
        for n in range(3):
            own = own * 2 + x + n
        return jnp.where(x > 3, 0, own + 1)

    close(mode(mapped(f, check_vma=check_vma))(X), by_hand(X))


@both
def test_a_network_on_the_devices_has_variables_of_its_own(mode):
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())
        w = jaxstate.param("w", jax.nn.initializers.ones, ())

        def turn(c, _):
            v.value = v.value + w * x.sum()
            return c, None

        jax.lax.scan(turn, 0, None, length=2)
        return x * v.value + jaxstate.random.uniform(x.shape)

    def apply(params, states, x):
        def f(params, v, x):
            key = jax.random.fold_in(KEY, jax.lax.axis_index(AXES))
            y, state = net.apply_with_state(params, {"v": v[0]}, x, key=key)
            return y, state["v"][None]

        specs = dict(in_specs=(P(), ALL, ALL), out_specs=(ALL, ALL))
        return mapped(f, **specs)(params, states, x)

    v = X + 2 * 3 * X
    wanted = X * v + jnp.stack([uniform(i, 0) for i in range(8)]), v
    close(mode(apply)({"w": jnp.float32(3)}, X, X), wanted)
    gradient = mode(jax.grad(lambda p: apply(p, X, X)[0].sum()))({"w": jnp.float32(3)})
    close(gradient, {"w": (2 * X * X).sum()})


@both
def test_a_derivative_on_the_devices_sums_over_them_where_state_varies(mode):
    """What was made the same on all devices and then written differs in a function called later."""

    def with_state(w, x):
        def loss(w):
            slot = new_slot(0.0)
            write(slot, x.sum() * w)
            return jax.lax.psum(jax.jit(lambda: read(slot) * w)(), AXES)

        return jax.grad(loss)(w)

    def by_hand(w, x):
        return jax.grad(lambda w: jax.lax.psum(jax.jit(lambda s: s * w)(x.sum() * w), AXES))(w)

    specs = dict(in_specs=(P(), ALL), out_specs=P())
    w = jnp.float32(2)
    close(mode(mapped(with_state, **specs))(w, X), mapped(by_hand, **specs)(w, X))


# -- One value for all devices ---------------------------------------------------------------


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@both
def test_a_branch_or_loop_that_only_some_devices_take_does_not_write_for_all(mode):
    slot = new_slot(1.0, name="total")

    def in_branch(x):
        jax.lax.cond(x.sum() > 3, lambda: write(slot, 5.0), lambda: None)
        return x

    def in_both_branches(x):
        jax.lax.cond(x.sum() > 3, lambda: write(slot, 5.0), lambda: write(slot, 6.0))
        return x

    def in_loop(x):
        def turn(i):
            write(slot, read(slot) + 1)
            return i + 1

        jax.lax.while_loop(lambda i: i < x.sum(), turn, 0.0)
        return x

    def in_condition(x):
        def condition(i):
            write(slot, read(slot) + 1)
            return i < x.sum()

        jax.lax.while_loop(condition, lambda i: i + 1, 0.0)
        return x

    for f in (in_branch, in_both_branches, in_loop, in_condition):
        with pytest.raises(jaxstate.DeviceWriteError, match="varies over the mesh axes a, b"):
            mode(mapped(f))(X)
        assert read(slot) == 1.0


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@both
def test_a_loop_that_makes_a_value_differ_says_so(mode):
    def f(start, x):
        own = new_slot(start(jnp.float32(0)), name="own")

        def turn(c, _):
            write(own, read(own) + x.sum())
            return c, None

        jax.lax.scan(turn, 0, None, length=2)
        return read(own)[None]

    with pytest.raises(jaxstate.DeviceWriteError, match="body of a loop"):
        mode(mapped(partial(f, lambda x: x)))(X)
    vary = partial(jax.lax.pcast, axis_name=AXES, to="varying")
    close(mode(mapped(partial(f, vary)))(X), 2 * X)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@both
def test_a_function_traced_for_one_value_is_not_used_for_several(mode):
    def f(first, x):
        own = new_slot(first, name="own")
        double = jax.jit(lambda: write(own, read(own) * 2))
        double()
        write(own, read(own) + x.sum())
        double()
        return read(own)[None]

    with pytest.raises(jaxstate.DeviceWriteError, match=r"slot 'own' varies.*is used again"):
        mode(mapped(partial(f, 1.0)))(X)
    vary = partial(jax.lax.pcast, axis_name=AXES, to="varying")
    close(mode(mapped(lambda x: f(vary(jnp.float32(1)), x)))(X), 2 * (2 + X))


@both
def test_all_devices_take_a_branch_together(mode):
    slot = new_slot(1.0)

    def f(x):
        total = jax.lax.psum(x.sum(), AXES)
        jax.lax.cond(total > 3, lambda: write(slot, read(slot) + total), lambda: None)
        jax.lax.while_loop(
            lambda i: i < 3, lambda i: (write(slot, read(slot) * 2), i + 1)[1], 0
        )  # fmt: skip
        return x * read(slot)

    close(mode(mapped(f))(X), X * 29 * 8)
    close(read(slot), jnp.float32(29 * 8))


# -- Names -----------------------------------------------------------------------------------


@both
def test_modules_on_the_devices_have_the_names_they_have_without(mode):
    def net(wrap):
        @jaxstate.parametrized
        def norm(x):
            v = jaxstate.variable("seen", jnp.zeros, (), jnp.int32)
            v.value += 1
            return x * jaxstate.param("scale", jax.nn.initializers.ones, ())

        def f(x):
            @jaxstate.parametrized
            def made_inside(x):
                jaxstate.variable("calls", jnp.zeros, (), jnp.int32).value += 2
                return norm(x) * jaxstate.param("w", jax.nn.initializers.ones, ())

            with jaxstate.scope("scoped"):
                x = norm(x)
            return made_inside(jax.jit(norm)(made_inside(x)))

        return jaxstate.parametrized(lambda x: norm(wrap(f)(x)), name="net")

    alone, spread = net(lambda f: f), net(mapped)
    start = alone.init_with_state(KEY, X)
    close(mode(spread.init_with_state)(KEY, X), start)
    params, state = jax.tree.map(lambda x: x + 1, start)
    close(mode(spread.apply_with_state)(params, state, X), alone.apply_with_state(params, state, X))


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@both
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_an_initializer_cannot_look_at_the_data_of_a_device(mode, wrap):
    def f(x):
        w = jaxstate.param("w", lambda key: jax.lax.psum(x.sum(), AXES))
        return x * w

    inside = jaxstate.parametrized(lambda x: mapped(wrap(f))(x), name="n")
    with pytest.raises(jaxstate.InitializerDataError, match="parameter 'w' looks at data inside"):
        mode(inside.init)(KEY, X)
    outside = jaxstate.parametrized(
        lambda x: mapped(lambda x, w: x * w, in_specs=(ALL, P()))(
            x, jaxstate.param("w", lambda k: x.sum())
        ),
        name="n",
    )
    close(mode(outside.init)(KEY, X), {"w": X.sum()})


# -- Meshes ----------------------------------------------------------------------------------


def over_a(f, mesh):
    return jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})


@both
@pytest.mark.parametrize("which", [mesh, explicit_mesh], ids=["auto", "explicit"])
def test_over_some_axes_of_the_mesh(mode, which):
    """The other axis is the compiler's: a draw per device along the mapped axis."""

    @jaxstate.parametrized
    def net(x):
        mean = jaxstate.variable("mean", jnp.zeros, (), reduce=jnp.mean)
        total = jaxstate.variable("total", jnp.zeros, ())

        def f(x):
            w = jaxstate.param("w", jax.nn.initializers.ones, ())
            mean.value = x.sum() * w
            total.value = total.value + jax.lax.psum(x.sum(), "a")
            return x * w + jaxstate.random.uniform(x.shape)

        return over_a(f, which)(x)

    x = jax.device_put(X, jax.sharding.NamedSharding(which, P("a")))
    draws = jnp.concatenate([uniform(0, i, 0, shape=(4,)) for i in range(2)])
    state = {"mean": jnp.float32(0), "total": jnp.float32(1)}
    apply = mode(lambda s, x: net.apply_with_state({"w": 2.0}, s, x, key=KEY))
    close(apply(state, x), (2 * X + draws, {"mean": jnp.float32(28), "total": jnp.float32(29)}))
    close(mode(net.init)(KEY, x), {"w": jnp.float32(1)})


@both
def test_one_map_over_each_axis_nested(mode):
    """The inner map draws once from each outer device's stream."""
    slot = new_slot(jnp.float32(0))

    def inner(x):
        write(slot, read(slot) + jax.lax.psum(jax.lax.psum(x.sum(), "b"), "a"))
        return add_draw(x)

    def outer(x):
        here = jax.sharding.get_abstract_mesh()
        f = jax.shard_map(inner, mesh=here, in_specs=P("b"), out_specs=P("b"), axis_names={"b"})
        return add_draw(f(x))

    wanted = [
        X[4 * i + j] + uniform(0, i, 0, j, 0) + uniform(0, i, 1, shape=(4,))[j]
        for i in range(2) for j in range(4)
    ]  # fmt: skip
    with jaxstate.rng_stream(KEY) as stream:
        # (JAX runs nested maps only under jit.)
        close(mode(jax.jit(over_a(outer, mesh)))(X), jnp.stack(wanted))
        assert stream.count == 1
    close(read(slot), jnp.float32(28))


@both
def test_nested_maps_reduce_one_after_the_other(mode):
    """The devices of the inner map first: the largest of each row, then the sum over the rows."""

    def max_then_sum(values, axis):
        return values.max(axis) if values.shape[axis] == 4 else values.sum(axis)

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, (), reduce=max_then_sum)

        def inner(x):
            v.value = v.value + x.sum()
            return x * v.value

        def outer(x):
            here = jax.sharding.get_abstract_mesh()
            f = jax.shard_map(inner, mesh=here, in_specs=P("b"), out_specs=P("b"), axis_names={"b"})
            return f(x) + v.value

        return jax.jit(over_a(outer, mesh))(x)

    rows = X.reshape(2, 4)
    largest = (1 + rows).max(1)
    wanted = (rows * (1 + rows) + largest[:, None]).ravel(), {"v": largest.sum()}
    close(mode(net.apply_with_state)({}, {"v": jnp.float32(1)}, X), wanted)


def test_set_mesh_inside_an_open_stream():
    slot = new_slot(jnp.float32(0))

    def f(x):
        write(slot, read(slot) + x.sum())
        return x * jaxstate.random.uniform(x.shape)

    with jaxstate.rng_stream(KEY) as stream:
        with jax.set_mesh(explicit_mesh):
            x = jax.device_put(X, P("a"))
            first, second = jax.jit(f)(x), jax.jit(f)(x)
            scanned = jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]
            over = jax.shard_map(add_draw, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
            found = jax.jit(over)(x)
            assert jax.typeof(first).sharding.spec == jax.typeof(x).sharding.spec
        assert stream.count == 5
        jaxstate.next_key()
    draws = [uniform(n, shape=(8,)) for n in range(4)]
    close((first, second, scanned), (X * draws[0], X * draws[1], X * draws[2] * draws[3]))
    close(found, X + jnp.concatenate([uniform(4, i, 0, shape=(4,)) for i in range(2)]))
    close(read(slot), 3 * X.sum() + (X * draws[2]).sum())


def test_a_slot_with_a_sharding_in_its_type():
    with jax.set_mesh(explicit_mesh):
        x = jax.device_put(X, P("a"))
        slot = new_slot(x)

        def f(x):
            write(slot, read(slot) * 2 + x)
            return x

        jax.jit(f)(x)
        jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)
        jax.lax.cond(x.sum() > 0, f, lambda x: x, x)
        assert jax.typeof(read(slot)).sharding.spec == jax.typeof(x).sharding.spec
        close(read(slot), 31 * X)


# -- In and around other transformations -----------------------------------------------------


def program(x):
    """Draws, reads a parameter, writes a variable that devices share and one that they do not."""
    w = jaxstate.param("w", jax.nn.initializers.ones, ())
    total = jaxstate.variable("total", jnp.zeros, ())
    mean = jaxstate.variable("mean", jnp.zeros, (), reduce=jnp.mean)
    total.value = total.value + jax.lax.psum((x * w).sum(), AXES)
    mean.value = mean.value + (x * w).sum()
    return x * w * total.value + mean.value + jaxstate.random.uniform(x.shape)


def program_by_hand(w, state, key, x):
    """On all devices at once; ``key`` is what the region draws."""
    total = state["total"] + (x * w).sum()
    means = state["mean"] + x * w
    draws = jnp.stack([jax.random.uniform(fold(i, 0, key=key)) for i in range(8)])
    return x * w * total + means + draws, {"total": total, "mean": means.mean()}


START = {"total": jnp.float32(1), "mean": jnp.float32(2)}
net = jaxstate.parametrized(lambda x: mapped(program)(x), name="net")


def apply(w, state, x):
    return net.apply_with_state({"w": w}, state, x, key=KEY)


def by_hand(w, state, x):
    return program_by_hand(w, state, fold(0), x)


DERIVATIVES = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(
        lambda *args: (lambda y, s: ((y**2).sum() + s["mean"], s))(*f(*args)),
        (0, 1, 2),
        has_aux=True,
    ),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, args),
    "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*args),
    "checkpoint": jax.checkpoint,
}  # fmt: skip


@pytest.mark.leaks_allowed("the checker reports such programs of JAX without state, too")
@both
@pytest.mark.parametrize("name", DERIVATIVES)
def test_around_a_shard_map(mode, name):
    args = jnp.float32(3), START, jnp.asarray(X) / 8
    transform = DERIVATIVES[name]
    wanted = transform(by_hand)(*args)
    close(mode(transform(apply))(*args), wanted, rtol=1e-4, atol=1e-4)


@both
def test_a_shard_map_in_a_scan(mode):
    inside = jaxstate.parametrized(
        lambda x: jax.lax.scan(lambda c, _: (mapped(program)(c), None), x, None, length=2)[0],
        name="net",
    )
    y, state = X / 8, START
    for n in range(2):
        y, state = program_by_hand(3.0, state, fold(n), y)
    found = mode(lambda s, x: inside.apply_with_state({"w": 3.0}, s, x, key=KEY))(START, X / 8)
    close(found, (y, state), rtol=1e-4)


@both
def test_a_shard_map_in_lanes(mode):
    """Lanes with states of their own, and lanes that share one, which reduces over them."""
    xs = jnp.stack([X / 8, X])
    found = mode(jax.vmap(apply, (None, None, 0)))(3.0, START, xs)
    close(found, jax.vmap(by_hand, (None, None, 0))(3.0, START, xs), rtol=1e-4)

    @jaxstate.parametrized
    def shared(xs):
        mean = jaxstate.variable("mean", jnp.zeros, (), reduce=jnp.mean)

        def f(x):
            mean.value = mean.value + x.sum()
            return x * mean.value + jaxstate.random.uniform(x.shape)

        return jax.vmap(mapped(f))(xs)

    values = 2 + xs
    draws = jnp.array([[uniform(0, lane, 0, i, 0) for i in range(8)] for lane in range(2)])
    wanted = xs * values + draws, {"mean": values.mean()}
    run = mode(lambda s, xs: shared.apply_with_state({}, s, xs, key=KEY))
    close(run({"mean": jnp.float32(2)}, xs), wanted)


@both
def test_lanes_loops_and_derivatives_on_the_devices(mode):
    def on_device(x):
        lanes = jax.vmap(lambda c: c * jaxstate.random.uniform())(jnp.stack([x[0], x[0]]))
        turns = jax.lax.scan(lambda c, _: (add_draw(c), None), x, None, length=2)[0]
        slope = jax.grad(lambda x: (jax.checkpoint(add_draw)(x) * x).sum())(x)
        return lanes.sum()[None] + turns + slope + jax.jit(add_draw)(x)

    def device(i):
        k = lambda *counts: uniform(0, i, *counts)  # noqa: E731
        x = X[i]
        lanes = x * (k(0, 0, 0) + k(0, 1, 0))
        return lanes + (x + k(1) + k(2)) + (2 * x + k(3)) + (x + k(4))

    with jaxstate.rng_stream(KEY) as stream:
        close(mode(mapped(on_device))(X), jnp.stack([device(i) for i in range(8)]))
        assert stream.count == 1


@both
def test_one_jitted_layer_on_the_devices_and_around_them(mode):
    @jaxstate.parametrized
    def layer(x):
        v = jaxstate.variable("v", jnp.zeros, (), reduce=jnp.mean)
        v.value = v.value + x.sum()
        return x * v.value

    layer = jax.jit(layer)
    net = jaxstate.parametrized(lambda x: layer(mapped(lambda x: layer(x))(layer(x))), name="net")

    def by_hand(v, x):
        v = v + x.sum()
        x = x * v
        values = v + x
        x, v = x * values, values.mean()
        v = v + x.sum()
        return x * v, {"layer": {"v": v}}

    def run(x):
        return net.apply_with_state({}, {"layer": {"v": jnp.float32(1)}}, x)

    x = X / 8
    close(mode(run)(x), by_hand(1.0, x))
    with jax.checking_leaks.func(False):  # it reports such programs of JAX without state, too
        close(
            mode(jax.grad(lambda x: run(x)[0].sum()))(x),
            jax.grad(lambda x: by_hand(1.0, x)[0].sum())(x),
        )


@both
@checked
def test_the_same_program_draws_the_same_again(mode, check_vma):
    run = mode(mapped(add_draw, check_vma=check_vma))
    with jaxstate.rng_stream(KEY) as stream:
        first, second = run(X), run(X)
        assert stream.count == 2
    with jaxstate.rng_stream(KEY, count=1):
        close(run(X), second)
    wanted = [X + jnp.stack([uniform(n, i, 0) for i in range(8)]) for n in range(2)]
    close([first, second], wanted)


# -- pmap ------------------------------------------------------------------------------------


@pytest.mark.leaks_allowed("the checker reports a derivative of pmap of JAX alone, too")
def test_pmap_with_all_kinds_of_state():
    @jaxstate.parametrized
    def net(x):
        w = jaxstate.param("w", jax.nn.initializers.ones, ())
        seen = jaxstate.variable("seen", jnp.zeros, ())
        mean = jaxstate.variable("mean", jnp.zeros, (), reduce=jnp.mean)

        def f(x):
            mean.value = mean.value + x * w * seen.value
            return x + mean.value + jaxstate.random.uniform()

        return jax.pmap(f)(x)

    state = {"seen": jnp.float32(2), "mean": jnp.float32(1)}
    means = 1 + X * 3 * 2
    draws = jnp.stack([uniform(0, i, 0) for i in range(8)])
    wanted = X + means + draws, {"seen": jnp.float32(2), "mean": means.mean()}
    run = lambda w: net.apply_with_state({"w": w}, state, X, key=KEY)  # noqa: E731
    for mode in MODES:
        close(mode(run)(3.0), wanted)
        close(mode(jax.grad(lambda w: run(w)[1]["mean"]))(3.0), 2 * X.mean())
    close(net.init(KEY, X), {"w": jnp.float32(1)})


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_devices_share_is_not_written_without_types():
    slot = new_slot(0.0)
    f = lambda x: (write(slot, 1.0), x)[1]  # noqa: E731
    for run in (jax.pmap(f), mapped(f, check_vma=False), jax.jit(mapped(f, check_vma=False))):
        with pytest.raises(jaxstate.DeviceWriteError, match="check_vma=False"):
            run(X)
        assert read(slot) == 0.0


def test_a_sharded_value_from_outside_is_read_on_the_devices():
    """A closure is replicated: every device sees all of it."""
    slot = new_slot(jax.device_put(X, sharding("a")))
    f = mapped(lambda x: x + read(slot).sum())
    for mode in MODES:
        close(mode(f)(X), X + 28)
