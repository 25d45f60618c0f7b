"""Keys with revisions, leases and transactions: in etcd, or in a SQLite file on one machine."""
