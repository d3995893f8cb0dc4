"""Streams, sown values, arrays in place, objects, slots and traces."""

import dataclasses
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

import jaxstate
from jaxstate.extend import StatefulTrace, current_trace, new_slot, new_trace, read, write


def noisy(x: jax.Array, scale: float = 1.0) -> jax.Array:
    assert_type(jaxstate.next_key("noise"), jax.Array)
    assert_type(jaxstate.next_key(default=None), jax.Array | None)
    return x + scale * jaxstate.random.normal(x.shape, jnp.float32, stream="noise")


def halved(x: jax.Array, times: int) -> float:
    for _ in range(times):
        x = jaxstate.sow("half", x / 2, mode="append")
    return float(x.sum())


@jaxstate.inplace
def running_sum(x: jax.Array, *, start: int = 1) -> jax.Array:
    y = jaxstate.array(np.zeros(3), dtype=jnp.float32)
    return x + y * start


@dataclasses.dataclass(frozen=True)
class Metrics:
    total: jax.Array
    parts: dict[str, jax.Array]

    def update(self, loss: jax.Array) -> int:
        self.parts["loss"] = self.total + loss
        return 1


def update(metrics: Metrics, loss: jax.Array) -> int:
    return metrics.update(loss)


class CountSines(StatefulTrace[dict[str, jax.Array]]):
    def process_primitive(self, primitive: Any, args: Any, params: Any, /) -> Any:
        if primitive.name == "sin":
            self.state["sines"] += 1
        return super().process_primitive(primitive, args, params)


class Untyped(StatefulTrace):
    def process_primitive(self, primitive: Any, args: Any, params: Any, /) -> Any:
        self.state += 1
        return super().process_primitive(primitive, args, params)


def main() -> None:
    key = jax.random.key(0)
    x = jnp.ones(3)

    with jaxstate.rng_stream(key, "noise", vmap="share", count=3) as stream:
        assert_type(noisy(x, scale=2.0), jax.Array)
        assert_type(stream, jaxstate.Stream)
        assert_type(stream.count, jax.Array)
        assert_type(stream.next_key(), jax.Array)
        jaxstate.random.uniform((3,), minval=-1, maxval=x, stream="noise")

    out, sown = jaxstate.reap(halved)(x, times=2)
    assert_type(out, float)
    assert_type(jaxstate.plant(halved, tag="sown")(sown, x, times=2), float)
    assert_type(running_sum(x, start=2), jax.Array)

    metrics = Metrics(jnp.float32(0), {"loss": jnp.float32(0)})
    count, new = jaxstate.mutate(update)(metrics, loss=jnp.float32(1))
    assert_type(count, int)
    count, new = jaxstate.mutate(metrics.update)(jnp.float32(1))
    assert_type(count, int)
    print(new)

    slot = new_slot(jnp.int32(0), name="steps")
    write(slot, read(slot) + 1)

    with new_trace(CountSines, state={"sines": jnp.int32(0)}) as trace:
        jnp.sin(x)
        assert_type(current_trace(CountSines), CountSines | None)
    assert_type(trace.state, dict[str, jax.Array])
    with new_trace(Untyped, state=jnp.int32(0)) as untyped:
        jnp.sin(x)
    assert_type(untyped.state, Any)


if __name__ == "__main__":
    main()
