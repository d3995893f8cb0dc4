"""`mutate`: parts are added, removed and replaced as in Python, and what cannot be is refused.

The reference is the same program with every part passed and returned by hand.
"""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.tree.examples import BODIES, Data, assert_close, example, f32

leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


# -- Structure -------------------------------------------------------------------------------


def test_structure_may_change_outside_of_loops():
    def f(tree, x):
        tree["new"] = {"x": x}
        tree["new"]["y"] = x + 1
        tree["list"].append(x)
        tree["list"].insert(0, 2 * x)
        tree["list"] += [x]
        tree["list"].pop(1)
        del tree["gone"]
        tree.setdefault("also", x)
        tree.update(b=jnp.zeros(3))
        tree["maybe"] = x  # was None
        jax.lax.fori_loop(0, 3, lambda i, _: tree["new"].update(y=tree["new"]["y"] * 2), None)
        return sorted(tree), len(tree["list"]), "gone" in tree

    tree = {"list": [f32(7)], "gone": f32(0), "maybe": None, "b": jnp.int32(3)}
    seen = []

    def new_tree(tree, x):
        out, new = jaxstate.mutate(f)(tree, x)
        seen.append(out)
        return new

    for run in (new_tree, jax.jit(new_tree)):
        new = run(tree, f32(3))
        assert seen.pop() == (["also", "b", "list", "maybe", "new"], 3, False)
        wanted = {
            "list": [f32(6), f32(3), f32(3)],
            "new": {"x": f32(3), "y": f32(32)},
            "also": f32(3),
            "b": jnp.zeros(3),
            "maybe": f32(3),
        }
        assert_close(new, wanted)
    assert set(tree) == {"list", "gone", "maybe", "b"} and len(tree["list"]) == 1


def test_structure_may_change_under_derivatives():
    def f(tree, x):
        def loss(x):
            tree["new"] = x**2
            return tree["new"] * x

        return jax.grad(loss)(x)

    g, new = jaxstate.mutate(f)({"old": f32(0)}, f32(2))
    assert_close((g, new), (f32(12), {"old": f32(0), "new": f32(4)}))


def test_whole_parts_are_assigned_in_loops():
    def f(tree):
        def body(i, _):
            old = tree["part"]
            tree["part"] = jax.tree.map(lambda x: x + 1, tree["part"])
            tree["difference"] = tree["part"]["x"] - old["x"]

        jax.lax.fori_loop(0, 3, body, None)
        a, b = tree["a"], tree["b"]
        tree["a"], tree["b"] = b, a
        tree["a"]["v"] += 100

    tree = {
        "part": {"x": f32(0), "y": [f32(1)]},
        "difference": f32(0),
        "a": {"v": f32(1)},
        "b": {"v": f32(2)},
    }
    wanted = {
        "part": {"x": f32(3), "y": [f32(4)]},
        "difference": f32(1),
        "a": {"v": f32(102)},
        "b": {"v": f32(1)},
    }
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f)), jaxstate.mutate(jax.jit(f))):
        assert_close(run(tree)[1], wanted)


@leaks_allowed
def test_what_was_replaced_keeps_its_values():
    def f(tree):
        before = tree["part"]
        tree["part"] = {"x": tree["part"]["x"] + 10, "y": [f32(5)]}
        kept = before["x"]
        middle = tree["part"]

        def body(i, total):
            old, inner = tree["part"], tree["part"]["y"]
            tree["part"] = jax.tree.map(lambda x: x * 2, tree["part"])
            return total + old["x"] + inner[0] + before["x"] + jax.jit(lambda: old["y"][0])()

        total = jax.lax.fori_loop(0, 3, body, 0.0)
        tree["part"]["x"] += 1
        return total + before["x"] + kept, middle["x"], middle["y"][0]

    tree = {"part": {"x": f32(1), "y": [f32(0)]}}
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f)), jaxstate.mutate(jax.jit(f))):
        (total, x, y), new = run(tree)
        assert total == (11 + 22 + 44) + 2 * (5 + 10 + 20) + 5 * 1
        assert (x, y) == (11, 5)
        assert_close(new, {"part": {"x": f32(89), "y": [f32(40)]}})

    def g(tree):
        middle = tree["part"]

        def body(i, total):
            tree["part"] = jax.tree.map(lambda x: x * 2, tree["part"])
            return total + middle["x"]  # the object of before the loop, in every turn

        return jax.lax.fori_loop(0, 3, body, 0.0)

    with pytest.raises(jaxstate.ClosedStateError, match=r"(?s)tree\['part'\].*assigned anew"):
        jaxstate.mutate(g)(tree)


