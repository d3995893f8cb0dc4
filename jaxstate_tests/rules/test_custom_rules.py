"""Custom derivative rules that use state: every way to define one, in every transformation."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import linear_call

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.sampling import part_of_product

ones = jax.nn.initializers.ones
W = jnp.float32(3.0)


def use():
    """A draw, a parameter, and one more in the variable."""
    jaxstate.variable("n", jnp.zeros, ()).value += 1
    return jaxstate.random.uniform() * weight()


def weight():
    return jaxstate.param("w", ones, ())


def drawn(key, n):
    return np.prod([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(n)])


# -- Ways to define a function with a rule that multiplies by 7 w -----------------------------


def with_jvp(**options):
    f = jax.custom_jvp(lambda x: x * use())

    def rule(primals, tangents):
        (t,) = tangents
        assert not isinstance(t, jax.custom_derivatives.SymbolicZero)
        return f(*primals), 7 * t * weight()

    f.defjvp(rule, **options)
    return f


def with_jvp_of_two():
    f = jax.custom_jvp(lambda scale, x: scale * x * use(), nondiff_argnums=(0,))
    f.defjvp(lambda scale, p, t: (f(scale, *p), scale**2 * t[0] * weight()))
    return lambda x: f(7, x) / 7


def with_vjp(**options):
    f = jax.custom_vjp(lambda x: x * use())

    def forward(x):
        if options.get("symbolic_zeros"):
            assert x.perturbed
            x = x.value
        return f(x), x

    f.defvjp(forward, lambda x, ct: (7 * ct * weight(),), **options)
    return f


def with_vjp_of_two():
    f = jax.custom_vjp(lambda scale, x: scale * x * use(), nondiff_argnums=(0,))
    f.defvjp(lambda scale, x: (f(scale, x), None), lambda scale, _, ct: (scale**2 * ct * weight(),))
    return lambda x: f(7, x) / 7


def with_gradient():
    @jax.custom_gradient
    def f(x):
        w = weight()
        return x * use(), lambda ct: 7 * ct * w

    return f


def flag(name):
    @contextlib.contextmanager
    def switched_on():
        before = getattr(jax.config, name)
        jax.config.update(name, True)
        try:
            yield
        finally:
            jax.config.update(name, before)

    return switched_on


def options_of_defvjp():
    return jax.custom_vjp.defvjp.__code__.co_varnames


WAYS = {
    "jvp": (with_jvp, contextlib.nullcontext),
    "jvp, symbolic zeros": (lambda: with_jvp(symbolic_zeros=True), contextlib.nullcontext),
    "jvp, nondiff_argnums": (with_jvp_of_two, contextlib.nullcontext),
    "vjp": (with_vjp, contextlib.nullcontext),
    "vjp, symbolic zeros": (lambda: with_vjp(symbolic_zeros=True), contextlib.nullcontext),
    "vjp, nondiff_argnums": (with_vjp_of_two, contextlib.nullcontext),
    "vjp, optimize_remat": (lambda: with_vjp(optimize_remat=True), contextlib.nullcontext),
    "custom_gradient": (with_gradient, contextlib.nullcontext),
}
# Not every version of JAX has them. (Those of 0.10 are the first: they leak tracers, and
# differentiate with respect to all operands.)
if hasattr(jax.config, "jax_custom_jvp3"):
    WAYS |= {
        "vjp in the next checkpoint": (with_vjp, flag("jax_remat3")),
        "vjp, next": (with_vjp, flag("jax_custom_vjp3")),
        "vjp, next, symbolic zeros": (
            lambda: with_vjp(symbolic_zeros=True),
            flag("jax_custom_vjp3"),
        ),
        "vjp, next, nondiff_argnums": (with_vjp_of_two, flag("jax_custom_vjp3")),
        "vjp, next, optimize_remat": (
            lambda: with_vjp(optimize_remat=True),
            flag("jax_custom_vjp3"),
        ),
        "jvp, next": (with_jvp, flag("jax_custom_jvp3")),
        "jvp, next, nondiff_argnums": (with_jvp_of_two, flag("jax_custom_jvp3")),
    }
if "generic_batching" in options_of_defvjp():
    WAYS["vjp, generic_batching"] = (
        lambda: with_vjp(generic_batching=True),
        contextlib.nullcontext,
    )


def scan(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0]


AROUND = {
    "": (lambda f: f, 1),
    "jit": (jax.jit, 1),
    "checkpoint": (jax.checkpoint, 1),
    "scan": (scan, 2),
    "cond": (lambda f: lambda x: jax.lax.cond(x > 0, f, lambda x: x, x), 1),
    "twice": (lambda f: lambda x: f(jax.jit(f)(x)), 2),
}


def jax_differentiates(wrap):
    """Whether JAX itself differentiates such a function without state. (With jax_custom_vjp3,
    0.11.2 does not if it has symbolic zeros and is in a checkpoint.)"""
    f = jax.custom_vjp(lambda x: 2 * x)
    f.defvjp(lambda x: (f(x.value), None), lambda _, ct: (ct,), symbolic_zeros=True)
    try:
        jax.grad(wrap(f))(1.0)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("way, around", part_of_product(2, WAYS, AROUND))
def test_a_rule_and_its_function_use_the_state_of_their_call(key, way, around):
    make, switched_on = WAYS[way]
    wrap, n = AROUND[around]
    if way == "vjp, next, symbolic zeros":
        with switched_on():
            if not jax_differentiates(wrap):
                pytest.skip("this JAX has no derivative of such a function without state either")

    with switched_on():
        net = jaxstate.parametrized(lambda x: wrap(make())(x), name="net")

        def run(x):
            with jaxstate.rng_stream(key, vmap="share") as stream:
                y, state = net.apply_with_state({"w": W}, {"n": jnp.float32(0)}, x)
                return y, (state["n"], stream.count)

        both = jax.value_and_grad(run, has_aux=True)
        value = 2 * drawn(key, n) * 3**n
        wanted = (value, (n, n)), 21**n
        for found in (
            both(2.0),
            jax.jit(both)(2.0),
            jax.value_and_grad(jax.jit(run), has_aux=True)(2.0),
        ):
            np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=1e-5)
        y, pull, _ = jax.vjp(run, 2.0, has_aux=True)  # when all of the state is gone
        np.testing.assert_allclose((y, *pull(1.0)), (value, 21**n), rtol=1e-5)


@pytest.mark.parametrize("way", ["jvp", "vjp", "vjp, optimize_remat", "custom_gradient"])
def test_lanes_draw_their_own_in_a_function_with_a_rule(key, way):
    make, _ = WAYS[way]
    net = jaxstate.parametrized(lambda x: make()(x) + jaxstate.random.uniform(), name="net")

    def lane(x):
        return net.apply_with_state({"w": W}, {"n": jnp.float32(0)}, x)[0]

    x = jnp.arange(1.0, 4.0)
    for lanes in (jax.vmap(jax.value_and_grad(lane)), jax.jit(jax.vmap(jax.value_and_grad(lane)))):
        with jaxstate.rng_stream(key) as stream:
            y, slope = lanes(x)
        assert stream.count == 1
        np.testing.assert_allclose(slope, np.full(3, 21.0), rtol=1e-6)
        for i in range(3):
            own = jax.random.fold_in(jax.random.fold_in(key, 0), i)
            first, second = (jax.random.uniform(jax.random.fold_in(own, k)) for k in range(2))
            np.testing.assert_allclose(y[i], x[i] * first * 3 + second, rtol=1e-5)


# -- How often Python runs ---------------------------------------------------------------------


def logged(kind, log, uses):
    def f(x):
        log.append("f")
        return jnp.sin(x) * uses()

    f = kind(f)
    if kind is jax.custom_jvp:

        def rule(p, t):
            log.append("rule")
            return f(*p), t[0]

        f.defjvp(rule)
    else:

        def forward(x):
            log.append("rule")
            return f(x), None

        f.defvjp(forward, lambda _, ct: (ct,))
    return f


@pytest.mark.parametrize("kind", [jax.custom_jvp, jax.custom_vjp])
@pytest.mark.parametrize("state", ["none", "of another thread", "open", "read", "written"])
def test_what_jax_calls_at_once_runs_once(key, kind, state):
    log, kept = [], []
    slot = new_slot(jnp.float32(1))
    if state in ("none", "of another thread"):
        del slot
    if state == "of another thread":
        thread = threading.Thread(target=lambda: kept.append(new_slot(0.0)))
        thread.start()
        thread.join()

    def uses():
        if state == "written":
            write(slot, read(slot) + 1)
        return read(slot) if state in ("read", "written") else 1.0

    f = logged(kind, log, uses)
    for program, wanted in (
        (jax.grad(f), ["rule", "f"]),
        (lambda x: jax.vjp(f, x)[0], ["rule", "f"]),
        (lambda x: jax.vmap(f)(x[None]), ["f"]),
        (lambda x: jax.vmap(jax.grad(f))(x[None]), ["rule", "f"]),
    ):
        log.clear()
        program(jnp.float32(2))
        assert log == wanted
    if state == "written":
        assert read(slot) == 1 + 4


def test_a_rule_that_runs_at_once_looks_at_values(key):
    """Of its arguments and of the state."""
    slot = new_slot(jnp.float32(2))

    @jax.custom_vjp
    def f(x):
        return x * 2

    def forward(x):
        if x > 0 and read(slot) > 1:
            write(slot, read(slot) * x)
        return f(x), read(slot)

    f.defvjp(forward, lambda kept, ct: (kept * ct * read(slot),))
    assert jax.grad(f)(jnp.float32(5)) == 10 * 2  # as residual, and as it was before the call
    assert read(slot) == 10


# -- What a rule cannot say --------------------------------------------------------------------


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize("way", WAYS)
def test_no_derivative_with_respect_to_the_state_is_lost(key, way):
    make, switched_on = WAYS[way]
    with switched_on():
        f = make()

        def run(w):
            with jaxstate.rng_stream(key):
                net = jaxstate.parametrized(f, name="net")
                return net.apply_with_state({"w": w}, {"n": jnp.float32(0)}, 2.0)[0]

        for outer in (lambda f: f, jax.jit):
            with pytest.raises((jaxstate.CustomRuleStateError, jax.errors.UnexpectedTracerError)):
                jax.grad(outer(run))(W)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_a_rule_writes_is_made_of_primals():
    slot = new_slot(jnp.float32(0))
    f = jax.custom_jvp(lambda x: x)

    def rule(primals, tangents):
        write(slot, *tangents)
        return f(*primals), tangents[0]

    f.defjvp(rule)
    with pytest.raises(jaxstate.CustomRuleStateError, match="made of tangents"):
        jax.grad(f)(1.0)


# -- linear_call -------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["", "jit", "checkpoint", "scan", "cond"])
def test_both_functions_of_a_linear_call_read_the_state_of_the_call(around):
    wrap, n = AROUND[around]
    slot = new_slot(jnp.float32(5))

    def scaled(r, x):
        return r * x * weight() * read(slot)

    net = jaxstate.parametrized(wrap(lambda x: linear_call(scaled, scaled, 2.0, x)), name="net")

    def f(x):
        return net.apply({"w": W}, x)

    wanted = 30.0**n
    for g in (f, jax.jit(f)):
        assert g(1.0) == wanted
        assert jax.grad(g)(1.0) == wanted
        assert jax.jvp(g, (1.0,), (1.0,))[1] == wanted
        _, pull = jax.vjp(g, 1.0)
        write(slot, jnp.float32(7))
        assert pull(1.0) == (wanted,)
        write(slot, jnp.float32(5))


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_a_linear_call_cannot_do_is_a_named_error(key):
    def call(fun, transpose):
        return lambda x: linear_call(fun, transpose, 1.0, x)

    draws = call(lambda _, x: x * jaxstate.random.uniform(), lambda _, ct: ct)
    with jaxstate.rng_stream(key) as stream:
        for run in (draws, jax.jit(draws)):
            with pytest.raises(jaxstate.UnsupportedPrimitiveError, match="linear_call"):
                run(1.0)
        assert stream.count == 0
    only_back = call(lambda _, x: x, lambda _, ct: ct * weight())
    net = jaxstate.parametrized(jax.grad(only_back), name="net")
    with pytest.raises(jaxstate.CustomRuleStateError, match="does not"):
        net.apply({"w": W}, 1.0)
    net = jaxstate.parametrized(call(lambda _, x: x * weight(), lambda _, ct: ct), name="net")
    with pytest.raises(jaxstate.CustomRuleStateError, match="with respect to it"):
        jax.grad(net.apply)({"w": W}, 1.0)


# -- custom_vmap beside and with state ------------------------------------------------------------


def with_vmap_rule(scale):
    f = jax.custom_batching.custom_vmap(lambda x: jnp.sin(x) * scale())

    @f.def_vmap
    def lanes(size, batched, x):
        return jnp.sin(x) * scale(), batched[0]

    return f


@pytest.mark.parametrize("around", ["", "jit", "checkpoint", "scan"])
@pytest.mark.parametrize("uses", ["nothing", "parameter", "slot"])
def test_a_rule_for_lanes_reads_what_its_function_reads(key, uses, around):
    wrap, n = AROUND[around]
    slot = new_slot(W)
    scale = {"nothing": lambda: 3.0, "parameter": weight, "slot": lambda: read(slot)}[uses]
    net = jaxstate.parametrized(lambda x: wrap(with_vmap_rule(scale))(x), name="net")

    def f(w, x):
        return net.apply({"w": w}, x)

    def by_hand(w, x):
        for _ in range(n):
            x = jnp.sin(x) * (w if uses == "parameter" else 3.0)
        return x

    def programs(f):
        x = jnp.arange(1.0, 4.0)
        yield jax.vmap(f, (None, 0))(W, x)
        yield jax.vmap(f)(x, x)
        yield jax.vmap(lambda x: jax.jvp(f, (W, x), (1.0, 1.0))[1])(x)
        yield jax.vmap(lambda x: jax.jvp(lambda x: f(W, x), (x,), (1.0,))[1])(x)
        yield jax.grad(lambda w: jax.vmap(f, (None, 0))(w, x).sum())(W)

    with jaxstate.rng_stream(key):
        for found, wanted in zip(programs(f), programs(by_hand), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_errors_of_jax_name_the_rule_for_lanes(key):
    f = jax.custom_batching.custom_vmap(jnp.sin)

    @f.def_vmap
    def my_rule(size, batched, x):
        return [x], batched

    with jaxstate.rng_stream(key), pytest.raises(ValueError, match="my_rule"):
        jax.vmap(f)(jnp.arange(3.0))


# -- Loops and checkpoints in JAX's next implementations -----------------------------------------


def test_state_in_the_next_scan(key):
    """Its derivative is JAX's to come: it has none in reverse."""
    slot = new_slot(jnp.float32(0))

    def body(carry, x):
        write(slot, read(slot) + x)
        return carry * jaxstate.random.uniform() * weight(), read(slot)

    net = jaxstate.parametrized(lambda x: jax.lax.scan(body, x, jnp.arange(3.0)), name="net")
    with flag("jax_scan3")():
        for run in (net.apply, jax.jit(net.apply)):
            write(slot, jnp.float32(0))
            with jaxstate.rng_stream(key) as stream:
                y, sums = run({"w": W}, jnp.float32(1))
                assert stream.count == 3
            np.testing.assert_allclose(y, drawn(key, 3) * 27, rtol=1e-5)
            np.testing.assert_array_equal(sums, [0, 1, 3])
            assert read(slot) == 3


