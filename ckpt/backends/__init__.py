"""Stores: where bytes rest. Six operations a store, and what users' URLs mean."""
