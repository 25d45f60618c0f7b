"""Copies of staged state in the memory of other nodes."""
