"""State that is written in its memory: what the program holds stays what it was."""

import functools
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.errors import HostCallbackError
from jaxstate.extend import new_slot, read, write

N = 1 << 16  # with four bytes each, as many as are written in their memory
MANY = 1 << 21  # as many as are, however many arrays the process has beside them


class Slot:
    """One large value of state, of a kind that is written by `write`."""

    @staticmethod
    def run(program):
        program()

    def __init__(self, value):
        self.slot = new_slot(value, name="table")

    def read(self):
        return read(self.slot)

    def write(self, value):
        write(self.slot, value)

    def set(self, i, value):
        write(self.slot, read(self.slot).at[i].set(value))


class Array:
    """The same in a writable array."""

    run = Slot.run

    def __init__(self, value):
        self.array = jaxstate.array(value)

    def read(self):
        value = jnp.asarray(self.array)  # in a jitted function: the writable array itself
        return value.copy() if isinstance(value, jax.core.Tracer) else value

    def write(self, value):
        self.array[:] = value

    def set(self, i, value):
        self.array[i] = value


class Variable:
    """The same in a variable of an ``apply`` that is not jitted."""

    made = 0

    @classmethod
    def run(cls, program):
        @jaxstate.parametrized
        def net():
            cls.made = 0
            program()

        state = {f"table_{i}": {str(n): jnp.zeros(n) for n in (N, MANY)} for i in range(3)}
        before = jax.tree.map(np.array, state)
        for _ in range(2):
            net.apply_with_state({}, state)
            jax.tree.map(np.testing.assert_array_equal, state, before)

    def __init__(self, value):
        with jaxstate.scope(f"table_{self.made}"):
            self.variable = jaxstate.variable(str(value.size), jnp.zeros, value.shape)
        self.variable.value = value
        Variable.made += 1

    def read(self):
        return self.variable.value

    def write(self, value):
        self.variable.value = value

    def set(self, i, value):
        self.variable.value = self.variable.value.at[i].set(value)


KINDS = [Slot, Array]


def with_every_kind(test):
    @functools.wraps(test)
    def run(kind, **others):
        kind.run(lambda: test(kind, **others))

    return pytest.mark.parametrize("kind", [*KINDS, Variable])(run)


def start(n=N, *first):
    values = np.arange(n, dtype=np.float32)
    values[: len(first)] = first
    return values


def setter(state):
    return jax.jit(lambda i, x: state.set(i, x))


def where(state):
    return state.read().unsafe_buffer_pointer()


# -- In its memory ---------------------------------------------------------------------------


class Compilations:
    def __enter__(self):
        self.n = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event, *_, **__):
        self.n += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


@with_every_kind
def test_a_jitted_call_writes_in_the_memory_of_the_value(kind):
    state = kind(jnp.asarray(start(MANY)))
    f = setter(state)
    f(0, 7.0)
    memory, live = where(state), len(jax.live_arrays())
    for i in range(1, 4):
        f(i, 7.0)
        assert where(state) == memory
    assert len(jax.live_arrays()) == live
    np.testing.assert_array_equal(state.read(), start(MANY, 7, 7, 7, 7))


@with_every_kind
def test_holding_a_value_is_no_second_compilation(kind):
    state = kind(jnp.asarray(start(MANY)))
    f = setter(state)
    like = jnp.asarray(start(MANY)).copy()  # (to copy is a program too)
    with Compilations() as compilations:
        held = [like]
        for i in range(6):
            f(i, 7.0)
            if i % 2:
                held.append(state.read())
    assert compilations.n == 1


@with_every_kind
def test_reading_is_no_copy_at_the_next_write(kind):
    """What is read and not kept costs nothing later: in jitted functions, and on a CPU at all."""
    state = kind(jnp.asarray(start(MANY)))
    f, total = setter(state), jax.jit(lambda: state.read().sum())
    f(0, 7.0)
    memory = where(state)
    for i in range(1, 4):
        total(), float(state.read()[i]), float(state.read().sum())
        f(i, 7.0)
        assert where(state) == memory


def test_arrays_are_written_in_their_memory_eagerly_and_jitted_in_turns():
    x = jaxstate.array(jnp.asarray(start(MANY)))
    f = jax.jit(lambda i: x.__setitem__(i, 7.0))
    element = jax.jit(lambda i: x[i])
    f(0)
    memory = jnp.asarray(x).unsafe_buffer_pointer()
    for i in range(1, 6, 2):
        assert element(i) == i
        x[i] = 7.0
        f(i + 1)
        x[:2] += 1.0
        assert jnp.asarray(x).unsafe_buffer_pointer() == memory
    np.testing.assert_array_equal(x, start(MANY, 10, 10, 7, 7, 7, 7, 7))


