"""Every test runs under the leak checker, unless it is marked ``leaks_allowed`` with a reason.

XLA compiles quickly, not well, unless a test is marked ``optimized``: what it makes is looked at.
"""

import functools
import gc
import os
import tempfile
from importlib import metadata

# XLA 0.10 compiles small CPU programs in half the time without these. Later versions do not know
# the flag, and an unknown flag ends the process.
if metadata.version("jaxlib").startswith("0.10."):
    _FLAG = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"

import jax
import pytest
from jax._src import dispatch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not part of `make test`; see the Makefile")
    config.addinivalue_line(
        "markers", "leaks_allowed(reason): the leak checker would change what is tested"
    )
    config.addinivalue_line("markers", "optimized: for what XLA makes when it does its best")
    _keep_compiled_programs(config)
    _keep_compiled_operations()


def _keep_compiled_programs(config):
    """In a directory of this process, until it ends.

    Under the leak checker JAX keeps nothing in memory, and compiles every operation at every call.
    """
    directory = tempfile.TemporaryDirectory()
    config.add_cleanup(directory.cleanup)
    jax.config.update("jax_compilation_cache_dir", directory.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _keep_compiled_operations():
    """An operation that JAX computes at once traces nothing of the user's, so it leaks nothing."""
    compiled = dispatch.xla_primitive_callable

    @jax.checking_leaks.func(False)
    def run(operation, *operands):
        return operation(*operands)

    @jax.checking_leaks.func(False)
    def kept(primitive, **params):
        return functools.partial(run, compiled(primitive, **params))

    dispatch.xla_primitive_callable = kept


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


@pytest.fixture(autouse=True)
def _quick_compilation(request):
    quick = not request.node.get_closest_marker("optimized")
    if jax.config.values["jax_disable_most_optimizations"] != quick:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # programs in memory are found whatever they were compiled with


@pytest.fixture
def key():
    return jax.random.key(0)
