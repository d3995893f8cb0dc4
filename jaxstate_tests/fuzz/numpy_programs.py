"""Random NumPy programs: several arrays, views of views, chained writes and reads, loops, branches.

A program is a list of statements, made together with the types of the names in scope. `run`
executes it with NumPy, or with JAX inside an in-place function, where its blocks are those of
`jax.lax` and `jax`. A kind of statement is a pair of functions that stand together: one that makes
it, with hypothesis, and one that runs it.

Numbers are small integers (in one array of floating-point type, which is only added to), so that
results are compared exactly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jaxstate
from jaxstate_tests.fuzz.numpy_statements import (
    DTYPES,
    MAKE,
    SHAPES,
    WEIGHTS,
    Scope,
    Statement,
    _any_name,
    execute,
    makes,
    runs,
)


# Blocks. Their bodies see the names outside by closure.
def _make_body(draw, scope, size=3):
    return [draw(a_statement(scope)) for _ in range(draw(st.integers(1, size)))]


BLOCKS_ONCE = ("jit", "checkpoint", "helper", "grad", "jvp", "vjp", "custom_jvp", "inner jit")
BLOCKS_LOOP = ("fori", "scan", "unrolled", "while", "python", "condition")


@makes("loop", 3)
def _make_loop(draw, scope):
    body = _make_body(draw, scope.inside(in_loop=True))
    block = draw(st.sampled_from(BLOCKS_LOOP))
    return Statement("loop", value=(block, draw(st.integers(0, 3))), body=body)


@runs("loop")
def _run_loop(s, env, i, way):
    block, n = s.value
    way.loops[block](n, lambda j: execute(s.body, dict(env), j, way))


@makes("once", 3)
def _make_once(draw, scope):
    body = _make_body(draw, scope.inside())
    return Statement("once", value=draw(st.sampled_from(BLOCKS_ONCE)), body=body)


@runs("once")
def _run_once(s, env, i, way):
    way.once[s.value](lambda: execute(s.body, dict(env), i, way))


@makes("until")
def _make_until(draw, scope):
    """A loop that ends when an array that its body may write says so."""
    body = _make_body(draw, scope.inside(in_loop=True))
    source = _any_name(draw, scope)
    return Statement("until", source=source, value=draw(st.integers(-3, 3)), body=body)


@runs("until")
def _run_until(s, env, i, way):
    way.until(
        lambda j: (j < 3) & is_larger(env[s.source], s.value),
        lambda j: execute(s.body, dict(env), j, way),
    )


def is_larger(x, limit):
    return x.astype(np.int32).sum(dtype=np.int32) > limit


@makes("cond", 2)
def _make_cond(draw, scope):
    source = _any_name(draw, scope)
    body, other = _make_body(draw, scope.inside()), _make_body(draw, scope.inside(), 2)
    kind = draw(st.sampled_from(("cond", "switch")))
    return Statement(
        "cond", source=source, value=(kind, draw(st.integers(-3, 3))), body=body, other=other
    )


@runs("cond")
def _run_cond(s, env, i, way):
    kind, limit = s.value
    way.branches[kind](
        is_larger(env[s.source], limit),
        lambda: execute(s.body, dict(env), i, way),
        lambda: execute(s.other, dict(env), i, way),
    )


# Blocks with an argument, which they write, and a result: both are copies.
CALLS = ("jit", "inplace", "carry", "checkpoint", "cond")


@makes("call", 2)
def _make_call(draw, scope):
    source = draw(st.sampled_from([n for n in sorted(scope.types) if scope.shape(n)]))
    inside = scope.inside()
    argument = inside.add(*scope.types[source])
    body = _make_body(draw, inside)
    new = scope.add(*scope.types[source])
    call = draw(st.sampled_from(CALLS))
    return Statement("call", new, source, value=(call, argument), body=body)


@runs("call")
def _run_call(s, env, i, way):
    call, argument = s.value

    def body(x):
        inside = dict(env, **{argument: x})
        execute(s.body, inside, i, way)
        return inside[argument]

    env[s.target] = way.calls[call](body, env[s.source])


# Blocks that give what an array from outside is when they end: the result is a copy.
RESULTS = ("jit", "inner jit", "scan", "map", "cond", "checkpoint", "vmap", "custom_jvp")


@makes("result", 2)
def _make_result(draw, scope):
    body = _make_body(draw, scope.inside())
    source = draw(st.sampled_from([n for n in sorted(scope.types) if scope.shape(n)]))
    new = scope.add(*scope.types[source])
    return Statement("result", new, source, value=draw(st.sampled_from(RESULTS)), body=body)


@runs("result")
def _run_result(s, env, i, way):
    def body():
        execute(s.body, dict(env), i, way)
        return env[s.source]

    env[s.target] = way.results[s.value](body)


@makes("lanes", 2)
def _make_lanes(draw, scope):
    """A function of the rows of an array; in a vmap it may write nothing else."""
    names = [n for n in sorted(scope.types) if len(scope.shape(n)) > 1 and scope.shape(n)[0]]
    source = draw(st.sampled_from(names))
    block = draw(st.sampled_from(("vmap", "scan", "map")))
    shape, dtype = scope.types[source]
    inside = scope.inside()
    if block == "vmap":
        inside.fixed = set(inside.types)
    argument = inside.add(shape[1:], dtype)
    body = _make_body(draw, inside)
    return Statement("lanes", scope.add(shape, dtype), source, value=(block, argument), body=body)


@runs("lanes")
def _run_lanes(s, env, i, way):
    block, argument = s.value

    def body(row):
        inside = dict(env, **{argument: row})
        execute(s.body, inside, i, way)
        return inside[argument]

    env[s.target] = way.lanes[block](body, env[s.source])


@st.composite
def a_statement(draw, scope):
    blocks = ("loop", "once", "until", "cond", "call", "result", "lanes")
    kinds = [k for k, n in WEIGHTS.items() for _ in range(n) if scope.depth or k not in blocks]
    return MAKE[draw(st.sampled_from(kinds))](draw, scope)


@st.composite
def programs(draw, depth=2, size=6):
    """Programs for the arrays that `initial` gives."""
    scope = Scope({n: (SHAPES[n], DTYPES[n]) for n in SHAPES}, set(), False, depth)
    return _make_body(draw, scope, size)


# -- Running them ------------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """How blocks are executed. See `BLOCKS_LOOP` and so on for the names."""

    xp: Any
    loops: dict[str, Callable]
    until: Callable
    once: dict[str, Callable]
    branches: dict[str, Callable]
    calls: dict[str, Callable]
    results: dict[str, Callable]
    lanes: dict[str, Callable]


def _python(xp):
    def loop(n, body):
        for i in range(n):
            body(i)

    def until(condition, body):
        i = 0
        while condition(i):
            body(i)
            i += 1

    def cond(p, yes, no):
        yes() if p else no()

    def call(body, x):
        return body(x.copy()).copy()

    def lanes(body, x):
        return xp.stack([body(row.copy()) for row in x.copy()])

    return Way(
        xp, dict.fromkeys(BLOCKS_LOOP, loop), until,
        dict.fromkeys(BLOCKS_ONCE, lambda body: body()), {"cond": cond, "switch": cond},
        dict.fromkeys(CALLS, call), dict.fromkeys(RESULTS, lambda body: body().copy()),
        dict.fromkeys(("vmap", "scan", "map"), lanes),
    )  # fmt: skip


NUMPY, PYTHON = _python(np), _python(jnp)


def _fori(n, body):
    jax.lax.fori_loop(0, n, lambda i, _: body(i), None)


def _scan(n, body, unroll=1):
    jax.lax.scan(lambda _, i: (None, body(i)), None, jnp.arange(n), unroll=unroll)


def _while(n, body):
    _until(lambda i: i < n, body)


def _until(condition, body):
    def turn(i):
        body(i)
        return i + 1

    jax.lax.while_loop(condition, turn, 0)


def _in_condition(n, body):
    """The body runs in the condition, which also runs when the loop ends."""

    def condition(i):
        jax.lax.cond(i < n, body, lambda i: None, i)
        return i < n

    jax.lax.while_loop(condition, lambda i: i + 1, 0)


def _with_tangent(body):
    def f(t):
        body()
        return t * t

    return f


def _with_custom_rule(body):
    @jax.custom_jvp
    def f(t):
        body()
        return t

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    f(1.0)


def _result_of_custom_rule(body):
    f = jax.custom_jvp(lambda t: body())
    f.defjvp(lambda primals, tangents: (f(*primals), f(*primals)))
    return f(1.0)


def _carried(body, x):
    return jax.lax.scan(lambda x, _: (body(x), None), x, length=1)[0]


LAX = Way(
    jnp,
    {
        "fori": _fori,
        "scan": _scan,
        "unrolled": lambda n, body: _scan(n, body, 2),
        "while": _while,
        "python": PYTHON.loops["python"],
        "condition": _in_condition,
    },
    _until,
    {
        "jit": lambda body: jax.jit(body)(),
        "inner jit": lambda body: jax.jit(lambda: jax.jit(body)())(),
        "checkpoint": lambda body: jax.checkpoint(body)(),
        "helper": lambda body: body(),
        "grad": lambda body: jax.grad(_with_tangent(body))(1.0),
        "jvp": lambda body: jax.jvp(_with_tangent(body), (1.0,), (1.0,)),
        "vjp": lambda body: jax.vjp(_with_tangent(body), 1.0)[1](1.0),
        "custom_jvp": _with_custom_rule,
    },
    {
        "cond": jax.lax.cond,
        "switch": lambda p, yes, no: jax.lax.switch(p.astype(np.int32), [no, yes]),
    },
    {
        "jit": lambda body, x: jax.jit(body)(x),
        "inplace": lambda body, x: jaxstate.inplace(body)(x),
        "carry": _carried,
        "checkpoint": lambda body, x: jax.checkpoint(body)(x),
        "cond": lambda body, x: jax.lax.cond(True, body, lambda x: x, x),
    },
    {
        "jit": lambda body: jax.jit(body)(),
        "inner jit": lambda body: jax.jit(lambda: jax.jit(body)())(),
        "scan": lambda body: jax.lax.scan(lambda _, x: (None, body()), None, length=1)[1][0],
        "map": lambda body: jax.lax.map(lambda _: body(), jnp.arange(1))[0],
        "cond": lambda body: jax.lax.cond(True, body, body),
        "checkpoint": lambda body: jax.checkpoint(body)(),
        "vmap": lambda body: jax.vmap(lambda _: body())(jnp.arange(1))[0],
        "custom_jvp": _result_of_custom_rule,
    },
    {
        "vmap": lambda body, x: jax.vmap(body)(x),
        "scan": lambda body, x: jax.lax.scan(lambda _, row: (None, body(row)), None, x)[1],
        "map": jax.lax.map,
    },
)


def run(program, arrays, way):
    """The arrays after the program, and the names that it made at its top level."""
    env = dict(arrays)
    execute(program, env, 0, way)
    return env
