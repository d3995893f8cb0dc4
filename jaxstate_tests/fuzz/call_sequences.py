"""Random programs whose functions and modules are shared, and random sequences of calls of them.

A program is a list of definitions. Each is a body of statements about a float32 scalar ``x``, as in
`random_programs`, and is a module (a parametrized object) or a function. A definition uses those
before it. There is one Python object per definition and per way of using it: one jitted function,
one body of a scan, so that whatever JAX or jaxstate keeps for a function is kept for all its uses:
in several scopes, several modules, several calls, under other types, configurations and threads.

A sequence is a program and actions: init, apply, jit, grad, vmap, a pullback that is kept and
called later, another thread, an emptied cache ... `World` performs them with jaxstate. `ByHand`
performs them in plain Python: no jaxprs, no caches and no loops of JAX, every value computed when
its statement is run, all state in one dict.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.fuzz.random_programs import (
    Arithmetic,
    Body,
    Place,
    Read,
    Scope,
    Write,
    run_by_hand,
    run_stateful,
)
from jaxstate_tests.fuzz.statements_and_ways import (
    FORWARD,
    IN_LANES,
    INITIAL,
    KNOWN_CONTEXTS,
    LANES,
    REVERSE,
    SCALES,
    SLOTS,
    STREAMS,
    WAYS,
    Draw,
    Fresh,
    LaneRule,
    OnlyParameter,
    Parameter,
    ReadVariable,
    Use,
    WriteVariable,
    facts_of,
    lanes_by_hand,
    normal,
    refused,
)

# -- Programs and actions --------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    is_module: bool
    body: Body


@dataclass(frozen=True)
class Program:
    """With ``same_names`` modules are told apart by the order in which they are called first."""

    definitions: tuple[Definition, ...]
    same_names: bool = False

    @functools.cached_property
    def facts(self) -> list[set[str]]:
        found: list[set[str]] = []
        for d in self.definitions:
            found.append(set().union(*(facts_of(s, found) for s in d.body)))
        return found

    @functools.cache  # noqa: B019
    def place(self, root: int) -> Place:
        """With the home of each module under this one: where it is called first."""
        bodies = tuple(d.body for d in self.definitions)
        homes: dict[int, str] = {root: ""}
        self._find_homes(bodies[root], Place("", bodies, homes))
        return Place("", bodies, homes)

    def _find_homes(self, body: Body, at: Place) -> None:
        for statement in body:
            if isinstance(statement, Use):
                inside = at
                if self.definitions[statement.number].is_module:
                    if statement.number in at.homes:
                        continue
                    at.homes[statement.number] = self._home(statement.number, at)
                    inside = at.module(statement.number)
                self._find_homes(at.bodies[statement.number], inside)
            elif isinstance(statement, Scope):
                self._find_homes(statement.body, at.inside(statement.name))

    def _home(self, number: int, at: Place) -> str:
        name = self.name(number)
        taken = [f"{at.path}{name}_{k}/" if k else f"{at.path}{name}/" for k in range(9)]
        return next(home for home in taken if home not in at.homes.values())

    def name(self, number: int) -> str:
        return "m" if self.same_names else f"m{number}"

    def uses(self, root: int) -> set[str]:
        at = self.place(root)
        return set().union(*(statement.uses(at) for statement in at.bodies[root]))

    def entries(self, root: int) -> list[str]:
        kinds = ("param", "variable")
        return sorted(name for name in self.uses(root) if name.split(" ")[0] in kinds)


@dataclass(frozen=True)
class Action:
    """What is done, with which definition, for which ``x`` and parameters, in which contexts."""

    what: str
    number: int = 0
    x: float = 0.6
    values: int = 0
    own_key: bool = False
    under: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sequence:
    program: Program
    actions: tuple[Action, ...]


@functools.cache
def initial_parameter(path: str) -> Any:
    """The documented one: two words of the path's SHA-256 digest, folded into the key."""
    digest, key = hashlib.sha256(path.encode()).digest(), jax.random.key(11)
    for i in (0, 4):
        key = jax.random.fold_in(key, np.uint32(int.from_bytes(digest[i : i + 4], "little")))
    return np.float32(SCALES[path.split("/")[-1]]) * np.asarray(normal(key, (), jnp.float32))


