"""The programs of `examples/numpy_ports` do what they do in NumPy, and compile to what is written
by hand."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstate import inplace
from jaxstate._src._jax import jaxprs_in
from jaxstate_tests.ports import NAMES, numpy_ports, port

SIZE = 0.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["jit", "vmap"])
def test_ports_give_what_numpy_gives(name, mode):
    in_numpy = numpy_ports.in_numpy(numpy_ports.PROGRAMS[name])
    wanted = in_numpy(*numpy_ports.inputs(SIZE)[name])
    f, _, arrays = port(name, SIZE)
    before = copy.deepcopy(arrays)
    if mode == "vmap":
        lanes = jax.jit(jax.vmap(f))(*jax.tree.map(lambda x: jnp.stack([x, x]), arrays))
        found = jax.tree.map(lambda x: x[1], lanes)
    else:
        found = jax.jit(f)(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, arrays, before)


# -- The compiled program ------------------------------------------------------------------------


def count_equations(jaxpr):
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(1 + sum(map(count_equations, jaxprs_in(e.params))) for e in jaxpr.eqns)


def count_operations(f, *arrays):
    """The operations of the compiled program, in its loops and fusions too."""
    lines = jax.jit(f).lower(*arrays).compile().as_text().splitlines()
    return sum(" = " in line and " parameter(" not in line for line in lines)


def element(x, i):
    x[i] = 1.0
    return x


def row(x, i):
    x[i] = x[0]
    return x


def add_to_elements(x, i):
    x[i, ::2] += 1
    return x


def mask(x, i):
    x[x > i] = 0
    return x


def carry(x, i):
    def body(k, _):
        x[k] += x[k - 1]

    jax.lax.fori_loop(1, 4, body, None)
    return x


def two_arrays(x, i):
    y = jnp.zeros(4)

    def body(c, k):
        y[k] = x[k].sum()
        x[k] *= y[k]
        return c, None

    jax.lax.scan(body, None, jnp.arange(4))
    return x, y


def two_arrays_by_hand(carry, k):
    x, y = carry
    y = y.at[k].set(x[k].sum())
    return (x.at[k].set(x[k] * y[k]), y), None


def put(x, block):
    return jax.lax.dynamic_update_slice(x, block, (0, 0))


def branch(x, i):
    def write():
        x[0] = 5.0

    jax.lax.cond(i > 0, write, lambda: None)
    return x


TYPICAL = {
    "element": (element, lambda x, i: x.at[i].set(1.0)),
    "row": (row, lambda x, i: x.at[i].set(x[0])),
    "elements": (add_to_elements, lambda x, i: x.at[i, ::2].set(x[i, ::2] + 1)),
    "mask": (mask, lambda x, i: jax.lax.select(x > i, jnp.zeros_like(x), x)),
    "loop": (
        carry,
        lambda x, i: jax.lax.fori_loop(1, 4, lambda k, x: x.at[k].set(x[k] + x[k - 1]), x),
    ),
    "scan": (
        two_arrays,
        lambda x, i: jax.lax.scan(two_arrays_by_hand, (x, jnp.zeros(4)), jnp.arange(4))[0],
    ),
    "branch": (
        branch,
        lambda x, i: jax.lax.cond(i > 0, lambda x: put(x, jnp.full((1, 5), 5.0)), lambda x: x, x),
    ),
}


def check_compiles_to(by_hand, written, *arrays):
    made, wanted = (jax.make_jaxpr(f)(*arrays) for f in (written, by_hand))
    assert count_equations(made) == count_equations(wanted), made
    assert count_operations(written, *arrays) == count_operations(by_hand, *arrays)


@pytest.mark.optimized
@pytest.mark.parametrize("name", TYPICAL)
def test_typical_functions_compile_to_what_is_written_by_hand(name):
    written, by_hand = TYPICAL[name]
    x, i = jnp.arange(20.0).reshape(4, 5), jnp.int32(2)
    jax.tree.map(np.testing.assert_array_equal, inplace(written)(x, i), by_hand(x, i))
    check_compiles_to(by_hand, inplace(written), x, i)


@pytest.mark.optimized
@pytest.mark.parametrize("name", NAMES)
def test_ports_compile_to_what_is_written_by_hand(name):
    f, by_hand, arrays = port(name, SIZE)
    check_compiles_to(by_hand, f, *arrays)
