"""Wires the rooms: the public Checkpointer."""
