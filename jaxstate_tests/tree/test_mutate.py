"""`mutate`: functions that assign to the parts of an object, made pure.

Row "mutate" of the acceptance list. The reference is the same program with every part passed and
returned by hand.
"""

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write

f32 = jnp.float32
leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


# -- All kinds of objects --------------------------------------------------------------------


class Parts(NamedTuple):
    a: Any
    b: Any
    c: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    a: Any
    b: Any
    c: Any
    n: int = dataclasses.field(default=3, metadata=dict(static=True))

    def step(self, x):
        """Assigns to itself."""
        self.a = self.a + x
        self.b *= self.n
        self.c["k"][0] += 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: Any
    c: Any


@jax.tree_util.register_pytree_node_class
class Plain:
    """Says its children without their names, and has a part that is none."""

    def __init__(self, a, b, c, n=3):
        self.a, self.b, self.c, self.n = a, b, c, n

    def tree_flatten(self):
        return (self.c, self.a, self.b), self.n

    @classmethod
    def tree_unflatten(cls, n, children):
        c, a, b = children
        return cls(a, b, c, n)

    def __repr__(self):
        return f"Plain({self.a}, {self.b}, {self.c}, {self.n})"


@jax.tree_util.register_pytree_with_keys_class
class Private:
    """Keeps its parts in other attributes than it shows."""

    __slots__ = ("__hidden", "_a", "_c")

    def __init__(self, a, b, c):
        self._a, self.__hidden, self._c = a, b, c

    def tree_flatten_with_keys(self):
        names = (jax.tree_util.GetAttrKey("a"), jax.tree_util.GetAttrKey("b"))
        return ((names[0], self._a), (names[1], self.__hidden), ("c", self._c)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    @property
    def a(self):
        return self._a

    @a.setter
    def a(self, value):
        self._a = value

    b = property(lambda self: self.__hidden, lambda self, b: setattr(self, "_Private__hidden", b))
    c = property(lambda self: self._c)


def attrs_class():
    attrs = pytest.importorskip("attrs")

    @attrs.frozen
    class Attrs:
        a: Any
        b: Any
        c: Any

    jax.tree_util.register_pytree_node(
        Attrs, lambda o: ((o.a, o.b, o.c), None), lambda _, parts: Attrs(*parts)
    )
    return Attrs


def flax_dataclass():
    struct = pytest.importorskip("flax.struct")

    @struct.dataclass
    class Flax:
        a: Any
        b: Any
        c: Any
        n: int = struct.field(pytree_node=False, default=3)

    return Flax


def flax_node():
    struct = pytest.importorskip("flax.struct")

    class Node(struct.PyTreeNode):
        a: Any
        b: Any
        c: Any

    return Node


def chex_class(**options):
    chex = pytest.importorskip("chex")

    @chex.dataclass(**options)
    class Chex:
        a: Any
        b: Any
        c: Any

    return lambda a, b, c: Chex(a=a, b=b, c=c)


def equinox_module():
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        a: jax.Array
        b: jax.Array
        c: Any
        f: Any = eqx.field(static=True, default=jnp.tanh)

    return Module


def with_items(cls):
    return lambda a, b, c: cls({"a": a, "b": b, "c": c}.items())


KINDS = {
    "dict": lambda: with_items(dict),
    "OrderedDict": lambda: with_items(OrderedDict),
    "defaultdict": lambda: lambda a, b, c: defaultdict(list, {"a": a, "b": b, "c": c}),
    "list": lambda: lambda a, b, c: [a, b, c],
    "dataclass": lambda: Data,
    "frozen dataclass with slots": lambda: Frozen,
    "class": lambda: Plain,
    "class with properties and slots": lambda: Private,
    "attrs": attrs_class,
    "flax.struct.dataclass": flax_dataclass,
    "flax.struct.PyTreeNode": flax_node,
    "chex.dataclass": chex_class,
    "chex.dataclass, frozen": lambda: chex_class(frozen=True),
    "chex.dataclass, not a mapping": lambda: chex_class(mappable_dataclass=False),
    "equinox.Module": equinox_module,
}


def get(tree, name):
    if isinstance(tree, dict):
        return tree[name]
    if type(tree) in (list, tuple) or not hasattr(tree, name):
        return tree["abc".index(name)]
    return getattr(tree, name)


def put(tree, name, value):
    if isinstance(tree, dict):
        tree[name] = value
    elif not hasattr(tree, name):
        tree["abc".index(name)] = value
    else:
        setattr(tree, name, value)


def example(make):
    return make(f32(1), jnp.arange(3.0), {"k": [jnp.int32(5), f32(2)]})


def program(tree, x):
    """Assigns to all parts, plainly and in bodies of all kinds."""
    put(tree, "a", get(tree, "a") + x)
    get(tree, "c")["k"][0] += 1

    def body(i, total):
        put(tree, "b", get(tree, "b") * 2 + i)
        get(tree, "c")["k"][1] += get(tree, "a")
        return total + get(tree, "b").sum()

    total = jax.lax.fori_loop(0, 3, body, 0.0)

    def branch():
        put(tree, "a", 10 * get(tree, "a"))

    jax.lax.cond(x > 0, branch, lambda: None)
    jax.jit(lambda: put(tree, "b", get(tree, "b") + get(tree, "a")))()
    return total


def by_hand(a, b, k, x):
    a, k = a + x, [k[0] + 1, k[1]]
    total = 0.0
    for i in range(3):
        b = b * 2 + i
        k[1] = k[1] + a
        total = total + b.sum()
    a = jnp.where(x > 0, 10 * a, a)
    return total, (a, b + a, k)


def parts(tree):
    return get(tree, "a"), get(tree, "b"), list(get(tree, "c")["k"])


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [2.0, -2.0])
def test_every_kind_of_object(kind, x):
    tree = example(KINDS[kind]())
    before = copy.deepcopy(jax.tree.leaves(tree))
    seen = []

    def run(tree_, x):
        seen.append(isinstance(tree_, type(tree)) and tree_.__class__ is type(tree))
        return program(tree_, x)

    wanted = by_hand(f32(1), jnp.arange(3.0), [jnp.int32(5), f32(2)], x)
    for f in (jaxstate.mutate(run), jax.jit(jaxstate.mutate(run)), jaxstate.mutate(jax.jit(run))):
        total, new = f(tree, x)
        assert type(new) is type(tree)
        assert jax.tree.structure(new) == jax.tree.structure(tree)
        assert_close((total, parts(new)), wanted)
    assert all(seen)
    assert_close(jax.tree.leaves(tree), before)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_and_lanes(kind):
    make = KINDS[kind]()

    def f(a, x, run):
        total, new = run(make(a, jnp.arange(3.0), {"k": [jnp.int32(5), f32(2)]}), x)
        a, b, k = parts(new)
        return total * a + b.sum() + k[1]

    def g(a, x):
        total, (a, b, k) = by_hand(a, jnp.arange(3.0), [jnp.int32(5), f32(2)], x)
        return total * a + b.sum() + k[1]

    found = partial(f, run=jaxstate.mutate(program))
    a, x = f32(1), f32(2)
    assert_close(jax.grad(found, (0, 1))(a, x), jax.grad(g, (0, 1))(a, x))
    assert_close(jax.jit(jax.grad(jax.checkpoint(found)))(a, x), jax.grad(g)(a, x))
    lanes = jnp.array([-1.0, 0.0, 2.0])
    assert_close(jax.vmap(found)(lanes, lanes), jax.vmap(g)(lanes, lanes))


