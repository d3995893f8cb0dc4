"""Primitives with rules: what is done in the place of a bind, if a jaxpr in it uses state.

A higher-order primitive becomes stateful with a rule: a function that is called instead of the
bind when a jaxpr among the parameters has state. It reads the slots where it is called, binds the
same primitive with pure jaxprs, and writes the results back. This happens at the first contact,
under whatever trace is current: no transformation of JAX ever sees a jaxpr with state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import (
    no_rule,
    reading_captures,
    settle_jaxprs,
    settled_captures,
    state_of,
)
from jaxstate._src.core.discharge import binds, watched
from jaxstate._src.core.primitives import state_effect
from jaxstate._src.core.slots import any_known, any_open
from jaxstate._src.core.uses import begin_use, end_use
from jaxstate.errors import UnsupportedPrimitiveError, message

__all__ = [
    "Rule",
    "around_binds",
    "before_rules",
    "has_rule",
    "in_bind",
    "out_of_bind",
    "register_hidden_rule",
    "register_rule",
]

Rule = Callable[..., Any]

_rules: dict[Any, Rule] = {}


def register_rule(primitive: Any) -> Callable[[Rule], Rule]:
    """Makes a higher-order primitive stateful.

    The rule is called as ``rule(args, params)`` instead of the bind, with the trace of the bind
    current, when a jaxpr among ``params`` uses state. It returns what the bind would.

    Args:
      primitive: a `jax.extend.core.Primitive` with jaxprs among its parameters.

    Returns:
      A decorator for the rule. `discharged_call` and `discharged_loop` are what most rules need.

    Here for a primitive that calls its jaxpr once:

    >>> from jaxstate.extend import discharged_call, register_rule
    >>> def rule_for(call_p):
    ...     @register_rule(call_p)
    ...     def rule(args, params):
    ...         call = discharged_call(params["jaxpr"], args)
    ...         return call.results(call_p.bind(*call.operands, jaxpr=call.jaxpr))
    """

    def register(rule: Rule) -> Rule:
        if primitive not in _rules:
            has_state = _has_state_of_jit if primitive is _jax.jit_p else _has_state
            _jax.wrap_bind(primitive, lambda bind: _one_use_per_bind(bind, has_state))
            _jax.wrap_bind_with_trace(
                primitive, lambda bind: _stateful_bind(primitive, bind, has_state)
            )
        _rules[primitive] = rule
        return rule

    return register


def has_rule(primitive: Any) -> bool:
    """Whether a higher-order primitive has been made stateful with `register_rule`."""
    return primitive in _rules


# What a client does around the bind of every primitive that has a rule: `arrays` lets it be.
around_binds: list[Callable[..., Any]] = []

# Called before a rule reads and writes slots.
before_rules: list[Callable[[], None]] = []


def in_bind() -> bool:
    """Whether a primitive is being bound that has a rule."""
    return binds.depth > 0


@contextmanager
def out_of_bind() -> Iterator[None]:
    """For a function of a program that is called from inside a bind."""
    depth, binds.depth = binds.depth, 0
    try:
        yield
    finally:
        binds.depth = depth


def _one_use_per_bind(
    bind: Callable[..., Any],
    has_state: Callable[[dict[str, Any]], bool],
    runs_jaxprs: bool = True,
) -> Callable[..., Any]:
    def one_bind(*args: Any, **params: Any) -> Any:
        if not any_known():
            return bind(*args, **params)
        binds.depth += runs_jaxprs
        uses = None
        try:
            if StateTracer in map(type, args) or has_state(params):
                uses = begin_use(args)
            for around in around_binds:
                return around(bind, args, params)
            return bind(*args, **params)
        finally:
            binds.depth -= runs_jaxprs
            if uses is not None:
                end_use(uses)

    return one_bind


def _stateful_bind(
    primitive: Any, bind: Callable[..., Any], has_state: Callable[[dict[str, Any]], bool]
) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not has_state(params) or isinstance(trace, _jax.TransparentTrace):
            return bind(trace, args, avals, params)  # such a trace runs the jaxprs, state and all
        with _jax.set_current_trace(trace):
            for notice in before_rules:
                notice()
            params = settled_captures(reading_captures(params))
            if not has_state(params):
                return bind(trace, args, avals, params)
            settle_jaxprs(list(_jax.jaxprs_in(params)))
            with watched(trace is _jax.eval_trace):
                return _rules[primitive](args, params)

    return bind_with_trace


def _has_state(params: dict[str, Any]) -> bool:
    for jaxpr in _jax.jaxprs_in(params):  # noqa: SIM110 (at every bind: no generator)
        if jaxpr.effects and state_effect in jaxpr.effects:
            return True
    return False


def _has_state_of_jit(params: dict[str, Any]) -> bool:
    """The same without a look at the other parameters: much of JAX's own library is jitted."""
    effects = params["jaxpr"].effects
    return bool(effects) and state_effect in effects


