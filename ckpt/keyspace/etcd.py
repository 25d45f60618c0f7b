"""Calls to one of several etcd endpoints: which one is asked, what its errors mean, and who is asked next.

One client of ``etcd3`` for each endpoint. That library's own way to several endpoints isn't used: it forgets an endpoint for a
time by the wall clock, so that with two of them silent the third may never be asked, and it blames whichever endpoint is in use
when an answer comes, not the one that was asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import etcd3
import grpc
from etcd3 import etcdrpc

from ckpt.errors import CkptError, NotFoundError, StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.keyspace.etcd_options import EtcdOptions, split_endpoint

T = TypeVar("T")

TRIES_MAX = 5
"""How many endpoints one call asks before silence is reported."""

_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # how long connecting may take, too
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 256 << 20),
]
"""Connect again soon; and see a job of many thousand nodes at once."""

_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_AUTH_WORDS = ("auth", "user name is empty", "revision of auth store is old")


class EtcdCalls:
    """Safe to be called from several threads. Belongs to the process that made it: what grpc has does not outlive a fork."""

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
        """Which endpoint is asked now."""
        return self._number

    def call(self, ask: Callable[[etcd3.MultiEndpointEtcd3Client], T], *, what: str) -> T:
        """The answer of the first endpoint that gives one; what is asked must be harmless when it is done twice.

        Raises UnavailableError where none did, and what an answer that refuses means.
        """
        whys: list[str] = []
        for _ in range(min(TRIES_MAX, len(self._options.endpoints) + 1)):
            number = self._number
            try:
                return self._ask(ask, self.client(number))
            except (etcd3.exceptions.Etcd3Exception, grpc.RpcError) as error:
                if (refusal := _refusal(error, what)) is not None:
                    raise refusal from error
                whys.append(f"{self._options.endpoints[number]}: {_text(error)}")
                self.failed(number)
        raise UnavailableError(f"etcd did not answer. asked={what} answers={whys} repeat later")

    def _ask(self, ask: Callable[[etcd3.MultiEndpointEtcd3Client], T], client: etcd3.MultiEndpointEtcd3Client) -> T:
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
        return ask(client)

    def failed(self, number: int) -> None:
        """Ask the next endpoint from now on, if this one is still the one that is asked."""
        with self._lock:
            if self._number == number:
                self._number = (number + 1) % len(self._options.endpoints)

    def client(self, number: int) -> etcd3.MultiEndpointEtcd3Client:
        """The client of one endpoint. Raises UsageError in a fork, UnavailableError once closed, and as grpc does."""
        if os.getpid() != self._pid:
            raise UsageError("a connection to etcd does not outlive a fork. make it in the process that uses it")
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
            host, port, secure=self._tls is not None, creds=self._tls, time_retry=float("-inf"), opts=_OPTIONS
        )
        try:
            client = etcd3.MultiEndpointEtcd3Client(
                [endpoint], timeout=self._options.call_s, user=self._options.user, password=self._options.password
            )
        except grpc.RpcError:
            endpoint.close()
            raise
        # The login's token goes in the metadata too; grpc refuses to send it as a credential where there is no TLS.
        client.call_credentials = None
        return client

    def _login(self, client: etcd3.MultiEndpointEtcd3Client) -> None:
        """Get a new token. The connection stays: other threads may be using it."""
        request = etcdrpc.AuthenticateRequest(name=self._options.user, password=self._options.password)
        answer = client.authstub.Authenticate(request, client.timeout)
        client.metadata = (("token", answer.token),)


def _credentials(options: EtcdOptions) -> grpc.ChannelCredentials | None:
    if options.ca is None:
        return None
    try:
        parts = [None if path is None else path.read_bytes() for path in (options.ca, options.key, options.cert)]
    except OSError as error:
        raise UsageError(f"a file for etcd's TLS can't be read. why={error}") from error
    return grpc.ssl_channel_credentials(*parts)


def _code(error: Exception) -> grpc.StatusCode | None:
    return error.code() if isinstance(error, grpc.RpcError) else None


def _text(error: BaseException) -> str:
    if isinstance(error, grpc.RpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error.__context__, grpc.RpcError):  # the library says less than what it heard
        return _text(error.__context__)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _stale_token(error: Exception) -> bool:
    """Whether a new login may help: tokens run out, and are forgotten by a server that starts anew."""
    return _code(error) in _DENIED and "token" in _text(error)


def _refusal(error: Exception, what: str) -> CkptError | None:
    """The error for an answer that another endpoint would give as well; None: ask another one."""
    code, text = _code(error), _text(error)
    if code in _DENIED or (code is grpc.StatusCode.INVALID_ARGUMENT and any(word in text for word in _AUTH_WORDS)):
        return StoreDeniedError(f"etcd refuses. asked={what} why={text} look at user, password and roles")
    if code is grpc.StatusCode.NOT_FOUND and "lease" in text:
        return NotFoundError(f"no such lease. asked={what} join anew")
    if code is grpc.StatusCode.INVALID_ARGUMENT or (
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text
    ):
        return UsageError(f"etcd can't take that. asked={what} why={text}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "space" in text:
        return StoreFullError(f"etcd is full. asked={what} why={text} compact and defragment it, or raise its quota")
    return None
