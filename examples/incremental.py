"""Autoregressive sampling in linear time, from a model that knows nothing of it.

A model of sequences says, for all positions at once, what comes next: ``f(x)[i]`` depends on
``x[:i]`` only. To sample from it is to find the ``x`` with ``x == f(x)``, element by element::

    for i in range(n):
        x = x.at[i].set(f(x)[i])            # naive: all of f, n times

`sample` finds the same ``x``, and computes each element of each intermediate value once::

    x = sample(f, jnp.zeros(n))

How it works: of every value in ``f`` a beginning is known, along one axis, its *time*. When the
input is known up to ``x[:t]``, the value is known up to ``t + lead``: a lead of 1 for what has been
shifted by one, a lead of -1 for what is one behind. The lead follows from the operation alone, so
it is known while ``f`` is traced. Each further element of the input makes one further element of
each value known, and a rule says how to compute it from known elements of the operands.

The state of the trace is ``t`` and what is known of every value, in the order of the program. What
does not depend on the input at all is computed once, before the first step.

The idea, that a causal program can be run again for what is new only, is that of
https://github.com/j-towns/fastar. Run this file for timings::

    python examples/incremental.py
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from count_operations import ELEMENTWISE, count
from jax.extend import core

from jaxstate.extend import StatefulTrace, new_trace

# -- Sampling --------------------------------------------------------------------------------


def sample(f, x, steps=None):
    """The ``x`` with ``x == f(x)``, one element after another.

    Args:
      f: from an array of shape (n, ...) to another of this type. ``f(x)[i]`` depends on ``x[:i]``
        only. It is traced twice, and has to be the same program both times.
      x: gives shape and dtype; its values do not matter.
      steps: how many elements to sample; all without it.

    Returns:
      The array ``x``, with zeros after ``x[:steps]``.

    Raises:
      NotCausal: if ``f`` is not causal as far as the rules can see.
      NotImplementedError: for an operation on the input without a rule.
    """
    steps = len(x) if steps is None else steps
    y, values = _run(f, jnp.zeros_like(x), None)
    x = jnp.zeros_like(x).at[: min(steps, 1)].set(y[: min(steps, 1)])

    def step(t, carry):
        x, values = carry
        y, values = _run(f, x, {"known": t, "values": values})
        return x.at[t].set(y[t]), values

    return jax.lax.fori_loop(1, steps, step, (x, values))[0]


def sample_naively(f, x, steps=None):
    """The same, by running all of ``f`` for each element."""

    def step(t, x):
        return x.at[t].set(f(x)[t])

    return jax.lax.fori_loop(0, len(x) if steps is None else steps, step, jnp.zeros_like(x))


def _run(f, x, state):
    """One run of ``f``: its result and all values, as far as they are known.

    Args:
      state: of the trace; None before anything of ``x`` is known.
    """
    first, state = state is None, state or {"known": 0, "values": ()}
    with new_trace(Incremental, len(x), first, state=state) as trace:
        trace.grows(x, Growing(0, 0))
        y = jax.jit(f)(x)
        end = trace.growth_of(y)
        trace.growing.clear()
    _check_result(x, y, end)
    return y, trace.state["values"]


def _check_result(x, y, end):
    if y.shape != x.shape or y.dtype != x.dtype or (end and end.axis != 0):
        raise NotCausal(f"f makes a sequence of {jax.typeof(y)} from one of {jax.typeof(x)}.")
    if end and end.lead < 1:
        raise NotCausal(
            f"f(x)[i] depends on x up to x[i + {-end.lead}], and may depend on x[:i] only. To mend"
            " it:\n    x = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])      # first of all"
        )


class NotCausal(ValueError):
    """The function is not causal."""


# -- The trace -------------------------------------------------------------------------------


class Growing(NamedTuple):
    """What is known of a value that depends on the input: with ``t`` elements of the input, the
    first ``t + lead`` elements along ``axis``."""

    axis: int
    lead: int


class Step(NamedTuple):
    """How one operation makes its results grow.

    Attributes:
      axis, lead: of the results.
      compute: ``compute(start, size, known)`` is the list of the results from ``start`` to
        ``start + size`` along ``axis``. ``known`` are the results so far.
    """

    axis: int
    lead: int
    compute: Callable[..., list[Any]]


class Incremental(StatefulTrace):
    """The state is a dict of ``known``, the number ``t`` of known elements of the input, and of
    ``values``: the results of each operation in the order of the program, as far as they are known.

    Attributes:
      length: of the input.
      first: whether this is the run with ``t == 0``, which starts ``values``.
      growing: the values that depend on the input, by their ids.
      operations: how many operations this run has seen.
    """

    def __init__(self, length, first):
        super().__init__()
        self.length = length
        self.first = first
        self.growing = {}
        self.operations = 0

    def grows(self, value, growing):
        self.growing[id(value)] = value, growing  # the value too, or its id would be used again

    def growth_of(self, value):
        return self.growing[id(value)][1] if id(value) in self.growing else None

    def process_primitive(self, primitive, args, params):
        growing = [self.growth_of(x) for x in args]
        if not any(growing):
            return self.constant(primitive, args, params)
        operation = Operation(primitive, args, params, growing)
        if primitive.name not in RULES:
            raise operation.no_rule("the operation")
        step = RULES[primitive.name](operation)
        outs = self.start(operation, step) if self.first else self.advance(step)
        for out in outs:
            self.grows(out, Growing(step.axis, step.lead))
        return outs if primitive.multiple_results else outs[0]

    def constant(self, primitive, args, params):
        """Does not depend on the input: the first run computes it, the others know it."""
        if not self.first:
            outs = self.next_values()
        else:
            out = primitive.bind(*args, **params)
            outs = list(out) if primitive.multiple_results else [out]
            self.state["values"] += (outs,)
        return outs if primitive.multiple_results else outs[0]

    def start(self, operation, step):
        """The results before anything of the input is known. A lead is known even then."""
        types = jax.eval_shape(lambda: operation.bind(operation.args))
        outs = [jnp.zeros(t.shape, t.dtype) for t in types]
        size = min(step.lead, outs[0].shape[step.axis])
        if size > 0:
            parts = step.compute(0, size, outs)
            outs = [put(x, part, 0, step.axis) for x, part in zip(outs, parts, strict=True)]
        self.state["values"] += (outs,)
        return outs

    def advance(self, step):
        """The results with one more element, if they have one that depends on that of the input."""
        place, outs = self.operations, self.next_values()
        newest, length = self.state["known"] - 1 + step.lead, outs[0].shape[step.axis]
        parts = step.compute(newest, 1, outs)
        if not 0 <= step.lead <= length - self.length:  # else it has such an element in every step
            exists = (newest >= 0) & (newest < length)
            old = [part_of(x, newest, 1, step.axis) for x in outs]
            parts = [jnp.where(exists, a, b) for a, b in zip(parts, old, strict=True)]
        outs = [put(x, part, newest, step.axis) for x, part in zip(outs, parts, strict=True)]
        values = self.state["values"]
        self.state["values"] = (*values[:place], outs, *values[place + 1 :])
        return outs

    def next_values(self):
        self.operations += 1
        return list(self.state["values"][self.operations - 1])

    # A jit is its operations. They run right here, where it is known which values grow.

    def process_higher_order(self, primitive, args, params):
        growing = [self.growth_of(x) for x in args]
        if not any(growing):
            return self.constant(primitive, args, params)
        if primitive.name not in ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2"):
            raise Operation(primitive, args, params, growing).no_rule("the loop or branch")
        jaxpr = params["jaxpr"]
        closed = jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())
        return self.run(core.jaxpr_as_fun(closed), args)

    def process_custom_jvp_call(self, primitive, fun, jvp, args, /, **params):
        return self.run(fun.call_wrapped, args)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, args, /, **params):
        return self.run(fun.call_wrapped, args)

    def run(self, fun, args):
        with core.set_current_trace(self):
            return fun(*args)


# -- Parts of arrays -------------------------------------------------------------------------


def part_of(x, start, size, axis):
    """The elements from ``start`` to ``start + size``, which exist."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)