def test_numbers_take_the_dtype_of_the_part():
    def f(tree):
        tree["x"] = 0
        tree["n"] = 3
        jax.lax.fori_loop(0, 2, lambda i, _: tree.update(x=1, n=tree["n"] * 2), None)

    _, new = jaxstate.mutate(f)({"x": f32(5), "n": jnp.int32(1)})
    assert_close(new, {"x": f32(1), "n": jnp.int32(12)})
    assert new["x"].dtype == jnp.float32

    def g(tree):
        tree["n"] = 2.5  # outside of a loop the type may change

    assert_close(jaxstate.mutate(g)({"n": jnp.int32(1)})[1], {"n": f32(2.5)})


def test_what_is_not_written_comes_out_as_it_was():
    array = np.arange(3)
    tree = {"n": 3, "array": array, "f": jnp.tanh, "s": "text", "none": None, "x": 1.5}

    def f(tree):
        assert tree["s"] == "text" and tree["f"] is jnp.tanh and tree["none"] is None
        tree["x"] += 1

    _, new = jaxstate.mutate(f)(tree)
    assert new["n"] == 3 and type(new["n"]) is int and new["array"] is array
    assert new["x"] == 2.5 and tree["x"] == 1.5
    assert new["f"] is jnp.tanh and new["s"] == "text"


def test_keys_as_parts(key):
    def f(tree):
        def body(i, _):
            tree["key"], sub = jax.random.split(tree["key"])
            tree["x"] += jax.random.normal(sub)

        jax.lax.fori_loop(0, 2, body, None)

    _, new = jaxstate.mutate(f)({"key": key, "x": f32(0)})
    k, x = key, f32(0)
    for _ in range(2):
        k, sub = jax.random.split(k)
        x += jax.random.normal(sub)
    np.testing.assert_allclose(new["x"], x, rtol=1e-6)
    assert (jax.random.key_data(new["key"]) == jax.random.key_data(k)).all()


def test_parts_that_can_only_be_replaced():
    def f(tree):
        def body(i, total):
            tree["f"] = jax.tree.map(lambda x: 2 * x, tree["f"])
            return total + tree["f"](1.0)

        return jax.lax.fori_loop(0, 2, body, 0.0)

    tree = {"f": jax.tree_util.Partial(jnp.multiply, f32(3))}
    total, new = jaxstate.mutate(f)(tree)
    assert total == 6 + 12 and new["f"](1.0) == 12 and tree["f"](1.0) == 3
    assert type(new["f"]) is jax.tree_util.Partial


def test_operands_of_branches_are_the_object_itself():
    def add(n):
        return lambda tree: setattr(tree, "a", tree.a + n)

    def f(tree):
        jax.lax.cond(tree.a >= 0, add(1), lambda tree: None, tree)
        jax.lax.switch(1, [lambda tree: None, add(10)], tree)
        jax.checkpoint(add(100))(tree)
        jax.lax.while_loop(lambda tree: tree.a < 1000, lambda tree: (add(500)(tree), tree)[1], tree)

    assert float(jaxstate.mutate(f)(example(Data))[1].a) == 1112.0


def test_a_copy_as_the_carry_of_a_loop():
    def f(tree):
        def body(copied, _):
            return jax.tree.map(lambda x: x + 1, copied), tree.a

        copied, _ = jax.lax.scan(body, copy.copy(tree), None, length=3)
        tree.a += copied.a
        return copied

    copied, new = jaxstate.mutate(f)(example(Data))
    assert type(copied) is Data
    assert_close((copied.a, new.a, new.b), (f32(4), f32(5), jnp.arange(3.0)))


def test_mutate_in_the_body_of_a_loop():
    def step(tree, x):
        tree.step(x)

    def by_hand(tree, xs):
        for x in xs:
            k = tree.c["k"]
            tree = Data(tree.a + x, tree.b * 3, {"k": [k[0] + 1, k[1]]})
        return tree

    xs = jnp.arange(4.0)
    body = lambda tree, x: (jaxstate.mutate(step)(tree, x)[1], tree.a)  # noqa: E731
    new, _ = jax.lax.scan(body, example(Data), xs)
    assert_close(new, by_hand(example(Data), xs))


@pytest.mark.parametrize("uses", [*itertools.product(["read", "written", "both"], repeat=3)])
def test_calls_of_mutate_in_each_other_share_the_body_of_a_loop(uses):
    def step(outer, inner):
        seen = 0.0
        for (tree, name), use in zip([(outer, "a"), (inner, "a"), (outer, "b")], uses, strict=True):
            seen = seen + (tree[name] if use != "written" else 1.0)
            if use != "read":
                tree[name] = 2.0 * seen
        inner["sum"] = inner["sum"] + seen

    def both(outer):
        def run(inner):
            jax.lax.fori_loop(0, 3, lambda i, _: step(outer, inner), None)

        return jaxstate.mutate(run)(arrays)[1]

    given = {"a": 1.0, "b": 2.0, "sum": 3.0}
    arrays = jax.tree.map(f32, given)
    inner, outer = jax.jit(jaxstate.mutate(both))(arrays)
    wanted = dict(given), dict(given)
    for _ in range(3):
        step(*wanted)
    assert (outer, inner) == wanted


