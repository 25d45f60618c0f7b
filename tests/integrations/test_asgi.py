"""A follower behind a real server: uvicorn, Starlette, HTTP over loopback."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import uvicorn
from ckpt.integrations.asgi import GenerationMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from torch import nn

import ckpt.serve
from ckpt.session.checkpointer import Checkpointer

WAIT_S = 60.0


class Site:
    """A server on loopback, its follower, and the trainer that it follows."""

    def __init__(self, folder: Path) -> None:
        self.model = nn.Linear(8, 1, bias=False)
        self.trainer = Checkpointer(folder, job="t")
        self.follower = ckpt.serve.Follower(
            folder, into=lambda: nn.Linear(8, 1, bias=False), poll_s=0.02
        )
        app = Starlette(routes=[Route("/sum", _sum), Route("/slow", _slow)])
        self.listener = listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # connections wait until the server takes them
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(GenerationMiddleware(app, self.follower), log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def commit(self, step: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(step)
        self.trainer.save({"model": self.model}, step=step)
        self.follower.wait(step=step, timeout_s=WAIT_S)

    def get(self, path: str, generation: str | None = None) -> tuple[int, dict[str, str], object]:
        headers = {} if generation is None else {"X-Ckpt-Generation": generation}
        address = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        with closing(address) as connection:
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                body = json.loads(response.read())
                return response.status, dict(response.getheaders()), body

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()
        self.trainer.close()


def _sum(request: Request) -> JSONResponse:
    generation = request.scope["ckpt-generation"]
    return JSONResponse(generation.model(torch.ones(8)).item())


def _slow(request: Request) -> StreamingResponse:
    """Answers in two parts; the second computes after others were swapped in."""
    generation = request.scope["ckpt-generation"]

    def parts() -> Iterator[str]:
        yield "["
        deadline = time.monotonic() + WAIT_S
        while not RELEASED.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"{generation.model(torch.ones(8)).item()}]"

    return StreamingResponse(parts())


RELEASED = threading.Event()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    RELEASED.clear()
    site = Site(tmp_path / "store")
    yield site
    site.close()
    assert not site.follower._thread.is_alive(), "the server's shutdown ends the follower"


def test_each_reply_names_the_generation_that_computed_it(site: Site) -> None:
    code, headers, _ = site.get("/sum")
    assert (code, headers["retry-after"]) == (503, "1")
    assert site.get("/ckpt/status")[0] == 503
    for step in (1, 2):
        site.commit(step)
        code, headers, body = site.get("/sum")
        assert (code, headers["x-ckpt-generation"], body) == (200, f"1-{step}", 8.0 * step)
    code, _, status = site.get("/ckpt/status")
    assert code == 200
    assert isinstance(status, dict)
    assert (status["generation"], status["kept"]) == ("1-2", ["1-2", "1-1"])


def test_client_gets_the_generation_that_it_asks_for_or_409(site: Site) -> None:
    site.commit(1)
    site.commit(2)
    assert site.get("/sum", "1-1")[2] == 8.0
    site.commit(3)
    site.commit(4)
    code, _, body = site.get("/sum", "1-1")
    assert code == 409
    assert isinstance(body, dict)
    assert body["kept"] == ["1-4", "1-3"]


def test_reply_that_streams_is_of_one_generation(site: Site) -> None:
    site.commit(1)
    replies: list[tuple[int, dict[str, str], object]] = []
    thread = threading.Thread(target=lambda: replies.append(site.get("/slow")))
    thread.start()
    deadline = time.monotonic() + WAIT_S
    while not site.follower._generations._served.pins:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for step in (2, 3):
        site.commit(step)
    RELEASED.set()
    thread.join()
    assert replies[0][0] == 200
    assert replies[0][1]["x-ckpt-generation"] == "1-1"
    assert replies[0][2] == [8.0]
