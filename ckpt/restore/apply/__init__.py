"""Restoring live objects in place."""
