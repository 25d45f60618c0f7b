"""Syncs: making a store a full replica of others."""
