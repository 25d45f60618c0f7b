"""A keyspace in etcd: calls over several endpoints, messages, watches.

Imported lazily, by programs that use etcd only: importing grpc takes longer than the rest of the
package.

``etcd3``'s own support for several endpoints is not used. It skips an endpoint after a failure by
the wall clock, so that with two of three silent the third may never be asked, and it blames the
endpoint in use when an answer arrives, not the one that was asked. Here one client per endpoint is
used.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar
from urllib.parse import quote

import etcd3
import grpc
from etcd3 import etcdrpc

from ckpt.errors import (
    CkptError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.keyspace.address import EtcdOptions, split_endpoint
from ckpt.keyspace.base import (
    Compare,
    Delete,
    Equals,
    Exists,
    Grant,
    Keys,
    KeyValue,
    Leased,
    NoneOf,
    Put,
    Transaction,
    TransactionResult,
    Unchanged,
)

T = TypeVar("T")

TRIES_MAX = 5
"""How many endpoints one call asks before it reports that none answered."""

_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # grpc also limits connecting to this
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 256 << 20),
]
"""Reconnect quickly; accept the answer for a job of many thousand nodes."""

_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_AUTH_TEXTS = ("auth", "user name is empty", "revision of auth store is old")


class EtcdClient:
    """Calls to one of several etcd endpoints. Thread-safe.

    Belongs to the process that made it: grpc's connections do not survive a fork.
    """

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._clients: dict[int, etcd3.MultiEndpointEtcd3Client] = {}
        self._number = 0
        self._pid = os.getpid()
        self._closed = False
        self._tls = _credentials(options)

    @property
    def number(self) -> int:
        """The number of the endpoint in use."""
        return self._number

    def call(self, ask: Callable[[etcd3.MultiEndpointEtcd3Client], T], *, operation: str) -> T:
        """The answer of the first endpoint that gives one; the request must be harmless if done
        twice.

        Raises UnavailableError if none answered, else the error that a refusing answer means.
        """
        answers: list[str] = []
        for _ in range(min(TRIES_MAX, len(self._options.endpoints) + 1)):
            number = self._number
            try:
                return self._ask(ask, self.client(number))
            except (etcd3.exceptions.Etcd3Exception, grpc.RpcError) as error:
                if (refusing := _refusal(error, operation)) is not None:
                    raise refusing from error
                answers.append(f"{self._options.endpoints[number]}: {_text(error)}")
                self.failed(number)
        raise UnavailableError(
            f"etcd did not answer. asked={operation} answers={answers} repeat later"
        )

    def _ask(
        self,
        ask: Callable[[etcd3.MultiEndpointEtcd3Client], T],
        client: etcd3.MultiEndpointEtcd3Client,
    ) -> T:
        try:
            return ask(client)
        except ValueError as error:  # what grpc raises where another thread closed the connection
            if not self._closed:
                raise
            raise UnavailableError("the connection to etcd was closed") from error
        except (etcd3.exceptions.Etcd3Exception, grpc.RpcError) as error:
            if self._options.user is None or not _stale_token(error):
                raise
        self._login(client)
        return ask(client)  # once only: a second refusal is reported

    def failed(self, number: int) -> None:
        """Use the next endpoint from now on, unless another thread switched already."""
        with self._lock:
            if self._number == number:
                self._number = (number + 1) % len(self._options.endpoints)

    def client(self, number: int) -> etcd3.MultiEndpointEtcd3Client:
        """The client of one endpoint, connected on first use.

        Raises UsageError in a fork, UnavailableError after ``close``, and what grpc raises.
        """
        if os.getpid() != self._pid:
            raise UsageError(
                "a connection to etcd does not outlive a fork. make it in the process that uses it"
            )
        with self._lock:
            if self._closed:
                raise UnavailableError("the connection to etcd was closed")
            client = self._clients.get(number)
        if client is not None:
            return client
        made = self._make(number)
        with self._lock:
            client = self._clients.setdefault(number, made)
        if client is not made:
            made.close()
        return client

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()

    def _make(self, number: int) -> etcd3.MultiEndpointEtcd3Client:
        host, port = split_endpoint(self._options.endpoints[number])
        endpoint = etcd3.Endpoint(
            host,
            port,
            secure=self._tls is not None,
            creds=self._tls,
            time_retry=float("-inf"),
            opts=_OPTIONS,
        )
        try:
            client = etcd3.MultiEndpointEtcd3Client(
                [endpoint],
                timeout=self._options.call_s,
                user=self._options.user,
                password=self._options.password,
            )
        except grpc.RpcError:
            endpoint.close()
            raise
        # The login's token is in the metadata too; without TLS grpc refuses to send credentials.
        client.call_credentials = None
        return client

    def _login(self, client: etcd3.MultiEndpointEtcd3Client) -> None:
        """Get a new token. The connection stays: other threads may be using it."""
        request = etcdrpc.AuthenticateRequest(
            name=self._options.user, password=self._options.password
        )
        answer = client.authstub.Authenticate(request, client.timeout)
        client.metadata = (("token", answer.token),)


def _credentials(options: EtcdOptions) -> grpc.ChannelCredentials | None:
    if options.ca is None:
        return None
    try:
        parts = [
            None if path is None else path.read_bytes()
            for path in (options.ca, options.key, options.cert)
        ]
    except OSError as error:
        raise UsageError(f"a file for etcd's TLS can't be read. why={error}") from error
    return grpc.ssl_channel_credentials(*parts)


def _code(error: Exception) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.RpcError) else None


def _text(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error.__context__, grpc.RpcError):  # etcd3's own exceptions drop the text
        return _text(error.__context__)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _stale_token(error: Exception) -> bool:
    """Whether a new login may help: tokens expire, and a restarted server forgets them."""
    return _code(error) in _DENIED and "token" in _text(error)


def _refusal(error: Exception, operation: str) -> CkptError | None:
    """The error for an answer that any endpoint would give; None: ask another endpoint."""
    code, text = _code(error), _text(error)
    if code in _DENIED or (
        code is grpc.StatusCode.INVALID_ARGUMENT and any(part in text for part in _AUTH_TEXTS)
    ):
        return StoreDeniedError(
            f"etcd refuses. asked={operation} why={text} check user, password and roles"
        )
    if code is grpc.StatusCode.NOT_FOUND and "lease" in text:
        return NotFoundError(f"no such lease. asked={operation} join anew")
    if code is grpc.StatusCode.INVALID_ARGUMENT or (
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text
    ):
        return UsageError(f"etcd can't take that. asked={operation} why={text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in text:
        return StoreFullError(
            f"etcd is full. asked={operation} why={text} compact and defragment it, or raise its "
            "quota"
        )
    return None


# ---- messages: a keyspace's operations as etcd's


def key_prefix(job: str) -> str:
    """The prefix of a job's keys. It is quoted, so a slash in the name cannot reach another job."""
    return f"/ckpt/{quote(job, safe='')}/"


