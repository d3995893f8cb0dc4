"""What variables refuse, and where it is said."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxstate
from jaxstate_tests.params.counting import (
    KEY,
    LOOPS,
    assert_same,
    both,
    counter,
    ones,
    refusal,
)

# -- Refusals --------------------------------------------------------------------------------


@refusal
@pytest.mark.parametrize(
    "wrong", [jnp.zeros(2), jnp.int32(1), True, 1j, None, (0.0, 0.0), "a"], ids=str
)
@pytest.mark.parametrize("loop", ["python", "scan", "while", "vmap", "grad_of_scan"])
def test_a_write_of_another_type_is_refused_at_the_write(wrong, loop):
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())

        def write(x):
            v.value = wrong
            return x

        LOOPS[loop](write, x, 2)

    for apply in both(jaxstate.parametrized(net).apply_with_state):
        with pytest.raises(jaxstate.SlotTypeError, match="'v' is float32\\[\\], and was") as e:
            apply({}, {"v": 0.0}, 0.5)
        assert "test_variables_refused.py:" in str(e.value)


def test_a_python_number_takes_the_dtype_of_the_variable():
    @jaxstate.parametrized
    def net():
        v = jaxstate.variable("v", jnp.zeros, (), jnp.bfloat16)
        n = jaxstate.variable("n", lambda: 0)
        lax.fori_loop(0, 3, lambda i, _: setattr(v, "value", 2), None)
        lax.fori_loop(0, 3, lambda i, _: setattr(n, "value", n.value + 1), None)

    _, state = net.init_with_state(KEY)
    wanted = {"v": jnp.bfloat16(2), "n": jnp.int32(3)}
    for apply in both(net.apply_with_state):
        assert_same(apply({}, state)[1], wanted)


def raises(error, match):
    return pytest.raises(error, match=f"(?s){match}.*To mend it:")


@refusal
@pytest.mark.parametrize("inside", ["", "jit", "scan", "cond", "while", "jit_scan", "grad"])
def test_a_value_per_lane_is_refused_at_the_write_and_offers_two_answers(inside):
    def net(xs):
        v = jaxstate.variable("v", jnp.zeros, ())

        def lane(x):
            def f(x):
                v.value = x  # THE WRITE
                return x

            wraps = {
                "": f,
                "jit": jax.jit(f),
                "scan": lambda x: LOOPS["scan"](f, x, 2),
                "jit_scan": jax.jit(lambda x: LOOPS["scan"](f, x, 2)),
                "cond": lambda x: lax.cond(x > 0, f, lambda x: x, x),
                "while": lambda x: lax.while_loop(lambda x: x < 3, lambda x: f(x + 1), x),
                "grad": jax.grad(f),
            }
            return wraps[inside](x)

        return jax.vmap(lane)(xs)

    lines = pathlib.Path(__file__).read_text().split("\n")
    (line,) = [i for i, text in enumerate(lines, 1) if text.endswith("  # THE WRITE")]
    for apply in both(jaxstate.parametrized(net).apply_with_state):
        match = rf"variable '.*v', .*test_variables_refused.py:{line} .*vmap over 3 lanes"
        with raises(jaxstate.LaneWriteError, match) as caught:
            apply({}, {"v": 0.0}, jnp.arange(3.0))
        assert 'variable("v", ..., reduce=jnp.mean)' in str(caught.value)
        assert "made inside the vmap" in str(caught.value)


@refusal
def test_reduce_keeps_the_type():
    @jaxstate.parametrized
    def net(xs):
        n = jaxstate.variable("n", jnp.zeros, (), jnp.int32, reduce=jnp.mean)
        jax.vmap(lambda x: setattr(n, "value", x))(xs)

    for apply in both(net.apply_with_state):
        with raises(jaxstate.SlotTypeError, "'n' has type int32.*reduce makes .* float32"):
            apply({}, {"n": 0}, jnp.arange(3))


@refusal
def test_reduce_makes_an_array_of_values_along_an_axis():
    def net(reduce):
        def net(xs):
            n = jaxstate.variable("n", jnp.zeros, (), reduce=reduce)
            jax.vmap(lambda x: setattr(n, "value", x))(xs)

        return jaxstate.parametrized(net).apply_with_state

    for wrong in (lambda values, axis: None, lambda values, axis: "n"):
        with raises(jaxstate.SlotTypeError, "'n' has type float32.*reduce makes .* is "):
            net(wrong)({}, {"n": 0.0}, jnp.arange(3.0))
    with pytest.raises(TypeError, match="'axis'") as caught:
        net(lambda values: values.sum())({}, {"n": 0.0}, jnp.arange(3.0))
    (note,) = [note for note in caught.value.__notes__ if "variable 'n'" in note]
    assert "called as reduce(values, axis=0)" in note


@refusal
def test_apply_without_state_and_writes_under_apply_are_refused():
    @jaxstate.parametrized
    def net(x):
        return jax.jit(counter)(x)

    state = net.init_with_state(KEY, 1.0)[1]
    assert net.init(KEY, 1.0) == {}
    for mode in (lambda f: f, jax.jit):
        with raises(jaxstate.MissingVariableError, "'n' was used, .* no variables") as caught:
            mode(lambda x: net.apply({}, x))(1.0)
        assert "net.apply(params, x, state=state)" in str(caught.value)
        with raises(jaxstate.ReadOnlyVariableError, "'n' was written under apply"):
            mode(lambda x: net.apply({}, x, state=state))(1.0)
        with raises(jaxstate.MissingVariableError, "'counter/n'.* The nearest name is 'nn'"):
            mode(lambda x: net.apply_with_state({}, {"counter": {"m": 0, "nn": 0}}, x))(1.0)
        with raises(jaxstate.VariableMismatchError, "'counter/n' is int32\\[2\\]"):
            mode(lambda x: net.apply_with_state({}, {"counter": {"n": jnp.arange(2)}}, x))(1.0)
    assert_same(net.apply_with_state({}, state, 1.0)[1], {"counter": {"n": jnp.int32(1)}})


@refusal
def test_names_are_of_one_thing():
    def conflict(x):
        jaxstate.variable("v", jnp.zeros, ())
        jax.jit(lambda: jaxstate.variable("v", jnp.zeros, (2,)).value)()

    def clash(x):
        jaxstate.param("v", ones, ())
        jax.jit(lambda: jaxstate.variable("v", jnp.zeros, ()).value)()

    def other_clash(x):
        jaxstate.variable("v", jnp.zeros, ())
        jaxstate.param("v", ones, ())

    def scope_clash(x):
        with jaxstate.scope("v"):
            jaxstate.param("w", ones, ())
        jaxstate.variable("v", jnp.zeros, ())

    for f, error, match in [
        (conflict, jaxstate.VariableConflictError, r"'v' is used twice, as float32\[\] and"),
        (clash, jaxstate.NameClashError, "'v' is a parameter already, .* a variable too"),
        (other_clash, jaxstate.NameClashError, "'v' is a variable already, .* a parameter too"),
        (scope_clash, jaxstate.NameClashError, "'v' is a scope opened by hand already"),
    ]:
        net = jaxstate.parametrized(f)
        with raises(error, match):
            net.init_with_state(KEY, 1.0)
        with raises(error, match):
            params = {"v": {"w": 1.0} if f is scope_clash else 1.0}
            net.apply_with_state(params, {"v": 1.0}, 1.0)


@refusal
def test_handles_are_used_where_they_mean_something():
    kept = []

    @jaxstate.parametrized
    def inner():
        return kept[-1].value

    @jaxstate.parametrized
    def net(x):
        kept.append(jaxstate.variable("v", jnp.zeros, ()))
        inner()
        if x == "nested":
            inner.apply_with_state({}, {"v": 1.0})
        if x == "escaped":
            jax.jit(lambda: kept.append(jaxstate.variable("w", jnp.zeros, ())))()
            inner()
        return kept[-1].value

    state = {"v": 2.0, "w": 3.0}
    assert net.apply_with_state({}, state, "")[0] == 2.0
    with raises(jaxstate.ClosedStateError, "'v' was used outside of the init or apply"):
        kept[-1].value = 1.0
    with raises(jaxstate.ClosedStateError, "or inside another one"):
        net.apply_with_state({}, state, "nested")
    with raises(jaxstate.ClosedStateError, "'w' was made inside a transformed function that has"):
        net.apply_with_state({}, state, "escaped")
    with raises(jaxstate.MissingStoreError, "variable 'v' was used outside init and apply"):
        jaxstate.variable("v", jnp.zeros, ())


@refusal
def test_two_ways_to_one_variable_in_one_function():
    """One slot would have two addresses in the jaxpr; what one writes the other would not see."""

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, ())

        def body(c, _):
            again = jaxstate.variable("v", jnp.zeros, ())
            again.value = again.value + x
            return c + v.value, None

        return lax.scan(body, x, length=3)[0]

    for apply in both(net.apply_with_state):
        with raises(jaxstate.VariableConflictError, "a handle that was made outside"):
            apply({}, {"v": 0.0}, 1.0)


@refusal
def test_a_failed_call_leaves_nothing_half_written():
    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())

        def body(i, _):
            n.value = n.value + 1
            if x:
                raise RuntimeError

        with contextlib.suppress(RuntimeError):
            lax.fori_loop(0, 3, body, None)
        return n.value

    state = {"n": jnp.float32(0)}
    assert net.apply_with_state({}, state, False) == (3.0, {"n": 3.0})
    assert net.apply_with_state({}, state, True) == (0.0, {"n": 0.0})
    assert state == {"n": 0.0}


@refusal
def test_bad_input_is_refused_where_it_is_given():
    def declaring(*args, **kwargs):
        return jaxstate.parametrized(lambda: jaxstate.variable(*args, **kwargs))

    for name in ("", "a/b", 3):
        with pytest.raises(TypeError, match="variable wants a non-empty string without '/'"):
            declaring(name, jnp.zeros, ()).init(KEY)
    with pytest.raises(TypeError, match=r"wants a function init\(\*init_args\)"):
        declaring("v", jnp.zeros(3)).init(KEY)
    with pytest.raises(TypeError, match=r"wants a function reduce\(values, axis=0\)"):
        declaring("v", jnp.zeros, (), reduce="mean").init(KEY)
    for state in (None, [1.0], 0.0):
        with pytest.raises(TypeError, match="wants the variables as a dict"):
            counter.apply_with_state({}, state, 1.0)
