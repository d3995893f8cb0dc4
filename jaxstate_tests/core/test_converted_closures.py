"""Arrays written in place by functions whose closures a solver has made explicit.

A solver converts the functions that it is given: what they close over becomes operands, which it
passes on as it likes. Reads see every write all the same, and derivatives are right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.sampling import part_of_product

error_is_expected = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


def by_closure_convert(f, x):
    converted, consts = jax.closure_convert(f, x)
    return lambda x, consts: converted(x, *consts), list(consts)


def by_make_jaxpr(f, x):
    closed = jax.make_jaxpr(f)(x)
    has_consts = hasattr(closed, "with_consts")  # since jax 0.11 a jaxpr carries its own
    jaxpr = closed.with_consts(()) if has_consts else closed.jaxpr
    return lambda x, consts: jax.core.eval_jaxpr(jaxpr, consts, x)[0], list(closed.consts)


# -- What a solver does three times with a writer f and a reader g, given their operands --------


def closes_over(turn, x, consts):
    return lax.fori_loop(0, 3, lambda _, x: turn(x, *consts), x)


def passes_to_jit(turn, x, consts):
    return jax.jit(lambda x, *c: lax.fori_loop(0, 3, lambda _, x: turn(x, *c), x))(x, *consts)


def scans(turn, x, consts):
    return jax.jit(lambda x, *c: lax.scan(lambda x, _: (turn(x, *c), None), x, None, length=3)[0])(
        x, *consts
    )


def carries(turn, x, consts):
    def body(carry, _):
        x, consts = carry
        return (turn(x, *consts), consts), None

    return jax.jit(lambda x, *c: lax.scan(body, (x, c), None, length=3)[0][0])(x, *consts)


def calls(turn, x, consts):
    for _ in range(3):
        x = turn(x, *consts)
    return x


def jits_each_call(turn, x, consts):
    for _ in range(3):
        x = jax.jit(turn)(x, *consts)
    return x


def checkpoints(turn, x, consts):
    return scans(jax.checkpoint(turn), x, consts)


def branches(turn, x, consts):
    def either(x, *consts):
        return lax.cond(x > -1e9, turn, lambda x, *_: x, x, *consts)

    return scans(either, x, consts)


SOLVERS = (
    closes_over, passes_to_jit, scans, carries, calls, jits_each_call, checkpoints, branches
)  # fmt: skip


def writes_then_reads(f, g):
    return lambda x, fc, gc: g(f(x, fc), gc)


def reads_then_writes(f, g):
    return lambda x, fc, gc: f(g(x, gc), fc)


def reads_in_a_loop(f, g):
    return lambda x, fc, gc: f(lax.fori_loop(0, 2, lambda _, x: g(x, gc), x), fc)


def writes_then_reads_under_a_rule(f, g):
    @jax.custom_vjp
    def ruled(x, gc):
        return g(x, gc)

    ruled.defvjp(lambda x, gc: (ruled(x, gc), (x, gc)), lambda res, ct: jax.vjp(g, *res)[1](ct))
    return lambda x, fc, gc: ruled(f(x, fc), gc)


def reads_under_a_rule_then_writes(f, g):
    ruled = jax.custom_jvp(g)
    ruled.defjvp(lambda primals, tangents: jax.jvp(g, primals, tangents))
    return lambda x, fc, gc: f(ruled(x, gc), fc)


WRITES_FIRST = writes_then_reads, writes_then_reads_under_a_rule
TURNS = (*WRITES_FIRST, reads_then_writes, reads_under_a_rule_then_writes, reads_in_a_loop)


def by_hand(turn, x, a):
    """The program with the array passed on."""

    def write(x, a):
        return x + 1, a.at[0].set(x * a[1] + a[0])

    def read(x, a):
        return x * a.sum() * 0.5

    for _ in range(3):
        if turn in WRITES_FIRST:
            x, a = write(x, a)
            x = read(x, a)
        else:
            x = read(x, a)
            x = read(x, a) if turn is reads_in_a_loop else x
            x, a = write(x, a)
    return x, a


def in_place(convert, writer_first, turn, solver):
    @jaxstate.inplace
    def run(x, a):
        def write(x):
            a[0] = x * a[1] + a[0]
            return x + 1

        def read(x):
            return x * a.sum() * 0.5

        functions = (write, read) if writer_first else (read, write)
        converted = {f: convert(f, x) for f in functions}
        (f, fc), (g, gc) = converted[write], converted[read]
        n = len(fc)
        once = turn(f, g)
        return solver(lambda x, *c: once(x, list(c[:n]), list(c[n:])), x, [*fc, *gc]), a

    return run


X, A = jnp.float32(1.5), jnp.array([0.5, 0.25], jnp.float32)


def total(run):
    return lambda x, a: sum(jnp.sum(y) for y in run(x, a))


TRANSFORMATIONS = {
    "called": lambda run: run,
    "gradient": lambda run: jax.grad(total(run), (0, 1)),
    "jitted lanes": lambda run: (
        lambda x, a: jax.jit(jax.vmap(run))(jnp.stack([x, 2 * x]), jnp.stack([a, -a]))
    ),
}


@pytest.mark.parametrize(
    "solver, turn", part_of_product(2, SOLVERS, TURNS, name=lambda f: f.__name__)
)
def test_reads_see_the_writes_of_other_converted_functions(solver, turn):
    writer_first = (TURNS.index(turn) + SOLVERS.index(solver)) % 2 == 0
    for convert in (by_closure_convert, by_make_jaxpr):
        run = in_place(convert, writer_first, turn, solver)
        for transform in TRANSFORMATIONS.values():
            want = transform(lambda x, a: by_hand(turn, x, a))(X, A)
            got = transform(run)(X, A)
            jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5), got, want)


@error_is_expected
def test_a_rule_around_a_write_keeps_the_write_and_has_no_derivative_by_it():
    """The rule says nothing of what is in the array."""

    def ruled(f, g):
        fun = jax.custom_vjp(lambda x, fc, gc: g(f(x, fc), gc))
        fun.defvjp(
            lambda *args: (fun(*args), args), lambda args, ct: jax.tree.map(ct.__mul__, args)
        )
        return fun

    run = in_place(by_closure_convert, True, ruled, scans)
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5),
        run(X, A),
        by_hand(writes_then_reads, X, A),
    )
    with pytest.raises(jaxstate.CustomRuleStateError, match="says nothing about that derivative"):
        jax.grad(total(run), 1)(X, A)


def test_a_write_between_two_solves_is_seen_by_the_second():
    @jaxstate.inplace
    def twice(x, a):
        def field(x):
            return x * a.sum()

        def solve(x):
            f, consts = by_closure_convert(field, x)
            return passes_to_jit(lambda x, *c: f(x, c), x, consts)

        first = solve(x)
        a[0] = 2.0
        return first + solve(x)

    def hand(x, a):
        return x * a.sum() ** 3 + x * a.at[0].set(2.0).sum() ** 3

    np.testing.assert_allclose(twice(X, A), hand(X, A), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(twice, (0, 1))(X, A)[1], jax.grad(hand, (0, 1))(X, A)[1], rtol=1e-6
    )


@error_is_expected
def test_a_derivative_by_an_operand_that_was_written_since_is_refused():
    @jaxstate.inplace
    def run(x, a):
        f, consts = by_closure_convert(lambda x: x * a.sum(), x)
        a[0] = 2.0
        return jax.grad(lambda consts: f(x, consts))(consts)

    with pytest.raises(jaxstate.ConvertedClosureError, match=r"was written since"):
        run(X, A)


def test_an_operand_that_was_not_written_is_differentiated():
    @jaxstate.inplace
    def run(x, a):
        a[0] = 2.0
        f, consts = by_closure_convert(lambda x: x * a.sum(), x)
        return jax.grad(lambda consts: jnp.sum(f(x, consts)))(consts)

    np.testing.assert_allclose(run(X, A)[0], [1.5, 1.5])


def test_what_is_read_and_written_in_one_loop_is_carried_once():
    """The capture of the array that the body writes is no operand of the loop."""

    @jaxstate.inplace
    def run(a):
        def body(i, x):
            y = x + a[0]
            a[0] = y
            return y

        return lax.fori_loop(0, 3, body, jnp.float32(1)), a

    (loop,) = (e for e in jax.make_jaxpr(run)(A).eqns if e.primitive.name in ("scan", "while"))
    assert len([v for v in loop.invars if v.aval.shape == (2,)]) == 1


# -- Parts of objects --------------------------------------------------------------------------

CALLS = {
    "called": lambda h, x, consts: h(x, *consts),
    "jitted": lambda h, x, consts: jax.jit(h)(x, *consts),
    "closed over": lambda h, x, consts: jax.jit(lambda x: h(x, *consts))(x),
    "in a checkpoint": lambda h, x, consts: jax.checkpoint(h)(x, *consts),
    "jitted twice": lambda h, x, consts: jax.jit(lambda x, c: jax.jit(h)(x, *c) + 0.0)(x, consts),
}


def loop_over_objects(call, is_made_inside, assigns_first):
    """The function reads a part of an object that the loop assigns."""

    def run(tree, x):
        def read(x):
            return x * tree["n"]

        made = jax.closure_convert(read, x)

        def assign():
            tree["n"] = tree["n"] + tree["step"]

        def body(_, x):
            h, consts = jax.closure_convert(read, x) if is_made_inside else made
            if assigns_first:
                assign()
            x = CALLS[call](h, x, consts)
            if not assigns_first:
                assign()
            return x

        return lax.fori_loop(0, 3, body, x)

    def by_hand(tree, x):
        n = tree["n"]
        for _ in range(3):
            n = n + tree["step"] if assigns_first else n
            x = x * n
            n = n if assigns_first else n + tree["step"]
        return x, {**tree, "n": n}

    return jaxstate.mutate(run), by_hand


@pytest.mark.parametrize("call", CALLS)
def test_a_converted_function_reads_the_objects_as_they_are_when_it_is_called(call):
    tree = {"n": jnp.float32(2), "step": jnp.float32(0.5)}
    orders = (False, False), (False, True), (True, False), (True, True)
    for is_made_inside, assigns_first in orders:
        run, by_hand = loop_over_objects(call, is_made_inside, assigns_first)
        for transform in (lambda f: f, jax.jit):
            got, want = transform(run)(tree, X), by_hand(tree, X)
            jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-6), got, want)
        grads = [jax.grad(lambda x, f=f: f(tree, x)[0])(X) for f in (run, by_hand)]
        np.testing.assert_allclose(*grads, rtol=1e-6)
