"""Inside `mutate`, objects are what they are in Python, in every transformation.

The expected numbers are those of Python, where a loop is a loop and a jitted function the function.
"""

import collections
import copy
import dataclasses
import functools
import heapq
import threading
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate import inplace, mutate
from jaxstate_tests.tree.cells import RUNS, Cell, example, f32, loop, numbers

leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


# -- What means one object is one object -----------------------------------------------------


def values_closed_over(t):
    z = t["a"]
    t["b"] = z

    def body(i, total):
        t["a"] = t["a"] + 1
        t["b"] = t["b"] * 2
        return total + z

    return jax.lax.fori_loop(0, 3, body, 0.0)


def objects_made_inside(t):
    def step(i):
        made = Cell(f32(0))
        made.add(i)
        made.add(1.0)
        t["a"] = t["a"] + made.n

    loop(3, step)


def bound_methods(t):
    add = t["c"].add
    loop(3, lambda i: add(2.0))
    jax.jit(add)(5.0)
    jax.jit(t["d"].add)(7.0)


def statics_between_calls(t):
    g = jax.jit(lambda x: t["c"].add(x * t["c"].k))
    g(1.0)
    t["c"].k = 3
    g(1.0)
    h = jax.jit(lambda x: x * t["c"].k)
    first = h(1.0)
    t["c"].k = 5
    return first, h(1.0)


def one_jitted_method_of_two_objects(t):
    t["c"].jitted(1.0)
    t["d"].jitted(1.0)
    t["d"].k = 5
    t["d"].jitted(1.0).jitted(2.0)
    t["c"].jitted(2.0)


def nested(t):
    def outer(i):
        t["a"] = t["a"] + 1

        def inner(j):
            t["b"] = t["b"] + t["a"] * 2
            jax.lax.cond(j > 0, lambda: t["c"].add(1.0), lambda: None)

        loop(2, inner)

    loop(3, outer)


def replaced_and_held(t):
    old = t["c"]

    def body():
        t["c"] = Cell(t["c"].n * 2)
        old.add(5.0)

    jax.jit(body)()
    old.add(1.0)
    return old.n


def swapped(t):
    a, b = t["c"], t["d"]
    jax.jit(lambda: t.update(c=t["d"], d=t["c"]))()
    a.add(1.0)
    return float(t["d"] is a and t["c"] is b)


def swapped_in_a_loop(t):
    def body(i):
        t["c"], t["d"] = t["d"], t["c"]

    loop(3, body)


def structure_in_jit(t):
    def body():
        t["l"].append(Cell(f32(3)))
        t["new"] = {"z": t["l"]}
        t["l"][0].add(2.0)

    jax.jit(body)()
    jax.jit(lambda: jax.checkpoint(lambda: t["l"].append(Cell(t["l"][1].n + 1)))())()
    loop(2, lambda i: t["l"][2].add(1.0))
    return float(t["new"]["z"] is t["l"])


def detached(t):
    old = t["c"]
    t["c"] = Cell(f32(9))
    loop(3, lambda i: old.add(1.0))
    jax.jit(lambda: old.add(2.0))()
    t["c"].add(old.n)


def taken_out_and_back(t):
    old = t.pop("c")
    jax.jit(lambda: old.add(1.0))()
    t["c"] = old
    loop(2, lambda i: old.add(1.0))
    return old.n


def old_values(t):
    def body(i):
        old = t["a"]
        t["a"] = old * 2
        t["b"] = old

    loop(3, body)

    def reset():
        old = t["a"]
        t["a"] = f32(0)
        return old

    return jax.jit(reset)()


def results_are_the_objects(t):
    out = jax.jit(lambda tree: tree["c"])(t)
    out.n = out.n + 3
    _, part = jax.lax.fori_loop(0, 2, lambda i, c: (c[0] + 1, c[1]), (0, t["d"]))
    part.n = part.n * 2 + 1
    made = jax.jit(lambda: t.setdefault("made", {"x": f32(1)}))()
    made["x"] = made["x"] + 4
    jax.lax.cond(t["a"] > 0, lambda d: d, lambda d: d, t["d"]).add(1.0)
    return float(out is t["c"] and part is t["d"] and made is t["made"])