def put(x, part, start, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis, allow_negative_indices=False)


def elements(x, indices, axis):
    """The elements at ``indices``: the nearest ones for those that do not exist."""
    return jnp.take(x, indices, axis, mode="clip")


def along(axis, vector, ndim):
    """The vector in the shape in which it broadcasts along an axis."""
    return vector.reshape([-1 if d == axis else 1 for d in range(ndim)])


def replaced(items, place, item):
    """The tuple with another item in one place."""
    return (*items[:place], item, *items[place + 1 :])


def axis_without(axis, removed):
    """What number an axis has when others are removed."""
    return axis - sum(d < axis for d in removed)


# -- Rules -----------------------------------------------------------------------------------


class Operation(NamedTuple):
    """An operation, some of whose operands are growing."""

    primitive: Any
    args: Any
    params: Any
    growing: list[Growing | None]

    def bind(self, args, **params):
        """Runs it, with other parameters; a list of results."""
        out = self.primitive.bind(*args, **{**self.params, **params})
        return list(out) if self.primitive.multiple_results else [out]

    def one_axis(self):
        """The axis along which all growing operands grow, and the lead of the last of them."""
        known = [g for g in self.growing if g]
        if len({g.axis for g in known}) > 1:
            raise self.no_rule("operands that grow along different axes: the operation")
        return known[0].axis, min(g.lead for g in known)

    def first_only(self):
        """The only growing operand, which is the first."""
        if any(self.growing[1:]):
            raise self.no_rule("growing parameters: the operation")
        return self.args[0], *self.growing[0]

    def no_rule(self, what):
        shapes = ", ".join(str(jax.typeof(x)) for x in self.args)
        return NotImplementedError(
            f"There is no rule for {what} {self.primitive.name} of {shapes}, where"
            f" {self.growing} is what is known of its operands."
        )


