"""What type checkers have to report: never run."""

import jax
import jax.numpy as jnp

import jaxstate
from jaxstate.extend import new_trace
from jaxstate_tests.typed_programs.functions import CountSines, halved, noisy
from jaxstate_tests.typed_programs.layers import Mlp, block, dense, net

key, x = jax.random.key(0), jnp.ones((2, 3))
params, state = net.init_with_state(key, x)

# Names that do not exist.
net.aply(params, x)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
jaxstate.parametrised  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
jaxstate.random.norml((3,))  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
variable = jaxstate.variable("v", jnp.zeros, ())
variable.val  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
variable.val = 1.0  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
with jaxstate.rng_stream(key) as stream:
    stream.cuont  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
with new_trace(CountSines) as trace:
    trace.state.sines  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

# Arguments of a network.
net.apply(params, x, trian=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
net.apply(params)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
net.apply(params, x, True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
net.apply(x)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
net.init(key, x, features=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
net(x, train="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
net.apply_with_state(params, x)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
dense.init(key, "x")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
Mlp(3).half.apply({}, x, 2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
jaxstate.stack(block, 3).apply(params, x, size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
jaxstate.stack(net, n=3, chekpoint=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# Arguments of functions.
jaxstate.random.normal(shap=(3,))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.random.uniform((3,), minvalue=0.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.random.normal(key, (3,))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
jaxstate.next_key(key)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
jaxstate.rng_stream(key, vmap="shared")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
jaxstate.sow("h", x, mode="last")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
jaxstate.reap(halved)(x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.plant(halved)(x, 2)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.mutate(halved)(x, tmes=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.inplace(noisy)(x, skale=2.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
jaxstate.param("w", jnp.ones((3,)))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
jaxstate.variable("w", jnp.ones((3,)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# Results.
number: int = net.apply(params, x)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
text: str = variable.value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
