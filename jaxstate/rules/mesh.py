"""shard_map (and pmap, which is made of it): what every device has of its own.

Inside the function a stream is a stream per device (`jaxstate.random`), whose key is made from one
draw outside and the device's index along the mapped axes (the last axis fastest). What is only read
is replicated, as what a function closes over is. What is written would have to be one value for
all devices, which no rule ensures: a named error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from jaxstate import _compat, slots
from jaxstate.slots import Address, Cell, Holder


class _Devices(Holder):
    """The cells that every device has of its own, seen from inside."""

    def __init__(self, outside: Any, axes: Sequence[Any]) -> None:
        super().__init__()
        self.outside = outside
        self.axes = axes
        self.below = slots.stack()
        self.notes: dict[Any, Any] = {}

    def knows(self, address: Address) -> bool:
        owner = self._owner(address)
        return owner is not None and owner.differs_by_device(address)

    def cell(self, address: Address) -> Cell:
        owner = self._owner(address)
        assert owner is not None
        return owner.device_cell(address, self.notes, self.seen_from_outside, self.index)

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> Any:
        owner = self._owner(address)
        assert owner is not None
        return owner.lane(address, trace, notes)

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        owner = self._owner(address)
        assert owner is not None
        return owner.refuse_lanes(address, trace)

    def differs_by_device(self, address: Address) -> bool:
        return self.knows(address)

    def device_cell(self, address: Address, *place: Any) -> Cell:
        """A cell of a device of a shard_map inside this one."""
        owner = self._owner(address)
        assert owner is not None
        return owner.device_cell(address, *place)

    def without_values(self) -> _Devices:
        copy = _Devices(None, self.axes)
        copy.below = [holder.without_values() for holder in self.below]
        return copy

    def _owner(self, address: Address) -> Holder | None:
        return next((h for h in reversed(self.below) if h.knows(address)), None)

    @contextmanager
    def seen_from_outside(self) -> Iterator[None]:
        """The place where the function is called."""
        with slots.only_open(self.below), _compat.set_current_trace(self.outside):
            yield

    def index(self) -> Any:
        """The index of this device along the mapped axes."""
        index: Any = 0
        for axis in self.axes:
            index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return index


def _per_device(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not slots.any_open() or isinstance(trace, _compat.TransparentTrace):
            return bind(trace, args, avals, params)
        (fun,) = params["subfuns"]
        mapped = params["newly_manual_axes"]
        axes = [name for name in params["mesh"].axis_names if name in mapped]
        devices = _Devices(trace, axes)

        def on_device(*operands: Any) -> Any:
            try:
                with slots.open_holder(devices):
                    return fun(*operands)
            finally:
                devices.notes.clear()  # of this call: its tracers end with it

        return bind(trace, args, avals, dict(params, subfuns=(on_device,)))

    return bind_with_trace


_compat.wrap_bind_with_trace(_compat.shard_map_p, _per_device)
