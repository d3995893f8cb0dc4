# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""What is added to JAX's registries: types of tracers, effects, primitives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from jax._src import core, dtypes, effects
from jax._src.interpreters import ad, batching, mlir

from jaxstate._src._jax.names import Primitive
from jaxstate._src._jax.types import canonicalize

__all__ = [
    "allow_effect_everywhere_but_in_compiled_code",
    "register_lowering",
    "register_tracer_type",
    "resolved",
    "without_derivative",
]


def without_derivative(name: str, error: Callable[..., Exception]) -> Any:
    """The primitive of a function that returns its operand, and raises ``error(**params)`` where it
    is differentiated."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, **_: x)
    primitive.def_abstract_eval(lambda x, **_: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda ctx, x, **_: [x])

    def refuse(primals: Any, tangents: Any, **params: Any) -> Any:
        raise error(**params)

    ad.primitive_jvps[primitive] = refuse
    return primitive


def allow_effect_everywhere_but_in_compiled_code(effect_type: type) -> None:
    """Lets jaxprs with the effect be built inside every transformation, and none be lowered."""
    effects.control_flow_allowed_effects.add_type(effect_type)
    effects.custom_derivatives_allowed_effects.add_type(effect_type)
    effects.remat_allowed_effects.add_type(effect_type)


def register_lowering(primitive: Any, rule: Callable[..., Any]) -> None:
    mlir.register_lowering(primitive, rule)


def resolved(x: Any) -> Any:
    """``x``; if it is a capture, what it stands for."""
    return canonicalize(x) if type(x) in _captures else x


_captures: list[type] = []


def register_tracer_type(tracer_type: type, resolve: Callable[[Any], Any]) -> None:
    """Makes every ``bind`` call ``resolve`` on operands of ``tracer_type``."""
    _captures.append(tracer_type)
    dtypes.register_canonicalize_value_handler(tracer_type, resolve)
    core.pytype_aval_mappings[tracer_type] = operator.attrgetter("aval")
