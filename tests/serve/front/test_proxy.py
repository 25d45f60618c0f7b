"""The front over HTTP: what passes, what does not, and what each failure is answered with."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from kit.faulty_replicas import FaultyReplica, replicas, view

from ckpt.serve import headers
from ckpt.serve.front.dispatch import BUFFER_BYTES_MAX, Dispatcher
from ckpt.serve.front.proxy import FrontProxy

BODY_BYTES_MAX = 3 << 20


class Front:
    """A front over faulty replicas, and a client of it."""

    def __init__(
        self, made: list[FaultyReplica], dispatcher: Dispatcher, deadline_s: float
    ) -> None:
        self.replicas = made
        self.dispatcher = dispatcher
        self.proxy = FrontProxy(dispatcher, deadline_s=deadline_s, body_bytes_max=BODY_BYTES_MAX)
        self.session = aiohttp.ClientSession()
        self.url = ""

    def ask(self, method: str = "GET", path: str = "/x", **given: Any) -> Any:
        """One request, as aiohttp's client takes it."""
        return self.session.request(method, self.url + path, **given)


@asynccontextmanager
async def front(
    number: int = 2, *, deadline_s: float = 60.0, **options: Any
) -> AsyncIterator[Front]:
    async with replicas(number, **options) as (made, dispatcher):
        front = Front(made, dispatcher, deadline_s)
        runner = web.AppRunner(front.proxy.application(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        front.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield front
        finally:
            await front.session.close()
            await runner.cleanup()


def test_request_and_answer_pass_without_what_concerns_one_connection() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=b"made", status=201, headers={"X-Own": "1"})
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        response.headers["Keep-Alive"] = "timeout=1"
        response.headers[headers.GENERATION] = "1-1"
        return response

    async def run() -> None:
        async with front(1) as one:
            (a,) = one.replicas
            a.answer = answer
            given = {"X-Given": "2", "TE": "trailers", "X-Forwarded-For": "10.0.0.1"}
            async with one.ask("PUT", "/p%2Fq?r=%26", data=b"sent", headers=given) as reply:
                assert (reply.status, await reply.read()) == (201, b"made")
                assert reply.headers.getall("Set-Cookie") == ["a=1", "b=2"]
                assert reply.headers["X-Own"] == "1"
                assert reply.headers[headers.GENERATION] == "1-1"
                assert "Keep-Alive" not in reply.headers
            (request,) = a.requests
            assert (request.method, request.raw_path) == ("PUT", "/p%2Fq?r=%26")
            assert request.headers["X-Given"] == "2"
            assert request.headers["X-Forwarded-For"] == "10.0.0.1, 127.0.0.1"
            assert "TE" not in request.headers
            assert request.headers["Host"] == f"127.0.0.1:{a.port}"

    asyncio.run(run())


def test_each_failure_has_its_status() -> None:
    async def run() -> None:
        async with front(1, queue=1) as one:
            (a,) = one.replicas

            async def status(method: str = "GET", **given: str) -> tuple[int, str]:
                named = {key.replace("_", "-"): value for key, value in given.items()}
                async with one.ask(method, headers=named) as reply:
                    if reply.status == 503:
                        assert reply.headers[headers.RETRY_AFTER] == "1"
                        assert reply.headers[headers.NOT_HANDLED] == headers.BUSY
                    return reply.status, (await reply.json())["code"]

            assert await status(X_Ckpt_Deadline_Ms="soon") == (400, "usage")
            assert await status(X_Ckpt_Generation="1-9") == (409, "not-found")
            a.answer = a.broken
            assert await status("POST") == (502, "answer-lost")
            a.answer = a.busy
            assert await status() == (503, "overloaded")
            a.answer = a.silent
            assert await status(X_Ckpt_Deadline_Ms="200") == (504, "deadline")
            held = asyncio.create_task(status(X_Ckpt_Deadline_Ms="2000"))
            while not one.dispatcher.counts.held:
                await asyncio.sleep(0.01)
            assert await status() == (503, "overloaded")
            assert await held == (504, "deadline")
            text = one.proxy.metrics.text().decode()
            assert 'ckpt_front_requests_total{code="504"} 2.0' in text
            assert "ckpt_front_refused_total 2.0" in text

    asyncio.run(run())


def test_long_body_passes_whole_also_when_it_is_sent_again() -> None:
    body = bytes(range(256)) * (BODY_BYTES_MAX // 256)

    async def answer(request: web.Request) -> web.StreamResponse:
        assert await request.read() == body
        return web.Response(body=b"whole")

    async def run() -> None:
        async with front(2) as one:
            a, b = one.replicas
            a.answer, b.answer = a.away, answer
            async with one.ask("POST", data=io.BytesIO(body)) as reply:
                assert await reply.read() == b"whole"
            assert len(a.requests) == 1

    asyncio.run(run())


def test_body_that_is_too_large_reaches_nobody() -> None:
    async def run() -> None:
        async with front(1) as one:
            too_large = io.BytesIO(bytes(BODY_BYTES_MAX + 1))
            async with one.ask("POST", data=too_large) as reply:
                assert reply.status == 413
            assert not one.replicas[0].requests

    asyncio.run(run())


@pytest.mark.parametrize("length_known", [True, False])
def test_long_answer_is_streamed(length_known: bool) -> None:
    part = bytes(range(256)) * 1024
    parts = BUFFER_BYTES_MAX // len(part) + 2

    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if length_known:
            response.content_length = len(part) * parts
        await response.prepare(request)
        for _ in range(parts):
            await response.write(part)
        return response

    async def run() -> None:
        async with front(1) as one:
            one.replicas[0].answer = large
            async with one.ask() as reply:
                assert await reply.read() == part * parts
                assert (reply.content_length is not None) == length_known
            (target,) = one.dispatcher.targets
            assert target.outstanding == 0

    asyncio.run(run())


def test_answer_that_breaks_off_does_not_look_whole() -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def run() -> None:
        async with front(1) as one:
            one.replicas[0].answer = half
            with pytest.raises(aiohttp.ClientError):
                async with one.ask() as reply:
                    await reply.read()
            (target,) = one.dispatcher.targets
            while target.outstanding:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_own_pages_say_who_serves() -> None:
    async def run() -> None:
        async with front(2) as one:
            a, b = one.replicas
            async with one.ask(path=headers.HEALTH) as reply:
                assert (reply.status, await reply.json()) == (200, {"usable": ["a", "b"]})
            await a.stop()
            async with one.ask() as reply:
                assert reply.status == 200
            async with one.ask(path=headers.STATUS) as reply:
                rows = {row["name"]: row for row in (await reply.json())["replicas"]}
            assert rows["a"]["problem"] == "it refused a connection"
            assert not rows["a"]["usable"]
            assert rows["b"]["usable"]
            async with one.ask(path=headers.METRICS) as reply:
                text = await reply.text()
            assert 'ckpt_front_replica_usable{replica="a"} 0.0' in text
            assert "ckpt_front_retries_total 1.0" in text
            await a.start()
            one.dispatcher.targets.see(view(b))

    asyncio.run(run())


def test_front_that_leaves_refuses_on_connections_that_are_open() -> None:
    async def run() -> None:
        async with front(1) as one:
            async with one.ask() as reply:
                assert reply.status == 200
            one.proxy.leaves = True
            async with one.ask() as reply:
                assert reply.status == 503
                assert reply.headers["Connection"] == "close"

    asyncio.run(run())
