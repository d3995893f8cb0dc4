"""Modules, optimizers, samplers and solvers of other packages, with jaxstate inside and around.

Each is compared with the same call written with all state passed by hand. What `test_solvers` has
is not repeated here.
"""

from functools import partial

import blackjax
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpyro.infer.hmc
import optax
import optimistix
import pytest
from flax import linen, nnx
from jax.experimental.ode import odeint
from jax.scipy.optimize import minimize
from jax.scipy.sparse.linalg import bicgstab, gmres

import jaxstate
from jaxstate import extend
from jaxstate_tests.params.networks import assert_trees_close

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


def implicit(f, x):
    """A fixed point whose derivative is that of the equation, the way of jaxopt."""
    g, consts = jax.closure_convert(lambda y: 0.3 * f(y) + X, x)
    return solved(g, x, *consts)


def repeated(g, x):
    return jax.lax.fori_loop(0, 30, lambda _, y: g(y), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def solved(g, x, *consts):
    return repeated(lambda y: g(y, *consts), x)


def solved_forward(g, x, *consts):
    y = solved(g, x, *consts)
    return y, (y, consts)


def solved_backward(g, residuals, ct):
    y, consts = residuals
    by_y = jax.vjp(lambda y: g(y, *consts), y)[1]
    by_consts = jax.vjp(lambda *consts: g(y, *consts), *consts)[1]
    return jnp.zeros_like(y), *by_consts(repeated(lambda u: ct + by_y(u)[0], ct))


solved.defvjp(solved_forward, solved_backward)


def samples(of_step):
    """Four samples of a density that ``f`` is part of; ``of_step`` makes the step of a kernel."""

    def solve(f, x):
        start, step = of_step(lambda y: -((y - f(y)) ** 2).sum(), x)
        return jax.lax.scan(step, start, jax.random.split(KEY, 4))[1]

    return solve


def with_blackjax(algorithm, *options):
    def of_step(density, x):
        kernel = algorithm(density, *options)

        def step(state, key):
            state, _ = kernel.step(key, state)
            return state, state.position

        return kernel.init(x), step

    return samples(of_step)


def with_numpyro(density, x):
    start, step = numpyro.infer.hmc.hmc(lambda y: -density(y), algo="NUTS")

    def next_sample(state, _):
        state = step(state)
        return state, state.z

    return start(x, num_warmup=1, step_size=0.1, rng_key=KEY), next_sample


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
    "fixed point with a custom_vjp": implicit,
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
    "blackjax, hmc": with_blackjax(blackjax.hmc, 0.1, jnp.ones(2), 3),
    "blackjax, nuts": with_blackjax(blackjax.nuts, 0.1, jnp.ones(2)),
    "blackjax, mala": with_blackjax(blackjax.mala, 0.1),
    "numpyro, nuts": samples(with_numpyro),
}
SOLVERS = REVERSE | FORWARD
FAST = {"diffrax, recursive checkpoint", "optax, adam", "lineax, cg", "odeint", "blackjax, hmc",
        "fixed point with a custom_vjp"}  # fmt: skip
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
               "optimistix, recursive checkpoint", "odeint",
               "fixed point with a custom_vjp")  # fmt: skip


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


# -- Modules: parameters of another package as a parameter, state as a variable ---------------


XS = jnp.sin(jnp.arange(12.0) ** 2).reshape(4, 3)


def gradient(f, params, state, key):
    """Of a sum of squares by the parameters, with the new state."""

    def loss(params):
        y, new = f(params, state, XS, key)
        return (y**2).sum(), new

    return jax.value_and_grad(loss, has_aux=True)(params)


def check_module(layer, by_hand):
    """``by_hand`` is given the parameters, the state, an input, and the key that is drawn."""
    net = jaxstate.parametrized(layer)
    with jaxstate.rng_stream(KEY):
        params, state = net.init_with_state(KEY, XS)

    def run(params, state, x, key):
        with jaxstate.rng_stream(key):
            return net.apply_with_state(params, state, x)

    def wanted(params, state, x, key):
        return by_hand(params, state, x, jax.random.fold_in(key, 0))

    expected = gradient(wanted, params, state, KEY)
    for mode in (lambda f: f, jax.jit):
        assert_trees_close(mode(partial(gradient, run))(params, state, KEY), expected, rtol=1e-4)
        assert_trees_close(gradient(mode(run), params, state, KEY), expected, rtol=1e-4)


