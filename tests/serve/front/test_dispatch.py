"""A request is tried until it is answered, and begun twice only if that does no harm."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import msgspec
import pytest
from aiohttp import web
from kit.faulty_replicas import DEADLINE_S, replicas, view

from ckpt.errors import AnswerLostError, DeadlineError, NotFoundError, OverloadedError
from ckpt.serve import headers
from ckpt.serve.front.dispatch import (
    BUFFER_BYTES_MAX,
    DispatchedReply,
    DispatchedRequest,
)
from ckpt.serve.group.records import GroupView, RolesRecord


def request(
    method: str = "GET",
    *,
    left_s: float = DEADLINE_S,
    generation: str | None = None,
    body: bytes = b"",
) -> DispatchedRequest:
    may = method == "GET"
    return DispatchedRequest(method, "/x?q=1", {"A": "b"}, body, may, left_s, generation)


def answered_by(reply: DispatchedReply) -> bytes:
    assert reply.status == 200
    assert reply.body is not None
    return reply.body


def test_request_arrives_as_it_was_sent() -> None:
    async def run() -> None:
        async with replicas() as ((a, b), dispatcher):
            reply = await dispatcher.send(request("POST", body=b"hello"))
            assert answered_by(reply) == b'{"name": "a", "body": "hello"}'
            await dispatcher.send(request())
            assert len(a.requests) == len(b.requests) == 1
            assert a.requests[0].path_qs == "/x?q=1"
            assert a.requests[0].headers["A"] == "b"
            assert 0 < int(a.requests[0].headers[headers.DEADLINE_MS]) <= DEADLINE_S * 1e3
            assert all(target.outstanding == 0 for target in dispatcher.targets)
            assert all(target.rate > 0 for target in dispatcher.targets)

    asyncio.run(run())


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("fault", ["busy", "away", "gone"])
def test_what_was_not_begun_goes_elsewhere_whatever_it_is(method: str, fault: str) -> None:
    async def run() -> None:
        async with replicas() as ((a, _b), dispatcher):
            if fault == "gone":
                await a.stop()
            else:
                a.answer = getattr(a, fault)
            reply = await dispatcher.send(request(method))
            assert b'"b"' in answered_by(reply)
            assert reply.tries == 2
            assert dispatcher.counts.retries == 1
            if fault == "gone":
                await a.start()

    asyncio.run(run())


def test_what_broke_off_is_begun_again_only_if_it_may_be() -> None:
    async def run() -> None:
        async with replicas() as ((a, b), dispatcher):
            a.answer = a.broken
            with pytest.raises(AnswerLostError, match="replica=a path=/x"):
                await dispatcher.send(request("POST"))
            assert not b.requests
            await dispatcher.send(request())  # the turn of b
            before = len(b.requests)
            assert b'"b"' in answered_by(await dispatcher.send(request()))
            assert len(b.requests) == before + 1

    asyncio.run(run())


def test_all_that_are_busy_refuse_at_once() -> None:
    async def run() -> None:
        async with replicas() as (made, dispatcher):
            for replica in made:
                replica.answer = replica.busy
            begun_s = time.monotonic()
            with pytest.raises(OverloadedError, match="too much to do"):
                await dispatcher.send(request())
            assert time.monotonic() - begun_s < DEADLINE_S / 2
            assert [len(replica.requests) for replica in made] == [1, 1]
            assert dispatcher.counts.refused == 1

    asyncio.run(run())


def test_request_waits_for_one_that_will_serve() -> None:
    """All that serve are gone; the group finds that out and names another."""

    async def run() -> None:
        async with replicas(3) as ((a, b, c), dispatcher):
            dispatcher.targets.see(view(a, b))
            await a.stop()
            b.answer = b.away
            task = asyncio.create_task(dispatcher.send(request("POST")))
            while len(b.requests) < 2:
                await asyncio.sleep(0.01)
            assert not task.done()
            dispatcher.targets.see(view(c))
            assert b'"c"' in answered_by(await task)
            await a.start()

    asyncio.run(run())


def test_nobody_serves_until_the_deadline() -> None:
    async def run() -> None:
        async with replicas(0) as (_, dispatcher):
            with pytest.raises(OverloadedError, match="no replica could take it"):
                await dispatcher.send(request(left_s=0.1))

    asyncio.run(run())


def test_answer_that_comes_too_late_is_an_error_of_its_own() -> None:
    async def run() -> None:
        async with replicas(1) as ((a,), dispatcher):
            a.answer = a.silent
            with pytest.raises(DeadlineError, match=r"replicas=\['a'\]"):
                await dispatcher.send(request(left_s=0.2))

    asyncio.run(run())


def test_queue_is_bounded() -> None:
    async def run() -> None:
        async with replicas(1, queue=2) as ((a,), dispatcher):
            a.answer = a.silent
            held = [asyncio.create_task(dispatcher.send(request())) for _ in range(2)]
            while len(a.requests) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(OverloadedError, match="as many requests as it may"):
                await dispatcher.send(request())
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            assert dispatcher.counts.held == 0

    asyncio.run(run())


def test_replica_that_hangs_loses_its_requests_to_another() -> None:
    """Its connections stay open, as of a stopped process: only the probe finds out."""

    async def run() -> None:
        async with replicas() as ((a, _b), dispatcher):
            a.answer = a.silent
            task = asyncio.create_task(dispatcher.send(request()))
            while not a.requests:
                await asyncio.sleep(0.01)
            a.hangs = True
            assert b'"b"' in answered_by(await task)
            assert dispatcher.targets.suspects == {"a"}
            a.hangs = False
            while dispatcher.targets.suspects:
                await asyncio.sleep(0.05)

    asyncio.run(run())


def test_path_arrives_as_it_was_sent() -> None:
    async def run() -> None:
        async with replicas(1) as ((a,), dispatcher):
            for path in ("/a%2Fb%20c?x=%26&y=+", "//a/../b", "/a%3Fb?c?d", "/%E4%BD%A0"):
                sent = replace(request(), path=path)
                assert (await dispatcher.send(sent)).status == 200
                assert a.requests[-1].raw_path == path

    asyncio.run(run())


def test_address_that_is_none_is_a_replica_that_is_dead() -> None:
    async def run() -> None:
        async with replicas() as ((a, b), dispatcher):
            wrong = msgspec.structs.replace(a.record(), address="not an address:x")
            records = {"a": wrong, "b": b.record()}
            roles = RolesRecord(wanted=2, serving=("a", "b"))
            dispatcher.targets.see(GroupView(2, records, roles, 2))
            for _ in range(4):
                assert b'"b"' in answered_by(await dispatcher.send(request("POST")))
            assert [target.outstanding for target in dispatcher.targets] == [0, 0]

    asyncio.run(run())


def test_hedge_takes_the_first_answer() -> None:
    async def run() -> None:
        async with replicas(hedge_s=0.05) as ((a, b), dispatcher):
            a.answer = a.silent
            reply = await dispatcher.send(request())
            assert b'"b"' in answered_by(reply)
            assert dispatcher.counts.hedges == 1
            assert dispatcher.counts.retries == 0
            with pytest.raises(DeadlineError):
                await dispatcher.send(request("POST", left_s=0.3))
            assert len(b.requests) == 1, "what must not be repeated is not hedged"

    asyncio.run(run())


def test_generation_that_nobody_has_is_said_with_those_that_are_there() -> None:
    async def run() -> None:
        async with replicas() as (_, dispatcher):
            assert (await dispatcher.send(request(generation="1-1"))).status == 200
            with pytest.raises(NotFoundError, match=r"generation=1-9 kept=\['1-1'\]"):
                await dispatcher.send(request(generation="1-9"))

    asyncio.run(run())


def test_long_answer_is_read_by_the_receiver_and_outstanding_until_then() -> None:
    async def large(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(BUFFER_BYTES_MAX + 1))

    async def run() -> None:
        async with replicas(1) as ((a,), dispatcher):
            a.answer = large
            reply = await dispatcher.send(request())
            assert reply.body is None
            (target,) = dispatcher.targets
            assert target.outstanding == 1
            assert len(await reply.response.read()) == BUFFER_BYTES_MAX + 1
            reply.close()
            assert target.outstanding == 0

    asyncio.run(run())
