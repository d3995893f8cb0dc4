"""Other packages beside it: optimizers, checkpoints, and a module that was imported before."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.numpy

import jaxstate


def test_every_test_is_under_the_leak_checker():
    assert jax.config.jax_check_tracer_leaks


def test_a_module_that_was_imported_before():
    """It has its own names of JAX's functions, and never heard of jaxstate."""
    program = """
        from jax.lax import cond, scan, while_loop
        from jax import grad, jit, vmap

        def library(f, n):
            _, ys = scan(lambda c, _: (c, f()), 0, length=n)
            zs = jit(lambda: vmap(lambda i: cond(i > 0, f, f))(jnp.arange(n)))()
            return ys, zs

        import jax, jax.numpy as jnp
        plain = library(lambda: jnp.float32(1), 3)
        import jaxstate
        key = jax.random.key(0)
        with jaxstate.rng_stream(key):
            found, lanes = library(lambda: jax.random.key_data(jaxstate.next_key()), 3)
        wanted = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3)]
        assert (found == jnp.stack(wanted)).all()
        assert len({tuple(k.tolist()) for k in [*found, *lanes]}) == 6
        again = library(lambda: jnp.float32(1), 3)
        assert all((a == b).all() for a, b in zip(plain, again))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@jaxstate.parametrized
def net(x):
    for width, name in ((3, "body"), (2, "head")):
        with jaxstate.scope(name):
            w = jaxstate.param("w", jax.nn.initializers.normal(1.0), (x.shape[-1], width))
            x = jnp.tanh(x @ w)
    return x


X = jnp.ones((2, 4))


def test_optimizers_take_masks_and_labels_written_by_hand(key):
    params = net.init(key, X)
    grads = jax.grad(lambda p: (net.apply(p, X) ** 2).sum())(params)
    mask = {"body": {"w": False}, "head": {"w": True}}
    labels = {"body": {"w": "slow"}, "head": {"w": "fast"}}
    rates = {"slow": 0.01, "fast": 1.0}
    for optimizer, body, head in (
        (optax.masked(optax.sgd(0.5), mask), 1.0, -0.5),  # masked out: passed on as it is
        (optax.multi_transform({k: optax.sgd(r) for k, r in rates.items()}, labels), -0.01, -1.0),
    ):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_allclose(updates["body"]["w"], body * grads["body"]["w"], rtol=1e-6)
        np.testing.assert_allclose(updates["head"]["w"], head * grads["head"]["w"], rtol=1e-6)


def test_a_tree_is_saved_and_loaded(key, tmp_path):
    params = net.init(key, X)
    flat = {}
    for scope, entries in params.items():
        flat |= {f"{scope}/{name}": np.asarray(array) for name, array in entries.items()}
    safetensors.numpy.save_file(flat, tmp_path / "params.safetensors")
    loaded = {}
    for path, array in safetensors.numpy.load_file(tmp_path / "params.safetensors").items():
        scope, name = path.split("/")
        loaded.setdefault(scope, {})[name] = array
    np.testing.assert_array_equal(net.apply(loaded, X), net.apply(params, X))


def test_a_tree_is_a_checkpoint_of_orbax(key, tmp_path):
    params = net.init(key, X)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "params")
    np.testing.assert_array_equal(net.apply(loaded, X), net.apply(params, X))


@pytest.mark.parametrize("carry", [jnp.zeros(16), {"h": jnp.zeros(16)}], ids=["array", "dict"])
def test_a_recurrent_model_of_characters_trains(key, carry):
    text = "to be or not to be, that is the question"
    letters = sorted(set(text))
    codes = jax.nn.one_hot(jnp.array([letters.index(c) for c in text]), len(letters))

    def step(w, carry, x):
        h = jnp.tanh(jnp.concatenate([*jax.tree.leaves(carry), x]) @ w["w"])
        return jax.tree.map(lambda _: h, carry), jax.nn.log_softmax(h @ w["out"])

    normal = jax.nn.initializers.normal(0.3)

    @jaxstate.parametrized
    def cell(carry, x):
        w = {
            "w": jaxstate.param("w", normal, (16 + len(letters), 16)),
            "out": jaxstate.param("out", normal, (16, len(letters))),
        }
        return step(w, carry, x)

    def loss(cell):
        return -(jax.lax.scan(cell, carry, codes[:-1])[1] * codes[1:]).sum(-1).mean()

    model = jaxstate.parametrized(lambda: loss(cell), name="model")
    params = model.init(key)

    def by_hand(params):
        return loss(lambda carry, x: step(params["cell"], carry, x))

    found, wanted = jax.grad(model.apply)(params), jax.grad(by_hand)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)

    optimizer = optax.adam(0.02)

    @jax.jit
    def train(params):
        def update(both, _):
            value, grads = jax.value_and_grad(model.apply)(both[0])
            updates, state = optimizer.update(grads, both[1])
            return (optax.apply_updates(both[0], updates), state), value

        return jax.lax.scan(update, (params, optimizer.init(params)), length=200)[1]

    losses = train(params)
    assert losses[-1] < 0.3 * losses[0]
