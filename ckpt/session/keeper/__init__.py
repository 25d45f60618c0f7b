"""A training process's connection to its keeper."""
