"""cond and switch: every branch takes and returns all slots that any of them uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.contents import refreshed, state_of, uses_of
from jaxstate._src.core.discharge import Layout, check_place, discharge, read_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.slots import Address


@register_rule(_jax.cond_p)
def _cond(args: Any, params: dict[str, Any]) -> list[Any]:
    """A slot that a branch leaves alone passes through it."""
    index, *operands = args
    uses = reads, writes, outs = uses_of(params["branches"])
    for branch in params["branches"]:
        initialize(branch, operands)
        operands = refreshed(branch, operands, writes=uses.results)
        _check_absent(writes, branch)
    slots = read_all(uses.ins)
    avals = [_jax.typeof(s) for s in slots]
    how = Layout(reads, writes, outs=outs, once=True)
    branches = tuple(discharge(j, how, avals) for j in params["branches"])
    _check_places(uses.results, branches)
    if _jax.device_axes():
        axes = _axes(uses.results, branches, index)
        branches = tuple(_varying_last(j, axes) for j in branches)
    results = _jax.cond_p.bind(index, *slots, *operands, **dict(params, branches=branches))
    return write_last(uses.results, results)


def _check_places(written: Sequence[Address], branches: Sequence[Any]) -> None:
    for i, address in enumerate(written, -len(written)):
        first, *others = (_jax.out_avals(j)[i] for j in branches)
        for other in others:
            check_place(address, first, other, "another branch")


def _axes(written: Sequence[Address], branches: Sequence[Any], index: Any) -> tuple[Any, ...]:
    """For each slot that a branch writes, the mesh axes of a shard_map over which it varies then.

    It does if it does in one branch, or if devices take different branches.
    """
    n = len(written)
    avals = zip(*(_jax.out_avals(j)[-n:] for j in branches), strict=True) if n else ()
    chosen = _jax.varying_axes(index)
    return tuple(
        frozenset().union(chosen if address.has_axes else (), *map(_jax.axes_of, outs))
        for address, outs in zip(written, avals, strict=True)
    )


@_jax.weakref_lru_cache
def _varying_last(branch: Any, axes: tuple[Any, ...]) -> Any:
    """The branch with its last results varying over ``axes``."""
    outvars, eqns = list(_jax.outvars(branch)), list(_jax.equations(branch))
    for i, more in enumerate(axes, len(outvars) - len(axes)):
        if not more <= _jax.axes_of(outvars[i].aval):
            eqns.append(_jax.varying_equation(outvars[i], more))
            outvars[i] = eqns[-1].outvars[0]
    return _jax.remade(
        branch, invars=_jax.invars(branch), outvars=outvars, eqns=eqns, effs=branch.effects
    )


def _check_absent(writes: Sequence[Address], branch: Any) -> None:
    written = state_of(branch).writes
    for address in writes:
        if address not in written:
            address.check_absence(written)