def initial(entry: str) -> Any:
    kind, path = entry.split(" ")
    return initial_parameter(path) if kind == "param" else np.float32(INITIAL[path[-1]])


KINDS = ((np.float32,), (jnp.float32,), (float, np.float32), (jnp.bfloat16, np.float32))


def given(entries: list[str], values: int) -> dict[str, Any]:
    """The values that a call is given: multiples of 1/8, which each type of parameters has."""
    made = {e: np.float32(np.round(initial(e) * (8 + values)) / 8) for e in entries}
    kinds = KINDS[values % len(KINDS)]
    return {
        e: kinds[i % len(kinds)](v) if e.startswith("param") else v
        for i, (e, v) in enumerate(made.items())
    }


# What has derivatives takes no bfloat16: they have the precision of what they belong to.
DERIVATIVES = ("grad", "grad jitted", "jvp", "vjp", "linearize")


def nested(entries: dict[str, Any], kind: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry, value in entries.items():
        if entry.startswith(kind):
            *scopes, name = entry.split(" ")[1].split("/")
            functools.reduce(lambda t, scope: t.setdefault(scope, {}), scopes, tree)[name] = value
    return tree


def flat(tree: Any, kind: str) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{kind} {'/'.join(p.key for p in path)}": value for path, value in leaves}


# -- The contexts that an action may run in --------------------------------------------------


def mesh(kind: str) -> Any:
    types = (getattr(jax.sharding.AxisType, kind),)
    return jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=types))


@contextlib.contextmanager
def flag(name: str) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


CONTEXTS = {
    "x64": lambda: jax.enable_x64(True),
    "disable_jit": jax.disable_jit,
    "precision": lambda: jax.default_matmul_precision("float32"),
    "device": lambda: jax.default_device(jax.devices()[-1]),
    "mesh": lambda: mesh("Auto"),
    "explicit mesh": lambda: mesh("Explicit"),
}


for _flag in ("jax_remat3", "jax_custom_jvp3", "jax_custom_vjp3", "jax_scan3"):
    if hasattr(jax.config, _flag):
        CONTEXTS[_flag] = functools.partial(flag, _flag)


THREAD = "thread"


