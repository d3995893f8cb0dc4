"""Derivatives of stateful programs: the hazards of `grad` inside the state, custom rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jaxstate
from jaxstate.extend import new_slot, read, write

Y = jnp.float32(0.7)


# The programs of the hazard table: a loop-invariant looking use of state inside a loop under grad,
# which JAX would hoist out of the loop. `bump(s)` returns the state and adds one to it.
HAZARDS = {
    "scan c + y*bump": lambda bump, y: _scan(lambda c: c + y * bump()),
    "scan c + sin(y)*bump": lambda bump, y: _scan(lambda c: c + jnp.sin(y) * bump()),
    "scan c*bump + y": lambda bump, y: _scan(lambda c: c * bump() + y),
    "fori c*(1+bump)": lambda bump, y: jax.lax.fori_loop(0, 3, lambda _, c: c * (1 + bump()), y),
    "scan checkpoint": lambda bump, y: _scan(jax.checkpoint(lambda c: c + y * bump())),
    "unused in scan": lambda bump, y: _scan(lambda c: (bump(), c + y)[1]),
    "jit scan cond checkpoint": lambda bump, y: jax.jit(
        lambda y: _scan(
            lambda c: jax.lax.cond(c < 1e9, jax.checkpoint(lambda: c + y * bump()), lambda: c)
        )
    )(y),
    "checkpoint": lambda bump, y: jax.checkpoint(lambda y: jnp.sin(y) * bump() + bump())(y),
    "jit": lambda bump, y: jax.jit(lambda y: jnp.sin(y) * bump() + bump())(y),
    "cond": lambda bump, y: jax.lax.cond(y > 0, lambda: y * bump() + bump() * y, lambda: y),
    "unused under jit": lambda bump, y: jax.jit(lambda y: (bump(), y)[1])(y),
}


def _scan(f):
    return jax.lax.scan(lambda c, _: (f(c), None), jnp.float32(0), None, length=3)[0]


def _scan_once(f):
    return lambda x: jax.lax.scan(lambda x, _: (f(x), None), x, None, length=1)[0]


def _python_hazard(name, y, s):
    """The same programs as straight Python, on a list that holds the state."""

    def bump():
        s[0] += 1.0
        return s[0] - 1.0

    def loop(f, c):
        for _ in range(3):
            c = f(c)
        return c

    return {
        "scan c + y*bump": lambda: loop(lambda c: c + y * bump(), 0.0),
        "scan c + sin(y)*bump": lambda: loop(lambda c: c + jnp.sin(y) * bump(), 0.0),
        "scan c*bump + y": lambda: loop(lambda c: c * bump() + y, 0.0),
        "fori c*(1+bump)": lambda: loop(lambda c: c * (1 + bump()), y),
        "scan checkpoint": lambda: loop(lambda c: c + y * bump(), 0.0),
        "unused in scan": lambda: loop(lambda c: (bump(), c + y)[1], 0.0),
        "jit scan cond checkpoint": lambda: loop(lambda c: c + y * bump(), 0.0),
        "checkpoint": lambda: jnp.sin(y) * bump() + bump(),
        "jit": lambda: jnp.sin(y) * bump() + bump(),
        "cond": lambda: y * bump() + bump() * y,
        "unused under jit": lambda: (bump(), y)[1],
    }[name]()


@pytest.mark.parametrize("name", HAZARDS)
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
def test_hazards_of_grad_and_state(name, outer, inside):
    def value(y, s):
        slot = new_slot(s)

        def bump():
            old = read(slot)
            write(slot, old + 1)
            return old

        return HAZARDS[name](bump, y), slot

    def run(y):
        if inside:
            # The slot is made outside of what is differentiated.
            slot = new_slot(jnp.float32(0))

            def bump():
                old = read(slot)
                write(slot, old + 1)
                return old

            return *jax.value_and_grad(lambda y: HAZARDS[name](bump, y))(y), read(slot)

        def with_state(y):
            out, slot = value(y, jnp.float32(0))
            return out, read(slot)

        (out, s), g = jax.value_and_grad(with_state, has_aux=True)(y)
        return out, g, s

    s = [0.0]
    wanted = _python_hazard(name, Y, s)
    gradient = jax.grad(lambda y: _python_hazard(name, y, [0.0]) * 1.0)(Y)
    np.testing.assert_allclose(outer(run)(Y), (wanted, gradient, s[0]), rtol=1e-6)


# -- Custom rules ----------------------------------------------------------------------------


def uniforms(key, n):
    return [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(n)]


@jax.custom_jvp
def noisy_sin(x):
    return jnp.sin(x) * jaxstate.random.uniform()


@noisy_sin.defjvp
def _noisy_sin_jvp(primals, tangents):
    return noisy_sin(*primals), 10 * tangents[0] * jaxstate.random.uniform()


@jax.custom_vjp
def noisy_cos(x):
    return jnp.cos(x) * jaxstate.random.uniform()


noisy_cos.defvjp(lambda x: (noisy_cos(x), x), lambda x, ct: (ct * x * 7,))


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_a_rule_moves_the_state_as_it_draws(key, outer, inner):
    def f(x):
        before = jaxstate.random.uniform()
        return before * noisy_sin(x) + jaxstate.random.uniform()

    def run(x):
        with jaxstate.rng_stream(key) as stream:
            return *jax.value_and_grad(inner(f))(x), stream.count

    u = uniforms(key, 4)
    wanted = u[0] * jnp.sin(Y) * u[1] + u[3], u[0] * 10 * u[2], 4
    np.testing.assert_allclose(outer(run)(Y), wanted, rtol=1e-5)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_a_custom_vjp_that_draws_keeps_its_rule(key, outer, inner):
    def f(x):
        before = jaxstate.random.uniform()
        return before * noisy_cos(x) + jaxstate.random.uniform()

    def run(x):
        with jaxstate.rng_stream(key) as stream:
            return *jax.value_and_grad(inner(f))(x), stream.count

    u = uniforms(key, 3)
    wanted = u[0] * jnp.cos(Y) * u[1] + u[2], u[0] * Y * 7, 3
    np.testing.assert_allclose(outer(run)(Y), wanted, rtol=1e-5)


def test_lanes_of_a_function_with_a_rule(key):
    x = jnp.arange(1.0, 4.0)

    def lane(x):
        return noisy_cos(x) + jaxstate.random.uniform()

    with jaxstate.rng_stream(key) as stream:
        g = jax.jit(jax.vmap(jax.value_and_grad(jax.jit(lane))))(x)
    assert stream.count == 1
    for i in range(3):
        u = uniforms(jax.random.fold_in(jax.random.fold_in(key, 0), i), 2)
        np.testing.assert_allclose(g[0][i], jnp.cos(x[i]) * u[0] + u[1], rtol=1e-5)
    np.testing.assert_allclose(g[1], 7 * x, rtol=1e-6)


def test_rules_find_parameters_after_apply_is_over(key):
    """The forward rule of a jitted apply runs when the jitted function is differentiated."""
    normal = jax.nn.initializers.normal()

    @jaxstate.parametrized
    def layer(x):
        @jax.custom_vjp
        def f(x):
            return x * jaxstate.param("w", normal, ())

        f.defvjp(lambda x: (f(x), None), lambda _, ct: (5 * ct * jaxstate.param("w", normal, ()),))
        return f(x)

    net = jaxstate.parametrized(lambda x: jax.jit(layer)(x))
    p = net.init(key, Y)
    w = p["layer"]["w"]
    for apply in (net.apply, jax.jit(net.apply)):
        for d in (jax.value_and_grad, lambda f: jax.jit(jax.value_and_grad(f))):
            found = d(lambda x, apply=apply: apply(p, x))(Y)
            np.testing.assert_allclose(found, (Y * w, 5 * w), rtol=1e-6)


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_late_pullback_leaves_caches_as_they_were(key):
    """It runs with the streams of its call, by name; the streams of now come back after it."""
    lanes = jax.jit(jax.vmap(lambda x: x * 0 + jaxstate.random.uniform()))
    with jaxstate.rng_stream(key):
        lanes(jnp.ones(2))
        _, pull = jax.vjp(jax.jit(noisy_cos), Y)
    with jaxstate.rng_stream(key, vmap="share"):
        pull(Y)
        np.testing.assert_allclose(lanes(jnp.ones(2)), np.full(2, uniforms(key, 1)[0]))


def test_pure_functions_with_rules_are_untouched(key):
    x = jnp.arange(-2.0, 3.0)
    with jaxstate.rng_stream(key):
        inside = jax.make_jaxpr(jax.grad(lambda x: jax.nn.relu(x).sum()))(x)
    outside = jax.make_jaxpr(jax.grad(lambda x: jax.nn.relu(x).sum()))(x)
    assert str(inside) == str(outside)


@pytest.mark.parametrize("around", [jax.custom_jvp, jax.custom_vjp])
@pytest.mark.parametrize(
    "inner", [jax.jit, jax.checkpoint, _scan_once], ids=["jit", "remat", "scan"]
)
def test_a_module_in_a_jaxpr_in_a_function_with_a_rule(key, around, inner):
    """Its type is asked for inside of both; that is no use of the slot, and needs all levels."""

    def layer(name, shape):
        normal = jax.nn.initializers.normal()
        return jaxstate.parametrized(lambda x: x * jaxstate.param("w", normal, shape), name=name)

    one, two = layer("one", (3,)), layer("two", ())

    @jaxstate.parametrized
    def net(x):
        @around
        def f(x):
            return inner(lambda x: two(one(x)))(x)

        if around is jax.custom_jvp:
            f.defjvp(lambda primals, tangents: (f(*primals), 5 * tangents[0]))
        else:
            f.defvjp(lambda x: (f(x), None), lambda _, ct: (5 * ct,))
        scale = jaxstate.param("w", jax.nn.initializers.ones, (2,))
        return f(x).sum() * scale.sum()

    x = jnp.arange(3.0)
    params = net.init(key, x)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {"w": (2,), "one": {"w": (3,)}, "two": {"w": ()}}
    wanted = (x * params["one"]["w"] * params["two"]["w"]).sum() * 2
    for apply in (net.apply, jax.jit(net.apply)):
        for cast in (jnp.float32, jnp.bfloat16):
            p = jax.tree.map(lambda a, cast=cast: a.astype(cast), params)
            np.testing.assert_allclose(apply(p, x), wanted, rtol=0.02)
        np.testing.assert_allclose(jax.grad(apply, 1)(params, x), np.full(3, 10.0), rtol=1e-6)


@pytest.mark.parametrize("around", [jax.custom_jvp, jax.custom_vjp])
@pytest.mark.parametrize("uses", ["draws", "nothing"])
@pytest.mark.parametrize("like", [lambda f: f, functools.wraps(jax.nn.relu)], ids=["own", "as JAX"])
def test_effects_of_a_function_with_a_rule_happen_once(key, around, uses, like):
    """Also where the function is called again because it uses state, and if it says that it is one
    of JAX's."""
    calls = []

    @around
    @like
    def f(x):
        io_callback(lambda x: calls.append(None), None, x)
        return x * (jaxstate.random.uniform() if uses == "draws" else 2.0)

    if around is jax.custom_jvp:
        f.defjvp(lambda primals, tangents: (f(*primals), 5 * tangents[0]))
    else:
        f.defvjp(lambda x: (f(x), None), lambda _, ct: (5 * ct,))
    programs = [f, jax.jit(f), jax.grad(f), jax.jit(jax.grad(f)), jax.vjp, jax.vmap(f)]
    for program in programs:
        calls.clear()
        with jaxstate.rng_stream(key) as stream:
            if program is jax.vjp:
                jax.vjp(f, Y)
            else:
                program(jnp.stack([Y]) if program is programs[-1] else Y)
        jax.effects_barrier()
        assert len(calls) == 1 and stream.count == (uses == "draws")
    ref = jax.new_ref(jnp.float32(0))

    @jax.custom_jvp
    def counts(x):
        ref[...] += 1.0
        return x * jaxstate.random.uniform()

    counts.defjvp(lambda primals, tangents: (counts(*primals), tangents[0]))
    with jaxstate.rng_stream(key):
        jax.grad(counts)(Y)
    assert ref[...] == 1.0


