"""What a transformation is given and gives back are arrays of their own, also where JAX hands an
argument through, and whatever is written before, meanwhile and afterwards."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate
from jaxstate import inplace
from jaxstate_tests.sampling import part_of_product

X = np.array([1.0, 2.0, 3.0], np.float32)


def custom_jvp(f, x):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return g(x)


def custom_vjp(f, x):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (f(x), None), lambda _, ct: (ct,))
    return g(x)


def aux(y, f):
    return y.sum(), f(y)


WAYS = {
    "jit": lambda f, x: jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "scan": lambda f, x: lax.scan(lambda c, _: (f(c), None), x, length=2)[0],
    "steps of a scan": lambda f, x: lax.scan(lambda _, r: (None, f(r)), None, x)[1],
    "map": lambda f, x: lax.map(f, x),
    "while": lambda f, x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, f(s[1])), (0, x)
    )[1],
    "fori": lambda f, x: lax.fori_loop(0, 2, lambda i, x: f(x), x),
    "cond": lambda f, x: lax.cond(x[0] > -1, f, f, x),
    "switch": lambda f, x: lax.switch(0, [f, f], x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "vmap, not mapped": lambda f, x: jax.vmap(lambda y, _: f(y), (None, 0), None)(x, x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,))[0],
    "jvp, tangent": lambda f, x: jax.jvp(f, (x * 2,), (x,))[1],
    "vjp": lambda f, x: jax.vjp(f, x)[0],
    "grad, auxiliary": lambda f, x: jax.grad(lambda y: aux(y, f), has_aux=True)(x)[1],
    "value_and_grad": lambda f, x: jax.value_and_grad(lambda y: aux(y, f), has_aux=True)(x)[0][1],
    "linearize": lambda f, x: jax.linearize(f, x)[0],
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "inplace": lambda f, x: inplace(f)(x),
}  # fmt: skip
MODES = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda x: jax.tree.map(lambda y: y[1], jax.vmap(f)(jnp.stack([x, x]))),
    "vjp": lambda f: lambda x: jax.vjp(f, x)[0],
    "map": lambda f: lambda x: jax.tree.map(lambda y: y[1], lax.map(f, jnp.stack([x, x]))),
}


@pytest.mark.parametrize(("way", "mode"), part_of_product(3, WAYS, MODES))
def test_an_argument_handed_through_is_another_array(way, mode):
    def program(x):
        y = WAYS[way](lambda r: r, x)
        y[0] = 100
        x[1] = 50
        return x, y

    x, y = MODES[mode](inplace(program))(jnp.asarray(X))
    assert x.tolist() == [1, 50, 3]
    assert y.tolist() == [100, 2, 3]


@pytest.mark.parametrize(("way", "mode"), part_of_product(3, WAYS, MODES))
def test_an_argument_handed_through_has_the_value_that_it_was_given(way, mode):
    """The array outside is written meanwhile, by closure."""
    if mode == "vjp" and way.startswith("custom"):
        pytest.skip("a rule says nothing about a derivative with respect to a closure: an error")

    def program(x):
        def f(r):
            x[2] = 7
            return r

        y = WAYS[way](f, x)
        y[0] = 100
        return x, y

    x, y = MODES[mode](inplace(program))(jnp.asarray(X))
    assert x.tolist() == [1, 2, 7]
    assert y.tolist() == [100, 2, 3]


def write_first(r):
    r[0] = 9
    return r


LEFT_ALONE = {
    "vmap": lambda x: jax.vmap(lambda a, y: a * write_first(y)[0], (0, None))(x, x),
    "vmap, a value per lane": lambda x: jax.vmap(
        lambda y, a: (y.__setitem__(0, a), y)[1], (None, 0)
    )(x, x),
    "grad": lambda x: jax.grad(lambda a, y: (a * write_first(y)).sum())(x, x),
    "value_and_grad by name": lambda x: jax.value_and_grad(
        lambda a, y: (a * write_first(y)).sum()
    )(x, y=x)[1],
    "vjp of integers": lambda x: jax.vjp(lambda a, y: a * write_first(y), x, x.astype(int))[0],
    "linearize": lambda x: jax.linearize(lambda a, y: a * write_first(y), x, x.astype(int))[0],
    "jvp": lambda x: jax.jvp(
        lambda a, y: a * write_first(y),
        (x, x.astype(int)),
        (x, np.zeros(3, jax.dtypes.float0)),
    )[0],
    "jacfwd": lambda x: jax.jacfwd(lambda a, y: a * write_first(y))(x, x),
    "jacrev": lambda x: jax.jacrev(lambda a, y: a * write_first(y))(x, x),
    "auxiliary, written": lambda x: jax.grad(
        lambda a: (a.sum(), write_first(a)), has_aux=True
    )(x)[1],
    "auxiliary, born inside": lambda x: jax.grad(
        lambda a: (a.sum(), write_first(jnp.zeros(3))), has_aux=True
    )(x)[1],
    "auxiliary, from outside": lambda x: jax.grad(lambda a: (a.sum(), x), has_aux=True)(x)[1],
}  # fmt: skip
BY_HAND = {
    "vmap": 9 * X,
    "vmap, a value per lane": np.array([[v, 2, 3] for v in X]),
    "grad": [9, 2, 3],
    "value_and_grad by name": [9, 2, 3],
    "vjp of integers": [9, 4, 9],
    "linearize": [9, 4, 9],
    "jvp": [9, 4, 9],
    "jacfwd": np.diag([9.0, 2, 3]),
    "jacrev": np.diag([9.0, 2, 3]),
    "auxiliary, written": [9, 2, 3],
    "auxiliary, born inside": [9, 0, 0],
    "auxiliary, from outside": X,
}


@pytest.mark.parametrize(("name", "mode"), part_of_product(2, LEFT_ALONE, MODES))
def test_arguments_that_a_transformation_leaves_alone(name, mode):
    """They are not mapped, or not differentiated; the function writes them, and is given a copy."""

    def program(x):
        before = x.copy()
        out = LEFT_ALONE[name](x)
        kept = out.copy()
        out[..., 1] = 77
        return kept, out, x - before

    kept, out, change = MODES[mode](inplace(program))(jnp.asarray(X))
    wanted = np.array(BY_HAND[name])
    np.testing.assert_allclose(kept, wanted)
    wanted[..., 1] = 77
    np.testing.assert_allclose(out, wanted)
    assert not change.any()


# -- What the random programs found --------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_lanes_of_a_closure_in_a_branch(jitted):
    """The vmap gives back its argument, an array of the branch's surroundings."""

    @inplace
    def f(xs):
        def lane(x):
            def branch():
                y = jax.vmap(lambda row: row)(x)
                y[:] = 0

            lax.cond(x.sum() > 0, branch, lambda: None)
            return x

        return jax.vmap(lane)(xs)

    ones = jnp.ones((2, 2, 2))
    np.testing.assert_array_equal((jax.jit(f) if jitted else f)(ones), ones)


