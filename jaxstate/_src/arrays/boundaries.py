"""JAX's own tracers, writable; and where JAX takes arrays of the program, and hands them out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import activation, first_use, is_array, quiet, thread
from jaxstate._src.arrays.array import Writable, WritableArray, fresh, snapshot
from jaxstate._src.arrays.buffers import Buffer, is_computed
from jaxstate._src.arrays.trace import InplaceTrace
from jaxstate._src.core import registry, resolve, slots
from jaxstate._src.core.capture import nowhere
from jaxstate._src.core.notes import notes_of

__all__ = ["objects"]


class objects:
    """What `jaxstate.mutate` says of its objects, which come and go as they are."""

    @staticmethod
    def is_object(x: Any) -> bool:
        return False

    @staticmethod
    def writable(inside: Any) -> AbstractContextManager[Any]:
        """Makes their arrays writable, in a function that is called ``inside`` another one."""
        return nullcontext()


def _writable_kind(kind: type) -> type:
    class WritableTracer(Writable, kind):  # type: ignore[misc, valid-type]
        __slots__ = ("_activation", "_age", "_buffer")

        def __init__(self, trace: Any, *args: Any, **kwargs: Any) -> None:
            self._age = slots.next_age()
            self._activation = activation()
            self._buffer = None
            _note_birth(trace, self._age)
            if kind is not _jax.StagingTracer:
                # What a vmap or derivative is given is the value of this moment.
                with _jax.set_current_trace(trace.parent_trace):
                    args = tuple(snapshot(a) for a in args)
            kind.__init__(self, trace, *args, **kwargs)

        def _own_buffer(self) -> Buffer:
            if self._buffer is None:
                value = _jax.plain_copy(self, kind)
                if _jax.is_constant_of_jaxpr(self):
                    kept = notes_of(self._trace).extra
                    kept.setdefault(Writable, []).append(self)
                self._buffer = Buffer(value, self._trace, self._age, None)
            return self._buffer

        def _read(self) -> Any:
            return self._own_buffer().read()

        def _detach(self) -> None:
            if self._trace is not nowhere:
                self._own_buffer().activation = self._activation
                self._trace = nowhere

        def full_lower(self) -> Any:
            if self._trace is nowhere:
                return self
            lower = kind.full_lower(self)  # type: ignore[attr-defined]
            return lower if lower is self else _adopt(self._trace, lower, is_new=True)

    WritableTracer.__name__ = WritableTracer.__qualname__ = f"Writable{kind.__name__}"
    return WritableTracer


def _note_birth(trace_: Any, age: int) -> None:
    if isinstance(trace_, _jax.BatchTrace):
        _jax.tag_of(trace_).__dict__.setdefault("_jaxstate_age", age)


_writable_kinds = {kind: _writable_kind(kind) for kind in _jax.TRACER_KINDS}


def _choose(kind: type, trace_: Any, content: Any) -> type:
    if not thread.activations or thread.quiet or _jax.is_linear_part(trace_):
        return kind
    aval = content if isinstance(content, _jax.AbstractValue) else _jax.typeof(content)
    return _writable_kinds[kind] if isinstance(aval, _jax.ShapedArray) else kind  # not a ref


def _read_operand(trace_: Any, value: Any) -> Any:
    """What reaches a vmap or derivative without a bind is read there."""
    with _jax.set_current_trace(trace_):
        return snapshot(value)


def _hand_out(trace_: Any, value: Any, taken: Any) -> Any:
    """What a vmap or derivative takes out of ``taken`` may be a result, so an array outside."""
    if not thread.activations or thread.quiet:
        return value
    if not isinstance(value, _jax.Tracer) and not isinstance(taken, Writable):
        return value
    if not is_array(value) or _jax.is_linear_part(getattr(value, "_trace", None)):
        return value
    if not isinstance(trace_.parent_trace, (*_TRACES_OF_RULES, _jax.TransparentTrace)):
        return value  # another library's trace has tracers of its own
    home = _jax.holding_trace(trace_.parent_trace)
    return WritableArray(Buffer(value, home, slots.next_age(), activation()))


def _adopt(trace_: Any, value: Any, *, is_new: bool = False) -> Any:
    """An argument that a vmap or derivative hands on as it is: an array of the function's own."""
    if not thread.activations or thread.quiet:
        return value
    if not isinstance(value, Writable) and not (is_new and is_array(value)):
        return value
    with _jax.set_current_trace(trace_.parent_trace):
        content = _jax.canonicalize(value)
    age = slots.next_age()
    _note_birth(trace_, age)
    return WritableArray(Buffer(content, trace_, age, activation()))


