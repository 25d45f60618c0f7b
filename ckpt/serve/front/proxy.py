"""The front of a serving group over HTTP: one address for all replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ckpt.errors import (
    AnswerLostError,
    CkptError,
    DeadlineError,
    NotFoundError,
    OverloadedError,
    UsageError,
)
from ckpt.serve import headers
from ckpt.serve.front.decide import deadline_s, repeatable
from ckpt.serve.front.dispatch import DispatchedReply, DispatchedRequest, Dispatcher
from ckpt.serve.metrics import RequestMetrics

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "expect",
    }
)
"""Fields that concern one connection (RFC 9110, 7.6.1), or that are written anew for the next."""

STATUS = {
    UsageError: 400,
    NotFoundError: 409,
    OverloadedError: 503,
    DeadlineError: 504,
    AnswerLostError: 502,
}
"""What an error of the dispatcher is answered with."""


class FrontCollector(Collector):
    """What a front knows of its replicas, read when it is asked for."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        counts, targets = self._dispatcher.counts, self._dispatcher.targets
        for name, text, value in (
            ("retries", "Requests that were sent to another replica.", counts.retries),
            ("hedges", "Requests that were sent to a second replica too.", counts.hedges),
            ("refused", "Requests that were refused before they began.", counts.refused),
            ("promotions", "Replicas that took the place of another one.", targets.promotions),
        ):
            yield CounterMetricFamily(f"ckpt_front_{name}", text, value=value)
        usable = {target.name for target in targets.usable()}
        for name, text, value_of in (
            ("serving", "Whether a replica has a place.", lambda target: target.serving),
            ("usable", "Whether it gets requests.", lambda target: target.name in usable),
            ("outstanding", "Its requests not answered.", lambda target: target.outstanding),
            ("rate", "Its answers per second when it has work.", lambda target: target.rate),
        ):
            gauge = GaugeMetricFamily(f"ckpt_front_replica_{name}", text, labels=["replica"])
            for target in targets:
                gauge.add_metric([target.name], float(value_of(target)))
            yield gauge


class FrontProxy:
    """Passes requests on to the replicas of a group, by a dispatcher.

    ``deadline_s``: for requests that name none.
    """

    def __init__(self, dispatcher: Dispatcher, *, deadline_s: float, body_bytes_max: int) -> None:
        self._dispatcher = dispatcher
        self._deadline_s = deadline_s
        self._body_bytes_max = body_bytes_max
        self.leaves = False
        """Set when the front ends: requests on connections that are still open go elsewhere."""
        self.metrics = RequestMetrics("front")
        self.metrics.registry.register(FrontCollector(dispatcher))

    def application(self) -> web.Application:
        """What an aiohttp server runs."""
        app = web.Application(client_max_size=self._body_bytes_max)
        app.router.add_get(headers.HEALTH, self._health)
        app.router.add_get(headers.STATUS, self._status)
        app.router.add_get(headers.METRICS, self._metrics)
        app.router.add_route("*", "/{path:.*}", self._request)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        usable = [target.name for target in self._dispatcher.targets.usable()]
        return web.json_response({"usable": usable}, status=200 if usable else 503)

    async def _status(self, request: web.Request) -> web.Response:
        targets = self._dispatcher.targets
        usable = {target.name for target in targets.usable()}
        replicas = [
            {
                "name": target.name,
                "address": target.record.address,
                "state": target.record.state,
                "generation": target.record.generation,
                "serving": target.serving,
                "usable": target.name in usable,
                "problem": target.health.dead,
                "outstanding": target.outstanding,
                "rate": target.rate,
            }
            for target in targets
        ]
        return web.json_response({"replicas": replicas, "held": self._dispatcher.counts.held})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": headers.METRICS_TYPE}
        )

    async def _request(self, request: web.Request) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        with self.metrics.begun():
            try:
                response = await self._passed_on(request, begun_s)
            except CkptError as error:
                response = refused = _refused(error)
                if self.leaves:
                    refused.force_close()
        self.metrics.answered(response.status, loop.time() - begun_s)
        return response

    async def _passed_on(self, request: web.Request, begun_s: float) -> web.StreamResponse:
        if self.leaves:
            raise OverloadedError("this front leaves; connect again")
        left_s = deadline_s(request.headers, self._deadline_s)
        body = await request.read()
        paths = self._dispatcher.targets.paths()
        reply = await self._dispatcher.send(
            DispatchedRequest(
                request.method,
                request.rel_url.raw_path_qs,
                _passing(request.headers, request.remote or ""),
                body,
                repeatable(request.method, request.path, request.headers, paths),
                left_s - (asyncio.get_running_loop().time() - begun_s),
                request.headers.get(headers.GENERATION),
            )
        )
        if reply.body is not None:
            return web.Response(
                body=reply.body, status=reply.status, headers=_returning(reply.headers)
            )
        return await _streamed(request, reply)


async def _streamed(request: web.Request, reply: DispatchedReply) -> web.StreamResponse:
    """Pass an answer on as it comes. If it breaks off, so does the client's connection: half an
    answer must not look whole."""
    response = web.StreamResponse(status=reply.status, headers=_returning(reply.headers))
    if reply.response.content_length is not None:
        response.content_length = reply.response.content_length
    try:
        await response.prepare(request)
        async for part in reply.response.content.iter_any():
            await response.write(part)
        await response.write_eof()
    except (aiohttp.ClientError, OSError):
        if request.transport is not None:
            request.transport.abort()
    finally:
        reply.close()
    return response


def _passing(given: Mapping[str, str], remote: str) -> CIMultiDict[str]:
    """A request's fields for a replica."""
    passed = CIMultiDict(
        (name, value) for name, value in given.items() if name.lower() not in HOP_BY_HOP
    )
    passed["X-Forwarded-For"] = ", ".join(filter(None, [given.get("X-Forwarded-For"), remote]))
    return passed


def _returning(given: Mapping[str, str]) -> CIMultiDict[str]:
    """An answer's fields for the client."""
    return CIMultiDict(
        (name, value)
        for name, value in given.items()
        if name.lower() not in HOP_BY_HOP | {"date", "server"}
    )


def _refused(error: CkptError) -> web.Response:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
    response = web.json_response({"error": str(error), "code": error.code}, status=status)
    if status == 503:
        response.headers[headers.RETRY_AFTER] = "1"
        response.headers[headers.NOT_HANDLED] = headers.BUSY
    return response
