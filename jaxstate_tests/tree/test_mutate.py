"""`mutate`: functions that assign to the parts of an object, made pure.

The reference is the same program with every part passed and returned by hand.
"""

import copy
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import new_slot, read, write
from jaxstate_tests.tree.examples import (
    BODIES,
    KINDS,
    Data,
    assert_close,
    by_hand,
    example,
    f32,
    parts,
    program,
)

leaks_allowed = pytest.mark.leaks_allowed(
    "the checker reports tracers in the traceback of the expected error"
)


# -- All kinds of objects --------------------------------------------------------------------


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