def txn_request(root: str, transaction: Transaction) -> etcdrpc.TxnRequest:
    """The transaction as etcd's message: in both branches the reads are last."""
    reads = [etcdrpc.RequestOp(request_range=_range(root, keys)) for keys in transaction.reads]
    return etcdrpc.TxnRequest(
        compare=[_compare(root, compare) for compare in transaction.when],
        success=[*(_op(root, op) for op in transaction.then), *reads],
        failure=reads,
    )


def transaction_result(
    root: str, transaction: Transaction, response: etcdrpc.TxnResponse
) -> TransactionResult:
    """The result in etcd's answer."""
    count = len(transaction.reads)
    reads = response.responses[len(response.responses) - count :]
    reads_found = tuple(
        tuple(_key_value(root, kv) for kv in read.response_range.kvs) for read in reads
    )
    return TransactionResult(
        response.succeeded, response.header.revision, reads_found, response.header.cluster_id
    )


def watch_request(root: str, keys: Keys, first: int) -> etcdrpc.WatchRequest:
    """A request to watch a range from the revision ``first`` on."""
    start, end = bounds(root, keys)
    created = etcdrpc.WatchCreateRequest(key=start, range_end=end, start_revision=first)
    return etcdrpc.WatchRequest(create_request=created)


def progress_request() -> etcdrpc.WatchRequest:
    """A request for the stream's current revision."""
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
            return kind(
                result=kind.EQUAL, target=kind.MOD, key=(root + key).encode(), mod_revision=revision
            )
        case NoneOf(keys):
            start, end = bounds(root, keys)
            return kind(
                result=kind.EQUAL, target=kind.CREATE, key=start, range_end=end, create_revision=0
            )
        case Exists(key):
            return kind(
                result=kind.GREATER,
                target=kind.CREATE,
                key=(root + key).encode(),
                create_revision=0,
            )
        case Equals(key, value):
            return kind(
                result=kind.EQUAL, target=kind.VALUE, key=(root + key).encode(), value=value
            )
        case Leased(key, lease_id):
            return kind(
                result=kind.EQUAL, target=kind.LEASE, key=(root + key).encode(), lease=lease_id
            )


