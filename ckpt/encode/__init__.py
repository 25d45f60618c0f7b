"""Staged bytes become packs and a part: chunks, dedup, compression."""
