"""All keyspaces keep one contract: in memory, in a file, in etcd."""

from __future__ import annotations

from kit.membership.keyspace_contract import KeyspaceContract


class TestKeyspaces(KeyspaceContract):
    pass
