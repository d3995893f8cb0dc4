"""Parameters and variables: trees of state with names."""
