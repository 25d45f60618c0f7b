"""Sending a request to a replica, and to another one if need be.

A request is tried on one replica after the other until one answers, its deadline passes, or it must
not be repeated. Replicas are probed meanwhile, so one that is stopped or cut off is noticed though
its connections stay open.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from ckpt.errors import AnswerLostError, DeadlineError, NotFoundError, OverloadedError
from ckpt.serve.front.decide import AttemptEnd, goes_elsewhere, refusal
from ckpt.serve.front.health import PROBE_EVERY_S, PROBE_TIMEOUT_S
from ckpt.serve.front.targets import ReplicaTarget, ReplicaTargets
from ckpt.serve.headers import BUSY, DEADLINE_MS, HEALTH, NOT_HANDLED

CONNECT_S = 1.0
IDLE_S = 15.0
"""Connections are closed after so long; replicas keep them longer, so none is closed under a
request."""
BUFFER_BYTES_MAX = 1 << 20
"""An answer of known length up to this is read whole before any of it is passed on, so a replica
that dies in the middle costs nothing."""
PART_BYTES_MAX = 64 << 10
PAUSE_S = 0.02
"""Between two looks for a replica that can take a request, while there is none."""


@dataclass(frozen=True, slots=True)
class DispatchedRequest:
    """A request as it is sent to replicas. ``left_s``: how long its answer is of use."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    repeatable: bool
    left_s: float
    generation: str | None = None


@dataclass(slots=True)
class DispatchedReply:
    """A replica's answer. ``body`` None: read it from ``response``, then ``close``."""

    status: int
    headers: Mapping[str, str]
    body: bytes | None
    response: aiohttp.ClientResponse
    target: ReplicaTarget
    size_bytes: int
    """Of the request; it is outstanding until its answer is read."""
    tries: int = 1

    def close(self) -> None:
        """End reading: give the connection back, or cut it off if something of it is not read."""
        self.response.release()
        self.target.ended(self.size_bytes)


@dataclass(slots=True)
class DispatchCounts:
    """What a dispatcher did beside the plain sending."""

    held: int = 0
    retries: int = 0
    hedges: int = 0
    refused: int = 0


@dataclass(slots=True)
class _Tries:
    """The tries of one request."""

    running: dict[asyncio.Task[DispatchedReply], ReplicaTarget] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    """Those of the tried that had too much to do."""
    count: int = 0


class _TryFailed(Exception):  # noqa: N818  never leaves this module
    def __init__(self, end: AttemptEnd, why: str) -> None:
        super().__init__(why)
        self.end = end


def _sendable(body: bytes) -> bytes | io.BytesIO | None:
    """A body as aiohttp sends it without holding the event loop: a long one in parts."""
    return io.BytesIO(body) if len(body) > PART_BYTES_MAX else body or None


def _close_unused(task: asyncio.Task[DispatchedReply]) -> None:
    """The answer of a try that another one outran."""
    if not task.cancelled() and task.exception() is None and task.result().body is None:
        task.result().close()


