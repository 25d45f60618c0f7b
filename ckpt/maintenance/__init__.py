"""Maintenance of stores: retention, garbage collection, scrubs, replicas and sets of stores."""
