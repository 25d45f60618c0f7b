"""Between the words of a keyspace and etcd's messages."""

from __future__ import annotations

from urllib.parse import quote

from etcd3 import etcdrpc

from ckpt.keyspace.base import (
    Compare,
    Delete,
    Equals,
    Exists,
    Keys,
    KeyValue,
    Leased,
    NoneOf,
    Outcome,
    Put,
    Transaction,
    Unchanged,
)


def root_of(job: str) -> str:
    """The prefix of a job's keys. A name that holds a slash can't reach into another job."""
    return f"/ckpt/{quote(job, safe='')}/"


def txn_request(root: str, transaction: Transaction) -> etcdrpc.TxnRequest:
    """The transaction as etcd takes it: in both branches the reads come last."""
    reads = [etcdrpc.RequestOp(request_range=_range(root, keys)) for keys in transaction.reads]
    return etcdrpc.TxnRequest(
        compare=[_compare(root, compare) for compare in transaction.when],
        success=[*(_op(root, op) for op in transaction.then), *reads],
        failure=reads,
    )


def outcome(root: str, transaction: Transaction, response: etcdrpc.TxnResponse) -> Outcome:
    """What etcd answered."""
    count = len(transaction.reads)
    reads = response.responses[len(response.responses) - count :]
    found = tuple(tuple(_found(root, kv) for kv in read.response_range.kvs) for read in reads)
    return Outcome(response.succeeded, response.header.revision, found, response.header.cluster_id)


def watch_request(root: str, keys: Keys, first: int) -> etcdrpc.WatchRequest:
    """Watch a range from the revision ``first`` on."""
    start, end = bounds(root, keys)
    created = etcdrpc.WatchCreateRequest(key=start, range_end=end, start_revision=first)
    return etcdrpc.WatchRequest(create_request=created)


def progress_request() -> etcdrpc.WatchRequest:
    """Ask a stream how far it is."""
    return etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest())


def bounds(root: str, keys: Keys) -> tuple[bytes, bytes]:
    """A range as etcd names it."""
    return (root + keys.start).encode(), (root + keys.end).encode() if keys.end else b""


def _range(root: str, keys: Keys) -> etcdrpc.RangeRequest:
    start, end = bounds(root, keys)
    return etcdrpc.RangeRequest(key=start, range_end=end, keys_only=not keys.values)


def _compare(root: str, compare: Compare) -> etcdrpc.Compare:
    kind = etcdrpc.Compare
    match compare:
        case Unchanged(key, revision):
            return kind(result=kind.EQUAL, target=kind.MOD, key=(root + key).encode(), mod_revision=revision)
        case NoneOf(keys):
            start, end = bounds(root, keys)
            return kind(result=kind.EQUAL, target=kind.CREATE, key=start, range_end=end, create_revision=0)
        case Exists(key):
            return kind(result=kind.GREATER, target=kind.CREATE, key=(root + key).encode(), create_revision=0)
        case Equals(key, value):
            return kind(result=kind.EQUAL, target=kind.VALUE, key=(root + key).encode(), value=value)
        case Leased(key, lease_id):
            return kind(result=kind.EQUAL, target=kind.LEASE, key=(root + key).encode(), lease=lease_id)


def _op(root: str, op: Put | Delete) -> etcdrpc.RequestOp:
    key = (root + op.key).encode()
    match op:
        case Put(_, value, lease_id):
            return etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=key, value=value, lease=lease_id))
        case Delete():
            return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key))


def _found(root: str, kv: etcdrpc.KeyValue) -> KeyValue:
    return KeyValue(kv.key.decode().removeprefix(root), kv.value, kv.create_revision, kv.mod_revision, kv.lease)
