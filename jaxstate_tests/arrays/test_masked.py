"""``x[mask]`` with traced masks equals NumPy's: eager, jitted, in loops, lanes and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import inplace

X = np.array([[1.5, -2.0, 0.0], [3.0, -0.5, 2.0]], np.float32)
Y = np.array([[0.5, 4.0, -1.0], [2.0, 1.0, -3.0]], np.float32)


def augmented(x, y):
    x[x > 0] += 1
    x[x < 0] *= 3
    return x


def squared(x, y):
    mask = x > 0.25
    x[mask] **= 2
    x[mask] = 1 / x[mask] - x[mask]
    return x


def of_two_arrays(x, y):
    mask = (x > 0) & (y > 0)
    x[mask] = 2 * x[mask] - y[mask] / (1 + abs(y[mask]))
    y[mask] = -x[mask]
    return x + 10 * y


def rows(x, y):
    rows = x[:, 0] > 2
    x[rows] += y[0]
    x[rows, :] -= 1
    return x


def columns(x, y):
    columns = x[0] > -1
    x[:, columns] = x[:, columns] * 2 + y[:, columns]
    return x


def through_views(x, y):
    v = x.T[1:]
    w = y[::-1]
    v[v < 1] -= 5
    positive = x > 0
    w[positive] = w[positive] + 1
    return x - y


def compared(x, y):
    mask = x != 0
    b = x > 100
    b[mask] = x[mask] > y[mask]
    b[mask] |= y[mask] > 3
    return b


def integers(x, y):
    i = (x * 4).astype("int32")
    mask = i > 0
    i[mask] //= 3
    i[mask] = i[mask] % 2 + 7.9
    i[mask] <<= 1
    return i


PROGRAMS = [
    augmented, squared, of_two_arrays, rows, columns, through_views, compared, integers,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_equals_numpy(program):
    wanted = program(X.copy(), Y.copy())
    f = inplace(program)
    for run in (f, jax.jit(f)):
        found = run(X, Y)
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    xs, ys = np.stack([X, -X, 2 * X]), np.stack([Y, Y - 1, -Y])
    wanted = np.stack([program(x.copy(), y.copy()) for x, y in zip(xs, ys, strict=True)])
    for run in (jax.vmap(f), jax.jit(jax.vmap(f))):
        np.testing.assert_allclose(run(xs, ys), wanted, rtol=1e-6)


def test_in_the_body_of_a_loop_and_a_branch():
    def python(x):
        for i in range(4):
            x[x > i] -= 0.5
        if x.sum() > 0:
            x[x < 0] *= 2
        return x

    @inplace
    def f(x):
        def body(i, _):
            x[x > i] -= 0.5

        def branch():
            x[x < 0] *= 2

        jax.lax.fori_loop(0, 4, body, None)
        jax.lax.cond(x.sum() > 0, branch, lambda: None)
        return x

    for run in (f, jax.jit(f)):
        np.testing.assert_allclose(run(X), python(X.copy()))


def test_derivatives_know_nothing_of_what_the_mask_does_not_find():
    """``jnp.where(x != 0, 1 / x, x)`` has the derivative NaN at 0."""

    @inplace
    def f(x):
        mask = x != 0
        x[mask] = 1 / x[mask]
        return x

    x = jnp.asarray(X)
    wanted = np.where(X == 0, 1, -1 / np.where(X == 0, 1, X) ** 2)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: f(x).sum()))(x), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(jax.jit(f), (x,), (jnp.ones_like(x),))[1], wanted, rtol=1e-6)


def test_numpy_refuses_to_cast_and_so_does_this():
    @jax.jit
    @inplace
    def f(i):
        i[i > 0] += 1.5
        return i

    with pytest.raises(TypeError, match="same_kind"):
        f(jnp.arange(3))


@pytest.mark.leaks_allowed("an error holds tracers in its traceback")
@pytest.mark.parametrize(
    "use",
    [
        lambda x, m: jnp.sin(x[m]),
        lambda x, m: x[m].sum(),
        lambda x, m: len(x[m]),
        lambda x, m: x[m][0],
        lambda x, m: x[m] + x[x < 0],
        lambda x, m: x[m] + jnp.ones(3),
        lambda x, m: np.asarray(x[m]),
        lambda x, m: bool(x[m]),
        lambda x, m: [*x[m]],
        lambda x, m: x[m],
        lambda x, m: {"found": x[m] + 1},
    ],
)
def test_everything_else_is_the_error_of_jax(use):
    @jax.jit
    @inplace
    def f(x):
        return use(x, x > 0)

    with jax.checking_leaks.func(False), pytest.raises(jax.errors.NonConcreteBooleanIndexError):
        f(jnp.arange(3.0))


@pytest.mark.leaks_allowed("an error holds tracers in its traceback")
def test_other_masks_and_shapes_are_refused():
    @jax.jit
    @inplace
    def other_mask(x):
        x[x > 0] = x[x < 0]

    @jax.jit
    @inplace
    def other_shape(x, y):
        mask = x > 0
        y[mask] = x[mask]

    with jax.checking_leaks.func(False):
        with pytest.raises(jaxstate.MaskedWriteError, match="another mask"):
            other_mask(jnp.arange(3.0))
        with pytest.raises(jaxstate.MaskedWriteError, match="another shape"):
            other_shape(jnp.arange(3.0), jnp.ones((3, 2)))
