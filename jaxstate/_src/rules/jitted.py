"""jit: slots go in front of the operands, and behind the results.

    y = jit[f] x      -->      s = read;  y, s' = jit[f threaded] s x;  write s'

Inside a transformation a jitted call is an equation like others. At top level there is none: JAX's
C++ dispatch looks for an executable for operands of these types, and asks Python where it has none.
There `_call_at_top_level` sees the jaxpr first:

* The function has no state: JAX goes on, and the next such call stays in C++.
* It has state: a `_ThreadedCall` makes the call. That is the threaded function on a C++ dispatch of
  its own, so what is left to do in Python is to read the cells, call it, and write the cells.

Which slots a call uses is known when JAX has traced the function for the types of its operands, but
to ask JAX takes longer than the call. So the threaded call that was right for the last call is
tried before (`_call_like_last`): its dispatch has executables only for types for which it is right,
and asks for others. Where the cells are is noted with the open holders (`slots.OpenHere`), or the
holder itself remembers what such a call found in it (`slots.Holder.remembered`).

What a call writes in a large cell (`memory.Kept`), it writes in the memory of the old value if
nothing else has that: the operand is donated. Otherwise a copy is. So there is one program, and no
second compilation when somebody begins or ends to hold a value. The old value is out of its cell
for no longer than JAX's C++ dispatch runs (`rules.donation`): a call that has the function
traced or compiled gets copies, and changes nothing if it fails.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import (
    Addresses,
    Uses,
    captured_inputs,
    in_order,
    refreshed,
    settle,
    uses_of,
)
from jaxstate._src.core.discharge import (
    Layout,
    check_type,
    discharge,
    read_all,
    read_as_stored,
    watched,
    write_all,
    write_last,
    written_meanwhile,
)
from jaxstate._src.core.initializers import has_inits, initialize
from jaxstate._src.core.memory import Kept, append_result, is_large
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.resolve import check_captured
from jaxstate._src.core.slots import any_open, open_here
from jaxstate._src.core.uses import begin_use, end_use
from jaxstate._src.rules.donation import (
    Donation,
    OtherStateError,
    calls_host,
    content,
    donations,
    lost,
)

__all__ = ["call_now", "first"]


@register_rule(_jax.jit_p)
def _jit(args: Any, params: dict[str, Any]) -> list[Any]:
    uses = uses_of([params["jaxpr"]])
    initialize(params["jaxpr"], args)
    args = refreshed(params["jaxpr"], args, writes=uses.results)
    slots = read_all(uses.ins)
    threaded = _threaded(params, uses, [_jax.typeof(s) for s in slots])
    return write_last(uses.results, _jax.jit_p.bind(*slots, *args, **threaded))


def _threaded(
    params: dict[str, Any], uses: Uses, avals: Sequence[Any], donated: Sequence[int] = ()
) -> dict[str, Any]:
    """The parameters of a ``jit`` equation that also takes slots of the types ``avals``, and the
    memory of those that are ``donated``."""
    reads, writes, outs = uses
    more_in, more_out = len(avals), len(uses.results)
    return dict(
        params,
        jaxpr=discharge(params["jaxpr"], Layout(reads, writes, outs=outs, once=True), avals),
        in_shardings=(_jax.UNSPECIFIED,) * more_in + params["in_shardings"],
        in_layouts=(None,) * more_in + params["in_layouts"],
        donated_invars=(*(i in donated for i in range(more_in)), *params["donated_invars"]),
        out_shardings=params["out_shardings"] + (_jax.UNSPECIFIED,) * more_out,
        out_layouts=params["out_layouts"] + (None,) * more_out,
    )


# Asked first about a call at top level: ``client(jitted, args, kwargs)`` returns its results, or
# `NotImplemented`.
first: list[Callable[[_jax.Jitted, Any, Any], Any]] = []


def call_now(jitted: _jax.Jitted, args: Any, kwargs: Any) -> Any:
    """The results of a call of which JAX keeps no executable."""
    call = jitted.infer(args, kwargs)
    results = _call_at_top_level(jitted, call, args, kwargs)
    if results is NotImplemented:
        outs = _jax.jit_p.bind(*call.consts, *call.operands, **call.params)
        results = jax.tree.unflatten(call.out_tree, outs)
    return results


def _call_like_last(jitted: _jax.Jitted, args: Any, kwargs: Any) -> Any:
    """The results of a call that uses the state of the last one; else `NotImplemented`."""
    for client in first:
        results = client(jitted, args, kwargs)
        if results is not NotImplemented:
            return results
    calls = _calls.get(id(jitted.info))
    if calls is None:
        return NotImplemented
    here = open_here()
    threaded = calls.last.get(here.signature)
    return NotImplemented if threaded is None else threaded.try_here(here.found, args, kwargs)


def _call_at_top_level(jitted: _jax.Jitted, call: _jax.JitCall, args: Any, kwargs: Any) -> Any:
    """The results of a call that uses state; `NotImplemented` if the call is JAX's."""
    if _looks_at_operands(call):
        outs = _jax.jit_p.bind(*call.consts, *call.operands, **call.params)
        return jax.tree.unflatten(call.out_tree, outs)
    state = _state_of_call(call)
    if not state:
        return NotImplemented
    return _calls_of(jitted).threaded(jitted, state)(jitted, call.params["jaxpr"], args, kwargs)


