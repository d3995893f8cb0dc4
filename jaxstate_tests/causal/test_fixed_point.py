"""Sequences found by `causal_fixed_point` are those of running the whole function each time."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import NotCausalError, causal_fixed_point
from jaxstate.extend import new_trace
from jaxstate_tests.causal.programs import (
    CAUSAL,
    dilated,
    embedded,
    read_out,
    shifted,
    softmax_attention,
    triangle,
    weights,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import incremental
from count_operations import CountOperations, Counts


@jax.checking_leaks.func(False)
def by_hand(f, x, places):
    """All of f for each element; the sequences are NumPy's, and written in the order of places."""
    leaves, tree = jax.tree.flatten(x)
    leaves, run = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves], jax.jit(f)
    for place in places:
        for leaf, new in zip(leaves, jax.tree.leaves(run(tree.unflatten(leaves))), strict=True):
            leaf[place] = np.asarray(new)[place]
    return tree.unflatten(leaves)


def close(found, wanted):
    """Up to the order of summation: sums of at most some tens of numbers of order one, fed back."""
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


QUICK = {
    "added_mask", "multiplied_mask", "recurrent", "branches", "pooled", "moved", "associative",
    "parts_at_known_places",
}  # fmt: skip
EACH = [
    pytest.param(name, n, marks=() if name in QUICK and n == 8 else pytest.mark.slow)
    for name in CAUSAL
    for n in (2, 8, 14)
]


@pytest.mark.parametrize(("name", "n"), EACH)
def test_the_sequence_is_that_of_the_whole_function_for_each_element(name, n):
    f = CAUSAL[name]
    wanted = by_hand(f, jnp.zeros(n), range(n))
    assert n < 4 or len(set(wanted.tolist())) > n // 2, "a sequence to compare"
    close(jax.jit(lambda x: causal_fixed_point(f, x))(jnp.ones(n)), wanted)


def test_without_jit_and_for_some_elements_only():
    wanted = by_hand(dilated, jnp.zeros(6), range(6))
    for steps in (0, 1, 4):
        found = causal_fixed_point(dilated, jnp.ones(6), steps=steps)
        close(found, np.where(np.arange(6) < steps, wanted, 0))
    constant = causal_fixed_point(lambda x: jnp.sin(jnp.arange(4.0)), jnp.zeros(4))
    close(constant, np.sin(np.arange(4)))


@pytest.mark.slow
def test_what_is_not_known_while_tracing_moves_along_other_axes():
    """Places, numbers of a branch and a second mask that are arguments of a jitted function."""

    def f(k, mask, x):
        h, n = embedded(x), len(x)
        h = jax.lax.dynamic_update_slice(h, h[:, :1] * 2, (0, k))
        h = h + jax.lax.dynamic_slice(h, (0, k), (n, 1)) + h[:, jnp.array([1, 2, 0, 3]) - k]
        h = h.at[:, k].add(1.0).at[:, k + 1].set(h[:, 0])
        h = jax.lax.switch(k, [jnp.sin, jnp.cos, lambda h: h + 1], h)
        logits = jnp.where(triangle(n) & mask, h @ h.T, -1e30)
        return read_out(jax.nn.softmax(logits) @ h)

    @jax.jit
    def found(k, mask):
        return causal_fixed_point(functools.partial(f, k, mask), jnp.zeros(7))

    mask = jnp.array([True, True, False, True, True, False, True])
    for k in range(3):
        close(found(k, mask), by_hand(functools.partial(f, k, mask), jnp.zeros(7), range(7)))


# -- Other orders ----------------------------------------------------------------------------


def pixels(x):
    """A PixelCNN: masked convolutions over rows and columns."""

    def convolved(x, kernel, sees_itself):
        mask = np.zeros((3, 3, 1, 1), np.float32)
        mask[0], mask[1, : 1 + sees_itself] = 1, 1
        return jax.lax.conv_general_dilated(
            x[None], kernel * mask, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]

    h = jnp.tanh(convolved(x[..., None], weights(0, 3, 3, 1, 4), 0) + 0.3)
    return jnp.sin((h + jnp.tanh(convolved(h, weights(1, 3, 3, 4, 4), 1))).sum(-1) * 2)