@pytest.mark.parametrize("n", [10, N])
def test_an_eager_write_in_an_in_place_function(n):
    @jaxstate.inplace
    def f(x):
        y = x + 0
        seen = []
        for i in range(3):
            y[i] = 7.0
            x[i] = 8.0
            seen.append(x.addressable_data(0))
        return x, y, seen

    argument = jnp.asarray(start(n))
    x, y, seen = f(argument)
    np.testing.assert_array_equal(argument, start(n))
    np.testing.assert_array_equal(y, [7, 7, 7, *range(3, n)])
    for i, value in enumerate([*seen, x]):
        np.testing.assert_array_equal(value[:3], [*[8] * (i + 1), *range(i + 1, 3)][:3])


def test_memory_of_an_eager_write_in_an_in_place_function():
    pointers = []

    @jaxstate.inplace
    def f(x):
        x = x + 0
        for i in range(3):
            x[i] = 7.0
            pointers.append(np.asarray(x).ctypes.data)
        return x

    f(jnp.asarray(start(MANY)))
    assert len(set(pointers)) == 1


@with_every_kind
def test_operands_of_several_types_in_turns(kind):
    """JAX's dispatch knows both after the first call, and keeps no value of a call it did not."""
    state, traces = kind(jnp.asarray(start(MANY))), []

    @jax.jit
    def f(i, xs):
        traces.append(1)
        state.set(i, xs.sum())

    operands = [jnp.ones(2), jnp.ones(3), np.ones(4, np.int32)]
    for i, xs in enumerate(operands):
        held = state.read()
        f(i, xs)
        assert held[i] == i
    assert len(traces) == 3
    f(0, operands[0])
    memory = where(state)
    for _ in range(2):
        for i, xs in enumerate(operands):
            f(i, xs)
            assert where(state) == memory
    assert len(traces) == 3
    np.testing.assert_array_equal(state.read(), start(MANY, 2, 3, 4))


def test_several_slots_of_one_call():
    slots = [new_slot(jnp.zeros(MANY)) for _ in range(2)] + [new_slot(0.0)]

    @jax.jit
    def f(i):
        for n, slot in enumerate(slots):
            write(slot, read(slot).at[i if n < 2 else ()].add(n + 1.0))

    f(0)
    memory = [read(slot).unsafe_buffer_pointer() for slot in slots[:2]]
    held = read(slots[1])
    f(1)
    f(2)
    assert read(slots[0]).unsafe_buffer_pointer() == memory[0]
    assert read(slots[1]).unsafe_buffer_pointer() != memory[1]
    assert held[:3].tolist() == [2, 0, 0]
    for n, slot in enumerate(slots[:2]):
        assert read(slot)[:4].tolist() == [n + 1, n + 1, n + 1, 0]
    assert read(slots[2]) == 9


# -- What the program holds ------------------------------------------------------------------


class Held:
    """Something that the program got from a value, and what it says of it later."""

    def __init__(self, thing, look=np.asarray):
        self.thing = thing
        self.look = look
        self.wanted = np.array(look(thing))

    def check(self):
        np.testing.assert_array_equal(self.look(self.thing), self.wanted)


def _pullback(x):
    return Held(jax.vjp(lambda y: y * y, x)[1], lambda pullback: pullback(jnp.ones_like(x))[0])


def _linearized(x):
    return Held(jax.linearize(jnp.sin, x)[1], lambda linear: linear(jnp.ones(N)))


def _closure(x):
    return Held(jax.jit(lambda i: x[i] + x[0]), lambda f: f(jnp.arange(4)))


def _other_slot(x):
    return Held(new_slot(x), read)


def _callback(x):
    seen = []
    jax.debug.callback(seen.append, x)
    jax.effects_barrier()
    return Held(seen[0])


def _mesh(x):
    mesh = jax.sharding.Mesh(jax.devices()[:1], "a")
    return Held(jax.device_put(x, jax.NamedSharding(mesh, jax.P())))


