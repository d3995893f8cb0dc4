"""Operations that move a window: convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxstate._src.causal.knowledge import mixed, placed
from jaxstate._src.causal.mixing import WHOLE
from jaxstate._src.causal.program import Operation
from jaxstate._src.causal.regions import Region, Table, only, onto_axis, without
from jaxstate._src.causal.rule import Rule


class Axis(NamedTuple):
    """How a window moves along an axis."""

    taps: int
    stride: int
    low: int
    high: int
    base: int  # dilation of the operand
    dilation: int  # of the window

    def places(self, out: np.ndarray, size: int) -> np.ndarray:
        """For each index of the result (first axes) and tap (last) the index in the operand, or -1
        where there is none."""
        at = out[..., None] * self.stride - self.low + np.arange(self.taps) * self.dilation
        inside = (at >= 0) & (at % self.base == 0) & (at // self.base < size)
        return np.where(inside, at // self.base, -1)


class Window(Rule):
    """Each element is made of those in a window. Along an axis of which a part is wanted, the
    windows are cut out and laid side by side."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        """For the axes of the operand along which windows move: the axis of the result, and how."""
        raise NotImplementedError

    def fill(self, op: Operation, x: Any) -> Any:
        """What is outside of the operand."""
        raise NotImplementedError

    def rest(self, op: Operation, region: Region) -> Region:
        """The region of the operand along the other axes."""
        raise NotImplementedError

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        """The result, where along the narrow axes windows are side by side."""
        raise NotImplementedError

    def windowed(self, stamps: np.ndarray, op: Operation, skipped: Any = None) -> np.ndarray:
        """The stamps of the windows' elements, one axis of the operand after the other."""
        for d, (to, how) in self.windows(op).items():
            if stamps.shape[d] > 1:
                at = how.places(np.arange(op.avals[0].shape[to]), stamps.shape[d])
                part = np.where(
                    placed(at >= 0, [d, stamps.ndim], stamps.ndim + 1),
                    np.moveaxis(stamps.take(np.maximum(at, 0), d), d + 1, -1),
                    0,
                )
                stamps = part.max(-1)
        return stamps

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        x = op.ins[0]
        windows = self.windows(op)
        wanted = list(self.rest(op, region))
        narrow, flags = [], []
        for d, (to, how) in windows.items():
            table = region[to]
            if table is None:
                continue
            at = how.places(table.rows, x.shape[d]).reshape(len(table.rows), -1)
            if (at < 0).any():
                flags.append((d, at >= 0))
            wanted[d] = Table(np.maximum(at, 0))
            narrow.append(d)
        part = run.known_part(x, tuple(wanted))
        for d, inside in flags:
            inside = run.clock.lookup(onto_axis(inside, d, part.ndim))
            part = jnp.where(inside, part, self.fill(op, part))
        return self.on_windows(op, run, part, narrow)


