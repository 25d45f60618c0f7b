"""Which keyspace a job's membership lies in."""

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


def open_keyspace(where: EtcdOptions | Path, job: str) -> Keyspace:
    """The keys of ``job``: in etcd, or in this file of this machine, which is made where it is
    missing.

    Raises UsageError where etcd is asked for and its client isn't installed, UnavailableError.
    Connects at the first call.
    """
    if isinstance(where, Path):
        return SqliteKeyspace(where)
    if importlib.util.find_spec("etcd3") is None:
        raise UsageError("etcd needs its client. pip install 'torch-ckpt[etcd]'")
    # What grpc does in a child between fork and exec can abort it; a connection isn't used in
    # children anyway.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Loaded here only: grpc takes longer to import than a keeper may take to start.
    return cast(Keyspace, importlib.import_module("ckpt.keyspace.etcd").EtcdKeyspace(where, job))


def open_membership(
    where: EtcdOptions | Path,
    job: str,
    *,
    ttl_s: float = LEASE_TTL_S,
    witnesses_min: int = 2,
    on_act_until: Callable[[float], None] = lambda until_s: None,
) -> KeyspaceMembership:
    """What one node has of ``job``, before it joins; ``acts``: see KeyedMembership. Errors as in
    ``open_keyspace``.

    A call to one of etcd's endpoints gets no more time than leaves some to ask another before the
    lease runs out.
    """
    if isinstance(where, EtcdOptions):
        where = replace(where, call_s=min(where.call_s, leases.call_timeout_s(ttl_s)))
    return KeyspaceMembership(
        open_keyspace(where, job),
        job,
        ttl_s=ttl_s,
        witnesses_min=witnesses_min,
        on_act_until=on_act_until,
    )