def generators(t):
    values = (x * t["a"] for x in (1.0, 2.0))
    first = jax.jit(lambda: next(values))()
    t["a"] = f32(10)
    return first, jax.jit(lambda: next(values))()


def names_that_change(t):
    @jax.jit
    def bump():
        part.n = part.n + 1

    for part in (t["c"], t["d"], t["c"]):  # noqa: B007
        bump()


def exceptions(t):
    def bad():
        t["a"] = t["a"] + 100
        t["l"].append(f32(1))
        raise ZeroDivisionError

    for transform in (jax.jit, jax.checkpoint, lambda f: lambda: loop(2, lambda i: f())):
        with pytest.raises(ZeroDivisionError):
            transform(bad)()
    t["a"] = t["a"] + 1


def carried_as_a_value(t):
    w = {"x": f32(1)}
    t["w"] = w
    new = jax.lax.fori_loop(0, 3, lambda i, w: jax.tree.map(lambda x: 2 * x, w), t["w"])
    new["x"] = new["x"] + 1
    picked = jax.lax.cond(t["a"] > 0, lambda: t["w"], lambda: {"x": f32(7)})
    return new["x"], picked["x"]


def converted_closures(t):
    g, consts = jax.closure_convert(lambda x: x * t["a"], 1.0)
    first = g(1.0, *consts)

    def body(i, total):
        total = total + g(1.0, *consts)
        t["a"] = t["a"] + 1
        return total

    return first, jax.lax.fori_loop(0, 3, body, 0.0), g(1.0, *consts)


def parts_of_other_objects(t):
    jax.jit(lambda p: p.n.add(p.k))(Cell(t["c"], 3))
    jax.lax.fori_loop(0, 2, lambda i, p: (p.n.add(1.0), p)[1], Cell(t["c"]))
    jax.lax.cond(t["a"] > 0, lambda p: p[0]["x"].add(10.0), lambda p: None, ({"x": t["c"]}, 1))


def stacked_and_mapped(t):
    t["new"] = {"w": jnp.arange(3.0)}
    _, (ys, zs) = jax.lax.scan(lambda c, x: (c, (x["w"], t["c"])), 0.0, t["new"])
    zs.n = zs.n + 1
    return ys, zs.n, jax.eval_shape(lambda: t["c"]).n.size