HOLDS = {
    "reference": Held,
    "in a list": lambda x: Held([x], lambda held: held[0]),
    "numpy": lambda x: Held(np.asarray(x)),
    "part of numpy": lambda x: Held(np.asarray(x)[::7]),
    "buffer": lambda x: Held(memoryview(x)),
    "dlpack": lambda x: Held(np.from_dlpack(x)),
    "dlpack of jax": lambda x: Held(jnp.from_dlpack(x)),
    "device_put": lambda x: Held(jax.device_put(x, jax.devices()[0])),
    "of a mesh": _mesh,
    "addressable_data": lambda x: Held(x.addressable_data(0)),
    "shard": lambda x: Held(x.addressable_shards[0], lambda shard: shard.data),
    "stop_gradient": lambda x: Held(jax.lax.stop_gradient(x).addressable_data(0)),
    "checkpoint": lambda x: Held(jax.checkpoint(lambda y: y)(x).addressable_data(0)),
    "jitted": lambda x: Held(jax.jit(lambda y: y)(x).addressable_data(0)),
    "pullback": _pullback,
    "linearized": _linearized,
    "closure": _closure,
    "other slot": _other_slot,
    "array": lambda x: Held(jaxstate.array(x)),
    "callback": _callback,
    "inplace": lambda x: Held(jaxstate.inplace(lambda y: y)(x).addressable_data(0)),
    "key data": lambda x: Held(jax.random.wrap_key_data(jax.lax.bitcast_convert_type(
        x.reshape(-1, 2), jnp.uint32)), jax.random.key_data),
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDS)
@with_every_kind
def test_what_the_program_holds_stays(kind, name):
    state, wanted = kind(jnp.asarray(start())), start()
    f, twice = setter(state), jax.jit(lambda: state.write(2 * state.read()))
    held = []
    for i in range(3):
        held.append(HOLDS[name](state.read()))
        f(i, -1.0)
        held.append(HOLDS[name](state.read()))
        if kind is Array:
            state.array[i] = -1.0
            held.append(HOLDS[name](state.read()))
        twice()
        wanted[i] = -1
        wanted *= 2
        np.testing.assert_array_equal(state.read(), wanted)
        for x in held:
            x.check()