def _op(root: str, op: Put | Delete) -> etcdrpc.RequestOp:
    key = (root + op.key).encode()
    match op:
        case Put(_, value, lease_id):
            return etcdrpc.RequestOp(
                request_put=etcdrpc.PutRequest(key=key, value=value, lease=lease_id)
            )
        case Delete():
            return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key))


def _key_value(root: str, kv: etcdrpc.KeyValue) -> KeyValue:
    return KeyValue(
        kv.key.decode().removeprefix(root), kv.value, kv.create_revision, kv.mod_revision, kv.lease
    )


# ---- watches: changes of keys, across lost streams

BEHIND_MAX = 3
"""After this many answers below a revision already seen, the server counts as one with new data."""
PAUSE_S = 0.2
"""Pause before a lost stream is opened again."""
_JOIN_S = 10.0


class EtcdWatch:
    """Watches ranges of keys on its own thread, across lost streams.

    ``after``: all changes after that revision are seen. ``beat_s``: how often the stream is probed.
    ``etcd3``'s own watcher is not used: in the current release its thread dies of a ``NameError``
    when a stream ends, without an error to the caller. A hanging server is silent too, so the
    stream is probed, and left if it does not answer.
    """

    def __init__(
        self, calls: EtcdClient, root: str, ranges: tuple[Keys, ...], *, after: int, beat_s: float
    ) -> None:
        self._calls = calls
        self.root = root
        self.ranges = ranges
        self.beat_s = beat_s
        self._changed = threading.Condition()
        self._since = after
        """All changes after this revision and up to ``_newest`` are reflected in ``_newest``."""
        self._newest = after
        self._resets = 0
        self._behind = 0
        self._stream: _WatchStream | None = None
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-watch", daemon=True)
        self._thread.start()

    def wait(self, after: int, *, timeout_s: float) -> bool:
        """Whether something changed after that revision, or that is unknown; waits up to
        ``timeout_s``."""
        with self._changed:
            resets = self._resets
            return after < self._since or self._changed.wait_for(
                lambda: self._newest > after or self._resets != resets or self.stopping.is_set(),
                timeout_s,
            )

    def close(self) -> None:
        """End the thread."""
        self.stopping.set()
        with self._changed:
            self._changed.notify_all()
        if (stream := self._stream) is not None:
            stream.end()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        while not self.stopping.is_set():
            number = self._calls.number
            try:
                self._stream = _WatchStream(
                    self, self._calls.client(number), partial(self._uses, number)
                )
                self._stream.read()
            except (grpc.RpcError, etcd3.exceptions.Etcd3Exception, CkptError):
                # No change is missed: the next stream starts at the revision where this one ended.
                self._calls.failed(number)
            self.stopping.wait(PAUSE_S)

    def _uses(self, number: int) -> bool:
        return self._calls.number == number

    def heard(self, response: etcdrpc.WatchResponse) -> bool:
        """Take in a message of the stream; False: the stream must be opened anew."""
        revision = response.header.revision
        with self._changed:
            if response.compact_revision:
                # Changes up to this revision were compacted away, so waiters must read again.
                self._newest = max(self._newest, response.compact_revision)
                self._changed.notify_all()
                return False
            if response.events:
                self._newest = max(
                    self._newest, *(event.kv.mod_revision for event in response.events)
                )
                self._behind = 0
                self._changed.notify_all()
            elif 0 < revision < self._newest:
                # A member may lag behind another one for a moment; a wiped cluster stays behind.
                self._behind += 1
            else:
                self._behind = 0
            if self._behind >= BEHIND_MAX:
                self._behind = 0
                self._since = self._newest = revision
                self._resets += 1
                self._changed.notify_all()
                return False
            return not response.canceled

    @property
    def first(self) -> int:
        with self._changed:
            return self._newest + 1


