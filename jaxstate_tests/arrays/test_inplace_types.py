"""A write keeps the type of an array: weak or not, of a known or a symbolic size.

(`eight_devices.inplace_sharding` has the same writes on sharded arrays.)
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.sampling import part_of_product

# -- Writes, by `jaxstate` and by hand -------------------------------------------------------

WRITES = {
    "all": (lambda x: x.__setitem__(slice(None), 0.0), lambda x: jnp.zeros_like(x)),
    "fill": (lambda x: x.fill(2.0), lambda x: jnp.full_like(x, 2.0)),
    "augmented": (lambda x: x.__imul__(2.0), lambda x: x * 2.0),
    "augmented by itself": (lambda x: x.__iadd__(x * x), lambda x: x + x * x),
    "column": (lambda x: x.__setitem__((slice(None), 1), 1.0), lambda x: x.at[:, 1].set(1.0)),
    "columns": (
        lambda x: x.__setitem__((slice(None), slice(1, 3)), 1.0),
        lambda x: x.at[:, 1:3].set(1.0),
    ),
    "mask": (lambda x: x.__setitem__(x > 3, 0.0), lambda x: jnp.where(x > 3, 0.0, x)),
    "mask of rows": (
        lambda x: x.__setitem__(x[:, 0] > 3, 0.0),
        lambda x: jnp.where((x[:, 0] > 3)[:, None], 0.0, x),
    ),
    "masked": (lambda x: _add_where(x, x > 3, 1), lambda x: jnp.where(x > 3, x + 1, x)),
    "condition": (
        lambda x: x.__setitem__(x.sum() > 3, 0.0),
        lambda x: jnp.where(x.sum() > 3, 0.0, x),
    ),
    "an array": (lambda x: x.__setitem__(..., x + 1), lambda x: x + 1),
    "columns by an array": (
        lambda x: x.__setitem__((slice(None), np.array([2, 0])), 1.0),
        lambda x: x.at[:, np.array([2, 0])].set(1.0),
    ),
    "a view": (lambda x: x.T.__setitem__(1, 1.0), lambda x: x.at[:, 1].set(1.0)),
    "a view of a view": (
        lambda x: x[:, 2:].T[::-1].__setitem__(0, 1.0),
        lambda x: x.at[:, -1].set(1.0),
    ),
    "a view, augmented": (lambda x: x[:, 1:].__iadd__(1.0), lambda x: x.at[:, 1:].add(1.0)),
    "sorted": (lambda x: x.sort(), lambda x: jnp.sort(x)),
}
# What JAX does not do along a sharded axis.
ROWS = {
    "augmented by a mask": (
        lambda x: _add_where(x[1:-1], x[1:-1, 0] > 9, 1),
        lambda x: x.at[1:-1].add((x[1:-1, :1] > 9).astype(x.dtype)),
    ),
    "rows": (lambda x: x.__setitem__(slice(1, 3), 1.0), lambda x: x.at[1:3].set(1.0)),
    "row": (lambda x: x.__setitem__(1, 1.0), lambda x: x.at[1].set(1.0)),
    "last row": (lambda x: x.__setitem__(-1, 1.0), lambda x: x.at[-1].set(1.0)),
    "last rows": (lambda x: x.__setitem__(slice(-2, None), 1.0), lambda x: x.at[-2:].set(1.0)),
    "but the last": (lambda x: x.__setitem__(slice(None, -1), 1.0), lambda x: x.at[:-1].set(1.0)),
    "every other row": (
        lambda x: x.__setitem__(slice(None, None, 2), 1.0),
        lambda x: x.at[::2].set(1.0),
    ),
    "reversed": (lambda x: x.__setitem__(slice(None), x[::-1]), lambda x: x[::-1]),
    "reversed view": (lambda x: x[::-1].__setitem__(0, 1.0), lambda x: x.at[-1].set(1.0)),
    "every third, from behind": (
        lambda x: x[::-3].__setitem__(slice(None), 1.0),
        lambda x: x.at[::-3].set(1.0),
    ),
    "an element": (lambda x: x.__setitem__((1, 2), 1.0), lambda x: x.at[1, 2].set(1.0)),
    "a traced row": (
        lambda x: x.__setitem__(jnp.int32(x[0, 1]), 1.0),
        lambda x: x.at[jnp.int32(x[0, 1])].set(1.0),
    ),
    "a traced row of a view": (
        lambda x: x[1:].__setitem__(jnp.int32(x[0, 1]), 1.0),
        lambda x: x.at[1 + jnp.int32(x[0, 1])].set(1.0),
    ),
    "rows by an array": (
        lambda x: x.__setitem__(np.array([1, -1]), 1.0),
        lambda x: x.at[np.array([1, -1])].set(1.0),
    ),
    "a shift": (lambda x: x.__setitem__(slice(1, None), x[:-1]), lambda x: x.at[1:].set(x[:-1])),
    "a shift, augmented": (lambda x: x[1:].__iadd__(x[:-1]), lambda x: x.at[1:].add(x[:-1])),
    "flat": (lambda x: x.ravel().__setitem__(3, 1.0), lambda x: x.at[0, 3].set(1.0)),
    "the last of flat": (
        lambda x: x.reshape(-1).__setitem__(-1, 1.0),
        lambda x: x.at[-1, -1].set(1.0),
    ),
    "a new axis": (lambda x: x[None, 1:].__setitem__(0, 1.0), lambda x: x.at[1:].set(1.0)),
}


def _add_where(x, mask, value):
    x[mask] += value


def ours(writes):
    def f(x):
        writes[0](x)
        return x

    return jaxstate.inplace(f)


def array(rows=6):
    return jnp.arange(rows * 8.0, dtype=jnp.float32).reshape(rows, 8)


# -- Symbolic sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITES, *ROWS])
def test_symbolic_sizes(name):
    writes = {**WRITES, **ROWS}[name]
    (b,) = jax.export.symbolic_shape("b", constraints=("b>=4",))
    shape = jax.ShapeDtypeStruct((b, 8), jnp.float32)
    exported = jax.export.export(jax.jit(ours(writes)))(shape)
    assert exported.out_avals[0].shape == (b, 8)
    for rows in (4, 6, 7):
        np.testing.assert_array_equal(exported.call(array(rows)), writes[1](array(rows)))


def test_a_symbolic_size_is_an_index():
    @jaxstate.inplace
    def f(x):
        n = x.shape[0]
        x[n - 1] = 1.0
        x[n - 3 : n - 1] = 2.0
        x[n // 2, 0] = 3.0
        return x, x[: n // 2] * 1, x.reshape(n * 2, 4) * 1

    (b,) = jax.export.symbolic_shape("b", constraints=("b>=4",))
    exported = jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct((b, 8), jnp.float32))
    for rows in (5, 6):
        jax.tree.map(np.testing.assert_array_equal, exported.call(array(rows)), f(array(rows)))


def test_loops_with_symbolic_sizes():
    @jaxstate.inplace
    def f(x):
        total = jnp.zeros(x.shape[0])

        def body(i, _):
            total[i] += x[i].sum()
            x[i, 1:] = total[i]

        lax.fori_loop(0, x.shape[0], body, None)
        return x, total

    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct((b, 8), jnp.float32))
    sums = array(5).sum(1)
    x, total = exported.call(array(5))
    np.testing.assert_allclose(total, sums)
    np.testing.assert_allclose(x, array(5).at[:, 1:].set(sums[:, None]))


# -- Weak types ------------------------------------------------------------------------------

WEAK = {
    "full": lambda: jnp.full(3, 1.0),
    "where": lambda: jnp.where(jnp.arange(3) >= 0, 1.0, 0.0),
    "arithmetic": lambda: jnp.arange(3) * 0 + 1.0,
    "scalar": lambda: jnp.asarray(1.0) * jnp.ones(3, dtype=bool),
}


def _jit(write):
    jax.jit(write)()


def _loop(write):
    lax.fori_loop(0, 1, lambda i, _: write(), None)


def _cond(write):
    lax.cond(True, write, lambda: None)


def _grad(write):
    jax.grad(lambda t: (write(), t)[1])(1.0)


def _checkpoint(write):
    jax.checkpoint(write)()


PLACES = {"here": lambda write: write(), "jit": _jit, "loop": _loop, "cond": _cond, "grad": _grad,
          "checkpoint": _checkpoint}  # fmt: skip
KINDS = {
    "element": (lambda x: x.__setitem__(0, 5.0), [5, 1, 1]),
    "of another dtype": (lambda x: x.__setitem__(0, jnp.bfloat16(5)), [5, 1, 1]),
    "all": (lambda x: x.__setitem__(slice(None), jnp.float32([5, 6, 7])), [5, 6, 7]),
    "augmented": (lambda x: x.__iadd__(jnp.float32(2)), [3, 3, 3]),
    "view": (lambda x: x[1:].__setitem__(0, 5.0), [1, 5, 1]),
    "mask": (lambda x: x.__setitem__(x > 0, 5.0), [5, 5, 5]),
}


@pytest.mark.parametrize("make, kind", part_of_product(2, WEAK, KINDS))
def test_a_weakly_typed_array_is_read_written_and_read_anywhere(make, kind):
    write, wanted = KINDS[kind]
    turn = list(WEAK).index(make) + list(KINDS).index(kind)
    for i, first in enumerate(PLACES):
        for second in (("here", "jit", "loop")[(turn + i) % 3],):

            @jaxstate.inplace
            def f(first=first, second=second):
                x, seen = WEAK[make](), jnp.zeros(2)
                PLACES[second](lambda: seen.__setitem__(0, x.sum()))
                PLACES[first](lambda: (write(x), None)[1])
                PLACES[second](lambda: seen.__setitem__(1, x.sum()))
                return x, seen

            for run in (f, jax.jit(f)):
                x, seen = run()
                assert x.dtype == jnp.float32
                np.testing.assert_array_equal(x, wanted)
                np.testing.assert_array_equal(seen, [3.0, sum(wanted)])


def test_an_array_keeps_its_type_through_a_write():
    """As ``x.at[i].set(y)`` does: so a dtype that was small before the write is small after it."""

    def ours(y):
        x = jnp.full(3, 1.0)
        before = (y * x, y * x[1:2])
        x[0] = jnp.float32(5.0)
        return before, (y * x, y * x[1:2])

    def hand(y):
        x = jnp.full(3, 1.0)
        before = (y * x, y * x[1:2])
        x = x.at[0].set(jnp.float32(5.0))
        return before, (y * x, y * x[1:2])

    y = jnp.ones(3, jnp.bfloat16)
    for f in (jaxstate.inplace(ours), jax.jit(jaxstate.inplace(ours))):
        jax.tree.map(np.testing.assert_array_equal, f(y), hand(y))
        assert jax.tree.map(jax.typeof, f(y)) == jax.tree.map(jax.typeof, hand(y))


def test_a_weakly_typed_sum_is_taken_in_its_own_precision():
    @jaxstate.inplace
    def f(y):
        total = jnp.full(1, 256.0)
        for _ in range(4):
            total += y
        return total

    assert f(jnp.ones(1, jnp.bfloat16)) == 260.0
