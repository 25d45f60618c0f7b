"""One node in its job: joins, watches, leads."""
