"""Traces with state: they see every operation of a program, and carry a state from one to the next.

    class CountOps(StatefulTrace):
        def process_primitive(self, primitive, args, params):
            self.state["ops"] += 1
            return super().process_primitive(primitive, args, params)

    with new_trace(CountOps, state={"ops": jnp.int32(0)}) as trace:
        y = f(x)
    trace.state["ops"]

How an operation inside a jaxpr gets there:

* A stateful trace holds no values of its own. It is the current trace, so that every bind comes to
  it, and it binds again under its parent.
* A jit, a loop, a branch ... is not an operation but many. Its jaxprs are traced again, each under
  a copy of the stateful trace on top of the jaxpr builder. The copy takes the state from slots, and
  hands it back to them (`_Inside`); so the new jaxpr reads and writes slots, and the rules in
  `rules` discharge it like any other.
* A function with a custom derivative rule, or one of shard_map, is a Python function that JAX
  calls under some trace: there it runs under a copy on top of that trace, in the same way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax

from jaxstate._src import _jax
from jaxstate._src.core.boundaries import same_trace
from jaxstate._src.core.primitives import state_effect
from jaxstate._src.core.refs import Slot
from jaxstate._src.core.registry import has_rule
from jaxstate._src.core.uses import recaptured
from jaxstate._src.traces.retrace import (
    Processed,
    check_results,
    constants_in_slots,
    with_one_condition,
    without_unused_reads,
)
from jaxstate._src.traces.state import Entry, Shared, Spec, Static, check_hashable, is_array
from jaxstate.errors import TraceStateError, message

__all__ = ["StatefulTrace", "current_trace", "new_trace"]

T = TypeVar("T", bound="StatefulTrace[Any]")
if TYPE_CHECKING:  # a default is for Python 3.13 or later
    from typing_extensions import TypeVar as TypeVarWithDefault

    S = TypeVarWithDefault("S", default=Any)
else:
    S = TypeVar("S")

_CALLED_BY_JAX = (
    "process_primitive", "process_call", "process_custom_jvp_call", "process_custom_vjp_call",
    "process_shard_map",
)  # fmt: skip

# These run their one jaxpr exactly once: the state may come out with another structure.
_CALLS = (_jax.jit_p, _jax.remat_p, _jax.call_p)


class StatefulTrace(_jax.TransparentTrace, Generic[S]):
    """A trace that sees every operation and carries state: derive from it, and see `new_trace`.

    Override `process_primitive`. It is called once for every operation that runs, in program order,
    and runs itself where the operation would: what it computes with `jax.numpy` becomes part of the
    program, in a loop body as much as at top level. Like any function that JAX traces it runs once
    for an operation in a loop, or in a jitted function that is called again.

    Attributes:
      state: any tree. Its arrays are carried through every transformation; all else (numbers,
        strings, the structure) is static, and may change anywhere but across a loop or a branch.
      parent_trace: the `jax.core.Trace` outside of this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parent_trace = None
        # The state is in `_value` or, until somebody asks, in the slots of `_entry`. `_stored` is
        # what was last put into slots, or taken from them.
        self._value: Any = None
        self._entry: Entry | None = None
        self._stored: Entry | None = None
        self._shared = Shared()
        self._opened: weakref.ref[StatefulTrace] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _CALLED_BY_JAX:  # defined here, or in a class that is no trace
            method = getattr(cls, name)
            if not hasattr(method, "_runs_under_the_parent"):
                setattr(cls, name, _under_the_parent(method))

    @property
    def family(self) -> Any:
        return self._shared.family

    # -- What authors use and override -------------------------------------------------------

    @property
    def state(self) -> S:
        """The current state.

        Raises:
          TraceStateError: in a function that JAX is tracing or transforming, where the operations
            of this trace are still to come.
        """
        self._check_place()
        if self._entry is not None:
            self._value = self._entry.load()
            self._stored, self._entry = self._entry, None
        return self._value

    @state.setter
    def state(self, value: S) -> None:
        self._check_place()
        self._value, self._entry = value, None

    def process_primitive(self, primitive: Any, args: Any, params: Any, /) -> Any:
        """Runs one operation under the parent trace.

        Args:
          primitive: a `jax.extend.core.Primitive` that is not made of other operations, or one of
            those without a rule (`register_rule`), whose jaxprs are left alone.
          args: its operands: arrays, or tracers of the parent trace.
          params: its parameters, a dict.

        Returns:
          What ``primitive.bind`` returns: an array or, with ``primitive.multiple_results``, a list.

        Raises:
          TraceStateError: inside a loop or a branch, if a method that overrides this one returns
            values of other types there.
        """
        with _jax.set_current_trace(self.parent_trace):
            return primitive.bind(*args, **params)

    def process_higher_order(self, primitive: Any, args: Any, params: Any, /) -> Any:
        """Runs a jit, a loop, a branch ...: a primitive made of operations, each of which comes to
        `process_primitive`.

        Override it to treat one as a single operation, with ``primitive.bind(*args, **params)``.
        Arguments and result are those of `process_primitive`.
        """
        return self._through_jaxprs(primitive, args, params)

    # -- What JAX calls ----------------------------------------------------------------------

    def process_call(self, primitive: Any, fun: Any, args: Any, params: Any, /) -> Any:
        return self._through_functions(primitive, (fun,), args, params)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, args: Any, /, **params: Any
    ) -> Any:
        return self._through_functions(primitive, (fun, jvp), args, params)

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, args: Any, /, **params: Any
    ) -> Any:
        """The backward rule runs where the pullback is called: under the traces of that place."""
        return self._through_functions(primitive, (fun, fwd), args, params, kept=(bwd,))

    def process_shard_map(self, primitive: Any, fun: Any, args: Any, /, **params: Any) -> Any:
        with self._state_in_slots() as entry:
            inside = self._inside(primitive, entry.spec)

            def on_devices(*operands: Any) -> Any:
                return inside.run(fun, *operands)[0]

            return primitive.bind(*args, **params, subfuns=(on_devices,))

    # -- Jaxprs ------------------------------------------------------------------------------

    def _through_jaxprs(self, primitive: Any, args: Any, params: Any) -> Any:
        if primitive is _jax.while_p:
            args, params = with_one_condition(args, params)
        with self._state_in_slots() as entry:
            ends: list[Spec] = []
            slots: list[Slot] = []  # alive as long as the new jaxprs are

            def processed(jaxpr: Any) -> Any:
                done = self._processed(primitive, jaxpr, entry.spec)
                if primitive not in _CALLS:
                    check_results(primitive, jaxpr, done.jaxpr)
                ends.append(done.end)
                slots.extend(done.constants)
                return done.jaxpr

            params = _jax.with_jaxprs(params, processed)
            if primitive not in _CALLS and any(end != entry.spec for end in ends):
                raise _changed_structure(self, primitive, entry.spec, ends)
            if ends:
                entry.spec = ends[0]
            return primitive.bind(*args, **params)

    def _processed(self, primitive: Any, jaxpr: Any, start: Spec) -> Processed:
        """The jaxpr with this trace's operations in it, for a state that comes in as ``start``."""
        may_close = _jax.is_closed(jaxpr) and primitive is not _jax.remat_p
        self._forget_if_changed()
        known = self._shared.processed.setdefault(jaxpr, {})
        key = may_close, start, _jax.trace_context()
        done = known.get(key)
        if done is None:
            done = self._process(jaxpr, may_close, start)
            if not done.constants:  # else it is for the constants of this time
                known[key] = done
        return done

    def _forget_if_changed(self) -> None:
        """What was processed holds what the attributes were then, of the trace and of its classes.

        A list or dict is the same as long as it is the same object: tables of an author grow while
        a jaxpr is processed, and would each time make it be processed again.
        """
        before = self._shared.attributes
        now: dict[Any, Any] = {k: v for k, v in self.__dict__.items() if k not in _NOT_OF_AUTHORS}
        for cls in type(self).__mro__:
            if cls not in StatefulTrace.__mro__:
                now.update(((cls, name), value) for name, value in vars(cls).items())
        if now.keys() != before.keys() or any(now[k] is not before[k] for k in now):
            self._shared.processed.clear()
            self._shared.attributes = now

    def _process(self, jaxpr: Any, may_close: bool, start: Spec) -> Processed:
        inside = self._inside(None, start)
        end = start

        def run(*args: Any) -> list[Any]:
            nonlocal end
            outs, end = inside.run(_jax.eval_closed_jaxpr, _jax.close(jaxpr), *args)
            return [
                _jax.with_weak_type_of(aval, x)
                for aval, x in zip(_jax.out_avals(jaxpr), outs, strict=True)
            ]

        made = _jax.trace_flat(run, _jax.in_avals(jaxpr))
        made, constants = constants_in_slots(made, may_close)
        made = without_unused_reads(made)
        if not _jax.is_closed(jaxpr):
            made = _jax.opened(made)
        return Processed(made, end, constants)

    # -- Functions ---------------------------------------------------------------------------

    def _through_functions(
        self, primitive: Any, functions: tuple[Any, ...], args: Any, params: Any, kept: Any = ()
    ) -> Any:
        with self._state_in_slots() as entry:
            inside = self._inside(primitive, entry.spec)

            def on_top(fun: Any) -> Any:
                def replaced(*args: Any) -> Any:
                    _jax.reset_stores(fun)
                    return inside.run(fun.call_wrapped, *args)[0]

                return _jax.wrap_rule_function(fun, replaced)

            subfuns = (*map(on_top, functions), *kept)
            return primitive.bind(*args, **params, subfuns=subfuns)

    # -- The state ---------------------------------------------------------------------------

    def _check_place(self) -> None:
        current = _jax.current_trace()
        here = _jax.holding_trace(current)
        if self.parent_trace is None or same_trace(here, _jax.holding_trace(self)):
            return
        raise _used_elsewhere(self, here)

    @contextmanager
    def _state_in_slots(self) -> Iterator[Entry]:
        """For a while the state is in slots, where a new jaxpr or function finds it.

        It runs under the parent trace. If it fails, the state is as before.
        """
        with _jax.set_current_trace(self.parent_trace):
            entry = self._entry or Entry.store(self._shared, self._value, self._stored)
            start = entry.spec
            self._stored = None  # what the slots hold after an error is not known
            yield entry
            if entry.spec != start or entry.changed():
                self._value, self._entry = entry.load(), None
            self._stored = entry

    def _copy(self) -> StatefulTrace:
        """The same trace, in no place and with no state."""
        copy = self._twin()
        copy.__dict__ = dict(
            self.__dict__, parent_trace=None, _value=None, _entry=None, _stored=None
        )
        return copy

    def _twin(self) -> StatefulTrace:
        """Another object with the attributes of this one: what is set on one is set on both."""
        twin = object.__new__(type(self))
        _jax.TransparentTrace.__init__(twin)
        twin.__dict__ = self.__dict__
        return twin

    def _inside(self, primitive: Any, spec: Spec) -> _Inside:
        return _Inside(self._copy(), primitive, spec)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _under_the_parent(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as JAX calls it: with the parent as the current trace. (In JAX >= 0.11 none is.)

    What comes to ``process_primitive`` and is no operation goes to ``process_higher_order``.
    """
    takes_operations = method.__name__ == "process_primitive"

    @functools.wraps(method)
    def called(self: StatefulTrace, primitive: Any, /, *args: Any, **params: Any) -> Any:
        with _jax.set_current_trace(self.parent_trace):
            if takes_operations and has_rule(primitive):
                return self.process_higher_order(primitive, *_with_captures(*args))
            out = method(self, primitive, *args, **params)
            if out is None:
                raise _returns_nothing(self, method.__name__, primitive)
            if takes_operations:
                several = primitive.multiple_results
                if is_array(out) if several else type(out) in (list, tuple):
                    raise _returns_another_number(self, primitive)
            return out

    called._runs_under_the_parent = True  # type: ignore[attr-defined]
    return called


def _used_elsewhere(trace: StatefulTrace, here: Any) -> Exception:
    return TraceStateError(
        message(
            f"The state of a {type(trace).__name__} was used inside a function that JAX is"
            f" transforming (a {type(here).__name__} is current). The operations of that"
            " function reach the trace when it runs, and only then is its state known.",
            fix="""
            def process_primitive(self, primitive, args, params):
                ...                     # use self.state here, or outside of the function
            slot = new_slot(value)      # or keep that part in a slot: read(slot), write(...)
            """,
            used=_jax.user_location(),
        )
    )


def _returns_nothing(trace: StatefulTrace, method: str, primitive: Any) -> Exception:
    return TraceStateError(
        message(
            f"{type(trace).__name__}.{method} returned None for {primitive.name}: what it returns"
            " is the result of the operation.",
            fix="""
            return super().process_primitive(primitive, args, params)
            """,
            used=_jax.user_location(),
        )
    )


def _returns_another_number(trace: StatefulTrace, primitive: Any) -> Exception:
    several = primitive.multiple_results
    wanted = "a list of arrays" if several else "one array"
    return TraceStateError(
        message(
            f"{type(trace).__name__}.process_primitive returned"
            f" {'one array' if several else 'a list'} for {primitive.name}, whose result is"
            f" {wanted}: primitive.multiple_results is {several}.",
            fix="""
            out = super().process_primitive(primitive, args, params)
            outs = out if primitive.multiple_results else [out]
            return outs if primitive.multiple_results else outs[0]
            """,
            used=_jax.user_location(),
        )
    )


def _with_captures(args: Any, params: Any) -> tuple[Any, Any]:
    """The rule of a loop has to know which operands are slots that the loop writes."""
    has_state = any(state_effect in jaxpr.effects for jaxpr in _jax.jaxprs_in(params))
    return (recaptured(args) if has_state else args), params


class _Inside(NamedTuple):
    """What a function inside a higher-order primitive needs to run under the trace.

    It may run much later, and holds no values.

    Attributes:
      primitive: None for a function that may leave a state of another structure.
      form: of the state that comes in through slots.
    """

    trace: StatefulTrace
    primitive: Any
    spec: Spec

    def run(self, fun: Callable[..., Any], *args: Any) -> tuple[Any, Spec]:
        """Runs ``fun`` under a copy of the trace on top of the trace that is current, and hands the
        state that it leaves back to the slots. Returns the form of that too."""
        copy = self.trace._copy()
        copy.parent_trace = _jax.current_trace()
        before = copy._entry = Entry(copy._shared, self.spec)
        attributes = dict(copy.__dict__)
        try:
            with _jax.set_current_trace(copy):
                out = fun(*args)
            _check_attributes(copy, attributes)
            if copy._entry is before:  # nobody has asked
                return out, self.spec
            after = copy._entry or Entry.store(copy._shared, copy._value, copy._stored)
        finally:
            copy.__dict__ = {}  # JAX may keep it, as the parent of a trace of a derivative rule
        if self.primitive is not None and after.spec != self.spec:
            raise _changed_structure(self.trace, self.primitive, self.spec, [after.spec])
        return out, after.spec


def _check_attributes(copy: StatefulTrace, before: dict[str, Any]) -> None:
    """The attributes of a copy are gone when it has run: only the state goes on."""
    for name, value in copy.__dict__.items():
        if name not in _OWN_ATTRIBUTES and before.get(name, copy) is not value:
            raise TraceStateError(
                message(
                    f"{type(copy).__name__}.{name} was assigned while the trace was inside a jitted"
                    " function, a loop, a branch or a custom rule. That is not seen outside: only"
                    " the state is carried on.",
                    fix=f"""
                    self.state = dict(self.state, {name}=...)     # what a program computes
                    self.table.append(...)      # or a list or dict, for what is known at trace time
                    """,
                    used=_jax.user_location(),
                )
            )


_OWN_ATTRIBUTES = frozenset({"parent_trace", "_value", "_entry", "_stored"})
_NOT_OF_AUTHORS = _OWN_ATTRIBUTES | {"_shared", "_opened"}


def _changed_structure(trace: Any, primitive: Any, start: Spec, ends: list[Spec]) -> Exception:
    end = next(end for end in ends if end != start)
    return TraceStateError(
        message(
            f"The state of a {type(trace).__name__} is {start} before a {primitive.name} and {end}"
            " after it. Its structure, its static parts and the types of its arrays may change"
            " across a jitted function, not across a loop, a branch or a custom rule.",
            fix="""
            with new_trace(cls, state={"ops": jnp.int32(0)}):     # arrays, of types that stay
                ...
            """,
            used=_jax.user_location(),
        )
    )


# -- Opening ---------------------------------------------------------------------------------


@contextmanager
def new_trace(cls: type[T], *args: Any, state: Any = None, **kwargs: Any) -> Iterator[T]:
    """Opens a trace for the code inside the ``with`` block, and all it calls.

    Args:
      cls: a subclass of `StatefulTrace`.
      *args, **kwargs: for ``cls``.
      state: the state to start with: any tree.

    Yields:
      The trace. After the block ``trace.state`` is the state that the block left.

    Raises:
      TypeError: if ``cls`` is no subclass of `StatefulTrace`, or a static part of ``state`` has no
        hash.
      TraceStateError: if a loop, a branch or a custom rule inside changes the structure of the
        state, or the type of one of its arrays.

    >>> import jax, jax.numpy as jnp
    >>> from jaxstate.extend import StatefulTrace, new_trace
    >>> class CountOps(StatefulTrace):
    ...     def process_primitive(self, primitive, args, params):
    ...         self.state["ops"] += 1
    ...         return super().process_primitive(primitive, args, params)
    >>> def f(x):
    ...     return jax.lax.fori_loop(0, 10, lambda i, x: jnp.sin(x) * 2.0, x)
    >>> with new_trace(CountOps, state={"ops": jnp.int32(0)}) as trace:
    ...     y = jax.jit(f)(1.0)
    >>> int(trace.state["ops"])     # sin, mul and the addition to the loop's counter
    30
    """
    if not (isinstance(cls, type) and issubclass(cls, StatefulTrace)):
        raise TypeError(f"new_trace wants a subclass of StatefulTrace, and was given {cls!r}.")
    trace = cls(*args, **kwargs)
    if "_shared" not in trace.__dict__:
        raise TraceStateError(
            message(
                f"{cls.__name__}.__init__ does not call that of StatefulTrace.",
                fix="""
                def __init__(self, ...):
                    super().__init__()
                """,
                used=_jax.user_location(),
            )
        )
    trace.parent_trace = _jax.current_trace()
    trace._shared.place = _jax.holding_trace(trace)
    trace.state = jax.tree.map(lambda x: x, state)  # containers of its own
    check_hashable(tuple(Static(x) for x in jax.tree.leaves(state) if not is_array(x)))
    # JAX keeps whatever was current when it traced a derivative rule. It gets a twin, which has
    # nothing when this is over; the state stays with the caller's object.
    twin = trace._twin()
    trace._opened = weakref.ref(trace)
    try:
        with _jax.set_current_trace(twin):
            yield trace
    finally:
        trace.parent_trace = None
        trace._shared.close()
        twin.__dict__ = {}


def current_trace(cls: type[T] = StatefulTrace) -> T | None:
    """The innermost open trace of a class around this code.

    Args:
      cls: a subclass of `StatefulTrace`; subclasses of it count too.

    Returns:
      The trace that `new_trace` has given, or None. In a function that JAX is tracing, it is the
      trace that the operations of the function will come to; its ``state`` is not at hand there.

    >>> from jaxstate.extend import StatefulTrace, current_trace, new_trace
    >>> class Idle(StatefulTrace):
    ...     pass
    >>> with new_trace(Idle) as trace:
    ...     current_trace(Idle) is trace
    True
    >>> current_trace(Idle) is None
    True
    """
    for trace in _jax.chain(_jax.current_trace()):
        if isinstance(trace, cls):
            opened = trace._opened and trace._opened()
            return opened if isinstance(opened, cls) else trace
    return None
