"""Random programs equal the same programs with their state passed by hand.

`make test` runs 120 of them, the same every time. `make fuzz` runs new ones for as long as asked,
and prints the seed; a counterexample becomes a test of its own.
"""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxstate
from jaxstate.extend import new_slot, read
from jaxstate_tests.fuzz import random_programs as rp
from jaxstate_tests.fuzz.fuzzing import drawn, fuzz

KEY = jax.random.key(11)
KEYS = {name: jax.random.key(20 + i) for i, name in enumerate(rp.STREAMS)}
X = np.float32(0.6)
SLOTS = {"a": np.float32(0.2), "b": np.float32(-0.3)}


def initial(entry):
    """The documented initial value of a parameter or variable of a random program."""
    kind, path = entry.split(" ")
    return initial_parameter(path) if kind == "param" else np.float32(rp.INITIAL[path[-1]])


@functools.cache
def initial_parameter(path):
    """Two words of the path's SHA-256 digest, folded into the key."""
    digest, key = hashlib.sha256(path.encode()).digest(), KEY
    with jax.checking_leaks.func(False):
        for i in (0, 4):
            word = np.uint32(int.from_bytes(digest[i : i + 4], "little"))
            key = jax.random.fold_in(key, word)
        return np.asarray(rp.normal(key, ()))


def flat(params, state):
    """Two nested dicts, as the program by hand has them."""
    entries = {}
    for kind, tree in (("param", params), ("variable", state)):
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            entries[f"{kind} {'/'.join(part.key for part in path)}"] = value
    return entries


def nested(entries, kind):
    tree = {}
    for entry, value in entries.items():
        if entry.startswith(kind):
            *scopes, name = entry.split(" ")[1].split("/")
            functools.reduce(lambda t, scope: t.setdefault(scope, {}), scopes, tree)[name] = value
    return tree


def stateful(program, wrap=lambda body: body):
    """``(x, entries) -> (y, state)``, and ``() -> entries`` that makes them.

    ``wrap`` is given the function that runs inside of the state.
    """
    body = wrap(program.stateful())

    def apply(x, entries):
        slots = {name: new_slot(value) for name, value in SLOTS.items()}
        net = jaxstate.parametrized(lambda x: body(x, slots))
        params, state = nested(entries, "param"), nested(entries, "variable")
        with (
            jaxstate.rng_stream(KEYS["default"]) as default,
            jaxstate.rng_stream(KEYS["dropout"], "dropout") as dropout,
            jaxstate.rng_stream(KEYS["shared"], "shared", vmap="share") as shared,
        ):
            y, state = net.apply_with_state(params, state, x)
        s = {f"count {stream.name}": stream.count for stream in (default, dropout, shared)}
        s |= {f"slot {name}": read(slot) for name, slot in slots.items()}
        return y, s | flat({}, state)

    def init():
        slots = {name: new_slot(value) for name, value in SLOTS.items()}
        net = jaxstate.parametrized(lambda x: body(x, slots))
        return flat(*net.init_with_state({"params": KEY, **KEYS}, X))

    return apply, init


def by_hand(program):
    def apply(x, entries):
        s = {f"slot {name}": value for name, value in SLOTS.items()}
        for name, key in KEYS.items():
            s |= {f"key {name}": key, f"count {name}": jnp.int32(0)}
        y, s = program.by_hand(jnp.asarray(x), s | entries)
        return y, {name: s[name] for name in s if name.split(" ")[0] not in ("key", "param")}

    return apply


def derivative(program, apply):
    """Of all that comes out: in reverse mode where JAX can, else along one direction."""

    def total(x, entries):
        y, s = apply(x, entries)
        floats = [s[name] for name in sorted(s) if not name.startswith("count")]
        return y + sum((0.3 + 0.1 * i) * value for i, value in enumerate(floats))

    if not program.has(rp.While, rp.Fori, rp.CustomVmap):
        return jax.grad(total, (0, 1))
    if program.has(rp.CustomVjp):
        return lambda x, entries: ()

    def along(*args):
        return jax.jvp(total, args, jax.tree.map(jnp.ones_like, args))[1]

    return along


class Comparison:
    """What is compared for one program, as functions of ``(x, entries)``."""

    def __init__(self, program):
        self.program = program
        self.entries = {entry: initial(entry) for entry in program.entries}
        self.apply, self.init = stateful(program)
        self.by_hand = by_hand(program)

    def pairs(self, x, entries):
        """What is found, and what is wanted: births, results with states, derivatives."""
        derivatives = (derivative(self.program, run) for run in (self.apply, self.by_hand))
        return [
            (self.found(self.init), entries),
            (self.found(self.apply, x, entries), self.by_hand(x, entries)),
            (self.found(next(derivatives), x, entries), next(derivatives)(x, entries)),
        ]

    def found(self, run, *args):
        """None where a derivative is asked of a custom rule that does not say what it is."""
        try:
            return run(*args)
        except jaxstate.CustomRuleStateError:
            assert self.program.has(rp.CustomJvp, rp.CustomVjp)
            return None


def check(programs, eagerly):
    """All of them jitted, as one XLA program, and so many of them eagerly."""
    comparisons = [Comparison(program) for program in programs]

    @jax.jit
    def jitted(x, entries):
        return [c.pairs(x, e) for c, e in zip(comparisons, entries, strict=True)]

    results = jitted(X, [c.entries for c in comparisons])
    for i, (c, pairs) in enumerate(zip(comparisons, results, strict=True)):
        for found, wanted in pairs:
            assert_same(found, wanted)
        if i < eagerly:
            assert_same(c.found(c.apply, X, c.entries), pairs[1][1])


def assert_same(found, wanted):
    if found is None:
        return
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.shape(a) == jnp.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


EXAMPLES, CHUNKS, AT_ONCE = 72, 4, 6


@pytest.mark.leaks_allowed("a refusal holds tracers in its traceback")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk):
    programs = rp.programs(depth=3 if chunk < CHUNKS - 1 else 5)

    @drawn(
        chunk, EXAMPLES // CHUNKS // AT_ONCE, st.lists(programs, min_size=AT_ONCE, max_size=AT_ONCE)
    )
    def run(programs):
        check(programs, eagerly=1)


@pytest.mark.slow
@pytest.mark.leaks_allowed("a refusal holds tracers in its traceback")
def test_fuzz():
    fuzz(lambda program: check([program], eagerly=1), rp.programs())
