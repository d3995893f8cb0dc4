"""The models in plain JAX: parameters, statistics and keys are passed and returned by hand.

The trees have the names that jaxstate gives, and the initial values and keys are the same, so the
results of both can be compared exactly.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate_tests.bench import ops
from jaxstate_tests.bench.models import Net


def numbered(name: str, n: int) -> list[str]:
    return [name, *(f"{name}_{i}" for i in range(1, n))][:n]


def made(key: Any, path: str, init: Any, shape: tuple[int, ...]) -> Any:
    """The initial value of a parameter, from a key of its own."""
    digest = hashlib.sha256(path.encode()).digest()
    for i in (0, 4):
        word = np.uint32(int.from_bytes(digest[i : i + 4], "little"))
        key = jax.random.fold_in(key, word)
    return init(key, shape)


def init_dense(key: Any, path: str, features_in: int, features: int) -> dict[str, Any]:
    return {
        "w": made(key, f"{path}/w", ops.LECUN, (features_in, features)),
        "b": made(key, f"{path}/b", ops.ZEROS, (features,)),
    }


def init_statistics(features: int) -> dict[str, Any]:
    return {"mean": jnp.zeros((features,)), "var": jnp.ones((features,))}


def batch_norm(state: dict[str, Any], x: Any) -> tuple[Any, dict[str, Any]]:
    y, mean, var = ops.batch_norm(x, state["mean"], state["var"])
    return y, {"mean": mean, "var": var}


def init_layer_norm(key: Any, path: str, features: int) -> dict[str, Any]:
    return {
        "scale": made(key, f"{path}/scale", ops.ONES, (features,)),
        "shift": made(key, f"{path}/shift", ops.ZEROS, (features,)),
    }


def mlp(depth: int, width: int) -> Net:
    names = list(zip(numbered("dense", depth), numbered("norm", depth), strict=True))

    def init(key: Any, x: Any) -> Any:
        params = {dense: init_dense(key, dense, width, width) for dense, _ in names}
        return params, {norm: init_statistics(width) for _, norm in names}

    def forward(params: Any, state: Any, x: Any, key: Any) -> Any:
        new = {}
        for i, (dense, norm) in enumerate(names):
            x, new[norm] = batch_norm(state[norm], ops.dense(x, **params[dense]))
            x = ops.dropout(jax.random.fold_in(key, i), jax.nn.relu(x))
        return x, new

    return Net(init, forward)


def transformer(depth: int, width: int, heads: int) -> Net:
    q, k, v, out, up, down = numbered("dense", 6)
    first, second = numbered("norm", 2)
    blocks = numbered("block", depth)

    def init_block(key: Any, path: str) -> Any:
        params = {first: init_layer_norm(key, f"{path}/{first}", width)}
        for name in (q, k, v, out):
            params[name] = init_dense(key, f"{path}/{name}", width, width)
        params[second] = init_layer_norm(key, f"{path}/{second}", width)
        params[up] = init_dense(key, f"{path}/{up}", width, 4 * width)
        params[down] = init_dense(key, f"{path}/{down}", 4 * width, width)
        return params

    def init(key: Any, x: Any) -> Any:
        return {name: init_block(key, name) for name in blocks}, {}

    def block(params: Any, x: Any, key: Any) -> Any:
        dense = lambda name, x: ops.dense(x, **params[name])  # noqa: E731
        h = ops.layer_norm(x, **params[first])
        mixed = ops.attention(dense(q, h), dense(k, h), dense(v, h), heads)
        x = x + ops.dropout(key, dense(out, mixed))
        return x + dense(down, jax.nn.gelu(dense(up, ops.layer_norm(x, **params[second]))))

    def forward(params: Any, state: Any, x: Any, key: Any) -> Any:
        for i, name in enumerate(blocks):
            x = block(params[name], x, jax.random.fold_in(key, i))
        return x, state

    return Net(init, forward)


def rnn(width: int) -> Net:
    def init(key: Any, xs: Any) -> Any:
        params = init_dense(key, "cell", width + xs.shape[-1], width)
        return {"cell": params}, {"cell": {"steps": jnp.zeros((), jnp.int32)}}

    def forward(params: Any, state: Any, xs: Any, key: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            count, steps, h = carry
            steps = steps + 1
            h = ops.cell(h, x, **params["cell"])
            h = ops.dropout(jax.random.fold_in(key, count), h)
            return (count + 1, steps, h), h

        start = (jnp.int32(0), state["cell"]["steps"], jnp.zeros((xs.shape[1], width)))
        (_, steps, _), hs = jax.lax.scan(body, start, xs)
        return hs, {"cell": {"steps": steps}}

    return Net(init, forward)


def convnet(depth: int, channels: int) -> Net:
    names = list(zip(numbered("conv", depth), numbered("norm", depth), strict=True))

    def init(key: Any, x: Any) -> Any:
        params, features = {}, x.shape[-1]
        for conv, _ in names:
            shape = (3, 3, features, channels)
            params[conv] = {"w": made(key, f"{conv}/w", ops.LECUN, shape)}
            features = channels
        params["dense"] = init_dense(key, "dense", channels, 10)
        return params, {norm: init_statistics(channels) for _, norm in names}

    def forward(params: Any, state: Any, x: Any, key: Any) -> Any:
        new = {}
        for conv, norm in names:
            x, new[norm] = batch_norm(state[norm], ops.conv(x, params[conv]["w"]))
            x = jax.nn.relu(x)
        return ops.dense(x.mean((1, 2)), **params["dense"]), new

    return Net(init, forward)