_jax.wrap_jitted_calls(_call_like_last, _call_at_top_level)


def _looks_at_operands(call: _jax.JitCall) -> bool:
    """Whether the operands say what the state is: an initializer's data, or a tracer among them.

    (A function that somebody has converted to an object has its captures in the object. And arrays
    that can be written are tracers.) Or whether it is known only when operations are expanded.
    Such a call is bound, as an equation is.
    """
    jaxpr = call.params["jaxpr"]
    if has_inits(jaxpr) or any(map(_jax.is_tracer, call.operands)):
        return True
    if _jax.is_high(jaxpr) and any_open():
        return True
    if any(c.at >= len(call.consts) for c in captured_inputs(jaxpr)):
        return True
    return any(_jax.is_tracer(c) and type(c) is not StateTracer for c in call.consts)


class _Calls:
    """The threaded calls of one jitted function, by the state that they use: the last few.

    Attributes:
      last: the last one for each signature of the open holders (`slots.open_here`).
    """

    ENOUGH = 64

    def __init__(self, fun: Any, info: Any) -> None:
        number = id(info)
        self.fun = weakref.ref(fun, lambda _: _calls.pop(number, None))
        self._info = info  # or another one could get its number
        self.last: dict[Any, _ThreadedCall] = {}
        self._by_state: dict[_StateOfCall, _ThreadedCall] = {}

    def threaded(self, jitted: _jax.Jitted, state: _StateOfCall) -> _ThreadedCall:
        threaded = self._by_state.get(state)
        if threaded is None:
            for oldest in list(self._by_state)[: 1 - self.ENOUGH or None]:
                self._by_state.pop(oldest, None)
            threaded = self._by_state.setdefault(state, _ThreadedCall(jitted, state))
        if len(self.last) >= _MOST:
            self.last.clear()
        self.last[open_here().signature] = threaded
        return threaded


_MOST_DISPATCHES = 8

_MOST = 1000  # of what is kept to be found again: for as many functions, and for each of them

# By the number of a `Jitted.info`, which is compared by identity: this is asked in each call.
_calls: dict[int, _Calls] = {}


def _calls_of(jitted: _jax.Jitted) -> _Calls:
    calls = _calls.get(id(jitted.info))
    if calls is None:
        if len(_calls) >= _MOST:
            _calls.clear()
        calls = _calls.setdefault(id(jitted.info), _Calls(jitted.fun, jitted.info))
    return calls


def _forget(fun: Any) -> None:
    for number, calls in list(_calls.items()):
        if calls.fun() is fun:
            _calls.pop(number, None)


_jax.wrap_clear_cache(_forget, _calls.clear)


class _Recalled(threading.local):
    """The operands of a call that a holder remembers, and has not recalled yet."""

    values: Any = None


_recalled = _Recalled()


