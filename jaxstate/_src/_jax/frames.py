# JAX does not type or export what it keeps to itself.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false, reportCallIssue=false
"""The user's program: where it is, and who called."""

from __future__ import annotations

import dis
import os
import sys
import types
from typing import Any

from jax._src import dtypes, source_info_util, traceback_util, tree_util
from jax._src.interpreters import partial_eval as pe

from jaxstate._src._jax.names import DIFFERENTIATING, BatchTrace, flattree
from jaxstate._src._jax.traces import chain, current_trace, lane_count

__all__ = [
    "calls_no_user",
    "is_asked_by_builder",
    "is_operator_instruction",
    "is_statement_of_jax",
    "location_of",
    "takes_results",
    "transformations",
    "user_location",
]


def takes_results() -> bool:
    """Whether who called the caller is JAX, about to put the results of a function into its jaxpr.

    It has left the trace of that function by then.
    """
    frame = sys._getframe(2)
    while frame.f_code.co_filename in _FILES_BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    return code.co_filename == pe.__file__ and code.co_name.startswith("trace_to_jaxpr")


_FILES_BETWEEN = frozenset(m.__file__ for m in (dtypes, tree_util, flattree) if m is not None)


def is_asked_by_builder() -> bool:
    """Whether who called the caller is a jaxpr builder, which makes a constant of a value."""
    return sys._getframe(2).f_code is _to_jaxpr_tracer_code


_to_jaxpr_tracer_code = pe.DynamicJaxprTrace.to_jaxpr_tracer.__code__


def is_statement_of_jax(depth: int) -> bool:
    """Whether the frame ``depth`` above the caller's is at an ``x += y`` in code of JAX itself.

    That means ``x = x + y``: JAX's library gets arrays of a program by no way that could be told
    from any other. What it calls through `operator.iadd` is the program's own assignment.
    """
    frame = sys._getframe(depth + 1)
    module = frame.f_globals.get("__name__") or ""
    return module.startswith("jax.") and _is_at_operator(frame)


def is_operator_instruction(depth: int) -> bool:
    """Whether the frame ``depth`` above the caller's is at an operator, such as ``a += b``."""
    return _is_at_operator(sys._getframe(depth + 1))


def _is_at_operator(frame: types.FrameType) -> bool:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "BINARY_OP"


# Frames of this package are not the user's: neither in tracebacks nor in `user_location`.
_package = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep
traceback_util.register_exclusion(_package)
source_info_util.register_exclusion(_package)


def user_location() -> str:
    """``file:line`` of the innermost frame that is neither JAX's, jaxstate's, nor Python's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if source_info_util.is_user_filename(name) and not name.startswith("<frozen "):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_qualname})"
        frame = frame.f_back
    return "an unknown line"


def transformations() -> str:
    """What is in progress here, innermost first: "scan of f at a.py:3, in a derivative"."""
    found = (_described(trace) for trace in chain(current_trace()))
    return ", in ".join(text for text in found if text)


def _described(trace: Any) -> str | None:
    if isinstance(trace, BatchTrace):
        return f"vmap over {lane_count(trace)} lanes"
    if isinstance(trace, DIFFERENTIATING):
        return "a derivative"
    info = getattr(getattr(trace, "frame", None), "debug_info", None)
    if info is None:
        return None
    file = (info.func_src_info or "").rpartition(" at ")[2].rpartition(":")[0]
    if file.startswith(_package):
        return None
    user = source_info_util.is_user_filename(file)
    return f"{info.traced_for} of {info.func_src_info}" if user else info.traced_for


def location_of(eqn: Any) -> str:
    """``file:line`` of the user's code that an equation comes from."""
    return source_info_util.summarize(eqn.source_info)


_MODULES_WITHOUT_CALLBACKS = (
    "jax._src.numpy.", "jax._src.lax.", "jax._src.nn.", "jax._src.random", "jax._src.ops.",
    "jax._src.image.", "jax._src.scipy.special", "jax._src.scipy.stats", "jax._src.scipy.linalg",
    "jax._src.scipy.fft", "jax._src.scipy.signal", "jax._src.prng",
)  # fmt: skip


def calls_no_user(fun: Any) -> bool:
    """Whether a function is of JAX's library and calls none of the program's."""
    if type(fun) is not types.FunctionType:
        return False
    if fun.__closure__ is not None:
        return "_apply_primitive" in fun.__dict__  # one operation, where it is computed at once
    if fun.__code__ in _without_callbacks:
        return True
    module = fun.__globals__.get("__name__", "")
    if not module.startswith(_MODULES_WITHOUT_CALLBACKS):
        return False
    if "control_flow" in module or fun.__name__ == "_piecewise":
        return False
    _without_callbacks.add(fun.__code__)
    return True


_without_callbacks: set[Any] = set()