def rows_above(x):
    """One stack that sees all of the rows above, one that sees what is to the left."""
    numbers = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    above = jnp.pad(x[:-1], ((1, 0), (0, 0)))[None, ..., None]
    above = jax.lax.conv_general_dilated(
        above, weights(0, 2, 3, 1, 4), (1, 1), ((1, 0), (1, 1)), **numbers
    )
    left = jnp.pad(x[:, :-1], ((0, 0), (1, 0)))[None, ..., None]
    left = jax.lax.conv_general_dilated(
        left, weights(1, 1, 2, 1, 4), (1, 1), ((0, 0), (1, 0)), **numbers
    )
    return jnp.sin((jnp.tanh(above) + left)[0].sum(-1) + 0.3)


def in_raster_order(x):
    return softmax_attention(x.reshape(-1)).reshape(x.shape)


def in_columns(x):
    return softmax_attention(x.T.reshape(-1)).reshape(x.shape[::-1]).T


def several(x):
    """Two sequences that look at each other, one with features."""
    a, b = x["a"], x["b"]
    h = jnp.concatenate([embedded(a), jnp.pad(b, ((1, 0), (0, 0)))[:-1]], 1)
    h = jax.nn.softmax(jnp.where(triangle(len(a)), h @ h.T, -jnp.inf)) @ h
    return {"a": read_out(h), "b": jnp.sin(h[:, :2]) + shifted(shifted(a))[:, None]}


ROWS, COLUMNS = 3, 4
RASTER = [(i, j) for i in range(ROWS) for j in range(COLUMNS)]
ORDERS = {
    "pixels": (pixels, (0, 1), RASTER),
    "rows above": (rows_above, (0, 1), RASTER),
    "raster": (in_raster_order, (0, 1), RASTER),
    "columns": (in_columns, (1, 0), [(i, j) for j in range(COLUMNS) for i in range(ROWS)]),
    "lanes": (jax.vmap(softmax_attention), 1, [(slice(None), j) for j in range(COLUMNS)]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "pixels" else pytest.mark.slow) for n in ORDERS]
)
def test_elements_in_other_orders(name):
    f, axis, places = ORDERS[name]
    x = jnp.zeros((ROWS, COLUMNS))
    close(
        jax.jit(lambda x: causal_fixed_point(f, x, axis=axis))(x),
        by_hand(lambda x: f(x), x, places),
    )


def test_several_sequences():
    x = {"a": jnp.zeros(6), "b": jnp.zeros((6, 2))}
    found = jax.jit(lambda x: causal_fixed_point(several, x))(x)
    jax.tree.map(close, found, by_hand(several, x, range(6)))
    with pytest.raises(ValueError, match="different sizes along axis 0"):
        causal_fixed_point(several, {"a": jnp.zeros(6), "b": jnp.zeros((5, 2))})


# -- Transformations and state ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("f", [dilated, softmax_attention], ids=lambda f: f.__name__)
def test_inside_vmap_and_derivatives(f):
    def sequence(find, scale):
        return find(lambda x: jnp.tanh(f(x) * scale + 0.1), jnp.zeros(6))

    fast = functools.partial(sequence, causal_fixed_point)
    naive = functools.partial(sequence, incremental.sample_naively)
    for transform in (jax.jacfwd, jax.jacrev, lambda f: lambda x: jax.vmap(f)(x * jnp.arange(4.0))):
        found, wanted = jax.jit(transform(fast))(0.8), jax.jit(transform(naive))(0.8)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_the_gradient():
    def last(find, scale):
        return find(lambda x: jnp.tanh(shifted(x) * scale + jnp.cos(scale)), jnp.zeros(4))[-1]

    found = jax.jit(jax.grad(functools.partial(last, causal_fixed_point)))(0.8)
    close(found, jax.grad(functools.partial(last, incremental.sample_naively))(0.8))


