"""The examples do what they say, compared with programs written by hand."""

import collections
import inspect
import pathlib
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstate.extend import new_trace
from jaxstate_tests.traces.test_stateful import PROGRAMS, Reference, total_gradient

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
import mixed_precision
import nan_locator
from count_operations import CountOperations, Counts, count

# -- Counting operations ---------------------------------------------------------------------

NOT_OPERATIONS = {
    "jit", "pjit", "closed_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
    "custom_vjp_call", "cond", "while", "scan",
}  # fmt: skip
PARTS = {"slice", "dynamic_slice", "gather", "dynamic_update_slice", "scatter", "scatter-add"}


class Executions(Reference):
    """Runs a jaxpr step by step, and notes what runs and how many bytes it takes and gives."""

    def __init__(self):
        super().__init__()
        self.runs, self.bytes = collections.Counter(), collections.Counter()

    def step(self, eqn, args):
        outs = super().step(eqn, args)
        name = eqn.primitive.name
        if name not in NOT_OPERATIONS:
            self.runs[name] += 1
            if name not in PARTS:
                self.bytes["read", name] += sum(jnp.asarray(x).nbytes for x in args)
                self.bytes["written", name] += sum(x.nbytes for x in outs)
        return outs


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
def test_counts_are_those_of_a_run_step_by_step(name, gradient):
    if gradient and name in ("while", "zero steps"):
        pytest.skip("JAX has no derivative of the one, and the reference no residuals of the other")
    x = jnp.array([0.3, -0.2, 0.9])
    f = jax.jit(total_gradient(PROGRAMS[name]) if gradient else PROGRAMS[name])
    reference = Executions()
    reference.count(f, x)
    out, counts = count(f)(x)
    assert counts.executions == reference.runs
    for which in ("read", "written"):
        found = {name: n for name, n in getattr(counts, which).items() if name not in PARTS}
        assert found == {name: n for (w, name), n in reference.bytes.items() if w == which}
    jax.tree.map(np.testing.assert_allclose, out, f(x))


def convolved(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 1), "VALID", feature_group_count=2)


ones = jnp.ones
FLOPS = {
    "product": (lambda a, b: a @ b, (ones((3, 5)), ones((5, 7))), 2 * 3 * 5 * 7),
    "batched": (
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
        (ones((2, 3, 5)), ones((2, 4, 5))),
        2 * 2 * 3 * 4 * 5,
    ),
    "convolution": (
        convolved,
        (ones((2, 4, 9, 8)), ones((6, 2, 3, 3))),
        2 * (2 * 6 * 4 * 6) * (2 * 3 * 3),
    ),
    "elementwise": (lambda a: a * a + 1.0, (ones((3, 4)),), 24),
    "sum": (lambda a: a.sum(1), (ones((3, 4)),), 9),
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", FLOPS)
def test_floating_point_operations_are_those_of_the_textbook_and_of_xla(name):
    f, args, wanted = FLOPS[name]
    _, counts = count(jax.jit(f))(*args)
    assert counts.flops.total() == wanted
    analysis = jax.jit(f).lower(*args).compile().cost_analysis()
    assert analysis["flops"] == pytest.approx(wanted, rel=0.35 if name == "sum" else 0.01)


def test_a_linear_solver_is_one_operation():
    a, b = jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.ones(2)
    x, counts = count(jax.jit(jnp.linalg.solve))(a, b)
    assert counts.executions["custom_linear_solve"] == 1 and counts.executions["lu"] == 1
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-6)
    _, found = nan_locator.locate_nan(jnp.linalg.solve)(a, b * jnp.nan)
    assert found.name == "custom_linear_solve" and not found.made


def test_numbers_do_not_overflow():
    w = jnp.zeros((1000, 1000))

    def f(x):
        return jax.lax.fori_loop(0, 50, lambda i, x: x @ w, x)

    _, counts = count(jax.jit(f))(w)
    assert counts.flops["dot_general"] == 50 * 2 * 1000**3
    assert counts.read["dot_general"] == 50 * 8 * 1000**2


def test_counts_depend_on_the_data_and_lanes_count_for_themselves():
    def halvings(n):
        with new_trace(CountOperations, state=jnp.zeros(64, jnp.uint32)) as trace:
            jax.lax.while_loop(lambda n: n > 1.0, lambda n: n / 2.0, n)
        kinds.update(trace.kinds)
        return trace.state

    kinds = {}
    states = jax.vmap(halvings)(jnp.array([1.0, 8.0, 1024.0]))
    assert [Counts(kinds, s).executions["div"] for s in states] == [0, 3, 10]


def test_too_many_kinds_of_operations_is_an_error():
    with pytest.raises(ValueError, match="kinds=") as error, jax.checking_leaks.func(False):
        count(lambda x: jnp.sin(jnp.cos(jnp.tan(x))), kinds=2)(1.0)
    assert "2 kinds" in str(error.value)


# -- Locating a NaN --------------------------------------------------------------------------


