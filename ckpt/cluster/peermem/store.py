"""A peer's memory as a Backend."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from ckpt.backends.base import Buffer, Capabilities, Stat, check_key, check_prefix
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.channel import (
    BufferBody,
    EndedError,
    PeerTimeouts,
)
from ckpt.cluster.peermem.client import (
    CrowdedError,
    PeerCall,
    PeerConnection,
    PeerConnectionPool,
    PeerReply,
    no_check,
)
from ckpt.cluster.peermem.http import (
    BaseGoneError,
    ByteRange,
    PeerAnswer,
    StoredContent,
    encode_ranges,
    ranges_problem,
    slice_ranges,
)
from ckpt.errors import (
    CkptError,
    FencedError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.rate_limit import RateLimit

_ERRORS: MappingProxyType[int, tuple[type[CkptError], str]] = MappingProxyType(
    {
        400: (UnavailableError, "the peer does not understand; run one version on all nodes"),
        401: (StoreDeniedError, "the peer could not authenticate this request"),
        403: (UsageError, "the peer's own objects are read-only"),
        404: (NotFoundError, "no such object"),
        409: (FencedError, "a newer epoch is open"),
        412: (KeyExistsError, "the key is taken; read it to learn whose bytes it holds"),
        413: (StoreFullError, "the object is larger than the peer accepts"),
        416: (IntegrityError, "the object ends too early; read another copy"),
        421: (UnavailableError, "the peer was restarted, and its objects are gone"),
        424: (BaseGoneError, "the peer does not have the base any more; put the whole object"),
        503: (CrowdedError, "the peer has no free place"),
        507: (StoreFullError, "the peer's memory is used up; delete there or raise its budget"),
    }
)


def refusal_error(answer: PeerAnswer, *, key: str, url: str) -> CkptError | None:
    """The error to raise for ``answer``; None if it is no refusal."""
    if answer.status < 300:
        return None
    kind, text = _ERRORS.get(answer.status, (UnavailableError, "the peer refuses"))
    return kind(
        f"{text}. key={key} store={url} status={answer.status} epoch={answer.epoch} "
        f"why={answer.why!r}"
    )


READ_BYTES_BEST = 1 << 20
"""A request costs about as much as moving a fifth of this."""

CROWDED_FIRST_S, CROWDED_LAST_S = 0.02, 0.5
"""Pauses before a full peer is asked again: doubled from the first to the last."""

_ENTRIES = msgspec.json.Decoder(list[tuple[str, int, int]])


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerClientLimits:
    """Limits of one PeerStore; times in seconds.

    ``connections_max``: connections at once to one peer. ``pool_wait_s``: how long a call waits for
    one of them. ``idle_s``: how long one is kept unused, less than servers keep them.
    ``crowded_s``: how long a full peer is asked again. Reads of ``stream_bytes_min`` and more are
    split into up to ``streams_max`` parallel ones.
    """

    connections_max: int = 8
    connect_s: float = 5.0
    pool_wait_s: float = 60.0
    idle_s: float = 30.0
    crowded_s: float = 10.0
    streams_max: int = 4
    stream_bytes_min: int = 32 << 20
    timeouts: PeerTimeouts = field(default_factory=PeerTimeouts)


class PeerStore:
    """The objects of the peer at ``endpoint``, for holders of ``secret``. Thread-safe; connects
    when needed.

    Each request carries the epoch that ``epoch`` returns at that moment. ``cap`` limits the rate of
    puts, and may be shared with other stores. All objects are gone when the peer's server ends;
    ``boot`` tells one incarnation of it from another.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        secret: PeerSecret,
        *,
        epoch: Callable[[], int],
        cap: RateLimit | None = None,
        limits: PeerClientLimits | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._epoch = epoch
        self._cap = cap
        self._limits = limits = limits or PeerClientLimits()
        self.boot: str | None = None
        """The incarnation of the server that answered last; None before any did."""

        def opener() -> PeerConnection:
            connection = PeerConnection.open(
                endpoint, secret, connect_s=limits.connect_s, timeouts=limits.timeouts
            )
            self.boot = connection.boot
            return connection

        self._pool = PeerConnectionPool(
            opener,
            connections_max=limits.connections_max,
            wait_s=limits.pool_wait_s,
            idle_s=limits.idle_s,
        )

    @property
    def url(self) -> str:
        """``peer://host:port``, for messages; ``peers:`` over TLS."""
        return f"{'peer' if self._endpoint.tls is None else 'peers'}://{self._endpoint}"

    def capabilities(self) -> Capabilities:
        """``create_only`` holds among all writers to one incarnation of the server."""
        return Capabilities(
            create_only=True,
            read_bytes_best=READ_BYTES_BEST,
            concurrency_best=min(4, self._limits.connections_max),
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Durable as long as the peer's server runs. Copies nothing.

        Beside Backend's errors raises FencedError if the peer knows a newer epoch.
        """
        self.put_lent(key, data, no_check, create_only=create_only)

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        check_unchanged: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        """As ``put``, of memory that its owner may change meanwhile: then ``check_unchanged``
        raises.

        It is called when all bytes are sent and before their tag, without which the peer stores
        nothing.
        """
        self._put(key, BufferBody(data), check_unchanged, create_only=create_only)

    def put_whole(
        self, key: str, data: Sequence[Buffer], check_unchanged: Callable[[], None] = no_check
    ) -> StoredContent:
        """As ``put_lent``; returns what the peer stores now, as the base of a later put."""
        return self._put(key, BufferBody(data), check_unchanged)

    def put_changed(
        self,
        key: str,
        data: Sequence[Buffer],
        *,
        base: StoredContent,
        changed: Sequence[ByteRange],
        check_unchanged: Callable[[], None] = no_check,
    ) -> StoredContent:
        """As ``put_whole``, but only the ranges ``changed`` of ``data`` are read and sent; the rest
        is the base's.

        ``changed`` ascends without overlap, at most RANGES_MAX ranges. The peer keeps both objects
        meanwhile, and copies what did not change. Raises BaseGoneError, and stores nothing, if the
        peer no longer has ``base``: then put the whole object. Raises UsageError for invalid ranges
        and a base of another length.
        """
        size_bytes = sum(memoryview(buffer).nbytes for buffer in data)
        problem = ranges_problem(changed, size_bytes=size_bytes)
        if problem is None and base.size_bytes != size_bytes:
            problem = (
                f"a base of another length. base_bytes={base.size_bytes} size_bytes={size_bytes}"
            )
        if problem is not None:
            raise UsageError(f"{problem} key={key}; put it whole")
        body = BufferBody([encode_ranges(changed), *slice_ranges(data, changed)])
        return self._put(key, body, check_unchanged, base=base, ranges=len(changed))

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """Receives straight into ``out``, which is garbage if this raises.

        Large reads are parallel.

        Raises IntegrityError also if the bytes don't match the peer's tag.
        """
        check_key(key)
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        flat = out.cast("B")
        if not flat:
            if self.stat(key) is None:
                raise NotFoundError(f"no such object. key={key} store={self.url}")
            return
        streams = min(
            self._limits.streams_max,
            self._limits.connections_max,
            max(1, len(flat) // self._limits.stream_bytes_min),
        )
        if streams == 1 or not self._read_parallel(key, flat, offset_bytes, streams):
            self._read(key, flat, offset_bytes)

    def stat(self, key: str) -> Stat | None:
        check_key(key)
        try:
            answer = self._call(PeerCall(verb="HEAD", key=key)).answer
        except NotFoundError:
            return None
        return Stat(key, answer.size_bytes or 0, answer.modified_unix_s)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """Makes one request for each page of up to 1,000 entries."""
        check_prefix(prefix)
        more = True
        while more:
            reply = self._call(PeerCall(verb="LIST", key=prefix, after=after))
            try:
                entries = _ENTRIES.decode(reply.body)
            except msgspec.MsgspecError as error:
                raise IntegrityError(f"not a listing. store={self.url} cause={error}") from error
            for key, size_bytes, modified_us in entries:
                yield Stat(key, size_bytes, modified_us / 1_000_000)
            more = reply.answer.more and bool(entries)
            after = entries[-1][0] if entries else after

    def delete(self, key: str) -> None:
        check_key(key)
        self._call(PeerCall(verb="DELETE", key=key))

    def close(self) -> None:
        self._pool.close()

    def _put(
        self,
        key: str,
        body: BufferBody,
        check_unchanged: Callable[[], None],
        *,
        create_only: bool = False,
        base: StoredContent | None = None,
        ranges: int = 0,
    ) -> StoredContent:
        check_key(key)
        call = PeerCall(
            verb="PUT",
            key=key,
            body=body,
            check_unchanged=check_unchanged,
            create_only=create_only,
            base=base,
            ranges=ranges,
        )
        answer = self._call(call).answer
        size_bytes = body.size_bytes if base is None else base.size_bytes
        return StoredContent(
            key=key, size_bytes=size_bytes, version=answer.version, boot=answer.boot
        )

    def _read(self, key: str, out: memoryview, offset_bytes: int) -> tuple[str, int]:
        """Read one range; returns incarnation and version of the content that it is of."""
        answer = self._call(
            PeerCall(verb="GET", key=key, span=(offset_bytes, len(out)), out=out)
        ).answer
        return answer.boot, answer.version

    def _read_parallel(self, key: str, out: memoryview, offset_bytes: int, streams: int) -> bool:
        """Read in ``streams`` ranges at once; False if the object was replaced in between."""
        size = -(-len(out) // streams)
        with ThreadPoolExecutor(streams - 1, thread_name_prefix="ckpt-peer-read") as threads:
            others = [
                threads.submit(self._read, key, out[at : at + size], offset_bytes + at)
                for at in range(size, len(out), size)
            ]
            contents = {self._read(key, out[:size], offset_bytes)}
            contents |= {other.result() for other in others}
        return len(contents) == 1

    def _call(self, call: PeerCall) -> PeerReply:
        """Make one call, repeated for a while if the peer has no free place."""
        until_s = time.monotonic() + self._limits.crowded_s
        pause_s = CROWDED_FIRST_S
        while True:
            try:
                return self._ask(call)
            except CrowdedError:
                if time.monotonic() + pause_s > until_s:
                    raise
            # Random, since all refused clients come again, and should not come at once.
            time.sleep(random.uniform(0.5, 1.0) * pause_s)
            pause_s = min(2 * pause_s, CROWDED_LAST_S)

    def _ask(self, call: PeerCall) -> PeerReply:
        """Make one call, once more if the peer had closed the idle connection that it used."""
        for attempt in range(2):
            with self._pool.connection(fresh=attempt > 0) as (connection, used):
                try:
                    reply = connection.request(call, epoch=self._epoch(), rate_limit=self._cap)
                except TimeoutError as error:
                    raise UnavailableError(
                        f"a peer is silent or too slow. {self._described(call)} cause={error}"
                    ) from error
                except (OSError, EndedError) as error:
                    if attempt == 0 and used and not connection.answered:
                        # A request without an answer is repeated. It can have taken effect only if
                        # it is harmless twice: a put with ``create_only`` waits for the go-ahead.
                        continue
                    # Without an answer: if too many connect at once, a peer closes connections that
                    # have made no request yet.
                    kind = UnavailableError if connection.answered else CrowdedError
                    raise kind(
                        f"the connection broke. {self._described(call)} cause={error}"
                    ) from error
            if (refusal := refusal_error(reply.answer, key=call.key, url=self.url)) is not None:
                raise refusal
            return reply
        raise UnavailableError(f"the peer closes every connection. {self._described(call)}")

    def _described(self, call: PeerCall) -> str:
        return f"operation={call.verb} key={call.key} store={self.url}"