# -- What is refused -------------------------------------------------------------------------


CHANGES = {
    "key": lambda tree: tree.__setitem__("new", 1.0),
    "append": lambda tree: tree["list"].append(1.0),
    "pop": lambda tree: tree["list"].pop(),
    "del": lambda tree: tree.__delitem__("x"),
    "part": lambda tree: tree.__setitem__("x", {"a": 1.0}),
    "other part": lambda tree: tree.__setitem__("list", {"a": 1.0}),
    "None": lambda tree: tree.__setitem__("x", None),
}


@pytest.mark.parametrize("wrap", ["jit", "jit in jit", "checkpoint", "grad", "grad of jit", "vmap"])
@pytest.mark.parametrize("change", CHANGES)
def test_structure_changes_where_a_body_runs_once(wrap, change):
    def f(tree):
        def body(x):
            CHANGES[change](tree)
            return x

        BODIES[wrap](body)(f32(1))

    tree, wanted = {"x": f32(1), "list": [f32(1)]}, {"x": f32(1), "list": [f32(1)]}
    CHANGES[change](wanted)
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f)), jaxstate.mutate(jax.jit(f))):
        assert_close(run(tree)[1], jax.tree.map(jnp.asarray, wanted))
        assert_close(tree, {"x": f32(1), "list": [f32(1)]})


@leaks_allowed
@pytest.mark.parametrize("wrap", ["scan", "cond", "switch", "fori_loop", "while_loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_structure_stays_inside_loops_and_branches(wrap, change):
    def f(tree):
        def body(x):
            CHANGES[change](tree)
            return x

        BODIES[wrap](body)(f32(1))

    tree = {"x": f32(1), "list": [f32(1)]}
    with pytest.raises(jaxstate.StructureChangeError, match=r"(?s)tree\['.*one structure"):
        jaxstate.mutate(f)(tree)
    assert_close(tree, {"x": f32(1), "list": [f32(1)]})


@leaks_allowed
def test_types_stay_inside_bodies():
    def shape(tree):
        jax.lax.fori_loop(0, 2, lambda i, _: tree.__setitem__("x", jnp.ones(3)), None)

    def dtype(tree):
        jax.jit(lambda: tree.__setitem__("n", 0.5))()

    tree = {"x": f32(0), "n": jnp.int32(0)}
    with pytest.raises(jaxstate.SlotTypeError, match=r"tree\['x'\].*float32\[\].*float32\[3\]"):
        jaxstate.mutate(shape)(tree)
    with pytest.raises(jaxstate.SlotTypeError, match=r"tree\['n'\].*int32\[\].*float32\[\]"):
        jaxstate.mutate(dtype)(tree)


@leaks_allowed
def test_lanes_and_copies_and_the_end():
    def lanes(tree):
        jax.vmap(lambda x: tree.__setitem__("x", x))(jnp.arange(3.0))

    with pytest.raises(jaxstate.LaneWriteError, match=r"(?s)tree\['x'\].*vmap over 3 lanes"):
        jaxstate.mutate(lanes)({"x": f32(0)})

    def argument(tree):
        def bump(tree):
            tree["x"] = tree["x"] + 1
            return tree

        return jax.vmap(bump)(tree)

    with pytest.raises(jaxstate.CopyWriteError, match="would be lost"):
        jaxstate.mutate(argument)({"x": jnp.zeros(3)})

    def loss(tree):
        tree["calls"] = tree["calls"] + 1
        return tree["w"] * 2

    with pytest.raises(jaxstate.CopyWriteError):
        jaxstate.mutate(lambda tree: jax.grad(loss)(tree))({"w": f32(1), "calls": f32(0)})

    kept = []
    jaxstate.mutate(lambda tree: kept.append(tree))({"x": f32(0)})
    with pytest.raises(jaxstate.ClosedStateError, match="after that function has ended"):
        kept[0]["x"] + 1
    with pytest.raises(TypeError, match=r"jax.jit\(jaxstate.mutate"):
        jaxstate.mutate(jax.jit(example(Data).step))(1.0)
    for bad in (jnp.ones(3), 3.0, None, "text"):
        with pytest.raises(TypeError, match="wants a tree with parts"):
            jaxstate.mutate(lambda tree: None)(bad)
    with pytest.raises(jaxstate.MissingStreamError):  # nothing was left open
        jaxstate.next_key()


def test_an_exception_leaves_the_tree_as_it_was():
    def f(tree):
        tree["x"] = f32(3)
        raise ZeroDivisionError

    tree = {"x": f32(1)}
    with pytest.raises(ZeroDivisionError):
        jaxstate.mutate(f)(tree)
    assert tree["x"] == 1.0
