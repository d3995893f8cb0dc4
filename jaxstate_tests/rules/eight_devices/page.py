"""The page about many devices, with many devices."""

import pathlib

import jax
import numpy as np
import pytest

from jaxstate_tests.rules.eight_devices.common import P
from jaxstate_tests.test_docs import python_source

PAGE = pathlib.Path(__file__).parents[3] / "docs/devices.md"


@pytest.mark.leaks_allowed("what f closes over is sliced in a shard_map, which leaks in JAX alone")
def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = {"__name__": "__main__"}
    exec(compile(python_source(PAGE), str(PAGE), "exec"), page)

    def piece(x):
        return x.addressable_shards[0].data.shape

    made, restored = page["mlp_params"], page["restored"]
    assert piece(made["up"]) == (4, 4) and piece(made["down"]) == (4, 4)
    assert piece(restored["up"]) == (2, 8) and piece(restored["down"]) == (8, 2)
    assert piece(page["params"]["layer"]["w"]) == (1, 8)

    sharding = jax.NamedSharding(page["line"], P("stage"))
    params = jax.device_put(page["deep_params"], sharding)
    assert piece(params["layers"]["w"]) == (2, 4, 4)
    compiled = page["run"].lower(params, page["batches"]).compile()
    assert "collective-permute" in compiled.as_text() and "all-gather" not in compiled.as_text()
    x, (w,) = np.asarray(page["batches"]), jax.tree.leaves(jax.tree.map(np.asarray, params))
    for layer in w:
        x = x + np.tanh(x @ layer)
    np.testing.assert_allclose(compiled(params, page["batches"]), x, rtol=1e-5)