def test_what_the_lanes_of_an_ended_function_hold():
    f = jax.jit(jax.vmap(inplace(lambda x: jnp.stack([x, x]))))
    np.testing.assert_array_equal(f(jnp.ones((2, 3))), np.ones((2, 2, 3)))


@pytest.mark.leaks_allowed("JAX keeps the function of a rule, and so the counter that it reads")
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_custom_function_in_a_loop_that_reads_one_array_and_writes_another(jitted):
    @inplace
    def f(x, y):
        def turn(i):
            custom_jvp(lambda t: (x.__setitem__(0, y[0] + i), t)[1], 1.0)
            return i + 1

        lax.while_loop(lambda i: i < 3, turn, 0)
        return x

    assert (jax.jit(f) if jitted else f)(jnp.zeros(2), jnp.ones(2)).tolist() == [3, 0]


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
@pytest.mark.parametrize(
    "derivative", [jax.vjp, jax.linearize, lambda f, x: jax.jvp(f, (x,), (x,))]
)
def test_a_rule_says_nothing_about_an_array_from_outside(derivative):
    @inplace
    def f(x):
        def write(r):
            x[2] = 7
            return r

        return x + custom_jvp(write, x)

    for g in (f, jax.jit(f)):
        with pytest.raises(jaxstate.CustomRuleStateError, match="a writable array"):
            derivative(g, jnp.asarray(X))