def elementwise(operation):
    axis, lead = operation.one_axis()

    def compute(start, size, known):
        args = [part_of(x, start, size, axis) if jnp.ndim(x) else x for x in operation.args]
        return operation.bind(args)

    return Step(axis, lead, compute)


def beside(touched):
    """A rule for operations that mix elements along the axes ``touched(params, ndim)`` only."""

    def rule(operation):
        axis, _ = operation.one_axis()
        if axis in touched(operation.params, operation.args[0].ndim):
            raise operation.no_rule("mixing what is known with what is not:")
        return elementwise(operation)

    return rule


def reduction(operation):
    axis, _ = operation.one_axis()
    removed = operation.params["axes"]
    if axis in removed:
        raise operation.no_rule("mixing what is known with what is not:")
    return elementwise(operation)._replace(axis=axis_without(axis, removed))


def unstack_rule(operation):
    step, removed = elementwise(operation), operation.params["axis"]
    if step.axis == removed:
        raise operation.no_rule("mixing what is known with what is not:")
    return step._replace(axis=axis_without(step.axis, [removed]))


def stack_rule(operation):
    step, new = elementwise(operation), operation.params["axis"]
    return step._replace(axis=step.axis + (new <= step.axis))


def cumulative(combine):
    def rule(operation):
        x, axis, lead = operation.first_only()
        if axis != operation.params["axis"]:
            return elementwise(operation)
        if operation.params["reverse"]:
            raise operation.no_rule("mixing what is known with what is not:")

        def compute(start, size, known):
            new = part_of(x, start, size, axis)
            if size > 1 or isinstance(start, int):
                return operation.bind([new])
            last = part_of(known[0], start - 1, 1, axis)
            return [jnp.where(start > 0, combine(last, new), new)]

        return Step(axis, lead, compute)

    return rule


def reshaped(new_axis, changed):
    """A rule for operations that give the axis another place.

    Args:
      new_axis: ``new_axis(operation, axis)``, or None if the axis is lost.
      changed: ``changed(params, new_axis, size)`` are the parameters for a part of that size.
    """

    def rule(operation):
        x, axis, lead = operation.first_only()
        new = new_axis(operation, axis)
        if new is None:
            raise operation.no_rule("losing the axis that grows:")

        def compute(start, size, known):
            part = part_of(x, start, size, axis)
            return operation.bind([part], **changed(operation.params, new, size))

        return Step(new, lead, compute)

    return rule


