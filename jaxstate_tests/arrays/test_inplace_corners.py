"""Corners of NumPy's assignment: what an index or a value may be, and what is refused.

Every program runs in NumPy and as an in-place function, eagerly and jitted; an error of NumPy has
to be an error.
"""

import copy
import pickle
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate

MODES = {"eagerly": lambda f: f, "jit": jax.jit}


def matrix():
    return np.arange(16, dtype=np.float32).reshape(4, 4)


def program(source, **names):
    """A function of ``x`` (and of ``m``, ``i``), from its statements."""
    lines = "\n".join(f"    {line}" for line in source.splitlines())
    scope = {"np": np, "xp": np, **names}
    exec(f"def run(x, m, i):\n{lines}\n    return x", scope)
    return scope["run"]


def in_numpy(source, x, m, i):
    with np.errstate(all="ignore"):
        return program(source)(x.copy(), m.copy(), i)


def check(mode, source, x=None, m=(True, False, True, False), i=2):
    x, m = matrix() if x is None else x, np.array(m)
    wanted = in_numpy(source, x, m, i)
    found = MODES[mode](jaxstate.inplace(program(source, xp=jnp)))(x, m, i)
    np.testing.assert_array_equal(found, wanted)


VALUES_AND_INDICES = {
    "masked elements and a whole slice": "x[m, :] = 2 * x[m]",
    "a mask that was written between": "y = x[m] * 2\nx[m] = y\nm[1] = True\nx[m] += 1",
    "masked elements with two names": "y = x[m]\nz = y\ny += 1\nx[m] = z",
    "masked elements in a function": "def f(a):\n    a *= 2\ny = x[m]\nf(y)\nx[m] = y",
    "masked elements and NumPy's numbers": "x[m] = np.float32(2) * x[m] + np.ones(4, np.float32)",
    "a mask and an integer": "x[m, i] = 7\nx[i, m] = 8\nx[m, 1] = 9",
    "a mask and a new axis": "x[None, m] = 7\nx[m, None] = 8",
    "a buffer that is used again": (
        "b = np.zeros(4, np.float32)\nfor k in range(3):\n    b[:] = k\n    x[k] = b"
    ),
    "an index that is used again": "k = np.array([0, 1], np.int32)\nx[k] = 50\nk[0] = 2\nx[k] += 1",
    "a mask that is used again": (
        "k = np.array([True, False, True, False])\nx[k] = 50\nk[:] = False\nx[k] = 9"
    ),
    "an operand that is used again": "b = np.ones(4, np.float32)\nx += b\nb[:] = 9\nx[0] += b",
    "one integer of NumPy": (
        "x[np.array(1)] = 5\nx[np.array(1), 0] += 2\ny = x[np.array(2)]\ny[:] = 9"
    ),
    "all of it from a buffer, then elements": (
        "x[:] = np.ones((4, 4), np.float32)\nx[[0, 1]] = 5\nx[::2, i] = 7\nx[i] = x[None, i] + 1"
    ),
    "all of it from a list, then elements": (
        "x[...] = [4, 3, 2, 1]\ny = x.copy()\ny[[0, 2]] = 6\nx[0] = y[i] + x[i, i]"
    ),
    "lists of elements": (
        "x[0] = [x[0, 1], x[0, 0], 5.0, x[i, i]]\nx[1:3, :2] = [(x[0, 0], 1), [m[1], x[3, 3]]]"
    ),
    "a row of a mask": "k = x[0] > 1\nx[0, k] += 5\nx[i, k] = x[i, k] * 2 - x[1, k]",
    "a column of a mask": "k = x[:, 1] > 6\nx[k, 1] += 5\nx[k, 2] = 3 * x[k, 1]",
    "a mask of a part": "k = x[1:] > 6\nx[1:][k] -= 5\nx[1:][k] = x[:3][k]",
    "a mask and reversed columns": "x[m, ::-1] = 2 * x[m]",
    "masks and strides": "k = x[0] > 1\nx[::2, k] *= 2\nx[::-1][:2, k] += 1",
    "conditions": "x[x[0, 0] > 2] += 5\nx[0][x[1, 0] > 0] *= 3\nx[0, x[1, 1] > 0] = 7",
    "a mask and an integer with a slice between": (
        "k = x[0] > 1\ny = x.reshape(2, 2, 4)\ny[0, :, k] += 7"
    ),
    "ravel of a part is a copy": (
        "for y in (x[::2], x[:, 1], x.T, x[1:, :2], x[::-1]):\n"
        "    z = y.ravel()\n    z[0] = 90\n    y.reshape(-1)[-1] += z[1]"
    ),
    "ravel of neighbours is a view": (
        "for y in (x, x[1:3], x[2], x[None], x[1, 1:3], x[:1, :2]):\n    y.ravel()[-1] += 90"
    ),
    "flat": (
        "y = x.flat[1:3]\ny[0] = 99\nz = x.flat[[0, 1]]\nz[0] = -1\nx.flat[5] = 8\n"
        "x.T.flat[[0, 1]] += 3\nx[0] += sum(v for v in x[1].flat) + len(x.flat)"
    ),
    "flat as an array": "y = xp.asarray(x.flat)\nx[0] = xp.cumsum(y)[:4] + x[1].flat.copy().sum()",
    "flat assigned": "x.flat = [1, 2, 3]\nx[1].flat = 5",
    "views without axes": (
        "e = x[1, 1, ...]\ne += 5\ne.T[...] += 1\nu = e[...]\nu *= 2\ns = x[0, 0]\ns += 9\n"
        "x[2, 2] = u + s"
    ),
    "bounds of a slice": "x[np.array(1) : np.array(3), [0, 1]] = 9",
    "true and false": "x[True] = 7\nx[False] = 8\nx[np.True_, ..., 0] += 1\nx[1, True] -= 3",
    "a condition": "x[x.sum() > 3] = 1\nx[x.sum() > 1000] = 2\nx[x[0, 0] > 0, 1] = 5",
    "an empty list in a list": "x[[[]]] = 1\nx[:, []] = 2",
    "a range": "x[range(2)] = 1",
    "empty axes": "x[0:0][:, [1, 2]] *= 2\nx[:, 0:0][[0, 1]] += 1",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VALUES_AND_INDICES)
