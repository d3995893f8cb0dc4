"""NumPyro: effect handlers for sites of a model."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import MCMC, NUTS

from jaxstate_tests.features.table import built_in, few_lines

KEY = jax.random.key(0)


def layer():
    return numpyro.param("w", jnp.ones(3)) * 2


def marked():
    def turn(x, _):
        return numpyro.deterministic("h", jnp.sin(x)), None

    return scan(turn, jnp.float32(1.0), None, length=3)[0]


@few_lines
def named_streams():
    keys = {name: jax.random.fold_in(KEY, i) for i, name in enumerate("ab")}
    with handlers.seed(rng_seed=keys["a"]):
        a = numpyro.prng_key()
    with handlers.seed(rng_seed=keys["b"]):
        b = numpyro.prng_key()
    assert a is not None and b is not None


@built_in
def optional_stream():
    assert numpyro.prng_key() is None
    with handlers.seed(rng_seed=0):
        assert numpyro.prng_key() is not None


@built_in
def parameter_hooks():
    with handlers.substitute(data={"w": jnp.zeros(3)}):
        assert (layer() == 0).all()


@built_in
def sown_in_loops():
    sites = handlers.trace(handlers.seed(marked, rng_seed=0)).get_trace()
    assert sites["h"]["value"].shape == (3,)


@built_in
def planting():
    def model():
        return numpyro.sample("z", dist.Normal()) * 2

    assert handlers.seed(handlers.substitute(model, data={"z": jnp.float32(3)}), rng_seed=0)() == 6


@few_lines
def by_intermediate():
    def model():
        return numpyro.sample("z", dist.Normal()) ** 2

    def f(z):
        return handlers.seed(handlers.substitute(model, data={"z": z}), rng_seed=0)()

    assert jax.grad(f)(jnp.float32(3)) == 6.0


@few_lines
def loading():
    with handlers.substitute(data={"w": jnp.zeros(3)}):
        sites = handlers.trace(lambda: (layer(), numpyro.param("b", 1.0))).get_trace()
    assert (sites["w"]["value"] == 0).all() and sites["b"]["value"] == 1


@built_in
def flat_names():
    def model():
        with handlers.scope(prefix="encoder"):
            return numpyro.sample("w", dist.Normal())

    assert handlers.trace(handlers.seed(model, rng_seed=0)).get_trace().keys() == {"encoder/w"}


@built_in
def ensembles():
    with handlers.seed(rng_seed=0), numpyro.plate("members", 5):
        assert numpyro.sample("w", dist.Normal()).shape == (5,)


@built_in
def summaries():
    assert "w" in numpyro.util.format_shapes(handlers.trace(layer).get_trace())


@built_in
def inference():
    def model():
        mean = numpyro.sample("mean", dist.Normal())
        numpyro.sample("seen", dist.Normal(mean), obs=2.0)

    mcmc = MCMC(NUTS(model), num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(KEY)
    assert jnp.isfinite(mcmc.get_samples()["mean"]).all()
