"""The decorator, the Run that user functions receive, and its loop."""
