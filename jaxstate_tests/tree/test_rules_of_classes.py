"""`mutate`: what classes, lists, dicts and tuples do and ensure holds for the objects of the tree.

The reference is Python, and what a class does outside of `mutate`.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.tree.examples import Data, Parts, assert_close, example, f32

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