def axis_after_broadcast(operation, axis):
    new = operation.params["broadcast_dimensions"][axis]
    return new if operation.args[0].shape[axis] == operation.params["shape"][new] else None


def axis_after_reshape(operation, axis):
    shape, new_shape = operation.args[0].shape, operation.params["new_sizes"]
    for new, size in enumerate(new_shape):
        if size == shape[axis] and math.prod(new_shape[:new]) == math.prod(shape[:axis]):
            return new
    return None


def axis_after_squeeze(operation, axis):
    removed = operation.params["dimensions"]
    return None if axis in removed else axis_without(axis, removed)


def axis_after_transpose(operation, axis):
    return operation.params["permutation"].index(axis)


def slice_rule(operation):
    x, axis, lead = operation.first_only()
    p = operation.params
    begin, stride = p["start_indices"][axis], (p["strides"] or (1,) * x.ndim)[axis]
    if stride != 1:
        raise operation.no_rule("strides along the axis that grows:")

    def compute(start, size, known):
        return operation.bind(
            [part_of(x, start + begin, size, axis)],
            start_indices=replaced(p["start_indices"], axis, 0),
            limit_indices=replaced(p["limit_indices"], axis, size),
        )

    return Step(axis, lead - begin, compute)


def dynamic_slice_rule(operation):
    x, axis, lead = operation.first_only()
    sizes = operation.params["slice_sizes"]
    if sizes[axis] != x.shape[axis]:
        raise operation.no_rule("a part of the axis that grows:")

    def compute(start, size, known):
        args = [part_of(x, start, size, axis), *operation.args[1:]]
        return operation.bind(args, slice_sizes=replaced(sizes, axis, size))

    return Step(axis, lead, compute)


def pad_rule(operation):
    x, axis, lead = operation.first_only()
    config = operation.params["padding_config"]
    low, _, interior = config[axis]
    if interior:
        raise operation.no_rule("gaps along the axis that grows:")

    def compute(start, size, known):
        indices = start - low + jnp.arange(size)
        args = [elements(x, indices, axis), operation.args[1]]
        [part] = operation.bind(args, padding_config=replaced(config, axis, (0, 0, 0)))
        inside = along(axis, (indices >= 0) & (indices < x.shape[axis]), x.ndim)
        return [jnp.where(inside, part, operation.args[1])]

    return Step(axis, lead + low, compute)


def concatenate_rule(operation):
    axis, _ = operation.one_axis()
    if operation.params["dimension"] != axis:
        return elementwise(operation)
    ends = [sum(x.shape[axis] for x in operation.args[:k]) for k in range(len(operation.args))]
    growing = [k for k, g in enumerate(operation.growing) if g]
    if len(growing) > 1:
        raise operation.no_rule("growing parts one after the other:")
    lead = ends[growing[0]] + operation.growing[growing[0]].lead

    def compute(start, size, known):
        indices = start + jnp.arange(size)
        part = None
        for x, begin in zip(operation.args, ends, strict=True):
            if x.shape[axis]:
                of_x = elements(x, indices - begin, axis)
                later = along(axis, indices >= begin, x.ndim)
                part = of_x if part is None else jnp.where(later, of_x, part)
        return [part]

    return Step(axis, lead, compute)


