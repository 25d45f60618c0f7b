"""Opening the keyspace and the membership of a job.

A module of its own because it imports sqlite3, and etcd's client on first use: what a keeper loads
at its start must not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from ckpt.cluster.membership import leases
from ckpt.cluster.membership.member import LEASE_TTL_S, KeyspaceMembership
from ckpt.errors import UsageError
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Keyspace
from ckpt.keyspace.sqlite import SqliteKeyspace


def open_keyspace(location: EtcdOptions | Path, job: str) -> Keyspace:
    """The keys of ``job``: in etcd, or in a file of this machine, created if it is missing.

    Connects at the first call.

    Raises UsageError if etcd is asked for and its client is not installed, UnavailableError.
    """
    if isinstance(location, Path):
        return SqliteKeyspace(location)
    if importlib.util.find_spec("etcd3") is None:
        raise UsageError("etcd needs its client. pip install 'torch-ckpt[etcd]'")
    # On a busy machine grpc's fork support aborted a child between fork and exec. A connection
    # isn't used in children.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Imported here only: importing grpc takes longer than a keeper may take to start.
    etcd = importlib.import_module("ckpt.keyspace.etcd")
    return cast(Keyspace, etcd.EtcdKeyspace(location, job))


def open_membership(
    location: EtcdOptions | Path,
    job: str,
    *,
    ttl_s: float = LEASE_TTL_S,
    witnesses_min: int = 2,
    on_act_until: Callable[[float], None] = lambda until_s: None,
) -> KeyspaceMembership:
    """This node's membership of ``job``, not joined yet. Raises as ``open_keyspace``.

    ``on_act_until``: see KeyspaceMembership.
    """
    if isinstance(location, EtcdOptions):
        # One endpoint gets so little time that another can be asked before the lease expires.
        location = replace(location, call_s=min(location.call_s, leases.call_timeout_s(ttl_s)))
    return KeyspaceMembership(
        open_keyspace(location, job),
        job,
        ttl_s=ttl_s,
        witnesses_min=witnesses_min,
        on_act_until=on_act_until,
    )
