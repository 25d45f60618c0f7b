"""Copies of staged state in the memory of other nodes. Imported only for a job with several nodes."""
