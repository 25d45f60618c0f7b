"""Stored boxes meet needed boxes: plan, read, verify, hand over."""
