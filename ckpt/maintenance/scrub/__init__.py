"""Scrubs: comparing all copies of a job on its stores, and repairing them."""