class _StateOfCall(NamedTuple):
    """The slots that a call uses, captured and threaded, and where they are.

    Two jaxprs of one function may use slots of one module under other modules or scopes, or expect
    other types of them. Their addresses are equal.
    """

    captured: Addresses
    uses: Uses
    order: Addresses  # of first use
    paths: tuple[Hashable, ...]  # to the captured ones, and to those in `order`
    types: tuple[Hashable, ...]  # of the same, for which the function is traced

    def __bool__(self) -> bool:
        return bool(self.captured or self.order)


def _state_of_call(call: _jax.JitCall) -> _StateOfCall:
    jaxpr = call.params["jaxpr"]
    tracers = [c for c in call.consts if isinstance(c, StateTracer)]
    order = in_order(jaxpr)
    captured = tuple([c.address for c in tracers])
    paths = tuple([address.path_to() for address in (*captured, *order)])
    types = (*[c.aval for c in tracers], *[address.wanted for address in order])
    return _StateOfCall(captured, uses_of([jaxpr]), order, paths, types)


class _ThreadedFunction:
    """A jitted function as one of its slots too, on dispatches of its own.

    It takes the values of the slots that it reads, and returns those that it writes: it knows no
    cells, but whether they are large.
    """

    def __init__(self, jitted: _jax.Jitted, state: _StateOfCall) -> None:
        self._state = state
        captured, uses = state.captured, state.uses
        self._slots = (*uses.ins, *captured, *uses.outs)
        self._carried = range(len(uses.reads), len(uses.ins))
        # What is left alone once learns nothing about operands of those types: so there are more.
        self._run = _jax.dispatched(jitted, self._prepare)
        self._runs = [self._run]
        self._has_left_alone = False
        # Whether there are large cells; which of them the call writes, and how it is called then.
        self._has_large: bool | None = None
        self._donated: tuple[int, ...] = ()
        self._runs_donating: list[Callable[..., Any]] = []

    def _renew(self, jitted: _jax.Jitted) -> None:
        """Adds a dispatch, if the last one has learned nothing where it was asked."""
        if self._has_left_alone and len(self._runs) < _MOST_DISPATCHES:
            self._has_left_alone = False
            self._run = _jax.dispatched(jitted, self._prepare)
            self._runs.append(self._run)
            if self._donated:
                self._runs_donating.append(self._dispatched(jitted))

    def _with_copies(
        self, jitted: _jax.Jitted, jaxpr: Any, values: list[Any]
    ) -> tuple[Callable[..., Any], list[Any]]:
        """How to call the function, with what: with copies of what is to be donated."""
        if self._has_large is None:
            self._look_for_large(jitted)
        if self._donated and calls_host(jaxpr):
            self._donated = ()
        if not self._donated or _jax.checks_results():
            return self._run, values
        copies = {i: _jax.like_copy(values[i]) for i in self._donated}
        if None in copies.values():
            self._donated = ()
            return self._run, values
        return self._runs_donating[-1], [copies.get(i, value) for i, value in enumerate(values)]

    def _look_for_large(self, jitted: _jax.Jitted) -> None:
        cells = {i: address.cell_here() for i, address in enumerate(self._slots)}
        if None in cells.values():
            return  # not to be said here
        large = {
            i: cell.peek()
            for i, cell in cells.items()
            if isinstance(cell, Kept) and is_large(cell.peek())
        }
        donated = tuple(i for i in self._carried if i in large and _jax.can_be_donated(large[i]))
        self._donated = donated
        if donated:
            self._runs_donating.append(self._dispatched(jitted))
        self._has_large = bool(large)

    def _dispatched(self, jitted: _jax.Jitted) -> Callable[..., Any]:
        return _jax.dispatched(jitted, partial(self._prepare, donated=self._donated))

    def _append_recalled(
        self,
        done: list[Any],
        runs: Sequence[Callable[..., Any]],
        values: list[Any],
        args: Any,
        kwargs: Any,
    ) -> None:
        """Appends what the call returns; an `OtherStateError` if the function would have to be
        traced."""
        _recalled.values = values
        try:
            for run in runs:
                with suppress(OtherStateError):
                    return append_result(done, partial(run, values, *args, **kwargs))
        finally:
            _recalled.values = None
        self._has_left_alone = True
        raise OtherStateError

    def _prepare(
        self,
        jitted: _jax.Jitted,
        values: list[Any],
        args: Any,
        kwargs: Any,
        donated: Sequence[int] = (),
    ) -> _jax.JitCall:
        """The call with slots, for operands of new types. (The dispatch knows types, not slots.)"""
        if _recalled.values is values:  # to trace the function would look at what the holder knows
            raise OtherStateError
        if donations.last is not None and donations.last.values is values:
            donations.last.give_back()
        call = jitted.infer(args, kwargs)
        if _looks_at_operands(call) or _state_of_call(call) != self._state:
            raise OtherStateError
        uses = uses_of([call.params["jaxpr"]])
        n = len(uses.ins)
        slots, captures = values[:n], values[n:]
        for address, value in zip(uses.ins, slots, strict=True):
            check_type(address, address.wanted, value)
        tracers = [c for c in call.consts if isinstance(c, StateTracer)]
        for tracer, value in zip(tracers, captures, strict=True):
            check_captured(tracer, value)
        call = _jax.with_constants_inside(call, lambda c: not isinstance(c, StateTracer))
        avals = [_jax.typeof(_jax.canonicalize(s)) for s in slots]
        return call._replace(
            params=_threaded(call.params, uses, avals, donated),
            consts=[*slots, *captures],
            names=([str(a) for a in (*uses.ins, *self._state.captured)], call.names[1]),
            out_tree=_jax.tree_with_leaves(call.out_tree, len(uses.results)),
        )


