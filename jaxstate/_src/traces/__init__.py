"""Traces that see every operation and carry a state of their own."""