def _hand_out_auxiliary(strip: Callable[[Any], Any], tag: Any, result: Any) -> Any:
    """An auxiliary result of a derivative, as an array outside."""
    if not isinstance(result, Writable) or not thread.activations or thread.quiet:
        return strip(snapshot(result))
    home = result._buffer.home if result._buffer else result._trace  # type: ignore[attr-defined]
    if getattr(home, "tag", None) is tag:
        home = _jax.holding_trace(home.parent_trace)
    value = strip(snapshot(result))
    return WritableArray(Buffer(value, home, slots.next_age(), activation()))


def _cut(argument: Any) -> Any:
    """An argument whose arrays are its own."""
    if not thread.activations or thread.quiet:
        return argument
    return jax.tree.map(
        lambda x: fresh(x) if isinstance(x, Writable) else x, argument, is_leaf=objects.is_object
    )


def _may_forward() -> bool:
    """A result that is an operand itself would be the same array, and read when it may be another
    one."""
    return not thread.activations or bool(thread.quiet)


_TRACES_OF_PROGRAMS = (
    _jax.StagingTrace, _jax.BatchTrace, *_jax.DIFFERENTIATING, InplaceTrace
)  # fmt: skip

_TRACES_OF_RULES = (*_TRACES_OF_PROGRAMS, _jax.PartialTrace)


def _around_bind(bind: Callable[..., Any], operands: Any, params: Any) -> Any:
    """Inside the bind of a higher-order primitive JAX is among itself; its results are arrays."""
    here = _jax.current_trace()
    if not thread.activations or thread.quiet or not isinstance(here, _TRACES_OF_RULES):
        return bind(*operands, **params)
    donated = params.get("donated_invars", ())
    operands = [*map(_given_away, operands, donated)] if any(donated) else map(snapshot, operands)
    thread.quiet += 1
    try:
        out = bind(*operands, **params)
    finally:
        thread.quiet -= 1
    # Under the rule of a custom_jvp: what is known is a value of the trace outside.
    place = here.parent_trace if isinstance(here, _jax.PartialTrace) else here
    with _jax.set_current_trace(place):
        return [_array_of_program(x) for x in out]


def _given_away(x: Any, donated: bool) -> Any:
    """The value of an operand; a copy, if it is donated and the memory may be a caller's."""
    if not donated or not isinstance(x, Writable):
        return snapshot(x)
    is_own = x._own_buffer().place_of_value().is_own
    value = snapshot(x)
    if is_own or not is_computed(value):
        return value
    with quiet():
        return jnp.array(value)


def _array_of_program(x: Any) -> Any:
    """A result of JAX as the program gets it: what an array is known to hold can be written."""
    unknown = isinstance(x, _jax.PartialTracer)
    return x if unknown or not is_array(x) or isinstance(x, Writable) else fresh(x)


def _around_forwarding(bind: Callable[..., Any]) -> Callable[..., Any]:
    """An operation with nothing to do hands back what it was given: the value of an array."""

    def forward(*operands: Any, **params: Any) -> Any:
        out = bind(*operands, **params)
        if isinstance(out, (list, tuple)):
            return [x if isinstance(x, Writable) else _own(x) for x in out]
        return out if isinstance(out, Writable) else _own(out)

    return forward


def _around_conversion(bind: Callable[..., Any]) -> Callable[..., Any]:
    """A conversion that has nothing to do gives the array itself, as JAX does with tracers."""

    def convert(x: Any, **params: Any) -> Any:
        if isinstance(x, Writable):
            wanted = params["new_dtype"], params["weak_type"]
            if (x.dtype, x.aval.weak_type) == wanted and params["sharding"] is None:
                return x if thread.activations and not thread.quiet else snapshot(x)
        return bind(x, **params)

    return convert