# The result, and the leaves of the tree.
PROGRAMS = {
    converted_closures: [1.0, 6.0, 4.0, 4.0, 5.0, 2.0, 10.0, 0.0],
    parts_of_other_objects: [1.0, 5.0, 17.0, 10.0, 0.0],
    stacked_and_mapped: [
        [0.0, 1.0, 2.0],
        [3.0, 3.0, 3.0],
        1,
        1.0,
        5.0,
        2.0,
        10.0,
        0.0,
        [0.0, 1.0, 2.0],
    ],
    values_closed_over: [3.0, 4.0, 8.0, 2.0, 10.0, 0.0],
    objects_made_inside: [7.0, 5.0, 2.0, 10.0, 0.0],
    bound_methods: [1.0, 5.0, 13.0, 17.0, 0.0],
    statics_between_calls: [3.0, 5.0, 1.0, 5.0, 12.0, 10.0, 0.0],
    one_jitted_method_of_two_objects: [1.0, 5.0, 5.0, 26.0, 0.0],
    nested: [4.0, 41.0, 5.0, 10.0, 0.0],
    replaced_and_held: [8.0, 1.0, 5.0, 4.0, 10.0, 0.0],
    swapped: [1.0, 1.0, 5.0, 10.0, 3.0, 0.0],
    swapped_in_a_loop: [1.0, 5.0, 10.0, 2.0, 0.0],
    structure_in_jit: None,
    detached: [1.0, 5.0, 16.0, 10.0, 0.0],
    taken_out_and_back: [5.0, 1.0, 5.0, 5.0, 10.0, 0.0],
    old_values: [8.0, 0.0, 4.0, 2.0, 10.0, 0.0],
    results_are_the_objects: [1.0, 1.0, 5.0, 5.0, 22.0, 0.0, 5.0],
    generators: [1.0, 20.0, 10.0, 5.0, 2.0, 10.0, 0.0],
    names_that_change: [1.0, 5.0, 4.0, 11.0, 0.0],
    exceptions: [2.0, 5.0, 2.0, 10.0, 0.0],
    carried_as_a_value: [9.0, 1.0, 1.0, 5.0, 2.0, 10.0, 0.0, 1.0],
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@leaks_allowed
def test_programs(program, run):
    tree = example()
    if program is structure_in_jit:
        tree["l"] = [Cell(f32(1))]
        wanted = [1.0, 1.0, 5.0, 2.0, 10.0, 3.0, 3.0, 6.0, 3.0, 3.0, 6.0]
    else:
        wanted = PROGRAMS[program]
    before = numbers(tree)
    assert numbers(RUNS[run](program)(tree)) == wanted
    assert numbers(tree) == before
    with jax.disable_jit():
        if program not in (carried_as_a_value, exceptions, converted_closures):
            assert numbers(mutate(program)(tree)) == wanted


# -- Containers and classes of other kinds ---------------------------------------------------


class Plain:
    """A class that JAX does not know."""

    def __init__(self, n):
        self.n = n
        self.bump_again = self.bump

    def bump(self):
        self.n = self.n + 1

    @functools.cached_property
    def root(self):
        return jnp.sqrt(self.n)


class Family:
    """A parent whose child knows it by a weak reference."""

    def __init__(self, parent=None):
        self.n = f32(1)
        self.parent = None if parent is None else weakref.ref(parent)
        self.child = Family(self) if parent is None else None

    def grow(self):
        self.parent().n = self.parent().n + self.n


def push_left(t):
    t["q"].appendleft(t["x"])
    jax.jit(lambda: t["q"].append(2 * t["x"]))()
    loop(2, lambda i: t["q"].rotate(1))


CONTAINERS = {
    "deque": (
        lambda: {"q": collections.deque([f32(5)], maxlen=2), "x": f32(1)},
        push_left,
        lambda new: (list(map(float, new["q"])), new["q"].maxlen),
        ([5.0, 2.0], 2),
    ),
    "Counter": (
        lambda: {"c": collections.Counter(a=2)},
        lambda t: (t["c"].update("ab"), loop(3, lambda i: t["c"].update("a"))),
        lambda new: {k: int(v) for k, v in new["c"].items()},
        {"a": 6, "b": 1},
    ),
    "ChainMap": (
        lambda: {"m": collections.ChainMap({"a": f32(1)}, {"b": f32(2)})},
        lambda t: loop(2, lambda i: t["m"].update(a=t["m"]["a"] + t["m"]["b"])),
        lambda new: float(new["m"]["a"]),
        5.0,
    ),
    "UserList": (
        lambda: {"u": collections.UserList([f32(1)])},
        lambda t: (t["u"].append(f32(2)), loop(2, lambda i: t["u"].reverse())),
        lambda new: list(map(float, new["u"])),
        [1.0, 2.0],
    ),
    "set of names": (
        lambda: {"s": {"a"}, "x": f32(0)},
        lambda t: jax.jit(lambda: (t["s"].add("b"), t.update(x=t["x"] + len(t["s"]))))(),
        lambda new: (sorted(new["s"]), float(new["x"])),
        (["a", "b"], 2.0),
    ),
    "SimpleNamespace": (
        lambda: {"s": types.SimpleNamespace(x=f32(1))},
        lambda t: loop(3, lambda i: setattr(t["s"], "x", t["s"].x * 2)),
        lambda new: float(new["s"].x),
        8.0,
    ),
    "functools.partial": (
        lambda: {"f": functools.partial(jnp.multiply, f32(3))},
        lambda t: loop(2, lambda i: t.update(f=functools.partial(jnp.multiply, t["f"](2.0)))),
        lambda new: float(new["f"](1.0)),
        12.0,
    ),
    "unknown class": (
        lambda: {"p": Plain(f32(1))},
        lambda t: (t["p"].bump_again(), loop(2, lambda i: t["p"].bump_again())),
        lambda new: (float(new["p"].n), new["p"].bump_again.__self__ is new["p"]),
        (4.0, True),
    ),
    "cached_property": (
        lambda: {"p": Plain(f32(4))},
        lambda t: (jax.jit(lambda: t["p"].root)(), loop(2, lambda i: t["p"].bump())),
        lambda new: (float(new["p"].root), float(new["p"].n)),
        (2.0, 6.0),
    ),
    "weak reference to a parent": (
        Family,
        lambda t: (loop(2, lambda i: t.child.grow()), jax.jit(t.child.grow)()),
        lambda new: (float(new.n), float(new.child.parent().n)),
        (4.0, 4.0),
    ),
    "keys without an order": (
        lambda: {"k": {1: Cell(f32(1)), "a": f32(2), None: f32(3)}},
        lambda t: loop(2, lambda i: t["k"][1].add(t["k"][None])),
        lambda new: [float(new["k"][1].n), float(new["k"]["a"])],
        [7.0, 2.0],
    ),
    "heap": (
        lambda: {"h": [3.0, 7.0]},
        lambda t: heapq.heappush(t["h"], 1.0),
        lambda new: float(new["h"][0]),
        1.0,
    ),
    "array of NumPy": (
        lambda: {"a": np.zeros(2), "b": np.ones(2)},
        lambda t: t["a"].__setitem__(0, 5.0),
        lambda new: (new["a"].tolist(), new["b"].tolist()),
        ([5.0, 0.0], [1.0, 1.0]),
    ),
    "object with parts in two places": (
        lambda: (lambda p: {"p": p, "q": p})(Plain(f32(1))),
        lambda t: loop(2, lambda i: (t["p"].bump(), t["q"].bump())),
        lambda new: (float(new["p"].n), new["p"] is new["q"]),
        (5.0, True),
    ),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_and_classes(kind):
    make, program, look, wanted = CONTAINERS[kind]
    tree = make()
    before = look(copy.deepcopy(tree))
    _, new = mutate(program)(tree)
    assert look(new) == wanted
    assert look(tree) == before
    if kind not in ("heap", "array of NumPy"):  # Python looks at their values
        _, new = mutate(lambda tree: jax.jit(lambda: program(tree) and None)())(make())
        assert look(new) == wanted


@leaks_allowed
def test_a_cached_property_in_a_loop_is_refused():
    with pytest.raises(jaxstate.StructureChangeError, match=r"tree\['p'\].root"):
        mutate(lambda t: loop(2, lambda i: t["p"].root))({"p": Plain(f32(4))})


def test_sentinels_and_shared_functions_stay_themselves():
    def f(tree):
        assert tree["none"] is SENTINEL and tree["f"] is jnp.tanh
        tree["none"] = f32(1)

    tree = {"none": SENTINEL, "f": jnp.tanh}
    _, new = mutate(f)(tree)
    assert new["none"] == 1 and new["f"] is jnp.tanh and tree["none"] is SENTINEL


class _Missing:
    pass


SENTINEL = _Missing()


def test_weak_containers_of_objects_are_refused():
    cell = Cell(f32(1))
    names = weakref.WeakValueDictionary(c=cell)
    with pytest.raises(TypeError, match="cannot copy a WeakValueDictionary"):
        mutate(lambda t: None)({"names": types.SimpleNamespace(all=names), "c": cell})
    _, new = mutate(lambda t: t["c"].add(1.0))({"names": weakref.WeakSet(), "c": cell})
    assert new["c"].n == 2


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.checkpoint])
def test_what_a_jitted_function_returns_in_a_transformation_is_the_object(transform):
    def f(t):
        def g(x):
            same = jax.jit(lambda: t["c"])()
            same.add(x)
            return x if same is t["c"] else x * 100

        return transform(g)(2.0)

    out, new = mutate(f)({"c": Cell(f32(1))})
    assert out in (1.0, 2.0) and numbers(new) == [3.0]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("how", ["assigned", "in a loop", "returned", "held in a list"])
