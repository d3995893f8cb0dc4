"""Values that a function marks, and what collects and replaces them."""
