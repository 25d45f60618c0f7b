"""Several stores as one: an object is put to all, is durable on W of them, is read from the nearest
and repaired."""
