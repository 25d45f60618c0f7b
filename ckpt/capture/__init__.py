"""Live objects become named leaves, and stored leaves find their live objects again."""
