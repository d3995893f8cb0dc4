"""Arrays written in place by closure, in derivatives, custom rules and traces of other packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import jaxstate
from jaxstate import inplace
from jaxstate._src import _jax
from jaxstate_tests.arrays.in_place import (
    X,
    leaks_of_errors,
)
from jaxstate_tests.sampling import part_of_product

# -- Closure ---------------------------------------------------------------------------------


def counted_while(condition_writes):
    def run(body):
        def turn(i):
            body(i)
            return i + 1

        lax.while_loop(lambda i: i < 3, turn, 0)

    return run


def in_condition(body):
    def condition(i):
        body(i)
        return i < 2

    lax.while_loop(condition, lambda i: i + 1, 0)


def branches(body):
    for i in range(3):
        lax.switch(jnp.int32(i), [lambda i=i: body(i)] * 2)


def per_step(transform):
    def run(body):
        for i in range(3):
            transform(body)(i)

    return run


def grad_of(body):
    def loss(t, i):
        body(i)
        return t * t

    return lambda i: jax.grad(loss)(1.0, i)


def lanes_of(body):
    return lambda i: jax.vmap(lambda _: body(i))(jnp.arange(2))


CLOSURES = {
    "python": lambda body: [body(i) for i in range(3)],
    "jit": per_step(lambda body: jax.jit(body)),
    "cached jit": lambda body: per_step(lambda _: jitted)(jitted := jax.jit(body)),
    "fori": lambda body: lax.fori_loop(0, 3, lambda i, c: [body(i), c][1], None),
    "traced bound": lambda body: lax.fori_loop(0, jnp.int32(3), lambda i, c: [body(i), c][1], None),
    "scan": lambda body: lax.scan(lambda c, i: (c, body(i)), None, jnp.arange(3)),
    "unrolled scan": lambda body: lax.scan(
        lambda c, i: (c, body(i)), None, jnp.arange(3), unroll=3
    ),
    "while": counted_while(False),
    "condition": in_condition,
    "cond": per_step(lambda body: lambda i: lax.cond(True, body, body, i)),
    "switch": branches,
    "checkpoint": per_step(lambda body: jax.checkpoint(body)),
    "grad": per_step(grad_of),
    "vmap": per_step(lanes_of),
    "jit of scan of cond": lambda body: jax.jit(
        lambda: lax.scan(
            lambda c, i: (c, lax.cond(i >= 0, body, lambda i: None, i)), None, jnp.arange(3)
        )
    )(),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("closure", CLOSURES)
def test_writes_by_closure_are_seen_inside_and_outside(closure, jitted):
    def program(x, run, zeros):
        y = zeros(4)
        tail = x[6:]

        def body(i):
            x[i] = x[i + 1] * 2 + x[0]
            y[1:] += x[i]
            local = zeros(3)  # born inside
            local[i] = y[2]
            local[:2] += 1
            tail[i] = local.sum() + tail[0]

        run(body)
        x[9] = tail[0]
        return x, y

    wanted = program(X.copy(), CLOSURES["python"], lambda n: np.zeros(n, np.float32))
    f = inplace(lambda x: program(x, CLOSURES[closure], jnp.zeros))
    found = (jax.jit(f) if jitted else f)(jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_read_before_the_write_in_a_loop_body_sees_the_turn_before():
    """Read first, written later: what the body has closed over is what the last turn left."""

    def program(x):
        def body(i, c):
            before = x[0]
            x[0] = before + 1
            return c + before

        total = lax.fori_loop(0, 4, body, 0.0)

        def smaller(i):
            return (i < 9) & (x[1] < 5)

        def grow(i):
            x[1] = x[1] * 2
            return i + 1

        return total, lax.while_loop(smaller, grow, 0), x[:2]

    for f in (inplace(program), jax.jit(inplace(program))):
        total, turns, x = f(jnp.array([0.0, 1.0, 2.0]))
        assert total == 6 and turns == 3 and list(x) == [4, 8]


@leaks_of_errors
def test_lanes_that_share_an_array():
    def program(x):
        def lane(v):
            x[0] = 5.0  # one value for all

        jax.vmap(lane)(jnp.arange(3))
        return x

    assert inplace(program)(jnp.zeros(2))[0] == 5

    def refused(x):
        jax.vmap(lambda v: x.__setitem__(0, v))(jnp.arange(3.0))

    for how in (lambda f: f, jax.jit):
        with pytest.raises(jaxstate.LaneWriteError, match="an array per lane"):
            how(inplace(refused))(jnp.zeros(2))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_arrays_born_in_lanes_belong_to_lanes(jitted):
    def program(xs, i):
        def lane(x, i):
            buffer = jnp.zeros(4)
            buffer[i] = x

            def body(j, c):
                buffer[j] += x * j
                return c

            lax.fori_loop(0, 4, body, None)
            inner = jax.vmap(lambda t: buffer[1] + t)(buffer)
            inner[0] = -1
            return buffer, inner

        return jax.vmap(lane)(xs, i)

    xs, i = np.array([1.0, 2.0, 3.0], np.float32), np.array([0, 3, 2])
    f = inplace(program)
    buffers, inners = (jax.jit(f) if jitted else f)(jnp.asarray(xs), jnp.asarray(i))
    for k in range(3):
        buffer = np.zeros(4, np.float32)
        buffer[i[k]] = xs[k]
        buffer += xs[k] * np.arange(4)
        np.testing.assert_array_equal(buffers[k], buffer)
        inner = buffer[1] + buffer
        inner[0] = -1
        np.testing.assert_array_equal(inners[k], inner)


# -- Derivatives -----------------------------------------------------------------------------


def recurrence(x, y, loop):
    z = jnp.zeros(4)
    z[0] = x[0] * y

    def body(i):
        z[i] = z[i - 1] * jnp.sin(x[i]) + x[i - 1]
        x[i - 1] = z[i] * y  # overwritten

    loop(body)
    z[1:3] *= x[:2]
    return z.sum() + (x * y).sum()


LOOPS = {
    "python": lambda body: [body(i) for i in range(1, 4)],
    "fori": lambda body: lax.fori_loop(1, 4, lambda i, c: [body(i), c][1], None),
    "scan": lambda body: lax.scan(lambda c, i: (c, body(i)), None, jnp.arange(1, 4)),
    "jit": lambda body: [jax.jit(body)(i) for i in range(1, 4)],
    "cond": lambda body: [lax.cond(True, body, lambda i: None, i) for i in range(1, 4)],
    "checkpoint": lambda body: [jax.checkpoint(body)(i) for i in range(1, 4)],
    "switch": lambda body: [lax.switch(i % 2, [body, body], i) for i in range(1, 4)],
    "reversed and unrolled": lambda body: lax.scan(
        lambda c, i: (c, body(4 - i)), None, jnp.arange(1, 4), reverse=True, unroll=2
    ),
    "scan of checkpoint of cond": lambda body: lax.scan(
        lambda c, i: (c, jax.checkpoint(lambda i: lax.cond(i > 0, body, lambda i: None, i))(i)),
        None,
        jnp.arange(1, 4),
    ),
    "while": lambda body: lax.while_loop(lambda i: i < 4, lambda i: [body(i), i + 1][1], 1),
}


@pytest.mark.parametrize("loop, lanes", part_of_product(2, LOOPS, [False, True]))
def test_derivatives_are_those_of_finite_differences(loop, lanes):
    def program(x, y):
        if not lanes:
            return recurrence(x, y, LOOPS[loop])
        return jax.vmap(lambda x, y: recurrence(x, y, LOOPS[loop]))(
            jnp.stack([x, x / 2]), jnp.stack([y, -y])
        ).sum()

    f, x = inplace(program), jnp.array([0.3, -0.4, 0.5, 0.6])
    modes = ("fwd",) if loop == "while" else ("fwd", "rev")  # JAX has no other for while loops
    if not lanes:
        check_grads(f, (x, 0.7), order=1, modes=modes, atol=2e-2, rtol=2e-2)
    order = 2 if loop in ("fori", "cond") else 1
    check_grads(jax.jit(f), (x, 0.7), order=order, modes=modes[-1:], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_residuals_are_values_of_their_time(jitted):
    def program(x):
        factor = x * 1.0
        y, pull = jax.vjp(lambda t: jnp.exp(t) * factor, x)
        wanted = jnp.exp(x) * factor
        y[0] = -5.0
        factor[:] = 100.0
        x[:] = 0.0
        return pull(jnp.ones(3))[0] - wanted

    f = inplace(program)
    assert not np.any((jax.jit(f) if jitted else f)(jnp.arange(3.0)))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_gradient_inside_of_what_is_written_inside(jitted):
    def program(x):
        z = jnp.zeros(3)

        def loss(t):
            z[1] = t * t
            return z.sum() * t

        return jax.grad(loss)(x), z

    f = inplace(program)
    g, z = (jax.jit(f) if jitted else f)(2.0)
    assert g == 12.0 and list(z) == [0, 4, 0]


def test_custom_rules_and_implicit_functions():
    def root(q):
        newton = lambda f, y: lax.fori_loop(0, 30, lambda i, y: y - f(y) / (3 * y * y), y)  # noqa: E731
        return lax.custom_root(lambda y: y**3 - q[0] * q[1], 1.0, newton, lambda g, y: y / g(1.0))

    def program(p):
        q = p * 1.0
        q[0] += 1
        return root(q) * jax.nn.silu(q[1])

    def by_hand(p):
        q = p.at[0].add(1)
        return (q[0] * q[1]) ** (1 / 3) * jax.nn.silu(q[1])

    p = jnp.array([1.0, 2.0])
    wanted = jax.grad(by_hand)(p)
    np.testing.assert_allclose(jax.grad(inplace(program))(p), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(inplace(program)))(p), wanted, rtol=1e-5)


# -- Rules of custom_jvp ---------------------------------------------------------------------


def _cell_by_cell(c, d):
    return lax.scan(lambda total, v: (total + (c * v).sum() / 3, None), 0.0, d)[0]


# The tangent, linear in ``d``, with the slope in ``c``.
RULES = {
    "product": lambda c, d: (c * d).sum(),
    "jit": lambda c, d: jax.jit(lambda c, d: (c * d).sum())(c, d),
    "scan": lambda c, d: lax.scan(lambda t, v: (t + v[0] * v[1], None), 0.0, (c, d))[0],
    "scan, slope from outside": lambda c, d: _cell_by_cell(c * jnp.eye(3), d),
    "fori_loop": lambda c, d: lax.fori_loop(0, 3, lambda i, t: t + c[i] * d[i], 0.0),
    "cond": lambda c, d: lax.cond(c[0] > 0, lambda c, d: (c * d).sum(), lambda c, d: d[0], c, d),
    "checkpoint": lambda c, d: jax.checkpoint(lambda c, d: (jnp.abs(c) * d).sum())(c, d),
    "vmap": lambda c, d: jax.vmap(lambda c, d: c * d)(c, d).sum(),
    "another rule": lambda c, d: (jax.nn.relu(c) * d).sum(),
}
DERIVATIVES = {
    "grad": jax.grad,
    "jit(grad)": lambda f: jax.jit(jax.grad(f)),
    "linearize": lambda f: lambda x: jax.vmap(jax.linearize(f, x)[1])(jnp.eye(3)),
    "jacfwd": jax.jacfwd,
    "hessian": jax.hessian,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_of_a_custom_jvp_in_an_inplace_function(rule, derivative):
    """JAX calls it under a trace that knows one half of its operands and not the other."""

    def function(write):
        f = jax.custom_jvp(lambda x: jnp.sin(x).sum())

        def jvp(primals, tangents):
            (x,), (d,) = primals, tangents
            return jnp.sin(x).sum(), RULES[rule](write(jnp.cos(x), x), d)

        f.defjvp(jvp)
        return f

    def written(c, x):
        c[0] = c[1] * x[2]
        return c

    by_hand = function(lambda c, x: c.at[0].set(c[1] * x[2]))
    x = jnp.array([0.3, 0.5, 0.7])
    wanted = DERIVATIVES[derivative](by_hand)(x)
    found = inplace(lambda x: DERIVATIVES[derivative](function(written))(x))(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# -- Traces of other libraries ---------------------------------------------------------------


class Metres(_jax.Tracer):
    """A value of another library's trace."""

    def __init__(self, trace, value):
        super().__init__(trace, _jax.typeof(value))
        self.value = value


