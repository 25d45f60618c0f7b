"""Real HTTP servers in place of replicas, whose next answers a test chooses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from ckpt.serve import headers
from ckpt.serve.front.dispatch import Dispatcher
from ckpt.serve.front.policies import round_robin
from ckpt.serve.front.targets import ReplicaTargets
from ckpt.serve.group.records import GroupView, ReplicaRecord, RolesRecord

DEADLINE_S = 60.0


class FaultyReplica:
    """A real HTTP server whose next answers a test chooses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[web.Request] = []
        self.answer: Callable[[web.Request], Awaitable[web.StreamResponse]] = self.well
        self.hangs = False
        self.port = 0
        self._runner: web.AppRunner | None = None

    async def well(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"name": self.name, "body": (await request.read()).decode()})

    async def busy(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=503, headers={headers.NOT_HANDLED: headers.BUSY})

    async def away(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=503, headers={headers.NOT_HANDLED: headers.AWAY})

    async def broken(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def silent(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(DEADLINE_S)
        return web.Response()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.hangs:
            await asyncio.sleep(DEADLINE_S)
        if request.path == headers.HEALTH:
            return web.json_response({})
        self.requests.append(request)
        return await self.answer(request)

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def record(self) -> ReplicaRecord:
        return ReplicaRecord(
            name=self.name,
            address=f"127.0.0.1:{self.port}",
            state="ready",
            generation="1-1",
            kept=("1-1",),
        )


@asynccontextmanager
async def replicas(
    number: int = 2, **options: Any
) -> AsyncIterator[tuple[list[FaultyReplica], Dispatcher]]:
    made = [FaultyReplica(name) for name in "abcd"[:number]]
    for replica in made:
        await replica.start()
    targets = ReplicaTargets(round_robin, clock=asyncio.get_running_loop().time, draw=lambda: 0.0)
    targets.see(view(*made))
    given = {"queue": 100, **options}
    async with Dispatcher(targets, **given) as dispatcher:
        yield made, dispatcher
    for replica in made:
        await replica.stop()


def view(*serving: FaultyReplica) -> GroupView:
    records = {replica.name: replica.record() for replica in serving}
    return GroupView(1, records, RolesRecord(wanted=len(records), serving=tuple(records)), 1)