@with_every_kind
def test_values_that_come_from_the_program(kind):
    """A value that the program writes may be in memory that it has too."""
    ours = np.empty(N + 16, np.float32)
    ours = ours[-ours.ctypes.data % 64 // 4 :][:N]  # as JAX takes it without a copy
    ours[:] = start()
    given = jax.device_put(ours)
    state, other = kind(given), kind(given)
    f, g = setter(state), setter(other)
    for i in range(3):
        f(i, -1.0), g(i, -2.0)
        np.testing.assert_array_equal(ours, start())
        np.testing.assert_array_equal(given, start())
        state.write(given)
        other.write(state.read())
        f(5, -1.0), g(6, -2.0)
        np.testing.assert_array_equal(state.read(), [*range(5), -1, *range(6, N)])
        np.testing.assert_array_equal(other.read(), [*range(6), -2, *range(7, N)])


@with_every_kind
def test_the_value_as_an_argument_and_as_a_result_of_the_call(kind):
    state, wanted = kind(jnp.asarray(start())), start()
    double = kind(jnp.asarray(start()))

    @jax.jit
    def f(i, x):
        before = state.read()
        state.set(i, before[i] + x[-1])
        after = state.read()
        double.write(after)
        return before, after, x

    for i in range(4):
        argument = state.read()
        memory = np.asarray(argument) if i % 2 else None
        old = wanted.copy()
        results = f(i, argument)
        wanted[i] += old[-1]
        for _ in range(2):
            np.testing.assert_array_equal(argument, old)
            assert memory is None or np.array_equal(memory, old)
            for result, value in zip(results, (old, wanted, old), strict=True):
                np.testing.assert_array_equal(result, value)
            np.testing.assert_array_equal(double.read(), wanted)
            setter(double)(0, wanted[0])


@pytest.mark.parametrize("seed", range(2))
def test_random_programs_with_a_pool_of_held_values(seed):
    Variable.run(functools.partial(_random_program, seed))


def _random_program(seed):
    rng = random.Random(seed)
    states = [kind(jnp.asarray(start())) for kind in (Slot, Array, Variable)]
    model = [start() for _ in states]
    pool = []

    def swap(a, b):
        x, y = a.read(), b.read()
        a.write(y + 1)
        b.write(x)
        return y

    sets = [setter(state) for state in states]
    swaps = {(a, b): jax.jit(functools.partial(swap, states[a], states[b]))
             for a in range(3) for b in range(3) if a != b}  # fmt: skip
    names = sorted(set(HOLDS) - {"closure", "other slot", "key data"})
    for _ in range(60):
        n, m = rng.sample(range(3), 2)
        i, value = rng.randrange(N), float(rng.randrange(100))
        match rng.choice(["set", "set", "eager", "swap", "assign", "hold", "drop"]):
            case "set":
                sets[n](i, value)
                model[n][i] = value
            case "eager":
                states[n].set(i, value)
                model[n][i] = value
            case "swap":
                pool.append(Held(swaps[n, m]()))
                model[n], model[m] = model[m] + 1, model[n]
            case "assign":
                states[n].write(states[m].read())
                model[n] = model[m].copy()
            case "hold":
                pool.append(HOLDS[rng.choice(names)](states[n].read()))
            case "drop" if pool:
                pool.pop(rng.randrange(len(pool)))
        for state, wanted in zip(states, model, strict=True):
            if rng.random() < 0.3:
                np.testing.assert_array_equal(state.read(), wanted)
        for held in pool:
            held.check()
    for state, wanted in zip(states, model, strict=True):
        np.testing.assert_array_equal(state.read(), wanted)


# -- Variables -------------------------------------------------------------------------------


@jax.jit
def put(i, x):
    table = jaxstate.variable("table", jnp.zeros, (MANY,))
    table.value = table.value.at[i].set(x)
    return table.value[:2]


@jax.jit
def whole():
    return jaxstate.variable("table", jnp.zeros, (MANY,)).value


@jax.jit
def grown(w):
    """Has the gradient of what it writes, and writes a small variable beside it."""
    table = jaxstate.variable("table", jnp.zeros, (MANY,))
    calls = jaxstate.variable("calls", jnp.zeros, (), int)
    table.value = table.value + jax.grad(lambda w: (w * table.value[0]) ** 2)(w)
    calls.value += 1


def places():
    return {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape == (MANY,)}


def test_jitted_modules_write_their_variables_in_their_memory():
    """In each ``apply`` in the memory of one copy of what was given; and of a second one, until the
    calls that look for names are known."""

    @jaxstate.parametrized
    def net():
        before, found = places(), []
        for i in range(4):
            for call in functools.partial(put, i, 7.0), functools.partial(grown, 1.0):
                call()
                found.append(places() - before)
        return found

    state, wanted = {"table": start(MANY), "calls": np.zeros((), np.int32)}, start(MANY)
    for i in range(4):
        wanted[i] = 7
        wanted = wanted + 2 * wanted[0] ** 2
    for n in range(7):
        given = jax.tree.map(jnp.array, state)
        found, after = net.apply_with_state({}, given)
        assert [*map(len, found)] == [1] * 8
        assert len({*map(frozenset, found)}) == (2 if n < 5 else 1)
        np.testing.assert_array_equal(after["table"], wanted)
        assert after["calls"] == 4
        jax.tree.map(np.testing.assert_array_equal, given, state)


def test_what_jitted_modules_have_returned_stays():
    @jaxstate.parametrized
    def net():
        held = [Held(whole())]
        for i in range(3):
            held += [Held(put(i, 7.0)), Held(whole()), Held(whole().addressable_data(0))]
            grown(1.0)
            held.append(Held(np.asarray(whole())))
        return held

    state = {"table": jnp.array(start(MANY)), "calls": 0}
    for _ in range(3):
        held, state = net.apply_with_state({}, state)
        wanted = start(MANY) if state["calls"] == 3 else wanted  # noqa: F821
        for i in range(3):
            wanted[i] = 7
            wanted = wanted + 2 * wanted[0] ** 2
        np.testing.assert_array_equal(state["table"], wanted)
        for x in held:
            x.check()


def test_an_apply_that_fails_leaves_what_it_was_given():
    @jaxstate.parametrized
    def net(x):
        put(0, 1.0)
        put(1, 2.0)
        return whole()[:2] + jnp.reshape(x, (2,))

    state = {"table": jnp.array(start(MANY))}
    for _ in range(2):
        assert net.apply_with_state({}, state, jnp.zeros(2))[0].tolist() == [1, 2]
        with pytest.raises(TypeError):
            net.apply_with_state({}, state, jnp.zeros(3))
        np.testing.assert_array_equal(state["table"], start(MANY))


# -- Calls that fail -------------------------------------------------------------------------


@with_every_kind
def test_after_an_error_the_value_is_as_before(kind):
    state = kind(jnp.asarray(start()))

    @jax.jit
    def f(i, x):
        state.set(i, 7.0)
        return x.reshape(2), jnp.log(x)

    f(0, jnp.ones(2))
    f(1, jnp.ones(2))
    wanted = start(N, 7, 7)
    with pytest.raises(TypeError):
        f(2, jnp.ones(3))
    with pytest.raises(TypeError):
        f(2, object())
    np.testing.assert_array_equal(state.read(), wanted)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        f(2, -jnp.ones(2))
    # (JAX has called the function again, operation by operation.)
    np.testing.assert_array_equal(state.read()[3:], wanted[3:])
    f(2, jnp.ones(2))
    assert state.read()[2] == 7


WITHOUT_MEMORY = """
import resource, jax, jax.numpy as jnp
from jaxstate.extend import new_slot, read, write

jax.config.update("jax_cpu_enable_async_dispatch", False)
slot = new_slot(jnp.zeros(1 << 18), name="table")

@jax.jit
def f(x):
    write(slot, read(slot) + x)
    return jnp.broadcast_to(x, (1 << 26,))

f(1.0), f(1.0)
assert read(slot)[0] == 2
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 26), -1))
try:
    f(1.0)
except (ValueError, RuntimeError) as error:
    print(*error.__notes__)
write(slot, jnp.zeros(1 << 18))
assert read(slot)[0] == 0
"""


def test_a_program_that_finds_no_memory_says_what_it_has_lost():
    command = [sys.executable, "-c", WITHOUT_MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "slot 'table'" in result.stdout


@pytest.fixture
def interruptible():
    """Whoever runs tests in parallel ignores interrupts in the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@with_every_kind
def test_an_interrupt_loses_nothing(kind, interruptible):
    """What is counted in the table and beside it is equal, or one call apart."""
    state, count = kind(jnp.asarray(start())), new_slot(0)

    @jax.jit
    def f():
        write(count, read(count) + 1)
        state.set(0, state.read()[0] + 1)

    f(), f()
    begin = float(state.read()[0]) - int(read(count))
    main = threading.main_thread().ident
    assert main is not None
    rng = random.Random(0)
    interrupted = 0
    for _ in range(20):
        timer = threading.Timer(rng.random() * 0.003, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            end = time.monotonic() + 0.1  # Python ignores what is raised in a finalizer
            while time.monotonic() < end:
                f()
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        difference = float(state.read()[0]) - int(read(count)) - begin
        assert abs(difference) <= 1
        begin += difference
    assert interrupted > 10
    np.testing.assert_array_equal(state.read()[1:], start()[1:])


@with_every_kind
def test_a_signal_handler_may_read_what_is_being_written(kind):
    """It runs between two steps of Python, and may find that the call is done and its result is in
    no cell yet."""
    state, seen = kind(jnp.zeros(N)), []
    f = jax.jit(lambda: state.write(state.read() + 1))
    f(), f()
    float(state.read()[0])

    def look(*_):
        seen.append(float(state.read()[0]))
        signal.setitimer(signal.ITIMER_REAL, 0.001)

    before = signal.signal(signal.SIGALRM, look)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        calls, end = 2, time.monotonic() + 20
        while len(seen) < 20 and time.monotonic() < end:
            f()
            calls += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) == 20 and seen == sorted(seen)
    assert state.read()[0] == calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_on_the_host_may_read_what_the_call_writes(kind):
    state = kind(jnp.asarray(start()))

    def look(x):
        with jax.ensure_compile_time_eval():
            return np.float32(x + np.asarray(state.read())[1])

    @jax.jit
    def f(x):
        state.set(1, x)
        return jax.pure_callback(look, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert [float(f(10.0)), float(f(20.0)), float(f(30.0))] == [11, 30, 50]
    assert state.read()[1] == 30


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_write_and_read_one_value(kind):
    state, wrong = kind(jnp.zeros(N)), []
    f = jax.jit(lambda: state.write(state.read() + 1))
    f(), f()
    done = threading.Event()

    def reader():
        while not done.is_set():
            try:
                value = np.asarray(state.read())
                if value.min() != value.max():
                    wrong.append(value)
            except Exception as error:
                wrong.append(error)

    def writer():
        for _ in range(20):
            try:
                f()
            except HostCallbackError:  # both have begun with one value
                wrong.append("lost")

    threads = [threading.Thread(target=target) for target in (writer, writer, reader)]
    for thread in threads:
        thread.start()
    for thread in threads[:2]:
        thread.join()
    done.set()
    threads[2].join()
    assert not wrong
    assert state.read()[0] == 42
