"""shard_map and pmap: what every device has of its own, and what all devices share.

Inside the function a stream is a stream per device (`streams`), whose key is made from one
draw outside and the device's index along the mapped axes (the last axis fastest). What is only read
is replicated, as what a function closes over is.

A slot that is written is one value for all devices. It comes in as what the function closes over,
and goes out as a further result with the spec ``P()``. So what is written must be the same on every
device, and JAX knows of every value whether it is: from its type, which lists the mesh axes it
varies over (if ``check_vma`` is on). A value that varies is refused by name.

A slot that knows how to make one value of many (a variable with ``reduce``) is a value per device
inside. It comes in as one that varies, and goes out as an array over all devices, with the spec
``P(axes)`` for a new leading axis. One value is made of it outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.boundaries import boundaries
from jaxstate._src.core.resolve import one_of_each, read_at, write_each
from jaxstate._src.core.slots import Address, Cell, Holder
from jaxstate._src.core.uses import current_use, one_use
from jaxstate.errors import DeviceWriteError, message

_replicated = jax.sharding.PartitionSpec()


class _Devices(Holder):
    """What the devices see: their own cells, and those they share.

    Attributes:
      outside: the trace under which the mapped function is called.
      below: the holders that were open there.
      notes: the cells that every device has of its own, while the function runs.
      shared: the cells of slots that all devices share, while the function runs.
      before: what these held when the function first used them.
      use: what the bind makes of what was made inside the function, see `uses.current_use`.
    """

    def __init__(self, outside: Any, below: Sequence[Holder], axes: Sequence[Any]) -> None:
        super().__init__()
        self.outside = outside
        self.mesh_outside = _jax.abstract_mesh()
        self.below = below
        self.axes = axes
        self.notes: dict[Any, Any] = {}
        self.shared: dict[Address, Cell] = {}
        self.before: dict[Address, Any] = {}
        self.use: Any = None

    def knows(self, address: Address) -> bool:
        owner = self._owner(address)
        return owner is not None and (owner.differs_by_device(address) or address.may_be_written)

    def cell(self, address: Address) -> Cell:
        for boundary in boundaries(self):  # a loop in the function may ask first
            address = address.seen_from(boundary)
        with _jax.set_current_trace(self.anchor):
            return self._cell(address)

    def _cell(self, address: Address) -> Cell:
        owner = self._owner(address)
        assert owner is not None
        if owner.differs_by_device(address):
            return owner.device_cell(address, self.notes, self.from_outside, self.index)
        key = address.seen_from(self.jaxpr_or_self())
        if key not in self.shared:
            value = self.from_outside(lambda: _jax.canonicalize(read_at(key.renewed(self.use))))
            if address.reduce is not None:
                value = _jax.vary(value, frozenset(self.axes))
            self.before[key] = value
            self.shared[key] = Cell(value)
        return self.shared[key]

    def jaxpr_or_self(self) -> Any:
        """What names inside the function are relative to: its jaxpr, if it has one."""
        chain = _jax.chain(self.anchor)
        return next((t for t in chain if isinstance(t, _jax.StagingTrace)), self)

    def written(self) -> dict[Address, Any]:
        """What the function has left in the shared slots that it wrote."""
        written = {a for a, c in self.shared.items() if c.value is not self.before[a]}
        joint = {a.joint.whole(a) for a in written if a.joint is not None}
        return {
            a: c.value
            for a, c in self.shared.items()
            if a in written or (a.joint is not None and a.joint.whole(a) in joint)
        }

    def forget(self) -> None:
        """The function has run, and its tracers end with it."""
        self.notes.clear()
        self.shared.clear()
        self.before.clear()

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> Any:
        owner = self._owner(address)
        assert owner is not None
        return owner.lane(address, trace, notes)

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        owner = self._owner(address)
        assert owner is not None
        return owner.refuse_lanes(address, trace)

    def differs_by_device(self, address: Address) -> bool:
        owner = self._owner(address)
        return owner is not None and owner.differs_by_device(address)

    def device_cell(self, address: Address, *place: Any) -> Cell:
        """A cell of a device of a shard_map inside this one."""
        owner = self._owner(address)
        assert owner is not None
        return owner.device_cell(address, *place)

    def without_values(self) -> _Devices:
        return _Devices(None, [holder.without_values() for holder in self.below], self.axes)

    def _owner(self, address: Address) -> Holder | None:
        """Who answers for the address outside, if it is from there."""
        found = next((h for h in reversed(self.below) if h.knows(address)), None)
        if found is None and address.own_holder is not None:
            owner = address.own_holder()
            return owner if owner is not None and owner.age < self.age else None
        return found

    def from_outside(self, get: Callable[[], Any]) -> Any:
        """What ``get`` gives in the place where the function is called."""
        mesh = _jax.use_abstract_mesh(self.mesh_outside)
        with slots.only_open(self.below), _jax.set_current_trace(self.outside), mesh:
            value = get()
        return _jax.into_mesh(value)

    def index(self) -> Any:
        """The index of this device along the mapped axes."""
        index: Any = 0
        for axis in self.axes:
            index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return index


class _Call:
    """One call of a mapped function.

    Attributes:
      written: the shared slots that it wrote.
      results: its results, without their values.
    """

    def __init__(self, trace: Any, params: dict[str, Any]) -> None:
        mapped = params["newly_manual_axes"]
        axes = [name for name in params["mesh"].axis_names if name in mapped]
        self.trace = trace
        self.params = params
        self.devices = _Devices(trace, slots.stack(), axes)
        self.written: tuple[Address, ...] = ()
        self.results: Any = None

    def bind(self, bind: Callable[..., Any], args: Any, avals: Any) -> Any:
        debug_info = self.params["debug_info"].with_unknown_names()
        params = dict(self.params, subfuns=(self.on_device,), debug_info=debug_info)
        with one_use():
            try:
                results = bind(self.trace, args, avals, params)
            except _jax.SHARD_MAP_ERRORS as error:
                if not self.written:
                    raise
                fails, _ = error.args  # what is said of them is about those of the program
                raise type(error)(fails[: -len(self.written)], self.results.tree) from None
        if not self.written:
            return results
        values = list(results)
        n = len(values) - len(self.written)
        with _jax.set_current_trace(self.trace):
            written = dict(zip(self.written, values[n:], strict=True))
            per_device = [address for address in written if address.reduce is not None]
            ones = one_of_each(per_device, [written[address] for address in per_device])
            written.update(zip(per_device, ones, strict=True))
            addresses = [address.renewed(self.devices.use) for address in written]
            write_each(addresses, written.values())
        return self.results.update(values[:n])

    def on_device(self, *operands: Any) -> Any:
        (fun,) = self.params["subfuns"]
        # JAX may bind the function again under the trace outside, with this one in it: of that bind
        # are the operands that the function captures.
        self.devices.use = current_use()
        try:
            with slots.open_holder(self.devices), slots.function_inside(self.devices):
                results, specs = fun(*operands).unpack_aux()
                # A result may stand for a slot: it is what the slot holds when the function ends.
                results = results.map(_jax.resolved).with_aux(specs)
            return self.with_written(results, self.devices.written())
        finally:
            self.devices.forget()

    def with_written(self, results: Any, values: dict[Address, Any]) -> Any:
        """The results of the function, and behind them what it leaves in the written slots."""
        self.written = tuple(values)
        if not values:
            return results
        results, specs = results.unpack_aux()
        self.results = results.map(lambda _: None)
        per_device = jax.sharding.PartitionSpec(tuple(self.devices.axes))
        for address, value in values.items():
            if address.reduce is None:
                self.refuse_varying(address, value)
                specs = (*specs, _replicated)
            else:
                value = _jax.vary(value, frozenset(self.devices.axes))
                values[address] = jnp.expand_dims(value, 0)
                specs = (*specs, per_device)
        return _jax.flat_tree([*results, *values.values()]).with_aux(specs)

    def refuse_varying(self, address: Address, value: Any) -> None:
        if not self.params["check_vma"]:
            raise DeviceWriteError(
                message(
                    f"{address} was written inside a shard_map with check_vma=False (pmap is one),"
                    " where nothing says whether the devices wrote the same value.",
                    fix="""
                    jax.shard_map(f, check_vma=True, ...)   # JAX knows which values are the same
                    jaxstate.variable(..., reduce=jnp.mean) # or one value is made of all
                    y, value = mapped(x)                    # or return the value,
                    write(slot, value.mean())               # and write it outside
                    """,
                    used=_jax.user_location(),
                )
            )
        axes = sorted(str(axis) for axis in _jax.varying_axes(value))
        if axes:
            raise DeviceWriteError(
                message(
                    f"Devices of a shard_map wrote different values into {address}, which they"
                    f" share: the value varies over the mesh axes {', '.join(axes)}.",
                    fix="""
                    write(slot, jax.lax.pmean(value, axes))   # one value, from all devices
                    jaxstate.variable(..., reduce=jnp.mean)   # or: makes one value of them outside
                    """,
                    used=_jax.user_location(),
                )
            )


def _per_device(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not slots.any_known() or isinstance(trace, _jax.TransparentTrace):
            return bind(trace, args, avals, params)
        return _Call(trace, params).bind(bind, args, avals)

    return bind_with_trace


_jax.wrap_bind_with_trace(_jax.shard_map_p, _per_device)