# -- Bodies ----------------------------------------------------------------------------------


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


BODIES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(jax.jit(f)),
    "checkpoint": jax.checkpoint,
    "grad": lambda f: lambda x: jax.value_and_grad(f)(x)[0],
    "grad of jit": lambda f: lambda x: jax.value_and_grad(jax.jit(f))(x)[0],
    "grad of checkpoint": lambda f: lambda x: jax.value_and_grad(jax.checkpoint(f))(x)[0],
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[0],
    "linearize": lambda f: lambda x: jax.linearize(f, x)[0],
    "vjp": lambda f: lambda x: jax.vjp(f, x)[0],
    "vmap": lambda f: lambda x: jax.vmap(lambda _: f(x))(jnp.arange(2))[0],
    "cond": lambda f: lambda x: jax.lax.cond(x > 0, f, lambda x: x, x),
    "switch": lambda f: lambda x: jax.lax.switch(1, [lambda x: x, f], x),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0],
    "fori_loop": lambda f: lambda x: jax.lax.fori_loop(0, 1, lambda i, x: f(x), x),
    "while_loop": lambda f: (
        lambda x: jax.lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, f(s[1])), (0, x))[1]
    ),
    "custom_jvp": custom_jvp,
    "scan of cond of jit": lambda f: BODIES["scan"](BODIES["cond"](jax.jit(f))),
}


