"""Solvers of JAX and of other packages, with `param` inside the function they are given.

Each is compared with the same call on a function that closes over the parameters: at init, apply,
jitted apply, and in the gradient by the parameters (eager, jitted inside and outside).
"""

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest

import jaxstate
from jaxstate import extend
from jaxstate_tests.params.networks import assert_trees_close
from jaxstate_tests.sampling import part_of_product

normal = jax.nn.initializers.normal(0.3)
X = jnp.array([0.8, -0.5])


def weight(shape=(2, 2)):
    return jaxstate.param("w", normal, shape)


def module_level_field(t, y, args):
    """No closure: equinox would not look for state in it."""
    return jnp.tanh(weight() @ y)


def module_level_operator(y):
    return y + weight() @ y


def diffeqsolve(field, x):
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    term = diffrax.ODETerm(field)
    solver = diffrax.Tsit5()
    return diffrax.diffeqsolve(term, solver, 0.0, 1.0, 0.1, x, stepsize_controller=controller).ys[
        -1
    ]


def fixed_point(f, x):
    solver = optimistix.FixedPointIteration(rtol=1e-7, atol=1e-7)
    return optimistix.fixed_point(f, solver, x).value


def root_find(f, x):
    return optimistix.root_find(f, optimistix.Newton(rtol=1e-7, atol=1e-7), x).value


def minimise(f, x):
    return optimistix.minimise(f, optimistix.BFGS(rtol=1e-6, atol=1e-6), x).value


def linear_solve(f, x):
    operator = lineax.FunctionLinearOperator(f, jax.eval_shape(lambda: x))
    return lineax.linear_solve(operator, x, lineax.GMRES(rtol=1e-7, atol=1e-7)).value


