"""Keys, leases and transactions: etcd, or an SQLite file of one machine."""
