"""Statements of random NumPy programs: how they are drawn, and how they run."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

SHAPES = {"a": (4, 5), "b": (3, 4), "c": (12,), "d": (2, 3, 2), "p": (4, 3)}
DTYPES = {"a": np.int32, "b": np.int8, "c": np.int32, "d": np.float32, "p": np.bool_}
OPS = {
    "+": (operator.add, operator.iadd),
    "-": (operator.sub, operator.isub),
    "*": (operator.mul, operator.imul),
    "&": (operator.and_, operator.iand),
    "|": (operator.or_, operator.ior),
    "^": (operator.xor, operator.ixor),
}
OPS_OF = {np.int32: "+-*&|^", np.int8: "+-*&|^", np.float32: "+-", np.bool_: "&|^"}


def initial(seed):
    """The arrays that a program starts with."""
    rng = np.random.default_rng(seed)
    return {
        n: rng.integers(*((0, 2) if n == "p" else (-9, 9)), SHAPES[n]).astype(DTYPES[n])
        for n in SHAPES
    }


@dataclasses.dataclass
class Scope:
    """The names that a statement may use.

    Attributes:
      types: the shape and dtype of each.
      fixed: those that may be read only: what the lanes of a vmap share.
      in_loop: whether there is a counter.
      depth: how many blocks may be nested further.
    """

    types: dict[str, tuple[tuple[int, ...], Any]]
    fixed: set[str]
    in_loop: bool
    depth: int

    def inside(self, **changes):
        """The scope of a block, which forgets the names that are made in it."""
        return dataclasses.replace(
            self, **{"types": dict(self.types), "fixed": set(self.fixed), "depth": self.depth - 1,
            **changes}
        )  # fmt: skip

    def add(self, shape, dtype, source=None):
        """A new name, read only if it is a view of what is read only."""
        name = f"v{len(self.types)}"
        self.types[name] = (tuple(shape), dtype)
        if source in self.fixed:
            self.fixed.add(name)
        return name

    def shape(self, name):
        return self.types[name][0]

    def dtype(self, name):
        return self.types[name][1]


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
        default = {f.name: f.default for f in dataclasses.fields(self)}
        parts = [f"{k}={v!r}" for k, v in vars(self).items() if k != "kind" and v is not default[k]]
        return f"{self.kind}({', '.join(parts)})"


# -- What is in scope, and what a program consists of ------------------------------------------


@dataclasses.dataclass
class Counter:
    """In an index: the counter of the innermost loop, modulo the size of an axis."""

    size: int
    sign: int

    shape = ()

    def value(self, env, i):
        return i % self.size if self.sign > 0 else i % self.size - self.size


@dataclasses.dataclass
class Datum:
    """In an index: the first element of an array, modulo the size of an axis."""

    source: str
    size: int

    shape = ()

    def value(self, env, i):
        return env[self.source].ravel()[0].astype(np.int32) % self.size


@dataclasses.dataclass
class Data:
    """In an index: the first two elements of an array, which may be the same position."""

    source: str
    size: int

    shape = (2,)

    def value(self, env, i):
        return env[self.source].ravel()[:2].astype(np.int32) % self.size


FROM_DATA = Counter | Datum | Data


@dataclasses.dataclass
class Row:
    """A value: one row of an array, for all rows of another."""

    source: str


def _index(entries, env, i):
    return tuple(e.value(env, i) if isinstance(e, FROM_DATA) else e for e in entries)


def _value(env, value):
    if isinstance(value, Row):
        return env[value.source][0]
    return env[value] if isinstance(value, str) else value


def shape_of_index(shape, index):
    stand_in = [
        np.zeros(e.shape, int) if isinstance(e, FROM_DATA)
        else np.asarray(e) if isinstance(e, list) else e
        for e in index
    ]  # fmt: skip
    return np.broadcast_to(np.int8(0), shape)[tuple(stand_in)].shape


# -- Parts of statements -----------------------------------------------------------------------


@st.composite
def an_index(draw, scope, shape, *, basic=False, repeats=False):
    """An index that is in bounds, and whose positions are not repeated (unless asked for)."""
    kinds = ["int", "slice", "slice", "slice", "datum"] + ["counter"] * 3 * scope.in_loop
    if not basic:
        kinds += ["array", "list", "bools", "square", "pair", "mesh", "plane"]
        kinds += ["data"] * repeats
    whole_numbers = [n for n, (s, d) in scope.types.items() if d != np.bool_ and np.prod(s) > 1]
    entries, advanced = [], False
    used = draw(st.integers(0, len(shape)))
    axis = 0
    while axis < used:
        n = shape[axis]
        kind = draw(st.sampled_from(kinds)) if n else "slice"
        if kind not in ("int", "slice", "counter", "datum"):
            kind = "slice" if advanced else kind
        if kind in ("pair", "mesh", "plane") and (axis + 1 >= used or 0 in shape):
            kind = "array"
        advanced |= kind not in ("int", "slice", "counter", "datum")
        axis += 1
        order = draw(st.permutations(range(n))) if kind not in ("int", "slice") else ()
        if kind == "int":
            entries.append(draw(st.integers(-n, n - 1)))
        elif kind == "counter":
            entries.append(Counter(n, draw(st.sampled_from((1, -1)))))
        elif kind == "datum":
            entries.append(Datum(draw(st.sampled_from(whole_numbers)), n))
        elif kind == "data":
            entries.append(Data(draw(st.sampled_from(whole_numbers)), n))
        elif kind in ("array", "list"):
            chosen = order[: draw(st.integers(1, n))]
            entries.append(list(chosen) if kind == "list" else np.array(chosen))
        elif kind == "square":
            entries.append(np.array(order[: n // 2 * 2], int).reshape(2, n // 2))
        elif kind == "bools":
            entries.append(np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool))
        elif kind == "slice":
            bound = st.none() | st.integers(-n - 1, n + 1)
            step = draw(st.sampled_from((None, 1, 2, -1, -2, 3)))
            entries.append(slice(draw(bound), draw(bound), step))
        else:  # two axes
            m = shape[axis]
            axis += 1
            other = draw(st.lists(st.integers(-m, m - 1), min_size=n, max_size=n))
            if kind == "pair":  # distinct along the first
                apart = [slice(None)] * (axis < used and draw(st.booleans()))
                if apart:
                    m = shape[axis]
                    axis += 1
                    other = [k % m for k in other]
                entries += [np.array(order), *apart, np.array(other, int)]
            elif kind == "mesh":
                entries += [np.array(order)[:, None], np.array(draw(st.permutations(range(m))))]
            else:
                entries.append(np.array([[(k + 3 * j) % 3 > 0 for k in other] for j in range(m)]).T)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(entries)))
        if at == len(entries) or used == len(shape):
            entries.insert(at, Ellipsis)
    if draw(st.integers(0, 4)) == 0:
        entries.insert(draw(st.integers(0, len(entries))), None)
    return tuple(entries)


def _repeats(index):
    return any(isinstance(e, Data) for e in index)


@st.composite
def a_value(draw, scope, dtype, shape):
    """A number, an array that broadcasts to the shape, or another array or its row."""
    kind = draw(st.sampled_from(("number", "array", "name", "row")))
    if kind == "array":
        keep = draw(st.integers(0, len(shape)))
        sizes = [n if draw(st.booleans()) else 1 for n in shape[len(shape) - keep :]]
        flat = draw(st.lists(st.integers(-9, 9), min_size=1, max_size=6))
        given = np.bool_ if dtype == np.bool_ else draw(st.sampled_from((np.int32, np.int8)))
        return np.resize(np.array(flat).astype(given), sizes)
    wanted = tuple(shape) if kind == "name" else tuple(shape[1:])
    for name in draw(st.permutations(sorted(scope.types))) if kind in ("name", "row") else ():
        found = scope.shape(name)[kind == "row" :]
        fits = dtype == scope.dtype(name) or np.bool_ not in (dtype, scope.dtype(name))
        fits &= dtype == np.float32 or scope.dtype(name) != np.float32
        if found == wanted and scope.shape(name) and scope.shape(name)[0] and fits:
            return name if kind == "name" else Row(name)
    return draw(st.booleans() if dtype == np.bool_ else st.integers(-9, 9))


def _writable(draw, scope, has_axes=False):
    names = sorted(set(scope.types) - scope.fixed)
    if has_axes:
        names = [n for n in names if scope.shape(n)]
    return draw(st.sampled_from(names))


def _any_name(draw, scope):
    return draw(st.sampled_from(sorted(scope.types)))


def _an_op(draw, dtype):
    return draw(st.sampled_from(OPS_OF[dtype]))


MAKE: dict[str, Callable] = {}


RUN: dict[str, Callable] = {}


WEIGHTS: dict[str, int] = {}


def makes(kind, weight=1):
    def register(make):
        MAKE[kind], WEIGHTS[kind] = make, weight
        return make

    return register


def runs(*kinds):
    def register(run):
        RUN.update(dict.fromkeys(kinds, run))
        return run

    return register


def execute(statements, env, i, way):
    for s in statements:
        RUN[s.kind](s, env, i, way)


# -- Kinds of statements -----------------------------------------------------------------------


@makes("write", 3)
def _make_write(draw, scope):
    target = _writable(draw, scope)
    shape, dtype = scope.types[target]
    index = draw(an_index(scope, shape, repeats=True))
    found = () if _repeats(index) else shape_of_index(shape, index)
    return Statement("write", target, index=index, value=draw(a_value(scope, dtype, found)))


@runs("write")
def _run_write(s, env, i, way):
    env[s.target][_index(s.index, env, i)] = _value(env, s.value)


@makes("augment", 3)
def _make_augment(draw, scope):
    made = _make_write(draw, scope)
    return dataclasses.replace(made, kind="augment", op=_an_op(draw, scope.dtype(made.target)))


@runs("augment")
def _run_augment(s, env, i, way):
    """``target[index] op= value``, as Python spells it out."""
    target, index = env[s.target], _index(s.index, env, i)
    target[index] = OPS[s.op][1](target[index], _value(env, s.value))


@makes("whole", 2)
def _make_whole(draw, scope):
    target = _writable(draw, scope, has_axes=True)
    shape, dtype = scope.types[target]
    return Statement(
        "whole", target, value=draw(a_value(scope, dtype, shape)), op=_an_op(draw, dtype)
    )


@runs("whole")
def _run_whole(s, env, i, way):
    env[s.target] = OPS[s.op][1](env[s.target], _value(env, s.value))


@makes("masked", 2)
def _make_masked(draw, scope):
    """One number where another array of the same shape, or of the leading axes, is large."""
    target = _writable(draw, scope, has_axes=True)
    shape, dtype = scope.types[target]
    lead = [shape[:k] for k in range(1, len(shape) + 1)]
    masks = [n for n in sorted(scope.types) if scope.shape(n) in lead]
    value = draw(st.booleans() if dtype == np.bool_ else st.integers(-9, 9))
    limit = draw(st.integers(-5, 5))
    return Statement("masked", target, draw(st.sampled_from(masks)), index=limit, value=value)


@runs("masked")
def _run_masked(s, env, i, way):
    env[s.target][env[s.source].astype(np.int32) > s.index] = s.value


@makes("fill")
def _make_fill(draw, scope):
    target = _writable(draw, scope)
    value = draw(st.booleans() if scope.dtype(target) == np.bool_ else st.integers(-9, 9))
    return Statement("fill", target, value=value)


@runs("fill")
def _run_fill(s, env, i, way):
    env[s.target].fill(s.value)


@makes("sort")
def _make_sort(draw, scope):
    target = _writable(draw, scope, has_axes=True)
    n = len(scope.shape(target))
    return Statement("sort", target, value=draw(st.integers(-n, n - 1)))


@runs("sort")
def _run_sort(s, env, i, way):
    env[s.target].sort(axis=s.value)


@makes("put")
def _make_put(draw, scope):
    target = _writable(draw, scope)
    n = int(np.prod(scope.shape(target)))
    if not n:
        return Statement("fill", target, value=1)
    where = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3, unique=True))
    value = draw(a_value(scope, scope.dtype(target), (len(where),)))
    return Statement("put", target, index=where, value=value)


@runs("put")
def _run_put(s, env, i, way):
    env[s.target].put(np.array(s.index), _value(env, s.value))


@makes("flat")
def _make_flat(draw, scope):
    target = _writable(draw, scope)
    n = int(np.prod(scope.shape(target)))
    if not n:
        return Statement("fill", target, value=1)
    start, step = draw(st.integers(0, n - 1)), draw(st.integers(1, 3))
    where = draw(st.sampled_from((start, slice(start, None, step), [start])))
    return Statement("flat", target, index=where, value=draw(st.integers(0, 1)))


@runs("flat")
def _run_flat(s, env, i, way):
    env[s.target].flat[s.index] = s.value


# NumPy's own functions that write, of an array, a number and a mask.
FUNCTIONS = {
    "copyto": lambda x, n, mask: np.copyto(x, n, where=mask),
    "copyto reversed": lambda x, n, mask: np.copyto(x, x[::-1] + x[:1]),
    "putmask": lambda x, n, mask: np.putmask(x, mask, [n, n ^ 1]),
    "place": lambda x, n, mask: np.place(x, mask, [n, n ^ 1, n]),
    "out": lambda x, n, mask: np.maximum(x, n, out=x),
    "out where": lambda x, n, mask: np.minimum(x, n, out=x, where=mask),
    "at": lambda x, n, mask: np.maximum.at(x, [0, -1, 0], n),
}


@makes("function", 2)
def _make_function(draw, scope):
    target = _writable(draw, scope, has_axes=True)
    shape, dtype = scope.types[target]
    if not np.prod(shape):
        return Statement("fill", target, value=1)
    value = draw(st.booleans() if dtype == np.bool_ else st.integers(-9, 9))
    how = draw(st.sampled_from(sorted(FUNCTIONS)))
    return Statement("function", target, index=draw(st.integers(-5, 5)), value=value, op=how)


@runs("function")
def _run_function(s, env, i, way):
    x = env[s.target]
    FUNCTIONS[s.op](x, s.value, x.astype(np.int32) > s.index)


# Views.
@makes("view", 3)
def _make_view(draw, scope):
    source = _any_name(draw, scope)
    index = draw(an_index(scope, scope.shape(source), basic=True))
    found = shape_of_index(scope.shape(source), index)
    if not found and Ellipsis not in index:
        index = (*index, Ellipsis)
    return Statement("view", scope.add(found, scope.dtype(source), source), source, index)


@runs("view", "gather")
def _run_view(s, env, i, way):
    env[s.target] = env[s.source][_index(s.index, env, i)]


@makes("transpose")
def _make_transposed(draw, scope):
    source = _any_name(draw, scope)
    shape = scope.shape(source)
    order = tuple(draw(st.permutations(range(len(shape)))))
    new = scope.add([shape[d] for d in order], scope.dtype(source), source)
    return Statement("transpose", new, source, value=order)


@runs("transpose")
def _run_transposed(s, env, i, way):
    x, order = env[s.source], s.value
    if order == tuple(range(x.ndim))[::-1]:
        env[s.target] = x.T
    elif order == (0, 2, 1):
        env[s.target] = x.swapaxes(-1, 1)
    else:
        env[s.target] = x.transpose(order)


@makes("reshape")
def _make_reshape(draw, scope):
    source = _any_name(draw, scope)
    n = int(np.prod(scope.shape(source)))
    divisors = [d for d in range(1, n + 1) if n % d == 0] or [1]
    d = draw(st.sampled_from(divisors))
    new = draw(st.sampled_from(((d, n // d), (n,), (n // d, 1, d))))
    name = scope.add(new, scope.dtype(source), source)  # a view, or a copy
    return Statement("reshape", name, source, value=(new, draw(st.sampled_from("CCFA"))))


@runs("reshape")
def _run_reshape(s, env, i, way):
    new, order = s.value
    env[s.target] = env[s.source].reshape(new, order=order)


# Views that NumPy's own functions make.
PIECES = {
    "flip": np.flip,
    "array_split": lambda x: np.array_split(x, 2)[1],
    "moveaxis": lambda x: np.moveaxis(x, 0, -1),
    "swapaxes": lambda x: np.swapaxes(x, 0, -1),
    "reshape": lambda x: np.reshape(x, (-1, x.shape[0])),
    "squeeze": np.squeeze,
    "real": np.real,
}


@makes("piece", 2)
def _make_piece(draw, scope):
    source = draw(st.sampled_from([n for n in sorted(scope.types) if scope.shape(n)]))
    how = draw(st.sampled_from(sorted(PIECES)))
    if how == "reshape" and not np.prod(scope.shape(source)):
        how = "flip"
    found = PIECES[how](np.zeros(scope.shape(source))).shape
    return Statement("piece", scope.add(found, scope.dtype(source), source), source, value=how)


@runs("piece")
def _run_piece(s, env, i, way):
    env[s.target] = PIECES[s.value](env[s.source])


@makes("ravel")
def _make_ravel(draw, scope):
    source = _any_name(draw, scope)
    n = int(np.prod(scope.shape(source)))
    return Statement("ravel", scope.add((n,), scope.dtype(source), source), source)


@runs("ravel")
def _run_ravel(s, env, i, way):
    env[s.target] = env[s.source].ravel()


@makes("squeeze")
def _make_squeeze(draw, scope):
    source = _any_name(draw, scope)
    found = tuple(n for n in scope.shape(source) if n != 1)
    return Statement("squeeze", scope.add(found, scope.dtype(source), source), source)


@runs("squeeze")
def _run_squeeze(s, env, i, way):
    env[s.target] = env[s.source].squeeze()


@makes("alias")
def _make_alias(draw, scope):
    source = _any_name(draw, scope)
    return Statement("alias", scope.add(*scope.types[source], source), source)


@runs("alias")
def _run_alias(s, env, i, way):
    env[s.target] = env[s.source]


@makes("rows")
def _make_rows(draw, scope):
    """A loop over the rows of an array, which writes into them."""
    target = _writable(draw, scope, has_axes=True)
    shape, dtype = scope.types[target]
    if len(shape) < 2:
        return Statement("fill", target, value=1)
    index = draw(an_index(scope, shape[1:]))
    return Statement("rows", target, index=index, op=_an_op(draw, dtype), value=draw(st.booleans()))


@runs("rows")
def _run_rows(s, env, i, way):
    for row in env[s.target]:
        index = _index(s.index, env, i)
        row[index] = OPS[s.op][1](row[index], s.value)


# Copies.
@makes("gather")
def _make_gather(draw, scope):
    source = _any_name(draw, scope)
    index = draw(an_index(scope, scope.shape(source), repeats=True))
    if not any(isinstance(e, (list, np.ndarray, Data)) for e in index):
        return _make_copy(draw, scope)
    found = shape_of_index(scope.shape(source), index)
    return Statement("gather", scope.add(found, scope.dtype(source)), source, index)


@makes("copy")
def _make_copy(draw, scope):
    source = draw(st.sampled_from([n for n in sorted(scope.types) if scope.shape(n)]))
    how = draw(st.sampled_from(sorted(COPIES)))
    shape, dtype = COPIES[how][1](*scope.types[source])
    return Statement("copy", scope.add(shape, dtype), source, value=how)


@runs("copy")
def _run_copy(s, env, i, way):
    env[s.target] = COPIES[s.value][0](way.xp, env[s.source])


# What makes a new array, and its type.
COPIES = {
    "copy": (lambda xp, x: x.copy(), lambda s, d: (s, d)),
    "flatten": (lambda xp, x: x.flatten(), lambda s, d: ((int(np.prod(s)),), d)),
    "astype": (lambda xp, x: x.astype(np.bool_), lambda s, d: (s, np.bool_)),
    "roll": (lambda xp, x: xp.roll(x, 1, 0), lambda s, d: (s, d)),
    "where": (lambda xp, x: xp.where(x > 0, x, x[::-1]), lambda s, d: (s, d)),
    "maximum": (lambda xp, x: xp.maximum(x, x[:1]), lambda s, d: (s, d)),
    "cumsum": (
        lambda xp, x: xp.cumsum(x.astype(np.int8), -1, dtype=np.int8),
        lambda s, d: (s, np.int8),
    ),
    "concatenate": (
        lambda xp, x: xp.concatenate([x, x]),
        lambda s, d: ((2 * s[0], *s[1:]), d),
    ),
    "stack": (lambda xp, x: xp.stack([x, x]), lambda s, d: ((2, *s), d)),
    "zeros": (lambda xp, x: xp.zeros_like(x), lambda s, d: (s, d)),
    "flat": (lambda xp, x: x.flat[:], lambda s, d: ((int(np.prod(s)),), d)),
    "compare": (lambda xp, x: x > 1, lambda s, d: (s, np.bool_)),
}
