"""NumPy's own functions and writable arrays: a write is done or refused, and never lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate

BASE = np.arange(12, dtype=np.float32).reshape(3, 4)
EYE = 2 * np.eye(3, dtype=np.float32)

# -- Functions that write --------------------------------------------------------------------

WRITES = {
    "copyto": lambda x: np.copyto(x, x[::-1] * 2),
    "copyto a view": lambda x: np.copyto(x[:, 1], [1, 2, 3]),
    "copyto where": lambda x: np.copyto(x, 5, where=np.arange(4) > 1),
    "putmask": lambda x: np.putmask(x, x > 5, [1, 2, 3]),
    "place": lambda x: np.place(x, x > 5, [1, 2, 3, 4]),
    "put": lambda x: np.put(x, [0, 5], [7, 8]),
    "put_along_axis": lambda x: np.put_along_axis(x, np.array([[0], [1], [2]]), 9.0, 1),
    "put_along_axis of all": lambda x: np.put_along_axis(x, np.array([0, 5]), 9.0, None),
    "fill_diagonal": lambda x: np.fill_diagonal(x, [5, 6, 7]),
    "fill_diagonal of a view": lambda x: np.fill_diagonal(x.T, 5, wrap=True),
    "add.at": lambda x: np.add.at(x, ([0, 0], [1, 1]), 1.0),
    "subtract.at": lambda x: np.subtract.at(x, [0, 0], 1.0),
    "multiply.at": lambda x: np.multiply.at(x[1], [0, 0, 2], 2.0),
    "maximum.at": lambda x: np.maximum.at(x.ravel(), [0, 0, 2], 2.0),
    "negative.at": lambda x: np.negative.at(x[1], [0, 2]),
    "out": lambda x: np.add(x, 1, out=x),
    "out by position": lambda x: np.sin(x, x),
    "out is a view": lambda x: np.multiply(x[0], x[1], out=x[2]),
    "out where": lambda x: np.add(x, 1, out=x, where=np.arange(4) > 1),
    "two outs": lambda x: np.modf(x / 2, out=(x, None)),
    "reduce": lambda x: np.add.reduce(x, axis=0, out=x[0]),
    "accumulate": lambda x: np.add.accumulate(x, axis=0, out=x),
    "outer": lambda x: np.multiply.outer(np.arange(3.0), np.arange(4.0), out=x),
    "sum": lambda x: np.sum(x, axis=1, out=x[:, 0]),
    "sum by position": lambda x: np.sum(x, 1, None, x[:, 0]),
    "mean": lambda x: np.mean(x, axis=0, out=x[0]),
    "cumsum": lambda x: np.cumsum(x, axis=1, out=x),
    "clip": lambda x: np.clip(x, 2, 5, out=x),
    "clip by position": lambda x: np.clip(x, 2, 5, x),
    "dot": lambda x: np.dot(EYE, x, out=x),
    "matmul": lambda x: np.matmul(EYE, x, out=x),
    "einsum": lambda x: np.einsum("ij,jk->ik", EYE, x, out=x),
    "take": lambda x: np.take(x, [1, 0, 2], axis=0, out=x),
    "round": lambda x: np.round(x / 3, 1, out=x),
    "concatenate": lambda x: np.concatenate([x[2:] * 2, x[:2] * 2], out=x),
}


def written(write):
    def f(x):
        write(x)
        return x

    return f


@pytest.mark.parametrize("name", WRITES)
def test_functions_that_write(name):
    f = written(WRITES[name])
    wanted = f(BASE.copy())
    for run in (jaxstate.inplace(f), jax.jit(jaxstate.inplace(f))):
        np.testing.assert_allclose(run(BASE), wanted, rtol=1e-6)
    outside = jaxstate.array(BASE)
    WRITES[name](outside)
    np.testing.assert_allclose(np.asarray(outside), wanted, rtol=1e-6)


REFUSED = {
    "copyto": (lambda x: np.copyto(x, 1j), "Cannot cast array data"),
    "out": (lambda x: np.add(x, 1j, out=x), "Cannot cast output"),
    "at": (lambda x: np.add.at(x, [0], 1j), "Cannot cast ufunc"),
    "shape": (lambda x: np.add(x, x, out=x[0]), "non-broadcastable"),
    "mask": (lambda x: np.place(x, [True], [1]), "same size"),
    "unknown": (lambda x: np.frompyfunc(abs, 1, 1)(x, out=x), r"x\[...\] = abs"),
    "unknown at": (
        lambda x: np.hypot.at(x, [0], 1.0),
        r"has no function for numpy's 'np.hypot.at'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_says_so(name):
    write, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=words):
        jaxstate.inplace(written(write))(BASE)


# -- What NumPy makes of an array ------------------------------------------------------------


def set_first(v):
    v[0] = -1


VIEWS = {
    "asarray": np.asarray,
    "asarray of a dtype": lambda x: np.asarray(x, np.float64),
    "asanyarray": np.asanyarray,
    "ravel": np.ravel,
    "expand_dims": lambda x: np.expand_dims(x, 0)[0],
    "atleast_1d": np.atleast_1d,
    "atleast_3d": np.atleast_3d,
    "array_split": lambda x: np.array_split(x, 2)[1],
    "hsplit": lambda x: np.hsplit(x, 2)[1],
    "flip": np.flip,
    "flipud": np.flipud,
    "rot90": np.rot90,
    "moveaxis": lambda x: np.moveaxis(x, 0, 1),
    "rollaxis": lambda x: np.rollaxis(x, 1),
    "swapaxes": lambda x: np.swapaxes(x, 0, 1),
    "transpose": np.transpose,
    "reshape": lambda x: np.reshape(x, (4, 3)),
    "reshape in another order": lambda x: x.ravel().reshape((3, 4), order="F"),
    "reshape in any order": lambda x: x.T.reshape((4, 3), order="A"),
    "ravel in another order": lambda x: x.T.ravel("F"),
    "squeeze": lambda x: np.squeeze(x[None]),
    "real": lambda x: x.real,
    "np.real": np.real,
    "imag": lambda x: x.imag,
    "view": lambda x: x.view(),
    "view of a dtype": lambda x: x.view(np.int32),
    "diagonal": lambda x: x.diagonal(),
    "diag": np.diag,
    "broadcast_to": lambda x: np.broadcast_to(x, (2, 3, 4)),
    "as_strided": lambda x: np.lib.stride_tricks.as_strided(x, (2,)),
    "sliding_window_view": lambda x: np.lib.stride_tricks.sliding_window_view(x, (2, 2)),
    "nditer": lambda x: next(np.nditer(x, op_flags=["readwrite"]))[None],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_write_to_what_numpy_makes_of_an_array_is_seen_or_refused(name, jitted):
    f = written(lambda x: set_first(VIEWS[name](x)))
    run = jax.jit(jaxstate.inplace(f)) if jitted else jaxstate.inplace(f)
    try:
        got = run(BASE)
    except (ValueError, TypeError, jax.errors.TracerArrayConversionError):
        return
    np.testing.assert_array_equal(got, f(BASE.copy()))


def test_parts_of_complex_numbers():
    @jaxstate.inplace
    def f(x):
        with pytest.raises(ValueError, match=r"x\.real = values"):
            x.real[0] = 5.0
        with pytest.raises(ValueError, match="read-only"):
            x.real += 1.0
        x.real = 3.0
        x[1].imag = 4.0
        x[1:].imag = jnp.float32([2.0, 1.0])
        return x

    np.testing.assert_array_equal(f(np.complex64([1, 2, 3j])), [3, 3 + 2j, 3 + 1j])


def test_copies_stay_copies():
    @jaxstate.inplace
    def f(x):
        y = np.array(x)
        y[0] = 5.0
        x.real.copy()[0] = 6.0
        return x

    np.testing.assert_array_equal(f(BASE), BASE)


def test_what_was_made_before_a_write_keeps_its_values():
    x = jaxstate.array(jnp.zeros(3))
    x[0] = 1.0
    before = np.asarray(x)
    x[0] = 2.0
    assert before[0] == 1.0 and np.asarray(x)[0] == 2.0


# -- Operators with arrays of NumPy ----------------------------------------------------------


def test_operators_are_those_of_jax():
    """What Python asks for is what JAX answers, whichever operand comes first."""
    ns = [np.arange(3.0), np.float32(2), np.int32([1, 2, 3])]
    for n in ns:
        for op in (
            lambda n, x: n + x, lambda n, x: n - x, lambda n, x: n * x, lambda n, x: n / x,
            lambda n, x: n // x, lambda n, x: n % x, lambda n, x: n**x, lambda n, x: n < x,
            lambda n, x: n >= x, lambda n, x: n == x, lambda n, x: n != x,
            lambda n, x: divmod(n, x),
        ):  # fmt: skip
            x = jnp.float32([1, 2, 3])
            wanted = op(n, x)
            ours = jaxstate.inplace(lambda x, op=op, n=n: op(n, x))
            for got in (ours(x), jax.jit(ours)(x)):
                assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, wanted)
                jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_an_array_of_numpy_is_not_written_by_an_assignment_with_one_of_jax():
    """``total += x`` makes ``total`` an array of JAX, jitted or not, as ever."""

    @jaxstate.inplace
    def f(x):
        total = start = np.zeros(3)
        total += x
        return total, start

    for run in (f, jax.jit(f)):
        total, start = run(jnp.ones(3))
        assert (total == 1).all() and (start == 0).all()


def test_out_of_numpy_is_written_by_numpy():
    @jaxstate.inplace
    def f(x):
        out = np.zeros(3)
        assert np.add(out, x, out=out) is out
        assert isinstance(np.add(x, 1), np.ndarray) and isinstance(np.sin(x), np.ndarray)
        return out

    assert (f(jnp.ones(3)) == 1).all()