def _own(x: Any) -> Any:
    """An array that an in-place function gets from JAX, as an array of its own."""
    if not thread.activations or thread.quiet or not is_array(x):
        return x
    return fresh(x) if isinstance(_jax.current_trace(), _TRACES_OF_PROGRAMS) else x


def _around_device_get(get: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An array whose value is known is fetched; JAX hands back tracers."""

    def device_get(x: Any) -> Any:
        value = x.to_concrete_value() if isinstance(x, Writable) else None
        return get(x if value is None else value)

    return device_get


def _around_top_level(function: Callable[..., Any]) -> Callable[..., Any]:
    """What JAX does only where nothing is traced works with the values, where these are known."""

    def call(*args: Any, **kwargs: Any) -> Any:
        here = _jax.current_trace()
        while isinstance(here, InplaceTrace):
            here = here.parent_trace
        if not thread.activations or thread.quiet or here is not _jax.eval_trace:
            return function(*args, **kwargs)
        donates = any(map(_jax.donates, args[:1]))
        args, kwargs = jax.tree.map(partial(_given_away, donated=donates), (args, kwargs))
        with _jax.set_current_trace(here):
            out = function(*args, **kwargs)
        return jax.tree.map(_own, out)

    return call


def _around_rules(bind: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of a function with a custom rule, and of its rules, are arrays of its own.

    (Not those of a backward rule, which may run when the in-place function has ended.)
    """

    def bind_with_trace(trace_: Any, args: Any, avals: Any, params: Any, /) -> Any:
        first, *others = params["subfuns"]
        if thread.activations and not thread.quiet and not _jax.is_of_jax(first):
            second, *others = others
            params = dict(params, subfuns=(_in_place(first), _in_place(second), *others))
        return bind(trace_, args, avals, params)

    return bind_with_trace


def _in_place(fun: Any) -> Any:
    """A function or rule of the user's, whose arguments are arrays of its own."""

    def run(*args: Any) -> Any:
        call = activation()
        _jax.reset_stores(fun)
        if call is None or all(isinstance(x, Writable) or not is_array(x) for x in args):
            return fun.call_wrapped(*args)
        inside = InplaceTrace(_jax.current_trace(), call)
        quiet, thread.quiet = thread.quiet, 0  # JAX may be among itself when it calls a rule
        try:
            with _jax.set_current_trace(inside):
                out = fun.call_wrapped(*map(inside._box, args))
                return [snapshot(x) for x in out]
        finally:
            thread.quiet = quiet

    return _jax.wrap_rule_function(fun, run)


_jax.choose_tracer_type(_choose)

_jax.wrap_operands(_read_operand, _hand_out)

_jax.wrap_arguments(_adopt, _cut)

_jax.wrap_auxiliary(_hand_out_auxiliary)

_jax.wrap_forwarding(_may_forward)

for _primitive in _jax.FORWARDING:
    _jax.wrap_bind(_primitive, _around_forwarding, _jax.IN_PLACE)

_jax.wrap_bind(_jax.convert_element_type_p, _around_conversion, _jax.IN_PLACE)

for _primitive in (_jax.custom_jvp_call_p, _jax.custom_vjp_call_p):
    _jax.wrap_bind_with_trace(_primitive, _around_rules, _jax.IN_PLACE)

_jax.wrap_device_get(_around_device_get)

_jax.wrap_what_is_not_traced(_around_top_level)

_jax.wrap_key_arrays(lambda: bool(thread.activations) and not thread.quiet)


def _begin_use() -> None:
    resolve.to_program = _own
    registry.around_binds[:] = [_around_bind]


first_use.append(_begin_use)


def _value(array: Writable) -> Any:
    """What JAX gets for an array that is an operand. A result it reads itself, where it belongs."""
    return array if _jax.takes_results() else array._read()


for _kind in (WritableArray, *_writable_kinds.values()):
    _jax.register_tracer_type(_kind, _value)
