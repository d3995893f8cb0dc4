"""How random programs are drawn: the same ones in `make test`, new ones in `make fuzz`."""

import os
import time

import jax
from hypothesis import HealthCheck, Phase, given, seed, settings

SETTINGS = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
AT_ONCE = 100


def drawn(number, examples, *strategies):
    """Runs a check on so many examples, always the same ones for a number."""

    def run(check):
        seed(number)(settings(SETTINGS, max_examples=examples)(given(*strategies)(check)))()

    return run


def fuzz(check, *strategies):
    """New examples for as many minutes as the environment variable FUZZ_MINUTES says.

    The seeds are printed, so that the variable FUZZ_SEED can name the one of a counterexample.
    """
    minutes = float(os.environ.get("FUZZ_MINUTES", "1"))
    start = number = int(os.environ.get("FUZZ_SEED") or time.time_ns() % 10**9)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        print(f"FUZZ_SEED={number}", flush=True)
        drawn(number, AT_ONCE, *strategies)(check)
        jax.clear_caches()
        number += 1
    print(f"{AT_ONCE * (number - start)} programs")
