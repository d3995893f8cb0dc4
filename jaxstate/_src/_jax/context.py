# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The configuration: what shapes a trace is part of JAX's cache keys."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
from jax._src import config, core, mesh

__all__ = [
    "default_key_kind",
    "set_context_signature",
    "trace_context",
    "trace_context_without_state",
    "type_context",
]


_context_signature = core.config_ext.Config(
    "jaxstate_context", None, include_in_jit_key=True, include_in_trace_context=True
)


def trace_context() -> Hashable:
    """All of the configuration that shapes a trace."""
    return config.trace_context()


def trace_context_without_state() -> Hashable:
    """The same for a trace that uses no state."""
    context, signature = config.trace_context(), _context_signature.value
    if signature is None:
        return context
    i = context.index(signature)
    return (*context[:i], None, *context[i + 1 :])


def type_context() -> Hashable:
    """The configuration that shapes the type of a new array."""
    x64 = config.enable_x64.value, config.explicit_x64_dtypes.value
    return (*x64, mesh.get_abstract_mesh())


def default_key_kind() -> str:
    """The kind of random keys that `jax.random.key` makes."""
    return jax.config.jax_default_prng_impl


def set_context_signature(signature: Any) -> None:
    """Makes ``signature`` part of the keys of JAX's caches of traces and programs; None ends it."""
    _context_signature.set_local(core.config_ext.unset if signature is None else signature)