class Convolution(Window):
    """``conv_general_dilated``, where the kernel does not depend on the input."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        p, kernel = op.params, op.ins[1].shape
        numbers = p["dimension_numbers"]
        windows = {}
        for k, (low, high) in enumerate(p["padding"]):
            taps = kernel[numbers.rhs_spec[2 + k]]
            base, dilation = p["lhs_dilation"][k], p["rhs_dilation"][k]
            how = Axis(taps, p["window_strides"][k], low, high, base, dilation)
            windows[numbers.lhs_spec[2 + k]] = numbers.out_spec[2 + k], how
        return windows

    def fill(self, op: Operation, x: Any) -> Any:
        return jnp.zeros((), x.dtype)

    def rest(self, op: Operation, region: Region) -> Region:
        numbers = op.params["dimension_numbers"]
        wanted: list[Table | None] = [None] * len(region)
        if op.params["batch_group_count"] == 1:
            wanted[numbers.lhs_spec[0]] = region[numbers.out_spec[0]]
        return tuple(wanted)

    def stamps(self, op: Operation) -> list[np.ndarray]:
        x = op.ins[0]
        numbers = op.params["dimension_numbers"]
        mixing = [numbers.lhs_spec[1]]
        if op.params["batch_group_count"] != 1:
            mixing.append(numbers.lhs_spec[0])
        stamps = mixed(x.stamps, mixing)
        windows = self.windows(op)
        moving = [d for d in windows if stamps.shape[d] > 1]
        used = self._taps(op, moving)
        if used is None:
            stamps = self.windowed(stamps, op)
        else:
            stamps = self._at_taps(op, stamps, moving, used)
        order = [0] * len(x.shape)
        for a, b in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
            order[a] = b
        return [placed(stamps, order, len(x.shape))]

    def _taps(self, op: Operation, moving: Sequence[int]) -> np.ndarray | None:
        """Which taps along the moving axes are not zero for some channel; None if all."""
        kernel = op.ins[1]
        facts = kernel.facts() if moving else None
        if facts is None or not facts.zero.any():
            return None
        numbers = op.params["dimension_numbers"]
        axes = [numbers.rhs_spec[numbers.lhs_spec.index(d)] for d in moving]
        others = tuple(d for d in range(len(kernel.shape)) if d not in axes)
        used: Any = ~np.broadcast_to(facts.zero, kernel.shape).all(axis=others)
        return None if used.all() else used.transpose(np.argsort(np.argsort(axes)))

    def _at_taps(
        self, op: Operation, stamps: np.ndarray, moving: Sequence[int], used: np.ndarray
    ) -> np.ndarray:
        windows = self.windows(op)
        most: Any = np.int32(0)
        for taps in np.argwhere(used):
            part, inside = stamps, np.bool_(True)
            for d, tap in zip(moving, taps, strict=True):
                to, how = windows[d]
                at = how.places(np.arange(op.avals[0].shape[to]), op.ins[0].shape[d])[:, tap]
                part = part.take(np.maximum(at, 0), d)
                inside = inside & placed(at >= 0, [d], stamps.ndim)
            most = np.maximum(most, np.where(inside, part, 0))
        return most if np.ndim(most) else np.zeros((1,) * stamps.ndim, np.int32)

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        p = op.params
        numbers = p["dimension_numbers"]
        kernel = run.pull(op.ins[1], (None,) * len(op.ins[1].shape))
        changed: dict[str, list[Any]] = {
            name: list(p[name])
            for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        }
        for d in narrow:
            k = numbers.lhs_spec.index(d) - 2
            changed["window_strides"][k] = kernel.shape[numbers.rhs_spec[2 + k]]
            changed["padding"][k] = (0, 0)
            changed["lhs_dilation"][k] = changed["rhs_dilation"][k] = 1
        return op.bind([x, kernel], **{name: tuple(v) for name, v in changed.items()})[0]

    def compute(self, op: Operation, run: Any, place: int, region: Region) -> Any:
        numbers = op.params["dimension_numbers"]
        whole = [numbers.out_spec[1]]
        if op.params["batch_group_count"] != 1:
            whole.append(numbers.out_spec[0])
        part = super().compute(op, run, place, without(region, whole))
        return run.clock.take(part, only(region, whole))


class Pooling(Window):
    """``reduce_window`` and its special cases."""

    def windows(self, op: Operation) -> dict[int, tuple[int, Axis]]:
        p = op.params
        windows = {}
        for d, (low, high) in enumerate(p["padding"]):
            base, dilation = p["base_dilation"][d], p["window_dilation"][d]
            taps, stride = p["window_dimensions"][d], p["window_strides"][d]
            windows[d] = d, Axis(taps, stride, low, high, base, dilation)
        return windows

    def fill(self, op: Operation, x: Any) -> Any:
        if op.name == "reduce_window_sum":
            return jnp.zeros((), x.dtype)
        lowest = op.name == "reduce_window_max"
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(-jnp.inf if lowest else jnp.inf, x.dtype)
        limits = jnp.iinfo(x.dtype)
        return jnp.asarray(limits.min if lowest else limits.max, x.dtype)

    def rest(self, op: Operation, region: Region) -> Region:
        return region

    def stamps(self, op: Operation) -> list[np.ndarray]:
        return [self.windowed(op.ins[0].stamps, op)]

    def on_windows(self, op: Operation, run: Any, x: Any, narrow: Sequence[int]) -> Any:
        p = op.params
        changed: dict[str, list[Any]] = {
            name: list(p[name])
            for name in ("window_strides", "padding", "base_dilation", "window_dilation")
        }
        for d in narrow:
            changed["window_strides"][d] = p["window_dimensions"][d]
            changed["padding"][d] = (0, 0)
            changed["base_dilation"][d] = changed["window_dilation"][d] = 1
        return op.bind([x], **{name: tuple(v) for name, v in changed.items()})[0]


def convolution_rule(op: Operation) -> Rule:
    return WHOLE if op.ins[1].depends else Convolution()