def line_of(f, text):
    """``file:line`` of the line of ``f`` that contains the text."""
    lines, start = inspect.getsourcelines(f)
    [n] = [n for n, line in enumerate(lines) if text in line]
    return f"{__file__}:{start + n}:"


@jax.jit
def fails_in_iteration(x, k):
    def body(c, i):
        y = jnp.sqrt(c * 2.0)
        z = jnp.log(c - i)  # negative in iteration k
        return jnp.where(i == k, -1.0, c), y + z

    return jax.lax.scan(body, x, jnp.arange(6.0))


def test_a_nan_in_one_iteration():
    """In the iteration after the one that makes the carry negative, sqrt comes first."""
    _, found = nan_locator.locate_nan(fails_in_iteration)(10.0, 3.0)
    assert found.line.startswith(line_of(fails_in_iteration, "jnp.sqrt")) and found.made
    _, found = nan_locator.locate_nan(fails_in_iteration)(3.5, 9.0)
    assert found.line.startswith(line_of(fails_in_iteration, "jnp.log")) and found.name == "log"
    out, found = nan_locator.locate_nan(fails_in_iteration)(10.0, 9.0)
    assert found is None and np.isfinite(out[1]).all()


@jax.jit
def fails_in_branch(x):
    def taken(x):
        return x / (x - x)  # 0 / 0 for 0, and infinity else

    def other(x):
        return jnp.arcsin(x)  # outside of its domain

    y = jax.lax.cond(x < 1.0, taken, other, x)
    return jax.lax.while_loop(lambda y: y < 5.0, lambda y: y + 1.0, y) * 0.5


def test_a_nan_in_a_branch():
    locate = nan_locator.locate_nan(fails_in_branch)
    assert locate(0.0)[1].line.startswith(line_of(fails_in_branch, "x / (x - x)"))
    assert locate(2.0)[1].line.startswith(line_of(fails_in_branch, "arcsin"))
    assert locate(0.5)[1] is None
    assert locate(1.0)[1] is None


def helper(x):
    return jnp.sqrt(x)  # the line of a function that is called twice


def calls_twice(x):
    a = jax.nn.standardize(jnp.linalg.cholesky(x))  # made inside of JAX
    b = helper(a.sum())
    return jnp.log(b)


def test_a_nan_made_inside_jax_is_at_the_line_of_the_user():
    x = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    for run in (calls_twice, jax.jit(calls_twice)):
        _, found = nan_locator.locate_nan(run)(x)
        assert found.line.startswith(line_of(calls_twice, "cholesky")) and found.made
    _, found = nan_locator.locate_nan(jax.jit(helper))(-1.0)
    assert found.line.startswith(line_of(helper, "jnp.sqrt"))


def test_the_line_of_a_call_is_that_of_this_call():
    """A function of JAX is traced once, for the line that called it first."""

    def program(x):
        a = jnp.linalg.norm(x) * jnp.inf
        b = jnp.linalg.norm(x - a + a)  # infinity minus infinity, before the call
        return jnp.linalg.norm(jnp.zeros(2) / jnp.linalg.norm(jnp.zeros(2))) + b  # 0 / 0

    for run in (program, jax.jit(program)):
        _, found = nan_locator.locate_nan(run)(jnp.ones(2))
        assert found.line.startswith(line_of(program, "x - a + a"))
        _, found = nan_locator.locate_nan(run)(jnp.zeros(2))
        assert found.line.startswith(line_of(program, "jnp.inf"))


def test_a_nan_that_was_there():
    _, found = nan_locator.locate_nan(jax.jit(helper))(jnp.nan)
    assert not found.made and found.line.startswith(line_of(helper, "jnp.sqrt"))
    assert "was given" in str(found)


def test_a_nan_of_a_derivative():
    def safe_sqrt(x):
        return jnp.where(x > 0, jnp.sqrt(x), 0.0)  # the well-known trap

    assert nan_locator.locate_nan(safe_sqrt)(0.0)[1] is None
    for slope in (jax.grad(safe_sqrt), jax.jit(jax.grad(safe_sqrt))):
        out, found = nan_locator.locate_nan(slope)(0.0)
        assert np.isnan(out) and found.line.startswith(line_of(safe_sqrt, "jnp.sqrt"))


def test_lanes_of_a_vmap_have_their_own_nans():
    def first(x):
        start = {"first": jnp.int32(0), "line": ""}
        with new_trace(nan_locator.LocateNan, state=start) as trace:
            jax.jit(helper)(x)
        operations.extend(trace.operations)
        return trace.state["first"]

    operations = []
    numbers = jax.vmap(first)(jnp.array([1.0, -1.0, jnp.nan]))
    assert numbers[0] == 0
    assert operations[numbers[1] - 1].made and not operations[numbers[2] - 1].made


# -- Mixed precision -------------------------------------------------------------------------

low = jnp.bfloat16


def low_product(x, w):
    return (x.astype(low) @ w.astype(low)).astype(x.dtype)


