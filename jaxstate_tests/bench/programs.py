"""What is measured beside the models: single operations, loops, and how costs grow.

Each program says with what it is compared, and is data in `PROGRAMS`.
"""

import itertools
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxstate
from jaxstate_tests.bench import nets
from jaxstate_tests.bench.measure import Side, trace_of, trace_side
from jaxstate_tests.bench.models import Model
from jaxstate_tests.bench.peers import by_hand, with_jaxstate
from jaxstate_tests.ports import NAMES, port

CALLS = 200
OURS, BY_HAND, REFS = "jaxstate", "by hand", "jax.new_ref"


class Program(NamedTuple):
    """One comparison.

    Attributes:
      name: as the table shows it.
      target: the ratio that is wanted.
      sides: makes the sides, with times per call; the reference is the second.
    """

    name: str
    target: float
    sides: Callable[[], dict[str, Side]]


def stream() -> Any:
    return jaxstate.rng_stream(jax.random.key(0))


# -- Calls of jitted functions ---------------------------------------------------------------


def pure_call() -> dict[str, Side]:
    """A function without state, in an eager loop inside a stream and outside."""
    f, x = jax.jit(lambda x: x * 2 + 1), jnp.float32(1)
    return {OURS: Side(lambda: f(x), CALLS, stream), "outside": Side(lambda: f(x), CALLS)}


def one_draw() -> dict[str, Side]:
    """An eager loop of calls that draw once; by hand, key and count are passed and returned."""
    key, x = jax.random.key(0), jnp.float32(1)
    draw = jax.jit(lambda x: x + jax.random.uniform(jaxstate.next_key()))
    by_hand = jax.jit(lambda x, key, n: (x + jax.random.uniform(jax.random.fold_in(key, n)), n + 1))
    count = jnp.int32(0)
    ref = jax.new_ref(jnp.int32(0))

    @jax.jit
    def with_ref(x: Any) -> Any:
        n = ref[...]
        ref[...] = n + 1
        return x + jax.random.uniform(jax.random.fold_in(key, n))

    def call_by_hand() -> Any:
        nonlocal count
        y, count = by_hand(x, key, count)
        return y

    return {
        OURS: Side(lambda: draw(x), CALLS, stream),
        BY_HAND: Side(call_by_hand, CALLS),
        REFS: Side(lambda: with_ref(x), CALLS),
    }


def one_update() -> dict[str, Side]:
    """An eager loop of calls that update one slot."""
    x = jnp.float32(1)
    slot = jaxstate.extend.new_slot(0.0)
    read, write = jaxstate.extend.read, jaxstate.extend.write

    @jax.jit
    def update(x: Any) -> Any:
        write(slot, read(slot) + x)
        return x * 2

    by_hand = jax.jit(lambda x, total: (x * 2, total + x))
    total = jnp.float32(0)
    ref = jax.new_ref(jnp.float32(0))

    @jax.jit
    def with_ref(x: Any) -> Any:
        ref[...] += x
        return x * 2

    def call_by_hand() -> Any:
        nonlocal total
        y, total = by_hand(x, total)
        return y

    return {
        OURS: Side(lambda: update(x), CALLS),
        BY_HAND: Side(call_by_hand, CALLS),
        REFS: Side(lambda: with_ref(x), CALLS),
    }


def apply_around_jit(n: int) -> dict[str, Side]:
    """An eager ``apply`` around one jitted function with ``n`` parameters."""
    pair = nets.many_parameters(n)
    params, _, x, _ = pair.args

    @jax.jit
    def inner(x: Any) -> Any:
        for i in range(n):
            x = x + jaxstate.param(f"w{i}", nets.ONES, ())
        return x

    net = jaxstate.parametrized(lambda x: inner(x))
    by_hand = jax.jit(lambda params, x: pair.by_hand(params, {}, x, None)[0])
    return {
        OURS: Side(lambda: net.apply(params, x), CALLS),
        BY_HAND: Side(lambda: by_hand(params, x), CALLS),
    }


def variables_around_jit(n: int) -> dict[str, Side]:
    """An eager loop of ``apply_with_state``, around one jitted function that writes ``n``."""
    x, start = jnp.float32(0.5), {f"v{i}": jnp.float32(i) for i in range(n)}

    @jax.jit
    def inner(x: Any) -> Any:
        for name in start:
            jaxstate.variable(name, jnp.zeros, ()).value += x
        return x

    net = jaxstate.parametrized(lambda x: inner(x))
    by_hand = jax.jit(lambda state, x: (x, {k: v + x for k, v in state.items()}))

    def loop_of(call: Callable[[Any], Any]) -> Side:
        state = start

        def run() -> Any:
            nonlocal state
            y, state = call(state)
            return y

        return Side(run, CALLS)

    return {
        OURS: loop_of(lambda state: net.apply_with_state({}, state, x)),
        BY_HAND: loop_of(lambda state: by_hand(state, x)),
    }


