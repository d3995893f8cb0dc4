"""A plugin of pytest that runs every test of somebody else inside of open state.

    JAXSTATE_SUITE=state JAXSTATE_SUITE_RESULTS=results.json pytest -p jaxstate_tests.suites_plugin

A test runs inside of `apply_with_state` of a parametrized function with one parameter and one
variable, with a random stream and a slot open. With ``JAXSTATE_SUITE=plain`` it runs as it is, and
jaxstate is not imported. The outcome of each test is written to the file of results.
"""

import json
import os
import pathlib

STATE = os.environ.get("JAXSTATE_SUITE") == "state"
RESULTS = os.environ.get("JAXSTATE_SUITE_RESULTS")
outcomes: dict[str, str] = {}


def inside_of_state(run):
    """What ``run`` does, with all state open around it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxstate

    def test():
        jaxstate.param("w", jax.nn.initializers.ones, (), jnp.float32)
        jaxstate.variable("v", jnp.zeros, (), jnp.float32)
        run()

    def wrapped():
        values = {"w": np.float32(1.0)}, {"v": np.float32(0.0)}
        slot = jaxstate.extend.new_slot(np.float32(0.0))
        key = jax.random.key(0)
        jaxstate.parametrized(test, name="test").apply_with_state(*values, key=key)
        del slot

    return wrapped


def pytest_runtest_setup(item):
    # Also the test cases of unittest, which pytest does not call as functions.
    if STATE:
        item.runtest = inside_of_state(item.runtest)


def pytest_runtest_logreport(report):
    said = outcomes.get(report.nodeid)
    if said in (None, "passed") and (report.when == "call" or report.outcome != "passed"):
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    in_worker = hasattr(session.config, "workerinput")
    if RESULTS and not in_worker:
        pathlib.Path(RESULTS).write_text(json.dumps(outcomes, indent=1, sort_keys=True))
