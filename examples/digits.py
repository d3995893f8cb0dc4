"""Reading handwritten digits: a classifier trained with jaxstate.

The data are the 1,797 scanned digits, 8 by 8 pixels each, that ship with scikit-learn. Nothing is
downloaded. Run it with ``make demo``, or in an environment that has the "demo" extra::

    python examples/digits.py

What to look at: no function below takes a random key or passes one on, and no layer is given its
weights. All the loops, derivatives and compilations are JAX's own, unwrapped: ``jax.vmap``,
``jax.lax.fori_loop``, ``jax.checkpoint``, ``jax.value_and_grad``, ``jax.jit``.

The file reads from top to bottom: layers, network, training, saving, figure.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # the figure goes to a file, so no display is needed
import matplotlib.pyplot as plt
import numpy as np
import optax
import safetensors.numpy
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxstate

SEED = 0
WIDTH = 128
DROPOUT = 0.2
EPOCHS = 100
BATCH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
OUTPUT = Path(__file__).parent / "output"


# Layers. A layer is a function that asks for its parameters by name.


def dense(features):
    """A linear layer with ``features`` outputs."""

    @jaxstate.parametrized
    def dense(x):
        shape = (x.shape[-1], features)
        weights = jaxstate.param("weights", jax.nn.initializers.lecun_normal(), shape)
        bias = jaxstate.param("bias", jax.nn.initializers.zeros, (features,))
        return x @ weights + bias

    return dense


def dropout(x):
    """Drops some of the activations; every call draws another key from the open stream.

    It has no parameters, so a plain function will do.
    """
    keep = jax.random.bernoulli(jaxstate.next_key(), 1 - DROPOUT, x.shape)
    return jnp.where(keep, x / (1 - DROPOUT), 0)


def residual_block(width):
    """Adds to its input what two layers make of it."""
    widen, narrow = dense(2 * width), dense(width)

    @jaxstate.parametrized
    def block(x, train):
        y = narrow(jax.nn.gelu(widen(jax.nn.standardize(x))))
        return x + (dropout(y) if train else y)

    return block


# The network: from pixels to ten scores.


def classifier(width):
    """Images of shape (n, 8, 8) to scores of shape (n, 10)."""
    # A layer object is one set of parameters, wherever it is called. So the layers are made here,
    # once, and not in the function that runs with every call.
    embed, block, head = dense(width), residual_block(width), dense(10)

    @jaxstate.parametrized
    def net(images, train=False):
        # Each pass of the loop uses the same weights (it is the same block) and draws new keys
        # for dropout. In the backward pass the block runs again instead of remembering its
        # activations; that run sees the same keys, or the gradient would be wrong.
        @jax.checkpoint
        def apply_block(x):
            return block(x, train)

        x = embed(images.reshape(len(images), -1))
        x = jax.lax.fori_loop(0, 3, lambda _, x: apply_block(x), x)
        return head(jax.nn.standardize(x))

    return net


net = classifier(WIDTH)


# Training.


def shifted(image):
    """One image, moved by up to one pixel in either direction."""
    start = jax.random.randint(jaxstate.next_key(), (2,), 0, 3)
    return jax.lax.dynamic_slice(jnp.pad(image, 1), start, image.shape)


def loss(params, images, labels):
    # `shifted` draws a key, and every lane of a vmap draws its own: each image moves differently.
    images = jax.vmap(shifted)(images)
    scores = net.apply(params, images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


@jax.jit
def predict(params, images):
    # Without `train` nothing is drawn, so no stream has to be open.
    return net.apply(params, images).argmax(-1)


def accuracy(params, images, labels):
    return float((predict(params, images) == labels).mean())


def train(images, labels, test_images, test_labels):
    """Trains the network.

    Returns:
      The parameters, the mean loss of each epoch and the held-out accuracy after each epoch.
    """
    steps = len(images) // BATCH
    params = net.init(jax.random.key(SEED), images[:1])
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, EPOCHS * steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, images, labels):
        value, gradients = jax.value_and_grad(loss)(params, images, labels)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    losses, accuracies = [], []
    # The one place that mentions a key. All draws below come from this stream, the ones inside
    # the compiled step too: it moves on with every call of `step`.
    with jaxstate.rng_stream(jax.random.key(SEED + 1)):
        for _ in (progress := tqdm(range(EPOCHS), desc="training", unit="epoch")):
            # The last, incomplete batch is left out: another shape would compile again.
            order = np.asarray(jax.random.permutation(jaxstate.next_key(), len(images)))
            epoch = []
            for batch in order[: steps * BATCH].reshape(steps, BATCH):
                params, opt_state, value = step(params, opt_state, images[batch], labels[batch])
                epoch.append(value)
            losses.append(float(np.mean(epoch)))
            accuracies.append(accuracy(params, test_images, test_labels))
            progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.2%}")
    return params, losses, accuracies


# Saving. Parameters are a plain nested dict of arrays: any format for named arrays fits.


def save(path, params):
    leaves, _ = jax.tree.flatten_with_path(params)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    arrays = [np.asarray(leaf) for _, leaf in leaves]
    safetensors.numpy.save_file(dict(zip(names, arrays, strict=True)), path)


def load(path):
    params = {}
    for name, array in safetensors.numpy.load_file(path).items():
        *scopes, last = name.split("/")
        level = params
        for scope in scopes:
            level = level.setdefault(scope, {})
        level[last] = array
    return params


# The figure.


def draw(path, losses, accuracies, images, labels, predictions):
    """Draws the learning curve, and the digits that were read wrongly."""
    figure = plt.figure(figsize=(10, 4.6), layout="constrained")
    curves, gallery = figure.subfigures(1, 2, width_ratios=(1.2, 1), wspace=0.06)

    epochs = np.arange(1, len(losses) + 1)
    upper, lower = curves.subplots(2, 1, sharex=True)
    upper.semilogy(epochs, losses, color="tab:blue")
    upper.set_ylabel("training loss")
    lower.plot(epochs, np.array(accuracies) * 100, color="tab:green")
    lower.set_ylim(90, 100.5)
    lower.set(xlabel="epoch", ylabel="held-out accuracy (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    curves.align_ylabels()
    curves.suptitle(f"Accuracy on held-out digits: {accuracies[-1]:.1%}")

    wrong = np.flatnonzero(predictions != labels)
    shown = wrong[:9]
    columns = max(1, math.ceil(math.sqrt(len(shown))))
    rows = max(1, math.ceil(len(shown) / columns))
    for i, axes in enumerate(gallery.subplots(rows, columns, squeeze=False).flat):
        if i >= len(shown):
            axes.axis("off")
            continue
        axes.imshow(images[shown[i]], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"read {predictions[shown[i]]}, is {labels[shown[i]]}", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray")
    some = f", {len(shown)} of them shown" if len(shown) < len(wrong) else ""
    gallery.suptitle(f"Read wrongly: {len(wrong)} of {len(labels)}{some}")
    figure.savefig(path, dpi=150)


def main():
    start = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        images, labels, test_size=500, stratify=labels, random_state=SEED
    )

    params, losses, accuracies = train(images, labels, test_images, test_labels)

    saved = OUTPUT / "digits.safetensors"
    save(saved, params)
    loaded = load(saved)
    assert accuracy(loaded, test_images, test_labels) == accuracies[-1]

    figure = OUTPUT / "digits.png"
    predictions = np.asarray(predict(loaded, test_images))
    draw(figure, losses, accuracies, test_images, test_labels, predictions)

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"held-out accuracy  {accuracies[-1]:.2%} of {len(test_labels)} digits")
    print(f"time               {time.perf_counter() - start:.1f} s")
    print(f"parameters         {saved}  ({size:,} numbers)")
    print(f"figure             {figure}")
    assert accuracies[-1] >= 0.97, "a network that has learned to read gets 97 % right"


if __name__ == "__main__":
    main()