def test_a_write_that_leaves_nothing_of_the_array():
    """In its memory, if nothing else holds it; JAX warns of memory that it cannot use."""

    @inplace
    def f(x):
        x[0] = 1
        x[jnp.arange(3)] = jnp.arange(3.0)
        x[[2, 1, 0]] = 4
        return x

    assert f(jnp.zeros(3)).tolist() == [4, 4, 4]


@pytest.mark.parametrize("around", [jax.disable_jit(), jax.disable_jit(False)], ids=["off", "on"])
def test_arguments_are_values_whether_jit_is_disabled_or_not(around):
    @jaxstate.inplace
    def f(x):
        def write(y):
            y[0] = 7.0
            return y

        def step(i, y):
            y[i] += 1
            return y

        jitted = jax.jit(write)(x)
        looped = jax.lax.fori_loop(0, 2, step, x)
        taken = jax.lax.cond(x[1] > 0, write, write, x)
        return x, jitted, looped, taken

    with around:
        found = f(jnp.arange(3.0))
    for array, wanted in zip(found, ([0, 1, 2], [7, 1, 2], [1, 2, 2], [7, 1, 2]), strict=True):
        assert array.tolist() == wanted


# -- Devices ---------------------------------------------------------------------------------------

ON_DEVICES = r"""
import jax, jax.numpy as jnp, numpy as np, pytest, jaxstate
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
x = jnp.arange(4.0)

def mapped(f):
    return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))

def own(part):
    part[0] = 5
    part[1:] += 1
    local = jnp.zeros(2)
    local[1] = part[1]
    jax.lax.fori_loop(0, 2, lambda i, _: part.__setitem__(i, part[i] * 2), None)
    return part + local

def from_outside(write):
    def program(x):
        y = jnp.zeros(3)
        seen = mapped(lambda part: (write(y, part), part + y[1])[1])(x)
        seen[0] = -1
        return y, seen
    return program

def total(y, part):
    y[1] = jax.lax.psum(part.sum(), "d")

def varying(y, part):
    y[1] = part[0]

def loss(x):
    return mapped(lambda part: (part.__setitem__(0, part[1] ** 2), part)[1])(x).sum()

ways = [lambda f: f, jax.jit, lambda f: lambda x: jax.vjp(f, x)[0],
        lambda f: jax.jit(lambda x: jax.vjp(f, x)[0]), jax.disable_jit()]
for way in ways:
    np.testing.assert_array_equal(way(jaxstate.inplace(mapped(own)))(x), [10, 6, 10, 12])
    y, seen = way(jaxstate.inplace(from_outside(total)))(x)
    assert y.tolist() == [0, 6, 0] and seen.tolist() == [-1, 7, 8, 9]
    with pytest.raises(jaxstate.DeviceWriteError, match="varies over the mesh axes d"):
        way(jaxstate.inplace(from_outside(varying)))(x)
    np.testing.assert_array_equal(way(jaxstate.inplace(jax.grad(loss)))(x), [0, 3, 0, 7])

    pmapped = jaxstate.inplace(lambda x: jax.pmap(own)(x.reshape(2, 2)))
    np.testing.assert_array_equal(way(pmapped)(x), [[10, 6], [10, 12]])

    def refused(x):
        y = jnp.zeros(3)
        return jax.pmap(lambda part: (y.__setitem__(0, 1.0), part)[1])(x.reshape(2, 2))
    with pytest.raises(jaxstate.DeviceWriteError, match="pmap is one"):
        way(jaxstate.inplace(refused))(x)
print("done")
"""


def test_writes_on_devices():
    """To arrays of a device, and one value to an array that all devices share."""
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", ON_DEVICES]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.stdout.endswith("done\n"), found.stderr[-3000:]


def _with_rule(h):
    f = jax.custom_jvp(h)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f


def _fill_and_add(v):
    v[:] = -4
    v[0] += 1


def _double_and_add(v):
    v[:] = v * 2
    v += 1


