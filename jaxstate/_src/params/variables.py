"""Variables: state that is not a parameter, such as running statistics, counters and caches.

    @jaxstate.parametrized
    def normalize(x):
        mean = jaxstate.variable("mean", jnp.zeros, x.shape[1:])
        mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return x - mean.value

    params, state = normalize.init_with_state(key, x)            # {}, {"mean": ...}
    y, state = normalize.apply_with_state(params, state, x)      # a pure function

A variable is a slot for each array of its value, found by name in the same tree as the parameters
(`params.entries`). It is threaded through what stands between it and ``apply_with_state``
(`core.discharge`): a loop carries what is written in it, a branch passes on what it leaves
alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxstate._src import _jax
from jaxstate._src.core.resolve import read_at, write_each
from jaxstate._src.core.specs import contrast, same_structure, spec_of, strong
from jaxstate._src.handles import Handle
from jaxstate._src.params.entries import Store, current_place, innermost_store
from jaxstate._src.params.entry import Use
from jaxstate._src.params.interception import intercepted, interceptions
from jaxstate._src.params.lanes_of_variables import VariableAddress, set_reduce
from jaxstate._src.params.metadata import PerArray, checked, collection_of
from jaxstate._src.params.misuse import about_initializer
from jaxstate._src.params.param import check_name
from jaxstate.errors import (
    ClosedStateError,
    ReadOnlyVariableError,
    SlotTypeError,
    called_as,
    message,
    thread_that_has_nothing,
)

__all__ = ["Variable", "is_writable", "variable"]


T = TypeVar("T")


class Variable(
    Generic[T],
    metaclass=Handle,
    made_by='v = jaxstate.variable("v", init, shape)      # in a parametrized function',
):
    """A handle of a variable: see `variable`."""

    __slots__ = (
        "__weakref__",
        "_addresses",
        "_entry",
        "_is_writable",
        "_metadata",
        "_run",
        "_spec",
        "name",
    )

    def __init__(self, name: str, store: Store, use: Use, metadata: Any):
        self.name = name
        self._metadata = metadata
        self._is_writable = _may_write(store.writable, metadata)
        self._run = store.run
        self._spec = use.spec
        self._addresses = use.addresses
        # Weak, or a handle that is kept would keep the values.
        self._entry = None if use.entry is None else weakref.ref(use.entry)

    @property
    def value(self) -> T:
        """The current value. Assign to it to write.

        A Python scalar that is assigned takes the dtype of the variable, as in arithmetic with it.

        Raises:
          SlotTypeError: if it is assigned a value of another structure, shape or dtype than the
            first one.
          ReadOnlyVariableError: under ``apply``, which hands on no variables, or if the variable is
            not in a collection that ``apply_with_state`` was told to write.
          LaneWriteError: if lanes of a `vmap` write different values and there is no ``reduce``.
        """
        cells = self._cells_here(self._store())
        if cells is None:
            return self._spec.tree.unflatten([read_at(a) for a in self._addresses])
        return self._spec.tree.unflatten([cells[a.leaf].value for a in self._addresses])

    @value.setter
    def value(self, value: T | ArrayLike) -> None:
        store = self._store()
        if not self._is_writable:
            raise self._read_only(store)
        if _jax.is_plain_array(value) and self._spec.is_array:
            leaves = [value]
        else:
            leaves, tree = jax.tree.flatten(value)
            if not same_structure(tree, self._spec.tree):
                raise self._wrong_structure(value, tree)
        values = [self._fitted(x, a.wanted) for x, a in zip(leaves, self._addresses, strict=True)]
        cells = self._cells_here(store)
        if cells is None:
            used = _jax.user_location()
            write_each([address.used_at(used) for address in self._addresses], values)
        else:
            for address, x in zip(self._addresses, values, strict=True):
                cells[address.leaf].value = x

    def _cells_here(self, store: Store) -> Any:
        """The cells of the leaves, if nothing stands between the program and them."""
        entry = self._entry and self._entry()
        return entry.cells if entry is not None and store.is_here() else None

    def _store(self) -> Store:
        """The store that the variable is in, if it is the one that is asked here."""
        store = innermost_store()
        if store is None or store.run is not self._run:
            raise ClosedStateError(
                message(
                    f"A handle of variable {self.name!r} was used outside of the init or apply in"
                    " which it was made, or inside another one.",
                    fix=f"""
                    {self.name} = jaxstate.variable("{self.name}", ...)   # a handle of this one
                    value = {self.name}.value        # or: read it before, and use the value
                    """,
                    made=self._addresses[0].used if self._addresses else None,
                    used=_jax.user_location(),
                    thread=thread_that_has_nothing(),
                )
            )
        return store

    def _fitted(self, value: Any, wanted: Any) -> Any:
        """The value as an array of the variable's type."""
        if _jax.is_plain_array(value) and _jax.typeof(value) is wanted:
            return value
        if not _jax.is_array_like(value):
            raise self._wrong_type(repr(value))
        # The variable keeps an array of its own: the user may go on to write to his.
        value = jnp.array(value) if isinstance(value, np.ndarray) else jnp.asarray(value)
        found = _jax.typeof(value)
        if found.weak_type and jnp.result_type(value, wanted) == wanted.dtype:
            value = jax.lax.convert_element_type(value, wanted.dtype)
        value = strong(value)
        if not _jax.same_type(value, wanted):
            raise self._wrong_type(found.str_short())
        return value

    def _wrong_structure(self, value: Any, tree: Any) -> Exception:
        try:
            return self._wrong_type(*contrast(spec_of(value), self._spec))
        except TypeError:  # not all of it is arrays
            return self._wrong_type(str(tree), str(self._spec.tree))

    def _wrong_type(self, found: str, spec: str | None = None) -> Exception:
        example = "value"
        if self._spec.is_array:
            (aval,) = self._spec.avals
            example = f"jnp.asarray(value, jnp.{aval.dtype}).reshape({aval.shape})"
        return SlotTypeError(
            message(
                f"Variable {self.name!r} is {spec or self._spec}, and was written with {found}."
                " Its first value fixes its structure, shapes and dtypes.",
                fix=f"""
                {self.name} = jaxstate.variable("{self.name}", lambda: value)   # start like that
                {self.name}.value = {example}    # or write what fits
                """,
                made=self._addresses[0].used if self._addresses else None,
                used=_jax.user_location(),
            )
        )

    def _read_only(self, store: Store) -> Exception:
        what = "under apply, which has no way to return its new value."
        fix = "y, state = net.apply_with_state(params, state, x)"
        if not isinstance(store.writable, bool):
            allowed, collection = sorted(store.writable), collection_of(self._metadata)
            shown = f"is in collection {collection!r}" if collection else "is in no collection"
            what = f"under apply_with_state with mutable={allowed}, and it {shown}."
            wanted = sorted({*allowed, collection}) if collection else True
            fix = f"y, state = net.apply_with_state(params, state, x, mutable={wanted})"
        return ReadOnlyVariableError(
            message(
                f"Variable {self.name!r} was written {what}",
                fix=f"""
                {fix}
                if jaxstate.is_writable({self.name}):    # or write only where it may be written
                    {self.name}.value = value
                """,
                made=self._addresses[0].used if self._addresses else None,
                used=_jax.user_location(),
            )
        )

    def __repr__(self) -> str:
        return f"<variable {self.name!r}: {self._spec}>"


