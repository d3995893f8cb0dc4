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
from jaxstate_tests.test_params import assert_trees_close

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
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_solver_finds_the_parameters_of_its_function(key, name):
    solver, problem = PROBLEMS[name]
    check(key, solver, problem(weight), lambda p: problem(lambda: p["w"]))


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


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_draws_inside_an_operator_are_refused(key):
    def matvec(y):
        return y * (2 + jaxstate.random.uniform())

    for solver in (custom_linear_solve, cg):
        for mode in (lambda f: f, jax.jit):
            with jaxstate.rng_stream(key) as stream:
                with pytest.raises(jaxstate.UnsupportedPrimitiveError, match="custom_linear_solve"):
                    mode(lambda x, solver=solver: solver(matvec, x))(X)
                assert stream.count == 0


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_draws_inside_custom_root_are_counted_or_refused(key):
    """Called eagerly, the solver's calls happen one by one. Staged, jax >= 0.11 hides them."""

    def run(x):
        return custom_root(lambda y: y - x + 0 * jaxstate.random.uniform(), x)

    with jaxstate.rng_stream(key) as stream:
        np.testing.assert_allclose(run(X), X, rtol=1e-6)
        assert stream.count == 30
        try:
            np.testing.assert_allclose(jax.jit(run)(X), X, rtol=1e-6)
            assert stream.count == 60
        except jaxstate.UnsupportedPrimitiveError:
            assert stream.count == 30
            assert jax.version.__version_info__ >= (0, 11)