# -- What a backward rule closes over ----------------------------------------------------------


def _scanned(f, n=2):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=n)[0]


TRANSPOSED = {
    "jit of scan": lambda f: jax.jit(_scanned(f)),
    "scan of jit": lambda f: _scanned(jax.jit(f)),
    "scan of cond": lambda f: _scanned(lambda x: jax.lax.cond(x > 0, f, lambda x: x, x)),
    "checkpoint of scan": lambda f: jax.checkpoint(_scanned(f)),
    "vmap of jit": lambda f: lambda x: jnp.sum(jax.vmap(jax.jit(f))(jnp.stack([x, x]))),
}


def _scaling(scale):
    """Twice ``x``, with the derivative ``scale()``."""
    f = jax.custom_vjp(lambda x: 2 * x)
    f.defvjp(lambda x: (2 * x, None), lambda _, ct: (ct * scale(),))
    return f


def _pulled_twice(f, x, between):
    """By one pullback, which is kept while ``between`` runs."""
    _, back = jax.vjp(f, x)
    first = back(1.0)[0]
    between()
    return first, back(1.0)[0], jax.grad(f)(x)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("around", TRANSPOSED)
def test_a_backward_rule_reads_an_array_that_is_no_residual(around, jit):
    """What is in the array when the pullback is called, as of all that the rule closes over."""

    def in_place(x):
        a = jnp.ones(3)
        a[1] = 5 * x
        f = TRANSPOSED[around](_scaling(lambda: a[1]))
        return _pulled_twice(f, x, lambda: a.__setitem__(1, a[1] + 1))

    def by_hand(x, scale):
        f = jax.custom_vjp(lambda x, scale: 2 * x)
        f.defvjp(lambda x, scale: (2 * x, scale), lambda scale, ct: (ct * scale, 0 * scale))
        return jax.grad(TRANSPOSED[around](lambda x: f(x, scale)))(x)

    def all_by_hand(x):
        return by_hand(x, 5 * x), by_hand(x, 5 * x + 1), by_hand(x, 5 * x + 1)

    x, run = jnp.float32(1.5), jaxstate.inplace(in_place)
    run = jax.jit(run) if jit else run
    np.testing.assert_allclose(run(x), all_by_hand(x), rtol=1e-5)
    xs = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(run)(xs), jax.vmap(all_by_hand)(xs), rtol=1e-5)


