"""Copies of staged state in the memory of other nodes. Imported if a job has several nodes."""