def test_objects_from_outside_stay_what_they_are(how, run):
    outside, held = Cell(f32(7)), []

    def f(t):
        if how == "assigned":
            t["c"] = outside
        elif how == "in a loop":
            loop(2, lambda i: t.update(c=outside))
        elif how == "returned":
            t["c"] = outside
            return outside
        else:
            t["l"].append(outside)
            held.append(t["l"][1])

    out, new = RUNS[run](f)(example())
    assert outside.n == 7 and numbers(out) == ([7.0] if how == "returned" else [])
    assert numbers(new)[2 if how != "held in a list" else -1] == 7.0
    new["c"].n = f32(0)
    assert outside.n == 7


@pytest.mark.parametrize("run", RUNS)
def test_one_level_can_be_assigned(run):
    def one_level(t):
        loop(2, lambda i: t.update(a=t["a"] + t["c"].n))
        t["c"] = Cell(t["a"])
        jax.jit(lambda: t["c"].add(1.0))()  # the function's own
        t["new"] = [t["a"]]

    deeper = {
        r"tree\['d'\].n": lambda t: t["d"].add(1.0),
        r"tree\['l'\]\[1\]": lambda t: jax.jit(lambda: t["l"].append(t["a"]))(),
        r"tree\['c'\].n": lambda t: loop(2, lambda i: t["c"].add(1.0)),
        r"tree\['d'\].k": lambda t: setattr(t["d"], "k", 5),
    }
    shallow = functools.partial(mutate, deep=False)
    runs = {
        "mutate": shallow,
        "jit outside": lambda f: lambda tree: jax.jit(shallow(f))(tree),
        "jit inside": lambda f: lambda tree: shallow(jax.jit(f))(tree),
    }
    _, new = runs[run](one_level)(example())
    assert numbers(new) == [5.0, 5.0, 6.0, 10.0, 0.0, 5.0]
    for label, f in deeper.items():
        with pytest.raises(jaxstate.FrozenPartError, match=label):
            runs[run](lambda t, f=f: f(t) and None)(example())


