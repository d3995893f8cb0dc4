"""The wrappers around what JAX does when a jitted function is called."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from jax._src import config, core, pjit, traceback_util
from jax._src.util import register_cache

from jaxstate._src._jax.calls import JitCall, Jitted, Use, _Inference, _jit_call
from jaxstate._src._jax.hooks import ALWAYS, OBJECTS, change

__all__ = ["wrap_ahead_of_time", "wrap_clear_cache", "wrap_jitted_calls"]


class _Done(pjit.PjitParams):
    """Takes the place of what JAX infers about a call: the call has been made."""

    results: Any


class _Inferred(pjit.PjitParams):
    """What JAX has inferred about a call that is about to be made."""

    jitted: Jitted


_NO_JAXPR = types.SimpleNamespace(effects=(), consts=())


class _Ahead(threading.local):
    """What this thread does that is no call.

    Attributes:
      fun: the function that `jit_trace` is about to ask for.
      shapes: whether for the types of its results alone.
    """

    fun: Any = None
    shapes = False


_ahead = _Ahead()


def wrap_jitted_calls(
    call: Callable[[Jitted, Any, Any], Any], call_traced: Callable[[Jitted, JitCall, Any, Any], Any]
) -> None:
    """Comes between when JAX calls a jitted function at top level.

    JAX does so in Python for operands for which its C++ dispatch has no executable. First
    ``call(jitted, args, kwargs)`` is asked, then, when the function is traced for such operands,
    ``call_traced(jitted, call, args, kwargs)``. If both return `NotImplemented`, JAX goes on; else
    that is the result, and JAX keeps no executable.
    """

    def wrap_trace(plain: Any) -> Any:
        @functools.wraps(plain)
        def jit_trace(jitted: Any, *args: Any, **kwargs: Any) -> Any:
            outer, _ahead.fun = _ahead.fun, jitted._fun
            try:
                return plain(jitted, *args, **kwargs)
            finally:
                _ahead.fun = outer

        return jit_trace

    def wrap_shapes(plain: Any) -> Any:
        @functools.wraps(plain)
        def eval_shape(*args: Any, **kwargs: Any) -> Any:
            _ahead.shapes = True
            try:
                return plain(*args, **kwargs)
            finally:
                _ahead.shapes = False

        return eval_shape

    def wrap_infer(plain: Any) -> Any:
        @functools.wraps(plain)
        def infer_params(fun: Any, info: Any, args: Any, kwargs: Any) -> Any:
            use: Use = "call"
            if _ahead.fun is fun:
                use, _ahead.shapes = "shapes" if _ahead.shapes else "trace", False
            _ahead.fun = None
            jitted = Jitted(fun, info)
            if use != "call" or not core.trace_state_clean() or config.debug_key_reuse.value:
                if not OBJECTS.users:
                    return plain(fun, info, args, kwargs)
                return _Inference.around(plain, jitted, args, kwargs, use)
            results = call(jitted, args, kwargs)
            if results is not NotImplemented:
                done = _Done([], {"jaxpr": _NO_JAXPR}, (), None, None, ())
                done.results = results
                return done, []
            p, flat = _Inference.around(plain, jitted, args, kwargs, "call")
            p = _Inferred(*p)
            p.jitted = jitted
            return p, flat

        return infer_params

    def wrap_run(plain: Any) -> Any:
        @functools.wraps(plain)
        def run_python_pjit(p: Any, flat: Any, fun: Any, args: Any, kwargs: Any) -> Any:
            results = NotImplemented
            if type(p) is _Done:
                results = p.results
            elif type(p) is _Inferred:
                results = call_traced(p.jitted, _jit_call(p, flat), args, kwargs)
            if results is NotImplemented:
                return plain(p, flat, fun, args, kwargs)
            return results, (), None, flat, _NO_JAXPR, None, None, ()

        return run_python_pjit

    # What a function that is jitted from now on does in Python asks `call` before all else. For the
    # others, `infer_params` does.
    in_progress = threading.local()
    trace, axis_env = core.trace_state_strong_ref, core.axis_env_state

    def wrap_cpp(plain: Any) -> Any:
        @functools.wraps(plain)
        def cpp_pjit(fun: Any, info: Any) -> Any:
            in_progress.jitted = Jitted(fun, info)
            return plain(fun, info)

        return cpp_pjit

    def wrap_module(module: Any) -> Any:
        def pjit_function(name: str, fun: Any, cache_miss: Any, *options: Any) -> Any:
            jitted, in_progress.jitted = getattr(in_progress, "jitted", None), None
            if jitted is None:  # JAX makes one for itself
                return module.pjit(name, fun, cache_miss, *options)
            of_jax = getattr(cache_miss, "__wrapped__", cache_miss)

            @traceback_util.api_boundary
            def ask_first(*args: Any, **kwargs: Any) -> Any:
                if (
                    trace.value is core.eval_trace  # (`is_top_level` takes three calls to say so)
                    and axis_env.value is core.top_axis_env
                    and not config.debug_key_reuse.value
                    and not config.no_tracing.value
                ):
                    results = call(jitted, args, kwargs)
                    if results is not NotImplemented:
                        return results, None, False
                return of_jax(*args, **kwargs)

            return module.pjit(name, fun, ask_first, *options)

        own = types.ModuleType(module.__name__)
        vars(own).update(vars(module), pjit=pjit_function)
        return own

    change("jax._src.pjit:_cpp_pjit", wrap_cpp, ALWAYS)
    change("jax._src.pjit:_jax", wrap_module, ALWAYS)
    change("jax._src.pjit:jit_trace", wrap_trace, ALWAYS)
    change("jax._src.api:eval_shape<fun>", wrap_shapes, OBJECTS)
    change("jax._src.pjit:jit_eval_shape<fun>", wrap_shapes, OBJECTS)
    change("jax._src.pjit:_infer_params", wrap_infer, ALWAYS)
    change("jax._src.pjit:_run_python_pjit", wrap_run, ALWAYS)


def wrap_clear_cache(forget: Callable[[Any], None], forget_all: Callable[[], None]) -> None:
    """Calls ``forget(fun)`` when the caches of the jitted function of ``fun`` are cleared, and
    ``forget_all()`` when those of all are."""

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def clear_cache(jitted: Any) -> None:
            plain(jitted)
            forget(jitted._fun)

        return clear_cache

    change("jax._src.pjit:jit_evict_fn", wrap, ALWAYS)
    _own_caches.append(_OwnCache(forget_all))


class _OwnCache:
    """A cache that `jax.clear_caches` clears."""

    def __init__(self, clear: Callable[[], None]) -> None:
        self.cache_clear = clear
        register_cache(self, "jaxstate")


_own_caches: list[_OwnCache] = []  # JAX has weak references to them


def wrap_ahead_of_time(check: Callable[[Any, Sequence[Any]], None]) -> None:
    """Calls ``check(jaxpr, constants)`` before a jitted function is lowered ahead of time, by
    ``lower`` or by `jax.export`."""

    def wrap(plain: Any) -> Any:
        @functools.wraps(plain)
        def lower(traced: Any, **options: Any) -> Any:
            check(traced.jaxpr, [*traced.jaxpr.consts, *traced._consts])
            return plain(traced, **options)

        return lower

    change("jax._src.stages:Traced.lower", wrap, ALWAYS)