@pytest.mark.parametrize("body", BODIES)
def test_bodies(body):
    def f(tree, x):
        def inside(x):
            tree.step(x)
            tree.c["k"][1] += x
            return tree.a * x

        y = BODIES[body](inside)(x)
        return y, tree.a  # read outside

    tree, x = example(Data), f32(2)
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f)), jaxstate.mutate(jax.jit(f))):
        out, new = run(tree, x)
        assert_close(out, (f32(6), f32(3)))
        wanted = Data(f32(3), 3 * jnp.arange(3.0), {"k": [jnp.int32(6), f32(4)]})
        assert_close(new, wanted)


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: jax.vjp(f, x), lambda pullback, ct: pullback(ct))
    return g


def shard_map(f):
    mesh, spec = jax.make_mesh((1,), ("i",)), jax.sharding.PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


WHOLE_PARTS = {
    **BODIES,
    "custom_vjp": custom_vjp,
    "jit of custom_vjp": lambda f: jax.jit(custom_vjp(f)),
    "scan of custom_vjp": lambda f: BODIES["scan"](custom_vjp(f)),
    "shard_map": shard_map,
    "inplace": jaxstate.inplace,
}


def test_a_function_and_its_tree_are_wanted():
    for wrong in (None, 3, {"x": 1}):
        with pytest.raises(TypeError, match="mutate wants a function"):
            jaxstate.mutate(wrong)
    for kwargs in ({}, {"tree": {"x": 1}}):
        with pytest.raises(TypeError, match="the first positional argument, and there is none"):
            jaxstate.mutate(lambda tree: None)(**kwargs)


@leaks_allowed
@pytest.mark.parametrize("body", WHOLE_PARTS)
def test_whole_parts_are_assigned_where_one_level_is_writable(body):
    """Another part is assigned in any body, and no part of a part is."""

    def replaces(tree, x):
        def inside(x):
            tree.a = tree.a + x
            tree.c = {"k": [tree.c["k"][0] * x, tree.c["k"][1]], "t": (tree.c["t"][0] + 1,)}
            return tree.a * x

        return WHOLE_PARTS[body](inside)(x), tree.c["k"][0]

    def assigns_deeper(tree, x):
        WHOLE_PARTS[body](lambda x: (tree.c["k"].append(x), x)[1])(x)

    def writes_deeper(tree, x):
        def inside(x):
            tree.c["k"][0] = tree.c["k"][0] + 1
            return x

        WHOLE_PARTS[body](inside)(x)

    def run(deep, c, x):
        tree = Data(f32(1), f32(0), {"k": [c, f32(7)], "t": (f32(5),)})
        return jaxstate.mutate(replaces, deep=deep)(tree, x)

    c, x = f32(4), f32(2)
    wanted = Data(f32(3), f32(0), {"k": [f32(8), f32(7)], "t": (f32(6),)})
    for f in (partial(run, True), partial(run, False)):
        for found in (f, jax.jit(f)):
            assert_close(found(c, x), ((f32(6), f32(8)), wanted))
        if body != "while_loop" and "custom" not in body:
            slopes = jax.grad(lambda c, x, f=f: f(c, x)[1].c["k"][0], (0, 1))(c, x)  # of c * x
            assert_close(slopes, (x, c))
    for deeper in (writes_deeper, *([assigns_deeper] if body in ("plain", "jit") else [])):
        with pytest.raises(jaxstate.FrozenPartError, match=r"tree\.c\['k'\]"):
            jaxstate.mutate(deeper, deep=False)(Data(f32(1), f32(0), {"k": [c, f32(7)]}), x)