# -- What escapes ----------------------------------------------------------------------------


class Hidden:
    """Keeps what it is given where only Python's memory manager sees it."""

    def __init__(self):
        self.kept = iter(())


@leaks_allowed
def test_no_tracer_leaves():
    def escaped(tree):
        seen = []
        loop(2, lambda i: seen.append(tree["x"]))
        return seen[0] + 1

    with pytest.raises(jaxstate.ClosedStateError, match=r"tree\['x'\] was read inside a loop"):
        mutate(escaped)({"x": f32(1)})

    def hides(tree):
        jax.jit(lambda: setattr(tree["h"], "kept", iter([2 * tree["x"]])))()

    with pytest.raises(jaxstate.ClosedStateError, match=r"tree\['h'\].kept holds a value"):
        mutate(hides)({"h": Hidden(), "x": f32(1)})

    def other_thread(tree):
        thread = threading.Thread(target=jax.jit(lambda: tree.update(x=tree["x"] + 1)))
        thread.start()
        thread.join()

    with pytest.raises(jaxstate.ClosedStateError, match=r"tree\['x'\].*another thread"):
        mutate(other_thread)({"x": f32(1)})
    assert mutate(lambda tree: tree.update(x=2.0))({"x": f32(1)})[1]["x"] == 2.0


def test_threads_have_trees_of_their_own():
    results = {}

    def work(n):
        def f(tree):
            loop(n, lambda i: tree.update(x=tree["x"] + 1))

        results[n] = float(mutate(f)({"x": f32(0)})[1]["x"])

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: 1.0, 5: 5.0, 9: 9.0}


