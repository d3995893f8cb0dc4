"""A write through a view is one write into the array: in value, in cost and in memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate

# -- What is written -------------------------------------------------------------------------

VIEWS = {
    "slice": lambda x: x[1:-1],
    "steps": lambda x: x[::2, 1::3],
    "reversed": lambda x: x[::-1, -2:0:-2],
    "transposed": lambda x: x.T[1:],
    "row": lambda x: x[2],
    "column of a slice": lambda x: x[1:, ::-1][:, 1],
    "new axis": lambda x: x[None, 1:3, :, None],
    "reshaped": lambda x: x.reshape(3, 8),
    "flat": lambda x: x.ravel()[3:],
    "split and moved": lambda x: x.reshape(2, 2, 3, 2).transpose(2, 0, 3, 1)[1],
    "reshaped slice": lambda x: x[1:3].reshape(4, 3)[::-2],
    "reshaped rows of steps": lambda x: x[:, ::2].T.reshape(3, 2, 2)[::-1, 1],
    "a reshape that is not of lines": lambda x: x.reshape(8, 3)[1:7].reshape(9, 2)[2:],
    "in the order of Fortran": lambda x: x.ravel().reshape(4, 2, 3, order="F")[1:],
    "an axis of size one": lambda x: x[1:2].reshape(1, 1, 6),
}
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def positions(view):
    """Which elements of the base the view consists of: NumPy's view of their numbers."""
    return view(np.arange(BASE.size).reshape(BASE.shape))


