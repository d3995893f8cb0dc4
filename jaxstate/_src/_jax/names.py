# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""What jaxstate uses of JAX as it is: classes, primitives and a few functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax._src import (
    ad_checkpoint,
    ad_util,
    compute_on,
    core,
    custom_batching,
    custom_derivatives,
    effects,
    pjit,
    shard_map,
    tree_util,
    xla_metadata,
)
from jax._src.interpreters import ad, batching
from jax._src.interpreters import partial_eval as pe
from jax._src.lax import lax
from jax._src.lax.control_flow import conditionals, loops, solves
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.util import weakref_lru_cache

try:
    from jax._src import flattree
except ImportError:
    flattree = None

__all__ = [
    "DIFFERENTIATED",
    "DIFFERENTIATING",
    "SHARD_MAP_ERRORS",
    "UNSPECIFIED",
    "AbstractValue",
    "BatchTrace",
    "BatchTracer",
    "Effect",
    "JVPTrace",
    "JVPTracer",
    "LinearizeTrace",
    "LinearizeTracer",
    "PartialTrace",
    "PartialTracer",
    "Primitive",
    "ShapedArray",
    "StagingTrace",
    "StagingTracer",
    "SymbolicZero",
    "Trace",
    "Tracer",
    "Var",
    "Wrap",
    "Zero",
    "call_p",
    "compute_on_p",
    "cond_p",
    "convert_element_type_p",
    "custom_jvp_call_p",
    "custom_vjp_call_p",
    "custom_vmap_p",
    "eval_trace",
    "flat_tree",
    "jit",
    "jit_p",
    "linear_call_p",
    "linear_solve_p",
    "make_jaxpr",
    "program_order_p",
    "remat_opt_p",
    "remat_p",
    "scan_p",
    "set_current_trace",
    "shard_map_p",
    "typeof",
    "weakref_lru_cache",
    "while_p",
    "xla_metadata_call_p",
]


Tracer = core.Tracer
Trace = core.Trace
Primitive = core.Primitive
Var = core.Var
ShapedArray = core.ShapedArray
AbstractValue = core.AbstractValue
Effect = effects.Effect
typeof = core.typeof
set_current_trace = core.set_current_trace
eval_trace = core.eval_trace
StagingTrace = pe.DynamicJaxprTrace
StagingTracer = pe.DynamicJaxprTracer
JVPTrace = ad.JVPTrace
JVPTracer = ad.JVPTracer
LinearizeTrace = ad.LinearizeTrace
LinearizeTracer = ad.LinearizeTracer
DIFFERENTIATING = (JVPTrace, LinearizeTrace)
DIFFERENTIATED = (JVPTracer, LinearizeTracer)
PartialTrace = pe.JaxprTrace
PartialTracer = pe.JaxprTracer
BatchTrace = batching.BatchTrace
BatchTracer = batching.BatchTracer
Zero = ad_util.Zero
SymbolicZero = custom_derivatives.SymbolicZero
jit_p = pjit.jit_p
convert_element_type_p = lax.convert_element_type_p
scan_p = loops.scan_p
while_p = loops.while_p
cond_p = conditionals.cond_p
remat_p = ad_checkpoint.remat_p
custom_jvp_call_p = custom_derivatives.custom_jvp_call_p
custom_vjp_call_p = custom_derivatives.custom_vjp_call_p
linear_solve_p = solves.linear_solve_p
linear_call_p = custom_derivatives.linear_call_p
remat_opt_p = custom_derivatives.remat_opt_p  # the forward rule under ``optimize_remat``
custom_vmap_p = custom_batching.custom_vmap_p
shard_map_p = shard_map.shard_map_p

# Results that do not fit their specs: which, and the tree of all of them.
SHARD_MAP_ERRORS = (shard_map._SpecError, shard_map._RepError)
compute_on_p = compute_on.compute_on_p
if flattree is None:  # jax 0.10
    from jax.experimental.scheduling_groups import xla_metadata_call_p

    program_order_p = None
else:
    xla_metadata_call_p = xla_metadata.xla_metadata_call_p
    try:
        from jax._src.program_order import program_order_p
    except ImportError:  # jax 0.11
        program_order_p = pjit.program_order_p

# Evaluates the closed jaxpr in its parameter ``call_jaxpr``.
call_p = core.closed_call_p if flattree is None else core.eval_jaxpr_p
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

# Programs may put something else in the place of `jax.jit` for a while (`chex.fake_jit`).
jit = jax.jit
flat_tree = tree_util.FlatTree.flatten if flattree is None else flattree.flatten
make_jaxpr = inspect.unwrap(jax.make_jaxpr)  # what is replaced is inside of the one of the API
