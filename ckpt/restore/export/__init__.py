"""Snapshots written as files of other libraries."""