def test_parameters_and_random_numbers_of_the_function():
    """It runs once: so does what it draws. A draw in a loop over time is one for each turn."""

    @jaxstate.parametrized
    def net(x):
        def cell(h, x):
            w = jaxstate.param("w", jax.nn.initializers.normal(1.0), (4, 4))
            h = jnp.tanh(h @ w + x + 0.1 * jaxstate.random.normal((4,)))
            return h, h.sum()

        return jax.lax.scan(cell, jnp.zeros(4), embedded(x))[1]

    key = jax.random.key(1)
    params = net.init(jax.random.key(0), jnp.zeros(5))

    def f(x):
        return net.apply(params, x, key=key)

    wanted = by_hand(f, jnp.zeros(5), range(5))
    with jaxstate.rng_stream(key) as stream:
        run = jax.jit(lambda x: causal_fixed_point(lambda x: net.apply(params, x), x))
        close(run(jnp.zeros(5)), wanted)
        assert stream.count == 5


# -- What it costs ---------------------------------------------------------------------------


def flops(f, n):
    with new_trace(CountOperations, state=jnp.zeros(512, jnp.uint32)) as trace:
        jax.jit(f)(jnp.zeros(n, jnp.int32))
    return Counts(trace.kinds, trace.state)


def test_each_element_of_a_convolution_is_computed_once():
    model = incremental.causal_conv_model(jax.random.key(1), layers=1)
    moved = []
    for n in (8, 32):
        once = flops(model, n)
        found = flops(lambda x: causal_fixed_point(model, x), n)
        for name in ("dot_general", "conv_general_dilated", "tanh", "logistic", "exp"):
            assert found.flops[name] == once.flops[name], name
        assert found.flops.total() == pytest.approx(once.flops.total(), rel=0.05)
        moved.append(found.read.total() + found.written.total())
    assert moved[1] < 4.2 * moved[0]


@pytest.mark.slow
def test_each_element_of_a_transformer_is_computed_once():
    """The products are those of the function; what attends to what is quadratic."""
    model = incremental.transformer(jax.random.key(1), width=16, heads=2, layers=2)
    counts = []
    for n in (16, 64):
        once = flops(model, n).flops["dot_general"]
        found = flops(lambda x: causal_fixed_point(model, x), n)
        assert found.flops["dot_general"] == pytest.approx(once, rel=0.05)
        counts.append(found.flops.total() / n)
    assert counts[1] < 4 * counts[0], "at most linear in n, for each element"


@pytest.mark.parametrize(
    "make",
    [incremental.causal_conv_model, pytest.param(incremental.transformer, marks=pytest.mark.slow)],
    ids=lambda f: f.__name__,
)
def test_tokens_are_exactly_the_same(make):
    model = make(jax.random.key(1), vocabulary=8, layers=1)
    x = jnp.zeros(16, jnp.int32)
    wanted = by_hand(model, x, range(16))
    assert len(set(wanted.tolist())) > 4
    np.testing.assert_array_equal(jax.jit(lambda x: causal_fixed_point(model, x))(x), wanted)


# -- What is not causal ----------------------------------------------------------------------


def attended(mask, low, x):
    h = embedded(x)
    return read_out(jax.nn.softmax(jnp.where(mask, h @ h.T, low)) @ h)


