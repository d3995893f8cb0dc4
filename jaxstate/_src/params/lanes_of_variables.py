"""Addresses of variables, and how one value is made of what lanes write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core.slots import Joint
from jaxstate._src.core.specs import ONLY_LEAF, Spec, same_structure, spec_of, strong, strong_type
from jaxstate._src.params.entries import EntryAddress
from jaxstate.errors import (
    LaneWriteError,
    MissingStoreError,
    MissingVariableError,
    SlotTypeError,
    VariableConflictError,
    VariableMismatchError,
    message,
    thread_that_has_nothing,
)

__all__ = ["VariableAddress", "set_reduce"]


class VariableAddress(EntryAddress):
    """One leaf of a variable.

    Attributes:
      threaded: whether the variable may be written. Where it may not, it is captured.
      reduce: makes one value of the lanes' values, or None.
      joint: the same for all arrays of the value together.
      takes_key: whether the initializer is given a key.
    """

    kind = "variable"
    has_axes = True
    missing_error = MissingVariableError
    mismatch_error = VariableMismatchError
    conflict_error = VariableConflictError

    def __init__(self, name: str, used: str, metadata: Any, takes_key: bool) -> None:
        super().__init__(name, used, metadata)
        self.threaded = True
        self.reduce: Callable[..., Any] | None = None
        self.joint: Joint | None = None
        self.takes_key = takes_key

    def missing(self) -> Exception:
        return MissingStoreError(
            message(
                f"{self} was used outside init and apply.",
                fix="""
                params, state = net.init_with_state(jax.random.key(0), x)
                y, state = net.apply_with_state(params, state, x)  # net = parametrized(fn)
                """,
                used=self.used,
                thread=thread_that_has_nothing(),
            )
        )

    def not_given(self) -> Exception:
        return MissingVariableError(
            message(
                f"{self} was used, and apply was given no variables.",
                fix="""
                params, state = net.init_with_state(key, x)
                y, state = net.apply_with_state(params, state, x)   # reads and writes
                y = net.apply(params, x, state=state)               # only reads
                """,
                used=self.used,
            )
        )

    @staticmethod
    def initial(init: Callable[..., Any], init_args: tuple[Any, ...], *keys: Any) -> Any:
        return jax.tree.map(strong, init(*keys, *init_args))

    def form_of_initial(self, init: Callable[..., Any], init_args: tuple[Any, ...]) -> Spec:
        return super().form_of_initial(init, init_args).strong()

    def as_stored(self, value: Any) -> Any:
        return strong(value)

    def type_as_stored(self, aval: Any) -> Any:
        return strong_type(aval)

    def reduced(self, values: Any) -> Any:
        assert self.reduce is not None
        try:
            one = self.reduce(values, axis=0)
        except TypeError as error:
            if "unexpected keyword argument 'axis'" in str(error):
                error.add_note(
                    f"The reduce of {self} is called as reduce(values, axis=0).\nTo mend it:\n"
                    "    def reduce(values, axis):\n        return values.max(axis)"
                )
            raise
        return self.checked(one)

    def checked(self, value: Any) -> Any:
        """One value that was made of the lanes' values."""
        is_array = _jax.is_array_like(value)
        value = strong(value) if is_array else value
        if not is_array or not _jax.same_type(value, self.wanted):
            found = f"has type {_jax.typeof(value).str_short()}" if is_array else f"is {value!r}"
            raise SlotTypeError(
                message(
                    f"{self} has type {self.wanted.str_short()}, and what its reduce makes of the"
                    f" lanes' values {found}.",
                    fix=f"""
                    reduce = lambda values, axis: values.max(axis)   # called as (values, axis=0),
                    jaxstate.variable("{self.name}", ..., reduce=reduce)  # keeps shape and dtype
                    """,
                    used=self.used,
                )
            )
        return value

    def refuse_lanes(self, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                f"Lanes of a vmap wrote different values into {self}, which they share.",
                fix=f"""
                # one value of all lanes' values:
                jaxstate.variable("{self.name}", ..., reduce=jnp.mean)
                # or a value per lane, with the variable made inside the vmap:
                jax.vmap(net.apply_with_state, (None, 0, 0))(params, states, xs)
                """,
                used=self.used,
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    fix_by_init = """
        params, state = net.init_with_state(key, x)   # with inputs of the shapes of apply
        """


class _Together(Joint):
    """The arrays of one value: if lanes wrote different ones into some, one is made of all."""

    def whole(self, address: VariableAddress) -> Any:  # type: ignore[override]
        return address.having(leaf=ONLY_LEAF)

    def reduced(self, pairs: Any) -> list[Any]:
        return [address.reduced(values) for address, values in pairs]


class _Merge(_Together):
    """Makes one value of the lanes' values by the method ``merge`` of the value's class."""

    def reduced(self, pairs: Any) -> list[Any]:
        addresses = [address for address, _ in pairs]
        values = [lanes for _, lanes in pairs]
        merge = jax.vmap(functools.partial(self._of_two, addresses))
        while (n := values[0].shape[0]) > 1:  # neighbours, so that their order is kept
            first, second = ([x[i : n - n % 2 : 2] for x in values] for i in (0, 1))
            merged = merge(first, second)
            if n % 2:
                merged = [jnp.concatenate([m, x[-1:]]) for m, x in zip(merged, values, strict=True)]
            values = merged
        return [x[0] for x in values]

    def _of_two(self, addresses: list[VariableAddress], first: Any, second: Any) -> list[Any]:
        """The arrays that the values with the arrays ``first`` and ``second`` merge to."""
        spec = addresses[0].spec
        assert spec is not None
        places = [address.leaf.index for address in addresses]
        values = [
            spec.tree.unflatten(arrays[places.index(i)] for i in range(len(places)))
            for arrays in (first, second)
        ]
        merged = values[0].merge(values[1])
        leaves, structure = jax.tree.flatten(merged)
        if not same_structure(structure, spec.tree):
            raise _wrong_merge(addresses[0], str(structure))
        found = [strong(leaves[i]) for i in places]
        for address, x in zip(addresses, found, strict=True):
            if not _jax.same_type(x, address.wanted):
                raise _wrong_merge(addresses[0], str(spec_of(merged)))
        return found


def _wrong_merge(address: VariableAddress, found: str) -> Exception:
    return SlotTypeError(
        message(
            f"Variable {address.name!r} is {address.spec}, and its merge makes {found}.",
            fix="""
            def merge(self, other):         # a value of the same class, shapes and dtypes
                return type(self)(self.total + other.total)
            """,
            used=address.used,
        )
    )


def set_reduce(addresses: Sequence[VariableAddress], spec: Spec, reduce: Any) -> None:
    """What becomes of the lanes' values, for the addresses of a variable's leaves."""
    name = addresses[0].name if addresses else ""
    if isinstance(reduce, str):
        value = None if spec.is_array else spec.tree.unflatten(spec.avals)
        if reduce != "merge" or not callable(getattr(value, "merge", None)):
            raise _no_reduce(name, reduce, spec)
        for address in addresses:
            address.reduce, address.joint = _never_called, _Merge()
    elif reduce is not None:
        try:
            functions = _per_leaf(reduce, spec)
        except (TypeError, ValueError):
            raise _no_reduce(name, reduce, spec) from None
        for address, function in zip(addresses, functions, strict=True):
            if function is not None and not callable(function):
                raise _no_reduce(name, reduce, spec)
            address.reduce = function
            address.joint = _Together() if len(addresses) > 1 else None


def _per_leaf(reduce: Any, spec: Spec) -> list[Any]:
    """The function of each leaf, of a function for all or a tree with one for each part."""
    if callable(reduce):
        return [reduce] * len(spec.avals)
    found: list[Any] = [None] * len(spec.avals)

    def of_part(function: Any, part: Any) -> None:
        for i in jax.tree.leaves(part):
            found[i] = function

    parts = spec.tree.unflatten(range(len(found)))
    jax.tree.map(of_part, reduce, parts, is_leaf=lambda x: x is None)
    return found


def _never_called(values: Any, axis: int) -> Any:
    raise AssertionError("the leaves of the value are merged together")


def _no_reduce(name: str, reduce: Any, spec: Spec) -> Exception:
    return TypeError(
        f"variable({name!r}, ...) wants a function reduce(values, axis=0), or a tree with one for"
        ' each part of the value, or "merge" if the value has that method. The value is'
        f" {spec}, and reduce is {reduce!r}.\nTo mend it:\n"
        f'    jaxstate.variable("{name}", ..., reduce=jnp.sum)\n'
        f'    jaxstate.variable("{name}", ..., reduce={{"total": jnp.sum, "most": jnp.max}})'
    )