def dot_general_rule(operation):
    contracted, batch = operation.params["dimension_numbers"]
    axes = [g.axis if g else None for g in operation.growing]
    if any(axis in dims for axis, dims in zip(axes, contracted, strict=True)):
        raise operation.no_rule("mixing what is known with what is not:")
    if any(axis in dims for axis, dims in zip(axes, batch, strict=True)):
        new = next(dims.index(a) for a, dims in zip(axes, batch, strict=True) if a in dims)
        axes = [dims[new] for dims in batch]
        if any(g and g.axis != axis for g, axis in zip(operation.growing, axes, strict=True)):
            raise operation.no_rule("operands that grow along different axes: the operation")
    elif None in axes:
        free = [
            [d for d in range(x.ndim) if d not in (*contracted[k], *batch[k])]
            for k, x in enumerate(operation.args)
        ]
        k = 0 if axes[1] is None else 1
        new = len(batch[0]) + k * len(free[0]) + free[k].index(axes[k])
    else:
        raise operation.no_rule("operands that grow along different axes: the operation")

    def compute(start, size, known):
        return operation.bind(
            [
                x if axis is None else part_of(x, start, size, axis)
                for x, axis in zip(operation.args, axes, strict=True)
            ]
        )

    return Step(new, min(g.lead for g in operation.growing if g), compute)


def conv_rule(operation):
    x, axis, lead = operation.first_only()
    p, kernel = operation.params, operation.args[1]
    numbers = p["dimension_numbers"]
    role = numbers.lhs_spec.index(axis)  # batch, features, or one of the spatial axes
    new = numbers.out_spec[role]
    if role == 0 and p["batch_group_count"] == 1:
        return Step(new, lead, lambda start, size, known: operation.bind(
            [part_of(x, start, size, axis), kernel]))  # fmt: skip
    space = role - 2
    if space < 0 or p["window_strides"][space] != 1 or p["lhs_dilation"][space] != 1:
        raise operation.no_rule("features or strides along the axis that grows:")
    taps, dilation = kernel.shape[numbers.rhs_spec[role]], p["rhs_dilation"][space]
    low = p["padding"][space][0]
    reach = (taps - 1) * dilation

    def compute(start, size, known):
        if size == 1:  # take the elements under the taps only
            offsets, apart = dilation * jnp.arange(taps), 1
        else:
            offsets, apart = jnp.arange(size + reach), dilation
        indices = start - low + offsets
        inside = along(axis, (indices >= 0) & (indices < x.shape[axis]), x.ndim)
        part = jnp.where(inside, elements(x, indices, axis), jnp.zeros((), x.dtype))
        return operation.bind(
            [part, kernel],
            padding=replaced(tuple(p["padding"]), space, (0, 0)),
            rhs_dilation=replaced(tuple(p["rhs_dilation"]), space, apart),
        )

    return Step(new, lead + low - reach, compute)


def gather_rule(operation):
    """Looking up a growing sequence of indices in a table."""
    table, indices = operation.args
    numbers = operation.params["dimension_numbers"]
    if operation.growing[0]:
        raise operation.no_rule("a table that grows:")
    axis, lead = operation.growing[1]
    if axis == indices.ndim - 1 or axis in numbers.start_indices_batching_dims:
        raise operation.no_rule("indices that grow along this axis:")
    ndim = indices.ndim - 1 + len(numbers.offset_dims)
    new = [d for d in range(ndim) if d not in numbers.offset_dims][axis]

    def compute(start, size, known):
        return operation.bind([table, part_of(indices, start, size, axis)])

    return Step(new, lead, compute)


OTHER_ELEMENTWISE = {
    "and", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p", "imag",
    "integer_pow", "is_finite", "not", "or", "population_count", "real", "reduce_precision",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "stop_gradient",
    "xor",
}  # fmt: skip
REDUCTIONS = {
    "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor", "argmax", "argmin",
}  # fmt: skip

