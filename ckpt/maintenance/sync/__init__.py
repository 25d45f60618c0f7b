"""Bringing a store to the state of others."""
