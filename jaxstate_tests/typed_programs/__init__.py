"""Programs as users write them, for type checkers: `make types` checks them, strictly.

What is wrong in `wrong` is marked with the errors that pyright and mypy have to report there; a
mark without its error is an error too.
"""
