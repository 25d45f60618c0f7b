"""Trying a store out, and saying what is wrong with it."""
