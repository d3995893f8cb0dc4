"""Which operation has which rule."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxstate._src.causal import copies
from jaxstate._src.causal.copies import Copies, Reshape
from jaxstate._src.causal.elementwise import Collective, Elementwise, Selection
from jaxstate._src.causal.indices import (
    Gather,
    dynamic_slice_rule,
    dynamic_update_slice_rule,
    scatter_rule,
)
from jaxstate._src.causal.mixing import (
    MATRICES,
    WHOLE,
    Mixing,
    Product,
    Reduction,
    TriangularSolve,
    all_but,
)
from jaxstate._src.causal.program import Operation
from jaxstate._src.causal.recurrences import cumulative
from jaxstate._src.causal.rule import Rule
from jaxstate._src.causal.windows import Pooling, convolution_rule

ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "complex", "conj",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "eq_to",
    "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma",
    "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log",
    "log1p", "log2", "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "name", "ne", "neg",
    "nextafter", "not", "one_minus_square", "or", "polygamma", "polynomial", "population_count",
    "pow", "random_clone", "random_fold_in", "random_gamma", "random_gamma_grad", "random_seed",
    "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt",
    "square", "stop_gradient", "sub", "tan", "tanh", "threefry2x32", "xor", "zeta",
}  # fmt: skip
REDUCTIONS = {
    "argmax", "argmin", "reduce", "reduce_and", "reduce_max", "reduce_min", "reduce_or",
    "reduce_prod", "reduce_sum", "reduce_xor",
}  # fmt: skip
UNCHANGED = {
    "device_put", "layout_constraint", "optimization_barrier", "pvary", "reshard",
    "sharding_constraint",
}  # fmt: skip
SCATTERS = {
    "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub",
}  # fmt: skip
OF_MATRICES = {
    "cholesky", "cholesky_update", "eig", "eigh", "householder_product", "lu", "qr", "svd",
    "tridiagonal_solve",
}  # fmt: skip
COLLECTIVES = {"pmax", "pmin", "psum", "psum_invariant"}


def of_first_axes(op: Operation) -> range:
    """The axes that the operand and the result have both, where one has more at its end."""
    return range(min(len(op.ins[0].shape), len(op.avals[0].shape)))


RULES: dict[str, Rule | Callable[[Operation], Rule]] = {
    **dict.fromkeys(ELEMENTWISE, Elementwise()),
    **dict.fromkeys(REDUCTIONS, Reduction()),
    **dict.fromkeys(UNCHANGED, Copies(copies.same_place)),
    **dict.fromkeys(OF_MATRICES, MATRICES),
    **dict.fromkeys(SCATTERS, scatter_rule),
    **dict.fromkeys(COLLECTIVES, Collective()),
    **dict.fromkeys(["reduce_window_sum", "reduce_window_max", "reduce_window_min"], Pooling()),
    **dict.fromkeys(
        ["bitcast_convert_type", "random_bits", "random_split", "random_unwrap", "random_wrap"],
        Mixing(of_first_axes),
    ),
    "broadcast_in_dim": Copies(copies.of_broadcast),
    "concatenate": Copies(copies.of_concatenate),
    "conv_general_dilated": convolution_rule,
    "cumlogsumexp": cumulative(jnp.logaddexp),
    "cummax": cumulative(jax.lax.max),
    "cummin": cumulative(jax.lax.min),
    "cumprod": cumulative(jax.lax.mul),
    "cumsum": cumulative(jax.lax.add),
    "dot_general": Product(),
    "dynamic_slice": dynamic_slice_rule,
    "dynamic_update_slice": dynamic_update_slice_rule,
    "fft": all_but(lambda p, ndim: range(ndim - len(p["fft_lengths"]), ndim)),
    "gather": Gather(),
    "lu_pivots_to_permutation": all_but(lambda p, ndim: [ndim - 1]),
    "pad": Copies(copies.of_pad),
    "reshape": Reshape(),
    "rev": Copies(copies.of_rev),
    "select_n": Selection(),
    "slice": Copies(copies.of_slice),
    "sort": all_but(lambda p, ndim: [p["dimension"]]),
    "split": Copies(copies.of_split),
    "squeeze": Copies(copies.of_squeeze),
    "stack": Copies(copies.of_stack),
    "tile": Copies(copies.of_tile),
    "top_k": all_but(lambda p, ndim: [p.get("axis", ndim - 1)]),
    "transpose": Copies(copies.of_transpose),
    "triangular_solve": TriangularSolve(),
    "unstack": Copies(copies.of_unstack),
}


def rule_of(op: Operation) -> Rule:
    """What has no rule is taken as a whole: every result depends on every operand."""
    rule = RULES.get(op.name, WHOLE)
    return rule if isinstance(rule, Rule) else rule(op)
