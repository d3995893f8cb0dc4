"""Modules, optimizers and solvers of other packages, with jaxstate inside and around.

Each is compared with the same call written with all state passed by hand. What `test_solvers` has
is not repeated here.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import optax
import optimistix
import pytest
from jax.experimental.ode import odeint
from jax.scipy.optimize import minimize
from jax.scipy.sparse.linalg import bicgstab, gmres

import jaxstate
from jaxstate import extend
from jaxstate_tests.test_params import assert_trees_close

normal = jax.nn.initializers.normal(0.3)
X = jnp.array([0.8, -0.5])
W = jnp.array([[0.3, 0.1], [-0.2, 0.4]])
KEY = jax.random.key(0)

others_leak = pytest.mark.leaks_allowed(
    "equinox, optimistix and flax keep tracers in the frames of their own caches"
)


# -- Solvers: every one of them is given a function f -----------------------------------------


def diffeq(adjoint, solver=None, **kwargs):
    def solve(f, x):
        term = diffrax.ODETerm(lambda t, y, args: f(y))
        method = solver or diffrax.Heun()
        return diffrax.diffeqsolve(
            term, method, 0.0, 1.0, 0.25, x, adjoint=adjoint, max_steps=16, **kwargs
        ).ys[-1]

    return solve


def sde(f, x):
    motion = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jax.random.key(3))
    drift = diffrax.ODETerm(lambda t, y, args: f(y))
    noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * f(y), motion)
    terms = diffrax.MultiTerm(drift, noise)
    return diffrax.diffeqsolve(terms, diffrax.EulerHeun(), 0.0, 1.0, 0.5, x, max_steps=8).ys[-1]


def root(solver, **kwargs):
    return lambda f, x: (
        optimistix.root_find(lambda y, args: 0.3 * f(y) + X - y, solver, x, **kwargs).value
    )


def minimum(solver):
    return lambda f, x: (
        optimistix.minimise(lambda y, args: ((y - f(X)) ** 2).sum(), solver, x, max_steps=256).value
    )


def least_squares(solver):
    return lambda f, x: (
        optimistix.least_squares(lambda y, args: y - 0.3 * f(y) - X, solver, x).value
    )


def descent(optimizer, searches=False):
    """Four steps of optax, with a line search or without."""

    def solve(f, x):
        def loss(y):
            return ((y - 0.3 * f(y) - X) ** 2).sum()

        def step(carry, _):
            y, state = carry
            if searches:
                value, slope = optax.value_and_grad_from_state(loss)(y, state=state)
                more = dict(value=value, grad=slope, value_fn=loss)
            else:
                slope, more = jax.grad(loss)(y), {}
            updates, state = optimizer.update(slope, state, y, **more)
            return (optax.apply_updates(y, updates), state), None

        return jax.lax.scan(step, (x, optimizer.init(x)), None, length=4)[0][0]

    return solve


def spd(f):
    return lambda y: y * (2 + f(X)[0] ** 2)


def linear(solver):
    def solve(f, x):
        tags = lineax.positive_semidefinite_tag
        operator = lineax.FunctionLinearOperator(spd(f), jax.eval_shape(lambda: x), tags)
        return lineax.linear_solve(operator, x, solver).value

    return solve


def jacobian(solver):
    def solve(f, x):
        operator = lineax.JacobianLinearOperator(lambda y, args: 2 * y + 0.1 * f(y), x)
        return lineax.linear_solve(operator, x, solver).value

    return solve


backtracking = optax.chain(
    optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
)
tolerances = dict(rtol=1e-6, atol=1e-6)
REVERSE = {
    "diffrax, recursive checkpoint": diffeq(diffrax.RecursiveCheckpointAdjoint()),
    "diffrax, direct": diffeq(diffrax.DirectAdjoint()),
    "diffrax, implicit method": diffeq(
        diffrax.RecursiveCheckpointAdjoint(),
        diffrax.Kvaerno3(),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
    ),
    "diffrax, stochastic": sde,
    "optimistix, chord": root(optimistix.Chord(**tolerances)),
    "optimistix, dogleg": root(optimistix.Dogleg(**tolerances)),
    "optimistix, recursive checkpoint": root(
        optimistix.Newton(**tolerances),
        adjoint=optimistix.RecursiveCheckpointAdjoint(),
        max_steps=8,
    ),
    "optimistix, optax": minimum(optimistix.OptaxMinimiser(optax.adam(0.1), 1e-3, 1e-3)),
    "optimistix, Levenberg-Marquardt": least_squares(optimistix.LevenbergMarquardt(1e-5, 1e-5)),
    "optimistix, Gauss-Newton": least_squares(optimistix.GaussNewton(1e-5, 1e-5)),
    "optax, adam": descent(optax.adam(0.1)),
    "lineax, cg": linear(lineax.CG(1e-6, 1e-6)),
    "lineax, jacobian": jacobian(lineax.LU()),
    "gmres": lambda f, x: gmres(spd(f), x)[0],
    "gmres, incremental": lambda f, x: gmres(spd(f), x, solve_method="incremental")[0],
    "bicgstab": lambda f, x: bicgstab(spd(f), x)[0],
    "odeint": lambda f, x: odeint(lambda y, t: f(y), x, jnp.linspace(0.0, 1.0, 3))[-1],
}
# Loops of unknown length: JAX has no reverse mode for them.
FORWARD = {
    "optax, lbfgs with zoom": descent(optax.lbfgs(), searches=True),
    "optax, backtracking": descent(backtracking, searches=True),
    "jax.scipy, bfgs": lambda f, x: (
        minimize(
            lambda y: ((y - 0.3 * f(y) - X) ** 2).sum(), x, method="BFGS", options=dict(maxiter=4)
        ).x
    ),
    "diffrax, forward mode": diffeq(diffrax.ForwardMode()),
}
SOLVERS = REVERSE | FORWARD
FAST = {"diffrax, recursive checkpoint", "optimistix, Gauss-Newton", "optax, adam",
        "lineax, cg", "odeint", "optax, lbfgs with zoom"}  # fmt: skip
solvers = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SOLVERS]


def field(w):
    return lambda y: jnp.tanh(w() @ y)


@others_leak
@pytest.mark.parametrize("name", solvers)
def test_a_solver_finds_the_parameters_of_its_function(name):
    """acceptance.md, parameters: foreign solvers."""
    solve = SOLVERS[name]
    net = jaxstate.parametrized(
        lambda x: solve(field(lambda: jaxstate.param("w", normal, (2, 2))), x), name="net"
    )
    assert jax.tree.map(jnp.shape, net.init(KEY, X)) == {"w": (2, 2)}

    def by_hand(params, x):
        return solve(field(lambda: params["w"]), x)

    params = {"w": W}
    wanted = by_hand(params, X)
    assert_trees_close(net.apply(params, X), wanted, rtol=1e-4)
    assert_trees_close(jax.jit(net.apply)({"w": W / 2}, X), by_hand({"w": W / 2}, X), rtol=1e-4)

    def derivative(f):
        if name in FORWARD:
            return lambda p: jax.jvp(lambda p: f(p, X), (p,), (p,))[1]
        return jax.grad(lambda p: (f(p, X) ** 2).sum())

    wanted = derivative(by_hand)(params)
    assert_trees_close(derivative(net.apply)(params), wanted, rtol=2e-3)
    assert_trees_close(jax.jit(derivative(net.apply))(params), wanted, rtol=2e-3)


class Calls:
    """How often a function runs, counted on the host."""

    def __init__(self, f):
        self.f = f
        self.n = 0

    def __call__(self, y):
        jax.debug.callback(self.count)
        return self.f(y)

    def count(self):
        self.n += 1


# lineax solves inside a primitive of equinox, which has no outputs for state.
SEALED = ("lineax, cg",)
# Their custom rules run the function again, where it is not known what the state will be.
NO_GRADIENT = ("diffrax, recursive checkpoint", "diffrax, implicit method", "diffrax, stochastic",
               "optimistix, recursive checkpoint", "odeint")  # fmt: skip


@others_leak
@pytest.mark.parametrize("name", solvers)
def test_a_solver_whose_function_draws_and_writes(name):
    """Every call that the program makes draws once and counts once; or it is a named error."""
    solve = SOLVERS[name]
    slot = extend.new_slot(0)

    def drawing(y):
        extend.write(slot, extend.read(slot) + 1)
        return jnp.tanh(W @ y) + 0.0 * jaxstate.random.uniform()

    def run(vmap="share"):
        with jaxstate.rng_stream(KEY, vmap=vmap) as stream:
            return solve(drawing, X), stream.count

    if name in SEALED:
        with pytest.raises(jaxstate.UnsupportedPrimitiveError):
            run()
        return
    calls = Calls(lambda y: jnp.tanh(W @ y))
    wanted = solve(calls, X)
    jax.effects_barrier()
    found, count = run()
    assert_trees_close(found, wanted, rtol=1e-4)
    assert count == extend.read(slot)
    assert count == calls.n or "lineax" in name
    if name in NO_GRADIENT:
        with jaxstate.rng_stream(KEY), pytest.raises(jaxstate.CustomRuleStateError):
            jax.grad(lambda x: solve(drawing, x).sum())(X)


@others_leak
@pytest.mark.parametrize("transform", ["vmap", "jit", "checkpoint", "scan"])
def test_a_function_that_draws_as_an_argument_of_a_jitted_function(transform):
    """Its constants become operands outside; key and count are read where it runs, in one place.

    So the lanes of a vmap inside draw keys of their own.
    """
    f = lambda x: x * jaxstate.random.uniform()  # noqa: E731
    run = {
        "vmap": lambda g: jax.vmap(g)(X),
        "jit": lambda g: jax.jit(jax.vmap(g))(X),
        "checkpoint": lambda g: jax.checkpoint(jax.vmap(g))(X),
        "scan": lambda g: jax.lax.scan(lambda c, _: (c, jax.vmap(g)(X)), 0, None, length=2)[1],
    }[transform]
    with jaxstate.rng_stream(KEY) as stream:
        wanted = f(X[0]), run(f), f(X[0])
        count = stream.count
    with jaxstate.rng_stream(KEY) as stream:
        g = eqx.filter_closure_convert(f, X[0])
        found = g(X[0]), eqx.filter_jit(run)(g), g(X[0])
        assert stream.count == count
    assert_trees_close(found, wanted)


@others_leak
def test_the_jacobian_of_a_lineax_operator_that_draws():
    def solve(f):
        operator = lineax.JacobianLinearOperator(lambda y, args: f(y), X)
        return lineax.linear_solve(operator, X, lineax.LU()).value

    def f(u):
        return lambda y: 2 * y + 0.1 * jnp.tanh(W @ y) * (1 + u())

    with jaxstate.rng_stream(KEY), pytest.raises(jaxstate.SplitStreamError):
        solve(f(jaxstate.random.uniform))
    with jaxstate.rng_stream(KEY, vmap="share") as stream:
        found = solve(f(jaxstate.random.uniform))
        assert stream.count > 0
    u = jax.random.uniform(jax.random.fold_in(KEY, 0))
    assert_trees_close(found, solve(f(lambda: u)), rtol=1e-5)
