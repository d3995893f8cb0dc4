"""What several libraries can do, each cell with the program that shows it.

    python -m jaxstate_tests.features

prints the table of docs/comparison.md. A file of this folder is a column: a function with the name
of a feature is a program that uses it. A feature without a program is one that the library does not
have, as far as its documentation says.
"""
