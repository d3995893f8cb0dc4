"""Every cell of the table "Lanes and devices" of docs/concepts.md, eagerly and jitted.

There are eight lanes, or devices. Each has a number x and uses some state: once, or in a branch
some of them take, or in a loop that ends when they like. The reference is a Python loop over the
lanes that folds keys and adds up values by hand.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.rules.eight_devices.common import KEY, MODES, X, close, eagerly, mapped, uniform

LANES = range(8)


def once(f, x):
    return f(x)


def branch(f, x):
    return jax.lax.cond(x > 3, f, lambda x: x * 1.0, x)


def loop(f, x):
    turns = lambda carry: carry[0] < x % 3  # noqa: E731
    return jax.lax.while_loop(turns, lambda carry: (carry[0] + 1, f(carry[1])), (0, x))[1]


TIMES = {once: np.ones(8), branch: 1.0 * (X > 3), loop: X % 3}


def on_devices(check_vma):
    return lambda f: mapped(lambda x: f(x[0])[None], check_vma=check_vma)


MAPS = {
    "vmap": jax.vmap,
    "shard_map": on_devices(True),
    "check_vma=False": on_devices(False),
    "pmap": jax.pmap,
}
COLUMNS = {
    "`vmap`": (["vmap"], once),
    "`cond` in `vmap`": (["vmap"], branch),
    "`while_loop` in `vmap`": (["vmap"], loop),
    "`shard_map`": (["shard_map", "check_vma=False", "pmap"], once),
    "`cond` in `shard_map`": (["shard_map", "check_vma=False", "pmap"], branch),
    "`while_loop` in `shard_map`": (["shard_map", "check_vma=False", "pmap"], loop),
}


class Cell:
    """One way to map, and how often each lane uses the state.

    Attributes:
      lanes: whether the map is a vmap, not one over devices.
      typed: whether types say what is the same on all devices.
      how: `once`, `branch` or `loop`.
      times: how often each lane uses the state.
    """

    def __init__(self, map_name, how):
        self.lanes = map_name == "vmap"
        self.typed = map_name == "shard_map"
        self.how = how
        self.times = TIMES[how]
        self._map = MAPS[map_name]

    def run(self, f, after=lambda x: x):
        """``f`` in all lanes as often as they want, and ``after`` once in each."""
        return lambda xs: self._map(lambda x: after(self.how(f, x)))(xs)

    @property
    def refusal(self):
        return jaxstate.LaneWriteError if self.lanes else jaxstate.DeviceWriteError


def refused(error, *calls):
    for call in calls:
        with pytest.raises(error), jax.checking_leaks.func(False):
            call()


def add_draw(x):
    return x + jaxstate.random.uniform()


def draw_from_a_split_stream(cell, mode):
    run = cell.run(add_draw, after=add_draw)
    # Every lane has a stream of its own, which has moved on as often as the lane has drawn.
    drawn = [sum(uniform(1, i, n) for n in range(int(cell.times[i]) + 1)) for i in LANES]
    with jaxstate.rng_stream(KEY) as stream:
        jaxstate.next_key()
        close(mode(run)(X), X + jnp.stack(drawn))
        close((stream.count, jaxstate.random.uniform()), (jnp.int32(2), uniform(2)))


def draw_from_a_shared_stream(cell, mode):
    run = cell.run(add_draw, after=add_draw)
    with jaxstate.rng_stream(KEY, vmap="share") as stream:
        jaxstate.next_key()
        if cell.lanes and cell.how is not once:
            refused(jaxstate.LaneWriteError, lambda: mode(run)(X))
            assert stream.count == 1
        elif cell.lanes:
            close(mode(run)(X), X + uniform(1) + uniform(2))
            assert stream.count == 3
        else:
            drawn = [sum(uniform(1, n) for n in range(int(cell.times[i]) + 1)) for i in LANES]
            close(mode(run)(X), X + jnp.stack(drawn))
            assert stream.count == 2


def network(cell, f):
    return jaxstate.parametrized(lambda xs: cell.run(f)(xs), name="network")


def times_parameter(x):
    return x * jaxstate.param("w", jax.nn.initializers.ones, ())


def read_a_parameter(cell, mode):
    net = network(cell, times_parameter)

    def by_hand(w):
        return X * w**cell.times

    def apply(w):
        return net.apply({"w": w}, X)

    w, t = jnp.float32(3), jnp.float32(1)
    close(mode(apply)(w), by_hand(w))
    close(mode(lambda w: jax.jvp(apply, (w,), (t,)))(w), jax.jvp(by_hand, (w,), (t,)))
    # Reverse mode through a while_loop does not exist. That of a branch which reads what types say
    # is the same on all devices has a sum over devices in it, and waits for those elsewhere.
    if cell.how is once or (cell.how is branch and not cell.typed):
        found = mode(jax.grad(lambda w: apply(w).sum()))(w)
        close(found, jax.grad(lambda w: by_hand(w).sum())(w))


def make_a_parameter(cell, mode):
    net = network(cell, times_parameter)
    close(mode(net.init)(KEY, X), {"w": jnp.float32(1)})


def variable(**kwargs):
    return jaxstate.variable("v", jnp.ones, (), **kwargs)


def read_a_variable(cell, mode):
    net = network(cell, lambda x: x * variable().value)
    state = {"v": jnp.float32(2)}
    wanted = X * 2**cell.times
    close(mode(lambda s: net.apply({}, X, state=s))(state), wanted)
    close(mode(lambda s: net.apply_with_state({}, s, X))(state), (wanted, state))
    close(mode(net.init_with_state)(KEY, X), ({}, {"v": jnp.float32(1)}))


def write_the_same_value(cell, mode):
    def f(x):
        variable().value += 1.0
        return x * 2.0

    net = network(cell, f)
    apply = mode(lambda s: net.apply_with_state({}, s, X))
    state = {"v": jnp.float32(2)}
    if cell.how is once and (cell.lanes or cell.typed):
        close(apply(state), (X * 2, {"v": jnp.float32(3)}))
        close(mode(net.init_with_state)(KEY, X), ({}, {"v": jnp.float32(1)}))
    else:  # not the same: some lanes have written and some have not
        refused(cell.refusal, lambda: apply(state), lambda: net.init_with_state(KEY, X))


def write_a_value_per_lane(cell, mode):
    def f(x):
        variable().value = x
        return x * 2.0

    net = network(cell, f)
    apply = mode(lambda s: net.apply_with_state({}, s, X))
    refused(cell.refusal, lambda: apply({"v": jnp.float32(2)}))


def write_with_reduce(cell, mode):
    for reduce in (jnp.mean, jnp.max, jnp.sum):

        def f(x):
            v = variable(reduce=reduce)
            v.value = v.value * 2.0 + x
            return x + v.value  # each lane goes on with its own

        def by_hand(start):
            values, ys = [], []
            for i in LANES:
                value, y = start, X[i]
                for _ in range(int(cell.times[i])):
                    value = value * 2.0 + y
                    y = y + value
                values.append(value)
                ys.append(y)
            return jnp.stack(ys), reduce(jnp.stack(values), axis=0)

        net = network(cell, f)
        start = jnp.float32(1.5)
        y, value = by_hand(start)
        apply = mode(lambda v: net.apply_with_state({}, {"v": v}, X))
        close(apply(start), (y, {"v": value}))
        close(mode(net.init_with_state)(KEY, X), ({}, {"v": jnp.float32(1)}))
        tangent = jnp.float32(1)
        found = jax.jvp(lambda v: apply(v)[1]["v"], (start,), (tangent,))
        close(found, jax.jvp(lambda v: by_hand(v)[1], (start,), (tangent,)))


ROWS = {
    'draw, `"split"`': draw_from_a_split_stream,
    'draw, `"share"`': draw_from_a_shared_stream,
    "read a parameter": read_a_parameter,
    "make a parameter": make_a_parameter,
    "read a variable": read_a_variable,
    "write one value for all": write_the_same_value,
    "write a value of its own": write_a_value_per_lane,
    "the same, with `reduce=`": write_with_reduce,
}
CELLS = [
    pytest.param(
        row,
        map_name,
        how,
        mode,
        id=f"{row}, {column}, {map_name}, {mode.__name__}".replace("`", ""),
    )
    for row in ROWS
    for column, (map_names, how) in COLUMNS.items()
    for map_name in map_names
    for mode in (MODES if map_name != "pmap" else [eagerly])  # pmap compiles by itself
]


@pytest.mark.parametrize("row, map_name, how, mode", CELLS)
def test_cell(row, map_name, how, mode):
    ROWS[row](Cell(map_name, how), mode)


def test_the_documented_table_has_these_cells():
    text = (pathlib.Path(__file__).parents[3] / "docs/concepts.md").read_text()
    section = re.search(r"^## Lanes and devices$(.*?)(?=^## |\Z)", text, flags=re.M | re.S)[1]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in row] for row in rows]
    assert header[1:] == list(COLUMNS)
    assert [row[0] for row in body] == list(ROWS)
    assert all(all(row) for row in body)