def _may_write(writable: bool | frozenset[str], metadata: Any) -> bool:
    if isinstance(writable, bool):
        return writable
    # What stands for the variables of a block is written if any of these may be.
    return isinstance(metadata, PerArray) or collection_of(metadata) in writable


def is_writable(variable: Variable) -> bool:
    """Whether a variable may be written here.

    So it is under ``init``, and under ``apply_with_state`` if the variable is ``mutable`` there.

    Args:
      variable: a handle, as `variable` gives it.

    Raises:
      ClosedStateError: outside of the ``init`` or ``apply`` in which the handle was made.
      TypeError: if it is given no handle.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def center(x):
    ...     mean = jaxstate.variable("mean", jnp.zeros, ())
    ...     if jaxstate.is_writable(mean):
    ...         mean.value = x.mean()
    ...     return x - mean.value
    >>> x = jnp.array([1.0, 3.0])
    >>> center.apply_with_state({}, {"mean": 0.0}, x)
    (Array([-1.,  1.], dtype=float32), {'mean': Array(2., dtype=float32)})
    >>> center.apply({}, x, state={"mean": 0.0})
    Array([1., 3.], dtype=float32)
    """
    if not isinstance(variable, Variable):
        raise TypeError(f"is_writable wants what variable() returns, and was given {variable!r}.")
    variable._store()
    return variable._is_writable


# What arrays can do, and a handle refuses.
_OF_VALUES = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>", "lt": "<",
    "le": "<=", "gt": ">", "ge": ">=", "neg": "-", "pos": "+", "abs": "abs", "invert": "~",
    "bool": "as a condition", "int": "int", "float": "float", "complex": "complex",
    "index": "as an index", "len": "len", "iter": "in a loop", "contains": "in", "round": "round",
    "getitem": "v[i]", "setitem": "v[i] = x", "array": "as an array",
}  # fmt: skip

_OF_TWO = frozenset(list(_OF_VALUES)[:13])


def _refusal(method: str, operation: str) -> Callable[..., Any]:
    def refuse(self: Variable[Any], *_: Any, **__: Any) -> Any:
        name = self.name
        raise TypeError(
            message(
                f"Variable {name!r} was used as if it were its value ({operation}).",
                fix=f"""
                {name}.value = {name}.value + 1      # read and write the value of the handle
                """,
                made=self._addresses[0].used if self._addresses else None,
                used=_jax.user_location(),
            )
        )

    refuse.__doc__ = "Refused: a handle is not its value."
    refuse.__name__, refuse.__qualname__ = method, f"Variable.{method}"
    return refuse


def _equal(self: Variable[Any], other: object) -> bool:
    return self is other if isinstance(other, Variable) else _refusal("__eq__", "==")(self)