def eager_key() -> dict[str, Side]:
    """``next_key()`` against ``fold_in`` with a count in Python."""
    key, count = jax.random.key(0), 0

    def by_hand() -> Any:
        nonlocal count
        count += 1
        return jax.random.fold_in(key, count)

    return {OURS: Side(jaxstate.next_key, CALLS, stream), BY_HAND: Side(by_hand, CALLS)}


# -- Arrays written in place -----------------------------------------------------------------


def eager_write() -> dict[str, Side]:
    """One element of a large array and of a small one."""

    def side(n: int) -> Side:
        x = jaxstate.array(jnp.zeros(n))

        def write() -> Any:
            x[3] = 1.0

        return Side(write, CALLS)

    return {"n = 1e7": side(10**7), "n = 1e3": side(10**3)}


def loop_of_writes() -> dict[str, Side]:
    """A jitted loop that writes 1,000 elements of an array of a million."""
    pair = nets.loop_of_writes(1000, 10**6)
    ours, by_hand = jax.jit(pair.ours), jax.jit(pair.by_hand)
    return {
        OURS: Side(lambda: ours(*pair.args), 5),
        BY_HAND: Side(lambda: by_hand(*pair.args), 5),
    }


def calls_that_write() -> dict[str, Side]:
    """An eager loop of jitted calls that write one element of an array of 80 MB: of a slot, of an
    array that is written in place, and of a variable of a step that donates its state."""
    n, x = 20_000_000, jnp.float32(1)
    table, array = jaxstate.extend.new_slot(jnp.zeros(n)), jaxstate.array(jnp.zeros(n))
    ref, held = jax.new_ref(jnp.zeros(n)), jnp.zeros(n)
    read, write = jaxstate.extend.read, jaxstate.extend.write

    @jax.jit
    def to_slot(x: Any) -> Any:
        write(table, read(table).at[3].set(x))
        return x * 2

    @jax.jit
    def to_array(x: Any) -> Any:
        array[3] = x
        return x * 2

    @jaxstate.parametrized
    def net(x: Any) -> Any:
        table = jaxstate.variable("table", jnp.zeros, (n,))
        table.value = table.value.at[3].set(x)
        return x * 2

    step, state = jax.jit(net.apply_with_state, donate_argnums=1), {"table": jnp.zeros(n)}

    def to_variable() -> Any:
        nonlocal state
        y, state = step({}, state, x)
        return y

    @jax.jit
    def to_ref(x: Any) -> Any:
        ref[3] = x
        return x * 2

    donating = jax.jit(lambda held, x: (held.at[3].set(x), x * 2), donate_argnums=0)

    def to_argument() -> Any:
        nonlocal held
        held, y = donating(held, x)
        return y

    return {
        OURS: Side(lambda: to_slot(x), CALLS),
        "donated by hand": Side(to_argument, CALLS),
        "array": Side(lambda: to_array(x), CALLS),
        "variable": Side(to_variable, CALLS),
        REFS: Side(lambda: to_ref(x), CALLS),
    }


def writes_through_a_view() -> dict[str, Side]:
    """A jitted loop that writes 200 elements of the inside of an array of 402 by 402."""
    pair = nets.writes_through_a_view(200, 402)
    ours, by_hand = jax.jit(pair.ours), jax.jit(pair.by_hand)
    return {
        OURS: Side(lambda: ours(*pair.args), 5),
        BY_HAND: Side(lambda: by_hand(*pair.args), 5),
    }


def _port(name: str) -> Callable[[], dict[str, Side]]:
    """A program of NumPy, jitted, on inputs of the size that the example has."""

    def sides() -> dict[str, Side]:
        ours, by_hand, arrays = port(name, 1.0)
        ours, by_hand, arrays = jax.jit(ours), jax.jit(by_hand), jax.device_put(arrays)
        calls = 10 if name in ("life", "heat", "heap_sort", "decode") else CALLS  # of milliseconds
        return {
            OURS: Side(lambda: ours(*arrays), calls),
            BY_HAND: Side(lambda: by_hand(*arrays), calls),
        }

    return sides


# -- Objects ---------------------------------------------------------------------------------


def object_of(n: int) -> dict[str, Any]:
    """A tree of n arrays."""
    return {"list": [], "arrays": {f"k{i}": jnp.float32(i) for i in range(n)}}


