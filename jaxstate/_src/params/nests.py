"""Modules inside of each other, many deep."""

from __future__ import annotations

import sys
from contextlib import nullcontext

__all__ = ["room_for_nests"]


class _RoomForNests:
    """Room for 400 modules inside of each other, where a call takes a third frame in C."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = sys.getrecursionlimit()
        if self._before < 2000:
            sys.setrecursionlimit(2000)

    def __exit__(self, *_: object) -> None:
        sys.setrecursionlimit(self._before)


room_for_nests = _RoomForNests if sys.version_info < (3, 12) else nullcontext