def _refuse_what_values_can_do() -> None:
    """Not in the class, where type checkers would take it for what a handle can do."""
    for name, sign in _OF_VALUES.items():
        signs = {f"__{name}__": sign}
        if name in _OF_TWO:
            signs |= {f"__r{name}__": sign, f"__i{name}__": f"{sign}="}
        for method, sign in signs.items():
            setattr(Variable, method, _refusal(method, sign))
    Variable.__eq__ = _equal  # type: ignore[method-assign]
    Variable.__hash__ = object.__hash__  # type: ignore[method-assign]


_refuse_what_values_can_do()


@called_as('v = jaxstate.variable("v", init, shape, dtype)      # init(shape, dtype)')
def variable(
    name: str,
    init: Callable[..., T],
    *init_args: Any,
    reduce: Any = None,
    takes_key: bool = False,
    metadata: Any = None,
) -> Variable[T]:
    """A variable of the module (or `scope`) that the program is in.

    Args:
      name: without "/", unique in that scope; the same name there is the same variable.
      init: called as ``init(*init_args)``, without a key; returns any tree of arrays, the value
        that the variable starts with. ``variable("mean", jnp.zeros, (4,))``.
      takes_key: whether ``init`` is called as ``init(key, *init_args)``. As for a parameter, the
        key is made from that of ``init`` and from the path. ``apply`` needs none.
      *init_args: static values or arrays.
      reduce: what becomes of different values that the lanes of a `vmap` write:
        ``reduce(values, axis=0)``, for each array of the value, is what the variable is outside of
        the `vmap`. Inside, each lane goes on with its own. ``jnp.mean``, for example. Or a tree
        with a function for each part of the value: ``{"total": jnp.sum, "most": jnp.max}``. Or
        ``"merge"``: the value's own method, called as ``value.merge(other)``, which returns a value
        of its kind and is associative. If lanes write different values into a part, one is made of
        all parts. The same for devices of a `shard_map`.
      metadata: any static value that goes with the variable, see
        `Parametrized.metadata_with_state`. ``{"collection": "cache"}`` puts it in a collection,
        which `Parametrized.apply_with_state` can be told not to write.

    Returns:
      A `Variable`. Read and write its ``value``.

    Raises:
      TypeError: if ``name`` is not a name, ``init`` not a function, ``reduce`` none of these, or
        ``metadata`` has arrays or a collection that is no string.
      MissingStoreError: outside ``init`` and ``apply``.
      MissingVariableError, VariableMismatchError: if ``apply`` was not given a value of the
        structure and shapes that ``init`` would make.
      VariableConflictError: if the name is in use for a variable of another form.
      NameClashError: if the name is in use for a parameter, module or scope.
      InitializerDataError: if ``init`` looks at data that comes out of a loop or a vmap.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def net(x):
    ...     calls = jaxstate.variable("calls", jnp.zeros, (), jnp.int32)
    ...     calls.value += 1
    ...     return x * calls.value
    >>> params, state = net.init_with_state(jax.random.key(0), 2.0)
    >>> y, state = net.apply_with_state(params, state, 2.0)
    >>> y, state = net.apply_with_state(params, state, 2.0)
    >>> float(y), state
    (4.0, {'calls': Array(2, dtype=int32)})
    """
    check_name(name, "variable")
    if metadata is not None:
        metadata = checked(metadata, name)
        collection = collection_of(metadata)
        if not isinstance(collection, str | None):
            raise TypeError(
                f"variable({name!r}, ...) is in one collection, which has a string as name, and was"
                f' given {collection!r}.\nTo mend it:\n    metadata={{"collection": "cache"}}'
            )
    used = _jax.user_location()

    def handle(init: Any, *init_args: Any) -> Variable[Any]:
        if not callable(init):
            call = "init(key, *init_args)" if takes_key else "init(*init_args)"
            fix = f'jaxstate.variable("{name}", lambda: value)'
            if isinstance(init, str):
                of = f'metadata={{"collection": "{name}"}}'
                fix += f'\n    jaxstate.variable("{init}", init, shape, {of})'
            raise TypeError(
                f"variable({name!r}, ...) wants a function {call}, and was given {init!r}.\n"
                f"To mend it:\n    {fix}"
            )
        address = VariableAddress(name, used, metadata, takes_key)
        store = address.store()
        address.threaded = bool(store.writable)  # one that only some may write, too
        try:
            use = store.declare(address, init, init_args)
        except Exception as error:
            raise about_initializer(address, init, init_args, error)  # noqa: B904
        set_reduce(use.addresses, use.spec, reduce)
        home, levels = current_place(store, is_here=use.entry is not None)
        for leaf in use.addresses:
            leaf.place_at(home, levels)
        # To declare it is to use it: it gets its name here, and `init` makes it.
        types = use.spec.avals
        if use.entry is None:
            types = tuple(map(_jax.typeof, use.values()))
        if types != use.spec.avals:
            addresses = [a.having(wanted=t) for a, t in zip(use.addresses, types, strict=True)]
            use = Use(use.spec._replace(avals=types), addresses, use.entry)
        return Variable._make(name, store, use, metadata)

    around = interceptions("variable")
    if not around:
        return handle(init, *init_args)
    return intercepted(around, "variable", name, handle, (init, *init_args))
