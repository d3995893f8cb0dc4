"""Mixed precision without a cast in the model.

    y = mixed_precision(f)(x)

Products and convolutions are computed in bfloat16, whatever ``f`` is made of: ``jit``, ``scan``,
``checkpoint``, layers from elsewhere. All else stays as it is. If ``f`` computes in bfloat16 by
itself, what is sensitive (sums, exponentials, logarithms) is computed in float32. Run it for an
example::

    python examples/mixed_precision.py

How it works: an operation in one of the two lists gets its operands in the precision of the list,
and its result goes back to the type that the program has there. So the program keeps its types, and
a loop its carry. XLA drops a cast to float32 and back, so that a chain of operations from the first
list stays in bfloat16 on the machine.

The state counts the values that the lower precision cannot hold. bfloat16 holds the range of
float32, so this matters for float16 only: there a training step looks at it to scale its loss.
"""

import jax
import jax.numpy as jnp

from jaxstate.extend import StatefulTrace, new_trace

LOW = frozenset({"dot_general", "conv_general_dilated"})
SENSITIVE = frozenset(
    {
        "cumlogsumexp", "cumprod", "cumsum", "erf", "exp", "expm1", "log", "log1p", "logistic",
        "pow", "reduce_prod", "reduce_sum", "rsqrt", "sqrt",
    }
)  # fmt: skip

# -- The trace -------------------------------------------------------------------------------


class MixedPrecision(StatefulTrace):
    """The state is an int32: how many elements of operands have become infinite.

    Attributes:
      low: names of the primitives that are computed in ``dtype``.
      sensitive: names of those that are computed in float32, if the program has less.
    """

    def __init__(self, low=LOW, sensitive=SENSITIVE, dtype=jnp.bfloat16):
        super().__init__()
        self.low, self.sensitive = low, sensitive
        self.dtype = jnp.dtype(dtype)

    def process_primitive(self, primitive, args, params):
        dtype = self.dtype_for(primitive, args)
        if dtype is None:
            return super().process_primitive(primitive, args, params)
        types = jax.eval_shape(lambda: primitive.bind(*args, **params))
        if jnp.finfo(dtype).max < jnp.finfo(jnp.float32).max:
            self.state += sum(overflows(x, dtype) for x in args if is_real(x))
        args = [jax.lax.convert_element_type(x, dtype) if is_real(x) else x for x in args]
        if params.get("preferred_element_type") is not None:
            params = dict(params, preferred_element_type=dtype)
        out = super().process_primitive(primitive, args, params)
        return jax.tree.map(lambda x, t: jax.lax.convert_element_type(x, t.dtype), out, types)

    def dtype_for(self, primitive, args):
        """The precision for an operation; None if it stays as it is."""
        dtypes = {jax.typeof(x).dtype for x in args if is_real(x)}
        if primitive.name in self.low and dtypes == {FLOAT32}:
            return self.dtype
        if primitive.name in self.sensitive and dtypes & HALF:
            return FLOAT32
        return None


FLOAT32 = jnp.dtype(jnp.float32)
HALF = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}


def is_real(x):
    return jnp.issubdtype(jax.typeof(x).dtype, jnp.floating)


def overflows(x, dtype):
    return jnp.sum(jnp.isfinite(x) & (jnp.abs(x) > jnp.finfo(dtype).max), dtype=jnp.int32)


def mixed_precision(f, **policy):
    """A function like ``f``, in mixed precision.

    Args:
      policy: ``low``, ``sensitive`` and ``dtype``, see `MixedPrecision`.
    """
    return lambda *args, **kwargs: with_overflows(f, **policy)(*args, **kwargs)[0]


def with_overflows(f, **policy):
    """The same, and how many elements of operands have become infinite: an int32."""

    def wrapped(*args, **kwargs):
        with new_trace(MixedPrecision, state=jnp.int32(0), **policy) as trace:
            out = f(*args, **kwargs)
        return out, trace.state

    return wrapped


# -- An example ------------------------------------------------------------------------------


def loss(params, x, labels):
    """A deep network: a loop over layers, none of which remembers its activations."""

    @jax.checkpoint
    def layer(x, weights):
        return x + jnp.tanh(x @ weights), None

    x, _ = jax.lax.scan(layer, x @ params["embed"], params["layers"])
    scores = jax.nn.log_softmax(x @ params["head"])
    return -jnp.take_along_axis(scores, labels[:, None], 1).mean()


def example(width=64, depth=8, examples=128, classes=10):
    """Parameters and data for `loss`."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embed": jax.random.normal(keys[0], (width, width)) / width**0.5,
        "layers": jax.random.normal(keys[1], (depth, width, width)) / width**0.5,
        "head": jax.random.normal(keys[2], (width, classes)) / width**0.5,
    }
    x = jax.random.normal(keys[3], (examples, width))
    return params, x, jnp.arange(examples) % classes


def train(loss, params, x, labels, steps=100):
    """Plain gradient descent; the losses."""

    def step(params, _):
        value, slopes = jax.value_and_grad(loss)(params, x, labels)
        return jax.tree.map(lambda w, d: w - 0.1 * d, params, slopes), value

    return jax.lax.scan(step, params, length=steps)[1]


def main():
    full = jax.jit(lambda *args: train(loss, *args))(*example())
    mixed = jax.jit(lambda *args: train(mixed_precision(loss), *args))(*example())
    print("  step  float32    mixed")
    for k in range(0, len(full), 11):
        print(f"{k:6}{full[k]:9.4f}{mixed[k]:9.4f}")
    assert jnp.abs(full - mixed).max() < 0.02


if __name__ == "__main__":
    main()
