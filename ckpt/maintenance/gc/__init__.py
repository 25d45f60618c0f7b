"""Dropping snapshots and deleting bytes that no snapshot refers to."""
