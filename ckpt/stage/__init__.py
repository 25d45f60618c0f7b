"""Shared-memory slots, and the copy of live tensors into them."""
