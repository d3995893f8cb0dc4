"""Every change that is made to JAX, as one table, and how changes are made.

A change replaces a function of JAX by a wrapper around it. `TABLE` says which functions these are,
what their parameters have to be, and for how long they are replaced:

* ``ALWAYS``: from the end of ``import jaxstate`` on.
* ``IN_PLACE``, ``OBJECTS``: while there are arrays that are written in place, or objects of
  `jaxstate.mutate`. The first use of JAX without any takes the wrappers out again, so that plain
  JAX does not pay for them.
* ``LATER``: from when the module is there, which JAX imports only when it is used.

The wrappers are given by `change`, next to what they do. Those of one group are put in together or
not at all, under a lock. A wrapper goes around whatever is in the place, so another library may
have put its own there; and if one has put its own around ours, ours stays, and does nothing while
it is not needed.

(Primitives of other packages are changed by `jaxstate.extend.register_rule`, at once.)
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import jax

__all__ = [
    "ALWAYS",
    "IN_PLACE",
    "LATER",
    "OBJECTS",
    "TABLE",
    "VERSION",
    "Group",
    "Hook",
    "Place",
    "change",
    "new_of_object",
    "place_of",
    "rows_of",
    "version_of",
]

Wrap = Callable[[Any], Any]


class Place(NamedTuple):
    """An attribute of a module, class or primitive, or the content of a cell."""

    owner: Any
    name: str

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def raw(self) -> Any:
        """The attribute as it stands in its class, which may be a `staticmethod`."""
        if isinstance(self.owner, type) and self.has_own():
            return vars(self.owner)[self.name]
        return self.get()

    def has_own(self) -> bool:
        """Whether the attribute is the owner's own, and not one of its class or base."""
        return self.name in getattr(self.owner, "__dict__", (self.name,))

    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name


def place_of(path: str) -> Place:
    """``module:name.name``; ``module:function<variable>`` is what a function closes over."""
    module, _, names = path.partition(":")
    names, _, variable = names.removesuffix(">").partition("<")
    owner: Any = importlib.import_module(module)
    *outer, name = names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    if not variable:
        return Place(owner, name)
    function = getattr(owner, name)
    while variable not in function.__code__.co_freevars:
        function = function.__wrapped__  # another library has wrapped it
    cell = function.__closure__[function.__code__.co_freevars.index(variable)]
    return Place(cell, "cell_contents")


_lock = threading.RLock()


class _Made(NamedTuple):
    place: Place
    plain: Any
    own: bool
    ours: Any


