"""Live objects to named leaves."""
