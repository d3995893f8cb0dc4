"""Random streams: keys that nobody has to split or pass."""
