"""Every test runs under the leak checker, unless it is marked ``leaks_allowed`` with a reason."""

import gc

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
