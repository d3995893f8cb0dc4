"""Objects of all kinds, a program for them and the same by hand, and bodies that assign to one."""

import dataclasses
from collections import OrderedDict, defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

f32 = jnp.float32


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