class Dispatcher:
    """Sends requests to the replicas of ``targets``. Made and used in a running event loop.

    ``queue``: how many requests are held at a time. ``hedge_s``: after so long without an answer a
    repeatable request goes to a second replica too, and the first answer counts; 0: never.
    """

    def __init__(self, targets: ReplicaTargets, *, queue: int, hedge_s: float = 0.0) -> None:
        self.targets = targets
        self.counts = DispatchCounts()
        self._queue = queue
        self._hedge_s = hedge_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
        )
        self._probing = asyncio.get_running_loop().create_task(self._probe())

    async def close(self) -> None:
        """End probing and all connections."""
        self._probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._probing
        await self._session.close()
        await asyncio.sleep(0)  # closed transports let go of their sockets in the loop's next turn

    async def __aenter__(self) -> Dispatcher:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- requests

    async def send(self, request: DispatchedRequest) -> DispatchedReply:
        """The answer of a replica, whatever its status.

        Raises OverloadedError if it was begun nowhere, NotFoundError, DeadlineError, and
        AnswerLostError if it was sent, got no answer and must not be repeated.
        """
        able = self.targets.usable(request.generation)
        why = refusal(
            self.counts.held, self.targets.loads(able), queue=self._queue, left_s=request.left_s
        )
        if why:
            self.counts.refused += 1
            raise OverloadedError(why)
        self.counts.held += 1
        tries = _Tries()
        try:
            return await self._until_answered(request, tries)
        finally:
            self.counts.held -= 1
            for task in tries.running:
                task.cancel()
                task.add_done_callback(_close_unused)

    async def _until_answered(self, request: DispatchedRequest, tries: _Tries) -> DispatchedReply:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + request.left_s
        while True:
            if not tries.running and not self._begin(request, tries, deadline_s):
                await self._wait_for_one(request, tries, deadline_s)
                continue
            hedges = self._hedge_s > 0 and request.repeatable and len(tries.running) == 1
            left_s = deadline_s - loop.time()
            done, _ = await asyncio.wait(
                tries.running,
                timeout=min(left_s, self._hedge_s) if hedges else left_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                reply = self._ended(request, tries, task)
                if reply is not None:
                    reply.tries = tries.count
                    return reply
            if not done and loop.time() >= deadline_s:
                raise DeadlineError(
                    f"no answer in time. path={request.path} deadline_s={request.left_s:g} "
                    f"replicas={[target.name for target in tries.running.values()]}"
                )
            if not done and self._begin(request, tries, deadline_s):
                self.counts.hedges += 1

    def _begin(self, request: DispatchedRequest, tries: _Tries, deadline_s: float) -> bool:
        """Start a try on a replica that was not tried yet; whether there is one."""
        able = [
            target
            for target in self.targets.usable(request.generation)
            if target.name not in tries.tried
        ]
        if not able:
            return False
        target = self.targets.choose(able)
        tries.tried.add(target.name)
        if tries.count and not tries.running:
            self.counts.retries += 1
        tries.count += 1
        task = asyncio.get_running_loop().create_task(self._try(request, target, deadline_s))
        tries.running[task] = target
        if request.repeatable:
            target.attempts.add(task)
            task.add_done_callback(target.attempts.discard)
        return True

    async def _wait_for_one(
        self, request: DispatchedRequest, tries: _Tries, deadline_s: float
    ) -> None:
        """All that can serve were tried, or there is none: wait for one that can, and try again.

        Raises what ``send`` raises if that is no use.
        """
        if request.generation is not None and not self.targets.usable(request.generation):
            raise NotFoundError(
                "no serving replica has that generation in memory. "
                f"generation={request.generation} kept={self.targets.generations()}"
            )
        if tries.tried and tries.tried == tries.busy:
            self.counts.refused += 1
            raise OverloadedError("every replica has too much to do")
        if asyncio.get_running_loop().time() >= deadline_s:
            raise OverloadedError(f"no replica could take it in time. tries={tries.count}")
        # Nothing of it was begun, or it may be repeated: a standby is about to serve.
        tries.tried.clear()
        tries.busy.clear()
        await asyncio.sleep(PAUSE_S)

    def _ended(
        self,
        request: DispatchedRequest,
        tries: _Tries,
        task: asyncio.Task[DispatchedReply],
    ) -> DispatchedReply | None:
        """A try is over: its answer, or None if the request goes elsewhere."""
        target = tries.running.pop(task)
        if task.cancelled():
            failed = _TryFailed("broken", target.health.dead or "cancelled")
        elif isinstance(error := task.exception(), _TryFailed):
            failed = error
        else:
            return task.result()  # raises a defect of ours as it is
        if failed.end == "not-handled" and str(failed) == BUSY:
            tries.busy.add(target.name)
        if goes_elsewhere(failed.end, repeatable=request.repeatable):
            return None
        raise AnswerLostError(
            f"the replica was lost while it computed. replica={target.name} path={request.path} "
            f"why={failed}; send it again if that does no harm"
        )

    async def _try(
        self, request: DispatchedRequest, target: ReplicaTarget, deadline_s: float
    ) -> DispatchedReply:
        """One try on one replica. Raises _TryFailed."""
        loop = asyncio.get_running_loop()
        begun_s, size = loop.time(), len(request.body)
        outstanding = target.begun(size)
        given = CIMultiDict(request.headers)
        given[DEADLINE_MS] = str(max(1, int((deadline_s - begun_s) * 1e3)))
        whole = True
        try:
            response = await self._session.request(
                request.method,
                # As it came: nothing of the path is quoted anew, or shortened.
                URL(f"http://{target.record.address}{request.path}", encoded=True),
                data=_sendable(request.body),
                headers=given,
                allow_redirects=False,
            )
            length = response.content_length
            whole = request.method == "HEAD" or (length is not None and length <= BUFFER_BYTES_MAX)
            body = await response.read() if whole else None
        except (aiohttp.ClientConnectorError, ValueError) as error:
            # A ValueError is of an address that is none; the path came through a server's parser.
            self.targets.signal(target, "refused")
            raise _TryFailed("refused", str(error)) from error
        except aiohttp.ConnectionTimeoutError as error:
            self.targets.signal(target, "refused")
            raise _TryFailed("refused", "no connection in time") from error
        except (aiohttp.ClientError, OSError) as error:
            self.targets.signal(target, "failed")
            raise _TryFailed("broken", f"{type(error).__name__}: {error}") from error
        finally:
            if whole:
                target.ended(size)
        reason = response.headers.get(NOT_HANDLED) if response.status == 503 else None
        failed = response.status >= 500 and reason is None
        self.targets.signal(target, "failed" if failed else "answered")
        if reason is not None:
            raise _TryFailed("not-handled", reason)
        target.took(loop.time() - begun_s, outstanding)
        return DispatchedReply(response.status, response.headers, body, response, target, size)

    # ---- probes

    async def _probe(self) -> None:
        """Probe each replica for ever, each in its own rhythm: one that hangs delays no other."""
        probing: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for target in self.targets:
                    if target.name not in probing:
                        probe = self._probe_once(target)
                        probing[target.name] = asyncio.get_running_loop().create_task(probe)
                self.targets.look_at_health()
                await asyncio.sleep(PROBE_EVERY_S)
                probing = {name: task for name, task in probing.items() if not task.done()}
        finally:
            for task in probing.values():
                task.cancel()
            await asyncio.gather(*probing.values(), return_exceptions=True)

    async def _probe_once(self, target: ReplicaTarget) -> None:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with self._session.get(
                f"http://{target.record.address}{HEALTH}", timeout=timeout
            ) as response:
                await response.read()
        except (aiohttp.ClientError, OSError, ValueError, asyncio.TimeoutError):
            self.targets.signal(target, "probe-failed")
        else:
            self.targets.signal(target, "probe-answered")
