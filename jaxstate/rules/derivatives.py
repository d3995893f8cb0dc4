"""custom_jvp and custom_vjp: a function and its rules find the state of the place they are called.

The function and its derivative rules are Python functions that JAX calls when it likes: at once, or
much later, when the streams and parameters of this moment are gone.

1. Bind the primitive. A function that JAX calls at once (a forward rule under a derivative, the
   function under a vmap) uses the slots outside as any other code does. What it has read of them
   goes to the backward rule as further residuals.
2. Where JAX builds a jaxpr of the function it is *recorded*: every slot it touches is noted. If it
   touches none (nearly always), that was the call. Otherwise read those slots here, and bind the
   primitive again with their values as further operands, and what the function writes as further
   outputs. Function and rules find the state in a holder that answers from the operands.

So Python runs twice only where a jaxpr is built, and only if the function uses state.

The user's rule says nothing about the state, so it cannot be differentiated with respect to it:
JAX refuses the same of values that such a function closes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxstate import _jax
from jaxstate.core import slots
from jaxstate.core.contents import settle
from jaxstate.core.discharge import read_all, write_last
from jaxstate.core.resolve import boundaries, read, read_since, same_trace, write
from jaxstate.core.slots import Address, Cell, Holder
from jaxstate.core.uses import one_use
from jaxstate.errors import CustomRuleStateError, message


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
        if address.in_objects:
            return False  # the objects hold what this holder gave them
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
        return Given(None, without_values(self.below), {})

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
        current = _jax.current_trace()
        self.anchor = _jax.holding_trace(current)
        self.families = _families_of(current)
        self.around = tuple(slots.stack()) if self.families else ()
        try:
            with slots.only_open([*self.below, self]), slots.function_inside(self):
                yield
        finally:
            self.anchor = None
            self.families, self.around = before


def _families_of(trace: Any) -> tuple[Any, ...]:
    traces = (t for t in _jax.chain(trace) if isinstance(t, _jax.TransparentTrace))
    return tuple(t.family for t in traces if t.family is not None)


class _Touched(Exception):
    """Ends the call of a function of which JAX builds a jaxpr, and that touched state.

    Calls nest where one trace passes a call on to the next: ``calls`` is whose this is.
    """

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls


class _SlotOutside(Cell):
    """The cell of a slot in a function that runs at once: the slot itself."""

    __slots__ = ("_calls", "_key")

    def __init__(self, calls: _Calls, key: Address) -> None:
        self._calls = calls
        self._key = key

    @property
    def value(self) -> Any:  # type: ignore[override]
        return self._calls.read_at_once(self._key)

    @value.setter
    def value(self, value: Any) -> None:
        self._calls.write_at_once(self._key, value)


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


class _Calls(_RuleState):
    """The calls that JAX makes of a function and its rules while it binds them.

    What runs at once uses the slots outside. If JAX builds a jaxpr, it is noted which slots the
    function touches, and the call ends.

    Attributes:
      use: what this call makes of what is made in the function.
      given: what a function that runs at once reads before it writes.
      written: what it writes.
      over: whether the bind is over. What runs then is a rule of an equation, much later.
      operands: of the bind.
    """

    def __init__(self, outside: Any, operands: Sequence[Any]) -> None:
        super().__init__(outside, slots.stack())
        self.operands = list(operands)
        self._arguments: Sequence[Any] = ()  # of the function that runs
        self._operand_of: Callable[[int], int] = lambda i: i  # the operand of an argument
        self._captured: dict[int, tuple[Address, int]] = {}
        self.use: dict[Any, Any] = {}
        self.given: dict[Address, Any] = {}
        self.written: set[Address] = set()
        self.over = False

    def finish(self) -> None:
        """From now on the function runs, if it does, as a rule of an equation: keep no values."""
        self.over = True
        self.outside = None
        self.below = [holder.remains() for holder in self.below]
        self.extra = {}
        self.cells = {}
        self.use = {}
        self.given = dict.fromkeys(self.given)
        self.operands = []
        self._arguments = ()

    def aval(self, address: Address) -> Any:
        if self.over:
            raise rule_touches_more(address)
        return super().aval(address)

    def cell(self, address: Address) -> Cell:
        if self.over:
            raise rule_touches_more(address)
        key = address.seen_from(self)
        if key not in self.cells:
            self.cells[key] = self._new_cell(key)
        return self.cells[key]

    def _new_cell(self, key: Address) -> Cell:
        if not self._is_traced():
            return _SlotOutside(self, key)
        cell = _RecordedCell(lambda: _jax.without_tangents(self._read(key)))
        if not key.given_if_read:
            cell.read()
        return cell

    def _is_traced(self) -> bool:
        """Whether JAX builds a jaxpr of the function, which may run later and more than once."""
        return _jax.builds_jaxpr(self.outside, self.anchor)

    def captured(self, address: Address, value: Any, version: int) -> Any:
        is_current = address.version() == version
        if not is_current and self._has_written(address):
            return self.cell(address).value
        if self.over:
            return value  # what the function was given was refreshed
        traced = self._is_traced()
        if not traced and is_current:
            with slots.only_open(self.below):
                return read_since(address, value, version)
        arguments = enumerate(map(_jax.resolved, self._arguments))
        primal = _jax.primal_of(value)
        at = next((i for i, x in arguments if _jax.is_same(x, primal)), None)
        if at is None and is_current and not _jax.may_run_again(self.outside):
            return value  # made of an argument, and nothing that comes later runs before this
        if at is None or (self.cells and not traced):
            return self.cell(address).value
        self._captured[self._operand_of(at)] = address.seen_from(self), version
        if not traced and self.refresh():
            raise _Touched(self)
        return value

    def _has_written(self, address: Address) -> bool:
        key = address.seen_from(self)
        cell = self.cells.get(key)
        return key in self.written or (isinstance(cell, _RecordedCell) and cell.was_written)

    def refresh(self) -> bool:
        """Makes captures among the operands what they are outside now; whether any was not."""
        stale = False
        for i, (key, version) in self._captured.items():
            with self._outside():
                value = read_since(key.renewed(self.use), self.operands[i], version)
            stale |= not _jax.is_same(value, self.operands[i])
            self.operands[i] = value
        return stale

    @contextmanager
    def _outside(self) -> Iterator[None]:
        with slots.only_open(self.below), _jax.set_current_trace(self.outside):
            yield

    def _read(self, key: Address) -> Any:
        with self._outside():
            return _jax.canonicalize(read(key.renewed(self.use)))

    def read_at_once(self, key: Address) -> Any:
        """The value as the function sees it: a rule runs under a trace further out."""

        def refuse() -> None:
            raise _differentiates_state(key)

        traces = list(_jax.chain(self.anchor))
        value = _jax.without_tangents(
            self._read(key),
            lambda trace: any(same_trace(trace, t) for t in traces),
            refuse,
        )
        if key not in self.written:
            self.given.setdefault(key, value)
        return value

    def write_at_once(self, key: Address, value: Any) -> None:
        known = _jax.known_part(value)
        if known is None:
            raise _rule_writes_tangent(key)
        self.written.add(key)
        with self._outside():
            write(key.renewed(self.use), known)

    def touched(self) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
        """The slots whose value the function is to be given, and those that it wrote."""
        cells = [(a, c) for a, c in self.cells.items() if isinstance(c, _RecordedCell)]
        given = tuple(address for address, cell in cells if cell.was_read)
        return given, tuple(address for address, cell in cells if cell.was_written)

    def function(self, fun: Any, operand_of: Callable[[int], int] = lambda i: i) -> Any:
        """The function, or its rule; not the backward rule.

        ``operand_of(i)`` is the operand of which its argument ``i`` is made.
        """

        def call(*args: Any) -> Any:
            with self.entered():
                self._arguments, self._operand_of = args, operand_of
                out = _run(fun, args)
                self._arguments = ()
                is_traced = not self.over and self._is_traced()
                is_refreshed = is_traced and self.refresh()
            if is_traced and (is_refreshed or self.cells):  # (objects are compared at the end)
                _jax.abandon_traces_inside(self.outside)
                raise _Touched(self)
            return out

        return _jax.wrap_rule_function(fun, call)

    # What a forward rule that ran at once has read goes to the backward rule as residuals.

    def fwd(self, fwd: Any, out_trees: Callable[[], Any]) -> Any:
        called = self.function(fwd, lambda i: i // 2)  # each comes with whether it has a tangent

        def with_residuals(*args: Any) -> list[Any]:
            out = called.call_wrapped(*args)
            if not self.given:
                return out
            _, res_tree, forwarded = out_trees()
            n = res_tree.num_leaves - sum(f is not None for f in forwarded)
            values = [*self.given.values()]
            self.given = dict.fromkeys(self.given)
            return [*out[:n], *values, *out[n:]]

        return _jax.wrap_rule_function(fwd, with_residuals)

    def out_trees(self, out_trees: Callable[[], Any]) -> Callable[[], Any]:
        def with_residuals() -> Any:
            out_tree, res_tree, forwarded = out_trees()
            if not self.given:
                return out_tree, res_tree, forwarded
            n = len(self.given)
            return out_tree, _jax.tree_with_leaves(res_tree, n), [*forwarded, *[None] * n]

        return with_residuals

    def bwd(self, bwd: Any, out_trees: Callable[[], Any]) -> Any:
        below, age = without_values(self.below), self.age

        def given(residuals: Sequence[Any]) -> tuple[Sequence[Any], Any]:
            n = out_trees()[1].num_leaves
            cells = {a: Cell(v) for a, v in zip(self.given, residuals[n:], strict=True)}
            return residuals[:n], only_reading(Given(None, below, cells, age=age), _backward_writes)

        def n_residuals() -> int:
            return out_trees()[1].num_leaves + len(self.given)

        return _jax.wrap_backward_rule(bwd, n_residuals, given)


class Given(_RuleState):
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
        age: int | None = None,
    ) -> None:
        super().__init__(outside, below)
        self.cells = cells
        self.written = written
        self._before = {address: cell.value for address, cell in cells.items()}
        if age is not None:
            self.age = age  # so that the arguments are arrays made inside

    def aval(self, address: Address) -> Any:
        for boundary in boundaries(self):
            address = address.seen_from(boundary)
        return _jax.typeof(self.cell(address).value)

    def cell(self, address: Address) -> Cell:
        key = address.seen_from(self)
        if key not in self.cells and key not in self.written:
            raise self.refused(address)
        return self.cells.setdefault(key, _UnreadCell(address))

    def refused(self, address: Address) -> Exception:
        """The error for a slot that is not given."""
        return rule_touches_more(address)

    def captured(self, address: Address, value: Any, version: int) -> Any:
        key = address.seen_from(self)
        cell = self.cells.get(key)
        return value if cell is None or cell.value is self._before.get(key) else cell.value


class _UnreadCell(Cell):
    """The cell of a slot that the function writes and does not read, so that nobody gives it."""

    __slots__ = ("_address", "_value")

    def __init__(self, address: Address) -> None:
        self._address = address

    @property
    def value(self) -> Any:  # type: ignore[override]
        if not hasattr(self, "_value"):
            raise rule_touches_more(self._address)
        return self._value

    @value.setter
    def value(self, value: Any) -> None:
        self._value = value


@contextmanager
def only_reading(state: Given, refused: Callable[[Address], Exception]) -> Iterator[None]:
    """Code inside finds the state of ``state``; if it writes, that is the error ``refused``."""
    before = {address: cell.value for address, cell in state.cells.items()}
    with state.entered():
        yield
    for address, cell in state.cells.items():
        if cell.value is not before[address]:
            raise refused(address)


def without_values(holders: Sequence[Holder]) -> list[Holder]:
    return [holder.without_values() for holder in holders]


def rule_touches_more(address: Address) -> Exception:
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
            used=_jax.user_location(),
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
            used=_jax.user_location(),
        )
    )


def undifferentiated(address: Address, value: Any) -> Any:
    """``value`` of the slot ``address`` as an operand that may not be differentiated.

    (In the middle of a ``checkpoint`` JAX says of every operand that it is.)
    """
    if not _jax.has_tangent(_jax.typeof(value)):
        return value
    return _operand_p.bind(value, address=address)


_operand_p = _jax.without_derivative(
    "state_of_custom_rule", lambda *, address: _differentiates_state(address)
)


def _differentiates_state(address: Address) -> Exception:
    return CustomRuleStateError(
        message(
            f"A function with a custom derivative rule uses {address}, and is differentiated with"
            " respect to it. The rule says nothing about that derivative.",
            fix="""
            @jax.custom_vjp
            def f(x, w): ...                  # make it an argument, extend the rule
            f(x, jaxstate.param("w", ...))
            """,
            used=_jax.user_location(),
        )
    )


def _rule_writes_tangent(address: Address) -> Exception:
    return CustomRuleStateError(
        message(
            f"The rule of a custom_jvp writes {address}, with a value made of tangents. They are"
            " not known yet where a function is linearized.",
            fix="""
            def jvp(primals, tangents): ...     # write what is made of the primals only
            """,
            used=_jax.user_location(),
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
            used=_jax.user_location(),
        )
    )


def _run(fun: Any, args: Sequence[Any]) -> Any:
    """The results of a ``WrappedFun``. One may stand for a slot, and so for what is in it now."""
    _jax.reset_stores(fun)
    return _jax.map_results(_jax.resolved, fun.call_wrapped(*args))


class Explicit:
    """A function and its rules with their state as leading operands and trailing outputs."""

    def __init__(self, touched: Sequence[Address], written: Sequence[Address]) -> None:
        self.touched = touched
        self.written = written
        self.n = len(touched)
        self.age = slots.next_age()
        # The holders of this moment, for names only: a rule may run after they are closed.
        self.below = without_values(slots.stack())

    def run(
        self, call: Callable[[], Any], values: Sequence[Any]
    ) -> tuple[Any, dict[Address, Cell]]:
        """What ``call()`` returns with the slots at ``values``, and the cells that it leaves."""
        return self._run(call, values, self.written, rule_touches_more)

    def run_backward(self, call: Callable[[], Any], values: Sequence[Any]) -> Any:
        """What ``call()`` returns, which may not write."""
        return self._run(call, values, (), _backward_writes)[0]

    def _run(
        self,
        call: Callable[[], Any],
        values: Sequence[Any],
        written: Sequence[Address],
        refused: Callable[[Address], Exception],
    ) -> tuple[Any, dict[Address, Cell]]:
        # In an in-place function the operands are arrays that the function itself could write.
        before = dict(zip(self.touched, map(_jax.canonicalize, values), strict=True))
        cells = {a: Cell(v) for a, v in before.items()}
        state = Given(None, self.below, cells, self.written, self.age)
        with state.entered():
            out = call()
        for address, cell in cells.items():
            if address not in written and cell.value is not before.get(address):
                raise refused(address)
        return out, cells

    def results(self, cells: dict[Address, Cell]) -> list[Any]:
        """What is left in the written slots."""
        for address in self.written:
            if address not in cells:
                raise _rule_touches_less(address)
        return [cells[a].value for a in self.written]

    def function(self, fun: Any) -> Any:
        def explicit(*args: Any) -> list[Any]:
            out, cells = self.run(lambda: _run(fun, args[self.n :]), args[: self.n])
            return [*out, *self.results(cells)]

        return _jax.wrap_rule_function(fun, explicit)

    def jvp(self, jvp: Any, symbolic_zeros: bool) -> Any:
        """``(state, primals, state tangents, tangents)`` to primals and tangents with state."""

        def explicit(*args: Any) -> list[Any]:
            half = len(args) // 2
            primals, tangents = args[:half], args[half:]
            given = tangents[self.n :]
            if not symbolic_zeros:
                given = map(_jax.instantiate_symbolic_zero, given)
            operands = (*primals[self.n :], *given)
            out, cells = self.run(lambda: _run(jvp, operands), primals[: self.n])
            written = self.results(cells)
            n_out = len(out) // 2
            zeros = [_jax.symbolic_zero_like(w) for w in written]
            return [*out[:n_out], *written, *out[n_out:], *zeros]

        return _jax.wrap_rule_function(jvp, explicit)

    def fwd(self, fwd: Any) -> Any:
        """``fwd`` takes (value, is it differentiated) for every operand, in turns."""

        def explicit(*args: Any) -> list[Any]:
            state, rest = args[: 2 * self.n : 2], args[2 * self.n :]
            out, cells = self.run(lambda: _run(fwd, rest), state)
            return [*out, *self.results(cells)]

        return _jax.wrap_rule_function(fwd, explicit)

    def out_trees(self, out_trees: Callable[[], Any]) -> Callable[[], Any]:
        """The state goes to ``bwd`` as residuals, which are operands passed on."""

        def explicit() -> Any:
            out_tree, res_tree, forwarded = out_trees()
            forwarded = [f if f is None else f + self.n for f in forwarded]
            res_tree = _jax.tree_with_leaves(res_tree, self.n)
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
            out = self.run_backward(lambda: _run(bwd, (*residuals, *cts)), state)
            zeros = [_jax.zero_cotangent(_jax.typeof(s)) for s in state]
            return _jax.prepend_cotangents(zeros, out)

        return _jax.wrap_rule_function(bwd, explicit)


def _stateful(
    calls_params: Callable[[_Calls, dict[str, Any]], dict[str, Any]],
    explicit_params: Callable[[Explicit, dict[str, Any]], dict[str, Any]],
    left: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """The bind of a primitive with rules: see above.

    ``left(value)`` is what is written of a value that the function leaves in a slot.
    """

    def wrap(bind: Callable[..., Any]) -> Callable[..., Any]:
        def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
            if not slots.any_known() or _jax.is_rule_of_activation(params["subfuns"][1]):
                return bind(trace, args, avals, params)
            args = [*map(_jax.resolved, args)]
            if _jax.calls_functions(trace) or isinstance(trace, _jax.TransparentTrace):
                # A vmap around puts its own trace over the current one; the latter binds again.
                with _jax.set_current_trace(trace):
                    return bind(trace, args, avals, params)
            calls = _Calls(trace, args)
            try:
                # Code in the function looks for the way to where an array was made.
                with _jax.set_current_trace(trace):
                    return bind(trace, args, avals, calls_params(calls, params))
            except _Touched as ended:
                if ended.calls is not calls:
                    raise
                touched, written = calls.touched()
                args, use = calls.operands, calls.use
            finally:
                calls.finish()
            if not touched and not written:
                avals = list(map(_jax.typeof, args))
                return bind_with_trace(trace, args, avals, params)
            with one_use(use), _jax.set_current_trace(trace):
                settle(touched, written)
                values = list(map(undifferentiated, touched, read_all(touched)))
                explicit = Explicit(touched, written)
                operands = [*values, *args]
                out = bind(
                    trace, operands, [_jax.typeof(x) for x in operands],
                    explicit_params(explicit, params),
                )  # fmt: skip
                n = len(out) - len(written)
                return write_last(written, [*out[:n], *map(left, out[n:])])

        return bind_with_trace

    return wrap


def without_derivative(x: Any) -> Any:
    """What a function with a backward rule has written: the rule says nothing of it."""
    return jax.lax.stop_gradient(x) if _jax.has_tangent(_jax.typeof(x)) else x


def _jvp_calls(calls: _Calls, params: dict[str, Any]) -> dict[str, Any]:
    return dict(params, subfuns=tuple(map(calls.function, params["subfuns"])))


def _vjp_calls(calls: _Calls, params: dict[str, Any]) -> dict[str, Any]:
    fun, fwd, bwd = params["subfuns"]
    out_trees = params["out_trees"]
    functions = calls.function(fun), calls.fwd(fwd, out_trees), calls.bwd(bwd, out_trees)
    return dict(params, subfuns=functions, out_trees=calls.out_trees(out_trees))


def _jvp_params(explicit: Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, jvp = params["subfuns"]
    functions = explicit.function(fun), explicit.jvp(jvp, params["symbolic_zeros"])
    return dict(params, subfuns=functions, symbolic_zeros=True)


def _vjp_params(explicit: Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, fwd, bwd = params["subfuns"]
    out_trees = params["out_trees"]
    functions = explicit.function(fun), explicit.fwd(fwd), explicit.bwd(bwd, out_trees)
    return dict(params, subfuns=functions, out_trees=explicit.out_trees(out_trees))


_jax.wrap_bind_with_trace(_jax.custom_jvp_call_p, _stateful(_jvp_calls, _jvp_params))
# A backward rule says nothing of what is written: it does not depend on the operands. For JAX all
# results do.
_jax.wrap_bind_with_trace(
    _jax.custom_vjp_call_p, _stateful(_vjp_calls, _vjp_params, without_derivative)
)
