"""Examinations of stores: probes, and findings with advice."""