class Units(_jax.Trace):
    def __init__(self, parent):
        super().__init__()
        self.parent_trace = parent

    def process_primitive(self, primitive, args, params, /):
        with _jax.set_current_trace(self.parent_trace):
            values = (x.value if isinstance(x, Metres) else x for x in args)
            out = primitive.bind(*values, **params)
        return [Metres(self, x) for x in out] if primitive.multiple_results else Metres(self, out)


def in_metres(f):
    def run(x):
        trace = Units(_jax.current_trace())
        with _jax.set_current_trace(trace):
            out = f(Metres(trace, x))
        assert all(type(x) is Metres for x in jax.tree.leaves(out))
        return jax.tree.map(lambda x: x.value, out)

    return run


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jit", "linearize"])
def test_a_trace_of_another_library_gets_its_own_tracers_back(transform, jitted):
    """As quax has them: they are no arrays of ours, though a vmap inside hands them out."""
    apply = {
        "vmap": lambda x: jax.vmap(jnp.sin)(x),
        "grad": lambda x: jax.grad(lambda x: jnp.sin(x).sum())(x),
        "jvp": lambda x: jax.jvp(jnp.sin, (x,), (x,)),
        "jit": lambda x: jax.jit(jnp.sin)(x),
        "linearize": lambda x: jax.linearize(jnp.sin, x)[0],
    }[transform]
    program = in_metres(apply)
    found = inplace(jax.jit(program) if jitted else program)(jnp.asarray(X))
    jax.tree.map(np.testing.assert_array_equal, found, program(jnp.asarray(X)))
