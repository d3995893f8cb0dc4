"""What `mutate` makes of a program is what one would write by hand, and the work of that grows like
the program."""

import jax
import pytest

from jaxstate import mutate
from jaxstate_tests.bench import measure, programs
from jaxstate_tests.bench.measure import python_calls
from jaxstate_tests.core.test_counts import check_counts

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.leaks_allowed("the leak checker's own calls grow with the number of objects"),
]


@pytest.mark.parametrize("make", [programs.write_all, programs.write_one])
def test_equations_are_those_by_hand(make):
    pair = make(7)
    check_counts(pair.ours, pair.by_hand, *pair.args)
    ours, by_hand = (loop_of(f, pair.args) for f in (pair.ours, pair.by_hand))
    types = [sorted(str(v.aval) for v in loop.outvars) for loop in (ours, by_hand)]
    assert types[0] == types[1]


def loop_of(fun, args):
    (loop,) = [e for e in jax.make_jaxpr(fun)(*args).eqns if e.primitive.name == "scan"]
    return loop


def traced(pair, fun):
    trace = measure.trace_of(fun, pair.args)
    trace()
    return python_calls(trace)


# How many more calls of Python one more array costs than by hand.
@pytest.mark.parametrize(("make", "limit"), [(programs.write_all, 1.2), (programs.write_one, 1.25)])
def test_an_array_more_costs_what_it_costs_by_hand(make, limit):
    few, many = make(40), make(80)
    ours = traced(many, many.ours) - traced(few, few.ours)
    assert ours <= limit * (traced(many, many.by_hand) - traced(few, few.by_hand))


def test_tracing_grows_like_the_objects():
    pairs = [programs.write_all(n) for n in (20, 40, 200, 220)]
    few, more, many, many_more = [traced(pair, pair.ours) for pair in pairs]
    assert many_more - many <= 1.1 * (more - few)


@pytest.mark.parametrize("which", ["a jitted call", "an append"])
def test_an_operation_does_not_look_at_each_array(which):
    step = jax.jit(lambda x: x + 1)

    def calls(operations, n):
        def f(tree):
            for _ in range(operations):
                if which == "an append":
                    tree["list"].append(tree["arrays"]["k0"])
                else:
                    tree["arrays"]["k0"] = step(tree["arrays"]["k0"])

        tree = programs.object_of(n)
        mutate(f)(tree)
        return python_calls(lambda: mutate(f)(tree))

    one_more = [calls(6, n) - calls(5, n) for n in (10, 500)]
    assert one_more[1] <= one_more[0] + 20
    assert calls(1, 500) - calls(1, 250) <= 250 * 60  # the objects are copied twice
