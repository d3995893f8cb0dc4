# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Parameters of higher-order primitives, and what is hidden in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import ad_checkpoint, core, custom_batching, hijax, stages, tree_util
from jax._src.lax.control_flow import loops

from jaxstate._src._jax.names import flattree, jit

__all__ = [
    "RematTraced",
    "Scan3",
    "call_hi_primitive_p",
    "expanded",
    "hidden_jaxprs",
    "is_high",
    "is_of_user",
    "is_vmap_rule",
    "operand_tree",
    "remat_with",
    "scan3_with",
    "scan_arity",
    "scan_params_with",
    "tree_with_leaves",
]


def scan_arity(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_params_with(
    params: dict[str, Any], consts: int, carry: int, xs: int = 0, ys: int = 0
) -> dict[str, Any]:
    """``params`` for ``consts`` more constants (or fewer) and ``carry`` more carried values in
    front, and ``xs`` more inputs and ``ys`` more outputs per step behind the others."""
    if "num_consts" in params:
        return dict(
            params, num_consts=params["num_consts"] + consts, num_carry=params["num_carry"] + carry
        )
    assert flattree is not None
    pack, nones = flattree.pack, flattree.nones
    old_consts, old_carry, old_xs = params["ft_in"].unpack()
    carry_out, old_ys = params["ft_out"].unpack()
    return dict(
        params,
        ft_in=pack(
            (
                nones(consts + len(old_consts)),
                pack((nones(carry), old_carry)),
                pack((old_xs, nones(xs))),
            )
        ),
        ft_out=pack((pack((nones(carry), carry_out)), pack((old_ys, nones(ys))))),
    )


def is_vmap_rule(rule: Any) -> bool:
    """Whether the rule of a custom_vmap operation is that of a user's function."""
    return isinstance(rule, custom_batching.ClosedRule)


call_hi_primitive_p = hijax.call_hi_primitive_p
_HiPrim = hijax.VJPHiPrimitive if flattree is None else hijax.HiPrim


def hidden_jaxprs(prim: Any) -> Iterator[Any]:
    """The jaxprs that an operation of `jax.experimental.hijax` hides in its attributes."""
    for value in prim.params.values():
        if isinstance(value, _HiPrim):
            yield from hidden_jaxprs(value)
        elif isinstance(value, stages.Traced):
            yield value.jaxpr
        else:
            yield from core.jaxprs_in_params({"": value})


RematTraced = ad_checkpoint.RematTraced
Scan3 = loops.Scan3


def remat_with(prim: Any, jaxpr: Any, more: int) -> Any:
    """A checkpointed jaxpr of JAX's next implementation with another one, which takes ``more``
    operands in front."""
    params = dict(prim.params, jaxpr=jaxpr)
    if isinstance(params.get("prevent_cse"), tuple):
        params["prevent_cse"] = (False,) * more + params["prevent_cse"]
    return RematTraced(**params)


def scan3_with(prim: Any, jaxpr: Any, more: int) -> Any:
    """A scan of JAX's next implementation with another body, which takes ``more`` operands in
    front, the same in every step."""
    return Scan3(**dict(prim.params, jaxpr=jaxpr, extensives=[False] * more + prim.extensives))


def is_of_user(prim: Any) -> bool:
    """Whether the class of an operation of `jax.experimental.hijax` is not one of JAX's own."""
    return not type(prim).__module__.startswith("jax.")


def expanded(prim: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of the ``expand`` of an operation of `jax.experimental.hijax`, and what that closes
    over."""
    traced = jit(prim.expand).trace(*prim.in_avals)
    return traced.jaxpr, [*traced.jaxpr.consts, *traced._consts]


def is_high(jaxpr: Any) -> bool:
    """Whether a jaxpr has operations that JAX expands when it compiles it."""
    return jaxpr.is_high


def operand_tree(operands: Any) -> Any:
    """The tree structure of operands. (jax >= 0.11 describes them with a registry of its own.)"""
    if flattree is None:
        return jax.tree.structure(operands)
    return tree_util.tracing_registry.flatten(operands)[1]


def tree_with_leaves(tree: Any, n: int) -> Any:
    """A tree structure with ``n`` leaves after those of ``tree``."""
    return jax.tree.structure((tree.unflatten(range(tree.num_leaves)), [0] * n))