def test_a_while_condition_that_assigns():
    def f(tree):
        def condition(i):
            tree["asked"] += 1
            return i < 3

        jax.lax.while_loop(condition, lambda i: i + 1, 0)

    assert int(jaxstate.mutate(f)({"asked": jnp.int32(0)})[1]["asked"]) == 4


def test_derivatives_flow_through_assigned_parts():
    def loss(w, xs):
        def f(tree):
            def body(h, x):
                tree["state"] = jnp.tanh(w * tree["state"] + x)
                return h + tree["state"], None

            return jax.lax.scan(body, 0.0, xs)[0]

        total, new = jaxstate.mutate(f)({"state": w})
        return total * new["state"]

    def reference(w, xs):
        s, total = w, 0.0
        for x in xs:
            s = jnp.tanh(w * s + x)
            total = total + s
        return total * s

    xs = jnp.array([0.3, -0.2, 0.7])
    for d in (lambda f: f, jax.grad, lambda f: jax.jit(jax.grad(f)),
              lambda f: jax.grad(jax.grad(f)),
              lambda f: lambda w, xs: jax.jvp(lambda w: f(w, xs), (w,), (1.0,))[1]):  # fmt: skip
        np.testing.assert_allclose(d(loss)(f32(0.5), xs), d(reference)(f32(0.5), xs), rtol=1e-5)


def test_gradients_inside_with_updates_outside():
    def train(tree, x):
        def loss(w):
            tree["calls"] += 1
            tree["last"] = w * x
            return jnp.sum((w * x - 1) ** 2)

        for _ in range(2):
            tree["w"] = tree["w"] - 0.1 * jax.grad(loss)(tree["w"])

    tree = {"w": jnp.ones(3), "calls": jnp.int32(0), "last": jnp.zeros(3)}
    x, w = jnp.arange(3.0), jnp.ones(3)
    for _ in range(2):
        last, w = w * x, w - 0.1 * 2 * (w * x - 1) * x
    _, new = jaxstate.mutate(train)(tree, x)
    assert_close(new, {"w": w, "calls": jnp.int32(2), "last": last})


# -- The object as an argument ---------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Counter:
    n: Any
    log: Any

    @jax.jit
    def jitted(self, by):
        self.n += by

    @partial(jax.jit, static_argnums=1)
    def with_static(self, by):
        self.n += by
        return self


def test_methods_that_are_jitted_themselves():
    def f(counter):
        counter.jitted(2)
        counter.jitted(3)
        counter.with_static(10)
        jax.lax.fori_loop(0, 3, lambda i, _: counter.jitted(i), None)

    counter = Counter(jnp.int32(1), jnp.zeros(2))
    for _ in range(2):
        for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f))):
            assert int(run(counter)[1].n) == 19
    assert int(jaxstate.mutate(counter.jitted)(5)[1].n) == 6


def test_a_jitted_method_is_traced_once_for_many_calls_of_mutate():
    traced = []

    @jax.jit
    def step(counter, x):
        traced.append(None)
        counter.n += x

    counter = Counter(jnp.int32(0), jnp.zeros(2))
    for i in range(5):
        _, counter = jaxstate.mutate(step)(counter, i)
    assert int(counter.n) == 10 and len(traced) == 1
    _, other = jaxstate.mutate(step)(Counter(jnp.float32(0), None), 1)
    assert float(other.n) == 1.0 and len(traced) == 2


def test_one_jitted_method_of_two_parts():
    def f(tree):
        for _ in range(2):
            tree["a"].jitted(1)
            tree["b"].jitted(10)
        tree["a"], tree["b"] = tree["b"], tree["a"]
        tree["a"].jitted(100)

    tree = {name: Counter(jnp.int32(0), jnp.zeros(2)) for name in "ab"}
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f))):
        for _ in range(2):
            _, new = run(tree)
            assert (int(new["a"].n), int(new["b"].n)) == (120, 2)


def test_the_carry_of_a_loop_is_the_object_itself():
    def f(counter):
        def body(counter, x):
            counter.n += x
            return counter, counter.n

        _, ns = jax.lax.scan(body, counter, jnp.arange(4))
        return ns

    ns, new = jaxstate.mutate(f)(Counter(jnp.int32(1), None))
    assert list(ns) == [1, 2, 4, 7] and int(new.n) == 7