def expected(view, index, value):
    """The base after a write that drops what is out of bounds of the view."""
    found, base = positions(view), BASE.copy()
    numbers = [np.asarray(i) for i in index]
    inside = [(i >= -n) & (i < n) for i, n in zip(numbers, found.shape, strict=False)]
    safe = tuple(np.where(ok, i, 0) for i, ok in zip(numbers, inside, strict=True))
    where = found[safe]
    keep = np.ones(where.shape, bool)
    for i, ok in zip(numbers, inside, strict=True):
        keep &= np.reshape(ok, ok.shape + (1,) * (keep.ndim - i.ndim)) if i.ndim else ok
    values = np.broadcast_to(value, where.shape)
    base.flat[where[keep]] = values[keep]
    return base


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("eagerly", [False, True])
def test_traced_integers(name, eagerly):
    view = VIEWS[name]
    shape = positions(view).shape

    for used in range(1, len(shape) + 1):

        @jaxstate.inplace
        def write(x, *index):
            view(x)[index] = 100.0
            return x

        write = write if eagerly else jax.jit(write)
        choices = [(0, -1, n // 2, n, -n - 1, n + 40) for n in shape[:used]]
        for index in itertools.islice(itertools.product(*choices), 0, None, 11 if eagerly else 1):
            got = write(BASE, *map(jnp.int32, index))
            np.testing.assert_array_equal(got, expected(view, index, 100.0), err_msg=str(index))


@pytest.mark.parametrize("name", VIEWS)
def test_arrays_of_positions(name):
    view = VIEWS[name]
    n, *rest = positions(view).shape
    values = np.arange(100, 100 + 3 * np.prod(rest, dtype=int), dtype=np.float32).reshape(3, *rest)

    @jax.jit
    @jaxstate.inplace
    def write(x, index, values):
        view(x)[index] = values
        return x

    for index in ([0, n + 1, -n - 3], [n, n + 7, -1], [n - 1, -n - 1, n + 2]):
        got = write(BASE, jnp.array(index), values)
        np.testing.assert_array_equal(got, expected(view, (np.array(index),), values))


@pytest.mark.parametrize("name", VIEWS)
def test_all_of_a_view_and_reads_of_it(name):
    view = VIEWS[name]

    def write(x):
        v = view(x)
        v[...] = np.arange(v.size, dtype=np.float32).reshape(v.shape)
        v[1:] += 50
        x[0] += 1000
        return x, v * 1

    wanted = BASE.copy()
    _, seen = write(wanted)
    for run in (jaxstate.inplace(write), jax.jit(jaxstate.inplace(write))):
        got, found = run(BASE)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(found, seen)


def test_derivatives_are_those_of_the_write_into_the_array():
    def ours(x, v, i):
        x[1:, ::-2][i, 0] = v
        x.reshape(-1)[i + 1] *= v
        return (x**2).sum()

    def hand(x, v, i):
        x = x.at[i + 1, 5].set(v)
        return (x.at[0, i + 1].multiply(v) ** 2).sum()

    got = jax.grad(jaxstate.inplace(ours), (0, 1))(BASE, 3.0, jnp.int32(1))
    want = jax.grad(hand, (0, 1))(BASE, 3.0, jnp.int32(1))
    jax.tree.map(np.testing.assert_allclose, got, want)


# -- What it costs ---------------------------------------------------------------------------

WRITES = {
    "an element": lambda v, i: v.__setitem__((i,) * v.ndim, 1.0),
    "a known element": lambda v, i: v.__setitem__((0,) * v.ndim, 1.0),
    "two elements": lambda v, i: v.__setitem__((jnp.stack([i, i + 1]),) * v.ndim, 1.0),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("write", WRITES)
def test_nothing_but_the_write_is_as_large_as_the_array(name, write):
    def ours(x, i):
        WRITES[write](VIEWS[name](x), i)
        return x

    jaxpr = jax.make_jaxpr(jaxstate.inplace(ours))(BASE, 0)
    large = [e.primitive.name for e in jaxpr.eqns for v in e.outvars if v.aval.size > 4]
    assert large in (["scatter"], ["dynamic_update_slice"])


BLOCKS = {
    "rows of a reshape": (lambda x: x.reshape(2, 2, 6).__setitem__((1, slice(0, 2), 3), 1.0), 1),
    "half of it, reshaped": (lambda x: x.reshape(2, 12).__setitem__(1, 1.0), 1),
    "columns": (lambda x: x.T[2:4].__setitem__(slice(None), 1.0), 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_stays_a_block(name):
    write, n = BLOCKS[name]
    jaxpr = jax.make_jaxpr(jaxstate.inplace(lambda x: (write(x), x)[1]))(BASE)
    writes = [e for e in jaxpr.eqns if e.outvars[0].aval.shape == BASE.shape]
    assert [e.primitive.name for e in writes] == ["dynamic_update_slice"] * n


def test_an_eager_write_through_a_view_is_in_the_memory_of_the_array():
    x = jaxstate.array(jnp.zeros((2048, 1024)))
    inner = x[1:-1, ::-1].T
    inner[3, 4] = 1.0  # the copy, if there is one
    where = jnp.asarray(x).unsafe_buffer_pointer()
    for i in range(3):
        inner[i, 2] = 2.0
        inner[jnp.int32(i), 3] = 3.0
    assert jnp.asarray(x).unsafe_buffer_pointer() == where
    assert float(x[3, 1021]) == 2.0 and float(x[4, 1021]) == 3.0


# -- Slices with a traced start --------------------------------------------------------------

DYNAMIC = {
    "write": lambda x, i: x.__setitem__(jax.ds(i, 2), 9.0),
    "columns": lambda x, i: x.__setitem__((slice(1, 3), jax.ds(i, 2)), 9.0),
    "augmented": lambda x, i: x.__setitem__(jax.ds(i, 2), x[jax.ds(i, 2)] + 1),
    "with an array": lambda x, i: x.__setitem__((jax.ds(i, 2), np.array([0, 2])), 9.0),
    "element of it": lambda x, i: x[jax.ds(i, 2)].__setitem__((1, 2), 9.0),
    "rows of it": lambda x, i: x.T[jax.ds(i, 3)][::-2].__setitem__(0, 9.0),
}
IN_NUMPY = {
    "write": lambda x, i: x.__setitem__(slice(i, i + 2), 9.0),
    "columns": lambda x, i: x.__setitem__((slice(1, 3), slice(i, i + 2)), 9.0),
    "augmented": lambda x, i: x.__setitem__(slice(i, i + 2), x[i : i + 2] + 1),
    "with an array": lambda x, i: x.__setitem__((slice(i, i + 2), np.array([0, 2])), 9.0),
    "element of it": lambda x, i: x[i : i + 2].__setitem__((1, 2), 9.0),
    "rows of it": lambda x, i: x.T[i : i + 3][::-2].__setitem__(0, 9.0),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_slices_are_views(name):
    def ours(x, i):
        DYNAMIC[name](x, i)
        return x

    for i in (0, 1, 2):
        wanted = BASE.copy()
        IN_NUMPY[name](wanted, i)
        for f in (jax.jit(jaxstate.inplace(ours)), jaxstate.inplace(ours)):
            np.testing.assert_array_equal(f(BASE, i), wanted)
            np.testing.assert_array_equal(f(BASE, jnp.int32(i)), wanted)


def test_a_dynamic_slice_out_of_bounds_is_dropped_as_in_jax():
    def ours(x, i):
        x[jax.ds(i, 3)] = 9.0
        return x

    for i in (2, 3, 4, -1):
        want = jax.jit(lambda x, i: x.at[jax.ds(i, 3)].set(9.0))(BASE, i)
        np.testing.assert_array_equal(jax.jit(jaxstate.inplace(ours))(BASE, i), want)


def test_a_traced_bound_of_a_slice_says_what_to_write():
    @jax.jit
    @jaxstate.inplace
    def f(x, n):
        x[:n] = 0.0
        return x

    with pytest.raises(IndexError, match=r"x\[jax.ds\(start, 3\)\]"):
        f(BASE, 2)


def test_dynamic_slices_are_read_as_in_jax():
    reads = {
        "rows": lambda x, i: x[jax.ds(i, 2)] * 1,
        "with an array": lambda x, i: x[jax.ds(i, 2), np.array([0, 2])] * 1,
        "beside a slice": lambda x, i: x[1:3, jax.ds(i, 2)] * 1,
        "with steps": lambda x, i: x[:, jax.ds(i, 2, 2)] * 1,
    }
    for name, read in reads.items():
        for i in (0, 1, 2):
            wanted = jax.jit(read)(BASE, i)
            for f in (jax.jit(jaxstate.inplace(read)), jaxstate.inplace(read)):
                np.testing.assert_array_equal(f(BASE, jnp.int32(i)), wanted, err_msg=name)
