"""Authenticated connections between the keepers of a job's nodes."""