def test_derivatives_with_respect_to_the_object():
    def loss(tree, x):
        return jnp.sum(tree.a * tree.b * x) + tree.c["k"][1] ** 2

    def f(tree, x):
        direct = jax.grad(loss, allow_int=True)(tree, x)
        compiled = jax.grad(jax.jit(loss), allow_int=True)(tree, x)
        recomputed = jax.grad(jax.checkpoint(loss), allow_int=True)(tree, x)
        tree.a = direct.a
        return [(g.a, g.b, g.c["k"][1]) for g in (direct, compiled, recomputed)]

    tree, x = example(Data), jnp.arange(3.0)
    wanted = (jnp.sum(tree.b * x), tree.a * x, 2 * tree.c["k"][1])
    found, new = jaxstate.mutate(f)(tree, x)
    assert_close(found, [wanted] * 3)
    assert_close(new.a, wanted[0])


def test_trees_made_from_the_object_are_copies():
    def f(tree):
        old = jax.tree.map(lambda x: x, tree)
        tree.a += 1
        assert type(old) is Data
        old.b = old.b * 100
        grown = jax.tree.map(lambda x: 2 * x, tree)
        return tree.a - old.a, grown.a, jnp.stack(jax.tree.leaves(tree.c))

    out, new = jaxstate.mutate(f)(example(Data))
    assert_close(out, (f32(1), f32(4), jnp.array([5.0, 2.0])))
    assert_close(new.b, jnp.arange(3.0))

    @jax.jit
    def inside(tree):
        old = jax.tree.map(lambda x: x, tree)
        tree.a += 1
        return tree.a - old.a

    assert float(jaxstate.mutate(inside)(example(Data))[0]) == 1.0


def test_lanes_read_parts_of_their_own():
    def f(tree, xs):
        ys = jax.vmap(lambda part, x: part["w"] * x)(tree["stacked"], xs)
        tree["total"] += ys.sum()
        return ys

    tree = {"stacked": {"w": jnp.arange(3.0)}, "total": f32(0)}
    ys, new = jaxstate.mutate(f)(tree, jnp.ones(3))
    assert_close((ys, new["total"]), (jnp.arange(3.0), f32(3)))


def test_maps_of_parts_and_of_other_trees():
    def train(state, x):
        grads = jax.grad(lambda p: jnp.sum(p["w"] * x) ** 2)(state.c)
        state.c = jax.tree.map(lambda p, g: p - 0.1 * g, state.c, grads)
        seen = jax.tree.map(lambda g, p: g + p, grads, state.c)
        both = jax.tree_util.tree_map_with_path(lambda _, a, b: a - b, seen, state.c)
        return both["w"]

    x, w = jnp.arange(3.0), jnp.ones(3)
    g = 2 * jnp.sum(w * x) * x
    for run in (jaxstate.mutate(train), jax.jit(jaxstate.mutate(train))):
        out, new = run(Data(f32(0), f32(0), {"w": w}), x)
        assert_close((out, new.c["w"]), (g, w - 0.1 * g))


@pytest.mark.parametrize("jit", [False, True])
def test_a_train_state_with_an_optimizer(jit):
    optax = pytest.importorskip("optax")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class TrainState:
        params: Any
        opt_state: Any
        step: Any

        def update(self, opt, x):
            loss, grads = jax.value_and_grad(lambda p: jnp.sum((p["w"] * x - 1) ** 2))(self.params)
            updates, self.opt_state = opt.update(grads, self.opt_state, self.params)
            self.params = optax.apply_updates(self.params, updates)
            self.step += 1
            return loss

    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    params = {"w": jnp.ones(3)}
    x = jnp.arange(3.0)

    def train(state, xs):
        return jax.lax.scan(lambda _, x: (None, state.update(opt, x)), None, xs)[1]

    state = TrainState(params, opt.init(params), 0)
    run = jaxstate.mutate(train)
    losses, new = (jax.jit(run) if jit else run)(state, jnp.stack([x] * 4))
    wanted, opt_state = [], opt.init(params)
    for _ in range(4):
        loss, grads = jax.value_and_grad(lambda p: jnp.sum((p["w"] * x - 1) ** 2))(params)
        updates, opt_state = opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        wanted.append(loss)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_close(new.params, params)
    assert_close(new.opt_state, opt_state)
    assert new.step == 4 and type(new) is TrainState


