# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The wrappers that are there while arrays are written in place."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxstate._src._jax.hooks import (
    IN_PLACE,
    Place,
    change,
    new_of_object,
)
from jaxstate._src._jax.names import (
    ShapedArray,
    Wrap,
    typeof,
)
from jaxstate._src._jax.tracers import TRACER_KINDS

__all__ = [
    "choose_tracer_type",
    "wrap_arguments",
    "wrap_auxiliary",
    "wrap_device_get",
    "wrap_forwarding",
    "wrap_key_arrays",
    "wrap_operands",
    "wrap_what_is_not_traced",
]


def choose_tracer_type(choose: Callable[[type, Any, Any], type]) -> None:
    """Lets ``choose(kind, trace, content)`` name a subclass for every tracer that JAX makes from
    now on; the content is a value, or only its type."""

    def wrap(kind: type, new: Any) -> Any:
        new = object.__new__ if new is new_of_object else new

        def choosing(cls: type, *args: Any, **kwargs: Any) -> Any:
            if cls is kind and len(args) > 1:
                if not IN_PLACE.users:
                    IN_PLACE.remove_unused()
                cls = choose(kind, args[0], args[1])
            return new(cls)

        return choosing

    for kind in TRACER_KINDS:
        IN_PLACE.add(Place(kind, "__new__"), functools.partial(wrap, kind))


def wrap_operands(
    read: Callable[[Any, Any], Any], hand_out: Callable[[Any, Any, Any], Any]
) -> None:
    """Wraps how a vmap or derivative takes apart what reaches it: operands, and the results of
    the function that is transformed.

    ``read(trace, x)`` replaces what is taken apart, ``hand_out(trace, part, x)`` each of the two
    things in it: a value of the trace outside, and its tangent or batch dimension.
    """

    def wrap(original: Any) -> Any:
        def take_apart(trace: Any, x: Any) -> Any:
            value, info = original(trace, read(trace, x))
            return hand_out(trace, value, x), hand_out(trace, info, x)

        return take_apart

    change("jax._src.interpreters.batching:BatchTrace.to_batch_info", wrap, IN_PLACE)
    for kind in ("JVPTrace", "LinearizeTrace"):
        change(f"jax._src.interpreters.ad:{kind}.to_primal_tangent_pair", wrap, IN_PLACE)

    def of_rule(original: Any) -> Any:
        """The trace under which the rule of a `custom_jvp` function runs."""
        return lambda trace, x: original(trace, read(trace, x))

    change("jax._src.interpreters.partial_eval:JaxprTrace.to_jaxpr_tracer", of_rule, IN_PLACE)


def wrap_arguments(adopt: Callable[[Any, Any], Any], cut: Callable[[Any], Any]) -> None:
    """Wraps how a transformed function gets the arguments that the transformation leaves alone.

    ``adopt(trace, x)`` replaces an argument that a vmap does not map over, or that a derivative
    knows no tangent of; ``cut(x)`` an argument that ``argnums`` leaves out.
    """

    def wrap(original: Any) -> Any:
        def argument(trace: Any, *args: Any) -> Any:
            out = original(trace, *args)
            return adopt(trace, out) if any(out is x for x in args) else out

        return argument

    change("jax._src.interpreters.batching:to_elt", wrap, IN_PLACE)
    change("jax._src.interpreters.ad:maybe_jvp_tracer", wrap, IN_PLACE)
    change("jax._src.interpreters.ad:maybe_linearize_tracer", wrap, IN_PLACE)

    def of_argnums(plain: Any) -> Any:
        def argnums_partial(f: Any, argnums: Any, args: Any, kwargs: Any) -> Any:
            taken = {operator.index(n) % len(args) for n in np.atleast_1d(argnums)}
            args = [x if i in taken else cut(x) for i, x in enumerate(args)]
            return plain(f, argnums, args, {name: cut(x) for name, x in kwargs.items()})

        return argnums_partial

    change("jax._src.api:argnums_partial2", of_argnums, IN_PLACE)


def wrap_auxiliary(hand_out: Callable[..., Any]) -> None:
    """Wraps how a derivative hands on auxiliary results: ``hand_out(strip, tag, x)``, where
    ``strip(x)`` takes the tangent off and ``tag`` is that of the derivative's trace."""

    def wrap(plain: Any) -> Any:
        def strip(kind: type, tag: Any, x: Any) -> Any:
            return hand_out(lambda x: plain(kind, tag, x), tag, x)

        return strip

    change("jax._src.interpreters.ad:_strip_tracer", wrap, IN_PLACE)


def wrap_forwarding(may_forward: Callable[[], bool]) -> None:
    """Lets ``may_forward()`` say whether an array among the results that is one of the operands may
    be that very object, and not a result of the operation; and a residual that is one of the
    arguments."""

    def wrap(plain: Any) -> Any:
        def forwarding(jaxpr: Any) -> list[int | None]:
            found = plain(jaxpr)
            if may_forward():
                return found
            is_array = (isinstance(v.aval, ShapedArray) for v in jaxpr.outvars)
            return [None if a else f for a, f in zip(is_array, found, strict=True)]

        return forwarding

    def wrap_rule(plain: Any) -> Any:
        def forwarding_of_rule(outs: Any, ins: Any) -> tuple[list[Any], list[int | None]]:
            if may_forward():
                return plain(outs, ins)
            found = [plain([x], ins)[1][0] for x in outs]
            is_array = (isinstance(typeof(x), ShapedArray) for x in outs)
            found = [None if a else f for a, f in zip(is_array, found, strict=True)]
            return [x for x, f in zip(outs, found, strict=True) if f is None], found

        return forwarding_of_rule

    change("jax._src.interpreters.partial_eval:_jaxpr_forwarding", wrap, IN_PLACE)
    change("jax._src.custom_derivatives:_filter_forwarded_inputs", wrap_rule, IN_PLACE)


def wrap_key_arrays(are_traced: Callable[[], bool]) -> None:
    """Lets ``are_traced()`` say whether an array of keys is iterated and copied as others are.

    JAX does both to the numbers behind the keys, and fails if something traces that.
    """

    def wrap_iter(plain: Any) -> Any:
        def iterate(self: Any) -> Iterator[Any]:
            if self.ndim and are_traced():
                return (self[i] for i in range(len(self)))
            return plain(self)

        return iterate

    def wrap_copy(plain: Any) -> Any:
        def copy(self: Any) -> Any:
            return jax.numpy.array(self, copy=True) if are_traced() else plain(self)

        return copy

    change("jax._src.random.prng:PRNGKeyArray.__iter__", wrap_iter, IN_PLACE)
    change("jax._src.random.prng:PRNGKeyArray.copy", wrap_copy, IN_PLACE)


def wrap_what_is_not_traced(wrap: Wrap) -> None:
    """Puts a wrapper around what JAX does only where nothing is traced, and around the creation of
    constants, which looks at its device only there."""
    change("jax._src.sharding_impls:set_mesh.__init__", wrap, IN_PLACE)
    change("jax._src.stages:Compiled.__call__", wrap, IN_PLACE)
    for path in (
        "jax._src.sharding_impls:get_mesh",
        "jax._src.lax.lax:full",
        "jax._src.lax.lax:full_like",
    ):
        change(path, lambda f: functools.wraps(f)(wrap(f)), IN_PLACE)


def wrap_device_get(wrap: Wrap) -> None:
    """Puts a wrapper around what `jax.device_get` does with one array."""
    change("jax._src.api:_device_get", wrap, IN_PLACE)
