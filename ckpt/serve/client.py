"""A client that picks the replicas of a group itself: no front in between.

    client = ckpt.serve.Client("etcd://h1:2379,h2:2379,h3:2379/chat")
    reply = client.post("/predict", json=[0.5], repeatable=True)
    reply.json(), reply.generation

It does what a front does: probes replicas, sends to one that is alive and has little to do, and
sends to another one what was not begun or may be repeated.
"""

from __future__ import annotations

import asyncio
import json as json_text
import random
import threading
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from ckpt.errors import UnavailableError, UsageError
from ckpt.events import Emit, emit_to_logging
from ckpt.serve import headers as names
from ckpt.serve.front.decide import repeatable as may_be_repeated
from ckpt.serve.front.dispatch import DispatchedRequest, Dispatcher
from ckpt.serve.front.policies import POLICIES
from ckpt.serve.front.targets import ReplicaTargets
from ckpt.serve.group.member import GroupMember, open_group
from ckpt.serve.group.records import GroupView

DEADLINE_S = 30.0
QUEUE = 1024
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClientReply:
    """A replica's answer. ``tries``: how many replicas were asked."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    tries: int

    @property
    def generation(self) -> str:
        """The generation that computed it; empty if none did."""
        return self.headers.get(names.GENERATION, "")

    @property
    def replica(self) -> str:
        """The replica that computed it."""
        return self.headers.get(names.REPLICA, "")

    def json(self) -> object:
        """The body as JSON. Raises UsageError if it is none."""
        try:
            return json_text.loads(self.body)
        except ValueError as error:
            raise UsageError(f"the answer is no JSON. status={self.status} why={error}") from error


class Client:
    """Requests to the group ``group``: ``NAME`` on this machine, or ``etcd://host:port,.../NAME``.

    Thread-safe; ``close`` it, or use it in a ``with`` block. ``policy``: a name of POLICIES.
    ``hedge_s``: after so long a repeatable request goes to a second replica too; 0: never. It reads
    the group's records and writes nothing. Raises UsageError.
    """

    def __init__(
        self,
        group: str,
        *,
        policy: str = next(iter(POLICIES)),
        queue: int = QUEUE,
        hedge_s: float = 0.0,
        emit: Emit | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise UsageError(f"no such policy. policy={policy} policies={sorted(POLICIES)}")
        keyspace = open_group(group)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="ckpt-client", daemon=True
        )
        self._thread.start()
        self._targets = ReplicaTargets(POLICIES[policy], clock=self._loop.time, draw=random.random)
        self._dispatcher = self._wait(_made(self._targets, queue, hedge_s))
        self._member = GroupMember(
            keyspace, wanted=None, emit=emit or emit_to_logging(0), on_view=self._see
        )

    def get(
        self,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        generation: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> ClientReply:
        """See ``request``."""
        return self.request(
            "GET", path, headers=headers, generation=generation, deadline_s=deadline_s
        )

    def post(
        self,
        path: str,
        *,
        body: bytes = b"",
        json: object = None,
        repeatable: bool = False,
        generation: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> ClientReply:
        """See ``request``. ``json``: the body, instead of ``body``."""
        return self.request(
            "POST",
            path,
            body=body if json is None else json_text.dumps(json).encode(),
            repeatable=repeatable,
            generation=generation,
            deadline_s=deadline_s,
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        repeatable: bool = False,
        generation: str | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> ClientReply:
        """The answer of a replica, whatever its status.

        ``repeatable``: it does no harm if the request is computed twice; requests with such a
        method, or to a path that the program declared so, are anyhow. ``generation``: the one that
        must compute it. Waits for a replica until the deadline.

        Raises OverloadedError (nothing was begun), DeadlineError, NotFoundError (no replica has
        that generation in memory), and AnswerLostError (it was sent, its replica was lost, and it
        must not be repeated).
        """
        if not self._thread.is_alive():
            raise UnavailableError("the client is closed; make another one")
        if not (path.startswith("/") and path.isascii() and path.isprintable()) or " " in path:
            raise UsageError(f"a path begins with / and is quoted as in a URL. path={path!r}")
        given = dict(headers or {})
        if generation is not None:
            given[names.GENERATION] = generation
        return self._wait(
            self._send(
                method,
                path,
                given,
                body,
                repeatable=repeatable,
                generation=generation,
                deadline_s=deadline_s,
            )
        )

    async def _send(
        self,
        method: str,
        path: str,
        given: Mapping[str, str],
        body: bytes,
        *,
        repeatable: bool,
        generation: str | None,
        deadline_s: float,
    ) -> ClientReply:
        route = path.partition("?")[0]
        request = DispatchedRequest(
            method,
            path,
            given,
            body,
            repeatable or may_be_repeated(method, route, given, self._targets.paths()),
            deadline_s,
            generation,
        )
        reply = await self._dispatcher.send(request)
        if reply.body is not None:
            return ClientReply(reply.status, reply.headers, reply.body, reply.tries)
        try:
            whole = await asyncio.wait_for(reply.response.read(), deadline_s)
        finally:
            reply.close()
        return ClientReply(reply.status, reply.headers, whole, reply.tries)

    def close(self) -> None:
        """End all connections. Idempotent."""
        if not self._thread.is_alive():
            return
        self._member.close()
        self._wait(self._dispatcher.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _see(self, view: GroupView) -> None:
        self._loop.call_soon_threadsafe(self._targets.see, view)

    def _wait(self, work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _made(targets: ReplicaTargets, queue: int, hedge_s: float) -> Dispatcher:
    return Dispatcher(targets, queue=queue, hedge_s=hedge_s)
