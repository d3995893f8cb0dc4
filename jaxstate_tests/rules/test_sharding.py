"""Many devices: the files in `eight_devices`, each in a process with eight host devices, and two
processes that train one model together."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxstate_tests.rules.eight_devices import by_hand

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "jaxstate_tests/rules/eight_devices"
HELPERS = ("__init__", "by_hand", "common")
# Run by `make matrix`.
LONG = (
    "batch_norm", "devices", "jit_options", "model", "pieces", "policies", "regions", "transformer",
)  # fmt: skip
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)


def environment(flags=""):
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    return {**os.environ, "PYTHONPATH": python_path, "XLA_FLAGS": flags}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FILES],
)
def test_on_eight_devices(name):
    file = FOLDER / f"{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(
        command, env=environment("--xla_force_host_platform_device_count=8"), cwd=ROOT,
        check=False, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def run_together(path, timeout):
    """The example on two processes with four devices each; their outputs."""
    address = f"localhost:{free_port()}"
    started = []
    try:
        for i in range(2):
            command = [sys.executable, by_hand.EXAMPLE, "--process", str(i), "--of", "2",
                       "--coordinator", address, "--save", path]  # fmt: skip
            started.append(
                subprocess.Popen(
                    command, env=environment(), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    assert [process.returncode for process in started] == [0, 0], outputs
    return outputs


def test_two_processes_train_one_model(tmp_path):
    path = tmp_path / "trained.npz"
    outputs = run_together(path, timeout=600)
    for output in outputs:
        assert output.count("keeps             71,684 bytes (27%)") == 4
    example = by_hand.load_example()
    params, state, losses = by_hand.train(example, *example.init(jax.random.key(0)), example.STEPS)
    with np.load(path) as saved:
        np.testing.assert_allclose(saved["losses"], losses, rtol=1e-3)
        for i, wanted in enumerate(jax.tree.leaves((params, state))):
            np.testing.assert_allclose(saved[f"arr_{i}"], wanted, rtol=1e-2, atol=1e-3)
