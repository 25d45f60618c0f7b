"""Who is in a job, who leads, which epoch holds: pure decisions over keys, leases and
transactions."""