def test_a_backward_rule_that_reads_an_argument_in_place_does_not_write_it():
    """The leaves of the pullback are operands of a jitted function, in which the rule runs."""

    @jaxstate.inplace
    def run(x):
        a = jnp.zeros(2)

        def step(x):
            a[0] += x
            return jnp.sin(x) * a[0]

        converted, consts = jax.closure_convert(step, x)
        f = jax.custom_vjp(lambda x, *consts: converted(x, *consts))
        f.defvjp(lambda *args: (f(*args), None), lambda _, ct: (3 * ct, *[None] * len(consts)))
        converted_again, more = jax.closure_convert(lambda x: f(x, *consts), x)
        y, back = jax.vjp(lambda x: converted_again(x, *more), x)
        leaves, tree = jax.tree.flatten(back)
        pull = jax.jit(lambda ct, leaves: jax.tree.unflatten(tree, leaves)(ct)[0])
        return y, pull(jnp.ones_like(y), leaves), a

    x = jnp.float32(0.5)
    y, dx, a = run(x)
    np.testing.assert_allclose((y, dx, a[0], a[1]), (np.sin(x) * x, 3.0, x, 0.0), rtol=1e-6)


@pytest.mark.parametrize("around", ["", "jit", "checkpoint", "scan"])
def test_what_optimize_remat_runs_again_assigns_to_the_objects_of_its_call(around):
    def loss(x, n):
        def run(tree, x):
            def step(x):
                tree["n"] = 0.5 * tree["n"] + x
                return x * tree["n"]

            f = jax.custom_vjp(step)
            f.defvjp(lambda x: (f(x), x), lambda x, ct: (3 * ct * x,), optimize_remat=True)
            y = AROUND_REMAT[around](f)(x)
            return y + tree["n"]

        y, tree = jaxstate.mutate(run)({"n": n}, x)
        return y, tree["n"]

    def by_hand(x, n):
        rule = jax.custom_vjp(lambda x, m: x * m)
        rule.defvjp(lambda x, m: (x * m, x), lambda x, ct: (3 * ct * x, 0.0 * x))
        for _ in range(2 if around == "scan" else 1):
            n = 0.5 * n + jax.lax.stop_gradient(x)
            x = rule(x, n)
        return x + n, n

    args = jnp.float32(0.5), jnp.float32(0.25)
    for f in (lambda f: f, jax.jit, lambda f: jax.value_and_grad(f, has_aux=True)):
        jax.tree.map(np.testing.assert_allclose, f(loss)(*args), f(by_hand)(*args))


AROUND_REMAT = {
    "": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _scanned,
}
