"""Stacks: n copies of a block in a loop, each with its own parameters.

    deep = jaxstate.stack(block, 48)
    params = deep.init(key, x)       # {"layers": ...}, each array with a leading axis of 48
    y = deep.apply(params, x)        # a scan: block is traced once, however deep the stack is

A `jax.lax.scan` runs the block's ``apply`` over the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never, ParamSpec, TypeVar

import jax

from jaxstate._src import _jax
from jaxstate._src.core.specs import spec_of
from jaxstate._src.params.copies import Copies, check_block, shape_of
from jaxstate._src.params.parametrized import Parametrized
from jaxstate.errors import called_as, message, nearest

__all__ = ["Stack", "stack"]

P = ParamSpec("P")
R = TypeVar("R")


class Stack(Copies[P, R]):
    """A stack of blocks: see `stack`."""

    copies = "layers"

    def __init__(
        self,
        block: Parametrized[P, R],
        n: int,
        checkpoint: bool | Callable[..., Any] = False,
        unroll: int = 1,
        name: str = "stack",
        axis: str | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._unroll = unroll
        super().__init__(block, n, name, axis)

    def _each(self, run: Callable[..., Any], copies: Any, args: Any) -> Any:
        return jax.lax.map(lambda copy: run(copy, args), copies)

    def _forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        layers, variables = self._entries((shape_of(x), *args), kwargs)

        given, made = spec_of(shape_of(x)), []

        def turn(x: Any, layer: Any) -> Any:
            out = self._run(layer, (x, *args), kwargs)
            made[:] = [spec_of(shape_of(out[0]))]
            return out

        if self._checkpoint:
            policy = None if self._checkpoint is True else self._checkpoint
            turn = jax.checkpoint(turn, policy=policy)  # type: ignore[arg-type]
        state = None if variables is None else variables.value
        try:
            x, state = jax.lax.scan(turn, x, (layers, state), length=self.n, unroll=self._unroll)
        except TypeError:
            if made and not made[0].strong().same(given.strong()):
                raise self._another_shape(given, made[0]) from None
            raise
        self._write(variables, state)
        return x

    def _another_shape(self, given: Any, made: Any) -> Exception:
        name = self.block.name
        return TypeError(
            message(
                f"The block {name!r} of a stack makes {made} of {given}, and what comes out of a"
                " layer goes into the next one.",
                fix=f"""
                x = first(x)                              # what changes the shape is no layer
                x = jaxstate.stack({name}, {self.n})(x)   # makes of x what has the type of x
                """,
                used=_jax.user_location(),
            )
        )


@called_as("deep = jaxstate.stack(block, 3)")
def stack(
    block: Parametrized[P, R],
    n: int,
    *,
    checkpoint: bool | Callable[..., Any] = False,
    unroll: int = 1,
    name: str = "stack",
    axis: str | None = None,
    **unknown: Never,
) -> Stack[P, R]:
    """``block`` applied ``n`` times, each time with parameters of its own.

    Args:
      block: a parametrized object, called as ``block(x, *args, **kwargs)``. It returns a value of
        the structure, shapes and dtypes of ``x``, which the next layer gets. All layers get the
        same further arguments.
      n: the number of layers, at least 1.
      checkpoint: whether derivatives recompute what a layer computed instead of keeping it, or a
        policy that says what is kept (`jax.checkpoint_policies`).
      unroll: as for `jax.lax.scan`.
      name: of the module.
      axis: the name of the leading axis in the metadata of the layers: it is put in front of
        ``metadata["axes"]``.

    Returns:
      A `Stack`, which is a `Parametrized` object. Its parameters are ``{"layers": tree}``, where
      tree is that of ``block.init`` with a leading axis of length ``n`` on each array. Layer i
      is initialized with ``fold_in(k, i)``, where k is the key of the parameter "layers" (see
      `param`), so its values depend on the key, the path and i. Tracing and compiling take as
      long as for one layer.

      The variables of ``block`` are ``{"variables": tree}``, likewise with a leading axis, and with
      keys from that of the variable "variables". Lanes of
      a ``vmap`` around the stack cannot write different values into them, with ``reduce`` either.

      Whatever ``block`` calls belongs to it: a module that is also used elsewhere, or by another
      layer, has parameters of its own in each layer. Draws are those of a Python loop over the
      layers.

    Raises:
      TypeError: if ``block`` is not a parametrized object, ``checkpoint`` none of these, or an
        option is not known.
      ValueError: if ``n`` is less than 1.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def block(x):
    ...     w = jaxstate.param("w", jax.nn.initializers.normal(), (x.shape[-1], x.shape[-1]))
    ...     return x + jnp.tanh(x @ w)
    >>> deep = jaxstate.stack(block, 5)
    >>> params = deep.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> jax.tree.map(jnp.shape, params)
    {'layers': {'w': (5, 3, 3)}}
    >>> deep.apply(params, jnp.ones((2, 3))).shape
    (2, 3)
    """
    if unknown:
        raise _unknown_option(next(iter(unknown)))
    check_block(block, n, "stack", "layers")
    if not isinstance(checkpoint, bool) and not callable(checkpoint):
        raise TypeError(
            f"stack: checkpoint is True, False or a policy, not {checkpoint!r}.\n"
            "To mend it:\n    checkpoint=jax.checkpoint_policies.dots_saveable"
        )
    return Stack(block, n, checkpoint, unroll, name, axis)


def _unknown_option(name: str) -> Exception:
    options = ("checkpoint", "unroll", "name", "axis")
    meant = {"remat": "checkpoint", "length": "n"}.get(name) or nearest(name, options)
    return TypeError(
        message(
            f"stack has no option {name!r}."
            f"{f' Did you mean {meant!r}?' if meant else ''} It has {', '.join(options)}.",
            fix=f"""
            jaxstate.stack(block, n, {meant or "checkpoint"}=...)
            jaxstate.stack(block, n)(x, {name}=...)     # or is it for the block?
            """,
            used=_jax.user_location(),
        )
    )
