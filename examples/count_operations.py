"""Counting what a program does: operations, floating point operations, bytes.

    (y, counts) = count(f)(x)
    print(counts)

Every operation is counted as often as it runs, so a ``while`` loop counts the steps that it takes
and a ``cond`` the branch that is taken; ``jit``, ``grad`` and ``vmap`` make no difference but in
the operations that they lead to. Run it for a table::

    python examples/count_operations.py

How it works: what one operation costs follows from its shapes, which are known while the program
is traced. Only how often it runs is not. So the state is one vector of counters, a counter for
each *kind* of operation (a primitive and its costs), and all else is Python arithmetic on integers
that do not overflow.
"""

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate.extend import StatefulTrace, new_trace

# -- The trace -------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Operations that cost the same.

    Attributes:
      name: of the primitive.
      flops: floating point operations of one of them.
      read, written: bytes of its operands and of its results.
    """

    name: str
    flops: int
    read: int
    written: int


class CountOperations(StatefulTrace):
    """The state is a vector of uint32: how often operations of each kind have run.

    Attributes:
      kinds: the number of each kind, its place in the vector.
    """

    def __init__(self):
        super().__init__()
        self.kinds = {}

    def process_primitive(self, primitive, args, params):
        return self.count(primitive, args, params)

    def process_higher_order(self, primitive, args, params):
        if primitive.name == "custom_linear_solve":  # it calls its functions as often as it likes
            return self.count(primitive, args, params)
        return super().process_higher_order(primitive, args, params)

    def count(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        results = out if primitive.multiple_results else [out]
        kind = self.kinds.setdefault(kind_of(primitive, args, results, params), len(self.kinds))
        if kind >= len(self.state):
            raise ValueError(
                f"The program has more than {len(self.state)} kinds of operations:"
                " count(f, kinds=...) makes room for more."
            )
        # No index, but a constant vector: XLA makes one addition of those of a straight line.
        self.state += (jnp.arange(len(self.state)) == kind).astype(jnp.uint32)
        return out


def count(f, kinds=512):
    """A function with the arguments of ``f`` that returns the result of ``f`` and the `Counts`.

    Args:
      kinds: room for this many kinds of operations.
    """

    def counted(*args, **kwargs):
        with new_trace(CountOperations, state=jnp.zeros(kinds, jnp.uint32)) as trace:
            out = f(*args, **kwargs)
        return out, Counts(trace.kinds, trace.state)

    return counted


class Counts:
    """What a program did, by the name of the primitive.

    Attributes:
      executions, flops, read, written: dicts from names to numbers.
    """

    def __init__(self, kinds, executions):
        self.executions, self.flops = Counter(), Counter()
        self.read, self.written = Counter(), Counter()
        for kind, n in zip(kinds, np.asarray(executions).tolist(), strict=False):
            if n:
                self.executions[kind.name] += n
                self.flops[kind.name] += n * kind.flops
                self.read[kind.name] += n * kind.read
                self.written[kind.name] += n * kind.written

    def __str__(self):
        columns = self.executions, self.flops, self.read, self.written
        names = sorted(self.executions, key=lambda name: -self.flops[name])
        rows = [(name, *(column[name] for column in columns)) for name in names]
        rows.append(("total", *(column.total() for column in columns)))
        head = f"{'operation':24}{'executions':>12}{'flops':>14}{'bytes read':>14}{'written':>14}"
        return "\n".join([head, *("{:24}{:12,}{:14,}{:14,}{:14,}".format(*row) for row in rows)])


# -- What one operation costs ----------------------------------------------------------------


def kind_of(primitive, args, results, params):
    """The cost of one operation, from the shapes of its operands and results."""
    name = primitive.name
    ins, outs = [jax.typeof(x) for x in args], [jax.typeof(x) for x in results]
    read, written = sum(map(size_in_bytes, ins)), sum(map(size_in_bytes, outs))
    if name in TAKES_A_PART:
        read = written + sum(map(size_in_bytes, ins[1:]))
    elif name in REPLACES_A_PART:
        part = size_in_bytes(ins[REPLACES_A_PART[name]])
        read, written = sum(map(size_in_bytes, ins[1:])), part
    return Kind(name, flops_of(name, ins, outs, params), read, written)


# Of these, only the part of the first operand counts that goes out or is replaced; the number says
# which operand that is.
TAKES_A_PART = {"slice", "dynamic_slice", "gather"}
REPLACES_A_PART = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter-mul": 2}


def size_in_bytes(aval):
    """The bytes of a value. A mutable reference is none: what it gives and takes is counted."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or type(aval).__name__ == "AbstractRef":
        return 0
    return math.prod(aval.shape) * dtype.itemsize


def flops_of(name, ins, outs, params):
    """Floating point operations. A multiplication and an addition are two; an elementary function
    is one, and so is a comparison."""
    if not ins or not outs or not jnp.issubdtype(ins[0].dtype, jnp.inexact):
        return 0
    size = math.prod(outs[0].shape)
    if name in ELEMENTWISE:
        return size
    if name == "integer_pow":
        return size * multiplications(params["y"])
    if name in REDUCTIONS:
        return math.prod(ins[0].shape) - size
    if name in CUMULATIVE:
        axis = params["axis"]
        return size - size // max(ins[0].shape[axis], 1)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(ins[0].shape[d] for d in contracted)
    if name == "conv_general_dilated":
        # Taps in the padding count: a convolution is a product with every tap of the kernel.
        _, in_channels, *window = params["dimension_numbers"].rhs_spec
        return 2 * size * math.prod(ins[1].shape[d] for d in (in_channels, *window))
    if name.startswith("reduce_window"):
        return size * (math.prod(params["window_dimensions"]) - 1)
    if name == "scatter-add":
        return math.prod(ins[2].shape)
    return 0


def multiplications(power):
    """Of repeated squaring; a negative power also takes a division."""
    n = abs(power)
    return max(n.bit_length() + n.bit_count() - 2, 0) + (power < 0)


ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh", "cbrt",
    "ceil", "clamp", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac", "le", "lgamma", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "pow", "rem", "round",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
}  # fmt: skip
REDUCTIONS = {
    "reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "argmax", "argmin"
}  # fmt: skip
CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}


# -- A table ---------------------------------------------------------------------------------


def collatz_distance(w, x):
    """A product in a loop whose length depends on the data, and a branch in it."""

    def step(carry):
        n, x = carry
        x = jax.lax.cond(n % 2 == 0, lambda x: jnp.tanh(x @ w), lambda x: x * 0.5, x)
        return jnp.where(n % 2 == 0, n // 2, 3 * n + 1), x

    return jax.lax.while_loop(lambda carry: carry[0] > 1, step, (jnp.int32(27), x))[1]


def main():
    w, x = jnp.eye(64) / 2, jnp.ones((8, 64))
    _, counts = count(jax.jit(collatz_distance))(w, x)
    print("The Collatz sequence of 27 has 70 even and 41 odd numbers before it comes to 1.\n")
    print(counts)
    assert counts.executions["dot_general"] == 70
    assert counts.flops["dot_general"] == 70 * 2 * 8 * 64 * 64


if __name__ == "__main__":
    main()
