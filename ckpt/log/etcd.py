"""etcd as what gives out the places of a log, for stores that don't create a key only once and a job of several machines.

One transaction a claim: it puts the whole record, if neither this place nor a later one was given out. That the place before is
nobody's to change any more is the claimer's to know (``several`` brings the last record to W stores first), so the transaction
need not ask for it; and an etcd that lost its data goes on from the first claim: nothing there has to be filled by hand. The
epoch inside each record fences its writer, as with everything that gives out places.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ckpt.cluster.membership.open import open_keyspace
from ckpt.errors import UnavailableError, UsageError
from ckpt.format.records import BY_ETCD
from ckpt.ipc.cluster_spec import nodes_of_environment
from ckpt.keyspace.address import etcd_of, where_of
from ckpt.keyspace.base import Delete, Keys, Keyspace, NoneOf, Put, Transaction
from ckpt.keyspace.etcd_options import EtcdOptions
from ckpt.log.sequencer import Claimed, Lost, Unknown

SEQUENCER_VARIABLE = "CKPT_SEQUENCER"
"""Names an etcd for programs and commands that no launcher of nodes told of one."""

ETCD_RECORDS_KEPT = 256
"""How many of the last records are kept; older ones are on their stores for long."""

_LOG = "log/"
_END = "log0"
"""Behind every place: "0" follows "/"."""


def etcd_here() -> EtcdOptions | None:
    """The etcd that this process's environment names, or None. Raises UsageError."""
    if address := os.environ.get(SEQUENCER_VARIABLE):
        return etcd_of(address)
    spec = nodes_of_environment()
    where = where_of(spec) if spec is not None else None
    return where if isinstance(where, EtcdOptions) else None


class EtcdSequencer:
    """See Sequencer. Each call connects anew, for a connection does not outlive a fork; thread-safe."""

    def __init__(self, options: EtcdOptions, log_id: str) -> None:
        self._options = options
        self._job = f"log {log_id}"

    @property
    def name(self) -> str:
        """What a ``stores`` record calls this etcd: the id of its cluster, which survives all but its making. Unavailable."""
        with self._opened() as keys:
            return f"{BY_ETCD}{keys.transact(Transaction(reads=(Keys(_LOG),))).service:x}"

    def claim(self, seq: int, data: bytes) -> Claimed | Lost | Unknown:
        """See Sequencer."""
        key = f"{_LOG}{seq:020d}"
        drop = (Delete(f"{_LOG}{seq - ETCD_RECORDS_KEPT:020d}"),) if seq >= ETCD_RECORDS_KEPT else ()
        try:
            with self._opened() as keys:
                done = keys.transact(
                    Transaction((NoneOf(Keys(key, _END)),), (Put(key, data), *drop), (Keys(key), _top(key)))
                )
        except UnavailableError as error:
            return Unknown(str(error))
        (mine, later) = done.found
        if done.held:
            return Claimed()
        if mine:
            return Claimed() if mine[0].value == data else Lost(mine[0].value)
        nexts = int(later[-1].key.removeprefix(_LOG)) + 1 if later else seq
        return Unknown(f"the place was given out long ago; the log is to be read again. seq={seq} next={nexts}")

    @contextmanager
    def _opened(self) -> Iterator[Keyspace]:
        keys = open_keyspace(self._options, self._job)
        try:
            yield keys
        finally:
            keys.close()


def _top(key: str) -> Keys:
    return Keys(key, _END, values=False)


def require_etcd(log_id: str, name: str) -> EtcdSequencer:
    """The etcd that gives out a log's places, which ``name`` calls it. Raises UsageError where it is another, or none."""
    options = etcd_here()
    if options is None:
        raise UsageError(
            f"etcd gives out the places of this log, and nobody said where it is. sequencer={name}; set "
            f"{SEQUENCER_VARIABLE}=etcd://host:port,host:port, or take over with `ckpt stores takeover`"
        )
    found = EtcdSequencer(options, log_id)
    if (here := found.name) != name:
        raise UsageError(
            f"another etcd gives out the places of this log. sequencer={name} this_one={here} "
            f"endpoints={list(options.endpoints)}; name that one, or take over with `ckpt stores takeover`"
        )
    return found
