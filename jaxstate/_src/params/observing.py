"""Programs that are traced to see what is in them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.slots import open_holder
from jaxstate._src.params.arguments import split_arrays
from jaxstate._src.params.entry import home_of
from jaxstate._src.params.folded_streams import FoldedStreams
from jaxstate._src.params.init_store import InitStore
from jaxstate._src.params.paths import FrameId, ModuleId
from jaxstate.errors import StateError

__all__ = ["Lasting", "ObservingStore", "observe"]


class Lasting:
    """Tells modules that were made before, and keep their identity, from those that a function
    makes whenever it runs."""

    def __init__(self) -> None:
        chain = _jax.chain(_jax.current_trace())
        self._homes: list[FrameId | None] = [
            home_of(t) for t in chain if isinstance(t, _jax.StagingTrace)
        ]

    def __contains__(self, token: ModuleId) -> bool:
        return token.home is None or any(token.home is home for home in self._homes)


def observe(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    store_with: Callable[[Any], Any],
    see: Callable[[Any], Any],
) -> Any:
    """What ``see(store)`` gives after a module has run with ``store = store_with(key)``.

    Nothing is computed: the module is traced.
    """
    arrays, rebuild, _ = split_arrays((args, kwargs))

    def forward(key: Any, arrays: Any) -> Any:
        args, kwargs = rebuild(arrays)
        store = store_with(key)
        with open_holder(store), open_holder(FoldedStreams(key)), store.root_entered(module):
            module._as_called(None)(*args, **kwargs)
        return see(store)

    first: Exception | None = None
    for make in (jax.random.key, jax.random.PRNGKey):  # an initializer may want a raw key
        try:
            with jax.disable_jit(False):  # every branch is traced
                key = jax.eval_shape(lambda make=make: make(0))
                return jax.eval_shape(forward, key, arrays)
        except StateError:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


class ObservingStore(InitStore):
    """Entries that are made to look at them, and thrown away."""

    def __init__(self, root: ModuleId, key: Any) -> None:
        super().__init__(root, key)
        self._traced = object()

    def signature(self) -> Hashable:
        """No jaxpr that was traced before is used: modules are seen when their function runs."""
        return "observed", self._traced
