"""NumPy's functions on writable arrays, by NumPy's own protocols (NEP 13 and NEP 18).

A function that writes (``np.copyto``, ``np.add.at``, ``out=``) writes into the array, by the
function of `jax.numpy` of the same name. All others do what they do with arrays of JAX: NumPy
computes with the values, if these are known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate.errors import message

__all__ = ["call_function", "call_ufunc"]


# -- Functions (`__array_function__`) --------------------------------------------------------


def call_function(kind: type, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A function of NumPy, for arguments of which some are of the writable ``kind``."""
    write = _writing.get(function)
    if write is not None and isinstance(_argument(write, args, kwargs, 0), kind):
        return write(*args, **kwargs)
    given = _bound(function, args, kwargs)
    if isinstance(given.get("out"), kind):
        return _into(given.pop("out"), function.__name__, _of_jax(function), given)
    return np.empty(0).__array_function__(function, (), args, kwargs)


def _argument(function: Any, args: Sequence[Any], kwargs: dict[str, Any], n: int) -> Any:
    return args[n] if len(args) > n else kwargs.get(list(inspect.signature(function).parameters)[n])


def _bound(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as far as NumPy says what their names are."""
    try:
        signature = inspect.signature(function)
        return dict(signature.bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(i): x for i, x in enumerate(args)}, **kwargs}


def _of_jax(function: Any) -> Any:
    module: Any = jnp
    for name in function.__module__.split(".")[1:]:
        module = getattr(module, name, None)
    return getattr(module, function.__name__, None)


def _into(out: Any, name: str, function: Any, given: dict[str, Any]) -> Any:
    if function is None:
        raise _unknown(name)
    names = inspect.signature(function).parameters
    positional = [x for key, x in given.items() if key.isdigit()]
    spread = [*given.pop("args", ()), *given.pop("operands", ())]
    given = {**given.pop("kwargs", {}), **given}
    given = {key: _as_array(x) for key, x in given.items()}
    options = {key: x for key, x in given.items() if not key.isdigit()}
    first = [options.pop(key) for key in list(options) if key not in names and not positional]
    result = function(*positional, *first, *spread, **options)
    _store(out, result, name, "same_kind")
    return out


def _as_array(x: Any) -> Any:
    """A list of numbers as an array, which the functions of JAX want."""
    leaves = jax.tree.leaves(x) if isinstance(x, list) else ()
    return np.asarray(x) if leaves and all(isinstance(n, (int, float)) for n in leaves) else x


def _store(out: Any, result: Any, name: str, casting: Any, where: Any = True) -> None:
    """Writes the result of a function into the array that was given as its ``out``."""
    result = jnp.asarray(result)
    if not np.can_cast(result.dtype, out.dtype, casting):
        raise TypeError(
            f"Cannot cast output of {name!r} from {result.dtype} to {out.dtype} with casting rule"
            f" {casting!r}"
        )
    if where is not True:
        result = jnp.where(where, result, out)
    if result.shape != out.shape:
        raise ValueError(
            f"non-broadcastable output operand with shape {out.shape} doesn't match the broadcast"
            f" shape {result.shape}"
        )
    out[...] = result


def _unknown(name: str) -> Exception:
    return TypeError(
        message(
            f"`jax.numpy` has no function for numpy's {name!r}, so it cannot write into a writable"
            " array.",
            fix=f"""
            x[...] = {name}(...)        # compute the values, and write them
            """,
            used=_jax.user_location(),
        )
    )


def _copyto(dst: Any, src: Any, casting: Any = "same_kind", where: Any = True) -> None:
    dtype = getattr(src, "dtype", None) or np.asarray(src).dtype
    if not isinstance(src, (bool, int)) and not np.can_cast(dtype, dst.dtype, casting):
        raise TypeError(
            f"Cannot cast array data from {dtype} to {dst.dtype} according to the rule {casting!r}"
        )
    dst[...] = src if where is True else jnp.where(where, _fitting(src, dst), dst)


def _fitting(src: Any, dst: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(src).astype(dst.dtype), dst.shape)


def _putmask(a: Any, mask: Any, values: Any) -> None:
    mask, values = jnp.asarray(mask, bool), jnp.asarray(values).ravel()
    if mask.size != a.size:
        raise ValueError("putmask: mask and data must be the same size")
    if values.size and a.size:
        chosen = values[np.arange(a.size) % values.size].reshape(a.shape).astype(a.dtype)
        a[...] = jnp.where(mask.reshape(a.shape), chosen, a)


def _place(arr: Any, mask: Any, vals: Any) -> None:
    mask, vals = jnp.asarray(mask, bool).ravel(), jnp.asarray(vals).ravel()
    if mask.size != arr.size:
        raise ValueError("place: mask and data must be the same size")
    if not vals.size:
        raise ValueError("Cannot insert from an empty array!")
    if arr.size:
        chosen = vals[(jnp.cumsum(mask) - 1) % vals.size].reshape(arr.shape).astype(arr.dtype)
        arr[...] = jnp.where(mask.reshape(arr.shape), chosen, arr)


def _put_along_axis(arr: Any, indices: Any, values: Any, axis: Any = -1) -> None:
    if axis is None:
        arr, axis = arr.reshape(-1), 0
    indices = indices if hasattr(indices, "dtype") else np.asarray(indices)
    if indices.ndim != arr.ndim:
        raise ValueError("`indices` and `arr` must have the same number of dimensions")
    axis = range(arr.ndim)[axis]
    index = list(np.ix_(*(np.arange(n) for n in arr.shape)))
    index[axis] = indices
    arr[tuple(index)] = values


_writing: dict[Any, Callable[..., Any]] = {
    np.copyto: _copyto,
    np.put_along_axis: _put_along_axis,
    np.putmask: _putmask,
    np.place: _place,
}


# -- Universal functions (`__array_ufunc__`) -------------------------------------------------

# What Python calls for ``numpy_array + x``, where NumPy calls ``np.add(numpy_array, x)`` instead.
_REFLECTED = {
    "add": "__radd__", "subtract": "__rsub__", "multiply": "__rmul__", "divide": "__rtruediv__",
    "floor_divide": "__rfloordiv__", "remainder": "__rmod__", "divmod": "__rdivmod__",
    "power": "__rpow__", "matmul": "__rmatmul__", "left_shift": "__rlshift__",
    "right_shift": "__rrshift__", "bitwise_and": "__rand__", "bitwise_or": "__ror__",
    "bitwise_xor": "__rxor__", "less": "__gt__", "less_equal": "__ge__", "greater": "__lt__",
    "greater_equal": "__le__", "equal": "__eq__", "not_equal": "__ne__",
}  # fmt: skip


def call_ufunc(
    kind: type, ufunc: Any, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """A universal function of NumPy, for operands of which some are of the writable ``kind``."""
    outs = kwargs.get("out", ())
    if method == "at" and isinstance(inputs[0], kind):
        target, index, *operands = inputs
        return _at(target, ufunc.__name__, index, operands)
    if any(isinstance(out, kind) for out in outs):
        return _call_into(ufunc, method, inputs, kwargs)
    reflected = _REFLECTED.get(ufunc.__name__)
    if reflected and method == "__call__" and _is_operator(kind, inputs, kwargs):
        return getattr(inputs[1], reflected)(inputs[0])
    values = [np.asarray(x) if isinstance(x, kind) else x for x in inputs]
    options = {key: np.asarray(x) if isinstance(x, kind) else x for key, x in kwargs.items()}
    return getattr(ufunc, method)(*values, **options)


def _is_operator(kind: type, inputs: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether Python asks for ``a + x`` or ``a += x``, where ``a`` is of NumPy.

    ``np.add(a, x)`` looks the same, and gives the same but for the type. ``np.add(a, x, out=a)``
    looks like ``a += x``, and differs: so there the instruction of the program decides.
    """
    if len(inputs) != 2 or isinstance(inputs[0], kind) or not isinstance(inputs[1], kind):
        return False
    if not kwargs:
        return True
    (out, *others) = kwargs.get("out", (None,))
    is_assignment = list(kwargs) == ["out"] and not others and out is inputs[0]
    return is_assignment and _jax.is_operator_instruction(3)


def _at(target: Any, name: str, index: Any, operands: Sequence[Any]) -> None:
    value = jnp.asarray(target.copy())
    dtype = jnp.result_type(value, *operands)
    if not np.can_cast(dtype, target.dtype, "same_kind"):
        raise TypeError(f"Cannot cast ufunc {name!r} output from {dtype} to {target.dtype}")
    apply = getattr(value.at[target._plain_index(index)], _AT.get(name, ""), None)
    of_jax = getattr(getattr(jnp, name, None), "at", None)
    if apply is not None:
        target[...] = apply(*operands)
    elif of_jax is not None:
        target[...] = of_jax(value, target._plain_index(index), *operands, inplace=False)
    else:
        raise _unknown(f"np.{name}.at")


_AT = {
    "add": "add", "subtract": "subtract", "multiply": "multiply", "divide": "divide",
    "power": "power", "maximum": "max", "minimum": "min",
}  # fmt: skip


def _call_into(ufunc: Any, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    options = dict(kwargs)
    outs = options.pop("out")
    casting, dtype = options.pop("casting", "same_kind"), options.pop("dtype", None)
    where = options.pop("where", True) if method == "__call__" else True
    for ignored in ("order", "subok"):
        options.pop(ignored, None)
    function = getattr(jnp, ufunc.__name__, None)
    if method != "__call__":
        function = getattr(function, method, None)
    if function is None:
        raise _unknown(ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}")
    inputs = inputs if dtype is None else [jnp.asarray(x, dtype) for x in inputs]
    results = function(*inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    found = []
    for out, result in zip(outs, results, strict=True):
        if out is None:
            found.append(result)
        elif isinstance(out, np.ndarray):
            np.copyto(out, np.asarray(result), casting, where=np.asarray(where))
            found.append(out)
        else:
            _store(out, result, ufunc.__name__, casting, where)
            found.append(out)
    return found[0] if len(found) == 1 else tuple(found)
