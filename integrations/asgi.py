"""A follower behind any ASGI application: Starlette, FastAPI, Litestar, or a plain one.

    follower = ckpt.serve.Follower("s3://bucket/run", into=make_model)
    app = GenerationMiddleware(FastAPI(), follower)

    @app.app.post("/predict")
    async def predict(request: Request):
        g = request.scope["ckpt-generation"]
        return {"y": g.model(await request.json())}

Each HTTP request has one generation, pinned until its last byte is sent, and each response names it
in ``X-Ckpt-Generation``. A client that sends that header gets that generation, or 409 with those
that are in memory. Before the first generation is served the answer is 503 with ``Retry-After``.
``GET /ckpt/status`` says what is served, kept and refused; it answers 503 if nothing is served, so
that load balancers can ask it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ckpt.errors import NotFoundError, UnavailableError
from ckpt.serve.follower import Follower

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER = b"x-ckpt-generation"
SCOPE_KEY = "ckpt-generation"
RETRY_AFTER_S = 1


class GenerationMiddleware:
    """The ASGI application ``app`` with a generation of ``follower`` for each request.

    The follower is closed at the server's shutdown, after the application's own.
    """

    def __init__(self, app: App, follower: Follower, *, status_path: str = "/ckpt/status") -> None:
        self.app = app
        self.follower = follower
        self._status_path = status_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI 3 asks."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, self._closing(send))
        elif scope["type"] != "http":
            with self.follower.generation() as generation:
                await self.app({**scope, SCOPE_KEY: generation}, receive, send)
        elif scope["path"] == self._status_path and scope["method"] == "GET":
            status = self.follower.status()
            code = 200 if status.generation is not None else 503
            await _answer(send, code, dataclasses.asdict(status))
        else:
            await self._request(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = next((value.decode() for name, value in scope["headers"] if name == HEADER), None)
        pinned = self.follower.generation(asked)
        try:
            generation = pinned.__enter__()
        except UnavailableError as error:
            await _answer(send, 503, {"error": str(error)}, retry=True)
            return
        except NotFoundError as error:
            kept = list(self.follower.status().kept)
            await _answer(send, 409, {"error": str(error), "kept": kept})
            return
        name = generation.id.encode()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, name)]}
            await send(message)

        try:
            await self.app({**scope, SCOPE_KEY: generation}, receive, send_named)
        finally:
            pinned.__exit__(None, None, None)

    def _closing(self, send: Send) -> Send:
        async def send_and_close(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                self.follower.close()
            await send(message)

        return send_and_close


async def _answer(send: Send, code: int, body: object, *, retry: bool = False) -> None:
    headers = [(b"content-type", b"application/json")]
    if retry:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
