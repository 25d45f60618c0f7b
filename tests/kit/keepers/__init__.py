"""Keepers for tests: a real one in this process, a stand-in, makers of slots, a simulated
roster."""