def in_thread(f: Callable[[], Any]) -> Any:
    """The result of ``f``, or its exception, from a thread of its own."""
    result: list[Any] = []

    def run():
        try:
            result.append((f(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def stream_keys(number: int) -> dict[str, Any]:
    return {name: jax.random.key(20 + 3 * number + i) for i, name in enumerate(STREAMS)}


@contextlib.contextmanager
def open_streams(keys: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                jaxstate.rng_stream(key, name, vmap="share" if name == "shared" else "split")
            )
            for name, key in keys.items()
        }


OWN_KEY = 77
OTHER_THREAD = 10


def own_streams() -> Any:
    return open_streams(stream_keys(OTHER_THREAD))


# -- What both sides do ----------------------------------------------------------------------


class Side:
    """Performs actions. What differs between the two sides is in `World` and `ByHand`.

    ``outside`` is the state that is passed by hand to all calls; with jaxstate there is none.
    """

    outside: Any = None

    def __init__(self, program: Program):
        self.program = program
        self.kept: list[Any] = []
        self.opened = 0

    def net(self, number: int) -> Any:
        """A module as ``(params, x, variables, key, outside) -> (y, (variables, outside))``.

        Parameters and variables are dicts by entry.
        """
        raise NotImplementedError

    def jitted(self, action: Action, run: Any) -> Any:
        return run

    def perform(self, action: Action) -> Any:
        what = action.what.removesuffix(" jitted")
        if what == "kept":
            x = jnp.float32(action.x)
            return self.kept[action.number % len(self.kept)](x) if self.kept else None
        return getattr(self, what)(action)

    def arguments(self, action: Action) -> tuple[Any, ...]:
        kinds = 3 if action.what in DERIVATIVES else len(KINDS)
        entries = given(self.program.entries(action.number), action.values % kinds)
        params = {e: v for e, v in entries.items() if e.startswith("param")}
        state = {e: v for e, v in entries.items() if e.startswith("variable")}
        key = jax.random.key(OWN_KEY) if action.own_key else None
        return params, jnp.float32(action.x), state, key, self.outside

    def apply(self, action: Action) -> Any:
        run = self.jitted(action, self.net(action.number))
        y, (state, self.outside) = run(*self.arguments(action))
        return y, state

    def grad(self, action: Action) -> Any:
        run = jax.value_and_grad(self.net(action.number), argnums=(0, 1), has_aux=True)
        (y, (state, self.outside)), slopes = self.jitted(action, run)(*self.arguments(action))
        return y, state, slopes

    def jvp(self, action: Action) -> Any:
        run, primals, ones = self.in_two(action)
        y, t, (state, self.outside) = jax.jvp(run, primals, ones, has_aux=True)
        return y, t, state

    def vjp(self, action: Action) -> Any:
        run, primals, _ = self.in_two(action)
        y, back, (state, self.outside) = jax.vjp(run, *primals, has_aux=True)
        self.kept.append(back)
        return y, state

    def linearize(self, action: Action) -> Any:
        run, primals, ones = self.in_two(action)
        y, along, (state, self.outside) = jax.linearize(run, *primals, has_aux=True)
        self.kept.append(lambda t: along(ones[0], t))
        return y, state

    def in_two(self, action: Action) -> Any:
        """The module as a function of its parameters and of ``x``, these, and tangents of them."""
        net = self.net(action.number)
        *primals, state, key, outside = self.arguments(action)

        def run(params, x):
            return net(params, x, state, key, outside)

        return run, primals, jax.tree.map(jnp.ones_like, primals)


# -- With jaxstate ---------------------------------------------------------------------------


class World(Side):
    """The Python objects of a program, and the streams and slots that its calls use."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.slots = {name: new_slot(jnp.float32(value)) for name, value in SLOTS.items()}
        self.stack = contextlib.ExitStack()
        self.rebuild()
        self.reopen()

    def rebuild(self, action: Action | None = None) -> None:
        """Other Python objects for the same program; the old ones are gone."""
        definitions = enumerate(self.program.definitions)
        self.objects = [self._object(i, definition) for i, definition in definitions]
        self.functions: dict[Any, Any] = {}
        gc.collect()

    def _object(self, i: int, definition: Definition) -> Any:
        def run(x):
            return run_stateful(definition.body, self, x)

        return (
            jaxstate.parametrized(run, name=self.program.name(i)) if definition.is_module else run
        )

    def function(self, number: int, way: str) -> Any:
        """One object for each way to use a definition."""
        if (number, way) not in self.functions:
            self.functions[number, way] = WAYS[way].stateful(self.objects[number])
        return self.functions[number, way]

    def jitted(self, action, run):
        """One jitted function for all such actions."""
        if not action.what.endswith(" jitted"):
            return run
        return self.functions.setdefault((action.what, action.number), jax.jit(run))

    def close(self) -> None:
        self.stack.close()

    def state(self) -> dict[str, Any]:
        s = {f"slot {name}": read(slot) for name, slot in self.slots.items()}
        return s | {f"count {name}": stream.count for name, stream in self.streams.items()}

    def do(self, action: Action) -> Any:
        def perform():
            with contextlib.ExitStack() as stack:
                for name in action.under:
                    stack.enter_context(CONTEXTS[name]() if name != THREAD else own_streams())
                return self.perform(action)

        return in_thread(perform) if THREAD in action.under else perform()

    def reopen(self, action: Action | None = None) -> None:
        self.stack.close()
        self.streams = self.stack.enter_context(open_streams(stream_keys(self.opened)))
        self.opened += 1

    def clear(self, action: Action) -> None:
        gc.collect()
        jax.clear_caches()

    def call(self, action: Action) -> Any:
        way = "jit" if action.what.endswith(" jitted") else "plain"
        return self.function(action.number, way)(jnp.float32(action.x))

    def net(self, number):
        module = self.objects[number]

        def run(params, x, state, key, outside):
            trees = nested(params, "param"), nested(state, "variable")
            y, state = module.apply_with_state(*trees, x, key=key)
            return y, (flat(state, "variable"), None)

        return run

    def init(self, action: Action) -> Any:
        run = self.jitted(action, self.objects[action.number].init)
        return flat(run(jax.random.key(11), jnp.float32(action.x)), "param")

    def vmap(self, action: Action) -> Any:
        params, x, state, key, _ = self.arguments(action)
        net = self.net(action.number)
        xs = x + 0.2 * jnp.arange(LANES, dtype=jnp.float32)
        ys, (state, _) = jax.vmap(lambda x: net(params, x, state, key, None))(xs)
        return ys, state

    def scan(self, action: Action) -> Any:
        params, x, state, key, _ = self.arguments(action)
        net = self.net(action.number)

        def step(carry, t):
            y, (state, _) = net(params, carry[0] + t, carry[1], key, None)
            return (y, state), y

        start = x, jax.tree.map(jnp.float32, state)
        (y, state), ys = lax.scan(step, start, jnp.array([0.0, 0.1], jnp.float32))
        return y, ys, state


# -- By hand ---------------------------------------------------------------------------------


class ByHand(Side):
    def __init__(self, program: Program):
        super().__init__(program)
        self.outside = {f"slot {name}": np.float32(value) for name, value in SLOTS.items()}
        self.reopen()

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in self.outside.items() if not name.startswith("key")}

    def do(self, action: Action) -> Any:
        """A thread has streams of its own, and the slots of all."""
        if THREAD not in action.under or action.what in ("reopen", "rebuild", "clear"):
            return self.perform(action)
        before = self.outside
        self.outside = before | streams_by_hand(stream_keys(OTHER_THREAD))
        result = self.perform(action)
        self.outside |= {n: v for n, v in before.items() if not n.startswith("slot")}
        return result

    def reopen(self, action: Action | None = None) -> None:
        self.outside |= streams_by_hand(stream_keys(self.opened))
        self.opened += 1

    def rebuild(self, action: Action) -> None:
        pass

    clear = rebuild

    def call(self, action: Action) -> Any:
        at = self.program.place(action.number)
        body = at.bodies[action.number]
        y, self.outside = run_by_hand(body, at, jnp.float32(action.x), self.outside)
        return y

    def net(self, number):
        at = self.program.place(number)

        def run(params, x, state, key, outside):
            """Streams of the call's own key, and variables, are not those outside."""
            own = streams_by_hand({"default": key}) if key is not None else {}
            values = {e: jnp.asarray(v, jnp.float32) for e, v in (params | state).items()}
            y, after = run_by_hand(at.bodies[number], at, x, outside | own | values)
            outside = {name: v if name in own else after[name] for name, v in outside.items()}
            return y, ({e: after[e] for e in state}, outside)

        return run

    def init(self, action: Action) -> Any:
        entries = self.program.entries(action.number)
        return {entry: initial(entry) for entry in entries if entry.startswith("param")}

    def vmap(self, action: Action) -> Any:
        params, x, state, key, _ = self.arguments(action)
        net = self.net(action.number)
        touched = self.program.uses(action.number) - (
            {"count default"} if action.own_key else set()
        )

        def lane(x, outside):
            y, (after, outside) = net(params, x, state, key, outside)
            return (y, after), outside

        xs = [x + jnp.float32(0.2 * i) for i in range(LANES)]
        lanes, self.outside = lanes_by_hand(lane, touched, xs, self.outside)
        return jax.tree.map(lambda *values: jnp.stack(values), *lanes)

    def scan(self, action: Action) -> Any:
        params, x, state, key, _ = self.arguments(action)
        net = self.net(action.number)
        ys = []
        for t in (0.0, 0.1):
            x, (state, self.outside) = net(params, x + jnp.float32(t), state, key, self.outside)
            ys.append(x)
        return x, jnp.stack(ys), state


def streams_by_hand(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"key {n}": k for n, k in keys.items()} | {f"count {n}": 0 for n in keys}


# -- The strategy ----------------------------------------------------------------------------


_hows = st.sampled_from(["set", "add", "scale"])
_leaves = [
    st.builds(Arithmetic, st.sampled_from([0.5, 1.3])),
    st.builds(Draw, st.sampled_from(STREAMS)),
    st.builds(Parameter, st.sampled_from(sorted(SCALES))),
    st.builds(OnlyParameter, st.sampled_from(["w", "u"])),
    st.builds(LaneRule),
    st.builds(Read, st.sampled_from(["a", "b"])),
    st.builds(Write, st.sampled_from(["a", "b"]), _hows),
    st.builds(ReadVariable, st.sampled_from(["v", "r"])),
    st.builds(WriteVariable, st.sampled_from(["v", "r"]), _hows),
]


@st.composite
def _statements(draw: Any, facts: list[set[str]], scoped: bool = False) -> Any:
    kind = draw(st.integers(0, 9))
    uses = [
        Use(number, name)
        for number, inside in enumerate(facts)
        for name, way in WAYS.items()
        if not refused(way.not_with, inside)
    ]
    if kind >= 4 and uses:
        return draw(st.sampled_from(uses))
    if kind == 3 and not scoped:
        return Scope((draw(_statements(facts, True)),), draw(st.sampled_from(["s", "t"])))
    return draw(st.one_of(_leaves))


KEPT = ("vjp", "linearize", "kept")
# The loops that JAX has behind the flag jax_scan3 know no lanes and no derivatives but jvp.
LOOPS = frozenset({"scan", "fori"})
NOT_WITH_SCAN3 = frozenset({"vmap", "grad", "vjp", "linearize"})
NEEDS = {
    "apply": frozenset(),
    "apply jitted": frozenset(),
    "init": frozenset(),
    "init jitted": frozenset(),
    "scan": frozenset(),
    "grad": REVERSE,
    "grad jitted": REVERSE,
    "vjp": REVERSE,
    "jvp": FORWARD,
    "linearize": REVERSE | FORWARD,
    "vmap": IN_LANES,
    "call": frozenset({"params", "variables"}),
    "call jitted": frozenset({"params", "variables"}),
    "kept": frozenset(),
    "reopen": frozenset(),
    "rebuild": frozenset(),
    "clear": frozenset(),
}


@st.composite
def _modules(draw: Any, facts: list[set[str]], same_names: bool) -> Definition:
    """With a parameter first where names are given by order, since a module is named by its first
    use."""
    body = [draw(_statements(facts)) for _ in range(draw(st.integers(1, 3)))]
    names = st.sampled_from(["w", "tenfold"])
    body += [Fresh(k, draw(names)) for k in range(draw(st.integers(-3, 2)))]
    return Definition(True, ((Parameter("w"),) if same_names else ()) + tuple(body))


@st.composite
def sequences(draw: Any, length: int = 10) -> Sequence:
    definitions: list[Definition] = []
    facts: list[set[str]] = []
    same_names = draw(st.booleans())
    for i in range(number := draw(st.integers(2, 5))):
        if i == number - 1 or draw(st.booleans()):
            definitions.append(draw(_modules(facts, same_names)))
        else:
            body = [draw(_statements(facts)) for _ in range(draw(st.integers(1, 3)))]
            definitions.append(Definition(False, tuple(body)))
        facts = Program(tuple(definitions)).facts
    choices = [
        (what, i)
        for what, needs in NEEDS.items()
        for i, d in enumerate(definitions)
        if not refused(needs, facts[i]) and (d.is_module or what.startswith("call"))
    ]
    meshes = [draw(st.sampled_from(["mesh", "explicit mesh"]))]
    names = [n for n in (*CONTEXTS, THREAD) if "mesh" not in n and n not in KNOWN_CONTEXTS]
    actions = []
    for _ in range(draw(st.integers(3, length))):
        what, i = draw(st.sampled_from(choices))
        # Python calls one branch of two without jit, which gives other names. JAX refuses an array
        # that was made under one kind of mesh in the other, and often outside of an explicit one.
        mine = [name for name in names if name != "disable_jit" or not same_names]
        if meshes == ["mesh"] or not ("slots" in facts[i] or what in KEPT):
            mine += meshes
        if facts[i] & LOOPS and (facts[i] | {what.removesuffix(" jitted")}) & NOT_WITH_SCAN3:
            mine = [name for name in mine if name != "jax_scan3"]
        if what in ("reopen", "rebuild", "clear"):  # done by the program itself
            mine = [name for name in mine if what != "reopen" and name != THREAD]
        contexts = st.lists(st.sampled_from(mine or names), max_size=2, unique=True).map(tuple)
        actions.append(
            Action(
                what,
                i,
                draw(st.sampled_from([0.6, -0.4, 0.2])),
                draw(st.integers(0, 3)),
                draw(st.booleans()),
                draw(contexts) if mine and draw(st.booleans()) else (),
            )
        )
    return Sequence(Program(tuple(definitions), same_names), tuple(actions))
