"""Making staged snapshots durable, and the epochs of the log. Imported when they are first needed."""