def test_a_function_with_a_rule_may_look_at_values(key):
    @jax.custom_jvp
    def f(x):
        return x * jaxstate.random.uniform() if x > 0 else x

    f.defjvp(lambda primals, tangents: (f(*primals), 5 * tangents[0]))
    for x, draws in ((2.0, 1), (-2.0, 0)):
        with jaxstate.rng_stream(key) as stream:
            y, t = jax.jvp(f, (x,), (1.0,))
        assert (t, stream.count) == (5.0, draws)
        np.testing.assert_allclose(
            y, x * jax.random.uniform(jax.random.fold_in(key, 0)) if draws else x
        )


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize("fun", [jnp.tanh, jax.nn.relu, jax.nn.softplus])
def test_a_rule_of_the_user_for_a_function_of_jax_is_looked_at(key, fun):
    """It may draw where it runs at once, and not where it runs late."""
    f = jax.custom_jvp(fun)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * jaxstate.random.uniform()))
    with jaxstate.rng_stream(key) as stream:
        found = jax.grad(f)(Y)
        with pytest.raises(jaxstate.CustomRuleStateError):
            jax.grad(jax.jit(f))(Y)
        assert stream.count == 1
    np.testing.assert_allclose(found, jax.random.uniform(jax.random.fold_in(key, 0)), rtol=1e-6)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_what_rules_cannot_do_is_a_named_error(key):
    normal = jax.nn.initializers.normal()

    @jax.custom_jvp
    def scale(x):
        return x * jaxstate.param("w", normal, ())

    scale.defjvp(lambda p, t: (scale(*p), t[0]))
    net = jaxstate.parametrized(scale)
    params = net.init(key, Y)
    with pytest.raises(jaxstate.CustomRuleStateError, match="differentiated with respect to it"):
        jax.grad(lambda p: net.apply(p, Y))(params)

    @jax.custom_vjp
    def draws_backwards(x):
        return x

    draws_backwards.defvjp(
        lambda x: (x * jaxstate.random.uniform(), None),
        lambda _, ct: (ct * jaxstate.random.uniform(),),
    )
    with jaxstate.rng_stream(key):
        with pytest.raises(jaxstate.CustomRuleStateError, match="backward rule"):
            jax.grad(draws_backwards)(Y)

    @jax.custom_jvp
    def rule_draws(x):
        return x

    rule_draws.defjvp(lambda p, t: (p[0], t[0] * jaxstate.random.uniform()))
    with jaxstate.rng_stream(key) as stream:
        with pytest.raises(
            jaxstate.CustomRuleStateError, match="the function it belongs to does not"
        ):
            jax.grad(jax.jit(rule_draws))(Y)
        assert stream.count == 0


