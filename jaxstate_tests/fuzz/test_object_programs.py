"""Random programs over random objects are what they are on plain objects in Python.

`make test` runs 200 of them, the same every time; `make fuzz PROGRAMS=objects` new ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.fuzz import object_programs as op
from jaxstate_tests.fuzz.fuzzing import drawn, fuzz


def assert_same(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(found, np.ndarray):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-5)
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == wanted


def reference(program, x):
    spec, statements, _ = program
    tree = op.tree_of(spec)
    y = op.Run(op.Plain(), spec).block(statements)(tree, x)
    return y, tree


def runs(program):
    spec, statements, _ = program

    def f(tree, x):
        return op.Run(op.Real(), spec).block(statements)(tree, x)

    yield "mutate", jaxstate.mutate(f)
    yield "jit inside", jaxstate.mutate(lambda tree, x: jax.jit(f)(tree, x))
    if op.all_known(spec):
        yield "jit outside", jax.jit(jaxstate.mutate(f))


def check(program):
    spec, _, x = program
    x = jnp.float32(x)
    wanted, tree = reference(program, x)
    wanted_tree = op.contents(remade(tree))
    derivative = None
    for name, run in runs(program):
        given = op.tree_of(spec)
        before = op.contents(given)
        try:
            y, new = run(given, x)
        except jaxstate.ClosedStateError as error:
            assert "assigned anew" in str(error)  # the program holds what a loop replaces
            return
        assert_same(np.asarray(y), np.asarray(wanted))
        assert_same(op.contents(new), wanted_tree)
        assert_same(op.contents(given), before)
        if name == "mutate" and not has_while(program):
            if derivative is None:
                derivative = jax.grad(lambda x: reference(program, x)[0])(x)
            found = jax.grad(lambda x, run=run: run(op.tree_of(spec), x)[0])(x)
            np.testing.assert_allclose(found, derivative, rtol=1e-3, atol=1e-4)
    with jax.disable_jit():
        y, new = jaxstate.mutate(
            lambda tree, x: op.Run(op.Real(), spec).block(program[1])(tree, x)
        )(op.tree_of(spec), x)
    assert_same(np.asarray(y), np.asarray(wanted))
    assert_same(op.contents(new), wanted_tree)


def remade(tree):
    """As JAX makes a tree of its leaves, which is how `mutate` hands it back."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(leaves)


def has_while(program):
    return "while_loop" in str(program)


@pytest.mark.leaks_allowed("a program holds objects of traces that have ended, on purpose")
@pytest.mark.parametrize("number", range(10))
def test_random_programs_over_random_objects(number):
    drawn(number, 20, op.programs)(check)


@pytest.mark.slow
@pytest.mark.leaks_allowed("as above")
def test_fuzz():
    fuzz(check, op.programs)


COMPUTED = ("Doubling", None, None)


@pytest.mark.parametrize("around", [[], ["grad"], ["jit"], ["grad", "grad"]], ids="-".join)
@pytest.mark.parametrize(
    "spec",
    [("AttrDict", COMPUTED, None), ("Doubling", COMPUTED, None), ("AttrDict", COMPUTED, COMPUTED)],
    ids=["in one", "in another one", "two"],
)
@pytest.mark.leaks_allowed("as above")
def test_children_that_are_computed_while_jax_works_out_an_operation(spec, around):
    """The class computes with tracers that mean nothing to the rule of the operation."""
    body = [("assign", 0, 0, 0), ("optimize", 0)]
    for how in around:
        body = [(how, body)]
    check((spec, body, 0.7))