class _WatchStream:
    """One stream to one endpoint, for as long as calls use that endpoint too (``used``).

    A member that is cut off from its cluster keeps answering that nothing changes. Calls to it fail
    and move to another endpoint, and the stream follows them.
    """

    def __init__(
        self, watch: EtcdWatch, client: etcd3.MultiEndpointEtcd3Client, used: Callable[[], bool]
    ) -> None:
        self._watch = watch
        self._used = used
        self._ended = threading.Event()
        self._heard_s = time.monotonic()
        self._call = etcdrpc.WatchStub(client.channel).Watch(
            self._requests(), credentials=client.call_credentials, metadata=client.metadata
        )

    def read(self) -> None:
        """Read until the stream ends. Raises grpc.RpcError."""
        try:
            for response in self._call:
                self._heard_s = time.monotonic()
                if not self._watch.heard(response):
                    return
        finally:
            self.end()

    def end(self) -> None:
        """End the stream."""
        self._ended.set()
        self._call.cancel()

    def _requests(self) -> Iterator[etcdrpc.WatchRequest]:
        watch = self._watch
        first = watch.first
        for keys in watch.ranges:
            yield watch_request(watch.root, keys, first)
        while not self._ended.wait(watch.beat_s):
            silent = time.monotonic() > self._heard_s + 2 * watch.beat_s
            if watch.stopping.is_set() or silent or not self._used():
                self._call.cancel()
                return
            yield progress_request()


# ---- the keyspace


class EtcdKeyspace:
    """The keys of one job in etcd. Thread-safe, in the process that made it only."""

    def __init__(self, options: EtcdOptions, job: str) -> None:
        self._options = options
        self._root = key_prefix(job)
        self._calls = EtcdClient(options)
        self._lock = threading.Lock()
        self._watches: dict[tuple[Keys, ...], EtcdWatch] = {}
        self._closed = False

    def transact(self, transaction: Transaction) -> TransactionResult:
        """A transaction that only reads is linearizable too: etcd asks its majority first."""
        request = txn_request(self._root, transaction)

        def ask(client: etcd3.MultiEndpointEtcd3Client) -> TransactionResult:
            response = client.kvstub.Txn(
                request,
                client.timeout,
                credentials=client.call_credentials,
                metadata=client.metadata,
            )
            return transaction_result(self._root, transaction, response)

        return self._calls.call(ask, operation="transaction")

    def grant(self, lease_id: int, ttl_s: float) -> Grant:
        """etcd counts whole seconds, and may grant more than asked."""

        def ask(client: etcd3.MultiEndpointEtcd3Client) -> float:
            try:
                return float(client.lease(math.ceil(ttl_s), lease_id).ttl)
            except etcd3.exceptions.PreconditionFailedError:  # an earlier try made it
                return float(client.get_lease_info(lease_id).grantedTTL)

        return Grant(lease_id, self._calls.call(ask, operation="lease"))

    def renew(self, lease_id: int) -> float:
        def ask(client: etcd3.MultiEndpointEtcd3Client) -> float:
            answers = list(client.refresh_lease(lease_id))
            if not answers:
                raise etcd3.exceptions.ConnectionFailedError
            return float(answers[-1].TTL)

        return self._calls.call(ask, operation="keepalive")

    def revoke(self, lease_id: int) -> None:
        try:
            self._calls.call(
                lambda client: client.revoke_lease(lease_id), operation="end of a lease"
            )
        except NotFoundError:
            return

    def wait(self, ranges: tuple[Keys, ...], after: int, *, timeout_s: float) -> bool:
        """The first wait for some ranges starts a watch of them."""
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
        with self._lock:
            self._closed = True
            watches = list(self._watches.values())
        for watch in watches:
            watch.close()
        self._calls.close()
