"""Objects that are reached in other ways than through attributes and items: by functions that close
over them, by weak references, as keys and as members of sets; and state that Python keeps in C.

The reference is the same program on plain objects, where a loop is a loop.
"""

import array
import collections
import dataclasses
import functools
import itertools
import operator
import queue
import random
import types
import weakref
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import mutate

f32 = jnp.float32
leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


class Cell:
    def __init__(self, x=1.0, **parts):
        self.x = f32(x)
        self.__dict__.update(parts)

    def add(self, by=1.0):
        self.x = self.x + by


class Named(Cell):
    """Equal to others of its name."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __eq__(self, other):
        return isinstance(other, Named) and self.name == other.name

    def __hash__(self):
        return hash(self.name)


# -- What leads back to the objects ----------------------------------------------------------


def closing_over():
    cell, other = Cell(), Cell(2.0)

    def add(by, *, to=other):
        cell.x = cell.x + by
        to.x = to.x + cell.x

    cell.callbacks = [add, lambda: other.x, functools.partial(add, 3.0)]
    cell.other = other
    return cell


def calls_back(t):
    add, read, part = t.callbacks
    add(1.0)
    t.x = t.x + read()
    part()


def counting():
    n, total = f32(0), SimpleNamespace(x=f32(0))

    def count():
        nonlocal n
        n = n + 1
        total.x = total.x + n

    total.count, total.read = count, (lambda: n,)
    return total


def counts(t):
    t.count()
    t.x = t.x + t.read[0]()


def recursive():
    cell = Cell()

    def add(k):
        cell.x = cell.x + k
        return add(k - 1) if k else cell.x

    cell.add_all = add
    return cell


def decorated():
    cell = Cell()

    def doubling(f):
        @functools.wraps(f)
        def g(*args):
            cell.x = cell.x * 2
            return f(*args)

        return g

    cell.bump = doubling(lambda by: cell.add(by))
    return cell


def with_a_rule():
    cell = Cell(3.0)
    f = jax.custom_vjp(lambda y: y * cell.x)
    f.defvjp(lambda y: (y * cell.x, cell.x), lambda x, ct: (2 * x * ct,))
    cell.f = f
    return cell


def uses_the_rule(t):
    t.x = t.x + t.f(1.0) + jax.grad(t.f)(1.0)


def referring():
    cell = Cell(child=Cell(2.0))
    cell.child.parent = (weakref.ref(cell), 1)
    cell.method = weakref.WeakMethod(cell.add)
    cell.proxy = weakref.proxy(cell.child)
    return cell


def refers(t):
    t.child.parent[0]().add(t.proxy.x)
    t.method()(2.0)
    t.proxy.x = t.proxy.x * 2


def keyed():
    cell, named = Cell(), Named("a")
    return SimpleNamespace(
        c=cell, n=named, by_cell={cell: f32(1), (cell, 1): f32(2)}, by_name={Named("b"): f32(3)},
        members={named, cell}, frozen=frozenset({Named("c")}),
    )  # fmt: skip


def uses_keys(t):
    t.by_cell[t.c] = t.by_cell[t.c] + t.c.x
    t.by_cell[t.c, 1] = t.by_cell[t.c] * 2
    t.by_name[Named("b")] = t.by_name[Named("b")] + 1
    for x in [*t.members, *t.frozen, *t.by_name]:
        x.add(2.0)


def shown(t):
    """What is looked at in the end: numbers, and whether what was one object is one."""
    if hasattr(t, "by_cell"):
        (b,), (c,) = t.by_name, t.frozen
        same = t.c in t.by_cell and (t.c, 1) in t.by_cell and t.c in t.members and t.n in t.members
        return [t.c.x, t.n.x, *t.by_cell.values(), t.by_name[b], b.x, c.x, same]
    found = [t.x]
    if hasattr(t, "callbacks"):
        found += [t.other.x, t.callbacks[1](), t.callbacks[0].__kwdefaults__["to"] is t.other]
    if hasattr(t, "read"):
        found.append(t.read[0]())
    if hasattr(t, "child"):
        found += [t.child.x, t.proxy.x, t.child.parent[0]() is t, t.method().__self__ is t]
    return found


TRACED = []


class Jitted(Cell):
    """Methods that an object has jitted for itself."""

    def __init__(self):
        super().__init__()
        self.step = jax.jit(self._step, static_argnames="times")

    def _step(self, by, times):
        TRACED.append(times)
        for _ in range(times):
            self.x = self.x + by
        return self.x


PROGRAMS = {
    calls_back: closing_over,
    counts: counting,
    (lambda t: t.add_all(3)): recursive,
    (lambda t: t.bump(1.0)): decorated,
    uses_the_rule: with_a_rule,
    refers: referring,
    uses_keys: keyed,
    (lambda t: t.view["c"].add(2.0)): lambda: (
        lambda c: SimpleNamespace(x=f32(0), view=types.MappingProxyType({"c": c}), c=c)
    )(Cell()),
    (lambda t: t.call(t)): lambda: Cell(call=operator.methodcaller("add", 3.0)),
}

TRANSFORMS = {
    "none": (1, lambda f: f()),
    "jit": (1, lambda f: jax.jit(f)()),
    "jit, twice": (2, lambda f: [g() for g in [jax.jit(f)] * 2]),
    "checkpoint": (1, lambda f: jax.checkpoint(f)()),
    "grad": (1, lambda f: jax.grad(lambda x: (f(), x)[1])(1.0)),
    "vmap": (1, lambda f: jax.vmap(lambda x: (f(), x)[1])(jnp.arange(2.0))),
    "cond": (1, lambda f: jax.lax.cond(jnp.bool_(True), f, lambda: None)),
    "fori_loop": (3, lambda f: jax.lax.fori_loop(0, 3, lambda i, _: f(), None)),
    "scan": (3, lambda f: jax.lax.scan(lambda c, _: (f(), None), None, length=3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: PROGRAMS[f].__name__)
def test_what_leads_to_an_object_leads_to_the_copy(program, transform):
    times, transform = TRANSFORMS[transform]
    plain, given = PROGRAMS[program](), PROGRAMS[program]()
    before = [float(x) for x in shown(given)]
    for _ in range(times):
        program(plain)
    _, new = mutate(lambda t: (transform(lambda: (program(t), None)[1]), None)[1])(given)
    np.testing.assert_allclose(shown(new), shown(plain))
    assert [float(x) for x in shown(given)] == before
    _, newer = mutate(lambda t: (program(t), None)[1])(new)  # what comes out is as what went in
    program(plain)
    np.testing.assert_allclose(shown(newer), shown(plain))


def test_a_jitted_function_of_an_object_is_one_of_the_copy():
    given = Jitted()
    TRACED.clear()
    out, new = mutate(lambda t: [t.step(2.0, times=n) for n in (1, 1, 3)])(given)
    assert [*map(float, out)] == [3.0, 5.0, 11.0] and given.x == 1.0
    assert TRACED == [1, 3]  # once for each value of the static argument
    _, newer = mutate(lambda t: t.step(1.0, times=1) and None)(new)
    assert newer.x == 12.0 and new.x == 11.0


@leaks_allowed
def test_functions_that_are_made_inside():
    def f(t):
        t.add_two = lambda: t.add(2.0)
        jax.lax.fori_loop(0, 2, lambda i, _: t.add_two(), None)

        def more():
            t.add_three = lambda: t.add(3.0)
            t.add_three()

        jax.jit(more)()
        t.add_three()

    _, new = mutate(f)(Cell())
    new.add_two()
    new.add_three()
    assert new.x == 1 + 2 * 2 + 3 + 3 + 2 + 3

    def replaces(t):
        jax.lax.fori_loop(0, 2, lambda i, _: setattr(t, "add_two", lambda: t.add(5.0)), None)

    with pytest.raises(jaxstate.StructureChangeError, match=r"tree\.add_two"):
        mutate(replaces)(new)


def test_what_does_not_lead_to_the_objects_stays_what_it_is():
    log, name = [], object()

    def note(by):
        log.append(by)
        cell.add(by)

    cell = Cell(note=note, f=jnp.tanh, names={name: f32(1)}, g=lambda: log)
    _, new = mutate(lambda t: t.note(2.0))(cell)
    assert new.x == 3 and cell.x == 1 and log == [2.0]
    assert new.f is jnp.tanh and new.g is cell.g and new.names[name] == 1
    assert new.note is not note and new.note.__name__ == "note"


def test_keys_and_members_of_sets_change_in_jitted_functions_and_loops():
    def f(t):
        def adds():
            made = Cell(5.0)
            t.values[made] = made.x
            t.members.add(made)
            t.made = made

        jax.jit(adds)()

        def replaces(i, _):
            made = Cell(0.0)
            made.x = t.made.x + 1
            t.values, t.members, t.made = {made: 2 * t.values[t.made]}, {made}, made

        jax.lax.fori_loop(0, 3, replaces, None)
        return t.made in t.values and t.made in t.members

    is_one, new = mutate(f)(SimpleNamespace(values={}, members=set(), made=None))
    assert is_one and new.made in new.values and new.made in new.members
    assert new.made.x == 8 and new.values[new.made] == 40


@pytest.mark.parametrize(
    "make",
    [lambda cell: iter([cell]), lambda cell: (c for c in [cell]), lambda cell: map(id, [cell])],
    ids=["iterator", "generator", "map"],
)
def test_what_hides_an_object_is_refused(make):
    cell = Cell()
    with pytest.raises(TypeError, match=r"tree.it \(\w+\) leads to an object of the tree"):
        mutate(lambda t: None)(SimpleNamespace(cell=cell, it=make(cell)))


# -- Classes that JAX knows, and makes anew ----------------------------------------------------


def registered(**options):
    def static():
        return dataclasses.field(default=None, metadata=dict(static=True))

    fields = [("x", Any), *[(name, Any, static()) for name in ("method", "callback", "box")]]

    def add(self, by):
        self.x = self.x + by

    made = dataclasses.make_dataclass("Registered", fields, namespace={"add": add}, **options)
    jax.tree_util.register_dataclass(made)
    return made


KNOWN = {kind: registered(**options) for kind, options in {
    "dataclass": {}, "slots": {"slots": True}, "frozen": {"frozen": True, "eq": False},
}.items()}  # fmt: skip


@pytest.mark.parametrize("place", ["root", "in a dict", "in an object"])
@pytest.mark.parametrize("kind", KNOWN)
def test_static_fields_that_lead_to_objects_of_registered_classes(kind, place):
    cell = KNOWN[kind](f32(1))
    for name, value in dict(
        method=cell.add, callback=lambda by: cell.add(2 * by), box=[(cell, 3)]
    ).items():
        object.__setattr__(cell, name, value)
    tree = {"root": cell, "in a dict": {"c": cell}, "in an object": SimpleNamespace(c=cell)}[place]

    def inside(t):
        return t if place == "root" else t["c"] if place == "in a dict" else t.c

    def uses(t):
        inside(t).method(1.0)
        inside(t).callback(1.0)
        inside(t).box[0][0].add(4.0)

    for wrap in (lambda f: f, lambda f: lambda t: jax.lax.fori_loop(0, 1, lambda i, _: f(t), None)):
        _, new = mutate(wrap(uses))(tree)
        assert inside(new).x == 8 and cell.x == 1
        assert inside(new).method.__self__ is inside(new) is inside(new).box[0][0]
        _, newer = mutate(uses)(new)
        assert inside(newer).x == 15 and inside(new).x == 8


def test_a_part_in_two_places_is_two_parts_of_a_pytree():
    cell = KNOWN["dataclass"](f32(1))
    _, new = mutate(lambda t: t["a"].add(1.0))({"a": cell, "b": cell, "c": SimpleNamespace(d=cell)})
    assert (new["a"].x, new["b"].x) == (2.0, 1.0) and new["a"] is not new["b"]


def test_modules_of_nnx_with_hooks():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.calls = nnx.Variable(jnp.int32(0))
            self.hook = lambda: self.bump()
            self.method = self.bump

        def bump(self):
            self.calls[...] += 1

    def uses(net):
        jax.lax.fori_loop(0, 3, lambda i, _: net.hook(), None)
        jax.jit(lambda: net.method())()

    net = Net()
    _, new = mutate(uses)(net)
    _, newer = mutate(uses)(new)
    assert (net.calls[...], new.calls[...], newer.calls[...]) == (0, 4, 8)


# -- State that is kept in C -----------------------------------------------------------------

GENERATORS = {
    "random.Random": (lambda: random.Random(3), lambda r: r.random()),
    "numpy Generator": (lambda: np.random.default_rng(3), lambda r: r.random()),
    "numpy RandomState": (lambda: np.random.RandomState(3), lambda r: r.rand()),
    "array": (lambda: array.array("f", [1, 2]), lambda a: (a.append(a[-1] + 1), a[-1])[1]),
    "bytearray": (lambda: bytearray(b"a"), lambda a: (a.append(a[-1] + 1), a[-1])[1]),
    "queue": (
        lambda: (lambda q: (q.put(1.0), q)[1])(queue.Queue()),
        lambda q: (q.put(q.get() + 1), q.queue[0])[1],
    ),
}  # fmt: skip


@leaks_allowed
@pytest.mark.parametrize("kind", GENERATORS)
def test_state_in_c_is_copied_and_may_change_where_a_function_runs_once(kind):
    make, draw = GENERATORS[kind]
    plain, given = make(), make()
    wanted = [float(draw(plain)) for _ in range(4)]

    def f(t):
        drawn = jax.jit(lambda: f32(draw(t.state)))
        return [draw(t.state), drawn(), drawn()]

    out, new = mutate(f)(SimpleNamespace(state=given))
    np.testing.assert_allclose(np.float64([*out, draw(new.state)]), wanted, rtol=1e-6)
    np.testing.assert_allclose(float(draw(given)), wanted[0], rtol=1e-6)
    if kind != "queue":
        with pytest.raises(jaxstate.StructureChangeError, match=r"tree.state was changed"):
            mutate(lambda t: jax.lax.fori_loop(0, 2, lambda i, _: draw(t.state) * 0, 0))(
                SimpleNamespace(state=make())
            )


def values():
    yield from (1.0, 2.0, 3.0)


@leaks_allowed
@pytest.mark.parametrize(
    "make", [lambda: itertools.count(1.0), lambda: iter([1.0, 2.0]), values, lambda: zip([1.0])],
    ids=["count", "list", "generator", "zip"],
)  # fmt: skip
@pytest.mark.parametrize("transform", ["jit", "fori_loop", "scan", "cond"])
def test_an_iterator_is_not_advanced_where_python_runs_once(make, transform):
    def step(t):
        next(t.it)
        t.x = t.x + 1

    _, transform = TRANSFORMS[transform]
    assert mutate(step)(SimpleNamespace(it=make(), x=f32(0)))[1].x == 1
    _, new = mutate(lambda t: (transform(lambda: setattr(t, "x", t.x + 1)), None)[1])(
        SimpleNamespace(it=make(), x=f32(0))
    )
    assert new.x >= 1  # it may be there
    with pytest.raises(jaxstate.StructureChangeError, match=r"tree.it is an iterator.*advanced"):
        mutate(lambda t: transform(lambda: step(t)))(SimpleNamespace(it=make(), x=f32(0)))


def test_one_array_of_numpy_in_two_places_is_one_array():
    a = np.zeros(2)
    _, new = mutate(lambda t: t["a"].__setitem__(0, 5.0))({"a": a, "b": [a], "c": np.zeros(2)})
    assert new["a"] is new["b"][0] and new["a"].tolist() == [5, 0]
    assert a.tolist() == [0, 0] and new["c"].tolist() == [0, 0]


# -- Copies that functions get later ---------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    n: Any
    k: Any


def on_the_host(call):
    def f(t, use):
        def host(pair, *_):
            use(pair)
            return np.float32(pair.k)

        return call(host, t["c"])

    return f


def residual(t, use):
    f = jax.custom_vjp(lambda x: x * t["c"].k)

    def backward(pair, ct):
        use(pair)
        return (ct * pair.k,)

    f.defvjp(lambda x: (x * t["c"].k, t["c"]), backward)
    return jax.grad(f)(1.0)


def transposed(t, use):
    def f(pair):
        use(pair)
        return pair.n + 5 * pair.k

    return jax.linear_transpose(f, t["c"])(f32(1))[0].k


def pure(host, pair):
    return jax.pure_callback(host, jax.ShapeDtypeStruct((), jnp.float32), pair)


def ordered(host, pair):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.experimental.io_callback(host, shape, pair, 3.0, ordered=True)


def debug(host, pair):
    jax.debug.callback(lambda p: host(p) and None, pair)
    jax.debug.callback(ordered=True)(lambda p: host(p) and None, pair)
    jax.effects_barrier()
    return f32(5)


LATER = {
    "backward rule": residual,
    "linear_transpose": transposed,
    "pure_callback": on_the_host(pure),
    "io_callback": on_the_host(ordered),
    "debug.callback": on_the_host(debug),
}


@leaks_allowed
@pytest.mark.parametrize("outside", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", LATER)
def test_what_is_assigned_to_a_copy_later_is_named(kind, outside):
    program = LATER[kind]
    tree = {"c": Pair(f32(3), f32(5))}

    def run(use):
        f = mutate(lambda t: program(t, use))
        return jax.block_until_ready((jax.jit(f) if outside else f)(tree))

    out, new = run(lambda pair: None)
    assert out == 5 and new["c"].n == 3
    other = Pair(f32(1), f32(2))
    assert run(lambda pair: setattr(other, "n", 7.0))[0] == 5  # an object of the program's own
    with pytest.raises(Exception, match=r"tree\['c'\].n was assigned, but the object is a copy"):
        run(lambda pair: setattr(pair, "n", pair.n * 2))
        jax.effects_barrier()


def test_residuals_that_are_no_objects_of_the_tree_may_be_assigned():
    def f(t):
        g = jax.custom_vjp(lambda x: x * t["c"].n)

        def backward(pair, ct):
            pair.n = pair.n + 1
            return (ct * pair.n,)

        g.defvjp(lambda x: (x * t["c"].n, Pair(t["c"].n, x)), backward)
        return jax.grad(g)(2.0)

    assert mutate(f)({"c": Pair(f32(3), f32(5))})[0] == 4


def test_counters_of_objects_in_defaultdicts():
    def f(t):
        def body(i, _):
            for key in "ab":
                t.total[key] = t.total[key] + t.counts[key]
            t.counts["a"] += 1

        jax.lax.fori_loop(0, 3, body, None)

    tree = SimpleNamespace(
        total=collections.defaultdict(lambda: f32(0), a=f32(0), b=f32(0)),
        counts=collections.Counter(a=f32(1), b=f32(2)),
    )
    _, new = mutate(f)(tree)
    assert {k: float(v) for k, v in new.total.items()} == {"a": 6.0, "b": 6.0}
    assert new.total["new"] == 0 and new.counts["a"] == 4
