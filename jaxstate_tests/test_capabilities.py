"""What jaxstate is there for, capability by capability, and the tests that show each of them.

Capabilities that no other file shows have their test here.
"""

import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.numpy

import jaxstate

FOLDER = pathlib.Path(__file__).parent

# The files of tests, and those of their tests that show the capability in particular. `test_matrix`
# has the programs {draw, parameter, slot, variable} under all transformations and pairs of these.
CAPABILITIES = {
    # The core
    "trace(jit(f))": {
        "matrix": ["equals_the_program_with_its_state_passed_by_hand"],
        "params": ["one_object_under_two_parents_plain_and_jitted_is_one_entry"],
        "counts": ["jit_of_apply_equals_apply"],
    },
    "no stale cache": {
        "params": [
            "two_applies_through_one_cached_function",
            "a_cached_function_whose_parameter_changed_shape",
            "a_loop_of_calls_of_one_jitted_stateful_function_traces_it_once",
        ],
        "random": ["one_cached_function_under_two_streams"],
    },
    "store identity": {"extend": ["a_write_two_jits_down_is_seen_after_the_call"]},
    "effects survive": {
        "derivatives": [
            "hazards_of_grad_and_state",
            "effects_of_a_function_with_a_rule_happen_once",
        ],
        "counts": ["forward_has_the_equations_and_operations_of_the_function_by_hand"],
    },
    "state inside derivatives": {
        "random": ["grad_of_checkpoint_of_scan_sees_the_draws_of_the_forward_pass"],
        "variables": ["value_and_grad_inside_the_state"],
    },
    "tangents through state": {
        "extend": ["tangents_go_through_state"],
        "variables": ["gradients_flow_through_a_variable_and_what_leaves_is_the_value"],
    },
    "while": {
        "variables": ["the_condition_of_a_while_loop_reads_and_writes"],
        "random": [
            "zero_trip_loops_leave_the_count",
            "lanes_that_draw_a_different_number_of_times",
        ],
    },
    "vmap of cond": {"random": ["vmap_of_cond_moves_only_the_lanes_that_took_the_branch"]},
    "inert outside": {
        "params": ["outside_of_init_and_apply_it_is_plain_python"],
        "random": ["threads_do_not_see_each_other", "an_exception_in_a_body_leaves_nothing_behind"],
        "variables": ["a_failed_call_leaves_nothing_half_written"],
    },
    "unaware libraries": {"capabilities": ["a_module_that_was_imported_before"]},
    "no leak": {"capabilities": ["every_test_is_under_the_leak_checker"]},
    "other JAX state": {
        "random": ["debug_print_and_refs_pass_through"],
        "rules": ["refs_beside_and_inside_state", "state_is_an_operand_of_callbacks"],
    },
    # Random streams
    "loops of draws": {"random": ["python_loop_scan_and_while_loop_give_the_same_keys"]},
    "branches of draws": {"random": ["branches_that_draw_different_numbers_of_keys"]},
    "draws in lanes": {
        "random": [
            "split_lanes_are_those_of_the_documentation",
            "nested_split_lanes_are_distinct",
            "split_lanes_with_nothing_mapped_inside",
            "shared_lanes_are_equal",
        ],
    },
    "draws on devices": {
        "eight_devices/mesh": [
            "every_device_draws_its_own",
            "all_devices_draw_the_same_from_a_stream_that_they_share",
        ],
        "eight_devices/devices": ["the_same_program_draws_the_same_again"],
    },
    "draws in a checkpoint": {
        "random": ["grad_of_checkpoint_of_scan_sees_the_draws_of_the_forward_pass"],
    },
    "streams outside of parameters": {
        "random": ["threads_do_not_see_each_other", "generators_close_their_own_stream"],
    },
    # Parameters
    "order and names": {
        "params": [
            "names_follow_first_use_and_stay_when_a_layer_is_added",
            "the_value_depends_on_key_and_path_only",
        ],
    },
    "sharing": {"params": ["one_object_under_two_parents_plain_and_jitted_is_one_entry"]},
    "lazy birth": {"params": ["a_parameter_can_be_born_anywhere"]},
    "nested explicit apply": {"params": ["explicit_apply_inside_a_body"]},
    "combinators": {"combinators": ["l2_regularized", "reparametrized", "batched"]},
    "recurrent": {
        "capabilities": ["a_recurrent_model_of_characters_trains"],
        "params": ["a_python_loop_equals_a_scan"],
        "stack": ["trees_as_carry_stacks_of_stacks_and_reuse"],
    },
    "init": {
        "params": [
            "init_does_nothing_of_the_forward_pass",
            "init_from_shapes_and_eval_shape",
            "vmap_of_init_makes_an_ensemble",
            "init_with_out_shardings",
        ],
    },
    "foreign solvers": {
        "solvers": ["a_solver_finds_the_parameters_of_its_function"],
        "peers": ["a_solver_finds_the_parameters_of_its_function"],
    },
    "derivative-hungry libraries": {
        "solvers": [
            "derivative_hungry_code",
            "a_fixed_point_solver_with_a_loop_in_its_own_custom_vjp",
        ],
    },
    "plain trees": {
        "params": ["a_pickled_tree_in_a_new_process"],
        "capabilities": [
            "optimizers_take_masks_and_labels_written_by_hand",
            "a_tree_is_saved_and_loaded",
            "a_tree_is_a_checkpoint_of_orbax",
        ],
    },
    "layers in a loop": {
        "stack": [
            "init_stacks_what_each_layer_would_make",
            "tracing_takes_as_long_for_a_deep_stack_as_for_one_layer",
        ],
    },
    "custom rules kept": {"derivatives": ["a_custom_vjp_that_draws_keeps_its_rule"]},
    # Variables
    "loops and branches": {
        "variables": [
            "the_counter_is_the_number_of_steps",
            "what_one_branch_writes_and_the_other_leaves_passes_through",
        ],
    },
    "batch norm": {
        "variables": [
            "batch_norm_in_a_plain_value_and_grad_body",
            "batch_norm_in_a_scan_of_micro_batches",
            "batch_norm_over_lanes_with_pmean_equals_one_batch",
        ],
        "eight_devices/batch_norm": ["eight_devices_are_one"],
    },
    "updates beside gradients": {"variables": ["value_and_grad_inside_the_state"]},
    "refusals": {
        "variables": [
            "a_value_per_lane_is_refused_at_the_write_and_offers_two_answers",
            "apply_without_state_and_writes_under_apply_are_refused",
            "a_write_of_another_type_is_refused_at_the_write",
        ],
    },
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_capability_has_its_tests(capability):
    for file, tests in CAPABILITIES[capability].items():
        source = (FOLDER / f"{file}.py" if "/" in file else FOLDER / f"test_{file}.py").read_text()
        for test in tests:
            assert f"\ndef test_{test}(" in source, test


def test_every_test_is_under_the_leak_checker():
    assert jax.config.jax_check_tracer_leaks


def test_a_module_that_was_imported_before():
    """It has its own names of JAX's functions, and never heard of jaxstate."""
    program = """
        from jax.lax import cond, scan, while_loop
        from jax import grad, jit, vmap

        def library(f, n):
            _, ys = scan(lambda c, _: (c, f()), 0, length=n)
            zs = jit(lambda: vmap(lambda i: cond(i > 0, f, f))(jnp.arange(n)))()
            return ys, zs

        import jax, jax.numpy as jnp
        plain = library(lambda: jnp.float32(1), 3)
        import jaxstate
        key = jax.random.key(0)
        with jaxstate.rng_stream(key):
            found, lanes = library(lambda: jax.random.key_data(jaxstate.next_key()), 3)
        wanted = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3)]
        assert (found == jnp.stack(wanted)).all()
        assert len({tuple(k.tolist()) for k in [*found, *lanes]}) == 6
        again = library(lambda: jnp.float32(1), 3)
        assert all((a == b).all() for a, b in zip(plain, again))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@jaxstate.parametrized
def net(x):
    for width, name in ((3, "body"), (2, "head")):
        with jaxstate.scope(name):
            w = jaxstate.param("w", jax.nn.initializers.normal(1.0), (x.shape[-1], width))
            x = jnp.tanh(x @ w)
    return x


X = jnp.ones((2, 4))


def test_optimizers_take_masks_and_labels_written_by_hand(key):
    params = net.init(key, X)
    grads = jax.grad(lambda p: (net.apply(p, X) ** 2).sum())(params)
    mask = {"body": {"w": False}, "head": {"w": True}}
    labels = {"body": {"w": "slow"}, "head": {"w": "fast"}}
    rates = {"slow": 0.01, "fast": 1.0}
    for optimizer, body, head in (
        (optax.masked(optax.sgd(0.5), mask), 1.0, -0.5),  # masked out: passed on as it is
        (optax.multi_transform({k: optax.sgd(r) for k, r in rates.items()}, labels), -0.01, -1.0),
    ):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        np.testing.assert_allclose(updates["body"]["w"], body * grads["body"]["w"], rtol=1e-6)
        np.testing.assert_allclose(updates["head"]["w"], head * grads["head"]["w"], rtol=1e-6)


def test_a_tree_is_saved_and_loaded(key, tmp_path):
    params = net.init(key, X)
    flat = {}
    for scope, entries in params.items():
        flat |= {f"{scope}/{name}": np.asarray(array) for name, array in entries.items()}
    safetensors.numpy.save_file(flat, tmp_path / "params.safetensors")
    loaded = {}
    for path, array in safetensors.numpy.load_file(tmp_path / "params.safetensors").items():
        scope, name = path.split("/")
        loaded.setdefault(scope, {})[name] = array
    np.testing.assert_array_equal(net.apply(loaded, X), net.apply(params, X))


def test_a_tree_is_a_checkpoint_of_orbax(key, tmp_path):
    params = net.init(key, X)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "params")
    np.testing.assert_array_equal(net.apply(loaded, X), net.apply(params, X))


@pytest.mark.parametrize("carry", [jnp.zeros(16), {"h": jnp.zeros(16)}], ids=["array", "dict"])
def test_a_recurrent_model_of_characters_trains(key, carry):
    text = "to be or not to be, that is the question"
    letters = sorted(set(text))
    codes = jax.nn.one_hot(jnp.array([letters.index(c) for c in text]), len(letters))

    def step(w, carry, x):
        h = jnp.tanh(jnp.concatenate([*jax.tree.leaves(carry), x]) @ w["w"])
        return jax.tree.map(lambda _: h, carry), jax.nn.log_softmax(h @ w["out"])

    normal = jax.nn.initializers.normal(0.3)

    @jaxstate.parametrized
    def cell(carry, x):
        w = {
            "w": jaxstate.param("w", normal, (16 + len(letters), 16)),
            "out": jaxstate.param("out", normal, (16, len(letters))),
        }
        return step(w, carry, x)

    def loss(cell):
        return -(jax.lax.scan(cell, carry, codes[:-1])[1] * codes[1:]).sum(-1).mean()

    model = jaxstate.parametrized(lambda: loss(cell), name="model")
    params = model.init(key)

    def by_hand(params):
        return loss(lambda carry, x: step(params["cell"], carry, x))

    found, wanted = jax.grad(model.apply)(params), jax.grad(by_hand)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)

    optimizer = optax.adam(0.02)

    @jax.jit
    def train(params):
        def update(both, _):
            value, grads = jax.value_and_grad(model.apply)(both[0])
            updates, state = optimizer.update(grads, both[1])
            return (optax.apply_updates(both[0], updates), state), value

        return jax.lax.scan(update, (params, optimizer.init(params)), length=200)[1]

    losses = train(params)
    assert losses[-1] < 0.3 * losses[0]