class Normalized(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=False)(linen.Dense(5, use_bias=False)(x))
        return linen.Dense(2)(linen.Dropout(0.5, deterministic=False)(linen.tanh(x)))


@others_leak
def test_a_module_of_flax_linen():
    """Batch norm is a variable, and the key of the dropout comes from the stream."""
    module = Normalized()

    def initial(key):
        return module.init({"params": key, "dropout": key}, XS)

    def run(params, stats, x, key):
        entries = {"params": params, "batch_stats": stats}
        y, new = module.apply(entries, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return y, new["batch_stats"]

    def layer(x):
        params = jaxstate.param("dense", lambda key: initial(key)["params"])
        stats = jaxstate.variable("stats", lambda: initial(KEY)["batch_stats"])
        y, stats.value = run(params, stats.value, x, jaxstate.next_key())
        return y

    def by_hand(params, state, x, key):
        y, stats = run(params["dense"], state["stats"], x, key)
        return y, {"stats": stats}

    check_module(layer, by_hand)


class Scaled(linen.Module):
    @linen.compact
    def __call__(self, x):
        scale = jaxstate.param("scale", jax.nn.initializers.ones, (3,))
        return linen.Dense(2)(x * scale * jaxstate.random.uniform())


@others_leak
def test_a_parameter_and_a_draw_inside_a_module_of_flax_linen():
    dense = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}

    def layer(x):
        return Scaled().apply({"params": {"Dense_0": dense}}, x)

    def by_hand(params, state, x, key):
        return x * params["scale"] * jax.random.uniform(key) @ dense["kernel"], {}

    check_module(layer, by_hand)


@others_leak
def test_a_module_of_flax_nnx():
    graph = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))[0]

    def layer(x):
        linear = jaxstate.param(
            "linear", lambda key: nnx.to_pure_dict(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(key))))
        )
        return nnx.merge(graph, linear)(x) * jaxstate.random.uniform()

    def by_hand(params, state, x, key):
        kernel, bias = params["linear"]["kernel"], params["linear"]["bias"]
        return (x @ kernel + bias) * jax.random.uniform(key), {}

    check_module(layer, by_hand)


class Count(nnx.Variable):
    """A variable of nnx."""


@others_leak
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eagerly", "nnx.jit"])
def test_a_draw_in_an_nnx_model_that_writes_its_own_variable(transform):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.count = Count(jnp.zeros(()))

    @transform
    def forward(model, x):
        model.count[...] += 1
        return (
            model(x) * jaxstate.param("w", jax.nn.initializers.ones, ()) * jaxstate.random.uniform()
        )

    net = jaxstate.parametrized(lambda x: forward(model, x))
    for n in (1, 2):
        with jaxstate.rng_stream(KEY) as stream:
            found = net.apply({"w": jnp.float32(2)}, XS)
            assert (stream.count, model.count[...]) == (1, n)
        wanted = (XS @ model.kernel[...] + model.bias[...]) * 2
        assert_trees_close(
            found, wanted * jax.random.uniform(jax.random.fold_in(KEY, 0)), rtol=1e-5
        )


class Affine(eqx.Module):
    shift: jax.Array

    def __call__(self, x):
        w = jaxstate.param("w", jax.nn.initializers.ones, (3, 2))
        return x @ w * jaxstate.random.uniform() + self.shift


@others_leak
@pytest.mark.parametrize("transform", [lambda f: f, eqx.filter_jit, eqx.filter_checkpoint],
                         ids=["eagerly", "filter_jit", "filter_checkpoint"])  # fmt: skip
def test_a_module_of_equinox_that_is_a_parameter_and_has_one(transform):
    def layer(x):
        affine = jaxstate.param("affine", lambda key: Affine(jax.random.normal(key, (2,))))
        return transform(lambda affine, x: affine(x))(affine, x)

    def by_hand(params, state, x, key):
        return x @ params["w"] * jax.random.uniform(key) + params["affine"].shift, {}

    check_module(layer, by_hand)
