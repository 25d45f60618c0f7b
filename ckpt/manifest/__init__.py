"""The records: their fields, versions, keys and canonical bytes."""