REFUSED = {
    "itself": (lambda x: x * 2.0, r"x\)\[0\] depends on x\[0\]"),
    "the next": (lambda x: jnp.pad(x[1:], (0, 1)), r"x\)\[0\] depends on x\[1\]"),
    "all": (lambda x: shifted(x) - x.sum(), "needed by: reduce_sum"),
    "reversed": (lambda x: x[::-1], r"x\)\[0\] depends on x\[4\]"),
    "running backwards": (lambda x: jax.lax.cumsum(x, reverse=True), "depends on"),
    "the diagonal too": (lambda x: jnp.tri(len(x)) @ x, r"x\)\[0\] depends on x\[0\]"),
    "no mask": (lambda x: attended(True, 0.0, x), "depends on"),
    "a mask that lets through": (lambda x: attended(triangle(len(x)), -9.0, x), "dot_general"),
    "a loop with one end for all": (
        lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, shifted(x)),
        "while .* no rule of its own",
    ),
    "where the data says": (lambda x: x[jnp.clip(x.astype(int), 0, 2)], "needed by: gather"),
    "a sequence through many turns": (
        lambda x: jax.lax.fori_loop(0, 1000, lambda i, c: c * 1.01, shifted(x)),
        "1000 turns",
    ),
    "a print": (
        lambda x: (jax.debug.callback(lambda x: None, x), shifted(x))[1],
        "has an effect",
    ),
}


@pytest.mark.leaks_allowed("an error while tracing leaves its traceback")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_causal_is_an_error(name):
    f, text = REFUSED[name]
    with pytest.raises(NotCausalError, match=text) as error:
        causal_fixed_point(f, jnp.zeros(5))
    assert "To mend it:\n    " in str(error.value)


@pytest.mark.leaks_allowed("an error while tracing leaves its traceback")
def test_a_mask_has_to_be_known():
    with pytest.raises(NotCausalError, match="known while tracing"):
        jax.jit(lambda m, x: causal_fixed_point(functools.partial(attended, m, -1e30), x))(
            triangle(4), jnp.zeros(4)
        )


@pytest.mark.parametrize("added", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_row_without_anything_to_see_is_an_error_or_nan(added):
    """All of such a row is equally far below, so that the rest of the sequence has weight."""

    def f(x):
        h = embedded(x)
        mask = triangle(len(x)) & (jnp.arange(len(x)) != 0)
        logits = h @ h.T + jnp.where(mask, 0.0, -1e30) if added else jnp.where(mask, h @ h.T, -1e30)
        return read_out(jax.nn.softmax(logits) @ h)

    with pytest.raises(NotCausalError, match="weightless"):
        causal_fixed_point(f, jnp.zeros(4))
    assert jnp.isnan(jax.jit(lambda x: causal_fixed_point(f, x))(jnp.zeros(4))).all()


BAD_INPUT = {
    "no function": (lambda: causal_fixed_point(None, jnp.zeros(4)), TypeError, "wants a function"),
    "no array": (lambda: causal_fixed_point(shifted, None), TypeError, "or a tree of arrays"),
    "a text": (lambda: causal_fixed_point(shifted, {"a": "x"}), TypeError, "or a tree of arrays"),
    "no axis": (lambda: causal_fixed_point(shifted, 0.0), ValueError, r"axis 0 is none of"),
    "another axis": (
        lambda: causal_fixed_point(shifted, jnp.zeros(4), axis=1),
        ValueError,
        r"axis 1 is none of float32\[4\]",
    ),
    "an axis twice": (
        lambda: causal_fixed_point(shifted, jnp.zeros((4, 4)), axis=(0, -2)),
        ValueError,
        "one or several axes",
    ),
    "steps": (lambda: causal_fixed_point(shifted, jnp.zeros(4), steps=1.5), TypeError, "steps is"),
    "few steps": (
        lambda: causal_fixed_point(shifted, jnp.zeros(4), steps=-1),
        ValueError,
        "from 0",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name):
    run, error, text = BAD_INPUT[name]
    with pytest.raises(error, match=text):
        run()


def test_another_type_is_an_error():
    with pytest.raises(TypeError, match=r"int32\[4\] of float32\[4\]"):
        causal_fixed_point(lambda x: shifted(x).astype(jnp.int32), jnp.zeros(4))
