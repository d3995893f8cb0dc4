"""Arrays that are written in place."""
