"""Random programs that assign to the parts of random objects, in transformations of all kinds.

A program is data. `Run` runs it in one of two ways: `Real` calls JAX's transformations, and `Plain`
is Python, in which a loop is a loop, a branch an ``if``, and a jitted function the function. On
plain objects the second one is the reference.
"""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

# -- Classes with opinions -------------------------------------------------------------------


def register(cls):
    jax.tree_util.register_pytree_node(
        cls,
        lambda d: (tuple(d.values()), tuple(d)),
        lambda keys, parts: cls(zip(keys, parts, strict=True)),
    )
    return cls


@register
class AttrDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value


@register
class Normalizing(dict):
    """Keeps arrays between -1 and 1."""

    def __setitem__(self, key, value):
        super().__setitem__(key, jnp.clip(value, -1, 1) if isinstance(value, jax.Array) else value)

    def update(self, *args, **kwargs):
        for key, value in dict(*args, **kwargs).items():
            self[key] = value


class Pushed(list):
    """A list with a method of its own."""

    def replace(self, i, value):
        super().__setitem__(i, value)


jax.tree_util.register_pytree_node(Pushed, lambda v: (list(v), None), lambda _, c: Pushed(c))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    a: Any
    b: Any
    name: str = dataclasses.field(default="data", metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any


@jax.tree_util.register_pytree_node_class
class Slots:
    """Keeps its parts in slots, one of them behind a property."""

    __slots__ = ("__b", "a")

    def __init__(self, a, b):
        self.a, self.__b = a, b

    b = property(lambda self: self.__b, lambda self, b: setattr(self, "_Slots__b", b))

    def tree_flatten(self):
        return (self.a, self.__b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_with_keys_class
class Counting:
    """Has a field of its own that follows from what is assigned."""

    def __init__(self, a, b):
        self.__dict__.update(a=a, b=b, changes=jnp.float32(0))

    def __setattr__(self, name, value):
        self.__dict__[name] = value
        self.__dict__["changes"] = self.changes + 1.0

    def tree_flatten_with_keys(self):
        return tuple((jax.tree_util.GetAttrKey(n), v) for n, v in vars(self).items()), tuple(
            vars(self)
        )

    @classmethod
    def tree_unflatten(cls, names, children):
        new = object.__new__(cls)
        vars(new).update(zip(names, children, strict=True))
        return new


@jax.tree_util.register_pytree_node_class
class Doubling:
    """Computes its children."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def tree_flatten(self):
        a = jax.tree.map(lambda x: 2 * x if isinstance(x, jax.Array) else x, self.a)
        return (a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        a, b = children
        return cls(jax.tree.map(lambda x: x / 2 if isinstance(x, jax.Array) else x, a), b)


class Unknown:
    """A class that JAX does not know."""

    def __init__(self, a, b):
        self.a, self.b, self.calls = a, b, "none"


class Kind(NamedTuple):
    """How a program makes an object of two parts, gets one, and sets one."""

    make: Any
    get: Any = getattr
    set: Any = setattr
    is_known: bool = True  # to JAX


def at(x, name):
    return x["ab".index(name)]


def put_at(x, name, value):
    x["ab".index(name)] = value


def put_item(x, name, value):
    x[name] = value


def of_items(cls):
    return lambda a, b: cls({"a": a, "b": b}.items())


KINDS = {
    "dict": Kind(of_items(dict), lambda x, n: x[n], put_item),
    "OrderedDict": Kind(of_items(collections.OrderedDict), lambda x, n: x[n], put_item),
    "defaultdict": Kind(
        lambda a, b: collections.defaultdict(list, a=a, b=b), lambda x, n: x[n], put_item
    ),
    "list": Kind(lambda a, b: [a, b], at, put_at),
    "deque": Kind(lambda a, b: collections.deque([a, b], maxlen=2), at, put_at, is_known=False),
    "AttrDict": Kind(of_items(AttrDict)),
    "Normalizing": Kind(of_items(Normalizing), lambda x, n: x[n], put_item),
    "Pushed": Kind(lambda a, b: Pushed([a, b]), at, lambda x, n, v: x.replace("ab".index(n), v)),
    "Data": Kind(Data),
    "Frozen": Kind(Frozen),
    "Slots": Kind(Slots),
    "Counting": Kind(Counting),
    "Doubling": Kind(Doubling),
    "Unknown": Kind(Unknown, is_known=False),
    "SimpleNamespace": Kind(lambda a, b: types.SimpleNamespace(a=a, b=b), is_known=False),
}

try:
    import attrs

    @attrs.frozen
    class Attrs:
        a: Any
        b: Any

    jax.tree_util.register_pytree_node(
        Attrs, lambda o: ((o.a, o.b), None), lambda _, parts: Attrs(*parts)
    )
    KINDS["attrs"] = Kind(Attrs)
except ImportError:
    pass
try:
    import chex

    @chex.dataclass
    class Chex:
        a: Any
        b: Any

    KINDS["chex"] = Kind(lambda a, b: Chex(a=a, b=b))
except ImportError:
    pass
try:
    from flax import nnx, struct

    @struct.dataclass
    class Flax:
        a: Any
        b: Any
        name: str = struct.field(pytree_node=False, default="flax")

    KINDS["flax.struct"] = Kind(Flax)

    class Module(nnx.Module):
        def __init__(self, a, b):
            wrap = lambda x: nnx.Param(x) if isinstance(x, jax.Array) else nnx.data(x)  # noqa: E731
            self.a, self.b = wrap(a), wrap(b)

    def of_module(module, name):
        x = getattr(module, name)
        return x[...] if isinstance(x, nnx.Param) else x

    def put_into_module(module, name, value):
        x = getattr(module, name)
        if isinstance(x, nnx.Param):
            x[...] = value
        else:
            setattr(module, name, value)

    KINDS["nnx"] = Kind(Module, of_module, put_into_module)
except ImportError:
    pass
try:
    import equinox as eqx

    class Equinox(eqx.Module):
        a: Any
        b: Any

    KINDS["equinox"] = Kind(Equinox)
except ImportError:
    eqx = None
try:
    from penzai import pz

    @pz.pytree_dataclass
    class Penzai(pz.Struct):
        a: Any
        b: Any

    KINDS["penzai"] = Kind(Penzai)
except ImportError:
    pass
try:
    import optax
except ImportError:
    optax = None


# -- Programs --------------------------------------------------------------------------------

# An object is (kind, part, part), and None for an array. A statement is a tuple whose first item
# says what it does; places are numbers, taken modulo how many there are.
objects = st.recursive(
    st.none(), lambda part: st.tuples(st.sampled_from(sorted(KINDS)), part, part), max_leaves=4
).filter(bool)
numbers = st.integers(0, 11)
growing = st.one_of(
    st.tuples(st.just("append"), numbers),
    st.tuples(st.just("key"), numbers, st.sampled_from("pqr")),
    st.tuples(st.just("pop"), numbers),
)
simple = st.one_of(
    st.tuples(st.just("assign"), numbers, numbers, numbers),
    st.tuples(st.just("swap"), numbers, numbers),
    st.tuples(st.just("map"), numbers),
    st.tuples(st.just("penalty"), numbers),
    st.tuples(st.just("paths"), numbers),
    st.tuples(st.just("descend"), numbers),
    st.tuples(st.just("tree_at"), numbers),
    st.tuples(st.just("optimize"), numbers),
    st.tuples(st.just("copy"), numbers, numbers),
)
ONCE = ("jit", "jit of the tree", "checkpoint", "grad", "jvp", "vmap")
OFTEN = ("fori_loop", "scan", "carry", "while_loop")


def blocks(depth, can_grow):
    statement = st.one_of(simple, simple, growing) if can_grow else simple
    if depth:
        inner = [
            st.tuples(st.sampled_from(ONCE), blocks(depth - 1, can_grow)),
            st.tuples(st.sampled_from(OFTEN), blocks(depth - 1, False), st.integers(0, 3)),
            st.tuples(st.just("cond"), blocks(depth - 1, False), blocks(depth - 1, False), numbers),
        ]
        statement = st.one_of(statement, *inner)
    return st.lists(statement, min_size=1, max_size=3)


programs = st.tuples(objects, blocks(2, True), st.sampled_from([0.7, -0.4]))


def built(spec, number=None):
    """The object that ``spec`` says, with an own value in every array."""
    number = [0.1] if number is None else number
    if spec is None:
        number[0] = -1.3 * number[0] if abs(number[0]) < 0.8 else 0.2
        return jnp.float32(number[0])
    kind, a, b = spec
    return KINDS[kind].make(built(a, number), built(b, number))


def places(spec, path=()):
    """Where the objects and the arrays are."""
    if spec is None:
        return [], [path]
    a, b = (places(part, (*path, name)) for part, name in zip(spec[1:], "ab", strict=True))
    return [path, *a[0], *b[0]], [*a[1], *b[1]]


def part_of(spec, path):
    for name in path:
        spec = spec[1 + "ab".index(name)]
    return spec


def all_known(spec):
    return spec is None or (KINDS[spec[0]].is_known and all(map(all_known, spec[1:])))


class Plain:
    """Python."""

    def set(self, spec, x, name, value):
        try:
            KINDS[spec[0]].set(x, name, value)
        except AttributeError:  # a frozen class
            object.__setattr__(x, name, value)

    def once(self, _, body, root, x):
        return body(root, x)

    def often(self, _, body, root, x, n):
        for _ in range(n):
            x = body(root, x)
        return x

    def cond(self, p, one, other, root, x):
        return (one if p else other)(root, x)


class Real:
    """JAX."""

    def set(self, spec, x, name, value):
        KINDS[spec[0]].set(x, name, value)

    def once(self, how, body, root, x):
        def f(x):
            return body(root, x)

        if how == "jit":
            return jax.jit(f)(x)
        if how == "jit of the tree":
            return jax.jit(body)(root, x)
        if how == "checkpoint":
            return jax.checkpoint(f)(x)
        if how == "grad":
            return jax.value_and_grad(f)(x)[0]
        if how == "jvp":
            return jax.jvp(f, (x,), (x,))[0]
        return jax.vmap(lambda _: f(x), out_axes=None)(jnp.arange(2))

    def often(self, how, body, root, x, n):
        if how == "fori_loop":
            return jax.lax.fori_loop(0, n, lambda _, x: body(root, x), x)
        if how == "scan":
            return jax.lax.scan(lambda x, _: (body(root, x), None), x, None, length=n)[0]
        if how == "carry":
            return jax.lax.fori_loop(0, n, lambda _, c: (c[0], body(*c)), (root, x))[1]
        return jax.lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, body(root, c[1])), (0, x)
        )[1]

    def cond(self, p, one, other, root, x):
        return jax.lax.cond(p, lambda x: one(root, x), lambda x: other(root, x), x)


class Run:
    """One run of a program."""

    def __init__(self, way, spec):
        self.way = way
        self.spec = spec
        self.objects, self.arrays = places(spec)
        self.known = [p for p in self.objects if all_known(part_of(spec, p))]

    def block(self, statements):
        def body(root, x):
            for statement in statements:
                x = getattr(self, statement[0].replace(" ", "_"))(root, x, *statement[1:])
            return jnp.tanh(x)

        return body

    def get(self, root, path):
        spec, x = self.spec, root["t"]
        for name in path:
            x, spec = KINDS[spec[0]].get(x, name), part_of(spec, name)
        return x

    def put(self, root, path, value):
        if not path:
            root["t"] = value
            return
        *before, name = path
        self.way.set(part_of(self.spec, before), self.get(root, before), name, value)

    def array(self, i):
        return self.arrays[i % len(self.arrays)]

    # Statements.

    def assign(self, root, x, i, j, k):
        path = self.array(i)
        y = self.get(root, path) * (0.3 + 0.1 * k) + self.get(root, self.array(j)) * 0.5 + x
        self.put(root, path, jnp.tanh(y))
        return x + 0.1 * self.get(root, path)

    def swap(self, root, x, i, j):
        i, j = self.array(i), self.array(j)
        a, b = self.get(root, i), self.get(root, j)
        self.put(root, i, b)
        self.put(root, j, a)
        return x

    def map(self, root, x, i):
        """A part becomes another object."""
        if self.known:
            path = self.known[i % len(self.known)]
            self.put(root, path, jax.tree.map(lambda y: 0.8 * y, self.get(root, path)))
        return x

    def penalty(self, root, x, i):
        """JAX's functions are asked about the objects."""
        if not self.known:
            return x
        path = self.known[i % len(self.known)]
        cls = type(self.get(root, path))
        found = jax.tree.leaves(root["t"], is_leaf=lambda y: type(y) is cls)
        return x + 0.01 * sum(type(y) is cls for y in found)

    def paths(self, root, x, i):
        """A rule by name."""
        if self.known:
            tree = self.get(root, self.known[i % len(self.known)])
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                if isinstance(leaf, jax.Array):
                    x = x + leaf * (0.1 if "a" in jax.tree_util.keystr(path) else 0.2)
        return x

    def descend(self, root, x, i):
        """What an optimizer does."""
        if self.known:
            path = self.known[i % len(self.known)]
            tree = self.get(root, path)
            updates = jax.tree.map(lambda y: -0.1 * y, tree)
            self.put(root, path, jax.tree.map(lambda y, u: y + u, tree, updates))
        return x

    def optimize(self, root, x, i):
        """Two steps of an optimizer with a state of its own."""
        if self.known and optax is not None:
            path = self.known[i % len(self.known)]
            optimizer = optax.chain(optax.trace(0.9), optax.scale(-0.1))
            state = optimizer.init(self.get(root, path))
            for _ in range(2):
                tree = self.get(root, path)
                updates, state = optimizer.update(tree, state)
                self.put(root, path, optax.apply_updates(tree, updates))
        return x

    def tree_at(self, root, x, i):
        """A new object instead of an assignment."""
        modules = [p for p in self.objects if part_of(self.spec, p)[0] == "equinox"]
        arrays = [p for p in modules if part_of(self.spec, p)[1] is None]
        if arrays:
            path = arrays[i % len(arrays)]
            new = eqx.tree_at(lambda m: m.a, self.get(root, path), replace_fn=lambda y: y + 0.1)
            self.put(root, path, new)
        return x

    def copy(self, root, x, i, j):
        """What is read before an assignment is what was there."""
        old = self.get(root, self.array(i))
        self.put(root, self.array(i), old * 0.5)
        self.put(root, self.array(j), old + 0.1)
        return x + 0.1 * old

    def append(self, root, x, i):
        root["log"].append(self.get(root, self.array(i)))
        return x

    def key(self, root, x, i, name):
        root["more"][name] = {"x": self.get(root, self.array(i)) + x}
        return x

    def pop(self, root, x, i):
        return x + root["log"].pop(i % len(root["log"])) if root["log"] else x

    # Blocks.

    def cond(self, root, x, one, other, i):
        p = self.get(root, self.array(i)) > 0
        return self.way.cond(p, self.block(one), self.block(other), root, x)


def _once(how):
    def statement(self, root, x, block):
        has_gradient = how != "grad" or "while_loop" not in str(block)
        return self.way.once(how if has_gradient else "jvp", self.block(block), root, x)

    return statement


def _often(how):
    least = how == "scan"  # JAX refuses to scan nothing if jit is disabled

    def statement(self, root, x, block, n):
        return self.way.often(how, self.block(block), root, x, max(n, least))

    return statement


for _how in ONCE:
    setattr(Run, _how.replace(" ", "_"), _once(_how))
for _how in OFTEN:
    setattr(Run, _how, _often(_how))


def tree_of(spec):
    return {"t": built(spec), "log": [jnp.float32(0.3)], "more": {}}


def contents(x):
    """An object as nested lists of its class, its names, and numbers."""
    if isinstance(x, (jax.Array, np.ndarray, np.generic, float, int)):
        return np.asarray(x)
    if isinstance(x, (list, tuple, collections.deque)):
        return [type(x), *map(contents, x)]
    if isinstance(x, dict):
        return [type(x), *((k, contents(v)) for k, v in sorted(x.items()))]
    if x is None or isinstance(x, str):
        return x
    if type(x).__module__.startswith("flax.nnx"):
        return contents(x[...])
    parts = {n: getattr(x, n) for n in ("a", "b", "changes") if hasattr(x, n)}
    return [type(x), *((k, contents(v)) for k, v in parts.items())]
