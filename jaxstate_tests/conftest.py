"""Every test runs under the leak checker, unless it is marked ``leaks_allowed`` with a reason."""

import gc
import os
from importlib import metadata

# XLA 0.10 compiles small CPU programs in half the time without these. Later versions do not know
# the flag, and an unknown flag ends the process.
if metadata.version("jaxlib").startswith("0.10."):
    _FLAG = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"

import jax
import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not part of `make test`; see the Makefile")
    config.addinivalue_line(
        "markers", "leaks_allowed(reason): the leak checker would change what is tested"
    )


@pytest.fixture(autouse=True)
def _small_heap():
    """The leak checker asks who refers to a trace, which looks at every object that is not frozen.

    Nothing that was there before a test can be a leak of that test.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _leak_checker(request, _small_heap):
    if request.node.get_closest_marker("leaks_allowed"):
        yield
        return
    with jax.checking_leaks():
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