RULES = dict.fromkeys(ELEMENTWISE | OTHER_ELEMENTWISE, elementwise)
RULES |= dict.fromkeys(REDUCTIONS, reduction)
RULES |= {
    "broadcast_in_dim": reshaped(
        axis_after_broadcast, lambda p, axis, size: {"shape": replaced(p["shape"], axis, size)}
    ),
    "concatenate": concatenate_rule,
    "conv_general_dilated": conv_rule,
    "cumlogsumexp": cumulative(jnp.logaddexp),
    "cummax": cumulative(jax.lax.max),
    "cummin": cumulative(jax.lax.min),
    "cumprod": cumulative(jax.lax.mul),
    "cumsum": cumulative(jax.lax.add),
    "dot_general": dot_general_rule,
    "dynamic_slice": dynamic_slice_rule,
    "gather": gather_rule,
    "pad": pad_rule,
    "reshape": reshaped(
        axis_after_reshape,
        lambda p, axis, size: {"new_sizes": replaced(p["new_sizes"], axis, size)},
    ),
    "rev": beside(lambda p, ndim: p["dimensions"]),
    "slice": slice_rule,
    "sort": beside(lambda p, ndim: [p["dimension"]]),
    "split": beside(lambda p, ndim: [p["axis"]]),
    "stack": stack_rule,
    "tile": beside(lambda p, ndim: [d for d in range(ndim) if p["reps"][d] != 1]),
    "squeeze": reshaped(axis_after_squeeze, lambda p, axis, size: {}),
    "top_k": beside(lambda p, ndim: [p.get("axis", ndim - 1)]),
    "transpose": reshaped(axis_after_transpose, lambda p, axis, size: {}),
    "unstack": unstack_rule,
}  # fmt: skip


# -- A model, and what it takes to sample from it --------------------------------------------


def causal_conv_model(key, vocabulary=16, channels=16, layers=6, taps=2):
    """Dilated causal convolutions with gates (https://arxiv.org/abs/1609.03499), random weights.

    Returns:
      A function of a sequence of tokens, int32 of shape (n,), to another: the next tokens, drawn
      from what the model makes of the tokens before. The draws are fixed by the key.
    """
    keys = iter(jax.random.split(key, 2 * layers + 3))

    def weights(*shape):
        return jax.random.normal(next(keys), shape) / math.sqrt(math.prod(shape[:-1]))

    embedding = weights(vocabulary, channels) * 4
    gates = [weights(taps, channels, 2 * channels) for _ in range(layers)]
    mixes = [weights(channels, channels) for _ in range(layers)]
    head, noise = weights(channels, vocabulary) * 2, next(keys)

    @partial(jax.jit, static_argnums=3)
    def layer(x, gate, mix, dilation):
        reach = (taps - 1) * dilation
        h = jax.lax.conv_general_dilated(
            x[None], gate, (1,), [(reach, 0)], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0]  # fmt: skip
        a, b = jnp.split(h, 2, axis=-1)
        return x + (jnp.tanh(a) * jax.nn.sigmoid(b)) @ mix

    def model(tokens):
        before = jnp.concatenate([jnp.zeros(1, tokens.dtype), tokens[:-1]])
        x = embedding[before]
        for k, (gate, mix) in enumerate(zip(gates, mixes, strict=True)):
            x = layer(x, gate, mix, 2**k)
        x = x - x.mean(-1, keepdims=True)
        logits = jax.nn.log_softmax(jax.nn.gelu(x / jnp.std(x, -1, keepdims=True)) @ head)
        noisy = logits + jax.random.gumbel(noise, logits.shape)
        return jnp.argmax(noisy, -1).astype(tokens.dtype)

    return model


def timed(f, x):
    """The result of a jitted function, and how many seconds it takes without its compilation."""
    f = jax.jit(f)
    f(x).block_until_ready()
    start = time.perf_counter()
    out = f(x).block_until_ready()
    return out, time.perf_counter() - start


def main():
    model = causal_conv_model(jax.random.key(0))
    print("     n    flops per element        naive    seconds      naive    faster")
    for n in 64, 128, 256, 512, 1024, 2048, 4096:
        x = jnp.zeros(n, jnp.int32)
        _, counts = count(jax.jit(lambda x: sample(model, x)))(x)
        _, naive_counts = count(jax.jit(lambda x: sample_naively(model, x)))(x)
        found, fast = timed(lambda x: sample(model, x), x)
        wanted, slow = timed(lambda x: sample_naively(model, x), x)
        assert (found == wanted).all(), "the same sequence, token by token"
        flops, naive_flops = (c.flops.total() // n for c in (counts, naive_counts))
        print(f"{n:6}{flops:21,}{naive_flops:13,}{fast:11.4f}{slow:11.3f}{slow / fast:9.0f}x")


if __name__ == "__main__":
    main()
