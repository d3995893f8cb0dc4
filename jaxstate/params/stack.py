"""Stacks: n copies of a block in a loop, each with its own parameters.

    deep = jaxstate.stack(block, 48)
    params = deep.init(key, x)       # {"layers": ...}, each array with a leading axis of 48
    y = deep.apply(params, x)        # a scan: block is traced once, however deep the stack is

The stacked parameters are one parameter of the stack. Its initial value is made by the block's own
``init`` in a loop over layers, and a `jax.lax.scan` runs the block's ``apply`` over the layers. So
it is with variables: they are one variable of the stack, made in a loop over the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate import _jax
from jaxstate.params.entries import innermost_store, level_entered
from jaxstate.params.parametrized import Parametrized, param
from jaxstate.params.paths import PathElement
from jaxstate.params.variables import Variable, variable

__all__ = ["Stack", "stack"]


class Stack(Parametrized):
    """A stack of blocks: see `stack`."""

    def __init__(
        self,
        block: Parametrized,
        n: int,
        checkpoint: bool | Callable[..., Any] = False,
        unroll: int = 1,
        name: str | None = None,
    ) -> None:
        self.block = block
        self.n = n
        self._checkpoint = checkpoint
        self._unroll = unroll
        super().__init__(self._forward, name or "stack")

    def _forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        layers, variables = self._entries(jax.tree.map(_shape, x), *args, **kwargs)
        store = innermost_store()
        writes = variables is not None and store is not None and store.writable

        def turn(x: Any, layer: Any) -> Any:
            params, state = layer
            with _in_layers():
                if writes:
                    return self.block.apply_with_state(params, state, x, *args, **kwargs)
                return self.block.apply(params, x, *args, state=state, **kwargs), None

        if self._checkpoint:
            policy = None if self._checkpoint is True else self._checkpoint
            turn = jax.checkpoint(turn, policy=policy)  # type: ignore[arg-type]
        state = None if variables is None else variables.value
        x, state = jax.lax.scan(turn, x, (layers, state), length=self.n, unroll=self._unroll)
        if variables is not None and writes:
            variables.value = state
        return x

    def _entries(self, *args: Any, **kwargs: Any) -> tuple[Any, Variable | None]:
        """The parameters of all layers, and their variables if the block has any."""
        has_variables = False

        def initial_params(key: Any) -> Any:
            def layer(i: Any) -> Any:
                nonlocal has_variables
                layer_key = jax.random.fold_in(key, i)
                with _in_layers():
                    params, state = self.block.init_with_state(layer_key, *args, **kwargs)
                has_variables = bool(state)
                return params

            return jax.lax.map(layer, jnp.arange(self.n))

        def initial_state() -> Any:
            def layer(turn: Any) -> Any:
                _, params = turn
                key = {"params": jax.random.key(0)}  # makes nothing: every parameter is given
                given = {self.block: params} if params else None
                with _in_layers():
                    return self.block.init_with_state(key, *args, reuse=given, **kwargs)[1]

            return jax.lax.map(layer, (jnp.arange(self.n), layers))

        layers = param("layers", initial_params)  # traces the block, under apply too
        return layers, variable("variables", initial_state) if has_variables else None

    def unstack(self, params: Mapping[str, Any]) -> list[Any]:
        """The parameters of each block.

        Args:
          params: of the stack, as ``init`` makes them.

        Returns:
          A list of n trees, each as ``block.init`` makes it.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> @jaxstate.parametrized
        ... def block(x):
        ...     return x + jaxstate.param("b", jax.nn.initializers.zeros, ())
        >>> deep = jaxstate.stack(block, 2)
        >>> layers = deep.unstack({"layers": {"b": jnp.array([1.0, 2.0])}})
        >>> [float(layer["b"]) for layer in layers]
        [1.0, 2.0]
        >>> deep.restack(layers)
        {'layers': {'b': Array([1., 2.], dtype=float32)}}
        """
        return [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(self.n)]

    def restack(self, layers: Iterable[Any]) -> dict[str, Any]:
        """The parameters of the stack, from those of each block.

        Args:
          layers: n trees, each as ``block.init`` makes it.

        Returns:
          What ``init`` of the stack makes. See `unstack` for an example.

        Raises:
          ValueError: if there are not n of them.
        """
        layers = list(layers)
        if len(layers) != self.n:
            raise ValueError(f"{self!r} has {self.n} layers, and was given {len(layers)}.")
        return {"layers": jax.tree.map(lambda *ps: jnp.stack(ps), *layers)}

    def __repr__(self) -> str:
        return f"<stack of {self.n} times {self.block.name}>"


def stack(
    block: Parametrized,
    n: int,
    *,
    checkpoint: bool | Callable[..., Any] = False,
    unroll: int = 1,
    name: str = "stack",
) -> Stack:
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

    Returns:
      A `Stack`, which is a `Parametrized` object. Its parameters are ``{"layers": tree}``, where
      tree is that of ``block.init`` with a leading axis of length ``n`` on each array. Layer i
      is initialized with ``fold_in(k, i)``, where k is the key of the parameter "layers" (see
      `param`), so its values depend on the key, the path and i. Tracing and compiling take as
      long as for one layer.

      The variables of ``block`` are ``{"variables": tree}``, likewise with a leading axis. Lanes of
      a ``vmap`` around the stack cannot write different values into them, with ``reduce`` either.

      Whatever ``block`` calls belongs to it: a module that is also used elsewhere, or by another
      layer, has parameters of its own in each layer. Draws are those of a Python loop over the
      layers.

    Raises:
      TypeError: if ``block`` is not a parametrized object.
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
    if not isinstance(block, Parametrized):
        raise TypeError(
            f"stack wants a parametrized object, and was given {block!r}.\n"
            "To mend it:\n    jaxstate.stack(jaxstate.parametrized(fn), n)"
        )
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"stack: the number of layers is an integer from 1, not {n!r}.")
    return Stack(block, n, checkpoint, unroll, name)


def _in_layers() -> Any:
    """A context in which the program is in the layers, as far as its path goes."""
    return level_entered(None, PathElement("layers", None))


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    aval = _jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
