"""Membership: contracts of keyspaces and members, a simulation, a keyspace in memory, fixtures."""
