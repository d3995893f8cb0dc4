"""Where did the NaN come from? The line of the first operation that made one.

    y, report = locate_nan(f)(x)
    print(report)       # model.py:17 (normalize): log made a NaN

It looks at every operation that runs, in loops and branches too, compiled or not, and names the
first one, in the order of the program. Run it for an example::

    python examples/nan_locator.py

How it works: each operation, with the line it was written in, has a number, which is known while
the program is traced. Whether it has made a NaN is known when it runs. So the state is one integer,
the number of the first operation that did; the table of numbers and lines stays with the trace.

A function of JAX, such as ``jnp.linalg.norm``, has no line of the user in it. What counts is the
line that called it: a static part of the state, so that one jitted function that is called from two
lines is two.
"""

from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from jaxstate.extend import StatefulTrace, new_trace

# -- The trace -------------------------------------------------------------------------------


class Operation(NamedTuple):
    """An operation as the program has it.

    Attributes:
      name: of the primitive.
      line: ``file:line:column (function)``.
      made: whether it made a NaN out of operands without; else it was handed on.
    """

    name: str
    line: str
    made: bool

    def __str__(self):
        what = "made a NaN" if self.made else "was given a NaN that no operation before it made"
        return f"{self.line}: {self.name} {what}"


class LocateNan(StatefulTrace):
    """The state is a dict of ``first``, an int32: 0, or the number of the first operation with a
    NaN; and ``line``, a string: the line that called the function that is running.

    Attributes:
      operations: the operations by their numbers, from 1 on.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def process_primitive(self, primitive, args, params):
        return self.watch(primitive, args, params)

    def watch(self, primitive, args, params):
        out = super().process_primitive(primitive, args, params)
        outs = [x for x in (out if primitive.multiple_results else [out]) if may_be_nan(x)]
        if outs:
            given = has_nan([x for x in args if may_be_nan(x)])
            number = jnp.where(
                given, self.number(primitive.name, False), self.number(primitive.name, True)
            )
            number = jnp.where(has_nan(outs), number, 0)
            first = self.state["first"]
            self.state["first"] = jnp.where(first == 0, number, first)
        return out

    def process_higher_order(self, primitive, args, params):
        if primitive.name == "custom_linear_solve":  # it calls its functions as often as it likes
            return self.watch(primitive, args, params)
        with self.called_from_here():
            return super().process_higher_order(primitive, args, params)

    def process_custom_jvp_call(self, *args, **params):
        with self.called_from_here():
            return super().process_custom_jvp_call(*args, **params)

    def process_custom_vjp_call(self, *args, **params):
        with self.called_from_here():
            return super().process_custom_vjp_call(*args, **params)

    @contextmanager
    def called_from_here(self):
        outside = self.state["line"]
        self.state["line"] = self.line()
        try:
            yield
        finally:
            self.state["line"] = outside

    def line(self):
        """The innermost line of the user, in the function that is running or that called it."""
        frames = source_info_util.summarize(source_info_util.current(), num_frames=8).splitlines()
        mine = f"({type(self).__name__}."
        return next((f for f in reversed(frames) if mine not in f), self.state["line"])

    def number(self, name, made):
        self.operations.append(Operation(name, self.line(), made))
        return jnp.int32(len(self.operations))

    def report(self):
        """The first `Operation` with a NaN, or None. It needs a state that is known."""
        number = int(self.state["first"])
        return self.operations[number - 1] if number else None


def may_be_nan(x):
    return jnp.issubdtype(getattr(x, "dtype", None), jnp.inexact)


def has_nan(arrays):
    return jnp.any(jnp.array([jnp.isnan(x).any() for x in arrays], bool))


def locate_nan(f):
    """A function with the arguments of ``f`` that returns the result of ``f``, and the first
    `Operation` with a NaN or None. It is not for use inside jit: jit ``f``."""

    def located(*args, **kwargs):
        with new_trace(LocateNan, state={"first": jnp.int32(0), "line": ""}) as trace:
            out = f(*args, **kwargs)
        return out, trace.report()

    return located


# -- An example ------------------------------------------------------------------------------


def entropy(p):
    return -jnp.sum(p * jnp.log(p))


@jax.jit
def sharpened(p):
    """Squares a distribution again and again; a probability that has come to 0 ends it badly."""

    def step(p, _):
        p = jax.lax.cond(p.max() < 0.9, lambda p: p**2 / jnp.sum(p**2), lambda p: p**4, p)
        return p, entropy(p)

    return jax.lax.scan(step, p, length=8)


def main():
    (_, entropies), report = locate_nan(sharpened)(jnp.array([0.2, 0.3, 0.5]))
    print("entropies:", entropies)
    print(report)


if __name__ == "__main__":
    main()