_hidden_rules: dict[Any, Rule] = {}


def register_hidden_rule(kind: Any) -> Callable[[Rule], Rule]:
    """Makes an operation of `jax.experimental.hijax` stateful, which hides its jaxprs in an object.

    The rule is called as ``rule(args, prim)`` like one of `register_rule`.

    Args:
      kind: the class of the object; None if this version of JAX does not have it.

    Returns:
      A decorator for the rule.
    """

    def register(rule: Rule) -> Rule:
        if kind is not None:
            _hidden_rules[kind] = rule
        return rule

    return register


def _hidden_stateful_bind(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        prim = params["_prim"]
        if isinstance(trace, _jax.StagingTrace) and any_open():
            with _jax.set_current_trace(trace):
                _look_into(prim)
        hidden = list(_jax.hidden_jaxprs(prim))
        if not any(state_effect in x.effects for x in [prim, *hidden]):
            return bind(trace, args, avals, params)
        rule = _hidden_rules.get(type(prim))
        if rule is None:
            raise no_rule(type(prim).__name__, hidden, _jax.user_location())
        with _jax.set_current_trace(trace):
            settle_jaxprs(hidden)
            return rule(args, prim)

    return bind_with_trace


def _one_use_per_hidden_bind(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_values(*args: Any, **params: Any) -> Any:  # JAX does not look at these operands
        return bind(*map(_jax.resolved, args), **params)

    return _one_use_per_bind(bind_values, lambda params: True, runs_jaxprs=False)


class _HiddenEffect(_jax.Effect):
    """What an operation has whose ``expand`` uses state: it is not dropped where nobody uses its
    result."""

    def __repr__(self) -> str:
        return "a use of jaxstate state in the expand of an operation of jax.experimental.hijax"

    def __hash__(self) -> int:
        return hash(_HiddenEffect)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HiddenEffect)


_hidden_effect = _HiddenEffect()

_jax.allow_effect_everywhere_but_in_compiled_code(_HiddenEffect)


def _look_into(prim: Any) -> None:
    """Notes whether the ``expand`` of a user's operation uses state.

    JAX calls it when it compiles the jaxpr that is built now: for what is called at top level,
    before that call returns. State that is open at top level is still open then.

    Raises:
      UnsupportedPrimitiveError: for any other state.
    """
    if not _jax.is_of_user(prim):
        return
    jaxpr, constants = _jax.expanded(prim)
    captured = [c.address for c in constants if type(c) is StateTracer]
    state = state_of(jaxpr)
    used = [*state.writes, *state.reads]
    inside = [a for a in used if not _is_at_top_level(a.holder())]
    if captured or inside:
        raise UnsupportedPrimitiveError(
            message(
                f"The expand method of {type(prim).__name__} uses {(captured + inside)[0]}. JAX"
                " calls it when it compiles the function that is traced here, and that state is not"
                " open then.",
                fix="""
                k = jaxstate.next_key()             # outside of expand:
                w = jaxstate.param("w", ...)
                y = Operation(...)(x, k, w)         # and pass it in
                """,
                used=_jax.user_location(),
            )
        )
    if used or _hidden_effect in jaxpr.effects:
        prim.effects = prim.effects | {_hidden_effect}


def _is_at_top_level(holder: Any) -> bool:
    if holder.is_boundary or holder.outside is not None:
        return False
    return not any(isinstance(t, _jax.StagingTrace) for t in _jax.chain(holder.anchor))


_jax.wrap_bind(_jax.call_hi_primitive_p, _one_use_per_hidden_bind)

_jax.wrap_bind_with_trace(_jax.call_hi_primitive_p, _hidden_stateful_bind)
