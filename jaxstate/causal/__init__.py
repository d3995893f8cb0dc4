"""The fixed point of a causal function, with each element of each intermediate value computed once."""
