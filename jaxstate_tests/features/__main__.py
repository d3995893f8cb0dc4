from jaxstate_tests.features.table import table

print(*table(), sep="\n")
