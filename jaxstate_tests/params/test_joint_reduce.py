"""``reduce`` of a value that is several numbers: a tree of functions, or the value's own merge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxstate

KEY = jax.random.key(0)
X = jnp.array([[0.3, -0.7], [1.1, 0.2], [-0.4, 2.0]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metric:
    """A total, a maximum, and texts of digits that are put one behind the other."""

    total: jax.Array
    most: jax.Array
    digits: jax.Array
    length: jax.Array

    @classmethod
    def of(cls, x):
        return cls(x.sum(), x.max(), jnp.round(abs(x[0]) * 10) % 10, jnp.float32(10))

    def merge(self, other):
        """Associative, and no part of it can do without the others."""
        return Metric(
            self.total + other.total,
            jnp.maximum(self.most, other.most),
            self.digits * other.length + other.digits,
            self.length * other.length,
        )


def concatenated(values, axis):
    assert axis == 0
    digits = 0.0
    for digit in values:
        digits = digits * 10 + digit
    return digits


TREE = Metric(jnp.sum, jnp.max, concatenated, jnp.prod)


def net_of(reduce, wrap):
    @jaxstate.parametrized
    def measure(x):
        seen = jaxstate.variable("seen", lambda: Metric.of(jnp.zeros(2)), reduce=reduce)
        seen.value = Metric.of(x)
        return seen.value.total * x

    return jaxstate.parametrized(lambda x: wrap(measure)(x), name="net")


def by_hand(x):
    """The metric of all rows."""
    digits = np.round(abs(np.asarray(x)[:, 0]) * 10) % 10
    number = int("".join(str(int(d)) for d in digits))
    return Metric(x.sum(), x.max(), jnp.float32(number), jnp.float32(10.0 ** len(x)))


def scan_of(f):
    return lambda x: lax.scan(lambda c, _: (c, f(x)), 0, length=2)[1][-1]


def nested(f):
    return lambda x: jax.vmap(jax.vmap(f))(x[None])[0]


def with_jvp(f):
    g = jax.custom_jvp(lambda x: f(x))
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def with_vjp(f):
    g = jax.custom_vjp(lambda x: f(x))
    g.defvjp(lambda x: jax.vjp(f, x), lambda pullback, ct: pullback(ct))
    return g


LANES = {
    "vmap": jax.vmap,
    "vmap of jit": lambda f: jax.vmap(jax.jit(f)),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of checkpoint": lambda f: jax.vmap(jax.checkpoint(f)),
    "vmap of scan": lambda f: jax.vmap(scan_of(f)),
    "scan of vmap": lambda f: scan_of(jax.vmap(f)),
    "vmap of cond": lambda f: jax.vmap(lambda x: lax.cond(x.shape[0] == 2, f, lambda x: x, x)),
    "vmap of vmap": nested,
    "vmap of custom_jvp": lambda f: jax.vmap(with_jvp(f)),
    "vmap of custom_vjp": lambda f: jax.vmap(with_vjp(f)),
    "custom_vjp of vmap": lambda f: with_vjp(jax.vmap(f)),
    "other axis": lambda f: lambda x: jax.vmap(f, 1, 1)(x.T).T,
}


QUICK = {"vmap", "vmap of jit", "vmap of scan", "vmap of vmap", "vmap of custom_vjp"}


@pytest.mark.parametrize("reduce", ["merge", TREE], ids=["merge", "tree"])
@pytest.mark.parametrize(
    "lanes",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LANES],
)
def test_lanes_become_one_value(lanes, reduce):
    net = net_of(reduce, LANES[lanes])
    params, state = net.init_with_state(KEY, X)
    wanted = {"measure": {"seen": by_hand(X)}}
    for apply in (net.apply_with_state, jax.jit(net.apply_with_state)):
        y, after = apply(params, state, X)
        np.testing.assert_allclose(y, X * X.sum(1, keepdims=True), rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, wanted)


@pytest.mark.parametrize("lanes", [name for name in LANES if name != "vmap of scan"])
def test_a_part_that_all_lanes_write_alike_is_made_of_all_lanes_too(lanes):
    """As of a count of elements beside their sum."""

    @jaxstate.parametrized
    def measure(x):
        seen = jaxstate.variable(
            "seen", lambda: {"sum": jnp.float32(0), "n": jnp.int32(0)}, reduce=jnp.sum
        )
        seen.value = {"sum": x.sum(), "n": jnp.int32(1)}
        return x

    net = jaxstate.parametrized(lambda x: LANES[lanes](measure)(x), name="net")
    _, state = net.init_with_state(KEY, X)
    found = jax.jit(net.apply_with_state)({}, state, X)[1]["measure"]["seen"]
    np.testing.assert_allclose(found["sum"], X.sum(), rtol=1e-6)
    assert found["n"] == len(X)


@pytest.mark.parametrize("reduce", ["merge", TREE], ids=["merge", "tree"])
def test_gradients_go_through_the_merge_as_by_hand(reduce):
    net = net_of(reduce, jax.vmap)
    params, state = net.init_with_state(KEY, X)

    def loss(x):
        seen = net.apply_with_state(params, state, x)[1]["measure"]["seen"]
        return seen.total * seen.most

    by_hand = jax.grad(lambda x: x.sum() * x.max())(X)
    np.testing.assert_allclose(jax.grad(loss)(X), by_hand, rtol=1e-6)


def jit_of_vmap(f):
    return jax.jit(jax.vmap(f))


def vmap_of_jit(f):
    return jax.vmap(jax.jit(f))


def vmap_of_checkpoint(f):
    return jax.vmap(jax.checkpoint(f))


INSIDE = [jit_of_vmap, vmap_of_jit, vmap_of_checkpoint]


@pytest.mark.parametrize("reduce", ["merge", TREE], ids=["merge", "tree"])
@pytest.mark.parametrize("inside", [jax.vmap, *INSIDE], ids=["vmap", *(f.__name__ for f in INSIDE)])
def test_devices_become_one_value(reduce, inside):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    def wrap(f):
        return jax.shard_map(inside(f), mesh=mesh, in_specs=spec, out_specs=spec)

    net = net_of(reduce, wrap)
    params, state = net_of(reduce, jax.vmap).init_with_state(KEY, X)
    for apply in (net.apply_with_state, jax.jit(net.apply_with_state)):
        _, after = apply(params, state, X)
        wanted = {"measure": {"seen": by_hand(X)}}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, wanted)


def test_a_part_without_a_function_is_refused_where_lanes_differ():
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", lambda: {"a": 0.0, "b": 0.0}, reduce={"a": jnp.sum, "b": None})
        v.value = {"a": x, "b": 1.0}
        return x

    params, state = net.init_with_state(KEY, 1.0)
    outer = jaxstate.parametrized(lambda x: jax.vmap(net)(x), name="outer")
    _, state = outer.apply_with_state(params, {"net": state}, X[0])
    assert float(state["net"]["v"]["a"]) == pytest.approx(float(X[0].sum()))
    assert float(state["net"]["v"]["b"]) == 1


@pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")
def test_bad_reductions_are_named_errors():
    for wrong in (3, "mean", (jnp.sum,), {"a": jnp.sum}, dataclasses.replace(TREE, most=3)):
        with pytest.raises(TypeError, match=r"a tree with one for each part .* reduce is"):
            net_of(wrong, jax.vmap).init_with_state(KEY, X)
    with pytest.raises(TypeError, match='"merge" if the value has that method'):
        jaxstate.parametrized(
            lambda: jaxstate.variable("v", jnp.zeros, (), reduce="merge").value
        ).init(KEY)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Wrong:
    """A value whose merge makes something else."""

    x: jax.Array
    y: jax.Array
    how: str = dataclasses.field(metadata={"static": True})

    def merge(self, other):
        return {
            "no value": None,
            "an array": self.x + other.x,
            "a dict": {"x": self.x + other.x, "y": self.y},
            "shape": dataclasses.replace(self, x=jnp.stack([self.x, other.x])),
            "dtype": dataclasses.replace(self, y=self.y + 0.5),
            "static part": dataclasses.replace(self, how="static part "),
        }[self.how]


@pytest.mark.leaks_allowed("the checker reports tracers in the error's traceback")
@pytest.mark.parametrize("lanes", [2, 3, 5, 8])
@pytest.mark.parametrize("how", ["no value", "an array", "a dict", "shape", "dtype", "static part"])
def test_a_merge_that_makes_something_else_is_named(how, lanes):
    """However many lanes there are; a single one is not merged."""

    @jaxstate.parametrized
    def one(x):
        start = Wrong(jnp.float32(0), jnp.int32(0), how)
        wrong = jaxstate.variable("wrong", lambda: start, reduce="merge")
        wrong.value = Wrong(x, jnp.int32(1), how)
        return x

    net = jaxstate.parametrized(lambda x: jax.vmap(one)(x), name="net")
    with pytest.raises(jaxstate.SlotTypeError, match=r"'wrong' is Wrong\(.*its merge makes") as e:
        net.init_with_state(KEY, jnp.arange(float(lanes)))
    assert "def merge(self, other):" in str(e.value)
    _, state = net.init_with_state(KEY, jnp.ones(1))
    assert net.apply_with_state({}, state, jnp.full(1, 7.0))[1]["one"]["wrong"].x == 7.0
