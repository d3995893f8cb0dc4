"""The streams that `init` opens: all that nobody has opened, with keys made from its own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.initializers import folded, words_of
from jaxstate._src.core.slots import Address, Cell, Lane, holders
from jaxstate._src.streams.holders import Count, StreamAddress, StreamHolder, Streams
from jaxstate._src.streams.keys import key_and_type

__all__ = ["FoldedStreams"]


class FoldedStreams(Streams):
    """Every stream that is not open: of each name one, whose key is made from one key and the name.

    The key of the stream "dropout" is the given one, with the first 8 bytes of the SHA-256 digest
    of "/dropout" folded in. (The path of no parameter begins with a slash.)
    """

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key, self.key_type = key_and_type(key, "init")
        self.mesh = _jax.abstract_mesh()
        self.streams: dict[str, StreamHolder] = {}

    def knows(self, address: Address) -> bool:
        if not isinstance(address, StreamAddress) or address.identity is not None:
            return False
        return not any(isinstance(h, StreamHolder) and h.knows(address) for h in holders())

    def stream(self, name: str) -> StreamHolder:
        """The stream of that name; it gets its key when the key is asked for."""
        if name not in self.streams:
            new = StreamHolder(None, self.key_type, name, "split", np.int32(0), "")
            self.streams[name] = new.without_values()
        return self.streams[name]

    def cell(self, address: StreamAddress) -> Cell:  # type: ignore[override]
        stream = self.stream(address.name)
        if not stream.cells:
            with _jax.set_current_trace(self.anchor), _jax.use_abstract_mesh(self.mesh):
                key = folded(self.key, words_of(f"/{address.name}"))
            stream.cells = {"key": Cell(key), "count": Count(np.int32(0), key)}
        return stream.cell(address)

    def aval(self, address: StreamAddress) -> Any:  # type: ignore[override]
        return self.stream(address.name).aval(address)

    def lane(  # type: ignore[override]
        self, address: StreamAddress, trace: Any, notes: dict[Any, Any]
    ) -> Lane | None:
        if _jax.lanes_are_directions(trace):
            return None  # whoever opens the stream will say vmap="share"
        return self.stream(address.name).lane(address, trace, notes)

    def differs_by_device(self, address: Address) -> bool:
        return True

    def device_cell(  # type: ignore[override]
        self, address: StreamAddress, notes: Any, from_outside: Any, index: Any
    ) -> Cell:
        return self.stream(address.name).device_cell(address, notes, from_outside, index)

    def without_values(self) -> FoldedStreams:
        copy = FoldedStreams.__new__(FoldedStreams)
        streams = {name: stream.without_values() for name, stream in self.streams.items()}
        copy.__dict__.update(self.__dict__, key=None, streams=streams, anchor=None, lane_tables={})
        return copy

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return self.stream(address.name).refuse_lanes(address, trace)  # type: ignore[attr-defined]

    def signature(self) -> Hashable:
        return "every stream", self.key_type
