"""Objects that keep their parts in C: arrays of Python, and attributes of a thread.

The reference for a `threading.local` is a plain object with the same attributes.
"""

import array
import random
import threading
from types import SimpleNamespace

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


class Local(threading.local):
    def __init__(self, x=0.0, *, y=1.0):
        self.x, self.y = f32(x), f32(y)


class Slotted(threading.local):
    __slots__ = ("y",)


class Empty(threading.local):
    pass


EMPTY = Empty()


def plain(cls):
    made = cls()
    made.x, made.y = f32(1), f32(2)
    return made


def step(o):
    o.x = o.x + o.y


TRANSFORMS = {
    "eager": lambda f: f(),
    "jit": lambda f: jax.jit(f)(),
    "jit twice": lambda f: [g() for g in [jax.jit(f)] * 2] and None,
    "scan": lambda f: jax.lax.scan(lambda c, _: (c, f()), 0.0, length=3) and None,
    "fori_loop": lambda f: jax.lax.fori_loop(0, 3, lambda i, _: f(), None),
    "cond": lambda f: jax.lax.cond(f32(1) > 0, f, lambda: None),
    "grad": lambda f: jax.grad(lambda w: (f(), w)[1])(1.0) and None,
    "vmap": lambda f: jax.vmap(lambda w: (f(), w)[1])(jnp.ones(2)).sum() and None,
    "checkpoint": lambda f: jax.checkpoint(f)(),
}


@pytest.mark.parametrize("cls", [threading.local, Local, Slotted])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_attributes_of_a_thread_are_parts(cls, transform):
    def f(t):
        TRANSFORMS[transform](lambda: step(t["o"]))
        return t["o"].x

    given, like = plain(cls), plain(SimpleNamespace)
    out, new = mutate(f)({"o": given, "again": given})
    wanted, other = mutate(f)({"o": like})
    assert type(new["o"]) is cls and new["o"] is new["again"] is not given
    assert (out, new["o"].x, new["o"].y) == (wanted, other["o"].x, 2) and wanted > 1
    assert (given.x, given.y) == (1, 2)


@leaks_allowed
def test_values_of_traces_in_attributes_of_a_thread():
    def write(t, x):
        t.x = x

    def f(t):
        return jax.grad(lambda w: (write(t, w), t.x * w)[1])(3.0)

    out, new = mutate(f)(plain(Local))
    assert (out, new.x) == (6, 3)
    with pytest.raises(jaxstate.LaneWriteError, match=r"tree\.x"):
        mutate(lambda t: jax.vmap(lambda w: (write(t, w), w)[1])(jnp.arange(2.0)))(plain(Local))
    with pytest.raises(jaxstate.StructureChangeError, match=r"tree\.n"):
        mutate(lambda t: jax.lax.fori_loop(0, 2, lambda i, _: setattr(t, "n", i), None))(
            plain(Local)
        )


def test_attributes_of_other_threads_stay_theirs():
    _, new = mutate(step)(Local(1.0, y=5.0))
    assert new.x == 6
    seen = []
    thread = threading.Thread(target=lambda: seen.append((new.x, new.y)))
    thread.start()
    thread.join()
    assert seen == [(1, 5)]  # what the constructor makes there


def test_an_empty_one_with_a_name_is_copied():
    _, new = mutate(lambda t: setattr(t["o"], "x", f32(1)))({"o": EMPTY})
    assert new["o"].x == 1 and not vars(EMPTY)


def test_one_that_is_replaced_in_a_loop():
    def f(t):
        jax.lax.fori_loop(0, 3, lambda i, _: t.update(o=Local(t["o"].x + 1)), None)

    _, new = mutate(f)({"o": Local(1.0)})
    assert new["o"].x == 4


# -- Arrays of Python ------------------------------------------------------------------------


def add(t, by=1.0):
    t["a"][0] += by
    return t["a"][0]


@pytest.mark.parametrize("transform", ["eager", "jit", "grad", "vmap", "checkpoint"])
def test_numbers_of_an_array_are_written_in_the_new_tree(transform):
    given = array.array("d", [1, 2])
    _, new = mutate(lambda t: TRANSFORMS[transform](lambda: add(t) and None))({"a": given})
    assert new["a"] == array.array("d", [2, 2]) and given == array.array("d", [1, 2])


@leaks_allowed
@pytest.mark.parametrize("transform", ["scan", "fori_loop", "cond"])
def test_no_numbers_of_an_array_are_written_in_a_loop(transform):
    with pytest.raises(jaxstate.StructureChangeError, match=r"tree\['a'\]"):
        mutate(lambda t: TRANSFORMS[transform](lambda: add(t) and None))(
            {"a": array.array("d", [1, 2])}
        )


@leaks_allowed
def test_a_traced_value_is_no_number_of_an_array():
    tree = {"a": array.array("d", [1, 2]), "x": f32(1)}
    with pytest.raises(jax.errors.ConcretizationTypeError):
        mutate(lambda t: jax.jit(lambda: add(t, t["x"]))())(tree)
    assert tree["a"][0] == 1


WRITES = {
    "array": (lambda: array.array("d", [1, 2]), lambda x: x.__setitem__(0, 5.0)),
    "bytearray": (lambda: bytearray(b"ab"), lambda x: x.append(3)),
    "random": (lambda: random.Random(0), lambda x: x.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda x: x.random()),
}


@leaks_allowed
@pytest.mark.parametrize("kind", WRITES)
def test_what_is_in_c_is_no_part_of_one_level(kind):
    make, write = WRITES[kind]
    tree = {"kept": make(), "x": f32(1)}
    mutate(lambda t: t.update(x=t["x"] + 1), deep=False)(tree)
    with pytest.raises(jaxstate.FrozenPartError, match=r"tree\['kept'\]"):
        mutate(lambda t: write(t["kept"]) and None, deep=False)(tree)


@pytest.mark.parametrize("typecode", "dw" if "w" in array.typecodes else "d")
def test_an_array_that_is_seen_through_a_view_of_numpy(typecode):
    def f(t):
        view = np.frombuffer(t["a"], np.uint8)
        draw = jax.jit(lambda: view.__setitem__(0, view[0] + 1))
        draw()
        draw()
        return view[0]

    given = array.array(typecode, "ab" if typecode == "w" else [0, 0])
    first = np.frombuffer(given, np.uint8)[0]
    out, new = mutate(f)({"a": given})
    assert out == first + 2 == np.frombuffer(new["a"], np.uint8)[0]
    assert np.frombuffer(given, np.uint8)[0] == first
