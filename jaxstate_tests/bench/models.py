"""The models as data: their sizes, and the libraries in which they are written.

A library is a module of this package with a function for each architecture (``mlp``,
``transformer``, ``rnn``, ``convnet``), which takes the sizes and returns a `Net`.
"""

import importlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Net(NamedTuple):
    """One model in one library: pure functions, however the library likes to write them.

    Attributes:
      init: ``init(key, x) -> (params, state)``.
      forward: ``forward(params, state, x, key) -> (y, state)``.
    """

    init: Callable[[Any, Any], tuple[Any, Any]]
    forward: Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class Model(NamedTuple):
    """One model, whatever it is written in.

    Attributes:
      architecture: name of the function that makes it.
      sizes: arguments of that function.
      shape: of the input.
    """

    architecture: str
    sizes: dict[str, int]
    shape: tuple[int, ...]

    def written_in(self, library: types.ModuleType) -> Net | None:
        """The model in a library; None if it has no such architecture."""
        make = getattr(library, self.architecture, None)
        return make and make(**self.sizes)

    def input(self) -> jax.Array:
        return jax.random.normal(jax.random.key(1), self.shape, jnp.float32)


MODELS = {
    "mlp": Model("mlp", dict(depth=20, width=256), (32, 256)),
    "mlp, width 8": Model("mlp", dict(depth=20, width=8), (32, 8)),
    "transformer": Model("transformer", dict(depth=6, width=256, heads=4), (4, 64, 256)),
    "transformer, width 8": Model("transformer", dict(depth=6, width=8, heads=4), (4, 64, 8)),
    "rnn": Model("rnn", dict(width=64), (32, 16, 64)),
    "convnet": Model("convnet", dict(depth=4, channels=16), (8, 16, 16, 3)),
}

# Small ones: for tests, and to see that all works.
QUICK = {
    "mlp": Model("mlp", dict(depth=2, width=8), (4, 8)),
    "transformer": Model("transformer", dict(depth=1, width=8, heads=2), (2, 4, 8)),
    "rnn": Model("rnn", dict(width=8), (3, 2, 8)),
    "convnet": Model("convnet", dict(depth=2, channels=4), (2, 8, 8, 3)),
}

PEERS = {
    "jaxstate": "with_jaxstate",
    "by hand": "by_hand",
    "Haiku": "with_haiku",
    "Flax linen": "with_linen",
    "Flax NNX": "with_nnx",
    "Equinox": "with_equinox",
}


def libraries() -> tuple[dict[str, types.ModuleType], dict[str, str]]:
    """The libraries that can be imported with this version of JAX, and why the others cannot."""
    found, missing = {}, {}
    for name, module in PEERS.items():
        try:
            found[name] = importlib.import_module(f"{__package__}.peers.{module}")
        except Exception as error:  # a library may break on a version of JAX in any way
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def train_step(net: Net) -> Callable[..., Any]:
    """A step of gradient descent: ``(params, state, x, key) -> (params, state, loss)``."""

    def loss(params: Any, state: Any, x: Any, key: Any) -> Any:
        y, state = net.forward(params, state, x, key)
        return (y**2).mean(), state

    def step(params: Any, state: Any, x: Any, key: Any) -> Any:
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x, key)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
        return params, state, value

    return step