class _ThreadedCall(_ThreadedFunction):
    """Calls such a function: finds the cells of the slots, and writes them.

    (A base class, since each attribute more on the way takes its time in every call.)
    """

    def __init__(self, jitted: _jax.Jitted, state: _StateOfCall) -> None:
        super().__init__(jitted, state)
        uses = state.uses
        self._aliases = tuple(a for a in state.order if a.may_alias)
        self._n_in = len(uses.ins) + len(state.captured)
        self._written = (*self._carried, *range(self._n_in, len(self._slots)))
        self._noticing = tuple(a for a in uses.results if a.notices_writes)
        self._stay = all(a.stays_here for a in self._slots)
        # What a holder remembered when the call was made in a place: see `Holder.remembered`.
        recalled = [i for i, a in enumerate(self._slots) if a.is_recalled]
        self._recalled = tuple(self._slots[i] for i in recalled)
        self._others = [(i, a) for i, a in enumerate(self._slots) if not a.is_recalled]
        self._ranks = {i: rank for rank, i in enumerate(recalled)}
        self._memories: dict[Hashable, Any] = {}

    def try_here(self, found: dict[Any, Any], args: Any, kwargs: Any) -> Any:
        """The results; `NotImplemented` if a cell is not here, or if the call uses other state.

        ``found`` is where the cells are noted if they stay (`slots.OpenHere`).
        """
        holder = self._holder() if self._recalled else None
        place = None if holder is None else holder.place_here()
        if holder is not None and place is not None:
            memory = self._memories.get(place)
            if memory is None:  # to look for a cell would be to look for names
                return NotImplemented
            return self._try_recalled(holder, memory, args, kwargs)
        refs = found.get(self)
        cells: list[Any] = [ref() for ref in refs] if refs else self._cells_here(found)
        if None in cells:
            return NotImplemented
        if self._has_large:
            return self._try_large(cells, args, kwargs)
        try:
            values = [cell.value for cell in cells[: self._n_in]]
            results, written = self._run(values, *args, **kwargs)
        except OtherStateError:
            return NotImplemented
        for i in self._carried:
            if cells[i].value is not values[i]:
                raise written_meanwhile(self._slots[i])
        for address in self._noticing:
            address.note_write()
        for i, value in zip(self._written, written):  # noqa: B905 (that takes its time)
            cells[i].value = value
        return results

    def _try_large(
        self, cells: Sequence[Any], args: Any, kwargs: Any, is_recalled: bool = False
    ) -> Any:
        """The same where cells are large: what the call writes, it writes in the memory of what was
        there, or of a copy of it."""
        which = () if _jax.checks_results() else self._donated
        runs = self._runs_donating if which else self._runs
        try:
            with Donation(cells[: self._n_in], which, self._carried) as donation:
                done = donation.done
                try:
                    if is_recalled:
                        self._append_recalled(done, runs, donation.values, args, kwargs)
                    else:
                        append_result(done, partial(runs[-1], donation.values, *args, **kwargs))
                except Exception as error:
                    for i in donation.lost():
                        error.add_note(lost(self._slots[i]))
                    raise
                finally:
                    if done:
                        self._keep(cells, donation.before, done[0][1])
        except OtherStateError:
            return NotImplemented
        return done[0][0]

    def _keep(self, cells: Sequence[Any], before: Sequence[Any], written: Sequence[Any]) -> None:
        """Writes the cells, unless another one has written them meanwhile."""
        now = list(map(content, cells))
        changed = [self._slots[i] for i in self._carried if now[i] is not before[i]]
        for i, value in zip(self._written, written, strict=True):
            if isinstance(cells[i], Kept) and (not changed or now[i] is None):
                cells[i].make(value)
            elif not changed:
                cells[i].value = value
        if changed:
            raise written_meanwhile(changed[0])
        for address in self._noticing:
            address.note_write()

    def _try_recalled(self, holder: Any, memory: Any, args: Any, kwargs: Any) -> Any:
        """The same with what ``holder`` remembers, whose values are numbered."""
        numbers, now = memory.numbers, holder.numbered
        others: dict[int, Any] = {i: address.cell_here() for i, address in self._others}
        if None in others.values():
            return NotImplemented
        if self._has_large:
            cells = [holder.numbered_cell(n) for n in numbers]
            for i, cell in others.items():
                cells.insert(i, cell)
            results = self._try_large(cells, args, kwargs, is_recalled=True)
            if results is not NotImplemented:
                holder.recall(memory)
            return results
        values = [now[n] for n in numbers]
        for i, cell in others.items():
            values.insert(i, cell.value)
        del values[self._n_in :]
        done: list[Any] = []
        try:
            self._append_recalled(done, self._runs, values, args, kwargs)
        except OtherStateError:
            return NotImplemented
        results, written = done[0]
        for i in self._carried:
            value = others[i].value if i in others else now[numbers[self._ranks[i]]]
            if value is not values[i]:
                raise written_meanwhile(self._slots[i])
        holder.recall(memory)
        for address in self._noticing:
            address.note_write()
        for i, value in zip(self._written, written, strict=True):
            if i in others:
                others[i].value = value
            else:
                now[numbers[self._ranks[i]]] = value
        return results

    def _cells_here(self, found: dict[Any, Any]) -> list[Any]:
        """The cells; None for one that is not here, or not to be told from another."""
        cells: list[Any] = [address.cell_here() for address in self._slots]
        if self._aliases and len(set(map(id, cells))) < len(cells):
            return [None]
        if self._stay and None not in cells:
            found[self] = [weakref.ref(cell) for cell in cells]
        return cells

    def _holder(self) -> Any:
        """The holder of the slots that may be recalled, if there are any."""
        return self._recalled[0].known_holder() if self._recalled else None

    def _remember(self, holder: Any, place: Hashable) -> None:
        memory = holder.remembered(self._recalled)
        if memory is not None:
            if len(self._memories) >= 100:
                self._memories.clear()
            self._memories[place] = memory

    def __call__(self, jitted: _jax.Jitted, jaxpr: Any, args: Any, kwargs: Any) -> Any:
        captured, uses, _, _, _ = self._state
        holder = self._holder()
        place = None if holder is None else holder.place_here()
        self._renew(jitted)
        use = begin_use(())
        try:
            with watched():
                captures = read_as_stored(captured)
                settle(self._aliases, uses.results)
                slots = read_as_stored(uses.ins)
                run, values = self._with_copies(jitted, jaxpr, [*slots, *captures])
                outs, written = run(values, *args, **kwargs)
                write_all(uses.results, written)
        finally:
            end_use(use)
        if place is not None:
            self._remember(holder, place)
        return outs
