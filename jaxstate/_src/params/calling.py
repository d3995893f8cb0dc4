"""What `init` and `apply` need: keys, stores, and the running of initializers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.initializers import sliced
from jaxstate._src.params.init_store import InitStore
from jaxstate._src.params.paths import ModuleId, Path
from jaxstate._src.params.reuse import Reused, ReusingStore
from jaxstate._src.streams.keys import check_key
from jaxstate._src.streams.stream import rng_stream
from jaxstate.errors import InitializerDataError, NameClashError, message

__all__ = [
    "keys_of_streams",
    "not_all_were_made",
    "open_streams",
    "run_slice",
    "store_for_init",
    "writable_names",
]


def keys_of_streams(key: Any, where: str) -> tuple[Any, dict[str, Any]]:
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


class open_streams:
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


def not_all_were_made(base: Path, n: int, of: int) -> Exception:
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


def store_for_init(root: ModuleId, key: Any, given: Reused | None) -> InitStore:
    return InitStore(root, key) if given is None else ReusingStore(root, key, given)


def run_slice(made: Any, operands: Sequence[Any], abstract: bool) -> list[Any]:
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
