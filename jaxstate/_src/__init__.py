"""How jaxstate is made. Its map is in ``jaxstate/README.md``."""
