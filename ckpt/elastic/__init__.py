"""The decorator, the training loop's run, and what a failure means."""
