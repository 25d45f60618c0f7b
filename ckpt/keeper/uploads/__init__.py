"""Making staged snapshots durable, and the epochs of the log."""