def test_gives_what_numpy_gives(name, mode):
    check(mode, VALUES_AND_INDICES[name])


REFUSALS = (TypeError, ValueError, OverflowError)


@pytest.mark.parametrize("mode", MODES)
def test_casts_of_numbers_are_those_of_numpy(mode):
    def written(dtype, value):
        x = np.zeros(3, dtype)
        source = "x[1:] = value" if np.ndim(value) else "x[0] = value\nx[1:] = value"
        run = program(source, value=value)
        ours = MODES[mode](jaxstate.inplace(lambda x: run(x, None, None)))
        try:
            wanted = run(x.copy(), None, None)
        except REFUSALS:
            with pytest.raises(REFUSALS):
                ours(x)
        else:
            np.testing.assert_array_equal(ours(x), wanted)

    values = (True, 7, -1, 2.5, 300, 1j, 0j, [300, 1], [1.5, 2], np.array([1, 0]), np.float32(2.5))
    for dtype in (bool, np.uint8, np.int32, np.float32, np.complex64):
        for value in values:
            written(dtype, value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("statement", ["x += 300", "x *= -1", "x[m] -= 300", "x[1:] <<= -1"])
def test_numbers_that_do_not_fit_are_refused_as_operands(statement, mode):
    x, m = np.arange(4, dtype=np.uint8), np.array([True, False, True, False])
    with pytest.raises(OverflowError):
        in_numpy(statement, x, m, 2)
    with pytest.raises(OverflowError, match="out of bounds"):
        MODES[mode](jaxstate.inplace(program(statement)))(x, m, 2)
    check(mode, statement.replace("300", "250").replace("-1", "1"), x)


@pytest.mark.parametrize("mode", MODES)
def test_fill_wants_a_scalar(mode):
    check(mode, "x.fill(3)\nx[0].fill(np.float32(2))\nx[1].fill(np.array(5.0))")
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        MODES[mode](jaxstate.inplace(program("x.fill([1, 2, 3, 4])")))(matrix(), None, None)


@pytest.mark.parametrize("holds", [True, False])
def test_a_traced_condition_beside_arrays(holds):
    """Where it is false NumPy has no such index, so the reference asks it itself."""
    for index in ("c, [0, 2]", "[0, 1], c, [2, 3]", "1, c", "None, c, m", "c", "c, ..., 1"):
        for statement in (f"x[{index}] = 7", f"x[{index}] = y"):
            run = program(f"c = x[0, 0] > i\ny = x[1, 1] + 1\n{statement}")
            x, m, i = matrix() + 1, np.array([True, False, True, False]), 0 if holds else 5
            wanted = run(x.copy(), m, i) if holds else x
            np.testing.assert_array_equal(jax.jit(jaxstate.inplace(run))(x, m, i), wanted)


REFUSED = {
    "a longer mask": "x[None, [True] * 5] = 5",
    "a shorter mask": "x[[True, False], [0, 1]] = 5",
    "a mask of two axes": "x[np.ones((2, 3), bool), None] = 5",
    "a read behind the end": "y = x[[4]]",
    "a read in front of the start": "y = x[0, [3, -5]]",
    "one integer of NumPy": "x[np.array(7)] = 5",
    "one integer of NumPy, read": "y = x[np.array(7)]",
}


@pytest.mark.leaks_allowed("tracebacks hold tracers")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_numpy_refuses(name, mode):
    with pytest.raises(IndexError):
        check(mode, REFUSED[name])
    run = jaxstate.inplace(program(REFUSED[name]))
    with pytest.raises(IndexError):
        MODES[mode](run)(matrix(), np.ones(4, bool), 2)


ELSEWHERE = {
    "a column": "x[m, 1] = x[m]",
    "columns": "x[:, m] = x[m]",
    "rows and columns": "x[m] = x[m] + x[:, m]",
    "written since": "y = x[m]\nm[0] = False\nm[1] = True\nx[m] = y",
}


@pytest.mark.leaks_allowed("tracebacks hold tracers")
@pytest.mark.parametrize("name", ELSEWHERE)
def test_masked_elements_go_back_where_they_came_from(name):
    """Elsewhere nothing says that they are as many, or in this order."""
    run = jax.jit(jaxstate.inplace(program(ELSEWHERE[name])))
    with pytest.raises((jaxstate.MaskedWriteError, jax.errors.NonConcreteBooleanIndexError)):
        run(matrix(), np.array([True, False, True, False]), 2)


def test_what_shares_memory_with_a_transferred_array_is_not_overwritten():
    x = jaxstate.array(jnp.zeros(3))
    x[0] = 1.0
    y = jax.device_put(x, jax.devices()[0])
    x[1] = 2.0
    np.testing.assert_array_equal(y, [1, 0, 0])
    np.testing.assert_array_equal(x, [1, 2, 0])


@pytest.mark.parametrize("mode", MODES)
def test_views_of_an_array_without_axes_are_written(mode):
    def views(t):
        for u in (t[...], t.T, t.transpose(), t.squeeze(), t.reshape(()), t[...][...]):
            u += 1
        s = t
        s += 10  # a scalar, as the result of a reduction is
        return t

    found = MODES[mode](jaxstate.inplace(views))(jnp.zeros(()))
    assert found == 6.0


ALIASES = {
    "asarray": (jnp.asarray, True),
    "asarray of that dtype": (lambda x: jnp.asarray(x, jnp.float32), True),
    "astype of jax.numpy": (lambda x: jnp.astype(x, x.dtype), True),
    "conversion": (lambda x: jax.lax.convert_element_type(x, x.dtype), True),
    "array": (jnp.array, False),
    "astype": (lambda x: x.astype(x.dtype), False),
    "broadcast": (lambda x: jax.lax.broadcast_in_dim(x, x.shape, (0,)), False),
    "new axes, but none": (lambda x: jnp.expand_dims(x, ()), False),
    "meshgrid": (lambda x: jnp.meshgrid(x)[0], False),
}


@pytest.mark.parametrize("mode", [*MODES, "vmap"])
@pytest.mark.parametrize("name", ALIASES)
def test_functions_that_have_nothing_to_do(name, mode):
    make, is_same = ALIASES[name]

    @jaxstate.inplace
    def run(x):
        y = make(x)
        y[0] = 9
        y += 1
        return x, y

    over_lanes = lambda f: lambda x: jax.tree.map(lambda a: a[0], jax.vmap(f)(x[None]))  # noqa: E731
    x, y = (over_lanes if mode == "vmap" else MODES[mode])(run)(jnp.arange(3.0))
    assert list(y) == [10, 2, 3]
    assert list(x) == ([10, 2, 3] if is_same else [0, 1, 2])


def test_known_arrays_are_no_symbolic_dimensions():
    @jaxstate.inplace
    def run(x, n, at):
        return jnp.split(x, at), jnp.linspace(0, 1, n), jax.nn.one_hot(1, n)

    parts, line, hot = run(jnp.arange(4.0), jnp.int32(3), jnp.array([1, 2]))
    assert [len(p) for p in parts] == [1, 1, 2]
    assert list(line) == [0, 0.5, 1] and list(hot) == [0, 1, 0]
    with pytest.raises(TypeError, match="concrete"):
        jax.jit(jaxstate.inplace(lambda n: jnp.zeros(n)))(3)


def test_what_is_fetched_is_a_copy():
    x = jaxstate.array(jnp.arange(3.0))
    fetched = []
    for i in range(3):
        x[0] = i
        fetched.append(jax.device_get({"x": x})["x"])
    assert [type(f) for f in fetched] == [np.ndarray] * 3
    assert [f[0] for f in fetched] == [0, 1, 2]


def test_a_pickled_array_is_an_array_of_its_own():
    x = jaxstate.array(jnp.arange(3.0))
    y = pickle.loads(pickle.dumps(x))
    y[0] = 9
    assert list(np.asarray(x)) == [0, 1, 2] and list(np.asarray(y)) == [9, 1, 2]


def test_an_argument_is_not_given_away():
    @jaxstate.inplace
    def run(x):
        return jax.jit(lambda a: a * 2, donate_argnums=0)(x)

    x = jnp.arange(3.0)
    assert list(run(x)) == [0, 2, 4]
    assert list(x) == [0, 1, 2]


@pytest.fixture
def threads_take_turns():
    """Each thread runs for a microsecond, so that it meets the others amid their writes."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def read_jitted(x):
    return jax.jit(lambda: x.sum())()


def read_with_a_derivative(x):
    return jax.grad(lambda a: (a * x).sum())(jnp.ones(x.shape))


READERS = {"none": lambda x: None, "copy": lambda x: x.T.copy()} | {
    f.__name__: f for f in (read_jitted, read_with_a_derivative)
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_threads_write_elements_of_one_array(read, threads_take_turns):
    x = jaxstate.array(jnp.zeros(80))
    errors = []

    def attempt(work, *args):
        try:
            work(*args)
        except Exception as error:
            errors.append(error)

    def write(k):
        for i in range(20):
            x[20 * k + i] = i
            x[20 * k + i] += 1

    def read_often():
        for _ in range(20):
            read(x)

    threads = [threading.Thread(target=attempt, args=(write, k)) for k in range(4)]
    threads.append(threading.Thread(target=attempt, args=(read_often,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    np.testing.assert_array_equal(np.asarray(x), np.tile(np.arange(20.0) + 1, 4))


@pytest.mark.parametrize("way", MODES.values(), ids=MODES)
def test_keys_from_outside_are_taken_apart_and_copied(way, key):
    keys = jax.random.split(key, 3)
    wanted = jax.random.key_data(keys)

    @jaxstate.inplace
    def run():
        first, second, third = keys
        copies = [keys.copy(), copy.deepcopy(keys), jnp.stack([first, second, third])]
        copies[0][0] = copies[1][0] = copies[2][0] = third
        return [jax.random.key_data(k) for k in [jnp.stack(list(keys)), *copies]]

    found = way(run)()
    np.testing.assert_array_equal(found[0], wanted)
    for changed in found[1:]:
        np.testing.assert_array_equal(changed, wanted[jnp.array([2, 1, 2])])
    np.testing.assert_array_equal(jax.random.key_data(keys), wanted)
    with pytest.raises(TypeError, match="0-d"):
        jaxstate.inplace(list)(key)


def test_a_result_without_the_axis_of_its_lanes_is_the_error_of_jax():
    run = jax.vmap(lambda x: x * 2, out_axes=None)
    for f in (run, jaxstate.inplace(run), jax.jit(jaxstate.inplace(run))):
        with pytest.raises(ValueError, match="axis spec None but output was batched on axis 0"):
            f(jnp.arange(3.0))