def custom_root(f, x):
    def solve(f, x0):
        return jax.lax.fori_loop(0, 30, lambda _, y: y - f(y), x0)

    def tangent_solve(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    return jax.lax.custom_root(f, x, solve, tangent_solve)


def custom_linear_solve(f, x):
    def cg(matvec, b):
        return jax.scipy.sparse.linalg.cg(matvec, b)[0]

    return jax.lax.custom_linear_solve(f, x, cg, symmetric=True)


def cg(f, x):
    return jax.scipy.sparse.linalg.cg(f, x)[0]


PROBLEMS = {
    "diffeqsolve": (diffeqsolve, lambda w: lambda t, y, args: jnp.tanh(w() @ y)),
    "fixed_point": (fixed_point, lambda w: lambda y, args: 0.3 * jnp.tanh(w() @ y) + X),
    "root_find": (root_find, lambda w: lambda y, args: 0.3 * jnp.tanh(w() @ y) + X - y),
    "minimise": (minimise, lambda w: lambda y, args: ((y - w()[0]) ** 2).sum()),
    "linear_solve": (linear_solve, lambda w: lambda y: y + w() @ y),
    "custom_root": (custom_root, lambda w: lambda y: y - 0.3 * jnp.tanh(w() @ y) - X),
    "custom_linear_solve": (custom_linear_solve, lambda w: lambda y: (2 + w()[0, 0] ** 2) * y),
    "cg": (cg, lambda w: lambda y: (2 + w()[0, 0] ** 2) * y),
}


def check(key, solver, with_param, by_hand):
    net = jaxstate.parametrized(lambda x: solver(with_param, x))
    params = net.init(key, X)
    assert_trees_close(jax.jit(net.init)(key, X), params)
    assert jax.tree.map(jnp.shape, params) == {"w": (2, 2)}

    def explicit(params, x):
        return solver(by_hand(params), x)

    for p in (params, {"w": params["w"] * 0.5}):
        wanted = explicit(p, X)
        assert_trees_close(net.apply(p, X), wanted)
        assert_trees_close(jax.jit(net.apply)(p, X), wanted)
        assert_trees_close(net.apply(p, 2 * X), explicit(p, 2 * X))

    def gradient(f):
        return jax.grad(lambda p: (f(p, X) ** 2).sum())

    wanted = gradient(explicit)(params)
    assert_trees_close(gradient(net.apply)(params), wanted, rtol=1e-3)
    assert_trees_close(jax.jit(gradient(net.apply))(params), wanted, rtol=1e-3)
    assert_trees_close(gradient(jax.jit(net.apply))(params), wanted, rtol=1e-3)


@pytest.mark.leaks_allowed("equinox and optimistix keep tracers in the frames of their own caches")
@pytest.mark.parametrize(
    "name",
    # A slow one of the same package is in `test_peers`.
    [pytest.param(n, marks=[pytest.mark.slow] * (n == "diffeqsolve")) for n in PROBLEMS],
)
def test_a_solver_finds_the_parameters_of_its_function(key, name):
    solver, problem = PROBLEMS[name]
    check(key, solver, problem(weight), lambda p: problem(lambda: p["w"]))


@pytest.mark.slow
@pytest.mark.leaks_allowed("equinox and optimistix keep tracers in the frames of their own caches")
def test_functions_without_a_closure(key):
    check(key, diffeqsolve, module_level_field, lambda p: lambda t, y, a: jnp.tanh(p["w"] @ y))
    check(key, linear_solve, module_level_operator, lambda p: lambda y: y + p["w"] @ y)


def test_a_fixed_point_solver_with_a_loop_in_its_own_custom_vjp(key):
    """As implicit layers do it: closure_convert, custom_vjp, jit(while_loop) in both rules."""

    def fixed_point(f, x):
        converted, consts = jax.closure_convert(f, x, x)
        return solve(converted, x, *consts)

    def iterate(f, x):
        def body(c):
            i, y = c
            return i + 1, f(y)

        return jax.jit(lambda: jax.lax.while_loop(lambda c: c[0] < 40, body, (0, x))[1])()

    solve = jax.custom_vjp(
        lambda f, x, *consts: iterate(lambda y: f(y, x, *consts), x), nondiff_argnums=(0,)
    )

    def fwd(f, x, *consts):
        y = solve(f, x, *consts)
        return y, (y, x, consts)

    def bwd(f, res, ct):
        y, x, consts = res
        _, vjp_y = jax.vjp(lambda y: f(y, x, *consts), y)
        u = iterate(lambda u: ct + vjp_y(u)[0], ct)
        _, vjp = jax.vjp(lambda x, *c: f(y, x, *c), x, *consts)
        return vjp(u)

    solve.defvjp(fwd, bwd)

    def layer(w):
        return lambda y, x: 0.3 * jnp.tanh(w() @ y) + x

    net = jaxstate.parametrized(lambda x: fixed_point(layer(weight), x))
    p = net.init(key, X)
    for mode in (lambda f: f, jax.jit):
        found = mode(jax.grad(lambda p: net.apply(p, X).sum()))(p)
        wanted = mode(jax.grad(lambda p: fixed_point(layer(lambda: p["w"]), X).sum()))(p)
        assert_trees_close(found, wanted)


def test_derivative_hungry_code(key):
    def f(w):
        return lambda y: jnp.tanh(y * w()) ** 2

    w = lambda: jaxstate.param("w", normal, ())  # noqa: E731
    net = jaxstate.parametrized(lambda x: jax.jit(jax.vmap(jax.jacfwd(jax.grad(f(w)))))(x))
    p = net.init(key, X)
    wanted = jax.vmap(jax.jacfwd(jax.grad(f(lambda: p["w"]))))(X)
    np.testing.assert_allclose(net.apply(p, X), wanted, rtol=1e-5)


# -- Functions of a solve that draw: the calls that the solve makes count ---------------------


def uniform(key, n):
    return jax.random.uniform(jax.random.fold_in(key, n))


def draw():
    return jaxstate.random.uniform()


def linear(transposed=False, **kwargs):
    """A solve whose function draws in a loop, and itself once; and the same with the count."""

    def solve_with_state(x, w):
        def operator(y):
            return y * (2 + w * w) + 0 * draw()

        def solve(operator, b):
            return jax.lax.fori_loop(0, 3, lambda _, y: y + draw() * (b - operator(y)), b) + draw()

        transpose = {"transpose_solve": solve} if transposed else {}
        return jax.lax.custom_linear_solve(operator, x, solve, **transpose, **kwargs)

    def by_hand(key, x, w):
        def operator(y, n):
            return y * (2 + w * w) + 0 * uniform(key, n)

        def solve(_, b):
            def body(_, carry):
                y, n = carry
                return y + uniform(key, n) * (b - operator(y, n + 1)), n + 2

            y, n = jax.lax.fori_loop(0, 3, body, (b, 0))
            return y + uniform(key, n), n + 1

        return jax.lax.custom_linear_solve(
            lambda y: operator(y, 0), x, solve, transpose_solve=solve, has_aux=True
        )

    return solve_with_state, by_hand


def drawing_root():
    def tangent_solve(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    def f(y, u, x, w):
        return y - 0.3 * jnp.tanh(w * y) * (1 + u) - x

    def solve_with_state(x, w):
        def solve(f, y):
            return jax.lax.fori_loop(0, 7, lambda _, y: y - f(y), y)

        return jax.lax.custom_root(lambda y: f(y, draw(), x, w), x, solve, tangent_solve)

    def by_hand(key, x, w):
        def solve(_, y):
            def body(_, carry):
                y, n = carry
                return y - f(y, uniform(key, n.astype(int)), x, w), n + 1

            return jax.lax.fori_loop(0, 7, body, (y, 0.0))  # jax 0.10 refuses an integer here

        return jax.lax.custom_root(
            lambda y: f(y, uniform(key, 0), x, w), x, solve, tangent_solve, has_aux=True
        )

    return solve_with_state, by_hand


DRAWING = {
    "custom_linear_solve, symmetric": linear(symmetric=True),
    "custom_linear_solve": linear(transposed=True),
    "custom_root": drawing_root(),
}
WAYS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jvp": lambda f: lambda x, w: jax.jvp(f, (x, w), (x + 1, w + 2)),
    "linearize": lambda f: lambda x, w: jax.linearize(f, x, w)[1](x, w),
    "grad": lambda f: jax.grad(lambda x, w: f(x, w).sum(), (0, 1)),
    "jit(grad)": lambda f: jax.jit(jax.grad(lambda x, w: f(x, w).sum(), (0, 1))),
    "grad(jit)": lambda f: jax.grad(lambda x, w: jax.jit(f)(x, w).sum(), (0, 1)),
    "grad(scan)": lambda f: jax.grad(
        lambda x, w: jax.lax.scan(lambda c, _: (f(c, w), None), x, None, length=1)[0].sum(), (0, 1)
    ),
    "hessian": lambda f: jax.grad(
        lambda x, w: jax.grad(lambda x, w: (f(x, w) ** 2).sum(), 1)(x, w), (0, 1)
    ),
}


@pytest.mark.parametrize("name, way", part_of_product(2, DRAWING, WAYS))
def test_the_calls_of_the_solve_draw_and_the_others_do_not(key, name, way):
    """acceptance.md, the core: custom_linear_solve and custom_root."""
    solve, by_hand = DRAWING[name]
    transform = WAYS[way]
    with jaxstate.rng_stream(key) as stream:
        found = transform(solve)(X, 0.5)
        assert stream.count == 7
    with jax.checking_leaks.func(False):
        wanted = jax.jit(transform(lambda x, w: by_hand(key, x, w)[0]))(X, 0.5)
    assert_trees_close(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", DRAWING)
def test_every_lane_of_a_solve_draws_its_own(key, name):
    solve, by_hand = DRAWING[name]
    w = jnp.array([0.5, 0.7, 0.9])
    lanes = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 0), jnp.arange(3))
    wanted = jax.vmap(lambda k, w: by_hand(k, X, w)[0])(lanes, w)
    for run in (jax.vmap(solve, (None, 0)), jax.jit(jax.vmap(solve, (None, 0)))):
        with jaxstate.rng_stream(key) as stream:
            np.testing.assert_allclose(run(X, w), wanted, rtol=1e-5)
            assert stream.count == 1


@pytest.mark.parametrize("name", DRAWING)
def test_a_solve_writes_a_slot_and_its_derivative_does_not(name):
    slot = extend.new_slot(0.0)

    def counted(y):
        extend.write(slot, extend.read(slot) + 1)
        return 2 * y - 1

    def steps(f, y):
        return jax.lax.fori_loop(0, 5, lambda _, y: y - 0.5 * f(y), y)

    def run(x):
        if name == "custom_root":
            return jax.lax.custom_root(lambda y: counted(y) - x, x, steps, lambda g, y: y / g(1.0))
        solve = lambda f, b: jax.lax.fori_loop(0, 5, lambda _, y: y + 0.5 * (b - f(y)), b)  # noqa: E731
        kind = {"symmetric": True} if "symmetric" in name else {"transpose_solve": solve}
        return jax.lax.custom_linear_solve(lambda y: counted(y) + 1, x, solve, **kind)

    slope = 0.5
    for i, transform in enumerate((jax.grad, lambda f: jax.jit(jax.grad(f)))):
        np.testing.assert_allclose(transform(run)(3.0), slope, rtol=1e-5)
        assert extend.read(slot) == 5 * (i + 1)
