"""Classes with opinions, used as programs use them: what they do under `mutate` is what they do in
plain Python, where a loop is a loop and a jitted function the function."""

import collections
import contextlib
import copy
import enum
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstate import mutate

f32 = jnp.float32


def loop(n, step):
    jax.lax.fori_loop(0, n, lambda i, _: (step(), None)[1], None)


def jitted(step):
    jax.jit(lambda: (step(), None)[1])()


class Thermometer:
    def __init__(self, celsius):
        self._celsius, self.sets = celsius, f32(0)

    @property
    def fahrenheit(self):
        return self._celsius * 2 + 30

    @fahrenheit.setter
    def fahrenheit(self, value):
        self._celsius, self.sets = (value - 30) / 2, self.sets + 1


def heats(t):
    loop(3, lambda: setattr(t, "fahrenheit", t.fahrenheit + 4))
    return t.fahrenheit


class Clipped:
    """A descriptor."""

    def __set_name__(self, owner, name):
        self.name = "_" + name

    def __get__(self, x, owner):
        return x.__dict__[self.name]

    def __set__(self, x, value):
        x.__dict__[self.name] = jnp.clip(value, 0, 1)


class Colour:
    red, blue = Clipped(), Clipped()

    def __init__(self):
        self.red, self.blue = f32(0.5), f32(0.25)


def brightens(t):
    loop(3, lambda: setattr(t, "red", t.red + 0.25))
    jitted(lambda: setattr(t, "blue", t.red - t.blue))


class Slotted:
    __slots__ = ("__hidden", "a")

    def __init__(self, a):
        self.a, self.__hidden = a, a * 2

    def bump(self):
        self.__hidden = self.__hidden + self.a
        return self.__hidden


class Child(Slotted):
    def __init__(self, a):
        super().__init__(a)
        self.c = a + 1


def bumps(t):
    loop(2, t.bump)
    t.a = t.c
    jitted(t.bump)
    return t.bump()


class Node:
    """Knows its parent, which knows it."""

    def __init__(self, value, parent=None):
        self.value, self.parent, self.children = value, parent, []

    def add(self, value):
        self.children.append(Node(value, self))
        return self.children[-1]

    def total(self):
        return self.value + sum(child.total() for child in self.children)


def tree_of_nodes():
    root = Node(f32(1))
    root.add(f32(2)).add(f32(3))
    return root


def climbs(t):
    leaf = t.children[0].children[0]
    loop(2, lambda: setattr(leaf.parent.parent, "value", t.total()))
    child = jax.jit(lambda: t.add(f32(7)))()
    return float(child.parent is t), t.total()


class Proxy:
    def __init__(self, target):
        object.__setattr__(self, "_target", target)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_target"), name)

    def __setattr__(self, name, value):
        setattr(object.__getattribute__(self, "_target"), name, value)


def delegates(t):
    loop(3, lambda: setattr(t, "value", t.value * 2))
    t.more = t.value
    return t.more


class Subject:
    def __init__(self):
        self.value, self.total, self.listeners = f32(0), f32(0), []
        self.listeners.append(self.hear)

    def hear(self, value):
        self.total = self.total + value

    def set(self, value):
        self.value = value
        for listener in self.listeners:
            listener(value)


def is_observed(t):
    t.set(f32(2))
    loop(3, lambda: t.set(t.value + 1))
    jitted(lambda: t.set(f32(1)))
    return t.total


class Recent(collections.OrderedDict):
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > 2:
            self.popitem(last=False)


def forgets(t):
    t["a"] = t["a"] + 1
    jitted(lambda: t.__setitem__("c", t["b"]))
    loop(2, lambda: dict.__setitem__(t, "c", t["c"] + 1))
    return float(list(t) == ["a", "c"])


class Depth:
    def __init__(self):
        self.depth, self.log = f32(0), []

    @contextlib.contextmanager
    def enter(self, by):
        before, self.depth = self.depth, self.depth + by
        try:
            yield self
        finally:
            self.log.append(self.depth)
            self.depth = before


def enters(t):
    with t.enter(2.0) as same:
        jitted(lambda: setattr(same, "depth", same.depth * 3))
        with contextlib.suppress(KeyError), same.enter(1.0):
            raise KeyError
    return t.depth


class Made(type):
    def __call__(cls, *args):
        made = super().__call__(*args)
        made.twice = 2 * made.x
        return made


class ByMetaclass(metaclass=Made):
    def __init__(self, x):
        self.x = x

    def __copy__(self):
        return ByMetaclass(self.x * 10)


def makes(t):
    t.other = copy.copy(t)
    jitted(lambda: setattr(t.other, "x", t.other.twice + 1))
    return t.other.x


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


def switches(t):
    def step():
        t.x = t.x + (1 if t.mode is Mode.SLOW else 10)

    jitted(step)
    t.mode = Mode.FAST
    jitted(step)
    loop(2, functools.partial(step))


PROGRAMS = {
    heats: lambda: Thermometer(f32(10)),
    brightens: Colour,
    bumps: lambda: Child(f32(1)),
    climbs: tree_of_nodes,
    delegates: lambda: Proxy(Node(f32(1))),
    is_observed: Subject,
    forgets: lambda: Recent(a=f32(1), b=f32(2)),
    enters: Depth,
    makes: lambda: ByMetaclass(f32(3)),
    switches: lambda: types.SimpleNamespace(x=f32(0), mode=Mode.SLOW),
}


def contents(x, seen=()):
    """What an object is made of, as nested lists of names and numbers."""
    if isinstance(x, (jax.Array, np.ndarray, int, float)):
        return np.asarray(x).tolist()
    if any(x is y for y in seen):
        return "above"
    if isinstance(x, types.MethodType):
        return [x.__name__, contents(x.__self__, seen)]
    if isinstance(x, dict):
        return [[key, contents(value, (*seen, x))] for key, value in x.items()]
    if isinstance(x, (list, tuple)):
        return [contents(part, (*seen, x)) for part in x]
    if x is None or isinstance(x, enum.Enum):
        return x
    names = [*getattr(type(x), "__slots__", ()), *Slotted.__slots__, "_Slotted__hidden"]
    parts = {n: getattr(x, n) for n in names if isinstance(x, Slotted) and hasattr(x, n)}
    return [type(x), contents({**parts, **object.__getattribute__(x, "__dict__")}, (*seen, x))]


def inside(transform):
    def run(program):
        def f(t):
            found = []
            transform(lambda: found.append(program(t)))
            return None

        return mutate(f)

    return run


RUNS = {
    "mutate": mutate,
    "jit inside": inside(lambda f: jax.jit(lambda: (f(), None)[1])()),
    "grad inside": inside(lambda f: jax.grad(lambda x: (f(), x)[1])(1.0)),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
@pytest.mark.leaks_allowed("a result of a function is looked at when that has ended")
def test_classes_with_opinions(program, run):
    make = PROGRAMS[program]
    plain, given = make(), make()
    with jax.disable_jit():
        out = contents(program(plain))
    before = contents(given)
    found, new = RUNS[run](program)(given)
    if run == "mutate":
        assert contents(found) == out
    assert contents(new) == contents(plain)
    assert contents(given) == before
