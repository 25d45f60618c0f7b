"""Garbage collection: dropping snapshots, and deleting bytes that no snapshot refers to."""
