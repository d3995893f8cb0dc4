"""How a parameter or variable gets its initial value: its initializer, as a jaxpr.

An initializer may be called anywhere: in a loop body, a branch, under vmap, in a solver. It is
traced there (so that everything it closes over is at hand), and runs where the store is. What it
closes over decides how it gets there:

* nothing but arrays: the jaxpr is part of the slot's address, and runs when the address is
  resolved;
* values of the jaxpr under construction ("data"): a ``state_init`` equation marks the place. When
  that jaxpr is bound, the rule for its primitive computes the data from the operands of the bind
  (`initialize`), if they are known there. Data that comes out of a loop is not.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.primitives import read_p, state_effect, write_p
from jaxstate._src.core.resolve import read_at
from jaxstate._src.core.slots import Address
from jaxstate._src.core.specs import Spec, all_arrays, spec_of, takes_shape, typed
from jaxstate._src.core.uses import current_use
from jaxstate.errors import InitializerDataError, message

__all__ = [
    "TracedInit",
    "folded",
    "init_p",
    "initialize",
    "initializer_at",
    "trace_initializer",
    "words_of",
]


class TracedInit:
    """An initializer as a jaxpr of ``(*data, *keys)``; that of a variable may take no key.

    Attributes:
      jaxpr: closed, and closed over arrays only.
      spec: structure and types of the value.
      mesh: that in which it is traced, whose axes have the types that its operations expect.
      jitted: what makes the value from a key and two words, if many slots share the initializer.
    """

    __slots__ = ("_looks_at_key", "jaxpr", "jitted", "mesh", "spec")

    def __init__(self, jaxpr: Any, spec: Spec) -> None:
        self.jaxpr = jaxpr
        self.spec = spec
        self.mesh = _jax.abstract_mesh()
        self.jitted: Callable[..., Any] | None = None
        self._looks_at_key = _looks_at_last_input(jaxpr)

    def run(self, data: Sequence[Any], *keys: Any) -> list[Any]:
        return _values(_jax.eval_closed_jaxpr(self.jaxpr, *data, *keys))

    def run_with_key(self, data: Sequence[Any], key: Any, words: Any) -> list[Any]:
        """Runs it with a key of its own: ``key``, with the ``words`` folded in."""
        if not self._looks_at_key:
            return self.run(data, key)
        if self.jitted is not None:
            return _values(self.jitted(key, *words))
        return self.run(data, folded(key, words))


def _values(results: Sequence[Any]) -> list[Any]:
    """What an initializer made, for a store: in an in-place function it makes writable arrays."""
    return [_jax.canonicalize(x) for x in results]


def words_of(path: str) -> np.ndarray:
    """What is folded into a key to make that of one path: a hash of it."""
    return np.frombuffer(hashlib.sha256(path.encode()).digest(), "<u4", 2)


def folded(key: Any, words: Any) -> Any:
    """The key with the words folded in, one after the other."""
    for word in words:
        key = jax.random.fold_in(key, word)
    return key


def _looks_at_last_input(jaxpr: Any) -> bool:
    last = _jax.invars(jaxpr)[-1:]
    used = [v for eqn in _jax.equations(jaxpr) for v in eqn.invars]
    return any(v is last[0] for v in (*used, *_jax.outvars(jaxpr))) if last else False


def initializer_at(
    address: Any, init: Callable[..., Any], init_args: tuple[Any, ...], *key_avals: Any
) -> tuple[TracedInit, list[Any]]:
    """What makes the entry at ``address``, and the tracers that it looks at."""
    if takes_shape(init, init_args, address.takes_key):
        maker = _Maker(type(address), init, init_args)
        if maker.is_hashable:
            return _shared_init(maker, key_avals, _jax.trace_context_without_state()), []
    initial = address.initial
    return trace_initializer(address, lambda *keys: initial(init, init_args, *keys), *key_avals)


class _Maker:
    """An initializer of JAX's and its arguments. Equal ones make equal values.

    (``jax.nn.initializers.lecun_normal()`` is another function whenever it is called.)
    """

    __slots__ = ("_key", "init", "init_args", "is_hashable", "kind")

    def __init__(self, kind: Any, init: Any, init_args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.init = init
        self.init_args = init_args
        contents = tuple(cell.cell_contents for cell in getattr(init, "__closure__", None) or ())
        defaults = getattr(init, "__defaults__", None) or ()
        function = getattr(init, "__code__", init)
        shape, *dtype = init_args
        self._key = kind, function, typed((*contents, *defaults)), tuple(shape), tuple(dtype)
        try:
            hash(self._key)
            self.is_hashable = True
        except TypeError:
            self.is_hashable = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Maker) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(1024)
def _shared_init(maker: _Maker, key_avals: tuple[Any, ...], context: Any) -> TracedInit:
    """A traced initializer, made and compiled once, for all slots that are made like it."""
    initial, init, init_args = maker.kind.initial, maker.init, maker.init_args
    traced_init, _ = trace_initializer(
        init, lambda *keys: initial(init, init_args, *keys), *key_avals
    )

    @jax.jit
    def initializer(key: Any, *words: Any) -> list[Any]:
        return traced_init.run((), folded(key, words))

    traced_init.jitted = initializer
    return traced_init


def trace_initializer(
    entry: Any, init: Callable[..., Any], *key_avals: Any
) -> tuple[TracedInit, list[Any]]:
    """The function ``init(*keys)`` of ``entry`` as a `TracedInit`, and the tracers it looks at."""

    def arrays(*keys: Any) -> Any:
        return all_arrays(init(*keys))

    closed, shape = _jax.make_jaxpr(arrays, return_shape=True)(*key_avals)
    closed, addresses = _with_reads_as_inputs(closed)
    if state_effect in closed.effects:
        raise InitializerDataError(
            message(
                f"The initializer of {entry} uses state that is written (a draw writes the count"
                " of its stream). It runs once, where the slot is made, and not where it is"
                " called.",
                fix="""
                jaxstate.param("w", lambda key: jax.random.normal(key, (3,)))   # it is given a key
                value = jaxstate.random.normal((3,))          # or use the state before
                jaxstate.variable("v", lambda: value)
                """,
                used=_jax.user_location(),
            )
        )
    if any(map(_jax.is_tracer, _jax.consts_of(closed))):
        # What initializes a module of another package runs its forward pass for the shapes.
        closed = _jax.without_dead_code(closed)
    data = [c for c in _jax.consts_of(closed) if _jax.is_tracer(c)]
    if data:
        closed = _jax.hoist_constants(closed, _jax.is_tracer)
    return TracedInit(closed, spec_of(shape)), [*data, *(read_at(a) for a in addresses)]


def _with_reads_as_inputs(jaxpr: Any) -> tuple[Any, list[Address]]:
    """The closed jaxpr with the slots that it reads as its first inputs, and their addresses.

    A jaxpr that does more to its slots than to read them is left as it is.
    """
    eqns = _jax.equations(jaxpr)
    reads = [eqn for eqn in eqns if eqn.primitive is read_p]
    others = [eqn for eqn in eqns if eqn.primitive is not read_p]
    if not reads or any(state_effect in eqn.effects for eqn in others):
        return jaxpr, []
    made = _jax.remade(
        jaxpr,
        invars=[*(v for eqn in reads for v in eqn.outvars), *_jax.invars(jaxpr)],
        outvars=_jax.outvars(jaxpr),
        eqns=others,
        effs=jaxpr.effects - {state_effect},
    )
    return made, [address for eqn in reads for address in addresses_of(eqn)]


# -- Initializers that look at data, inside a jaxpr ------------------------------------------

init_p = _jax.Primitive("state_init")
init_p.multiple_results = True
init_p.def_effectful_abstract_eval(
    lambda *data, addresses, traced_init: (list(traced_init.spec.avals), {state_effect})
)


@init_p.def_bind_with_trace
def _initialize_again(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
    """An interpreter evaluates a jaxpr whose initializers are not run yet."""
    with _jax.set_current_trace(trace):
        return initialize_at(params["addresses"], params["traced_init"], args)


def initialize_at(
    addresses: Sequence[Address], traced_init: TracedInit, data: Sequence[Any]
) -> list[Any]:
    """Makes the slots of one parameter or variable, unless they exist, from data known here."""
    return addresses[0].initialize(addresses, traced_init, data)  # type: ignore[attr-defined]


@_jax.weakref_lru_cache
def has_inits(jaxpr: Any) -> bool:
    """Whether a jaxpr makes slots from data."""
    return any(eqn.primitive is init_p for eqn in _jax.equations(jaxpr))


class _Needs(NamedTuple):
    """What an initializer in a jaxpr needs, and the equations that compute its data from that."""

    inputs: tuple[int, ...]
    reads: tuple[Address, ...]
    jaxpr: Any


def initialize(jaxpr: Any, operands: Sequence[Any], loop_writes: Sequence[Address] = ()) -> None:
    """Runs the initializers in ``jaxpr`` in the place where it is about to be bound.

    ``operands`` are its inputs, None for what is not known before (the carried values of a loop);
    ``loop_writes`` are slots that change while it runs.
    """
    if state_effect not in jaxpr.effects:
        return
    use = current_use()
    for eqn in _jax.equations(jaxpr):
        if eqn.primitive is not init_p:
            continue
        addresses, traced_init = eqn.params["addresses"], eqn.params["traced_init"]
        needs = _needs(jaxpr, addresses[0])
        addresses = tuple(a.renewed(use) for a in addresses)
        values = [operands[i] for i in needs.inputs]
        if any(v is None for v in values) or any(a in loop_writes for a in needs.reads):
            raise InitializerDataError(
                message(
                    f"The initializer of {addresses[0]} looks at data that comes out of a loop:"
                    " there is no value before the loop starts, and the slot has to exist before"
                    " it.",
                    fix="""
                    w = jaxstate.param("w", init, x)      # before the loop, from data outside
                    jax.lax.scan(body, c, xs)             # the body uses w
                    """,
                    used=addresses[0].used,  # type: ignore[attr-defined]
                )
            )
        reads = [read_at(a.renewed(use)) for a in needs.reads]
        data = _jax.eval_closed_jaxpr(needs.jaxpr, *values, *reads)
        initialize_at(addresses, traced_init, data)


@_jax.weakref_lru_cache
def _needs(jaxpr: Any, address: Address) -> _Needs:
    """Slices the jaxpr for the data of the initializer of ``address``."""
    eqns = list(_jax.equations(jaxpr))
    at = next(
        i for i, e in enumerate(eqns)
        if e.primitive is init_p and e.params["addresses"][0] == address
    )  # fmt: skip
    outvars = eqns[at].invars
    sliced, needed = slice_equations(eqns[:at], outvars)
    pure = [e for e in sliced if e.primitive not in (read_p, init_p)]
    given = {
        v: address
        for e in sliced
        if e.primitive in (read_p, init_p)
        for v, address in zip(e.outvars, addresses_of(e), strict=True)
        if v in needed
    }
    inputs = tuple(i for i, v in enumerate(_jax.invars(jaxpr)) if v in needed)
    made = _jax.remade(
        jaxpr,
        invars=[*(_jax.invars(jaxpr)[i] for i in inputs), *given],
        outvars=outvars,
        eqns=pure,
        effs=frozenset(),
    )
    return _Needs(inputs, tuple(given.values()), _jax.close(made))


def addresses_of(eqn: Any) -> tuple[Address, ...]:
    """The slots that a state equation reads, writes or makes."""
    return eqn.params["addresses"]


def sliced(jaxpr: Any) -> tuple[Any, list[int]]:
    """The closed jaxpr without what its outputs do not need, and which inputs it still takes."""
    outvars, inputs = _jax.outvars(jaxpr), _jax.invars(jaxpr)
    eqns, needed = slice_equations(_jax.equations(jaxpr), outvars)
    used = [i for i, v in enumerate(inputs) if v in needed]
    invars = [inputs[i] for i in used]
    pure = _jax.remade(jaxpr, invars=invars, outvars=outvars, eqns=eqns, effs=frozenset())
    return pure, used


def slice_equations(eqns: Sequence[Any], outvars: Sequence[Any]) -> tuple[list[Any], set[Any]]:
    """The equations that ``outvars`` depend on, effects aside, and all variables these mention."""
    needed = {v for v in outvars if isinstance(v, _jax.Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.primitive is not write_p and any(v in needed for v in eqn.outvars):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if isinstance(v, _jax.Var))
    return kept[::-1], needed