# -- What a function with a custom_vjp leaves in a slot ----------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["variable", "slot"])
def test_a_custom_vjp_function_that_writes_numbers_runs_again(kind, jitted):
    """The second call reads what the first has written, of which the rules say nothing."""
    slot = new_slot(jnp.float32(0))

    @jax.custom_vjp
    def act(x):
        if kind == "slot":
            write(slot, read(slot) + x)
        else:
            total = jaxstate.variable("total", jnp.zeros, ())
            total.value += x
        return 2 * x

    act.defvjp(lambda x: (act(x), None), lambda _, ct: (3 * ct,))

    def applied(f, x):
        net = jaxstate.parametrized(f, name="net")
        y, state = net.apply_with_state({}, {"total": jnp.float32(0)}, x)
        return y, state["total"]

    def run(x):
        return applied(lambda x: act(act(x)), x)

    gradient = jax.value_and_grad(run, has_aux=True)
    (y, total), slope = (jax.jit(gradient) if jitted else gradient)(jnp.float32(1))
    assert (y, slope) == (4, 9)
    assert (read(slot) if kind == "slot" else total) == 1 + 2
    # Also where JAX gives what is written, like every result of a jaxpr, a tangent.
    assert jax.grad(lambda x: applied(lambda x: act(jax.jit(act)(x)), x)[0])(jnp.float32(1)) == 9