@pytest.mark.leaks_allowed("JAX keeps a derivative rule, and so the array that it closes over")
@pytest.mark.parametrize("wrap", [_with_rule, jax.jit, jax.checkpoint])
@pytest.mark.parametrize("body", [_fill_and_add, _double_and_add])
def test_two_writes_to_the_array_of_a_lane_in_a_function_inside(body, wrap):
    """In a custom rule the array is an operand, also where its own trace is current."""

    @jaxstate.inplace
    def f(a):
        def lane(v):
            wrap(lambda t: [body(v), t][1])(1.0)
            return v

        return jax.vmap(lane)(a)

    wanted = np.arange(10.0, dtype=np.float32).reshape(2, 5)
    x = jnp.asarray(wanted)
    for row in wanted:
        body(row)
    for run in (f, jax.jit(f)):
        np.testing.assert_array_equal(run(x), wanted)


def test_a_custom_rule_writes_an_enclosing_array_eagerly():
    @jaxstate.inplace
    def f(a):
        def body(t):
            a[0] += 1
            return t

        _with_rule(body)(1.0)
        return a

    np.testing.assert_array_equal(f(jnp.zeros(3)), [1, 0, 0])


def test_a_view_that_is_the_whole_array_of_one_that_a_loop_has_written():
    @jaxstate.inplace
    def f(a):
        jax.lax.fori_loop(0, 2, lambda i, _: a.__setitem__(i, 7), None)
        a.T.T[2] = 9
        return a

    np.testing.assert_array_equal(f(jnp.zeros(3)), [7, 7, 9])


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.vmap(jax.vmap(f))])
def test_a_write_of_lanes_into_an_array_that_all_lanes_have_alike(transform):
    """Its memory is too small for the result. Found by `make fuzz`."""

    def f(a, at):
        a.fill(0)
        a[None, at] = 1
        return a

    at = np.array([[0, 1], [2, 3]])
    shape = (4, 5)
    if transform is not jax.vmap:
        at, shape = np.stack([at, at]), (2, 4, 5)
    wanted = np.zeros((2, *shape), np.int32)
    for lane, places in zip(wanted.reshape(-1, 4, 5), at.reshape(-1, 2), strict=True):
        lane[places] = 1
    found = transform(jaxstate.inplace(f))(jnp.ones((2, *shape), jnp.int32), at)
    np.testing.assert_array_equal(found, wanted)


# -- Refs of JAX beside writable arrays ------------------------------------------------------


def _ref_as_argument():
    ref = jax.new_ref(jnp.array([1.0]))
    jax.jit(lambda ref, x: ref.__setitem__(..., x))(ref, jnp.array([15.0]))
    return ref[...]


def _ref_in_a_closure():
    ref = jax.new_ref(jnp.zeros(3))
    jax.jit(lambda: jax.lax.fori_loop(0, 3, lambda i, _: ref.__setitem__(i, i * 2.0), None))()
    return ref[...]


def _ref_in_lanes():
    ref = jax.new_ref(jnp.zeros((2, 3)))

    def lane(ref, x):
        x[0] = 5
        ref[1] = x.sum()

    jax.vmap(lane)(ref, jnp.arange(4.0).reshape(2, 2))
    return ref[...]


def _ref_of_an_array_and_array_of_a_ref():
    x = jnp.zeros(3)
    ref = jax.new_ref(x)
    ref[0], x[1] = 5.0, 7
    y = ref[...]
    y[2] = 9
    return x, y, ref[...], jax.freeze(ref)


def _ref_under_a_derivative():
    def loss(w):
        ref = jax.new_ref(jnp.zeros(3))
        x = w * jnp.ones(3)
        x[0] *= w
        ref[1] = x[0]
        return ref[...].sum()

    return jax.grad(loss)(3.0)


REFS = {
    "argument": (_ref_as_argument, [15]),
    "closure": (_ref_in_a_closure, [0, 2, 4]),
    "lanes": (_ref_in_lanes, [[0, 6, 0], [0, 8, 0]]),
    "copies": (_ref_of_an_array_and_array_of_a_ref, [[0, 7, 0], [5, 0, 9], [5, 0, 0], [5, 0, 0]]),
    "derivative": (_ref_under_a_derivative, 6),
}


@pytest.mark.parametrize("mode", [lambda f: f, jax.jit], ids=["eagerly", "jit"])
@pytest.mark.parametrize("name", REFS)
def test_a_ref_is_no_writable_array(name, mode):
    """Its writes inside a jit were lost. Found by running the tests of flax.nnx in place."""
    program, wanted = REFS[name]
    np.testing.assert_array_equal(mode(jaxstate.inplace(program))(), wanted)
