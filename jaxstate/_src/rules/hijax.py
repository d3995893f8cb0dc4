"""checkpoint and scan as JAX has them behind flags, ``jax_remat3`` and ``jax_scan3``.

Both are operations of `jax.experimental.hijax`, which hold their jaxpr in an object.

    y = checkpoint[f] x      -->      s = read;  y, s' = checkpoint[f threaded] s x;  write s'

This scan carries nothing: its body reads and writes references that it closes over. So what the
body writes is in a reference too, for as long as the scan runs.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.contents import state_of, uses_of
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_hidden_rule


@register_hidden_rule(_jax.RematTraced)
def _checkpoint(args: Any, prim: Any) -> list[Any]:
    uses = reads, writes, outs = uses_of([prim.jaxpr])
    initialize(prim.jaxpr, args)
    slots = read_all(uses.ins)
    how = Layout(reads, writes, outs=outs, once=True)
    jaxpr = discharge(prim.jaxpr, how, list(map(_jax.typeof, slots)))
    return write_last(uses.results, _jax.remat_with(prim, jaxpr, len(slots))(*slots, *args))


@register_hidden_rule(_jax.Scan3)
def _scan(args: Any, prim: Any) -> list[Any]:
    reads, writes = state_of(prim.jaxpr)
    initialize(prim.jaxpr, args)
    n = len(reads)
    slots = read_all(reads + writes)
    jaxpr = discharge(prim.jaxpr, Layout(reads, writes), list(map(_jax.typeof, slots)))
    refs = list(map(jax.new_ref, slots[n:]))

    def body(*operands: Any) -> list[Any]:
        read, refs, rest = operands[:n], operands[n : n + len(writes)], operands[n + len(writes) :]
        outs = _jax.eval_closed_jaxpr(jaxpr, *read, *(ref[...] for ref in refs), *rest)
        for ref, value in zip(refs, outs[len(outs) - len(refs) :], strict=True):
            ref[...] = value
        return outs[: len(outs) - len(refs)]

    avals = list(map(_jax.typeof, (*slots[:n], *refs)))
    body_jaxpr = _jax.trace_flat(body, [*avals, *_jax.in_avals(prim.jaxpr)])
    outs = _jax.scan3_with(prim, body_jaxpr, len(avals))([*slots[:n], *refs, *args])
    write_all(writes, [ref[...] for ref in refs])
    return list(outs)
