"""Other packages' shortcuts that assume a function without a closure has no state.

``equinox.filter_closure_convert`` (diffrax, lineax and optimistix call it on the functions they are
given) turns what a function closes over into explicit operands. It skips functions whose
``__closure__`` is None, and so misses the parameters that such a function reads. While state is
open, such a function is given a closure.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from jaxstate._src.core import slots


def _look_for_equinox() -> None:
    equinox = sys.modules.get("equinox")
    if equinox is None or not hasattr(equinox, "filter_closure_convert"):
        return
    convert = equinox.filter_closure_convert
    if not hasattr(convert, "_jaxstate"):
        setattr(equinox, "filter_closure_convert", _converting_closed_functions(convert))  # noqa: B010


def _converting_closed_functions(convert: Any) -> Any:
    @functools.wraps(convert)
    def filter_closure_convert(fn: Any, *args: Any, **kwargs: Any) -> Any:
        if slots.any_open() and isinstance(fn, types.FunctionType) and fn.__closure__ is None:
            return convert(_with_closure(fn), *args, **kwargs)
        return convert(fn, *args, **kwargs)

    filter_closure_convert._jaxstate = True  # type: ignore[attr-defined]
    return filter_closure_convert


def _with_closure(fn: Any) -> Any:
    @functools.wraps(fn)
    def closed(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return closed


slots.on_open.append(_look_for_equinox)
