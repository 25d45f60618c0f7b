"""Faults injected into jobs of several nodes, their history, and its checker."""