def network(product):
    def f(w, x):
        @jax.checkpoint
        def layer(x, w):
            return x + jnp.tanh(product(x, w)), x.sum()

        x, sums = jax.lax.scan(layer, x, w)
        return jax.nn.log_softmax(product(x, w[0])).mean() + sums.sum() * 0.01

    return f


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        jax.grad,
        lambda f: jax.jit(jax.grad(f)),
        lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, jnp.stack([x, 2 * x])),
        lambda f: lambda w, x: jax.jvp(lambda w: f(w, x), (w,), (jnp.cos(w),)),
    ],
    ids=["plain", "jit", "grad", "jit of grad", "vmap", "jvp"],
)
def test_products_are_those_of_casts_by_hand(transform):
    w = jax.random.normal(jax.random.key(0), (3, 8, 8)) / 3
    x = jax.random.normal(jax.random.key(1), (4, 8))
    found = transform(mixed_precision.mixed_precision(network(jnp.matmul)))(w, x)
    wanted = transform(network(low_product))(w, x)
    full = transform(network(jnp.matmul))(w, x)
    for a, b, c in zip(*map(jax.tree.leaves, (found, wanted, full)), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # XLA leaves out some of the roundings, not the same in both.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
        assert 1e-6 < np.abs(a - c).max() < 0.05 * np.abs(c).max() + 0.01
    by_hand = products_of(transform(network(low_product)), w, x)
    assert (
        products_of(transform(mixed_precision.mixed_precision(network(jnp.matmul))), w, x)
        == by_hand
    )
    assert by_hand.total() > 1 and {dtype for _, dtype, _ in by_hand} == {"bfloat16"}


def products_of(f, *args, name="dot_general"):
    """The shapes and types of all products in the jaxpr of a function."""
    found = collections.Counter()

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                collect(inner)
            if eqn.primitive.name == name:
                [out] = eqn.outvars
                found.update((out.aval.shape, v.aval.dtype.name, out.aval.dtype.name)
                             for v in eqn.invars)  # fmt: skip

    collect(jax.make_jaxpr(f)(*args))
    return found


def test_convolutions_and_their_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 3, 9))
    w = jax.random.normal(jax.random.key(1), (4, 3, 3))

    def loss(w, cast):
        y = jax.lax.conv(x.astype(cast), w.astype(cast), (1,), "SAME").astype(jnp.float32)
        return jnp.sum(jnp.sin(y) ** 2)

    mixed = mixed_precision.mixed_precision(lambda w: loss(w, jnp.float32))
    found = jax.jit(jax.grad(mixed))(w)
    by_hand = jax.grad(lambda w: loss(w, low))
    np.testing.assert_allclose(found, jax.jit(by_hand)(w), rtol=2e-2, atol=0.1)
    name = "conv_general_dilated"
    assert products_of(jax.grad(mixed), w, name=name) == products_of(by_hand, w, name=name)
    assert np.abs(found - jax.grad(loss)(w, jnp.float32)).max() > 1e-4


def test_outside_of_a_derivative_its_products_are_low_too():
    w, x = jax.random.normal(jax.random.key(0), (2, 5, 5))
    found = mixed_precision.mixed_precision(jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2)))(w)
    y = jnp.tanh(low_product(x, w))
    wanted = low_product(x.T, 2 * y * (1 - y**2))
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)


def test_sensitive_operations_of_a_low_program_are_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (1000,)).astype(low)

    def total(x):
        return jax.lax.reduce(jnp.exp(x), low(0), jax.lax.add, (0,))

    def by_hand(x):
        y = jnp.exp(x.astype(jnp.float32)).astype(low)
        return y.astype(jnp.float32).sum().astype(low)

    found = mixed_precision.mixed_precision(total)(x)
    assert found.dtype == low and found == by_hand(x)
    jaxpr = str(jax.make_jaxpr(mixed_precision.mixed_precision(total))(x))
    assert "f32[1000] = exp" in jaxpr and "bf16[1000] = exp" not in jaxpr


def test_other_operations_and_types_stay():
    def f(x, n):
        return jnp.sin(x) + x.astype(jnp.float16), n @ n, jax.nn.relu(x)

    x, n = jnp.linspace(0, 1, 4), jnp.arange(4)
    found, wanted = mixed_precision.mixed_precision(f)(x, n), f(x, n)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]


def test_what_float16_cannot_hold_is_counted():
    def f(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((1, 1)) * 10.0, None), x, None, length=6)[0]

    x = jnp.array([[20.0], [0.01]])
    run = mixed_precision.with_overflows(jax.jit(f), dtype=jnp.float16)
    out, overflows = run(x)
    # 20 becomes 200000 > 65504 before the fifth product; it stays infinite after.
    assert overflows == 1 and np.isinf(out[0, 0]) and np.isfinite(out[1, 0])
    assert mixed_precision.with_overflows(f)(x)[1] == 0


# -- The examples run ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["count_operations", "mixed_precision", "nan_locator"])
def test_an_example_runs(name, capsys):
    sys.modules[name].main()
    assert len(capsys.readouterr().out.splitlines()) > 1
