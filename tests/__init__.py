"""A package by name, so that no other package called `tests` can take its place."""