def write_all(n: int) -> nets.Pair:
    """A loop whose body reads and writes every array."""

    def ours(tree: Any) -> Any:
        arrays = tree["arrays"]
        jax.lax.fori_loop(
            0, 3, lambda i, _: arrays.update({k: x + 1.0 for k, x in arrays.items()}), None
        )

    def by_hand(arrays: Any) -> Any:
        def body(_: Any, arrays: Any) -> Any:
            return {k: x + 1.0 for k, x in arrays.items()}

        return jax.lax.fori_loop(0, 3, body, arrays)

    return nets.Pair(
        lambda tree: jaxstate.mutate(ours)(tree)[1]["arrays"],
        lambda tree: by_hand(tree["arrays"]),
        (object_of(n),),
    )


def write_one(n: int) -> nets.Pair:
    """A loop whose body reads and writes one array of n."""

    def update(x: Any) -> Any:
        return jnp.where(x > 3, jnp.sin(x), jnp.clip(x, 0, 1))

    def ours(tree: Any) -> None:
        arrays = tree["arrays"]
        jax.lax.fori_loop(0, 3, lambda i, _: arrays.update(k0=update(arrays["k0"])), None)

    def by_hand(tree: Any) -> Any:
        arrays = tree["arrays"]
        return {**arrays, "k0": jax.lax.fori_loop(0, 3, lambda _, x: update(x), arrays["k0"])}

    return nets.Pair(
        lambda tree: jaxstate.mutate(ours)(tree)[1]["arrays"], by_hand, (object_of(n),)
    )