def test_numpy_and_jax_take_lists_of_parts():
    def f(tree):
        xs = tree["xs"]
        return (
            jnp.stack(xs),
            jnp.asarray(xs),
            jnp.concatenate([jnp.stack(xs)] * 2),
            sum(xs),
            max(xs),
        )

    out, _ = jaxstate.mutate(f)({"xs": [f32(1), f32(3), f32(2)]})
    x = jnp.array([1.0, 3.0, 2.0])
    assert_close(out, (x, x, jnp.concatenate([x, x]), f32(6), f32(3)))


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


# -- Classes and their rules -----------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    """Refuses assignments, checks what it is made of, and has a derived property."""

    above: Any
    below: Any

    def __post_init__(self):
        if isinstance(self.below, float) and self.below == 0:
            raise ValueError("division by zero")

    @property
    def value(self):
        return self.above / self.below

    def scale(self, by):
        object.__setattr__(self, "above", self.above * by)
        return self

    def changed(self, **parts):
        return dataclasses.replace(self, **parts)


def test_the_rules_of_a_class_hold_outside():
    def f(ratio):
        ratio.above = 6.0
        ratio.scale(2)
        with pytest.raises(AttributeError):
            ratio.value = 3.0  # a property that cannot be set
        assert isinstance(ratio, Ratio) and dataclasses.is_dataclass(ratio)
        assert type(ratio.changed(above=1.0)) is Ratio
        return ratio.value, ratio.changed(below=1.0)

    (value, changed), new = jaxstate.mutate(f)(Ratio(1.0, 4.0))
    assert value == 3.0 and new.value == 3.0 and type(changed) is Ratio and changed.value == 12.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        new.above = 1.0

    def g(ratio):
        ratio.below = 0.0
        ratio.above = 1.0  # it is no matter that the tree is not right in between
        ratio.below = 2.0

    assert jaxstate.mutate(g)(Ratio(1.0, 4.0))[1].value == 0.5


def test_what_a_class_refuses_to_be_made_of_is_refused():
    @jax.tree_util.register_pytree_node_class
    class Positive:
        def __init__(self, x):
            if not isinstance(x, jax.core.Tracer) and x < 0:
                raise ValueError("negative")
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    def f(tree, x):
        tree.x = x

    assert jaxstate.mutate(f)(Positive(1.0), 2.0)[1].x == 2.0
    with pytest.raises(ValueError, match="negative"):
        jaxstate.mutate(f)(Positive(1.0), -2.0)


def test_inheritance_and_super():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Base:
        x: Any

        def bump(self):
            self.x += 1

        @classmethod
        def make(cls, x):
            return cls(x)

        @staticmethod
        def twice(x):
            return 2 * x

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Derived(Base):
        y: Any

        def bump(self):
            super().bump()
            self.y += self.twice(self.x)

        def __call__(self, z):
            self.y = self.y * z

        def __len__(self):
            return 7

        def __getitem__(self, i):
            return self.x if i == 0 else self.y

    def f(tree, z):
        tree.bump()
        tree(z)
        assert len(tree) == 7 and isinstance(tree, Base)
        return tree[0], tree[1]

    out, new = jaxstate.mutate(f)(Derived(f32(1), f32(2)), 3.0)
    assert_close(out, (f32(2), f32(18)))
    assert_close(new, Derived(f32(2), f32(18)))


def test_bound_methods_and_nested_calls():
    tree = example(Data)
    out, new = jaxstate.mutate(tree.step)(2.0)
    assert out is None
    assert_close(new, Data(f32(3), 3 * jnp.arange(3.0), {"k": [jnp.int32(6), f32(2)]}))

    def f(tree):
        _, tree.c = jaxstate.mutate(lambda c: c["k"].__setitem__(0, c["k"][0] + tree.n))(tree.c)

        def body(i, _):
            _, tree.c = jaxstate.mutate(lambda c: c["k"].__setitem__(1, c["k"][1] + tree.a))(tree.c)

        jax.lax.fori_loop(0, 2, body, None)

    _, new = jaxstate.mutate(f)(tree)
    assert_close(new.c, {"k": [jnp.int32(8), f32(4)]})


