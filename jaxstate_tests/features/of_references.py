"""``jax.new_ref``, which is JAX's own."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxstate_tests.features.table import built_in, few_lines


@few_lines
def sown_in_loops():
    kept = jax.new_ref(jnp.zeros(3))

    @jax.jit
    def f(x):
        def turn(i, x):
            kept[i] = jnp.sin(x)
            return jnp.sin(x)

        return lax.fori_loop(0, 3, turn, x)

    assert f(1.0) == kept[...][-1]


@built_in
def in_place():
    x = jax.new_ref(jnp.zeros(5))

    @jax.jit
    def squares(n):
        def turn(i, c):
            x[i] = 1.0 * i * i
            return c

        lax.fori_loop(0, n, turn, 0)

    squares(3)
    assert x[...].tolist() == [0, 1, 4, 0, 0]


@few_lines
def objects():
    class Counter:
        def __init__(self):
            self.n = jax.new_ref(jnp.int32(0))

    counter = Counter()

    @jax.jit
    def f():
        counter.n[...] += 1

    f()
    f()
    assert counter.n[...] == 2


@built_in
def donation():
    buffer = jax.new_ref(jnp.zeros(1000))

    @jax.jit
    def f(i):
        buffer[i] = 1.0

    f(0)
    f(1)
    assert buffer[...].sum() == 2
