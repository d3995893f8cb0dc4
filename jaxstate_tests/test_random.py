"""Random streams: draw number n is fold_in(key, n), wherever it is drawn."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate


def fold(key, *counts):
    for n in counts:
        key = jax.random.fold_in(key, n)
    return jax.random.key_data(key)


def draw(name="default"):
    return jax.random.key_data(jaxstate.next_key(name))


def all_different(keys):
    flat = np.asarray(keys).reshape(-1, np.shape(keys)[-1])
    return len({tuple(k) for k in flat}) == len(flat)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_draws_are_of_the_kind_that_went_in(make):
    key = make(3)
    with jaxstate.rng_stream(key) as stream:
        eager = jaxstate.next_key()
        jitted = jax.jit(jaxstate.next_key)()
    assert eager.dtype == jitted.dtype == key.dtype
    np.testing.assert_array_equal(
        *(jax.random.key_data(k) for k in (eager, jax.random.fold_in(key, 0)))
    )
    np.testing.assert_array_equal(
        *(jax.random.key_data(k) for k in (jitted, jax.random.fold_in(key, 1)))
    )
    assert stream.count == 2


def test_one_jitted_function_under_typed_and_raw_keys():
    f = jax.jit(lambda: jaxstate.random.uniform((2,)))
    for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(1)):
        with jaxstate.rng_stream(key):
            np.testing.assert_array_equal(f(), jax.random.uniform(jax.random.fold_in(key, 0), (2,)))


def test_python_loop_scan_and_while_loop_give_the_same_keys(key):
    def python(n):
        return jnp.stack([draw() for _ in range(n)])

    def scan(n):
        return jax.lax.scan(lambda c, _: (c, draw()), 0, None, length=n)[1]

    def while_loop(n):
        def body(c):
            return c[0] + 1, c[1].at[c[0]].set(draw())

        keys = jnp.zeros((n, 2), jnp.uint32)
        return jax.lax.while_loop(lambda c: c[0] < n, body, (0, keys))[1]

    wanted = np.stack([fold(key, n) for n in range(5)])
    for loop in (python, scan, while_loop):
        for run in (loop, jax.jit(loop, static_argnums=0)):
            with jaxstate.rng_stream(key) as stream:
                np.testing.assert_array_equal(run(5), wanted)
            assert stream.count == 5


def test_branches_that_draw_different_numbers_of_keys(key):
    def run(i):
        def many():
            return draw() * 0 + draw() * 0 + draw()

        y = jax.lax.switch(i, [draw, many, lambda: jnp.zeros(2, jnp.uint32)])
        return y, draw()

    for i, last in [(0, 1), (1, 3), (2, 0)]:
        with jaxstate.rng_stream(key):
            np.testing.assert_array_equal(jax.jit(run)(i)[1], fold(key, last))


def test_zero_trip_loops_leave_the_count(key):
    with jaxstate.rng_stream(key) as stream:
        jax.lax.fori_loop(0, 0, lambda i, c: c + draw(), jnp.zeros(2, jnp.uint32))
        jax.lax.while_loop(lambda c: c < 0, lambda c: c + draw()[0], jnp.uint32(0))
        assert stream.count == 0


def test_names_and_shadowing(key):
    other, inner = jax.random.key(1), jax.random.key(2)
    with jaxstate.rng_stream(key) as outer, jaxstate.rng_stream(other, "dropout"):
        np.testing.assert_array_equal(draw("dropout"), fold(other, 0))
        with jaxstate.rng_stream(inner):
            np.testing.assert_array_equal(jax.jit(draw)(), fold(inner, 0))
            # A handle draws from its own stream, also where another one shadows it.
            np.testing.assert_array_equal(
                jax.random.key_data(jax.jit(outer.next_key)()), fold(key, 0)
            )
        np.testing.assert_array_equal(draw(), fold(key, 1))


def test_one_cached_function_under_two_streams(key):
    f = jax.jit(draw)
    for seed in range(3):
        with jaxstate.rng_stream(jax.random.key(seed)):
            np.testing.assert_array_equal(f(), fold(jax.random.key(seed), 0))
            np.testing.assert_array_equal(f(), fold(jax.random.key(seed), 1))


def test_handle_and_name_are_one_stream_in_a_jaxpr(key):
    with jaxstate.rng_stream(key) as stream:

        @jax.jit
        def f():
            first = draw()
            with jaxstate.rng_stream(jax.random.key(9)):
                second = jax.random.key_data(stream.next_key())
                third, other = jax.jit(lambda: (jax.random.key_data(stream.next_key()), draw()))()
            return jnp.stack([first, second, third, draw()]), other

        keys, other = f()
        assert stream.count == 4
    np.testing.assert_array_equal(keys, [fold(key, n) for n in range(4)])
    np.testing.assert_array_equal(other, fold(jax.random.key(9), 0))


def test_a_vmap_and_a_draw_in_one_jaxpr(key):
    @jax.jit
    def f():
        lanes = jax.vmap(lambda _: draw())(jnp.arange(2))
        return lanes, draw()

    for k in (key, jax.random.key(1)):
        with jaxstate.rng_stream(k) as stream:
            lanes, after = f()
        assert stream.count == 2
        np.testing.assert_array_equal(lanes, [fold(k, 0, 0, 0), fold(k, 0, 1, 0)])
        np.testing.assert_array_equal(after, fold(k, 1))


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_one_cached_function_under_both_policies(key):
    f = jax.jit(lambda: jax.vmap(lambda _: draw())(jnp.arange(2)))
    with jaxstate.rng_stream(key, vmap="share"):
        np.testing.assert_array_equal(f(), [fold(key, 0), fold(key, 0)])
    with jaxstate.rng_stream(key, vmap="split"):
        np.testing.assert_array_equal(f(), [fold(key, 0, 0, 0), fold(key, 0, 1, 0)])


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_cached_handle_says_that_it_is_closed(key):
    with jaxstate.rng_stream(key) as stream:
        f = jax.jit(lambda: stream.next_key())
        f()
    with jaxstate.rng_stream(jax.random.key(1)):
        with pytest.raises(jaxstate.ClosedStateError, match="after its 'with' block ended"):
            f()


LOOKS = {
    "count": lambda stream: stream.count,
    "key": lambda stream: jax.random.key_data(stream.key),
    "next_key": lambda stream: jax.random.key_data(stream.next_key()),
    "a draw by name and the count": lambda stream: (draw(), stream.count),
    "the count in a loop": lambda stream: jax.lax.fori_loop(0, 2, lambda i, n: n + stream.count, 0),
    "the count in lanes": lambda stream: jax.vmap(lambda x: x + stream.count)(jnp.arange(2)),
    "the count in a rule": lambda stream: jax.grad(ruled(stream))(1.0),
}


def ruled(stream):
    @jax.custom_jvp
    def f(x):
        return x * stream.count

    f.defjvp(lambda p, t: (f(*p), t[0] * stream.count))
    return f


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("look", LOOKS)
def test_a_cached_handle_is_that_of_its_stream(key, look):
    kept = []
    f = jax.jit(lambda: LOOKS[look](kept[0]))
    with jaxstate.rng_stream(key) as stream:
        kept.append(stream)
        f()
    with jaxstate.rng_stream(jax.random.key(1)) as other:
        jaxstate.next_key()
        with pytest.raises(jaxstate.ClosedStateError, match="'default'"):
            f()
        assert other.count == 1


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("look", ["count", "next_key", "a draw by name and the count"])
def test_a_cached_handle_where_another_stream_has_become_the_innermost(key, look):
    """The stream around it is closed, and one is opened inside of it: as many as before."""
    f = jax.jit(lambda: LOOKS[look](handle))
    outer = contextlib.ExitStack()
    outer.enter_context(jaxstate.rng_stream(jax.random.key(1)))
    with jaxstate.rng_stream(key) as handle:
        f()
        outer.close()
        with jaxstate.rng_stream(jax.random.key(2)):
            with pytest.raises(jaxstate.ClosedStateError, match="innermost stream of the name"):
                f()


SAMPLERS = sorted(set(jaxstate.random.__all__) - {"Stream", "next_key", "rng_stream"})


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_refuse_a_key(key, name, make):
    sample = getattr(jaxstate.random, name)
    with jaxstate.rng_stream(key) as stream:
        for call in (
            lambda k: sample(k),
            lambda k: sample(k, (3,)),
            lambda k: sample(key=k),
            jax.jit(lambda k: sample(k)),
        ):
            with pytest.raises(TypeError, match="key comes from the random stream"):
                call(make(7))
        assert stream.count == 0


def test_drawing_refuses_a_key(key):
    with jaxstate.rng_stream(key) as stream:
        wrong = [
            lambda: jaxstate.next_key(key),
            lambda: stream.next_key(key),
            lambda: stream.next_key("default"),
            lambda: jaxstate.random.normal((), stream=key),
        ]
        for call in wrong:
            with pytest.raises(TypeError, match="key comes from the random stream"):
                call()
        with pytest.raises(TypeError, match="stream was given where its name is wanted"):
            jaxstate.next_key(stream)
        assert stream.count == 0
    with pytest.raises(TypeError, match="name of a stream second"), jaxstate.rng_stream(key, key):
        pass


def test_arrays_that_look_like_keys_are_passed_by_name(key):
    cards = jnp.arange(2, dtype=jnp.uint32)
    with jaxstate.rng_stream(key):
        found = jaxstate.random.permutation(x=cards)
    np.testing.assert_array_equal(found, jax.random.permutation(jax.random.fold_in(key, 0), cards))


GUARDED = {
    "jit": jax.jit(lambda x: x + jaxstate.random.uniform()),
    "scan": jax.jit(
        lambda x: jax.lax.scan(
            lambda c, _: (c + jaxstate.random.uniform(), None), x, None, length=1
        )[0]
    ),
    "eagerly": lambda x: jaxstate.next_key(),
    "vmap": jax.jit(jax.vmap(lambda x: x + jaxstate.random.uniform(), axis_size=2, in_axes=None)),
    "eager vmap": jax.vmap(lambda x: jaxstate.next_key(), axis_size=2, in_axes=None),
}


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@pytest.mark.parametrize("way", GUARDED)
def test_draws_under_the_transfer_guard(way, make):
    x, key = jax.device_put(np.float32(0)), make(0)
    with jaxstate.rng_stream(key, count=jax.device_put(np.int32(3))) as stream:
        with jax.transfer_guard("disallow"):
            for _ in range(2):
                GUARDED[way](x)
                jaxstate.next_key()
            count = stream.count
            with jaxstate.rng_stream(stream.key, count=count):
                GUARDED[way](x)
        assert count == 7
        np.testing.assert_array_equal(draw(), fold(key, 7))


def test_a_call_on_a_chosen_device_binds_no_later_draw_to_it(key):
    """What a call is given decides where its results are, and the count is one of them."""
    there = jax.device_put(np.float32(0), jax.devices()[0])
    f = jax.jit(lambda x: x + jaxstate.random.uniform())
    with jaxstate.rng_stream(key) as stream:
        assert f(there).committed
        assert not stream.count.committed
        assert not jax.random.key_data(jaxstate.next_key()).committed
        assert not f(1.0).committed
        assert stream.count == 3


def test_a_function_jitted_and_called_before_any_stream_was_open(key):
    def f(x):
        try:
            return x + jaxstate.random.uniform()
        except jaxstate.MissingStreamError:
            return x

    g = jax.jit(f)
    assert g(1.0) == 1.0
    with jaxstate.rng_stream(key):
        np.testing.assert_allclose(g(1.0), 1 + jax.random.uniform(jax.random.fold_in(key, 0)))
    assert g(1.0) == 1.0


def test_save_and_resume(key):
    with jaxstate.rng_stream(key) as stream:
        draw(), jax.jit(draw)()
    saved = stream.key, int(stream.count)
    with jaxstate.rng_stream(saved[0], count=saved[1]):
        np.testing.assert_array_equal(draw(), fold(key, 2))


# -- Lanes -----------------------------------------------------------------------------------


def test_split_lanes_are_those_of_the_documentation(key):
    with jaxstate.rng_stream(key) as stream:
        before = draw()
        lanes = jax.vmap(lambda _: jnp.stack([draw(), draw()]))(jnp.arange(3))
        after = draw()
    for i in range(3):
        for n in range(2):
            np.testing.assert_array_equal(lanes[i, n], fold(key, 1, i, n))
    np.testing.assert_array_equal(after, fold(key, 2))
    assert stream.count == 3
    assert all_different([before, *lanes.reshape(-1, 2), after])


@pytest.mark.parametrize(
    "vmap",
    [
        lambda f: jax.vmap(jax.vmap(f)),
        lambda f: jax.jit(jax.vmap(jax.jit(jax.vmap(jax.jit(f))))),
        lambda f: jax.vmap(jax.vmap(f, axis_name="j"), axis_name="i"),
        lambda f: jax.vmap(jax.vmap(f), in_axes=1, spmd_axis_name="i"),
    ],
    ids=["plain", "jit", "axis_name", "spmd_axis_name"],
)
def test_nested_split_lanes_are_distinct(key, vmap):
    with jaxstate.rng_stream(key) as stream:
        for region in range(2):
            lanes = vmap(lambda _: jnp.stack([jax.jit(draw)(), draw()]))(jnp.zeros((2, 2)))
            assert all_different(lanes)
            for n in range(2):
                wanted = fold(key, region, 1, 0, 1, n)
                np.testing.assert_array_equal(lanes[1, 1, n], wanted)
    assert stream.count == 2


def test_split_lanes_with_nothing_mapped_inside(key):
    with jaxstate.rng_stream(key):
        lanes = jax.vmap(lambda _, x: draw(), in_axes=(0, None))(jnp.zeros(3), 1.0)
    assert all_different(lanes)


def test_lanes_that_draw_a_different_number_of_times(key):
    def lane(n):
        jax.lax.while_loop(lambda i: i < n, lambda i: i + 1 + 0 * draw()[0].astype(int), 0)
        return draw()

    with jaxstate.rng_stream(key) as stream:
        lanes = jax.vmap(lane)(jnp.arange(3))
    for i in range(3):
        np.testing.assert_array_equal(lanes[i], fold(key, 0, i, i))
    assert stream.count == 1


def test_vmap_of_cond_moves_only_the_lanes_that_took_the_branch(key):
    def lane(p):
        jax.lax.cond(p, draw, lambda: jnp.zeros(2, jnp.uint32))
        return draw()

    with jaxstate.rng_stream(key):
        lanes = jax.vmap(lane)(jnp.array([True, False]))
    np.testing.assert_array_equal(lanes[0], fold(key, 0, 0, 1))
    np.testing.assert_array_equal(lanes[1], fold(key, 0, 1, 0))


def test_shared_lanes_are_equal(key):
    with jaxstate.rng_stream(key, vmap="share") as stream:
        lanes = jax.jit(jax.vmap(lambda _: jax.jit(draw)()))(jnp.zeros(3))
        np.testing.assert_array_equal(lanes, np.broadcast_to(fold(key, 0), (3, 2)))
        assert stream.count == 1
        jacobian = jax.jacfwd(lambda x: x * jaxstate.random.uniform())(jnp.ones(2))
    np.testing.assert_allclose(
        jacobian, np.eye(2) * jax.random.uniform(jax.random.fold_in(key, 1)), rtol=1e-6
    )


def test_looking_at_a_stream_does_not_move_it(key):
    with jaxstate.rng_stream(key) as stream:
        jax.vmap(lambda x: x + stream.count + len(repr(stream)))(jnp.arange(2))
        assert stream.count == 0


def test_per_example_gradients(key):
    x = jnp.arange(1.0, 4.0)
    with jaxstate.rng_stream(key):
        g = jax.vmap(jax.grad(lambda x: x**2 * jaxstate.random.uniform()))(x)
    u = jnp.stack(
        [jax.random.uniform(jax.random.wrap_key_data(fold(key, 0, i, 0))) for i in range(3)]
    )
    np.testing.assert_allclose(g, 2 * x * u, rtol=1e-6)


def test_a_stream_opened_inside_the_lanes(key):
    keys = jax.random.split(key, 3)

    def lane(k):
        with jaxstate.rng_stream(k):
            return jnp.stack([draw(), jax.jit(draw)()])

    lanes = jax.jit(jax.vmap(lane))(keys)
    for i in range(3):
        np.testing.assert_array_equal(lanes[i], [fold(keys[i], 0), fold(keys[i], 1)])


# -- Recomputation ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_grad_of_checkpoint_of_scan_sees_the_draws_of_the_forward_pass(key, policy):
    xs = jnp.arange(1.0, 4.0)

    def loss(x):
        @jax.checkpoint
        def run(x):
            def body(c, x):
                return jnp.sin(c * jaxstate.random.uniform()) + x, None

            return jax.lax.scan(jax.checkpoint(body), x, xs)[0]

        return jax.checkpoint(run, policy=getattr(jax.checkpoint_policies, policy))(x)

    def by_hand(x):
        for n in range(3):
            x = jnp.sin(x * jax.random.uniform(jax.random.fold_in(key, n))) + xs[n]
        return x

    with jaxstate.rng_stream(key) as stream:
        found = jax.value_and_grad(loss)(0.3)
    np.testing.assert_allclose(found, jax.value_and_grad(by_hand)(0.3), rtol=1e-5)
    assert stream.count == 3


# -- Outside of everything -------------------------------------------------------------------


def test_threads_do_not_see_each_other(key):
    found, gate = {}, threading.Barrier(8)
    f = jax.jit(draw)

    def work(seed):
        with jaxstate.rng_stream(jax.random.key(seed)):
            gate.wait()
            found[seed] = [np.asarray(k) for _ in range(5) for k in (draw(), f())]

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for seed in range(8):
        wanted = [fold(jax.random.key(seed), n) for n in range(10)]
        np.testing.assert_array_equal(found[seed], wanted)
    with pytest.raises(jaxstate.MissingStreamError):
        draw()


def test_generators_close_their_own_stream(key):
    def keys(seed):
        with jaxstate.rng_stream(jax.random.key(seed), f"stream{seed}"):
            while True:
                yield draw(f"stream{seed}")

    a, b = keys(0), keys(1)
    np.testing.assert_array_equal(next(a), fold(jax.random.key(0), 0))
    np.testing.assert_array_equal(next(b), fold(jax.random.key(1), 0))
    a.close()
    np.testing.assert_array_equal(next(b), fold(jax.random.key(1), 1))
    b.close()
    with pytest.raises(jaxstate.MissingStreamError):
        draw("stream1")


def test_an_exception_in_a_body_leaves_nothing_behind(key):
    def fails(c, _):
        draw()
        raise ZeroDivisionError

    with jaxstate.rng_stream(key) as stream:
        for run in (
            lambda: jax.lax.scan(fails, 0, None, length=2),
            lambda: jax.jit(fails)(0, 0),
            lambda: jax.lax.cond(True, lambda: fails(0, 0), lambda: None),
        ):
            with pytest.raises(ZeroDivisionError):
                run()
        assert stream.count == 0
        np.testing.assert_array_equal(jax.jit(draw)(), fold(key, 0))
    assert jax.jit(lambda x: x + 1)(1) == 2


def test_debug_print_and_refs_pass_through(key, capfd):
    ref = jax.new_ref(jnp.zeros(2, jnp.uint32))

    def body(i, _):
        ref[...] += draw() * 0 + 1
        jax.debug.print("turn {i}", i=i)

    with jaxstate.rng_stream(key) as stream:
        jax.jit(lambda: jax.lax.fori_loop(0, 2, body, None))()
        jax.effects_barrier()
    assert stream.count == 2
    np.testing.assert_array_equal(ref[...], [2, 2])
    assert "turn 1" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["normal", "uniform", "gumbel", "rademacher", "orthogonal"])
def test_samplers_are_those_of_jax(key, name):
    args = (3,) if name == "orthogonal" else ((2, 3),)
    with jaxstate.rng_stream(key, "s"):
        found = getattr(jaxstate.random, name)(*args, stream="s")
    np.testing.assert_array_equal(
        found, getattr(jax.random, name)(jax.random.fold_in(key, 0), *args)
    )


def test_a_traced_count_is_an_int32(key):
    def count_after(n):
        with jaxstate.rng_stream(key, count=n) as stream:
            return jaxstate.next_key(), stream.count

    drawn, count = jax.jit(count_after)(jnp.uint8(255))
    assert drawn == jax.random.fold_in(key, 255)
    assert count == 256 and count.dtype == jnp.int32
    for wrong in (1.5, jnp.zeros(2, int)):
        with jax.checking_leaks.func(False), pytest.raises(TypeError, match="one integer"):
            jax.jit(count_after)(wrong)


def test_raw_keys_of_another_kind_by_default():
    for kind, words in (("threefry2x32", 2), ("rbg", 4), ("threefry2x32", 2)):
        with jax.default_prng_impl(kind):
            raw = jax.random.PRNGKey(3)
            assert raw.shape == (words,)
            with jaxstate.rng_stream(raw):
                found = jaxstate.next_key()
            np.testing.assert_array_equal(found, jax.random.fold_in(raw, 0))
            with pytest.raises(TypeError, match="wants one random key"):
                jaxstate.rng_stream(jnp.zeros(6 - words, jnp.uint32)).__enter__()


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eagerly", "jit"])
@pytest.mark.parametrize("look", [lambda s: draw(), lambda s: s.count, lambda s: (s.count, draw())])
def test_the_first_look_at_a_stream_in_the_middle_of_a_transformation(key, look, jit):
    def f(x):
        with_state = jit(lambda: look(stream))
        return x, with_state()

    for transformed in (
        lambda: jax.value_and_grad(f, has_aux=True)(1.0)[0][1],
        lambda: jax.jvp(f, (1.0,), (1.0,))[0][1],
        lambda: jax.tree.map(lambda x: x[0], jax.vmap(f)(jnp.arange(1.0))[1]),
        lambda: jax.make_jaxpr(f)(1.0) and f(1.0)[1],
    ):
        with jaxstate.rng_stream(key, vmap="share") as stream:
            found = transformed()
        counts, draws = jax.tree.leaves(found), []
        draws = [x for x in counts if jnp.ndim(x)]
        for x in draws:
            np.testing.assert_array_equal(x, fold(key, 0))
        assert all(x == 0 for x in counts if not jnp.ndim(x))
        assert stream.count == len(draws)
