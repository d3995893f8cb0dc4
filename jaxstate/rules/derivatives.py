"""custom_jvp and custom_vjp: a function and its rules are given their state as operands.

The function and its derivative rules are Python functions that JAX calls when it likes, perhaps
much later, when the streams and parameters of this moment are gone. So the state that the function
uses becomes explicit where it is called:

1. Call the primitive with the function *recording*: every slot it touches is noted. If it touches
   none (nearly always), that was the call. (Where the call would compute something, the function
   is traced first and the jaxpr thrown away, so that no effect of it happens twice. Functions of
   JAX itself have none, and `jax.nn.relu` and the like, in which every network spends its time,
   need no recording.)
2. Otherwise read those slots here, and call the primitive again with their values as further
   operands, and what the function writes as further outputs. Function and rules find the state in
   a holder that answers from the operands they are given.

The user's rule says nothing about the state, so it cannot be differentiated with respect to it:
JAX refuses the same of values that such a function closes over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxstate import _compat, slots
from jaxstate.errors import CustomRuleStateError, message
from jaxstate.slots import Address, Cell, Holder
from jaxstate.thread import read_all, settle, write_last
from jaxstate.trace import boundaries, one_use, read


class _RuleState(Holder):
    """The state of a function with a custom rule, seen from inside.

    Attributes:
      outside: the trace under which the function is called.
      below: the holders that were open there.
      families: of the transparent traces around the code inside. Its operations come to these as
        they run, so their slots are no state of the function.
      around: the holders that were open where the code inside runs, which may be elsewhere.
    """

    is_boundary = True
    families: tuple[Any, ...] = ()
    around: tuple[Holder, ...] = ()

    def __init__(self, outside: Any, below: Sequence[Holder]) -> None:
        super().__init__()
        self.outside = outside
        self.below = list(below)
        self.cells: dict[Address, Cell] = {}

    def knows(self, address: Address) -> bool:
        if address.own_holder is not None:
            owner = address.own_holder()
            if owner is None:
                return True
            return owner.age < self.age and owner.family not in self.families
        return any(holder.knows(address) for holder in reversed(self.below))

    def aval(self, address: Address) -> Any:
        # Asked where a jaxpr inside of the function is built: only the holder outside knows all
        # levels on the way to its slot, and to ask for the type is not to use the slot.
        return self._policy(address).aval(address)

    def passed_on(self, address: Address) -> Holder | None:
        owner = address.own_holder and address.own_holder()
        if owner is None or owner.family not in self.families:
            return None
        for holder in reversed(self.around):
            found = holder if holder.knows(address) else holder.passed_on(address)
            if found is not None:
                return found
        return owner

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> Any:
        return self._policy(address).lane(address, trace, notes)

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return self._policy(address).refuse_lanes(address, trace)

    def differs_by_device(self, address: Address) -> bool:
        return self._policy(address).differs_by_device(address)

    def device_cell(self, address: Address, *place: Any) -> Cell:
        return self._policy(address).device_cell(address, *place)

    def without_values(self) -> _RuleState:
        return _Given(None, without_values(self.below), {})

    def _policy(self, address: Address) -> Holder:
        owner = address.own_holder and address.own_holder()
        if owner is not None:
            return owner
        for holder in reversed(self.below):
            if holder.knows(address):
                return holder
        raise address.missing()

    @contextmanager
    def entered(self) -> Iterator[None]:
        before = self.families, self.around
        current = _compat.current_trace()
        self.anchor = _compat.holding_trace(current)
        self.families = _families_of(current)
        self.around = tuple(slots.stack()) if self.families else ()
        try:
            with slots.only_open([*self.below, self]):
                yield
        finally:
            self.anchor = None
            self.families, self.around = before


def _families_of(trace: Any) -> tuple[Any, ...]:
    traces = (t for t in _compat.chain(trace) if isinstance(t, _compat.TransparentTrace))
    return tuple(t.family for t in traces if t.family is not None)


class _Touched(Exception):
    """Ends the recording call of a function that touched state.

    Recordings nest where one trace passes a call on to the next: ``recording`` is whose this is.
    """

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording


class _RecordedCell(Cell):
    """Reads its value when it is asked for it, and notes what happens to it."""

    __slots__ = ("_value", "_value_outside", "was_read", "was_written")

    def __init__(self, value_outside: Callable[[], Any]) -> None:
        self._value_outside = value_outside
        self.was_read = self.was_written = False

    @property
    def value(self) -> Any:  # type: ignore[override]
        if not (self.was_read or self.was_written):
            self.read()
        return self._value

    def read(self) -> None:
        self._value, self.was_read = self._value_outside(), True

    @value.setter
    def value(self, value: Any) -> None:
        self._value, self.was_written = value, True

    def forget(self) -> None:
        """Keeps what happened, and not the value, which may be of a trace that ends."""
        self._value = None


class _Recording(_RuleState):
    """Notes which slots a function touches, and answers with their values outside.

    Attributes:
      traces_first: whether a function that would compute something is only traced at first.
    """

    def __init__(self, outside: Any, traces_first: bool) -> None:
        super().__init__(outside, slots.stack())
        self.traces_first = traces_first
        self.cells: dict[Address, _RecordedCell] = {}
        self.over = False

    def finish(self) -> None:
        """From now on the function runs, if it does, as a rule of an equation: keep no values."""
        self.over = True
        self.outside = None
        self.below = [holder.remains() for holder in self.below]
        self.extra = {}
        self.cells = {}

    def aval(self, address: Address) -> Any:
        if self.over:
            raise _rule_touches_more(address)
        return super().aval(address)

    def cell(self, address: Address) -> Cell:
        if self.over:
            raise _rule_touches_more(address)
        key = address.seen_from(self)
        if key not in self.cells:
            self.cells[key] = _RecordedCell(functools.partial(self._read, key))
            if not key.given_if_read:
                self.cells[key].read()
        return self.cells[key]

    def _read(self, key: Address) -> Any:
        with slots.only_open(self.below), _compat.set_current_trace(self.outside):
            # A rule runs under a trace further out than the function; it finds primals there.
            return _compat.without_tangents(_compat.canonicalize(read(key)))

    def touched(self) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
        """The slots whose value the function is to be given, and those that it wrote."""
        given = tuple(a for a, cell in self.cells.items() if cell.was_read)
        return given, tuple(a for a, cell in self.cells.items() if cell.was_written)

    def recording(self, fun: Any) -> Any:
        def call(*args: Any) -> Any:
            _compat.reset_stores(fun)
            with self.entered():
                return _compat.map_results(_compat.resolved, fun.call_wrapped(*args))

        def recorded(*args: Any) -> Any:
            if self.traces_first and not self.over and not _compat.builds_jaxpr(self.outside):
                self._trace(call, args)
            out = call(*args)
            self._end_if_touched()
            return out

        return _compat.wrap_rule_function(fun, recorded)

    def _trace(self, call: Callable[..., Any], args: Sequence[Any]) -> None:
        def traced(*args: Any) -> None:
            call(*args)
            for cell in self.cells.values():
                cell.forget()

        try:
            _compat.trace_and_forget(traced, args)
        except _Touched:  # of a recording around this one
            raise
        except Exception:  # Python looks at values (or it is an error): the call itself will tell
            self.cells.clear()
        self._end_if_touched()
        self.extra.clear()

    def _end_if_touched(self) -> None:
        if self.cells and not self.over:
            _compat.abandon_traces_inside(self.outside)
            raise _Touched(self)


class _Given(_RuleState):
    """Answers from operands.

    Attributes:
      written: slots that may be written without having been given.
    """

    def __init__(
        self,
        outside: Any,
        below: Sequence[Holder],
        cells: dict[Address, Cell],
        written: Sequence[Address] = (),
    ) -> None:
        super().__init__(outside, below)
        self.cells = cells
        self.written = written

    def aval(self, address: Address) -> Any:
        for boundary in boundaries(self):
            address = address.seen_from(boundary)
        return _compat.typeof(self.cell(address).value)

    def cell(self, address: Address) -> Cell:
        key = address.seen_from(self)
        if key not in self.cells and key not in self.written:
            raise _rule_touches_more(address)
        return self.cells.setdefault(key, _UnreadCell(address))


class _UnreadCell(Cell):
    """The cell of a slot that the function writes and does not read, so that nobody gives it."""

    __slots__ = ("_address", "_value")

    def __init__(self, address: Address) -> None:
        self._address = address

    @property
    def value(self) -> Any:  # type: ignore[override]
        if not hasattr(self, "_value"):
            raise _rule_touches_more(self._address)
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value = value


def without_values(holders: Sequence[Holder]) -> list[Holder]:
    return [holder.without_values() for holder in holders]


def _rule_touches_more(address: Address) -> Exception:
    return CustomRuleStateError(
        message(
            f"A custom derivative rule uses {address}, and the function it belongs to does not:"
            " the rule may run much later, and its state has to be known when the function is"
            " called.",
            fix="""
            @jax.custom_jvp
            def f(x, key): ...               # use the state before the call, pass it in
            f(x, jaxstate.next_key())
            """,
            used=_compat.user_location(),
        )
    )


def _rule_touches_less(address: Address) -> Exception:
    return CustomRuleStateError(
        message(
            f"A function with a custom derivative rule makes {address}, and the rule does not.",
            fix="""
            def fwd(x):
                return f(x), x          # the rule calls the function, or sows the same names
            """,
            used=_compat.user_location(),
        )
    )


def _backward_writes(address: Address) -> Exception:
    return CustomRuleStateError(
        message(
            f"The backward rule of a custom_vjp writes {address} (a draw writes the count of its"
            " stream). It runs when the pullback is called, any number of times, and cannot hand"
            " on state.",
            fix="""
            def fwd(x): return f(x), jaxstate.next_key()      # draw in the forward rule,
            def bwd(key, ct): ...                             # pass the key as a residual
            """,
            used=_compat.user_location(),
        )
    )


class _Explicit:
    """A function and its rules with their state as leading operands and trailing outputs."""

    def __init__(self, touched: Sequence[Address], written: Sequence[Address]) -> None:
        self.touched = touched
        self.written = written
        self.n = len(touched)
        self.age = slots.next_age()
        # The holders of this moment, for names only: a rule may run after they are closed.
        self.below = without_values(slots.stack())

    def run(
        self, fun: Any, values: Sequence[Any], *args: Any
    ) -> tuple[list[Any], dict[Address, Cell]]:
        """The outputs of ``fun``, and the cells that it leaves."""
        # In an in-place function the operands are arrays that the function itself could write.
        before = dict(zip(self.touched, map(_compat.canonicalize, values), strict=True))
        cells = {a: Cell(v) for a, v in before.items()}
        state = _Given(None, self.below, cells, self.written)
        state.age = self.age  # so that the arguments are arrays made inside
        _compat.reset_stores(fun)
        with state.entered():
            # A result may stand for a slot, and so for what is in its cell now.
            out = _compat.map_results(_compat.resolved, fun.call_wrapped(*args))
        for address, cell in cells.items():
            if address not in self.written and cell.value is not before[address]:
                raise _rule_touches_more(address)
        return out, cells

    def results(self, cells: dict[Address, Cell]) -> list[Any]:
        """What is left in the written slots."""
        for address in self.written:
            if address not in cells:
                raise _rule_touches_less(address)
        return [cells[a].value for a in self.written]

    def function(self, fun: Any) -> Any:
        def explicit(*args: Any) -> list[Any]:
            out, cells = self.run(fun, args[: self.n], *args[self.n :])
            return [*out, *self.results(cells)]

        return _compat.wrap_rule_function(fun, explicit)

    def jvp(self, jvp: Any, symbolic_zeros: bool) -> Any:
        """``(state, primals, state tangents, tangents)`` to primals and tangents with state."""

        def explicit(*args: Any) -> list[Any]:
            half = len(args) // 2
            primals, tangents = args[:half], args[half:]
            nonzero = [not isinstance(t, _compat.SymbolicZero) for t in tangents[: self.n]]
            self.refuse_derivatives(primals[: self.n], nonzero)
            given = tangents[self.n :]
            if not symbolic_zeros:
                given = [_compat.instantiate_symbolic_zero(t) for t in given]
            out, cells = self.run(jvp, primals[: self.n], *primals[self.n :], *given)
            written = self.results(cells)
            n_out = len(out) // 2
            zeros = [_compat.symbolic_zero_like(w) for w in written]
            return [*out[:n_out], *written, *out[n_out:], *zeros]

        return _compat.wrap_rule_function(jvp, explicit)

    def fwd(self, fwd: Any) -> Any:
        """``fwd`` takes (value, is it differentiated) for every operand, in turns."""

        def explicit(*args: Any) -> list[Any]:
            state, rest = args[: 2 * self.n], args[2 * self.n :]
            self.refuse_derivatives(state[::2], state[1::2])
            out, cells = self.run(fwd, state[::2], *rest)
            return [*out, *self.results(cells)]

        return _compat.wrap_rule_function(fwd, explicit)

    def out_trees(self, out_trees: Callable[[], Any]) -> Callable[[], Any]:
        """The state goes to ``bwd`` as residuals, which are operands passed on."""

        def explicit() -> Any:
            out_tree, res_tree, forwarded = out_trees()
            forwarded = [f if f is None else f + self.n for f in forwarded]
            res_tree = _compat.tree_with_leaves(res_tree, self.n)
            return out_tree, res_tree, [*forwarded, *range(self.n)]

        return explicit

    def bwd(self, bwd: Any, out_trees: Callable[[], Any]) -> Any:
        """(residuals, state, cotangents, cotangents of the written) to cotangents."""

        def explicit(*args: Any) -> Any:
            n_res = out_trees()[1].num_leaves
            residuals, state, cts = (
                args[:n_res],
                args[n_res : n_res + self.n],
                args[n_res + self.n : len(args) - len(self.written)],
            )
            out, cells = self.run(bwd, state, *residuals, *cts)
            before = dict(zip(self.touched, state, strict=True))
            for address in self.written:
                if address in cells and cells[address].value is not before.get(address):
                    raise _backward_writes(address)
            zeros = [_compat.zero_cotangent(_compat.typeof(s)) for s in state]
            return _compat.prepend_cotangents(zeros, out)

        return _compat.wrap_rule_function(bwd, explicit)

    def refuse_derivatives(self, values: Sequence[Any], nonzero: Sequence[bool]) -> None:
        for address, value, differentiated in zip(self.touched, values, nonzero, strict=True):
            if differentiated and _compat.has_tangent(_compat.typeof(value)):
                raise CustomRuleStateError(
                    message(
                        f"A function with a custom derivative rule uses {address}, and is"
                        " differentiated with respect to it. The rule says nothing about that"
                        " derivative.",
                        fix="""
                        @jax.custom_vjp
                        def f(x, w): ...                  # make it an argument, extend the rule
                        f(x, jaxstate.param("w", ...))
                        """,
                        used=_compat.user_location(),
                    )
                )


def _stateful(
    explicit_params: Callable[[_Explicit, dict[str, Any]], dict[str, Any]],
    left: Callable[[Any, Any], Any] = lambda trace, value: value,
) -> Any:
    """The bind of a primitive with rules: record, and call again with the state as operands.

    ``left(trace, value)`` is what is written of a value that the function leaves in a slot.
    """

    def wrap(bind: Callable[..., Any]) -> Callable[..., Any]:
        def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
            if not slots.any_open() or _compat.is_rule_of_activation(params["subfuns"][1]):
                return bind(trace, args, avals, params)
            if _compat.calls_functions(trace) or isinstance(trace, _compat.TransparentTrace):
                # A vmap around puts its own trace over the current one; the latter binds again.
                with _compat.set_current_trace(trace):
                    return bind(trace, args, avals, params)
            state = _Recording(trace, not _compat.is_of_jax(params["subfuns"][0]))
            functions = tuple(state.recording(f) for f in params["subfuns"])
            try:
                # Code in the function looks for the way to where an array was made.
                with _compat.set_current_trace(trace):
                    return bind(trace, args, avals, dict(params, subfuns=functions))
            except _Touched as ended:
                if ended.recording is not state:
                    raise
                touched, written = state.touched()
            finally:
                state.finish()
            with one_use(), _compat.set_current_trace(trace):
                settle(touched, written)
                values = read_all(touched)
                explicit = _Explicit(touched, written)
                operands = [*values, *args]
                out = bind(
                    trace, operands, [_compat.typeof(x) for x in operands],
                    explicit_params(explicit, params),
                )  # fmt: skip
                n = len(out) - len(written)
                return write_last(written, [*out[:n], *(left(trace, x) for x in out[n:])])

        return bind_with_trace

    return wrap


def _jvp_params(explicit: _Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, jvp = params["subfuns"]
    functions = explicit.function(fun), explicit.jvp(jvp, params["symbolic_zeros"])
    return dict(params, subfuns=functions, symbolic_zeros=True)


def _vjp_params(explicit: _Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, fwd, bwd = params["subfuns"]
    out_trees = params["out_trees"]
    functions = explicit.function(fun), explicit.fwd(fwd), explicit.bwd(bwd, out_trees)
    return dict(params, subfuns=functions, out_trees=explicit.out_trees(out_trees))


_compat.wrap_bind_with_trace(_compat.custom_jvp_call_p, _stateful(_jvp_params))
# A backward rule says nothing of what is written: it does not depend on the operands. For JAX all
# results do.
_compat.wrap_bind_with_trace(
    _compat.custom_vjp_call_p, _stateful(_vjp_params, _compat.without_tangent_of)
)
