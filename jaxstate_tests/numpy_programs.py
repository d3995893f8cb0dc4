"""Random NumPy programs: several arrays, views of views, chained writes and reads, loops, branches.

A program is a list of statements, made together with the shapes it needs. `run` executes it with
NumPy, or with JAX inside an in-place function, where its blocks are those of `jax.lax`.
Numbers are integers, so that results are compared exactly.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

SHAPES = {"a": (4, 5), "b": (3, 4), "c": (12,)}
DTYPES = {"a": np.int32, "b": np.int8, "c": np.int32}
OPS = {
    "+": (operator.add, operator.iadd),
    "-": (operator.sub, operator.isub),
    "*": (operator.mul, operator.imul),
    "&": (operator.and_, operator.iand),
    "^": (operator.xor, operator.ixor),
}
BLOCKS = ("fori", "scan", "while", "jit", "cond", "checkpoint", "python", "helper")


def initial(seed):
    """The arrays that a program starts with."""
    rng = np.random.default_rng(seed)
    return {n: rng.integers(-9, 9, SHAPES[n]).astype(DTYPES[n]) for n in SHAPES}


@dataclasses.dataclass
class Counter:
    """The counter of the innermost loop, plus a constant, modulo the size of an axis."""

    size: int
    sign: int

    def __repr__(self):
        return "i" if self.sign > 0 else f"i-{self.size}"


@dataclasses.dataclass
class Mask:
    """``array > limit``, whole."""

    limit: int

    def __repr__(self):
        return f"mask>{self.limit}"


@dataclasses.dataclass
class Statement:
    kind: str
    target: str = ""
    source: str = ""
    index: Any = ()
    value: Any = None
    op: str = "+"
    body: Any = ()
    other: Any = ()

    def __repr__(self):
        parts = [f"{k}={v!r}" for k, v in vars(self).items() if k != "kind" and v not in ("", ())]
        return f"{self.kind}({', '.join(parts)})"


# -- Making programs -------------------------------------------------------------------------


def shape_of_index(shape, index):
    stand_in = [
        0 if isinstance(e, Counter) else np.asarray(e) if isinstance(e, list) else e for e in index
    ]
    return np.broadcast_to(np.int8(0), shape)[tuple(stand_in)].shape


@st.composite
def an_index(draw, shape, *, in_loop, basic=False):
    """An index that is in bounds, and whose positions are not repeated."""
    kinds = ["int", "slice", "slice", "slice"] + (["counter"] * 3 if in_loop else [])
    kinds += [] if basic else ["array", "list", "bools"]
    entries, advanced = [], False
    used = draw(st.integers(0, len(shape)))
    for n in shape[:used]:
        kind = draw(st.sampled_from(kinds))
        if kind in ("array", "list", "bools") and advanced:
            kind = "slice"
        if kind == "int":
            entries.append(draw(st.integers(-n, n - 1)) if n else slice(None))
        elif kind == "counter" and n:
            entries.append(Counter(n, draw(st.sampled_from((1, -1)))))
        elif kind in ("array", "list") and n:
            advanced = True
            chosen = draw(st.permutations(range(n)))[: draw(st.integers(1, n))]
            entries.append(list(chosen) if kind == "list" else np.array(chosen))
        elif kind == "bools":
            advanced = True
            entries.append(np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool))
        else:
            bound = st.none() | st.integers(-n - 1, n + 1)
            step = draw(st.sampled_from((None, 1, 2, -1, -2, 3)))
            entries.append(slice(draw(bound), draw(bound), step))
    if draw(st.booleans()) and used < len(shape):
        entries.append(Ellipsis)
    if draw(st.integers(0, 4)) == 0:
        entries.insert(draw(st.integers(0, len(entries))), None)
    return tuple(entries)


@st.composite
def a_value(draw, shapes, shape):
    """A number, an array that broadcasts to the shape, or an element of another array."""
    kind = draw(st.sampled_from(("number", "array", "read")))
    if kind == "array":
        keep = draw(st.integers(0, len(shape)))
        sizes = [n if draw(st.booleans()) else 1 for n in shape[len(shape) - keep :]]
        flat = draw(st.lists(st.integers(-9, 9), min_size=1, max_size=6))
        return np.resize(np.array(flat, np.int32), sizes)
    if kind == "read":
        same = [name for name, s in sorted(shapes.items()) if s == tuple(shape)]
        if same:
            return draw(st.sampled_from(same))
    return draw(st.integers(-9, 9))


@st.composite
def statements(draw, shapes, depth, *, in_loop=False, size=6):
    """A list of statements; ``shapes`` are the arrays in scope, new views are added to it."""
    made = []
    for _ in range(draw(st.integers(1, size))):
        made.append(draw(a_statement(shapes, depth, in_loop=in_loop)))
    return made


@st.composite
def a_statement(draw, shapes, depth, *, in_loop):
    kinds = ["write", "write", "augment", "augment", "whole", "view", "view", "masked", "method"]
    kinds += ["copy", "gather"]
    kinds += ["block"] * 4 if depth else []
    kind = draw(st.sampled_from(kinds))
    target = draw(st.sampled_from(sorted(shapes)))
    shape = shapes[target]
    op = draw(st.sampled_from(sorted(OPS)))
    if kind in ("write", "augment"):
        index = draw(an_index(shape, in_loop=in_loop))
        value = draw(a_value(shapes, shape_of_index(shape, index)))
        return Statement(kind, target, index=index, value=value, op=op)
    if kind == "masked":
        mask = Mask(draw(st.integers(-5, 5)))
        return Statement("masked", target, index=mask, value=draw(st.integers(-9, 9)), op=op)
    if kind == "whole":
        return Statement("whole", target, value=draw(a_value(shapes, shape)), op=op)
    if kind == "method":
        name = draw(st.sampled_from(("fill", "sort", "put")))
        n = max(int(np.prod(shape)), 1)
        where = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True))
        return Statement(name, target, value=draw(st.integers(-9, 9)), index=where)
    new = f"v{len(shapes)}"
    if kind == "view":
        how = draw(st.sampled_from(("index", "index", "T", "reshape", "swapaxes")))
        if how == "index":
            index = draw(an_index(shape, in_loop=in_loop, basic=True))
            found = shape_of_index(shape, index)
            if found:
                shapes[new] = found
                return Statement("view", new, source=target, index=index)
        n = int(np.prod(shape))
        if how == "reshape" and n:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            d = draw(st.sampled_from(divisors))
            shapes[new] = draw(st.sampled_from(((d, n // d), (n,))))
            return Statement("reshape", new, source=target, value=shapes[new])
        if how == "swapaxes" and len(shape) > 1:
            shapes[new] = (*shape[:-2], shape[-1], shape[-2])
            return Statement("swapaxes", new, source=target)
        shapes[new] = shape[::-1]
        return Statement("T", new, source=target)
    if kind in ("copy", "gather"):
        index = draw(an_index(shape, in_loop=in_loop)) if kind == "gather" else ()
        found = shape_of_index(shape, index)
        if kind == "gather" and (
            not found or not any(isinstance(e, (list, np.ndarray)) for e in index)
        ):
            return Statement("whole", target, value=1, op="+")
        shapes[new] = found
        return Statement(kind, new, source=target, index=index)
    block = draw(st.sampled_from(BLOCKS))
    looping = block in ("fori", "scan", "while", "python")
    inside = in_loop or looping
    body = draw(statements(dict(shapes), depth - 1, in_loop=inside, size=3))
    other = draw(statements(dict(shapes), depth - 1, in_loop=inside, size=2))
    count = draw(st.integers(0, 3))
    return Statement(block, target, value=count, body=body, other=other)


@st.composite
def programs(draw):
    """Programs for the arrays that `initial` gives."""
    return draw(statements(dict(SHAPES), 2))


# -- Running them ----------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """How blocks are executed."""

    fori: Callable
    scan: Callable
    while_: Callable
    cond: Callable
    jit: Callable
    checkpoint: Callable


def _python_loop(n, body):
    for i in range(n):
        body(i)


def _python_cond(p, yes, no):
    yes() if p else no()


PYTHON = Way(
    _python_loop, _python_loop, _python_loop, _python_cond, lambda body: body(), lambda body: body()
)


def _fori(n, body):
    def turn(i, carry):
        body(i)
        return carry

    jax.lax.fori_loop(0, n, turn, None)


def _scan(n, body):
    def turn(carry, i):
        body(i)
        return carry, None

    jax.lax.scan(turn, None, jnp.arange(n))


def _while(n, body):
    def turn(i):
        body(i)
        return i + 1

    jax.lax.while_loop(lambda i: i < n, turn, 0)


LAX = Way(
    _fori, _scan, _while, jax.lax.cond, lambda body: jax.jit(body)(),
    lambda body: jax.checkpoint(body)(),
)  # fmt: skip


def _index(entries, i):
    def value(e):
        if isinstance(e, Counter):
            j = i % e.size
            return j if e.sign > 0 else j - e.size
        return e

    return tuple(value(e) for e in entries)


def _value(env, value):
    return env[value] if isinstance(value, str) else value


def execute(statements, env, i, way):
    for s in statements:
        _execute(s, env, i, way)


def _execute(s, env, i, way):
    if s.kind == "write":
        env[s.target][_index(s.index, i)] = _value(env, s.value)
    elif s.kind == "augment":
        target, index, value = env[s.target], _index(s.index, i), _value(env, s.value)
        target[index] = OPS[s.op][0](target[index], value)
        if s.op == "+":
            target[index] += 1
        elif s.op == "*":
            target[index] *= 2
    elif s.kind == "masked":
        target = env[s.target]
        target[target > s.index.limit] = s.value
    elif s.kind == "whole":
        value = _value(env, s.value)
        target = env[s.target]
        if not isinstance(value, int):  # int8 += int32 is refused by both
            value = value.astype(target.dtype)
        env[s.target] = OPS[s.op][1](target, value)
    elif s.kind == "fill":
        env[s.target].fill(s.value)
    elif s.kind == "sort":
        env[s.target].sort()
    elif s.kind == "put":
        if env[s.target].size:
            env[s.target].put(np.array(s.index), s.value)
    elif s.kind == "view":
        env[s.target] = env[s.source][_index(s.index, i)]
    elif s.kind == "reshape":
        env[s.target] = env[s.source].reshape(s.value)
    elif s.kind == "swapaxes":
        env[s.target] = env[s.source].swapaxes(-1, -2)
    elif s.kind == "T":
        env[s.target] = env[s.source].T
    elif s.kind == "copy":
        env[s.target] = env[s.source].copy()
    elif s.kind == "gather":
        env[s.target] = env[s.source][_index(s.index, i)]
    elif s.kind == "python":
        _python_loop(s.value, lambda j: execute(s.body, dict(env), j, way))
    elif s.kind == "helper":
        execute(s.body, dict(env), i, way)
    elif s.kind in ("fori", "scan", "while"):
        loop = {"fori": way.fori, "scan": way.scan, "while": way.while_}[s.kind]
        loop(s.value, lambda j: execute(s.body, dict(env), j, way))
    elif s.kind == "cond":
        positive = env[s.target].sum() > 0
        way.cond(
            positive,
            lambda: execute(s.body, dict(env), i, way),
            lambda: execute(s.other, dict(env), i, way),
        )
    else:
        wrapper = {"jit": way.jit, "checkpoint": way.checkpoint}[s.kind]
        wrapper(lambda: execute(s.body, dict(env), i, way))


def run(program, arrays, way):
    """The arrays after the program, and the views that it made at its top level."""
    env = dict(arrays)
    execute(program, env, 0, way)
    return env
