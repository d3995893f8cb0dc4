"""Fixed points of causal functions, with each element of each value computed once."""
