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

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.boundaries import boundaries, same_trace
from jaxstate._src.core.resolve import read_at, read_since, write_each
from jaxstate._src.core.slots import Address, Cell, Holder
from jaxstate.errors import CustomRuleStateError, message

__all__ = [
    "Calls",
    "Given",
    "Touched",
    "backward_writes",
    "only_reading",
    "rule_touches_less",
    "rule_touches_more",
    "run_rule",
    "undifferentiated",
    "without_values",
]


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


class Touched(Exception):
    """Ends the call of a function of which JAX builds a jaxpr, and that touched state.

    Calls nest where one trace passes a call on to the next: ``calls`` is whose this is.
    """

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls


class _SlotOutside(Cell):
    """The cell of a slot in a function that runs at once: the slot itself."""

    __slots__ = ("_calls", "key")

    def __init__(self, calls: Calls, key: Address) -> None:
        self._calls = calls
        self.key = key

    @property
    def value(self) -> Any:  # type: ignore[override]
        return self._calls.read_at_once(self.key)

    @value.setter
    def value(self, value: Any) -> None:
        self._calls.write_at_once([self.key], [value])


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


class Calls(_RuleState):
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
            raise Touched(self)
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
            return _jax.canonicalize(read_at(key.renewed(self.use)))

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

    def write_cells(self, addresses: Sequence[Address], values: Sequence[Any]) -> None:
        cells = [self.cell(address) for address in addresses]
        outside = [cell.key for cell in cells if isinstance(cell, _SlotOutside)]
        if outside:  # then all of them are
            self.write_at_once(outside, values)
        else:
            super().write_cells(addresses, values)

    def write_at_once(self, keys: Sequence[Address], values: Sequence[Any]) -> None:
        known = [_jax.known_part(value) for value in values]
        for key, value in zip(keys, known, strict=True):
            if value is None:
                raise _rule_writes_tangent(key)
        self.written.update(keys)
        with self._outside():
            write_each([key.renewed(self.use) for key in keys], known)

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
                out = run_rule(fun, args)
                self._arguments = ()
                is_traced = not self.over and self._is_traced()
                is_refreshed = is_traced and self.refresh()
            if is_traced and (is_refreshed or self.cells):  # (objects are compared at the end)
                _jax.abandon_traces_inside(self.outside)
                raise Touched(self)
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
            return residuals[:n], only_reading(Given(None, below, cells, age=age), backward_writes)

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


def rule_touches_less(address: Address) -> Exception:
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


def backward_writes(address: Address) -> Exception:
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


def run_rule(fun: Any, args: Sequence[Any]) -> Any:
    """The results of a ``WrappedFun``. One may stand for a slot, and so for what is in it now."""
    _jax.reset_stores(fun)
    return _jax.map_results(_jax.resolved, fun.call_wrapped(*args))