def calls_and_appends(n: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Eagerly: 20 jitted calls that change one array of n, and 30 appends in a Python loop."""
    tree, step = object_of(n), jax.jit(lambda x: x + 1)

    def calls(tree: Any) -> None:
        for _ in range(20):
            tree["arrays"]["k0"] = step(tree["arrays"]["k0"])

    def appends(tree: Any) -> None:
        for i in range(30):
            tree["list"].append(tree["arrays"]["k0"] + i)

    return lambda: jaxstate.mutate(calls)(tree), lambda: jaxstate.mutate(appends)(tree)


def _per_array(which: int) -> Callable[[], dict[str, Side]]:
    """1,600 arrays against eight times 200."""

    def sides() -> dict[str, Side]:
        many, few = calls_and_appends(1600)[which], calls_and_appends(200)[which]

        def eight() -> None:
            for _ in range(8):
                few()

        return {
            "n = 1600": Side(many, clock=time.thread_time),
            "8 times n = 200": Side(eight, clock=time.thread_time),
        }

    return sides


# -- Traces ----------------------------------------------------------------------------------


def _traces(pair: Callable[[], nets.Pair]) -> Callable[[], dict[str, Side]]:
    def sides() -> dict[str, Side]:
        ours, by_hand, args = pair()
        return {OURS: trace_side(ours, args), BY_HAND: trace_side(by_hand, args)}

    return sides


def gpt(depth: int) -> dict[str, Side]:
    """The forward pass of a transformer with dropout."""
    model = Model("transformer", dict(depth=depth, width=8, heads=4), (4, 16, 8))
    x, key = model.input(), jax.random.key(0)
    sides = {}
    for name, library in ((OURS, with_jaxstate), (BY_HAND, by_hand)):
        net = model.written_in(library)
        assert net is not None
        sides[name] = trace_side(net.forward, (*net.init(key, x), x, key))
    return sides


def unrelated_slot(n: int) -> dict[str, Side]:
    """The derivative of ``n`` custom rules while a slot lives that nothing uses, and without."""

    def rule() -> Any:
        f = jax.custom_jvp(lambda x: jnp.sin(x))
        f.defjvp(lambda x, t: (jnp.sin(x[0]), jnp.cos(x[0]) * t[0]))
        return f

    rules = [rule() for _ in range(n)]

    def derivative(x: Any) -> Any:
        def f(x: Any) -> Any:
            for rule in rules:
                x = rule(x)
            return x

        return jax.grad(f)(x)

    @contextmanager
    def slot() -> Iterator[None]:
        slot = jaxstate.extend.new_slot(0.0)
        yield
        del slot

    side = trace_side(derivative, (1.0,))
    return {OURS: side._replace(setup=slot), "without": side}


def after_in_place() -> dict[str, Side]:
    """Plain JAX after one call of an in-place function: the Python calls of a trace, as seconds,
    against those in a process of its own that made no such call."""
    return {
        OURS: Side(lambda: None, clock=_calls_of_plain_jax(True)),
        "before": Side(lambda: None, clock=_calls_of_plain_jax(False)),
    }


def _calls_of_plain_jax(after: bool) -> Callable[[], float]:
    """A clock that goes on by the calls that a program makes."""
    program = textwrap.dedent(
        """
        import sys
        import jax, jax.numpy as jnp, jaxstate

        if sys.argv[1] == "True":
            jaxstate.inplace(lambda x: x.fill(1.0))(jnp.zeros(2))
        x = jnp.ones((3, 3))
        trace = lambda: jax.make_jaxpr(jax.vmap(jax.grad(lambda x: jnp.tanh(x @ x).sum())))(x[None])
        trace()
        calls = 0

        def count(frame, event, arg):
            global calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        trace()
        sys.setprofile(None)
        print(calls)
        """
    )
    command = [sys.executable, "-c", program, str(after)]
    calls = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return itertools.count(0, calls * 1e-9).__next__


def _growth(make: Callable[[int], nets.Pair], n: int) -> Callable[[], dict[str, Side]]:
    """One program that is ten times as large, against ten programs."""

    def sides() -> dict[str, Side]:
        few, many = make(n), make(10 * n)
        trace = trace_of(few.ours, few.args)

        def ten() -> None:
            for _ in range(10):
                trace()

        return {
            f"n = {10 * n}": trace_side(many.ours, many.args),
            f"10 times n = {n}": Side(ten, clock=time.thread_time),
        }

    return sides


PROGRAMS = [
    Program("pure jitted call in a stream", 1.0, pure_call),
    Program("jitted call with one draw", 1.4, one_draw),
    Program("jitted call with one update", 1.5, one_update),
    Program("apply, one jit, 100 parameters", 2.0, lambda: apply_around_jit(100)),
    Program("apply, one jit, 100 variables", 2.0, lambda: variables_around_jit(100)),
    Program("next_key() eagerly", 1.3, eager_key),
    Program("eager write, n = 1e7 / 1e3", 2.0, eager_write),
    Program("loop of writes, n = 1e6", 1.0, loop_of_writes),
    Program("jitted calls that write into 80 MB", 3.0, calls_that_write),
    Program("loop of writes through a view", 1.05, writes_through_a_view),
    *(Program(f"NumPy program, {name}", 1.05, _port(name)) for name in NAMES),
    Program("trace, 1000 parameters", 1.15, _traces(lambda: nets.many_parameters(1000))),
    Program("trace, 100 levels", 1.2, _traces(lambda: nets.deep(100))),
    Program("trace, 30 jitted levels", 1.15, _traces(lambda: nets.jitted_deep(30))),
    Program("trace, 30 jits in a row", 1.15, _traces(lambda: nets.jits_in_a_row(30))),
    Program("trace, 64 nested jits", 1.2, _traces(lambda: nets.nested_jits(64))),
    Program("trace, 50 nested scans", 1.2, _traces(lambda: nets.nested_scans(50))),
    Program("trace, scan of 100 variables", 1.2, _traces(lambda: nets.many_variables(100))),
    Program("trace, transformer of 24 layers", 1.06, lambda: gpt(24)),
    Program("trace, 20 custom rules and a slot", 1.02, lambda: unrelated_slot(20)),
    Program("trace, mutate of 200 leaves", 1.3, _traces(lambda: nets.assigned_leaves(200))),
    Program("calls of plain JAX after inplace", 1.01, after_in_place),
    Program("trace, scan of a scan of a cond", 1.15, _traces(lambda: nets.nested_loops(10))),
    Program("trace, objects, 200 of 200 arrays", 1.3, _traces(lambda: write_all(200))),
    Program("trace, objects, 1600 of 1600 arrays", 1.3, _traces(lambda: write_all(1600))),
    Program("trace, objects, 1 of 200 arrays", 1.3, _traces(lambda: write_one(200))),
    Program("trace, objects, 1 of 1600 arrays", 1.3, _traces(lambda: write_one(1600))),
    Program("objects, 20 jitted calls, 1600 / 200", 1.1, _per_array(0)),
    Program("objects, 30 appends, 1600 / 200", 1.1, _per_array(1)),
    Program("trace, 1000 / 100 parameters", 1.1, _growth(nets.many_parameters, 100)),
    Program("trace, 1000 / 100 modules", 1.1, _growth(nets.many_modules, 100)),
    Program("trace, 1000 / 100 variables in a scan", 1.1, _growth(nets.many_variables, 100)),
    Program("trace, 100 / 10 levels", 1.1, _growth(nets.deep, 10)),
]

QUICK = PROGRAMS[:8]


def import_seconds(repeats: int) -> float:
    """What ``import jaxstate`` takes after ``import jax``, in processes of their own."""
    program = (
        "import time, jax; start = time.perf_counter(); import jaxstate;"
        " print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)