def test_equinox_modules_and_their_methods():
    eqx = pytest.importorskip("equinox")

    class Norm(eqx.Module):
        mean: jax.Array
        momentum: float = eqx.field(static=True, default=0.9)

        def __call__(self, x):
            self.mean = self.momentum * self.mean + (1 - self.momentum) * x.mean(0)
            return x - self.mean

    class Net(eqx.Module):
        linear: eqx.nn.Linear
        norm: Norm

        def __call__(self, x):
            return jax.nn.relu(self.norm(jax.vmap(self.linear)(x)))

    net = Net(eqx.nn.Linear(3, 2, key=jax.random.key(0)), Norm(jnp.zeros(2)))
    x = jnp.arange(12.0).reshape(4, 3)
    h = x @ net.linear.weight.T + net.linear.bias
    mean = 0.9 * jnp.zeros(2) + (1 - 0.9) * h.mean(0)
    for run in (jaxstate.mutate(Net.__call__), jax.jit(jaxstate.mutate(lambda net, x: net(x)))):
        y, new = run(net, x)
        np.testing.assert_allclose(y, jax.nn.relu(h - mean), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new.norm.mean, mean, rtol=1e-5)
        assert type(new) is Net and new.linear.weight is not None
    y, new = jaxstate.mutate(net.__call__)(x)
    np.testing.assert_allclose(new.norm.mean, mean, rtol=1e-5)

    def loss(net, x):
        y, new = jaxstate.mutate(lambda net: net(x))(net)
        return jnp.sum(y**2), new

    grads, new = eqx.filter_grad(loss, has_aux=True)(net, x)
    assert grads.linear.weight.shape == (2, 3) and type(grads) is Net
    np.testing.assert_allclose(new.norm.mean, mean, rtol=1e-5)


# -- With other state ------------------------------------------------------------------------


def test_with_streams_parameters_and_slots(key):
    slot = new_slot(jnp.int32(0))

    @jaxstate.parametrized
    def net(x, tree):
        w = jaxstate.param("w", jax.nn.initializers.ones, ())

        def f(tree):
            def body(i, x):
                tree["sum"] += jaxstate.random.normal() * w
                write(slot, read(slot) + 1)
                return x + tree["sum"]

            return jax.lax.fori_loop(0, 3, body, x)

        return jaxstate.mutate(f)(tree)

    params = net.init(key, 0.0, {"sum": f32(0)})
    write(slot, 0)
    for apply in (net.apply, jax.jit(net.apply)):
        found, new = apply(params, 0.0, {"sum": f32(0)}, key=key)
        draws = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(3)]
        sums = np.cumsum(draws)
        np.testing.assert_allclose(new["sum"], sums[-1], rtol=1e-5)
        np.testing.assert_allclose(found, sums.sum(), rtol=1e-5)


def test_running_metrics_over_devices():
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    spec = jax.sharding.PartitionSpec

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Mean:
        total: Any
        count: Any

        def update(self, values):
            self.total += values.sum()
            self.count += values.size

        def merge(self, other):
            self.total += other.total
            self.count += other.count

    empty = Mean(jnp.float32(0), jnp.int32(0))
    xs = jnp.arange(4.0 * len(devices)).reshape(len(devices), 4)

    @partial(jax.shard_map, mesh=mesh, in_specs=spec("d"), out_specs=spec())
    def over_devices(x):
        local = jax.tree.map(lambda v: jax.lax.pcast(v, "d", to="varying"), empty) if hasattr(
            jax.lax, "pcast") else empty  # fmt: skip
        _, mean = jaxstate.mutate(Mean.update)(local, x)
        return jax.lax.psum(mean, "d")

    mean = jax.jit(over_devices)(xs)
    assert float(mean.total) == xs.sum() and int(mean.count) == xs.size
    _, mean = jaxstate.mutate(Mean.merge)(mean, mean)
    assert float(mean.total) == 2 * xs.sum()


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


# -- Lists and dicts -------------------------------------------------------------------------


