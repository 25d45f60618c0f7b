"""One training process's use of one store: saving, staging, restoring."""
