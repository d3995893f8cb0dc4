"""In-place functions: ``x[i] = y`` inside, pure from outside.

`inplace` runs a function so that every array in it is a writable array (`arrays.array`).
Arguments are copied in, results are copied out, so the caller sees a pure function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import Activation, activated, activation, is_array
from jaxstate._src.arrays.array import fresh, loose, snapshot
from jaxstate._src.arrays.boundaries import objects
from jaxstate._src.arrays.masked import MaskedElements
from jaxstate._src.arrays.trace import InplaceTrace
from jaxstate.errors import called_as, check_runs_when_called

__all__ = ["array", "inplace"]

_jax.wrap_refused_assignments(
    "With jaxstate, arrays can be written in place in a function under jaxstate.inplace: those it"
    " is given, and those it makes. An array from elsewhere becomes one with jaxstate.array.\n"
    "To mend it:\n"
    "    @jaxstate.inplace        # above the function that writes\n"
    "    x = jaxstate.array(x)    # or for one array, where the function is that already"
)

P = ParamSpec("P")
R = TypeVar("R")


@called_as("y = jaxstate.inplace(fun)(x)      # or @jaxstate.inplace above a function")
def inplace(fun: Callable[P, R]) -> Callable[P, R]:
    """Makes a function in which arrays can be written, as in NumPy.

    Inside, ``x[i] = y``, ``x[a:b] += y``, ``x.sort()`` and the like work on every array: on
    arguments, on results of `jax.numpy`, on what loop bodies and jitted functions are given or
    make.
    Slices, transposes and reshapes are views. A write is seen by every later read, also if it
    happens inside ``jit``, ``scan``, ``cond``, ``grad`` ... and the array is reached by closure.

    Args:
      fun: a function of any pytrees.

    Returns:
      A pure function: its arguments (arrays of NumPy included) are never modified, its results are
      ordinary JAX arrays.

    Raises:
      IndexError: for an index that is out of bounds and known when the program is traced (others
        are dropped, as by ``x.at[i].set(y)``).
      LaneWriteError: if lanes of a vmap write different values into an array from outside.
      ClosedStateError: if one of its arrays is used after it has ended.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.inplace
    ... def running_sum(x):
    ...     def add(i, _):
    ...         x[i] += x[i - 1]
    ...     jax.lax.fori_loop(1, len(x), add, None)
    ...     return x
    >>> running_sum(jnp.arange(5))
    Array([ 0,  1,  3,  6, 10], dtype=int32)
    """

    check_runs_when_called(fun, "inplace")

    @functools.wraps(fun)
    def pure(*args: P.args, **kwargs: P.kwargs) -> R:
        outside, inside = _jax.current_trace(), activation()
        is_staged = isinstance(outside, _jax.StagingTrace)
        values = jax.tree.map(snapshot, (args, kwargs), is_leaf=objects.is_object)
        call = Activation(getattr(fun, "__qualname__", repr(fun)))
        here = outside if is_staged else InplaceTrace(outside, call)
        with activated(call), _jax.set_current_trace(here), objects.writable(inside):
            inner_args, inner_kwargs = jax.tree.map(_writable, values, is_leaf=objects.is_object)
            try:
                results = fun(*inner_args, **inner_kwargs)  # pyright: ignore[reportCallIssue]
            except Exception as error:
                _note_numpy(error)
                raise
            taken = snapshot if inside is not None else _handed_out
            results = jax.tree.map(taken, results, is_leaf=objects.is_object)
        if inside is None:
            return results
        return jax.tree.map(_writable, results, is_leaf=objects.is_object)

    return pure


_NUMPY = """\
NumPy cannot hold, compute with, or be indexed by what JAX has no numbers for yet (under jit, in a
loop).
To mend it:
    x = jnp.zeros(n)         # for np.zeros(n)
    x = jaxstate.array(x)    # of an array of NumPy
    y = jnp.sort(x)          # for a function of NumPy"""


_IF = """\
A traced value decides nothing in Python.
To mend it:
    x[i] = jnp.where(condition, a, b)     # for an if that chooses a value
    smaller = jnp.minimum(a, b)           # for min(a, b)
    jax.lax.cond(condition, f, g)         # for one that writes: f and g may write arrays
    jax.lax.while_loop(test, body, None)  # for while; both find the arrays around them"""


_INDEX = """\
A traced value is no number of Python.
To mend it:
    jax.lax.fori_loop(0, n, body, None)   # for a range(n); the body finds the arrays around it
    x[jax.ds(i, 3)]                       # for x[i : i + 3]
    y = jnp.asarray(table)[i]             # for a list or tuple"""


_NUMBER = """\
A traced value is no number of Python.
To mend it:
    y = jnp.sqrt(x)          # for math.sqrt(x)
    y = x.astype(float)      # for float(x)"""


def _note_numpy(error: Exception) -> None:
    """Says what JAX has for what a program in the style of NumPy has tried with a tracer."""
    is_element = isinstance(error, ValueError) and isinstance(
        error.__cause__, jax.errors.ConcretizationTypeError
    )
    if is_element or isinstance(error, jax.errors.TracerArrayConversionError):
        note = _NUMPY
    elif isinstance(error, jax.errors.TracerBoolConversionError):
        note = _IF
    elif isinstance(error, jax.errors.TracerIntegerConversionError):
        note = _INDEX
    elif type(error) is jax.errors.ConcretizationTypeError:
        note = _NUMBER
    else:
        return
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


@called_as("x = jaxstate.array([1.0, 2.0], dtype=jnp.float32)")
def array(x: Any, dtype: Any = None) -> jax.Array:
    """Makes a writable array, in an `inplace` function or outside of one.

    Args:
      x: anything that `jax.numpy.array` takes.
      dtype: of the array; that of ``x`` by default.

    Returns:
      A new array with the values of ``x``. It lives as long as the object does, under the
      transformation in which it was made.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> seen = jaxstate.array(jnp.zeros(3))
    >>> @jax.jit
    ... def visit(i):
    ...     seen[i] += 1
    >>> visit(2)
    >>> visit(2)
    >>> seen
    Array([0., 0., 2.], dtype=float32)
    """
    x = x.copy() if isinstance(x, np.ndarray) else snapshot(x)  # a jaxpr keeps what it is given
    value = jnp.array(x, dtype=dtype)
    array = loose(jax.lax.convert_element_type(value, value.dtype))
    if activation() is None:
        array.become_slot()  # state is open from now on: what JAX transforms may use it
    return array


def _handed_out(leaf: Any) -> Any:
    """A result, for a program that does not write arrays."""
    if isinstance(leaf, MaskedElements):
        return leaf.as_array()  # JAX's error
    return snapshot(leaf)


def _writable(leaf: Any) -> Any:
    """A writable array of its own for every array."""
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        leaf = jnp.asarray(leaf.copy())  # a jaxpr keeps it
    return fresh(leaf) if is_array(leaf) else leaf