def test_lists_behave_like_lists():
    def f(xs):
        trail = [len(xs), xs[-1], list(xs), xs[1:], 2 * xs[:1], xs.index(2.0)]
        trail.append(xs + [0.0])  # noqa: RUF005
        xs[0], xs[-1] = xs[-1], xs[0]
        xs.append(9.0)
        xs.extend([7.0, 8.0])
        xs.insert(1, 5.0)
        trail.append(xs.pop())
        xs.remove(9.0)
        del xs[0]
        xs[1:3] = [1.0, 1.5, 1.75]
        xs.sort()
        xs.reverse()
        xs *= 2
        trail += [3.0 in xs, xs.count(5.0), [*reversed(xs)], xs.copy(), xs == xs.copy(), bool(xs)]
        first, *rest = xs
        trail += [first, rest]
        xs[::2] = [0.0] * len(xs[::2])
        return trail

    plain = [1.0, 2.0, 3.0]
    found, new = jaxstate.mutate(f)(plain)
    reference = list(plain)
    wanted = f(reference)
    assert jax.tree.map(float, found) == jax.tree.map(float, wanted)
    assert [float(x) for x in new] == reference and plain == [1.0, 2.0, 3.0]


def test_dicts_behave_like_dicts():
    def f(d):
        trail = [len(d), sorted(d), dict(d), {**d}, d.get("z", 0.0), "a" in d, list(d.values())]
        d |= {"c": 3.0}
        d.update({"d": 4.0}, e=5.0)
        trail += [d.pop("a"), d.pop("z", -1.0), d.setdefault("b", 9.0), d.setdefault("f", 6.0)]
        trail += [d.popitem(), sorted(d.items()), d | {"x": 1.0}, {"x": 1.0} | d, d.copy()]
        trail.append((lambda **kwargs: kwargs)(**d))
        trail += [d == d.copy(), bool(d), list(reversed(d))]
        return trail

    plain = {"a": 1.0, "b": 2.0}
    found, new = jaxstate.mutate(f)(plain)
    reference = dict(plain)
    wanted = f(reference)
    as_floats = partial(jax.tree.map, lambda x: x if isinstance(x, str) else float(x))
    assert as_floats(found) == as_floats(wanted)
    assert as_floats(new) == reference and plain == {"a": 1.0, "b": 2.0}

    def g(d):
        d["new"].append(1.0)
        d["new"].append(2.0)

    _, new = jaxstate.mutate(g)(defaultdict(list, old=[0.0]))
    assert type(new) is defaultdict and as_floats(new) == {"old": [0.0], "new": [1.0, 2.0]}
    _, new = jaxstate.mutate(lambda d: d.move_to_end("a"))(OrderedDict(a=1.0, b=2.0))
    assert list(new) == ["b", "a"]


def test_named_tuples_behave_like_named_tuples():
    def f(p):
        first, *_ = p
        p.c["k"] += first
        return p._replace(b=0.0), p._asdict(), len(p), p[0], Parts._fields, (*p,)

    found, new = jaxstate.mutate(f)(Parts(1.0, 2.0, {"k": 3.0}))
    assert found[0] == Parts(1.0, 0.0, {"k": 4.0}) and found[2:4] == (3, 1.0)
    assert new == Parts(1.0, 2.0, {"k": 4.0}) and type(found[0]) is type(new) is Parts


def test_tuples_are_replaced_as_in_python():
    def f(tree):
        def body(i, _):
            tree["p"] = tree["p"]._replace(a=tree["p"].a + i)
            tree["t"] = (*tree["t"][1:], tree["t"][0])

        jax.lax.fori_loop(0, 4, body, None)

    tree = {"p": Parts(f32(1), f32(2), None), "t": (f32(1), f32(2), f32(3))}
    for run in (jaxstate.mutate(f), jax.jit(jaxstate.mutate(f)), jaxstate.mutate(jax.jit(f))):
        wanted = {"p": Parts(f32(7), f32(2), None), "t": (f32(2), f32(3), f32(1))}
        assert_close(run(tree)[1], wanted)
    with pytest.raises(AttributeError, match=r"can't set attribute") as error:
        jaxstate.mutate(lambda tree: setattr(tree["p"], "a", 1.0))(tree)
    assert "_replace" in error.value.__notes__[0]
    with pytest.raises(TypeError, match=r"does not support item assignment") as error:
        jaxstate.mutate(set_first)(tree)
    assert "use a list" in error.value.__notes__[0]


def set_first(tree):
    tree["t"][0] = 1.0
