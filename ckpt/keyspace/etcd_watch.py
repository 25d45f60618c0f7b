"""Watches ranges of etcd's keys, on a thread of its own, over every loss of the stream.

``etcd3``'s own watcher isn't used: in the release that imports today its thread dies of a ``NameError`` when a stream ends, and
tells nobody. A server that hangs says nothing either, so the stream is asked how far it is, and is left when it doesn't answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import etcd3
import grpc
from etcd3 import etcdrpc

from ckpt.errors import CkptError
from ckpt.keyspace import etcd_words
from ckpt.keyspace.base import Keys
from ckpt.keyspace.etcd import EtcdCalls

BEHIND_MAX = 3
"""After how many words of a server that is behind what was seen it counts as a new one, which had its data wiped."""
PAUSE_S = 0.2
_JOIN_S = 10.0


class EtcdWatch:
    """``after``: all changes after that revision are seen. ``beat_s``: how often the stream is asked whether it lives."""

    def __init__(self, calls: EtcdCalls, root: str, ranges: tuple[Keys, ...], *, after: int, beat_s: float) -> None:
        self._calls = calls
        self.root = root
        self.ranges = ranges
        self.beat_s = beat_s
        self._changed = threading.Condition()
        self._since = after
        """All changes after this revision and up to ``_newest`` are counted in it."""
        self._newest = after
        self._resets = 0
        self._behind = 0
        self._stream: _Stream | None = None
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckpt-watch", daemon=True)
        self._thread.start()

    def wait(self, after: int, *, timeout_s: float) -> bool:
        """Whether something changed after that revision, or that can't be known; waits for it up to ``timeout_s``."""
        with self._changed:
            resets = self._resets
            return after < self._since or self._changed.wait_for(
                lambda: self._newest > after or self._resets != resets or self.stopping.is_set(), timeout_s
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
                self._stream = _Stream(self, self._calls.client(number), partial(self._uses, number))
                self._stream.read()
            except (grpc.RpcError, etcd3.exceptions.Etcd3Exception, CkptError):
                # Whatever it was, nothing is missed: the next stream begins where this one ended.
                self._calls.failed(number)
            self.stopping.wait(PAUSE_S)

    def _uses(self, number: int) -> bool:
        return self._calls.number == number

    def heard(self, response: etcdrpc.WatchResponse) -> bool:
        """Count what a stream says; False: it has to begin anew."""
        revision = response.header.revision
        with self._changed:
            if response.compact_revision:
                # Changes were forgotten: who looked before then has to look again.
                self._newest = max(self._newest, response.compact_revision)
                self._changed.notify_all()
                return False
            if response.events:
                self._newest = max(self._newest, *(event.kv.mod_revision for event in response.events))
                self._behind = 0
                self._changed.notify_all()
            elif 0 < revision < self._newest:
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


class _Stream:
    """One stream to one endpoint, as long as calls go there too (``used``).

    A member that is cut off from the others goes on to answer that nothing changes; calls are refused there, and go elsewhere.
    """

    def __init__(self, watch: EtcdWatch, client: etcd3.MultiEndpointEtcd3Client, used: Callable[[], bool]) -> None:
        self._watch = watch
        self._used = used
        self._ended = threading.Event()
        self._heard_s = time.monotonic()
        self._call = etcdrpc.WatchStub(client.channel).Watch(
            self._requests(), credentials=client.call_credentials, metadata=client.metadata
        )

    def read(self) -> None:
        """Until the stream ends. Raises grpc.RpcError."""
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
            yield etcd_words.watch_request(watch.root, keys, first)
        while not self._ended.wait(watch.beat_s):
            silent = time.monotonic() > self._heard_s + 2 * watch.beat_s
            if watch.stopping.is_set() or silent or not self._used():
                self._call.cancel()
                return
            yield etcd_words.progress_request()
