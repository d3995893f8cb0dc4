"""Ensembles: n members of one network side by side, each with its own parameters.

    several = jaxstate.ensemble(net, 5)
    params = several.init(key, x)        # {"members": ...}, each array with a leading axis of 5
    ys = several.apply(params, x)        # the results of all members, on a leading axis

A `jax.vmap` runs the network's ``init`` and ``apply`` over the members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from jaxstate._src.params.copies import Copies, check_block
from jaxstate._src.params.parametrized import Parametrized
from jaxstate.errors import called_as

__all__ = ["Ensemble", "ensemble"]

P = ParamSpec("P")
R = TypeVar("R")


class Ensemble(Copies[P, R]):
    """Members of one network: see `ensemble`."""

    copies = "members"

    def __init__(
        self,
        block: Parametrized[P, R],
        n: int,
        in_axes: Any = None,
        axis_name: Any = None,
        name: str = "ensemble",
        axis: str | None = None,
    ) -> None:
        self._in_axes = in_axes
        self._axis_name = axis_name
        super().__init__(block, n, name, axis)

    def _each(self, run: Callable[..., Any], copies: Any, args: tuple[Any, ...]) -> Any:
        axes = self._axes(args)
        mapped = {i: x for i, x in enumerate(args) if axes[i] is not None}

        def member(copy: Any, own: dict[int, Any]) -> Any:
            return run(copy, tuple([own.get(i, x) for i, x in enumerate(args)]))

        in_axes = (0, {i: axes[i] for i in mapped})
        over_members = jax.vmap(member, in_axes, axis_name=self._axis_name, axis_size=self.n)
        return over_members(copies, mapped)

    def _axes(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """For each argument, the axis over which the members take their own."""
        axes = self._in_axes
        if axes is None or isinstance(axes, int):
            return (axes,) * len(args)
        if not isinstance(axes, (tuple, list)):
            raise TypeError(
                f"{self!r} has in_axes={axes!r}, and wants None, an integer, or a tuple with one of"
                " these, or a tree of them, for each positional argument."
            )
        if len(axes) != len(args):
            raise ValueError(
                f"{self!r} has in_axes={axes!r}, one for each argument, and was called with"
                f" {len(args)} positional arguments."
            )
        return tuple(axes)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        members, variables = self._entries(args, kwargs)
        state = None if variables is None else variables.value
        out, state = self._each(
            lambda member, args: self._run(member, args, kwargs), (members, state), args
        )
        self._write(variables, state)
        return out


@called_as("several = jaxstate.ensemble(net, 5)")
def ensemble(
    net: Parametrized[P, R],
    n: int,
    in_axes: Any = None,
    *,
    axis_name: Any = None,
    name: str = "ensemble",
    axis: str | None = None,
) -> Ensemble[P, R]:
    """``n`` members of ``net`` side by side, each with parameters of its own.

    Args:
      net: a parametrized object.
      n: the number of members, at least 1.
      in_axes: which axis of the positional arguments holds what each member gets, as for
        `jax.vmap`: None for arguments that all members share, an integer for all, or a tuple
        with one of these, or a tree of them, for each argument. Keyword arguments are shared.
      axis_name: of the members, for collectives between them, as for `jax.vmap`.
      name: of the module.
      axis: the name of the leading axis in the metadata of the members: it is put in front of
        ``metadata["axes"]``.

    Returns:
      An `Ensemble`, which is a `Parametrized` object. It returns what the members return, on a
      leading axis. Its parameters are ``{"members": tree}``, where tree is that of ``net.init``
      with a leading axis of length ``n`` on each array. Member i is initialized with
      ``fold_in(k, i)``, where k is the key of the parameter "members" (see `param`).

      The variables of ``net`` are ``{"variables": tree}``, likewise with a leading axis: each
      member writes its own, and needs no ``reduce``. Draws are those of lanes of a ``vmap``: see
      `rng_stream`.

      Whatever ``net`` calls belongs to it: a module that is also used elsewhere has parameters of
      its own in each member.

    Raises:
      TypeError: if ``net`` is not a parametrized object.
      ValueError: if ``n`` is less than 1, or ``in_axes`` does not fit the arguments.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> @jaxstate.parametrized
    ... def net(x):
    ...     return x @ jaxstate.param("w", jax.nn.initializers.normal(), (3,))
    >>> several = jaxstate.ensemble(net, 5)
    >>> params = several.init(jax.random.key(0), jnp.ones((2, 3)))
    >>> jax.tree.map(jnp.shape, params)
    {'members': {'w': (5, 3)}}
    >>> several.apply(params, jnp.ones((2, 3))).shape
    (5, 2)
    >>> jax.tree.map(jnp.shape, several.unstack(params)[0])
    {'w': (3,)}
    """
    check_block(net, n, "ensemble", "members")
    return Ensemble(net, n, in_axes, axis_name, name, axis)
