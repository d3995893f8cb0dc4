"""Timings against hand-written JAX that does the same. ``python -m jaxstate_tests.bench`` runs all.

Both sides run interleaved in one process; a figure is the median over repeats of the time per call,
and what counts is the ratio.
"""
