"""Where JAX calls functions of the program, and where it looks into its caches.

* A trace becomes current that was not before: the objects get a `Frame`, until it stops to be. That
  is all that is asked; which transformation it is does not matter.
* A function with a custom rule, or one that devices run, is called with its state as operands.
* A jitted function is called, or another function that JAX may have traced before: what the objects
  are is a part of the keys of the caches. (Functions of JAX itself do not see the objects, so their
  jaxprs and executables stay in use.)
* A jaxpr is bound whose state a rule reads and writes: the objects are looked at first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.arrays.boundaries import objects as objects_in_place
from jaxstate._src.core import registry, slots
from jaxstate._src.core.slots import Holder, signature_changed
from jaxstate._src.rules import jitted
from jaxstate._src.tree.copies import checked, note_arguments, note_result
from jaxstate._src.tree.frames import Frame
from jaxstate._src.tree.operands import (
    around_control_flow,
    as_operands,
    by_value,
    dispatched,
    result_of_trace,
)
from jaxstate._src.tree.session import Session, all_writable, is_object, publishes, sessions

_TRACES = (
    _jax.StagingTrace, _jax.BatchTrace, *_jax.DIFFERENTIATING, _jax.PartialTrace
)  # fmt: skip


# -- Traces ----------------------------------------------------------------------------------


def _enter(trace_: Any) -> list[Frame] | None:
    here = sessions()
    if not here or registry.in_bind() or not isinstance(trace_, _TRACES):
        return None
    if _jax.is_linear_part(trace_) or publishes.jax_only or _is_of_devices(trace_):
        return None
    new = [s for s in here if not _is_in(s, trace_) and not _is_below(s, trace_)]
    if not new:
        return None
    frames = [_begin(Frame(s, trace_)) for s in new]
    _publish_graphs(False)
    return frames


def _is_of_devices(trace_: Any) -> bool:
    """Whether a jaxpr is that of a shard_map: see `_function_inside`."""
    return isinstance(trace_, _jax.StagingTrace) and _jax.traced_for(trace_) == "shard_map"


def _is_in(session: Any, trace_: Any) -> bool:
    if any(f.trace is trace_ and f.rule is None for f in session.frames):
        return True
    return any(t is trace_ for t in session.base)


def _is_below(session: Session, trace_: Any) -> bool:
    """Whether JAX works out one operation of a trace that the objects are in, by its rule. Nothing
    of the program runs there, and nothing there may compute with the values of the objects, as
    classes do that compute their children."""
    around = list(_jax.chain(trace_))
    if not any(isinstance(t, _jax.PartialTrace) for t in around):
        return False
    inside = session.frames[-1].trace if session.frames else next(iter(session.base), None)
    return inside is not None and not any(t is inside for t in around)


def _begin(frame: Frame) -> Frame:
    frame.session.frames.append(frame)
    return frame


def _leave(frames: list[Frame], failed: bool) -> None:
    error: BaseException | None = None
    for frame in reversed(frames):
        frame.session.frames.remove(frame)
        try:
            frame.leave(failed or error is not None)
        except BaseException as e:
            error = e
    if error is not None:
        raise error


@contextmanager
def _function_inside(holder: Holder) -> Iterator[None]:
    """A function that is given its state by a holder: it has frames of its own."""
    with registry.out_of_bind():
        current = _jax.current_trace()
        frames = [_begin(Frame(s, current, holder)) for s in sessions()]
        failed = True
        try:
            yield
            failed = False
        finally:
            _leave(frames, failed)


# -- Caches ----------------------------------------------------------------------------------


class _around:
    """Around the tracing of a function, by which the caches know the objects, or need not."""

    __slots__ = ("before", "function", "jax_only")

    def __init__(self, function: Any) -> None:
        self.function = function
        self.jax_only = _jax.calls_no_user(function)

    def __enter__(self) -> None:
        self.before = publishes.graphs, publishes.jax_only, publishes.function
        publishes.jax_only, publishes.function = self.jax_only, self.function
        if not self.jax_only:
            refresh()
            _publish_graphs(True)
        elif publishes.graphs:
            _publish_graphs(False)

    def __exit__(self, *_: object) -> None:
        graphs, publishes.jax_only, publishes.function = self.before
        if graphs or publishes.graphs:
            _publish_graphs(graphs)


def _publish_graphs(yes: bool) -> None:
    """Whether the caches are to know the objects: where JAX looks for a function of the program."""
    if publishes.graphs or yes:
        publishes.graphs = yes
        signature_changed()


def refresh() -> None:
    for session in sessions():
        session.refresh()


def _before_rule() -> None:
    for session in sessions():
        session.renewed = None
        session.refresh()


def _around_tracing(fun: Any) -> Any:
    if not sessions() or registry.in_bind() or publishes.jax_only:
        return nullcontext()
    return _around(fun)


def _around_inference(infer: Any, call: _jax.Jitted, args: Any, kwargs: Any, use: _jax.Use) -> Any:
    if publishes.jax_only or registry.in_bind() or not sessions():
        return infer(call.fun, call.info, args, kwargs)
    if not publishes.graphs and _jax.calls_no_user(call.fun):  # what most calls are, in less time
        publishes.jax_only = True
        try:
            return infer(call.fun, call.info, args, kwargs)
        finally:
            publishes.jax_only = False
    with _around(call.fun):
        if not publishes.jax_only:
            if use != "call":
                with by_value(copies_for=call.fun if use == "trace" else None):
                    return infer(call.fun, call.info, args, kwargs)
            args, kwargs = _operands(call.info, args, kwargs)
        return infer(call.fun, call.info, args, kwargs)


def _operands(info: Any, args: Any, kwargs: Any) -> Any:
    """The operands of a jitted call, with objects of sessions by reference."""
    static = {i % len(args) for i in info.static_argnums} if args else set()
    given = as_operands(
        (
            tuple([None if i in static else x for i, x in enumerate(args)]),
            {k: x for k, x in kwargs.items() if k not in info.static_argnames},
        )
    )
    args = tuple([x if i in static else given[0][i] for i, x in enumerate(args)])
    return args, {**kwargs, **given[1]}


def _call(jitted_: _jax.Jitted, args: Any, kwargs: Any) -> Any:
    """A call of a jitted function at top level, of which JAX is to keep nothing: the objects may be
    others the next time, and JAX would not ask."""
    if not sessions() or _jax.calls_no_user(jitted_.fun):
        return NotImplemented
    with _around(jitted_.fun):
        args, kwargs = _operands(jitted_.info, args, kwargs)
        return dispatched(lambda: jitted.call_now(jitted_, args, kwargs))


def _result_of(kind: str, result: Any) -> Any:
    if not sessions() or publishes.jax_only or registry.in_bind():
        return result
    return result_of_trace(kind, result)


def _of_every_session(do: Any) -> Any:
    def of_every(*args: Any) -> None:
        for session in sessions():
            do(session, *args)

    return of_every


_jax.wrap_current_trace(_enter, _leave)
_jax.wrap_tracing(_around_tracing, _result_of)
_jax.wrap_copied_arguments(_of_every_session(note_arguments), _of_every_session(note_result))
_jax.wrap_callbacks(checked)
_jax.wrap_control_flow(around_control_flow)
_jax.wrap_checkpoint_operands(lambda x: as_operands(x) if sessions() else x)

_installing = threading.Lock()


@contextmanager
def hooks() -> Iterator[None]:
    """While there are objects of a session: what JAX and other parts of jaxstate ask."""
    _jax.OBJECTS.begin()
    try:
        with _installing:
            if _call not in jitted.first:
                _jax.around_inference(_around_inference)
                objects_in_place.is_object = staticmethod(is_object)
                objects_in_place.writable = staticmethod(all_writable)
                slots.around_functions.append(_function_inside)
                registry.before_rules.append(_before_rule)
                jitted.first.append(_call)
        yield
    finally:
        _jax.OBJECTS.end()
