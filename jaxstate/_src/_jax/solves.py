# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""Operations made of several functions: linear solves and roots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.lax.control_flow import solves

from jaxstate._src._jax.jaxprs import eval_closed_jaxpr
from jaxstate._src._jax.names import jit, linear_solve_p, make_jaxpr, typeof

__all__ = [
    "CustomRoot",
    "RootLinearMap",
    "Solve",
    "custom_root_of",
    "linear_solve_of",
    "root_linear_map_of",
]


class Solve(NamedTuple):
    """An operation made of several functions, each with constants of its own.

    Attributes:
      functions: closed jaxprs, which take their constants in front.
      consts: the constants of each.
      bind: the operation with other ``functions`` and ``consts``. It returns flat results; further
        results of the function ``"solve"`` come last.
    """

    functions: dict[str, Any]
    consts: dict[str, list[Any]]
    bind: Callable[[dict[str, Any], dict[str, list[Any]]], list[Any]]


def linear_solve_of(args: Sequence[Any], params: dict[str, Any]) -> Solve:
    """A custom_linear_solve: ``matvec``, ``solve`` and, if it can be transposed, ``vecmat`` and
    ``transpose_solve``."""
    jaxprs, lengths = params["jaxprs"], params["const_lengths"]
    present = [name for name in jaxprs._fields if getattr(jaxprs, name) is not None]
    consts, rest = _split(args, lengths)

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        longer = {name: len(consts[name]) for name in present}
        operands = [x for name in present for x in consts[name]]
        return linear_solve_p.bind(
            *operands, *rest, jaxprs=jaxprs._replace(**functions),
            const_lengths=lengths._replace(**longer),
        )  # fmt: skip

    return Solve({name: getattr(jaxprs, name) for name in present}, consts, bind)


def _split(args: Sequence[Any], lengths: Any) -> tuple[dict[str, list[Any]], list[Any]]:
    parts, rest = {}, list(args)
    for name, n in lengths._asdict().items():
        parts[name], rest = rest[:n], rest[n:]
    return parts, rest


# From jax 0.11 on, custom_root and the derivative of its function are primitives that hide their
# functions; before, it is a custom_jvp.
CustomRoot = getattr(solves, "CustomRoot", None)
RootLinearMap = getattr(solves, "_RootLinearMap", None)


def custom_root_of(args: Sequence[Any], prim: Any) -> Solve:
    """A custom_root (jax >= 0.11): ``f``, ``solve`` and ``tangent_solve``."""
    solve_consts, guess, f_consts, tangent_consts = jax.tree.unflatten(prim.in_tree, args)
    guess = jax.tree.leaves(guess)
    root, n_root = prim.in_avals[1], len(guess)
    tangent = jax.tree.map(lambda aval: aval.to_tangent_aval(), root)
    functions = {
        "f": make_jaxpr(prim.f)(prim.in_avals[2], root),
        "solve": make_jaxpr(prim.solve)(prim.in_avals[0], root),
        "tangent_solve": make_jaxpr(prim.tangent_solve)(prim.in_avals[3], root, tangent),
    }
    consts = {"f": f_consts, "solve": solve_consts, "tangent_solve": tangent_consts}

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        f, tangent_solve = _taking_lists(functions["f"]), _taking_lists(functions["tangent_solve"])
        solved = _taking_lists(functions["solve"])

        def solve(consts: list[Any], guess: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = solved(consts, guess)
            return outs[:n_root], outs[n_root:]

        operands = consts["solve"], guess, consts["f"], consts["tangent_solve"]
        avals = jax.tree.map(typeof, operands)
        solve_traced = jit(solve).trace(*avals[:2])
        root = CustomRoot(f, solve, tangent_solve, solve_traced, avals, True)  # type: ignore[misc]
        return jax.tree.leaves(root(*operands))

    return Solve(functions, {name: jax.tree.leaves(c) for name, c in consts.items()}, bind)


def root_linear_map_of(args: Sequence[Any], prim: Any) -> Solve:
    """The derivative of the function ``f`` of a custom_root, or its transpose."""
    consts, x, v = jax.tree.unflatten(prim.in_tree, args)
    f = make_jaxpr(prim.f)(*prim.in_avals[:2])

    def bind(functions: dict[str, Any], consts: dict[str, list[Any]]) -> list[Any]:
        operands = consts["f"], jax.tree.leaves(x), jax.tree.leaves(v)
        linear_map = RootLinearMap(  # type: ignore[misc]
            _taking_lists(functions["f"]), jax.tree.map(typeof, operands),
            jax.tree.leaves(prim.out_aval), frozenset(), prim.transposed,
        )  # fmt: skip
        return linear_map(*operands)

    return Solve({"f": f}, {"f": jax.tree.leaves(consts)}, bind)


def _taking_lists(jaxpr: Any) -> Callable[..., list[Any]]:
    """The function of a jaxpr, from lists of operands to a list of results."""
    return lambda *lists: eval_closed_jaxpr(jaxpr, *(x for xs in lists for x in xs))
