"""Reuse: the parameters of one network as parts of another one, by the identity of modules.

    trained = encoder.init(key, x)                             # and training
    params = classifier.init(key, x, reuse={encoder: trained})  # the rest is made
    y = decoder.apply_from({encoder: trained, head: other}, x)

What a path in a tree of parameters means depends on the program: ``dense_1`` is the second module
of that name which was used. The same module may have another path in another network. So

1. the given network is traced, to see which module is at which path, and
2. each given module is traced where the network calls it, to see what the paths of *its*
   parameters mean (or, if the network does not call it, because it is a larger one that has parts
   in common, with the arguments of the network).
3. What is the same in both is reused.

Parameters may also be given by name: ``init(key, x, reuse={"encoder": {"w": w}})``. A string is a
path in the tree of the network itself, and what is given may be a part of what it has there.

"The same" is said by an `Identity`: the innermost module that outlives the trace, and from there
the names. A module that is made anew whenever the function runs is known by its place among such.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.specs import ONE_ARRAY, Spec, contrast, fits, spec_of
from jaxstate._src.params.entry import Entry
from jaxstate._src.params.given import flattened
from jaxstate._src.params.init_store import InitStore
from jaxstate._src.params.names import by_path, nested
from jaxstate._src.params.observing import Lasting, ObservingStore, observe
from jaxstate._src.params.paths import ModuleId, NameTable, Path
from jaxstate._src.params.shaped import Shaped
from jaxstate.errors import (
    MissingParameterError,
    ParameterMismatchError,
    UncoveredParameterError,
    UnusedReuseError,
    called_as,
    message,
    nearest,
)

__all__ = ["Identity", "P", "R", "Reusable", "Reused", "ReusingStore", "reused"]


Identity = Hashable

P = ParamSpec("P")

R = TypeVar("R")


class Reusable(Generic[P, R]):
    """What a parametrized object can do with the parameters of others."""

    fn: Callable[..., Any]
    name: str
    _token: ModuleId
    init: Callable[..., Any]
    apply: Callable[..., Any]

    @called_as("params = net.parameters_from({layer: layer_params}, x)")
    def parameters_from(
        self, reuse: Mapping[Any, Mapping[str, Any]], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The parameters of this network, all of them taken from others.

        Args:
          reuse: ``{module: params}``. A module is a parametrized object that this one calls, this
            one itself, or a network that has modules in common with it. The latter is run (only
            traced) with the same arguments; ``module.shaped(*args)`` says otherwise. Or
            ``{name: params}``: a string is a path in the parameters of this network, such as
            "encoder/dense", with an array, or a tree of arrays by name, which may be a part of
            what is there. Where two entries have the same part, the later one wins.
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.

        Returns:
          A new nested dict, which holds the given arrays.

        Raises:
          UncoveredParameterError: for parameters that no entry has.
          MissingParameterError, ParameterMismatchError: if the parameters given for a module are
            not those it uses.
          UnusedReuseError: if a module is not called and cannot be run with these arguments, or
            a name is that of no parameter.
          TypeError: if a key of ``reuse`` is neither a parametrized object nor a string.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> @jaxstate.parametrized
        ... def scale(x):
        ...     return x * jaxstate.param("factor", jax.nn.initializers.ones, ())
        >>> @jaxstate.parametrized
        ... def loss(x, y):
        ...     return (scale(x) - y) ** 2
        >>> loss.parameters_from({scale: {"factor": jnp.array(2.0)}}, 1.0, 0.0)
        {'scale': {'factor': Array(2., dtype=float32, weak_type=True)}}
        """
        found = reused(self, reuse, args, kwargs)
        missing = [path for path in found.specs if not found.has_all_of(path)]
        if missing:
            raise _uncovered(self.name, missing, found)
        return nested({path: found.values[path].tree() for path in found.specs})

    @called_as("y = net.apply_from({layer: layer_params}, x)")
    def apply_from(
        self,
        reuse: Mapping[Any, Mapping[str, Any]],
        *args: Any,
        key: Any = None,
        state: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> R:
        """``apply`` with the parameters that `parameters_from` takes from others.

        Args:
          reuse: as for `parameters_from`. Derivatives with respect to its arrays are those of
            ``apply``.
          *args, **kwargs: passed to the function.
          key, state: as for ``apply``.

        Returns:
          What the function returns.

        Raises:
          Whatever `parameters_from` and ``apply`` raise.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> @jaxstate.parametrized
        ... def scale(x):
        ...     return x * jaxstate.param("factor", jax.nn.initializers.ones, ())
        >>> @jaxstate.parametrized
        ... def loss(x, y):
        ...     return (scale(x) - y) ** 2
        >>> float(loss.apply_from({scale: {"factor": jnp.array(2.0)}}, 3.0, 1.0))
        25.0
        """
        params = self.parameters_from(reuse, *args, **kwargs)
        return self.apply(params, *args, key=key, state=state, **kwargs)

    def shaped(self, *args: Any, **kwargs: Any) -> Shaped[R]:
        """This network with example inputs, so that they need not be given again.

        Args:
          *args, **kwargs: as the function is called. Arrays may be `jax.ShapeDtypeStruct`s.

        Returns:
          A `Shaped` object: ``init``, ``parameters_from`` and ``init_with_state`` take no inputs
          there. As a key of ``reuse`` it stands for the network.

        >>> import jax, jax.numpy as jnp, jaxstate
        >>> @jaxstate.parametrized
        ... def scale(x):
        ...     return x * jaxstate.param("s", jax.nn.initializers.ones, x.shape)
        >>> net = scale.shaped(jax.ShapeDtypeStruct((2,), jnp.float32))
        >>> net.init(jax.random.key(0))
        {'s': Array([1., 1.], dtype=float32)}
        """
        return Shaped._make(self, args, kwargs)


class _Taken(NamedTuple):
    """What is reused of one parameter: arrays by their number among the leaves of its value."""

    structure: Any
    leaves: dict[int, Any]

    def tree(self, made: Any = None) -> Any:
        """The value; what is not reused is that of ``made``."""
        structure, leaves = self.structure, [None] * self.structure.num_leaves
        if made is not None:
            leaves, structure = jax.tree.flatten(made)
        return structure.unflatten(
            [_jax.as_array(self.leaves[i]) if i in self.leaves else x for i, x in enumerate(leaves)]
        )


class Reused:
    """What of the parameters of one network comes from others.

    Attributes:
      specs: all its parameters: path -> form.
      values: those that are reused, whole or in part.
    """

    def __init__(self, specs: dict[Path, Spec], values: dict[Path, _Taken]) -> None:
        self.specs = specs
        self.values = values

    def has_all_of(self, path: Path) -> bool:
        taken = self.values.get(path)
        return taken is not None and len(taken.leaves) == taken.structure.num_leaves

    def joined_with(self, made: Mapping[Path, Any]) -> dict[Path, Any]:
        """The reused parameters and those that were ``made``, in the order of ``init``."""
        joined: dict[Path, Any] = {}
        for path in self.specs:
            if self.has_all_of(path):
                joined[path] = self.values[path].tree()
            elif path in self.values:
                joined[path] = self.values[path].tree(made[path])
            elif path in made:
                joined[path] = made[path]
        return {**joined, **{path: x for path, x in made.items() if path not in joined}}


def reused(
    net: Reusable[..., Any],
    reuse: Mapping[Any, Mapping[str, Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    every_part: bool = False,
) -> Reused:
    """What of the parameters of ``net`` is among those of other modules.

    Args:
      net, args, kwargs: the network, and how it is called.
      reuse: ``{module: params}``.
      every_part: whether an entry that has nothing in common with ``net`` is an error.
    """
    if not isinstance(reuse, Mapping):
        raise TypeError(
            f"reuse wants a dict {{module: params}}, and was given {type(reuse).__name__}.\n"
            "To mend it:\n    net.parameters_from({layer: layer_params}, x)"
        )
    lasting = Lasting()
    entries = [
        _ByName(key, x) if isinstance(key, str) else _Part(key, x, lasting)
        for key, x in reuse.items()
    ]
    parts = [part for part in entries if isinstance(part, _Part)]
    for part in parts:
        if part.example is not None:
            part.trace(part.example.args, part.example.kwargs)
        elif part.module._token is net._token:
            part.trace(args, kwargs)
    names = _Names(net, args, kwargs, lasting, parts)
    for part in parts:
        if not part.is_traced:
            part.trace_as_larger_network(net, args, kwargs)
    values: dict[Path, _Taken] = {}
    for entry in entries:
        for path, identity in names.identities.items():
            taken = entry.taken(identity, path, names.specs[path])
            if taken is not None:
                before = values.get(path, taken)
                values[path] = _Taken(taken.structure, {**before.leaves, **taken.leaves})
        if isinstance(entry, _ByName):
            entry.check_all_are_used(net, names.specs)
    if every_part:
        known = set(names.identities.values())
        for part in parts:
            if known.isdisjoint(part.values):
                raise _nothing_in_common(part, net)
    return Reused(names.specs, values)


class ReusingStore(InitStore):
    """Parameters being made, where some are given: initializers of the others see these."""

    def __init__(self, root: ModuleId, key: Any, reused: Reused) -> None:
        super().__init__(root, key)
        self.reused = reused

    def make(self, entry: Entry, address: Any, data: Sequence[Any], path: Path) -> None:
        super().make(entry, address, data, path)
        if address.kind == "parameter" and path in self.reused.values:
            given = self.reused.values[path].leaves
            with _jax.set_current_trace(self.anchor):
                for leaf, cell in entry.cells.items():
                    if leaf.index in given:
                        cell.value = _like(given[leaf.index], cell.value)

    def initial_values(self, kind: str) -> dict[Path, Any]:
        """What was made, without what was given whole."""
        made = super().initial_values(kind)
        return {path: x for path, x in made.items() if not self.reused.has_all_of(path)}


def _like(value: Any, made: Any) -> Any:
    """A reused value, in the type for which the function is being traced."""
    value = _jax.as_array(value)
    if value.dtype != made.dtype and not _jax.is_typed_key(made):
        value = value.astype(made.dtype)
    return _jax.with_weak_type_of(_jax.typeof(made), value)


class _Part:
    """One entry of ``reuse``."""

    def __init__(self, key: Any, params: Any, lasting: Lasting) -> None:
        self.example = key if isinstance(key, Shaped) else None
        self.module: Any = key.net if isinstance(key, Shaped) else key
        if not isinstance(self.module, Reusable):
            raise TypeError(
                f"reuse wants parametrized objects or names as keys, and was given {key!r}.\n"
                "To mend it:\n    net.parameters_from({layer: layer_params}, x)"
            )
        if not isinstance(params, Mapping):
            raise TypeError(
                f"reuse wants the parameters of {self.module.name} as a dict (what init returned),"
                f" and was given {type(params).__name__}.\n"
                "To mend it:\n    net.parameters_from({layer: layer_params}, x)"
            )
        self.params = params
        self.values: dict[Identity, Any] = {}
        self.is_traced = False
        self._lasting = lasting
        self._calls: set[Any] = set()

    def called(self, args: Any, kwargs: Any) -> None:
        """Notes that the network calls the module."""
        if self.example is None:
            call = _kind_of_call(args, kwargs)
            if call not in self._calls:
                self.trace(args, kwargs)
                self._calls.add(call)

    def trace(self, args: Any, kwargs: Any) -> None:
        """Finds out what the paths of the given parameters mean."""
        names = _Names(self.module, args, kwargs, self._lasting)
        for path, identity in names.identities.items():
            value = self._at(path, names.specs[path])
            self.values.setdefault(identity, self._checked(value, path, names.specs[path]))
        self.is_traced = True

    def trace_as_larger_network(self, net: Any, args: Any, kwargs: Any) -> None:
        try:
            self.trace(args, kwargs)
        except Exception as error:
            raise UnusedReuseError(
                message(
                    f"reuse has parameters of {self.module.name!r}, which {net.name!r} does not"
                    f" call. Run with the arguments of {net.name!r}, to see what they have in"
                    f" common, it fails: {type(error).__name__}: {error}",
                    fix=f"""
                    reuse = {{{self.module.name}.shaped(*its_args): params}}   # its own arguments
                    reuse.pop({self.module.name})                    # or leave it out
                    """,
                    used=_jax.user_location(),
                )
            ) from error

    def _at(self, path: Path, spec: Spec) -> Any:
        node: Any = self.params
        for i, name in enumerate(path):
            if not isinstance(node, Mapping) or name not in node:
                names = sorted(map(str, node)) if isinstance(node, Mapping) else []
                close = nearest(name, names)
                raise MissingParameterError(
                    message(
                        f"reuse has no parameter {'/'.join(path)!r} of {self.module.name!r}:"
                        f" {path[i]!r} is not among {', '.join(map(repr, names)) or 'nothing'}."
                        + (f" The nearest name is {close!r}." if close else ""),
                        fix=f"""
                        params = {self.module.name}.init(key, *its_args)     # makes all it uses
                        net.parameters_from({{{self.module.name}: params}}, x)
                        """,
                        wanted=str(spec),
                        used=_jax.user_location(),
                    )
                )
            node = node[name]
        return node

    def taken(self, identity: Identity, path: Path, spec: Spec) -> _Taken | None:
        """What there is for a parameter of the network, checked."""
        if identity not in self.values:
            return None
        leaves, structure = jax.tree.flatten(self._checked(self.values[identity], path, spec))
        return _Taken(structure, dict(enumerate(leaves)))

    def _checked(self, value: Any, path: Path, spec: Spec) -> Any:
        """The value, if it is of that structure and these shapes."""
        leaves, tree = flattened(value, spec.tree)
        if not all(map(_jax.is_array_like, leaves)):
            shown, wanted = type(value).__name__ if tree == ONE_ARRAY else str(tree), str(spec)
        else:
            value = tree.unflatten(leaves)
            found = spec_of(tree.unflatten(map(_jax.typeof, leaves)))
            if found.same_shapes(spec):
                return value
            shown, wanted = contrast(found, spec)
        raise _of_another_type(path, self.module.name, shown, wanted)


class _ByName:
    """One entry of ``reuse`` that goes by the names of the network itself."""

    def __init__(self, name: str, given: Any) -> None:
        self.name = name
        self.arrays = dict(by_path(given, tuple(name.split("/"))))
        self.unused = set(self.arrays)

    def taken(self, identity: Identity, path: Path, spec: Spec) -> _Taken | None:
        leaves = {}
        for leaf, aval in zip(spec.leaves, spec.avals, strict=True):
            name = (*path, *leaf.path)
            if name in self.arrays:
                self.unused.discard(name)
                leaves[leaf.index] = self._checked(self.arrays[name], name, aval)
        return _Taken(spec.tree, leaves) if leaves else None

    def _checked(self, value: Any, name: Path, wanted: Any) -> Any:
        if _jax.is_array_like(value) and fits(_jax.typeof(value), wanted):
            return value
        found = _jax.typeof(value).str_short() if _jax.is_array_like(value) else repr(value)
        raise _of_another_type(name, self.name, found, wanted.str_short())

    def check_all_are_used(self, net: Any, specs: Mapping[Path, Spec]) -> None:
        if not self.unused and self.arrays:
            return
        known = ["/".join((*path, *leaf.path)) for path, s in specs.items() for leaf in s.leaves]
        name = min("/".join(path) for path in self.unused) if self.unused else self.name
        close = nearest(name, known)
        listed = known if close is None else [close, *(x for x in known if x != close)]
        more = f" and {len(known) - 5} more" if len(known) > 5 else ""
        raise UnusedReuseError(
            message(
                f"reuse has {name!r}, and {net.name!r} has no parameter of that name. It has"
                f" {', '.join(map(repr, listed[:5])) or 'none'}{more}."
                if self.unused
                else f"reuse has nothing in {name!r}.",
                fix=f"""
                net.init(key, x, reuse={{{close or "encoder/w"!r}: array}})  # a name that there is
                jaxstate.flatten_names(params)                  # shows the names of parameters
                """,
                used=_jax.user_location(),
            )
        )


def _of_another_type(path: Path, source: str, found: str, wanted: str) -> Exception:
    return ParameterMismatchError(
        message(
            f"Parameter {'/'.join(path)!r}, reused from {source!r}, is {found}, and the function"
            f" wants {wanted}.",
            fix="""
            params = net.init(key, x)      # with inputs of the shapes that apply is given
            """,
            used=_jax.user_location(),
        )
    )


def _kind_of_call(args: Any, kwargs: Any) -> Hashable:
    """Two calls of one kind use the same parameters."""
    leaves, tree = jax.tree.flatten((args, kwargs))

    def kind(x: Any) -> Hashable:
        if isinstance(x, (jax.Array, np.ndarray, np.generic)):
            return x.shape, x.dtype
        return (type(x), x) if isinstance(x, (bool, int, float, str)) else object()

    return tree, tuple(map(kind, leaves))


class _Names:
    """The parameters of a module that is called in one way: what their paths mean.

    Attributes:
      forms: path of each parameter -> form.
      identities: path of each parameter -> identity.
    """

    specs: dict[Path, Spec]
    identities: dict[Path, Identity]

    def __init__(
        self,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        lasting: Lasting,
        parts: Sequence[_Part] = (),
    ) -> None:
        def see(store: InitStore) -> dict[Path, Any]:
            values = store.initial_values("parameter")
            self.identities = _identities(store.layer, values, lasting)
            return values

        shapes = observe(
            module, args, kwargs, lambda key: _NamingStore(module._token, key, parts), see
        )
        self.specs = {path: spec_of(x) for path, x in shapes.items()}


class _NamingStore(ObservingStore):
    """Parameters that are made to see their names."""

    def __init__(self, root: ModuleId, key: Any, parts: Sequence[_Part]) -> None:
        super().__init__(root, key)
        self.parts = parts

    looks_at_calls = True

    def called(self, module: Any, args: Any, kwargs: Any) -> None:
        for part in self.parts:
            if part.module._token is module._token:
                part.called(args, kwargs)


def _identities(
    layer: NameTable, paths: Mapping[Path, Any], lasting: Lasting
) -> dict[Path, Identity]:
    tokens = {path: token for token, path in layer.paths.items()}
    made_anew: dict[Path, list[Path]] = {}  # by scope, in the order of first use
    for path, token in tokens.items():
        if token not in lasting:
            made_anew.setdefault(path[:-1], []).append(path)

    def identity(path: Path) -> Identity:
        if not path or (path in tokens and tokens[path] in lasting):
            return tokens[path]
        step = made_anew[path[:-1]].index(path) if path in tokens else path[-1]
        return (identity(path[:-1]), step)

    return {path: identity(path) for path in paths}


def _uncovered(name: str, missing: list[Path], found: Reused) -> Exception:
    shown = [f"{'/'.join(p)!r} ({found.specs[p]})" for p in missing[:5]]
    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return UncoveredParameterError(
        message(
            f"reuse has nothing for {len(missing)} of the parameters of {name!r}:"
            f" {', '.join(shown)}{more}. Modules are the same if they are the same object.",
            fix="""
            params = net.init(key, x, reuse=reuse)               # makes the rest
            net.parameters_from({**reuse, layer: layer_params}, x)    # or give it
            """,
            used=_jax.user_location(),
        )
    )


def _nothing_in_common(part: _Part, net: Any) -> Exception:
    name = part.module.name
    return UnusedReuseError(
        message(
            f"reuse has parameters of {name!r}, which has nothing in common with {net.name!r}:"
            " none of them would be used. Modules are the same if they are the same object.",
            fix=f"""
            @jaxstate.parametrized
            def net(x):
                return {name}(x)        # the object itself, not another one made like it
            """,
            used=_jax.user_location(),
        )
    )
