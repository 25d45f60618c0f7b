"""Making staged snapshots durable, and the epochs of the log. Imported when first needed."""
