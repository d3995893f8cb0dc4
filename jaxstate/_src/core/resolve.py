"""Reading and writing a slot from wherever the program is.

In today's JAX there is no stack of levels: one trace is current, it knows its parent, and so on to
the trace that evaluates. `read_at` and `write_at` walk that chain from the current trace to the
anchor of the holder that answers for the slot. What they meet on the way decides:

* nothing: the cell holds the value;
* a trace that builds a jaxpr (jit, a loop body, a branch ...): inside it the slot is a *capture*
  (if nobody writes the slot) or a pair of ``state_read`` / ``state_write`` equations, which
  `core.discharge` turns into inputs and outputs of that jaxpr when it is bound;
* a trace that differentiates: a written value keeps its tangent for reads further in, and its
  primal goes on outwards;
* a trace that maps over lanes: the holder decides whether lanes share the slot or have their own.
  If they share it and write different values, the address may know how to make one value of them:
  the slot outside gets that one, and each lane goes on with its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import same_trace
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.lanes import put_together, take_apart, written_by_lanes
from jaxstate._src.core.notes import View, lane_of, notes_of, views_of
from jaxstate._src.core.primitives import read_p, state_effect, write_p
from jaxstate._src.core.slots import Address, AllLanes, Holder, any_open, where_unused
from jaxstate._src.core.uses import current_use
from jaxstate.errors import ConvertedClosureError, UnsupportedPrimitiveError, message

__all__ = [
    "check_captured",
    "destination",
    "one_of_each",
    "read_at",
    "read_each",
    "read_since",
    "read_stored",
    "resolve",
    "to_program",
    "write_at",
    "write_each",
]


@read_p.def_bind_with_trace
def _read_again(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
    """An interpreter evaluates a jaxpr whose state is not threaded: read from where it runs."""
    with _jax.set_current_trace(trace):
        addresses = [address.renewed(None) for address in params["addresses"]]
        if args:
            values = [read_since(addresses[0], args[0], params["version"])]
        else:
            values = [read_stored(address) for address in addresses]
        return [_jax.in_mesh_of(a, x) for a, x in zip(params["avals"], values, strict=True)]


def _resolving_captures(bind: Any) -> Any:
    def resolve_or_bind(*args: Any, **params: Any) -> Any:
        # An operand that still is a capture is what the slot holds here.
        if StateTracer not in map(type, args):
            return bind(*args, **params)
        params["addresses"][0].note_read()
        return [resolve(args[0])]

    return resolve_or_bind


_jax.wrap_bind(read_p, _resolving_captures)


@write_p.def_bind_with_trace
def _write_again(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
    with _jax.set_current_trace(trace):
        write_each([address.renewed(None) for address in params["addresses"]], args)
    return []


def read_at(address: Address) -> Any:
    """The current value of the slot that an address means here, in the mesh that the program is in.

    Raises:
      What ``address.missing()`` makes, if nothing that is open knows the address.
    """
    value = read_stored(address)
    return value if _jax.abstract_mesh().empty else _jax.in_mesh(value)


def read_stored(address: Address) -> Any:
    """The current value of the slot, of the mesh type that it has."""
    return _read_under(_jax.current_trace(), address)


def _read_under(trace: Any, address: Address) -> Any:
    """`read_stored`, if ``trace`` is the one that is current."""
    holder = address.holder()
    if holder.anchor is trace:
        return holder.cell(address).value
    levels, base = _way_to(holder)
    return _read_at(address, holder, levels, 0, base)[0]


def read_each(addresses: Iterable[Address]) -> list[Any]:
    """`read_at`, of several slots."""
    trace = _jax.current_trace()
    values = [_read_under(trace, address) for address in addresses]
    return values if _jax.abstract_mesh().empty else [_jax.in_mesh(value) for value in values]


def write_at(address: Address, value: Any) -> None:
    """Makes ``value`` the current value of the slot that an address means here.

    The slot keeps its mesh type. Lanes of a vmap that share it write one value, or
    ``holder.refuse_lanes`` makes the error.
    """
    _write_under(_jax.current_trace(), _jax.abstract_mesh().empty, address, value)


def _write_under(trace: Any, is_in_no_mesh: bool, address: Address, value: Any) -> None:
    """`write_at`, if ``trace`` is the one that is current."""
    holder = address.holder()
    value = _to_write(address, holder, value, is_in_no_mesh)
    if holder.anchor is trace:
        holder.cell(address).value = _jax.canonicalize(value)
        return
    levels, base = _way_to(holder)
    _write_at([address], holder, levels, 0, base, [value])


def _to_write(address: Address, holder: Holder, value: Any, is_in_no_mesh: bool) -> Any:
    if address.notices_writes:
        address.note_write()
    if is_in_no_mesh:
        return value
    return _of_mesh_before(address, holder, _jax.canonicalize(value))


def write_each(addresses: Iterable[Address], values: Iterable[Any]) -> None:
    """Writes several slots, and those together that belong together (`Address.joint`)."""
    trace, is_in_no_mesh = _jax.current_trace(), _jax.abstract_mesh().empty
    addresses = tuple(addresses)
    if not any([address.joint for address in addresses]):  # noqa: C419 (a generator takes longer)
        for address, value in zip(addresses, values, strict=True):
            _write_under(trace, is_in_no_mesh, address, value)
        return
    for group in _groups(addresses, values):
        if len(group) == 1:
            ((address, value),) = group
            _write_under(trace, is_in_no_mesh, address, value)
            continue
        together = [address for address, _ in group]
        holder = together[0].holder()
        levels, base = _way_to(holder)
        written = [_to_write(a, holder, value, is_in_no_mesh) for a, value in group]
        _write_at(together, holder, levels, 0, base, written)


def one_of_each(addresses: Sequence[Address], values: Sequence[Any]) -> list[Any]:
    """One value per slot, of what lanes or devices wrote to it, which varies along the first
    axis."""
    found: dict[int, Any] = {}
    for group in _groups(addresses, zip(range(len(addresses)), values, strict=True)):
        places = [i for _, (i, _) in group]
        pairs = [(address, value) for address, (_, value) in group]
        joint = pairs[0][0].joint
        ones = [a.reduced(v) for a, v in pairs] if joint is None else joint.reduced(pairs)
        found.update(zip(places, ones, strict=True))
    return [found[i] for i in range(len(addresses))]


def _groups(addresses: Iterable[Address], values: Iterable[Any]) -> list[list[tuple[Any, Any]]]:
    """Pairs of addresses and values, in lists of those that belong together."""
    groups: list[list[tuple[Any, Any]]] = []
    known: dict[Any, list[tuple[Any, Any]]] = {}
    for address, value in zip(addresses, values, strict=True):
        joint = address.joint
        group = None if joint is None else known.get(joint.whole(address))
        if group is None:
            groups += ([(address, value)],)
            if joint is not None:
                known[joint.whole(address)] = groups[-1]
        else:
            group.append((address, value))
    return groups


def _of_mesh_before(address: Address, holder: Holder, value: Any) -> Any:
    """A value that was made in a region with axes of other types (`jax.sharding.auto_axes`), as
    one of the mesh type of the slot.

    A slot without one keeps what is written. Who reads it sees it in the mesh of that place, and a
    jaxpr hands it on in the mesh of the place where it is bound.
    """
    if _jax.mesh_of(_jax.typeof(value)) is None:
        return value
    if holder.anchor is _jax.current_trace():
        before = _jax.typeof(holder.cell(address).value)
        if _jax.mesh_of(before) is None:
            return _jax.in_mesh_set(value)
    else:
        base = _way_to(holder)[1]
        before = address.aval() if base is None else _jax.type_in_jaxpr(base, address.aval())
    return _jax.in_mesh_of(before, value)


def _way_to(holder: Holder) -> tuple[list[Any], Any]:
    """The traces between here and the holder's anchor, and the jaxpr builder they end at.

    The builder is None if the anchor comes first, or is not in the chain at all: then the holder's
    value is what a Python closure would see.
    """
    levels: list[Any] = []
    trace, anchor = _jax.current_trace(), holder.opened_under
    tag = getattr(anchor, "tag", None)
    while trace is not None:
        if trace is anchor or (tag is not None and getattr(trace, "tag", None) is tag):
            return levels, None
        if isinstance(trace, _jax.StagingTrace):
            return levels, trace
        levels.append(trace)
        trace = _jax.parent_of(trace)
    return levels, None


def destination(holder: Holder) -> tuple[dict[Any, Any], list[Any]]:
    """Where a value of the holder is kept from here: the notes of that place, and the vmaps on the
    way there, innermost first."""
    levels, base = _way_to(holder)
    notes = holder.extra if base is None else notes_of(base).extra
    return notes, [trace for trace in levels if isinstance(trace, _jax.BatchTrace)]


def _read_at(
    address: Address, holder: Holder, levels: list[Any], i: int, base: Any
) -> tuple[Any, Any]:
    """The value as ``levels[i]`` sees it, and what is stored for it at the end of the way."""
    if i == len(levels):
        stored = holder.cell(address).value if base is None else _read_staged(address, base)
        return stored, stored
    trace = levels[i]
    if isinstance(trace, _jax.BatchTrace):
        lane = lane_of(address, holder, trace, base)
        if isinstance(lane, AllLanes):
            value, stored = _read_at(lane.address, holder, levels, i + 1, base)
            return _jax.lane_tracer(trace, value, 0), stored
        if lane is not None:
            return _jax.lane_tracer(trace, lane.value, lane.batch_dim), lane.value
        written = written_by_lanes(trace, holder, base).get(_key(address, holder, base))
        if written is not None:
            return put_together(written, levels[i:]), written
    value, stored = _read_at(address, holder, levels, i + 1, base)
    if isinstance(trace, _jax.DIFFERENTIATING):
        view = views_of(trace).get(_key(address, holder, base))
        if view is not None and view.stored is stored:
            return _jax.tangent_tracer(trace, value, view.tangent), stored
    return value, stored


def _write_at(
    addresses: Sequence[Address],
    holder: Holder,
    levels: list[Any],
    i: int,
    base: Any,
    values: Sequence[Any],
) -> list[Any]:
    """Writes values that ``levels[i]`` holds, lowers them for the traces outside, and returns what
    is stored at the end of the way. The slots are one, or some that belong together."""
    values = [_jax.canonicalize(value) for value in values]
    if i == len(levels):
        if base is None:
            holder.write_cells(addresses, values)
        else:
            for address, value in zip(addresses, values, strict=True):
                _write_staged(address, base, value)
        return values
    trace = levels[i]
    if isinstance(trace, _jax.BatchTrace):
        return _write_lanes(addresses, holder, levels, i, base, values)
    if isinstance(trace, _jax.DIFFERENTIATING):
        lowered = [x.primal if _jax.owns(trace, x) else x for x in values]
        stored = _write_at(addresses, holder, levels, i + 1, base, lowered)
        views = views_of(trace)
        for address, value, at_end in zip(addresses, values, stored, strict=True):
            key = _key(address, holder, base)
            if _jax.owns(trace, value):
                views[key] = View(value.tangent, at_end)
            else:
                views.pop(key, None)
        return stored
    values = [_plain(x, trace, a) for a, x in zip(addresses, values, strict=True)]
    return _write_at(addresses, holder, levels, i + 1, base, values)


def _write_lanes(
    addresses: Sequence[Address],
    holder: Holder,
    levels: list[Any],
    i: int,
    base: Any,
    values: Sequence[Any],
) -> list[Any]:
    """`_write_at` in a vmap."""
    trace, first = levels[i], addresses[0]
    lane = lane_of(first, holder, trace, base)
    if isinstance(lane, AllLanes):
        lanes = [_jax.all_lanes(trace, value) for value in values]
        return _write_at([lane.address], holder, levels, i + 1, base, lanes)
    lowered = [_jax.lane_value(trace, value) for value in values]
    if lane is not None:
        lane.write(*lowered[0])
        return [lane.value]
    written = written_by_lanes(trace, holder, base)
    keys = [_key(address, holder, base) for address in addresses]
    if all(batch_dim is None for _, batch_dim in lowered):
        for key in keys:
            written.pop(key, None)
        return _write_at(addresses, holder, levels, i + 1, base, [x for x, _ in lowered])
    n = _jax.lane_count(trace)
    ones = [x for x, _ in lowered]
    stacked: dict[int, Any] = {}
    with _jax.set_current_trace(_jax.parent_of(trace)):
        for k, (address, (x, dim)) in enumerate(zip(addresses, lowered, strict=True)):
            if address.reduce is not None:
                if dim is None:
                    x = jnp.broadcast_to(x, (n, *x.shape))
                stacked[k] = jnp.moveaxis(x, dim or 0, 0)
            elif dim is not None:
                raise holder.refuse_lanes(address, trace)
        reduced = one_of_each([addresses[k] for k in stacked], list(stacked.values()))
    for k, one in zip(stacked, reduced, strict=True):
        ones[k] = one
    _write_at(addresses, holder, levels, i + 1, base, ones)
    for key, value in zip(keys, values, strict=True):
        written[key] = take_apart(value, levels[i:])
    return [written[key] for key in keys]


def _plain(value: Any, trace: Any, address: Address) -> Any:
    """What the value of a trace of another kind is outside of it."""
    if not (isinstance(value, _jax.Tracer) and value._trace is trace):
        return value
    plain = _jax.plain_value(value)
    if plain is value:
        raise UnsupportedPrimitiveError(
            message(
                f"{address} was written with a value of a {type(trace).__name__} (devices of a"
                " shard_map, say), and there is no rule that makes one value of it.",
                fix="""
                value = jax.lax.pmean(value, axis)      # return it, and write it outside
                """,
                used=_jax.user_location(),
            )
        )
    return plain


def _key(address: Address, holder: Holder, base: Any) -> Any:
    return address.seen_from(holder if base is None else base)


# A capture is resolved by the `bind` that takes it as an operand, or by the jaxpr that closes over
# it: from the trace that is current there.
_jax.register_tracer_type(StateTracer, lambda tracer: resolve(tracer))


def _result_of_jaxpr(value: Any) -> Any:
    return to_program(resolve(value) if type(value) is StateTracer else value)


_jax.wrap_results_of_jaxprs(_result_of_jaxpr)


def _finished_results(trace: Any, tracers: Sequence[Any]) -> Sequence[Any]:
    """A result that is a capture is one of an equation: JAX hands on constants and operands that
    are results as they are, and an equation resolves them."""
    if StateTracer not in map(type, _jax.constants_of(trace)):
        return tracers
    return [
        _jax.copied(trace, x) if type(_jax.constant_of(x)) is StateTracer else x for x in tracers
    ]


def _finished(jaxpr: Any, consts: list[Any]) -> tuple[Any, list[Any]]:
    """What is captured and written in one jaxpr is no constant of it."""
    if state_effect not in jaxpr.effects or StateTracer not in map(type, consts):
        return jaxpr, consts
    eqns = _jax.equations(jaxpr)
    written = {a for e in eqns if e.primitive is write_p for a in e.params["addresses"]}
    dropped = [type(c) is StateTracer and c.address in written for c in consts]
    if not any(dropped):
        return jaxpr, consts

    kept = [not d for d in dropped]
    without_operands = [
        eqn.replace(invars=[])
        if eqn.primitive is read_p and eqn.invars and eqn.params["addresses"][0] in written
        else eqn
        for eqn in eqns
    ]
    jaxpr = _jax.with_constvars(jaxpr, kept, without_operands)
    return jaxpr, [c for c, k in zip(consts, kept, strict=True) if k]


_jax.wrap_finished_jaxprs(_finished_results, _finished)


def _handed_out(constant: Any) -> Any:
    """A constant of a jaxpr that somebody keeps, who may evaluate it in another module or scope.

    It is the value, as of everything that a function closes over. Inside of a jaxpr the value would
    be a tracer of it, and no constant: there it is the capture of the slot that is meant here.
    """
    if type(constant) is not StateTracer:
        return constant
    address = constant.address.renewed(current_use())
    _, base = _way_to(address.holder())
    return resolve(constant) if base is None else StateTracer(address.pinned(), constant.aval)


_jax.wrap_conversions(any_open, where_unused, _handed_out)


def to_program(value: Any) -> Any:
    """The result of a jaxpr as the program gets it that evaluates it; `arrays` replaces this."""
    return value


def resolve(tracer: StateTracer) -> Any:
    """The value that a capture stands for, here and now."""
    value = _jax.in_mesh_of(tracer.aval, read_stored(tracer.address.renewed(current_use())))
    check_captured(tracer, value)
    return value


def check_captured(tracer: StateTracer, value: Any) -> None:
    """Raises if a jaxpr was traced for another type of what it captures than that of ``value``."""
    if not _jax.stands_for(value, tracer.aval):
        raise tracer.address.renewed(current_use()).changed(tracer.aval, value)


def _read_staged(address: Address, trace: Any) -> Any:
    """The slot inside the jaxpr that ``trace`` builds: a capture, a ``state_read``, or both.

    A slot that can be captured and written is read by an equation with the capture as operand. The
    operand goes the way of everything that a function closes over, with its derivatives; the
    equation says whose value it is, so that a write between where the closure was made explicit
    and where the equation is evaluated is seen (`read_since`).
    """
    notes = notes_of(trace)
    key = address.seen_from(trace)
    value = notes.values.get(key)
    if value is None:
        if address.threaded:
            aval = _staged_aval(address, key, trace)
        else:
            aval = _jax.type_in_jaxpr(trace, address.aval())
        captured, place = [], _jax.current_place()
        if not address.threaded:
            captured.append(_jax.new_const(trace, StateTracer(key, aval), aval, place))
        if address.threaded or address.may_be_written:
            params = dict(addresses=(key,), avals=(aval,), version=address.version())
            (value,) = _jax.emit(trace, read_p, captured, [aval], params, {state_effect}, place)
        else:
            value = captured[0]
        notes.values[key] = value
    return value


def read_since(address: Address, captured: Any, version: int) -> Any:
    """The value of a slot which ``captured`` was when the slot had been written ``version`` times.

    It is ``captured`` itself, if the slot was not written since: a solver that was given what a
    function closes over differentiates by that.

    Raises:
      ConvertedClosureError: if the slot was written since, and ``captured`` has a derivative of
        its own.
    """
    holder = address.known_holder()
    if holder is None or not (holder.is_boundary or _is_around(holder)):
        return captured
    levels, base = _way_to(holder)
    is_written = base is not None and address.is_written_in(base, notes_of(base).written)
    if not holder.is_boundary:
        if address.version() != version:
            value = read_at(address)
            if _is_differentiated(captured, levels) and not _is_differentiated(value, levels):
                raise _written_since(address)
            return value
    elif base is None:
        return holder.captured(address, captured, version)
    elif is_written and address.version() != version:
        return read_at(address)
    if base is None or is_written:
        return captured
    return _staged_since(captured, levels, base, address, version)


def _is_around(holder: Holder) -> bool:
    """Whether the program is inside of the transformation in which ``holder`` was opened. (The rule
    of a derivative runs outside of that derivative.)"""
    chain = _jax.chain(_jax.current_trace())
    return any(same_trace(trace, holder.anchor) for trace in chain)


def _staged_since(x: Any, levels: list[Any], base: Any, address: Address, version: int) -> Any:
    """An equation for what was captured, in a jaxpr that may be that of a loop: what comes after
    may write the slot before the next turn."""
    if isinstance(x, _jax.Tracer) and any(same_trace(x._trace, level) for level in levels):
        if not isinstance(x, _jax.DIFFERENTIATED):
            return x  # each lane was given its own
        primal = _staged_since(x.primal, levels, base, address, version)
        return _jax.tangent_tracer(x._trace, primal, x.tangent)
    notes, key = notes_of(base), address.seen_from(base)
    known = (notes.values.get(key), *notes.refreshed.get(key, ()))
    if any(_jax.is_same(x, value) for value in known):
        return x
    aval = _jax.typeof(x)
    params, place = dict(addresses=(key,), avals=(aval,), version=version), _jax.current_place()
    (value,) = _jax.emit(base, read_p, (x,), [aval], params, {state_effect}, place)
    notes.refreshed.setdefault(key, []).append(value)
    return value


def _is_differentiated(x: Any, levels: list[Any]) -> bool:
    """Whether ``x`` has a tangent of one of the derivatives ``levels``."""
    while isinstance(x, (*_jax.DIFFERENTIATED, _jax.BatchTracer)):
        if isinstance(x, _jax.BatchTracer):
            x = x.val
        elif any(same_trace(x._trace, level) for level in levels):
            return True
        else:
            x = x.primal
    return False


def _written_since(address: Address) -> Exception:
    return ConvertedClosureError(
        message(
            f"A function that reads {address} was converted, so that what it closes over is an"
            f" operand; {address} was written since, and the function is differentiated by that"
            " operand, which is another value now.",
            fix="""
            y = x.copy()                # a value of its own, which nobody writes
            solve(lambda t: t * y)      # for the function to close over
            """,
            used=_jax.user_location(),
        )
    )


def _staged_aval(address: Address, key: Address, trace: Any) -> Any:
    """The type of a slot in the jaxpr that ``trace`` builds, in which it is ``key``.

    In a shard_map it depends on what the slot holds around that jaxpr: a derivative sums over
    devices where a value that does not vary becomes one that does.
    """
    if _jax.abstract_mesh().empty:
        return address.aval()
    aval = _jax.type_in_jaxpr(trace, address.aval())
    parent = _jax.parent_of(trace)
    if not address.has_axes or parent is None or not _jax.device_axes():
        return aval

    def outside() -> Any:
        with _jax.set_current_trace(parent):
            return read_at(key)

    return _jax.with_axes(aval, address.holder().varies_over(address, outside))


def _write_staged(address: Address, trace: Any, value: Any) -> None:
    notes, key = notes_of(trace), address.seen_from(trace)
    if notes.place is None:
        notes.place = _jax.current_place()
    _jax.emit(trace, write_p, (value,), [], dict(addresses=(key,)), {state_effect}, notes.place)
    notes.values[key] = value
    notes.written.add(key)
