"""Leaves copied into shared-memory slots, with a digest of each block."""
