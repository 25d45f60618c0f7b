"""A keyspace in etcd. Imports grpc, which takes longer than the rest of the room together: only for who uses etcd."""

from __future__ import annotations

import math
import threading

import etcd3

from ckpt.errors import NotFoundError
from ckpt.keyspace import etcd_words
from ckpt.keyspace.base import Grant, Keys, Outcome, Transaction
from ckpt.keyspace.etcd import EtcdCalls
from ckpt.keyspace.etcd_options import EtcdOptions
from ckpt.keyspace.etcd_watch import EtcdWatch


class EtcdKeyspace:
    """See Keyspace. Safe to be called from several threads, by the process that made it only."""

    def __init__(self, options: EtcdOptions, job: str) -> None:
        self._options = options
        self._root = etcd_words.root_of(job)
        self._calls = EtcdCalls(options)
        self._lock = threading.Lock()
        self._watches: dict[tuple[Keys, ...], EtcdWatch] = {}
        self._closed = False

    def transact(self, transaction: Transaction) -> Outcome:
        """See Keyspace. One of reads only is linearizable as well: etcd asks its majority first."""
        request = etcd_words.txn_request(self._root, transaction)

        def ask(client: etcd3.MultiEndpointEtcd3Client) -> Outcome:
            response = client.kvstub.Txn(
                request, client.timeout, credentials=client.call_credentials, metadata=client.metadata
            )
            return etcd_words.outcome(self._root, transaction, response)

        return self._calls.call(ask, what="transaction")

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        """See Keyspace. etcd counts in whole seconds, and grants no less than it finds sensible."""

        def ask(client: etcd3.MultiEndpointEtcd3Client) -> float:
            try:
                return float(client.lease(math.ceil(ttl_s), lease_id).ttl)
            except etcd3.exceptions.PreconditionFailedError:  # an earlier try made it
                return float(client.get_lease_info(lease_id).grantedTTL)

        return Grant(lease_id, self._calls.call(ask, what="lease"))

    def renew(self, lease_id: int) -> float:
        """See Keyspace."""

        def ask(client: etcd3.MultiEndpointEtcd3Client) -> float:
            answers = list(client.refresh_lease(lease_id))
            if not answers:
                raise etcd3.exceptions.ConnectionFailedError
            return float(answers[-1].TTL)

        return self._calls.call(ask, what="keepalive")

    def revoke(self, lease_id: int) -> None:
        """See Keyspace."""
        try:
            self._calls.call(lambda client: client.revoke_lease(lease_id), what="end of a lease")
        except NotFoundError:
            return

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        """See Keyspace. The first wait for some ranges begins to watch them."""
        with self._lock:
            if self._closed:
                return False
            watch = self._watches.get(ranges)
            if watch is None:
                watch = self._watches[ranges] = EtcdWatch(
                    self._calls, self._root, ranges, after=after, beat_s=2 * self._options.call_s
                )
        return watch.wait(after, timeout_s=timeout_s)

    def close(self) -> None:
        """See Keyspace."""
        with self._lock:
            self._closed = True
            watches = list(self._watches.values())
        for watch in watches:
            watch.close()
        self._calls.close()
