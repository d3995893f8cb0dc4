"""The rows and columns of the table."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

FEATURES = {
    "ready_layers": "ready-made layers",
    "lazy_shapes": "shapes of parameters found by a first call",
    "sharing": "one module used twice has one set of parameters",
    "named_streams": "random streams by name, from one key",
    "optional_stream": "dropout that is off where there is no key",
    "interception": "a function around every call of a module",
    "intermediates": "all intermediate outputs of a network that does not know of it",
    "parameter_hooks": "parameters changed by name where they are used",
    "sown_in_loops": "values marked in a loop come out stacked",
    "planting": "a marked value is replaced from outside",
    "by_intermediate": "gradients with respect to a marked value",
    "axes": "axes of parameters named where they are made",
    "pieces": "parameters that enter a `shard_map` in pieces",
    "stacks": "a stack of layers, compiled once",
    "ensembles": "members side by side, each with its parameters",
    "loading": "some parameters by name, the rest is made",
    "flat_names": "flat names of parameters, and back",
    "random_variables": "state that starts at random",
    "collections": "the caller says which state may change",
    "merging": "one value of what lanes write to shared state",
    "names_in_hlo": "names of modules in compiled programs and profiles",
    "summaries": "a table of parameters and outputs",
    "in_place": "arrays written in place, in loops and branches of JAX",
    "objects": "attributes of objects assigned in jitted functions",
    "static_parts": "objects with arrays and other things through transformations",
    "donation": "state on the device is written in its memory",
    "traces": "a trace of one's own that sees every operation",
    "sampling": "sequences sampled without a cache in the model",
    "inference": "posterior samples of a probabilistic model",
}
COLUMNS = {
    "of_jaxstate": "jaxstate",
    "of_haiku": "Haiku",
    "of_linen": "linen",
    "of_nnx": "NNX",
    "of_equinox": "Equinox",
    "of_numpyro": "NumPyro",
    "of_references": "`jax.new_ref`",
}
PACKAGES = {
    "of_haiku": "haiku", "of_linen": "flax", "of_nnx": "flax", "of_equinox": "equinox",
    "of_numpyro": "numpyro",
}  # fmt: skip


def built_in(program: Callable[[], Any]) -> Callable[[], Any]:
    program.how = "built in"  # type: ignore[attr-defined]
    return program


def few_lines(program: Callable[[], Any]) -> Callable[[], Any]:
    program.how = "few lines"  # type: ignore[attr-defined]
    return program


def is_installed(column: str) -> bool:
    return importlib.util.find_spec(PACKAGES.get(column, "jax")) is not None


def programs(column: str) -> dict[str, Callable[[], Any]]:
    """The programs of a library, by feature."""
    module: ModuleType = importlib.import_module(f"jaxstate_tests.features.{column}")
    return {name: f for name, f in vars(module).items() if hasattr(f, "how")}


def table() -> Iterator[str]:
    yield "| feature | " + " | ".join(COLUMNS.values()) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    columns = [programs(column) for column in COLUMNS]
    for name, title in FEATURES.items():
        cells = [column[name].how if name in column else "no" for column in columns]
        yield f"| {title} | " + " | ".join(cells) + " |"
