"""The options of `jax.jit`, and programs compiled ahead of time, with state outside and inside."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.rules.eight_devices.common import KEY, X, close, sharding, uniform

ones = jax.nn.initializers.ones

# name: options of jit, and arguments behind x
OPTIONS = {
    "in_shardings": (dict(in_shardings=(sharding(("a", "b")), None)), (2.0,)),
    "one in_sharding": (dict(in_shardings=sharding()), (2.0,)),
    "out_shardings": (dict(out_shardings=sharding("a")), (2.0,)),
    "both": (dict(in_shardings=(sharding("b"), None), out_shardings=sharding("a")), (2.0,)),
    "donated": (dict(donate_argnums=0), (2.0,)),
    "donated by name": (dict(donate_argnames="x"), (2.0,)),
    "sharded and donated": (
        dict(in_shardings=(sharding("a"), None), out_shardings=sharding("a"), donate_argnums=0),
        (2.0,),
    ),
    "static": (dict(static_argnums=1), (2.0,)),
    "static by name": (dict(static_argnames="scale"), (2.0,)),
    "static, sharded, donated": (
        dict(static_argnums=1, in_shardings=(sharding("a"),), donate_argnums=0), (2.0,)
    ),
    "keep_unused": (dict(keep_unused=True), (2.0, 7.0)),
    "unused": (dict(), (2.0, 7.0)),
    "inline": (dict(inline=True), (2.0,)),
}  # fmt: skip


def with_state(total):
    def f(x, scale, unused=None):
        write(total, read(total) + x.sum())
        return x * scale * read(total) + jaxstate.random.uniform(x.shape)

    return f


def by_hand(key, count, total, x, scale, unused=None):
    total = total + x.sum()
    return x * scale * total + uniform(count, shape=x.shape, key=key), count + 1, total


def hand_options(options):
    """The options for the function that takes key, count and total first and returns them too."""
    options = dict(options)
    given = options.get("in_shardings")
    if isinstance(given, tuple):
        options["in_shardings"] = (None, None, None, *given)
    elif given is not None:
        options["in_shardings"] = (None, None, None, given, given)
    if "out_shardings" in options:
        options["out_shardings"] = (options["out_shardings"], None, None)
    for name in ("donate_argnums", "static_argnums"):
        if name in options:
            options[name] += 3
    return options


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_jit_mean_what_they_mean_without_state(name):
    options, rest = OPTIONS[name]
    total = new_slot(0.0)
    f = jax.jit(with_state(total), **options)
    hand = jax.jit(by_hand, **hand_options(options))
    count, total_by_hand = jnp.int32(0), jnp.float32(0)
    with jaxstate.rng_stream(KEY) as stream:
        for _ in range(3):  # the second call has a cached jaxpr, the third an executable
            x, x_by_hand = jnp.asarray(X + 1), jnp.asarray(X + 1)
            y = f(x, *rest)
            wanted, count, total_by_hand = hand(KEY, count, total_by_hand, x_by_hand, *rest)
            close((y, stream.count, read(total)), (wanted, count, total_by_hand))
            assert y.sharding.is_equivalent_to(wanted.sharding, 1)
            assert x.is_deleted() == x_by_hand.is_deleted()
            assert x.is_deleted() or not name.startswith("donated")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_jit_inside_of_other_transformations(name):
    options, rest = OPTIONS[name]
    hand = jax.jit(by_hand, **hand_options(options))
    xs = jnp.stack([X, X + 1])

    def value(f):
        return lambda x: f(x)[0] if isinstance(f(x), tuple) else f(x)

    def check(run, run_by_hand, draws=1):
        total = new_slot(jnp.float32(1))
        f = jax.jit(with_state(total), **options)
        with jaxstate.rng_stream(KEY, vmap="share") as stream:
            y = run(lambda x: f(x, *rest))
            wanted, *state = run_by_hand(lambda s, x: hand(KEY, *s, x, *rest))
            close((y, stream.count, read(total)), (wanted, *state))
            assert stream.count == draws

    first = jnp.int32(0), jnp.float32(1)

    def grad_by_hand(f):
        def loss(x):
            y, *state = f(first, x)
            return y.sum(), state

        gradient, state = jax.grad(loss, has_aux=True)(X)
        return gradient, *state

    def scan_by_hand(f):
        def body(s, x):
            y, *s = f(s, x)
            return tuple(s), y

        s, ys = jax.lax.scan(body, first, xs)
        return ys, *s

    check(lambda f: jax.jit(f)(X), lambda f: f(first, X))
    check(lambda f: jax.grad(lambda x: f(x).sum())(X), grad_by_hand)
    check(lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(X), grad_by_hand)
    check(lambda f: jax.lax.scan(lambda _, x: (None, f(x)), None, xs)[1], scan_by_hand, 2)
    check(lambda f: jax.checkpoint(f)(X), lambda f: f(first, X))


def test_lanes_of_a_jit_with_options():
    """The lanes read what they share, and draw from streams of their own."""
    slot = new_slot(jnp.float32(3))
    f = jax.jit(
        lambda x, scale: x * scale * read(slot) + jaxstate.random.uniform(),
        static_argnums=1, in_shardings=sharding(), out_shardings=sharding(),
    )  # fmt: skip
    wanted = 6 * X + jnp.stack([uniform(0, i, 0) for i in range(8)])
    for mode in (lambda f: f, jax.jit):
        with jaxstate.rng_stream(KEY) as stream:
            close(mode(jax.vmap(lambda x: f(x, 2.0)))(X), wanted)
            assert stream.count == 1


def network(**options):
    @jaxstate.parametrized
    def net(x):
        seen = jaxstate.variable("seen", jnp.zeros, (), jnp.int32)

        def layer(x):
            seen.value += 1
            w = jaxstate.param("w", ones, x.shape)
            return w * x + jaxstate.random.uniform(x.shape)

        return jax.jit(layer, **options)(x)

    return net


@pytest.mark.parametrize(
    "options",
    [dict(in_shardings=sharding("a"), out_shardings=sharding("b")), dict(donate_argnums=0),
     dict(inline=True), dict(keep_unused=True)],
    ids=["sharded", "donated", "inline", "keep_unused"],
)  # fmt: skip
def test_parameters_and_variables_inside_of_a_jit_with_options(options):
    net = network(**options)
    params, state = net.init_with_state(KEY, X)
    close((params, state), ({"w": jnp.ones(8)}, {"seen": jnp.int32(0)}))
    params = {"w": X + 2}

    def apply(params, state, x):
        return net.apply_with_state(params, state, x, key=KEY)

    wanted = (X + 2) * X + uniform(0, shape=(8,)), {"seen": jnp.int32(1)}
    for mode in (lambda f: f, jax.jit):
        close(mode(apply)(params, state, X + 0), wanted)
    gradient = jax.grad(lambda p: apply(p, state, X + 0)[0].sum())(params)
    close(gradient, {"w": X})
    # The same options around the pure function: state is an argument like others.
    outer = jax.jit(apply, in_shardings=({"w": sharding("a")}, None, sharding("b")))
    close(outer(params, state, X + 0), wanted)


def test_ahead_of_time_with_shardings_donation_and_static_arguments():
    net = network()
    params, state = net.init_with_state(KEY, X)

    def step(params, state, x, n):
        y, state = net.apply_with_state(params, state, x, key=jax.random.key(0))
        return y * n, state

    jitted = jax.jit(
        step, static_argnums=3, donate_argnums=2, out_shardings=(sharding("b"), None),
        in_shardings=({"w": sharding("a")}, None, sharding("b")),
    )  # fmt: skip
    wanted = 3 * (X + uniform(0, shape=(8,))), {"seen": jnp.int32(1)}
    for compiled in (
        jitted.lower(params, state, X, 3).compile(),
        jitted.trace(params, state, X, 3).lower().compile(),
    ):
        x, w = jax.device_put(X + 0, sharding("b")), jax.device_put(params["w"], sharding("a"))
        y, state_after = compiled({"w": w}, state, x)
        close((y, state_after), wanted)
        assert y.sharding.is_equivalent_to(sharding("b"), 1) and x.is_deleted()
        with jaxstate.rng_stream(KEY) as stream:  # an open stream is none of its business
            x = jax.device_put(X + 0, sharding("b"))
            close(compiled({"w": w}, state, x), wanted)
            assert stream.count == 0


def test_an_exported_sharded_program_is_called():
    net = network()
    params, state = net.init_with_state(KEY, X)

    def f(params, state, x):
        return net.apply_with_state(params, state, x, key=jax.random.key(0))

    exported = jax.export.export(
        jax.jit(f, in_shardings=({"w": sharding("a")}, None, sharding("b")))
    )(params, state, X)
    assert exported.nr_devices == 8
    w, x = jax.device_put(params["w"], sharding("a")), jax.device_put(X, sharding("b"))
    wanted = X + uniform(0, shape=(8,)), {"seen": jnp.int32(1)}
    close(jax.jit(exported.call)({"w": w}, state, x), wanted)
    with jaxstate.rng_stream(KEY) as stream:
        close(jax.jit(exported.call)({"w": w}, state, x), wanted)
        assert stream.count == 0


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize("name", OPTIONS)
def test_state_from_outside_is_refused_ahead_of_time_with_any_options(name):
    options, rest = OPTIONS[name]
    total = new_slot(0.0)
    jitted = jax.jit(with_state(total), **options)
    with jaxstate.rng_stream(KEY) as stream:
        with pytest.raises(jaxstate.AheadOfTimeError):
            jitted.lower(X, *rest)
        with pytest.raises(jaxstate.AheadOfTimeError):
            jitted.trace(X, *rest).lower()
        if not any("static" in option for option in options):
            with pytest.raises(jaxstate.AheadOfTimeError):
                jax.export.export(jitted)(X, *rest)
        assert stream.count == 0 and read(total) == 0
        jitted(X + 0, *rest)  # and the next call works
        assert stream.count == 1


def test_shardings_inside_of_a_program_stay():
    """A constraint on a value that comes from state, in a loop that carries it."""

    @jax.jit
    def f(x):
        def body(x, _):
            noise = jaxstate.random.uniform(x.shape)
            return jax.lax.with_sharding_constraint(x + noise, sharding("a")), None

        return jax.lax.scan(body, x, None, length=3)[0]

    with jaxstate.rng_stream(KEY) as stream:
        y = f(X)
        assert stream.count == 3
    close(y, X + sum(uniform(n, shape=(8,)) for n in range(3)))
    assert y.sharding.is_equivalent_to(sharding("a"), 1)


def test_a_slot_keeps_the_sharding_of_what_is_written():
    slot = new_slot(jnp.zeros(8))

    @jax.jit
    def f(x):
        write(slot, read(slot) + x)

    for n in range(1, 4):
        f(jax.device_put(X, sharding(("a", "b"))))
        close(read(slot), n * X)
        assert read(slot).sharding.is_equivalent_to(sharding(("a", "b")), 1)
