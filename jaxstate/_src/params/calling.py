"""How `init` and `apply` run: keys, stores, and the evaluation of initializers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.initializers import sliced
from jaxstate._src.core.slots import open_holder
from jaxstate._src.params.arguments import split_arrays
from jaxstate._src.params.entries import innermost_store
from jaxstate._src.params.folded_streams import FoldedStreams
from jaxstate._src.params.init_store import InitStore
from jaxstate._src.params.misuse import LAZY, name_to_call, refuse_lazy
from jaxstate._src.params.names import nested
from jaxstate._src.params.nests import room_for_nests
from jaxstate._src.params.paths import ModuleId, Path
from jaxstate._src.params.reuse import Reused, ReusingStore, reused
from jaxstate._src.params.stores import ApplyStore
from jaxstate._src.streams.keys import check_key
from jaxstate._src.streams.stream import rng_stream
from jaxstate.errors import InitializerDataError, NameClashError, message

__all__ = [
    "check_is_dict",
    "run_apply",
    "run_init",
    "writable_names",
]

_WITH_STATE = "y, state = net.apply_with_state(params, state, x)"


def _keys_of_streams(key: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """The key for parameters, and the key of each stream."""
    if not isinstance(key, Mapping):
        key = check_key(key, where)
        return key, {"default": key}
    wrong = [name for name in key if not isinstance(name, str)]
    if wrong:
        raise TypeError(
            f"{where} wants a dict from names of streams to keys, and was given the name"
            f' {wrong[0]!r}.\nTo mend it:\n    {{"params": key, "dropout": other_key}}'
        )
    streams = {name: check_key(k, f"{where}, stream {name!r},") for name, k in key.items()}
    if where == "init" and not {"params", "default"} & streams.keys():
        raise TypeError(
            f"init was given keys for {sorted(streams)}, and needs one for the parameters.\n"
            'To mend it:\n    net.init({"params": key, "dropout": other_key}, x)'
        )
    return streams.get("params", streams.get("default")), streams


def writable_names(mutable: Any) -> bool | frozenset[str]:
    """Which variables may be written, as a store is told."""
    if isinstance(mutable, bool):
        return mutable or frozenset()
    if isinstance(mutable, str):
        mutable = [mutable]
    if not isinstance(mutable, Collection) or any(not isinstance(x, str) for x in mutable):
        raise TypeError(
            "apply_with_state: mutable is True, False or names of collections, and was given"
            f' {mutable!r}.\nTo mend it:\n    net.apply_with_state(..., mutable=["statistics"])'
        )
    return frozenset(mutable)


class _open_streams:
    """Opens random streams: name -> key."""

    __slots__ = ("_opened", "_streams")

    def __init__(self, streams: Mapping[str, Any]) -> None:
        self._streams = streams
        self._opened: ExitStack | None = None

    def __enter__(self) -> None:
        if self._streams:
            with ExitStack() as opened:
                for name, key in self._streams.items():
                    opened.enter_context(rng_stream(key, name))
                self._opened = opened.pop_all()

    def __exit__(self, *error: Any) -> None:
        if self._opened is not None:
            self._opened.__exit__(*error)


def _not_all_were_made(base: Path, n: int, of: int) -> Exception:
    """The error for modules whose names cannot be told from each other without jit."""
    return NameClashError(
        message(
            f"The program makes {of} modules {'/'.join(base)!r} when it is traced, and made {n} of"
            " them under jax.disable_jit, which runs only the branches that are taken. So it cannot"
            " be told which.",
            fix=f"""
            {base[-1]} = make()                                # before the branch
            jaxstate.parametrized(fn, name="{base[-1]}_if")    # or a name for each
            """,
            used=_jax.user_location(),
        )
    )


def _store_for_init(root: ModuleId, key: Any, given: Reused | None) -> InitStore:
    return InitStore(root, key) if given is None else ReusingStore(root, key, given)


def _run_slice(made: Any, operands: Sequence[Any], abstract: bool) -> list[Any]:
    """Evaluates of a jaxpr what its outputs depend on; effects of the rest do not happen."""
    pure, used = sliced(made)
    inputs = [operands[i] for i in used]
    if abstract and any(isinstance(x, jax.ShapeDtypeStruct) for x in inputs):
        raise InitializerDataError(
            message(
                "An initializer looks at data, and init was given only its shape.",
                fix="""
                params = net.init(key, x)      # an array instead of a ShapeDtypeStruct
                """,
                used=_jax.user_location(),
            )
        )
    values = _jax.eval_closed_jaxpr(pure, *inputs)
    return [_jax.as_array(_jax.canonicalize(x)) for x in values]


def run_init(
    module: Any, kinds: Sequence[str], key: Any, reuse: Any, args: Any, kwargs: Any
) -> list[dict[str, Any]]:
    """A nested dict of the initial values of each kind of entry, parameters first."""
    where = "init" if len(kinds) == 1 else "init_with_state"
    param_key, streams = _keys_of_streams(key, "init")
    arrays, rebuild, abstract = split_arrays((args, kwargs))
    given = None if reuse is None else reused(module, reuse, args, kwargs, every_part=True)

    def forward(param_key: Any, streams: Any, arrays: Any) -> list[dict[Path, Any]]:
        args, kwargs = rebuild(arrays)
        store = _store_for_init(module._token, param_key, given)
        with (
            open_holder(store),
            open_holder(FoldedStreams(param_key)),
            _open_streams(streams),
            store.root_entered(module),
            room_for_nests(),
        ):
            try:
                refuse_lazy(module, module._as_called(None)(*args, **kwargs))
            except Exception as error:
                module._explain(error, where, args, kwargs)
                raise
        return [store.initial_values(kind) for kind in kinds]

    with jax.disable_jit(False):  # every branch is traced
        made, shapes = _jax.make_jaxpr(forward, return_shape=True)(param_key, streams, arrays)
    operands = jax.tree.leaves((param_key, streams, arrays))
    leaves = _run_slice(made, operands, abstract)
    values = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    if given is not None:
        values[0] = given.joined_with(values[0])
    return [nested(x) for x in values]


def run_apply(
    module: Any, params: Any, state: Any, writable: Any, key: Any, args: Any, kwargs: Any
) -> tuple[Any, ApplyStore]:
    """What the function returns, and the store that it ran in."""
    check_is_dict(module, params, "apply", "the parameters", "y = net.apply(params, x)")
    streams = {} if key is None else _keys_of_streams(key, "apply")[1]

    def store() -> ApplyStore:
        return ApplyStore(module._token, params, state, writable)

    def run(store: ApplyStore) -> tuple[Any, ApplyStore]:
        with (
            open_holder(store),
            _open_streams(streams),
            store.root_entered(module),
            room_for_nests(),
        ):
            try:
                out = module._as_called(None)(*args, **kwargs)
            except Exception as error:
                where = "apply_with_state" if writable else "apply"
                module._explain(error, where, args, kwargs)
                raise
            if type(out) in LAZY:
                refuse_lazy(module, out)
            return out, store

    if not _jax.jit_is_disabled():
        return run(store())
    # Only the branches that are taken are seen now, and modules would be named accordingly.
    named = store()
    made: dict[Path, int] = {}

    def trace() -> None:
        _, traced = run(store())
        named.layer = traced.layer.of_lasting_modules()
        made.update(traced.layer.made)

    with jax.disable_jit(False):
        jax.eval_shape(trace)
    out, named = run(named)
    for base, n in named.layer.made.items():
        if n < made.get(base, 0):
            raise _not_all_were_made(base, n, made[base])
    return out, named


def check_is_dict(
    module: Any, given: Any, how: str, what: str = "the variables", fix: str = _WITH_STATE
) -> None:
    """Raises for parameters or variables that are given to ``how`` as something else."""
    if type(given) is dict or isinstance(given, Mapping):
        return
    aval = _jax.type_of(given)
    found = type(given).__name__ if aval is None else aval.str_short()
    if innermost_store() is not None:
        called = f"y = {name_to_call(module)}(x)      # a part of the network that calls it"
        fix = f"{called}\n    {fix}"
    if isinstance(given, tuple) and len(given) == 2:
        fix = f"params, state = net.init_with_state(key, x)\n    {fix}"
    raise TypeError(
        f"{name_to_call(module)}.{how} wants {what} as a dict (what init returned), and was"
        f" given {found}.\nTo mend it:\n    {fix}"
    )