class Group:
    """Changes that are made together.

    Attributes:
      made: what has been changed, in that order; None while nothing is.
      users: how many uses of the group are in progress.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: list[_Made] | None = None
        self.users = 0
        self._kept: WeakSet[Any] = WeakSet()
        self._wraps: dict[tuple[int, str], tuple[Place, list[Wrap]]] = {}
        self._buried: dict[tuple[int, str], _Made] = {}

    def add(self, place: Place, wrap: Wrap) -> None:
        """Enlists a change of a place in the table; any other is made at once."""
        with _lock:
            if place.key() in self._rows:
                assert self.made is None, f"{place} is changed too late"
                self._wraps.setdefault(place.key(), (place, []))[1].append(wrap)
            else:
                self._make(place, [wrap], [])

    @functools.cached_property
    def _rows(self) -> dict[tuple[int, str], Hook]:
        """The rows of the table for this group."""
        return {place_of(row.path).key(): row for row in rows_of(self)}

    def install(self) -> None:
        """Makes the changes, if they are not made.

        Whatever goes wrong is raised when JAX is as it was.
        """
        with _lock:
            if self.made is not None:
                return
            missing = [row.path for key, row in self._rows.items() if key not in self._wraps]
            assert not missing, f"nobody has a wrapper for {missing}"
            made: list[_Made] = []
            try:
                for place, wraps in self._wraps.values():
                    self._make(place, wraps, made)
            except BaseException:
                _undo(made)
                raise
            self.made = made

    def _make(self, place: Place, wraps: list[Wrap], made: list[_Made]) -> None:
        plain = place.get()
        buried = self._buried.pop(place.key(), None)
        if buried is not None and place.raw() is not buried.plain:
            made.append(buried)  # it is still there, in a wrapper of another library
            return
        ours = functools.reduce(lambda f, wrap: wrap(f), wraps, plain)
        row = self._rows.get(place.key())
        if isinstance(place.raw(), staticmethod):
            ours = staticmethod(ours)
        for other in [place, *map(place_of, row.also if row else ())]:
            if other is place or other.get() is plain:
                made.append(_Made(other, other.raw(), other.has_own(), ours))
                setattr(other.owner, other.name, ours)

    def begin(self) -> None:
        """A use of the group begins: the changes are made, and stay until `end`."""
        with _lock:
            self.users += 1
            try:
                self.install()
            except BaseException:
                self.users -= 1
                raise

    def end(self) -> None:
        with _lock:
            self.users -= 1

    def keep_for(self, x: Any) -> None:
        """The changes are made, and stay as long as ``x`` is alive."""
        with _lock:
            self.install()
            self._kept.add(x)

    def remove_unused(self) -> None:
        """Takes the changes back if nothing needs them."""
        with _lock:
            if self.users or self._kept or self.made is None:
                return
            made, self.made = self.made, None
            for m in _undo(made):
                self._buried[m.place.key()] = m


def new_of_object(cls: type, *args: Any, **kwargs: Any) -> Any:
    """What `object.__new__` does. Python does not take a ``__new__`` back from a class for good:
    `object.__new__` would refuse the arguments of ``__init__`` from then on."""
    return object.__new__(cls)


def _undo(made: list[_Made]) -> list[_Made]:
    """Puts back what was there. Returns those changes that another library has wrapped since."""
    buried = []
    for m in reversed(made):
        if m.place.raw() is not m.ours:
            buried.append(m)
        elif m.place.name == "__new__" and not m.own:
            m.place.owner.__new__ = new_of_object
        elif m.own:
            setattr(m.place.owner, m.place.name, m.plain)
        else:
            delattr(m.place.owner, m.place.name)
    return buried


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, without what comes behind them (``.dev20260101``)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


VERSION = version_of(jax.__version__)


def rows_of(group: Group) -> list[Hook]:
    """The rows of the table for a group that this version of JAX has."""
    return [row for row in TABLE if row.group is group and row.since <= VERSION < row.until]


def change(path: str, wrap: Wrap, group: Group) -> None:
    """Has ``wrap`` put around what is at a place of the table, if this version of JAX has it."""
    if any(row.path == path for row in rows_of(group)):
        group.add(place_of(path), wrap)
    else:
        assert any(row.path == path and row.group is group for row in TABLE), path


class LaterGroup(Group):
    """Changes of modules that are imported when they are used, each made by itself."""

    _waiting: dict[str, Wrap]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._waiting = {}

    def when_imported(self, path: str, wrap: Wrap) -> None:
        self._waiting[path] = wrap
        self.look()

    def look(self) -> None:
        """Makes the changes of modules that have been imported since."""
        if not self._waiting:
            return
        with _lock:
            for path in [*self._waiting]:
                module = sys.modules.get(path.partition(":")[0])
                if module is not None and not getattr(module.__spec__, "_initializing", False):
                    self.made = self.made or []
                    self._make(place_of(path), [self._waiting[path]], self.made)
                    del self._waiting[path]

    @property
    def _rows(self) -> dict[tuple[int, str], Hook]:
        return {}


ALWAYS = Group("always")
IN_PLACE = Group("in place")
OBJECTS = Group("objects")
LATER = LaterGroup("later")


class Hook(NamedTuple):
    """A row of the table.

    Attributes:
      path: of the place, see `place_of`.
      parameters: of the function there, by name. Empty if it is written in C++, or a class.
      group: when it is replaced.
      since: the first version of JAX that has it, and
      until: the first one that does not.
      also: other places where the same function is found.
    """

    path: str
    parameters: str
    group: Group
    since: tuple[int, ...] = ()
    until: tuple[int, ...] = (99,)
    also: tuple[str, ...] = ()


_011 = (0, 11)
_012 = (0, 12)
_BIND = "*args, **params"
_BIND_WITH_TRACE = "trace, args, avals, params"
_CALL = "self, *args, **kwargs"
_LAX = "jax._src.lax.lax:"
_LOOPS = "jax._src.lax.control_flow.loops:"
_BRANCHES = "jax._src.lax.control_flow.conditionals:"
_SOLVES = "jax._src.lax.control_flow.solves:"
_RULES = "jax._src.custom_derivatives:"
_BUILDING = "jax._src.interpreters.partial_eval:"
_DERIVATIVES = "jax._src.interpreters.ad:"
_VMAP = "jax._src.interpreters.batching:"


def _primitive(path: str, since: Any = (), until: Any = (99,)) -> Iterator[Hook]:
    """What a primitive does with its operands as they are given, and under the trace it meets."""
    yield Hook(f"{path}.bind", _BIND, ALWAYS, since, until)
    yield Hook(f"{path}.bind_with_trace", _BIND_WITH_TRACE, ALWAYS, since, until)


TABLE: tuple[Hook, ...] = (
    # Jitted calls at top level, where there is no bind.
    Hook("jax._src.pjit:_cpp_pjit", "fun, jit_info", ALWAYS),
    Hook("jax._src.pjit:_jax", "", ALWAYS),
    Hook("jax._src.pjit:_infer_params", "fun, ji, args, kwargs", ALWAYS),
    Hook("jax._src.pjit:_run_python_pjit", "p, args_flat, fun, args, kwargs", ALWAYS),
    Hook(
        "jax._src.pjit:jit_evict_fn", "self", ALWAYS, also=("jaxlib._jax:PjitFunction.clear_cache",)
    ),
    Hook(
        "jax._src.pjit:jit_trace", "jit_func, *args, **kwargs", ALWAYS,
        also=("jaxlib._jax:PjitFunction.trace",),
    ),
    Hook("jax._src.stages:Traced.lower", "self, lowering_platforms, _private_parameters", ALWAYS),
    # Primitives that have jaxprs among their parameters.
    *_primitive("jax._src.pjit:jit_p"),
    *_primitive(f"{_LOOPS}scan_p"),
    *_primitive(f"{_LOOPS}while_p"),
    *_primitive(f"{_BRANCHES}cond_p"),
    Hook("jax._src.ad_checkpoint:remat_p.bind", "jaxpr, prevent_cse, differentiated, policy, *args",
         ALWAYS),
    Hook("jax._src.ad_checkpoint:remat_p.bind_with_trace", _BIND_WITH_TRACE, ALWAYS),
    *_primitive("jax._src.core:closed_call_p", until=_011),
    *_primitive("jax._src.core:eval_jaxpr_p", since=_011),
    *_primitive("jax._src.compute_on:compute_on_p"),
    *_primitive("jax.experimental.scheduling_groups:xla_metadata_call_p", until=_011),
    *_primitive("jax._src.xla_metadata:xla_metadata_call_p", since=_011),
    *_primitive("jax._src.pjit:program_order_p", since=_011, until=_012),
    *_primitive("jax._src.program_order:program_order_p", since=_012),
    *_primitive(f"{_SOLVES}linear_solve_p"),
    *_primitive(f"{_RULES}linear_call_p"),
    *_primitive(f"{_RULES}remat_opt_p"),
    *_primitive("jax._src.custom_batching:custom_vmap_p"),
    *_primitive("jax._src.hijax:call_hi_primitive_p"),
    Hook(f"{_RULES}custom_jvp_call_p.bind_with_trace", _BIND_WITH_TRACE, ALWAYS),
    Hook(f"{_RULES}custom_vjp_call_p.bind_with_trace", _BIND_WITH_TRACE, ALWAYS),
    Hook("jax._src.shard_map:shard_map_p.bind_with_trace", _BIND_WITH_TRACE, ALWAYS),
    # Functions that call others before there is a primitive.
    Hook(f"{_LOOPS}while_loop<fun>", "cond_fun, body_fun, init_val", ALWAYS),
    Hook(f"{_SOLVES}_transpose_one_output", "linear_fun, primals", ALWAYS),
    Hook(f"{_SOLVES}_custom_root.jvp", "const_lengths, jaxprs, primals, tangents", ALWAYS,
         until=_011),
    Hook(f"{_SOLVES}_custom_root", "const_lengths, jaxprs, *args", ALWAYS, until=_011),
    Hook("jax._src.hijax:custom_jvp3.__call__", _CALL, ALWAYS, since=_011),
    Hook("jax._src.hijax:custom_vjp3.__call__", _CALL, ALWAYS),
    Hook(
        "jax._src.api:vmap",
        "fun, in_axes, out_axes, axis_name, axis_size, spmd_axis_name, sum_match", ALWAYS,
    ),
    # Where captures leave a jaxpr.
    Hook(f"{_BUILDING}JaxprStackFrame.to_jaxpr",
         "self, trace, out_tracers, debug_info, source_info", ALWAYS),
    Hook("jax._src.core:eval_jaxpr", "jaxpr, consts, propagate_source_info, *args", ALWAYS,
         also=("jax.core:eval_jaxpr",)),
    Hook(f"{_RULES}_closure_convert_for_avals", "fun, in_tree, in_avals, debug_info", ALWAYS),
    Hook("jax._src.api:make_jaxpr<fun>", "fun, static_argnums, axis_env, return_shape", ALWAYS),
    # The error that JAX has for ``x[i] = y``.
    Hook("jax._src.array:ArrayImpl.__setitem__", "self, i, x", ALWAYS),
    Hook("jax._src.core:ShapedArray._setitem", "self, i, x", ALWAYS),
    # Functions that become kernels.
    Hook(f"{_LAX}_reduction_jaxpr", "computation, aval", ALWAYS),
    Hook(f"{_LAX}_variadic_reduction_jaxpr", "computation, debug_info, flat_avals, aval_tree",
         ALWAYS),
    Hook("jax._src.custom_partitioning:custom_partitioning.__call__", _CALL, LATER),
    Hook("jax._src.pallas.pallas_call:_trace_kernel_to_jaxpr",
         "fun, debug_info, grid_mapping, kernel_avals, kernel_in_tree, kernel_in_transforms,"
         " indexer",
         LATER, until=_011),
    Hook("jax._src.pallas.pallas_call:_trace_kernel_to_jaxpr",
         "fun, debug_info, grid_mapping, kernel_avals, kernel_in_transforms, indexer",
         LATER, since=_011),
    # Arrays that are written in place: what tracers are, and where values pass without a bind.
    Hook(f"{_BUILDING}DynamicJaxprTracer.__new__", "", IN_PLACE),
    Hook(f"{_VMAP}BatchTracer.__new__", "", IN_PLACE),
    Hook(f"{_DERIVATIVES}JVPTracer.__new__", "", IN_PLACE),
    Hook(f"{_DERIVATIVES}LinearizeTracer.__new__", "", IN_PLACE),
    Hook(f"{_VMAP}BatchTrace.to_batch_info", "self, val", IN_PLACE),
    Hook(f"{_DERIVATIVES}JVPTrace.to_primal_tangent_pair", "self, val", IN_PLACE),
    Hook(f"{_DERIVATIVES}LinearizeTrace.to_primal_tangent_pair", "self, val", IN_PLACE),
    Hook(f"{_BUILDING}JaxprTrace.to_jaxpr_tracer", "self, x", IN_PLACE),
    Hook(f"{_VMAP}to_elt", "trace, get_idx, x, spec", IN_PLACE),
    Hook(f"{_DERIVATIVES}maybe_jvp_tracer", "trace, primal, tangent", IN_PLACE),
    Hook(f"{_DERIVATIVES}maybe_linearize_tracer", "trace, primal, is_nonzero, tangent", IN_PLACE),
    Hook(f"{_DERIVATIVES}_strip_tracer", "tracer_type, tag, x", IN_PLACE),
    Hook("jax._src.api:argnums_partial2", "f, dyn_argnums, args, kwargs", IN_PLACE),
    Hook("jax._src.api:_device_get", "x", IN_PLACE),
    Hook(f"{_BUILDING}_jaxpr_forwarding", "jaxpr", IN_PLACE),
    Hook(f"{_RULES}_filter_forwarded_inputs", "outs, ins", IN_PLACE),
    Hook(f"{_LAX}broadcast_in_dim_p.bind", _BIND, IN_PLACE),
    Hook(f"{_LAX}convert_element_type_p.bind", _BIND, IN_PLACE),
    Hook("jax._src.core:stage_p.bind", _BIND, IN_PLACE),
    Hook(f"{_RULES}custom_jvp_call_p.bind_with_trace", _BIND_WITH_TRACE, IN_PLACE),
    Hook(f"{_RULES}custom_vjp_call_p.bind_with_trace", _BIND_WITH_TRACE, IN_PLACE),
    Hook("jax._src.random.prng:PRNGKeyArray.__iter__", "self", IN_PLACE),
    Hook("jax._src.random.prng:PRNGKeyArray.copy", "self", IN_PLACE),
    Hook("jax._src.sharding_impls:set_mesh.__init__", "self, mesh", IN_PLACE),
    Hook("jax._src.stages:Compiled.__call__", _CALL, IN_PLACE),
    Hook("jax._src.sharding_impls:get_mesh", "", IN_PLACE, also=("jax.sharding:get_mesh",)),
    Hook(f"{_LAX}full", "shape, fill_value, dtype, sharding", IN_PLACE, also=("jax.lax:full",)),
    Hook(f"{_LAX}full_like", "x, fill_value, dtype, shape, sharding", IN_PLACE,
         also=("jax.lax:full_like",)),
    # Objects of `mutate`: where JAX calls functions of the program.
    Hook("jax._src.core:set_current_trace", "", OBJECTS),
    Hook(f"{_BUILDING}trace_to_jaxpr", "", OBJECTS),
    Hook(f"{_BUILDING}FlatTree", "", OBJECTS, until=_011),
    Hook(f"{_BUILDING}ft", "", OBJECTS, since=_011),
    Hook("jax._src.tree_util:FlatTree.unflatten", "self", OBJECTS, until=_011),
    Hook("jax._src.flattree:FlatTree.unflatten", "self", OBJECTS, since=_011),
    *(Hook(f"jax._src.{module}:tree_unflatten", "treedef, leaves", OBJECTS) for module in (
        "api_util", "interpreters.batching", "custom_derivatives", "custom_batching", "pmap",
        "shard_map",
    )),
    *(Hook(f"jax._src.{module}:tree_flatten", "tree, is_leaf", OBJECTS) for module in (
        "api_util", "custom_derivatives", "custom_batching", "pmap",
    )),
    Hook("jax._src.shard_map:FlatTree", "", OBJECTS, until=_011),
    Hook("jax._src.shard_map:ft", "", OBJECTS, since=_011),
    Hook("jax._src.api:eval_shape<fun>", "fun, *args, **kwargs", OBJECTS),
    Hook("jax._src.pjit:jit_eval_shape<fun>", "jit_func, *args, **kwargs", OBJECTS),
    Hook(f"{_LOOPS}scan<fun>", "f, init, xs, length, reverse, unroll, _split_transpose", OBJECTS),
    Hook(f"{_LOOPS}while_loop<fun>", "cond_fun, body_fun, init_val", OBJECTS),
    Hook(f"{_LOOPS}fori_loop<fun>", "lower, upper, body_fun, init_val, unroll", OBJECTS),
    Hook(f"{_BRANCHES}cond<fun>", "pred, true_fun, false_fun, operand, *operands", OBJECTS),
    Hook(f"{_BRANCHES}switch<fun>", "index, branches, operand, *operands", OBJECTS),
    Hook("jax._src.ad_checkpoint:tracing_registry", "", OBJECTS),
    Hook("jax._src.callback:_FlatCallback", "", OBJECTS),
    Hook("jax._src.debugging:debug_callback", "callback, ordered, partitioned, *args, **kwargs",
         OBJECTS, also=("jax.debug:callback",)),
)  # fmt: skip
