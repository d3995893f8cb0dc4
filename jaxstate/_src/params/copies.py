"""What stacks and ensembles have in common: n copies of a block, each with its own parameters.

The parameters of all copies are one parameter, whose arrays have a leading axis. Its initial value
is made by the block's own ``init``, once for each copy. So it is with variables: they are one
variable.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core.specs import contrast, names_of, spec_of
from jaxstate._src.params.entries import innermost_store, level_entered
from jaxstate._src.params.metadata import of_copies
from jaxstate._src.params.param import param
from jaxstate._src.params.parametrized import Parametrized
from jaxstate._src.params.paths import PathElement
from jaxstate._src.params.variables import Variable, variable

__all__ = ["Copies", "check_block", "shape_of"]

P = ParamSpec("P")
R = TypeVar("R")


class Copies(Parametrized[P, R]):
    """Copies of a block.

    Attributes:
      copies: what they are called: the name of their parameters.
      block: a parametrized object.
      n: how many.
      axis: the name of the leading axis in metadata.
    """

    copies: str

    def __init__(self, block: Parametrized[P, R], n: int, name: str, axis: str | None) -> None:
        self.block = block
        self.n = operator.index(n)
        self.axis = axis
        super().__init__(self._forward, name)
        functools.update_wrapper(self, block, updated=())  # it is called as the block is
        self.__name__ = self.__qualname__ = name
        self._taken = block._taken

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _each(self, run: Callable[..., Any], copies: Any, args: Any) -> Any:
        """``run(copy, its_args)`` for each copy, stacked; ``copies`` has a leading axis."""
        raise NotImplementedError

    def _entries(self, args: Any, kwargs: Any) -> tuple[Any, Variable | None]:
        """The parameters of all copies, and their variables if the block has any."""
        has_variables = False

        def initial_params(key: Any) -> Any:
            def one(i: Any, args: Any) -> Any:
                nonlocal has_variables
                own_key = jax.random.fold_in(key, i)
                with self._in_copies():
                    params, state = self.block.init_with_state(own_key, *args, **kwargs)
                has_variables = bool(state)
                return params

            return self._each(one, jnp.arange(self.n), args)

        def initial_state(key: Any) -> Any:
            def one(copy: Any, args: Any) -> Any:
                i, params = copy
                keys = {"params": jax.random.fold_in(key, i)}
                given = {self.block: params} if params else None
                with self._in_copies():
                    return self.block.init_with_state(keys, *args, reuse=given, **kwargs)[1]

            return self._each(one, (jnp.arange(self.n), params), args)

        # For messages: nobody has written these initializers.
        kind = type(self).__name__.lower()
        for initial in (initial_params, initial_state):
            initial.in_words = f"the block {self.block.name!r} of the {kind}"  # type: ignore[attr-defined]
        with self._in_copies():
            facts = of_copies(self.block, self.axis, lambda: self._args_of_one(args), kwargs)
        # This traces the block, under apply too.
        params = param(self.copies, initial_params, metadata=facts[0])
        if not has_variables:
            return params, None
        return params, variable("variables", initial_state, takes_key=True, metadata=facts[1])

    def _args_of_one(self, args: Any) -> Any:
        """What one copy is called with: shapes in the place of arrays."""
        found = []
        jax.eval_shape(
            lambda: self._each(
                lambda i, args: (found.append(shape_of(args)), i)[1], jnp.arange(self.n), args
            )
        )
        return found[0]

    def _run(self, copy: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """One copy: what the block returns, and its variables if they may be written."""
        params, state = copy
        writable = self._writes(state)
        with self._in_copies():
            if not writable:
                return self.block.apply(params, *args, state=state, **kwargs), None
            return self.block.apply_with_state(params, state, *args, mutable=writable, **kwargs)

    def _in_copies(self) -> Any:
        """A context in which the program is in the copies, as far as its path goes."""
        return level_entered(None, PathElement(self.copies, None))

    def _write(self, variables: Variable | None, state: Any) -> None:
        if variables is not None and self._writes(variables):
            variables.value = state

    def _writes(self, state: Any) -> Any:
        """Which variables of the block may be written: as a store says it."""
        store = innermost_store()
        return False if state is None or store is None else store.writable

    def unstack(self, stacked: Mapping[str, Any]) -> list[Any]:
        """The parameters of each copy, or its variables.

        Args:
          stacked: the parameters, as ``init`` makes them, or the variables, as
            ``init_with_state`` does.

        Returns:
          A list of n trees, each as ``block.init`` makes it.

        Raises:
          TypeError: if ``stacked`` is no such dict.
          ValueError: if its arrays have no leading axis of length n.

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
        names = [name for name in (self.copies, "variables") if _has(stacked, name)]
        if not names:
            raise TypeError(
                f"{self!r}.unstack wants the parameters as init makes them,"
                f" {{{self.copies!r}: ...}}, or the variables, and was given {_shown(stacked)}.\n"
                f"To mend it:\n    {self.name}.unstack(params[{self.name!r}])     # its own part"
            )
        tree = stacked[names[0]]
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.ndim(x) or jnp.shape(x)[0] != self.n:
                raise ValueError(
                    f"{self!r} has {self.n} {self.copies}, and was given"
                    f" {'/'.join([names[0], *names_of(path)])!r} of shape {jnp.shape(x)}."
                )
        return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(self.n)]

    def restack(self, copies: Iterable[Any], *, variables: bool = False) -> dict[str, Any]:
        """The parameters, from those of each copy.

        Args:
          copies: n trees, each as ``block.init`` makes it.
          variables: whether they are the variables of each copy instead.

        Returns:
          What ``init`` makes (or the state that ``init_with_state`` makes). See `unstack` for an
          example.

        Raises:
          TypeError: if they are no such trees.
          ValueError: if there are not n of them, or they are not alike.
        """
        if isinstance(copies, Mapping) or not isinstance(copies, Iterable):
            raise TypeError(
                f"{self!r}.restack wants a list of trees, and was given {_shown(copies)}.\n"
                f"To mend it:\n    {self.name}.restack([params_of_first, params_of_second])"
            )
        copies = list(copies)
        if len(copies) != self.n:
            raise ValueError(f"{self!r} has {self.n} {self.copies}, and was given {len(copies)}.")
        specs = [spec_of(copy) for copy in copies]
        for i, spec in enumerate(specs):
            if not spec.same_shapes(specs[0]):
                found, first = contrast(spec, specs[0])
                raise ValueError(
                    f"{self!r}.restack wants {self.copies} that are alike: number {i} is {found},"
                    f" and number 0 is {first}."
                )
        name = "variables" if variables else self.copies
        return {name: jax.tree.map(lambda *xs: jnp.stack(xs), *copies)}

    def __repr__(self) -> str:
        return f"<{self.name} of {self.n} times {self.block.name}>"


def check_block(block: Any, n: Any, function: str, copies: str) -> None:
    if not isinstance(block, Parametrized):
        raise TypeError(
            f"{function} wants a parametrized object, and was given {block!r}.\n"
            f"To mend it:\n    jaxstate.{function}(jaxstate.parametrized(fn), n)"
        )
    if isinstance(n, bool) or not hasattr(n, "__index__") or operator.index(n) < 1:
        raise ValueError(f"{function}: the number of {copies} is an integer from 1, not {n!r}.")


def _has(tree: Any, name: str) -> bool:
    return isinstance(tree, Mapping) and name in tree


def _shown(x: Any) -> str:
    return f"a dict with {list(x)}" if isinstance(x, Mapping) else repr(x)


def shape_of(tree: Any) -> Any:
    """A tree with shapes in the place of its arrays."""

    def shape(x: Any) -> Any:
        if not _jax.is_array_like(x):
            return x
        aval = _jax.typeof(x)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)

    return jax.tree.map(shape, tree)
