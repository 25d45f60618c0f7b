"""Servers of peer memory, raw clients, a proxy, certificates."""
