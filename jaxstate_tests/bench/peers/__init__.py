"""The benchmark models, once for each way to write them. See `jaxstate_tests.bench.models`."""
