"""A language model of one page: a small transformer that writes Python documentation.

The text are the topics of Python's own ``help()``, which come with Python: about half a
million characters. Nothing is downloaded. Run it with::

    python examples/language_model.py

What to look at: the network is written once, as a function of a sequence. To train it, all
positions are computed at once. To write text, `attention` keeps what it has computed in a variable
(the cache, which it writes in place), so each new character costs one position. Nothing of that is
in the signature of anything between `attention` and the outermost call: not in that of `block`,
which runs in a scan over the layers, and not in that of the loop that samples.
"""

import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxstate

WIDTH, HEADS, LAYERS, LENGTH = 128, 4, 4, 96
STEPS, BATCH, LEARNING_RATE, DROPOUT = 600, 32, 3e-3, 0.1

# The characters, as numbers. What is not ASCII is a question mark.
text = "\n".join(topics[name] for name in sorted(topics))
codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
letters = np.unique(codes)
data = np.searchsorted(letters, codes).astype(np.int32)


# -- The network -----------------------------------------------------------------------------


def dense(name, x, features):
    with jaxstate.scope(name):
        init = jax.nn.initializers.lecun_normal()
        w = jaxstate.param("w", init, (x.shape[-1], features))
        return x @ w


def norm(name, x):
    with jaxstate.scope(name):
        scale = jaxstate.param("scale", jax.nn.initializers.ones, x.shape[-1:])
        return jax.nn.standardize(x) * scale


def dropout(x):
    keep = jaxstate.random.bernoulli(1 - DROPOUT, x.shape)
    return jnp.where(keep, x / (1 - DROPOUT), 0)


def attention(x, position):
    """Every position looks at those before it. ``position`` is None for all of them at once."""
    shape = (*x.shape[:-1], HEADS, WIDTH // HEADS)
    q, k, v = (dense(name, x, WIDTH).reshape(shape) for name in ("q", "k", "v"))
    if position is None:
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
    else:
        cache = jaxstate.variable("cache", jnp.zeros, (2, LENGTH, *shape[1:]))
        cache.value = cache.value.at[:, position].set(jnp.concatenate([k, v]))
        k, v = cache.value
        mask = jnp.arange(LENGTH)[None] <= position
    weights = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH / HEADS)
    weights = jax.nn.softmax(jnp.where(mask, weights, -jnp.inf))
    return dense("out", jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape), WIDTH)


@jaxstate.parametrized
def block(x, position, train):
    drop = dropout if train else lambda x: x
    with jaxstate.scope("attention"):
        x = x + drop(attention(norm("norm", x), position))
    with jaxstate.scope("mlp"):
        hidden = jax.nn.gelu(dense("widen", norm("norm", x), 4 * WIDTH))
        return x + drop(dense("narrow", hidden, WIDTH))


@jaxstate.parametrized
def model(x, position=None, train=False):
    """Logits of the next character, for one sequence of characters (or one character)."""
    normal = jax.nn.initializers.normal(0.02)
    table = jaxstate.param("table", normal, (len(letters), WIDTH))
    places = jaxstate.param("places", normal, (LENGTH, WIDTH))
    x = table[x] + (places[: len(x)] if position is None else places[position])
    x = jaxstate.stack(block, LAYERS)(x, position, train)
    return norm("norm", x) @ table.T


# -- Training and writing --------------------------------------------------------------------


def loss(params, batch, key):
    def of_one(sequence, key):
        logits = model.apply(params, sequence[:-1], train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, sequence[1:]).mean()

    return jax.vmap(of_one)(batch, jax.random.split(key, len(batch))).mean()


def train(key, steps=STEPS, batch=BATCH):
    """The parameters, and the losses on the way."""
    params = model.init(key, data[:LENGTH])
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, steps // 10 + 1, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(params, state, batch, key):
        value, grads = jax.value_and_grad(loss)(params, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, random = optimizer.init(params), [], np.random.default_rng(0)
    for i in range(steps):
        starts = random.integers(0, len(data) - LENGTH - 1, batch)
        sequences = data[starts[:, None] + np.arange(LENGTH + 1)]
        params, state, value = step(params, state, sequences, jax.random.fold_in(key, i))
        losses.append(float(value))
        if i % 100 == 0:
            print(f"step {i}: loss {value:.2f}", flush=True)
    return params, losses


@jaxstate.parametrized
def writer(prompt, length, temperature):
    """``length`` characters, the first of which are the prompt; one position at a time."""

    def step(last, position):
        logits = model(last[None], position)[0]
        drawn = jaxstate.random.categorical(logits / temperature)
        given = prompt[jnp.minimum(position + 1, len(prompt) - 1)]
        character = jnp.where(position + 1 < len(prompt), given, drawn)
        return character, character

    _, characters = jax.lax.scan(step, prompt[0], jnp.arange(length - 1))
    return jnp.concatenate([prompt[:1], characters])


def write(params, key, prompt, length=LENGTH, temperature=0.8):
    """A text that starts with ``prompt``."""
    prompt = np.searchsorted(letters, np.frombuffer(prompt.encode(), np.uint8)).astype(np.int32)
    _, caches = writer.init_with_state(key, prompt, length, temperature)
    run = jax.jit(writer.apply_with_state, static_argnums=3)
    characters, _ = run({"model": params}, caches, prompt, length, temperature, key=key)
    return letters[np.asarray(characters)].tobytes().decode()


def main():
    print(f"{len(data):,} characters, {len(letters)} of them different")
    start = time.perf_counter()
    params, _ = train(jax.random.key(0))
    print(f"trained {STEPS} steps in {time.perf_counter() - start:.0f} s\n")
    for i, prompt in enumerate(["The function ", "A class is ", "    >>> "]):
        print(write(params, jax.random.key(i), prompt), "\n", "-" * 40)


if __name__ == "__main__":
    main()