# -- In place --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Matrix:
    m: Any
    s: Any

    def update(self, i):
        self.m[i] += 1
        self.s = self.s * 2


IN_PLACE = {
    "mutate(inplace)": lambda f: mutate(inplace(f)),
    "inplace(mutate)": lambda f: inplace(mutate(f)),
    "inplace in mutate": lambda f: mutate(lambda *args: inplace(f)(*args)),
    "jit(mutate(inplace))": lambda f: jax.jit(mutate(inplace(f))),
    "mutate(jit(inplace))": lambda f: mutate(jax.jit(inplace(f))),
    "mutate(inplace(jit))": lambda f: mutate(inplace(jax.jit(f))),
}
BODIES = {
    "plain": lambda f: f,
    "jit": lambda f: lambda c: jax.jit(lambda: f(c))(),
    "jit of the object": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: (
        lambda c: jax.lax.scan(lambda x, _: (f(c), (x, None))[1], 0.0, None, length=1)[0]
    ),
    "fori_loop": lambda f: lambda c: loop(1, lambda i: f(c)),
    "carry": lambda f: lambda c: jax.lax.fori_loop(0, 1, lambda i, c: (f(c), c)[1], c),
    "while_loop": lambda f: (
        lambda c: jax.lax.while_loop(lambda i: i < 1, lambda i: (f(c), i + 1)[1], 0)
    ),
    "cond": lambda f: lambda c: jax.lax.cond(c.s > 0, f, lambda c: None, c),
    "vmap": lambda f: lambda c: jax.vmap(lambda i: (f(c), i)[1])(jnp.arange(2)),
    "grad": lambda f: lambda c: jax.grad(lambda x: (f(c), x * 2)[1])(1.0),
}


@pytest.mark.parametrize("run", IN_PLACE)
@pytest.mark.parametrize("body", BODIES)
def test_arrays_of_objects_are_written_in_place(body, run):
    def program(c):
        BODIES[body](lambda c: c.update(1))(c)
        BODIES[body](lambda c: c.update(0))(c)
        c.m[1] *= 5

    given = Matrix(jnp.zeros(2), f32(1))
    _, new = IN_PLACE[run](program)(given)
    np.testing.assert_array_equal(new.m, [1, 5])
    assert new.s == 4 and given.m.tolist() == [0, 0] and given.s == 1


# -- flax.nnx --------------------------------------------------------------------------------


def test_modules_of_nnx_are_what_they_are_under_its_own_transformations():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.calls = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.dropout(self.norm(self.linear(x)))

    x = jnp.arange(8.0).reshape(4, 2)

    def state(net):
        leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(net)))
        is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
        return [jax.random.key_data(x) if is_key(x) else x for x in leaves]

    def same(program, reference):
        net, wanted = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
        out, new = mutate(program)(net, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (out, state(new)),
            (reference(wanted, x), state(wanted)),
        )

    same(lambda net, x: net(x), lambda net, x: net(x))
    same(lambda net, x: jax.jit(lambda x: net(x))(x), nnx.jit(lambda net, x: net(x)))
    same(
        lambda net, x: jax.lax.scan(lambda c, _: (net(c), None), x, None, length=3)[0],
        lambda net, x: nnx.scan(
            lambda net, c: net(c), length=3, in_axes=(nnx.StateAxes({...: nnx.Carry}), nnx.Carry),
            out_axes=nnx.Carry,
        )(net, x),
    )  # fmt: skip

    def loss(net, x):
        return jnp.sum(net(x) ** 2)

    def gradient(net, x):
        def of_kernel(kernel):
            net.linear.kernel[...] = kernel
            return loss(net, x)

        return jax.grad(of_kernel)(net.linear.kernel[...])

    same(
        gradient,
        lambda net, x: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(net, x)["linear"][
            "kernel"
        ][...],
    )
    same(
        lambda net, x: jax.vmap(lambda x: net.linear(x))(x),
        lambda net, x: nnx.vmap(lambda net, x: net.linear(x), in_axes=(None, 0))(net, x),
    )
