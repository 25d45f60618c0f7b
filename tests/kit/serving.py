"""A serving group for tests: a training job that commits, replica processes, and requests."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multidict import CIMultiDict

from ckpt.keyspace.base import Keyspace
from ckpt.serve import headers
from ckpt.serve.group.member import open_group, read_view
from ckpt.serve.group.records import GroupView
from ckpt.serve.processes.options import ReplicaOptions
from ckpt.serve.processes.supervisor import replica_words
from ckpt.serve.shared_reads import remove_unused
from ckpt.session.checkpointer import Checkpointer
from kit.etcd import require
from kit.keepers.served import until
from kit.programs import answering
from kit.servers.process import ServerProcess, free_port

PROGRAMS = Path(answering.__file__).parent


@dataclass(frozen=True)
class HttpReply:
    """What came back for a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def generation(self) -> str:
        return self.headers.get(headers.GENERATION, "")

    @property
    def replica(self) -> str:
        return self.headers.get(headers.REPLICA, "")


def ask(
    port: int,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    timeout_s: float = 60.0,
    **given: str,
) -> HttpReply:
    """Send one request over a connection of its own. ``given``: headers, with _ for -."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        named = {key.replace("_", "-"): value for key, value in given.items()}
        connection.request(method, path, body=body, headers=named)
        response = connection.getresponse()
        return HttpReply(response.status, CIMultiDict(response.headers.items()), response.read())
    finally:
        connection.close()


def check_reply(reply: HttpReply) -> int:
    """That a reply of ``answering`` is what its generation must answer; its step."""
    assert reply.status == 200, (reply.status, reply.body)
    step = reply.json["step"]
    assert reply.json["values"] == [float(step)], "two generations in one reply"
    assert reply.generation.endswith(f"-{step}"), f"the reply names {reply.generation}"
    return int(step)


class Training:
    """A training job that commits a model whose parameters are all the step."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.model = answering.make_model()
        self._checkpointer = Checkpointer(store, job="t")

    def commit(self, step: int, *, value: float | None = None, tag: str | None = None) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(step if value is None else value)
        self._checkpointer.save({"model": self.model}, step=step, tag=tag)

    def close(self) -> None:
        self._checkpointer.close()


class ReplicaProcess(ServerProcess):
    """A replica of a group in a process of its own."""

    def __init__(self, folder: Path, options: ReplicaOptions, store: Path) -> None:
        self.name = options.name
        self.port = options.port
        super().__init__(
            replica_words(options),
            ready_url=f"http://127.0.0.1:{options.port}{headers.STATUS}",
            log=folder / f"{options.name}.log",
            env=program_environment(store),
        )

    @property
    def said(self) -> str:
        return self.log.read_text()


class ServingGroup:
    """A group on this machine, or in etcd, and its replicas by name."""

    def __init__(self, folder: Path, store: Path, *, group: str, wanted: int) -> None:
        self.folder = folder
        self.store = store
        self.group = group
        self.wanted = wanted
        self.keyspace: Keyspace = open_group(group)
        self.replicas: dict[str, ReplicaProcess] = {}
        self.fronts: list[FrontProcess] = []

    def start(self, name: str, **options: Any) -> ReplicaProcess:
        """Start a replica; it is there when it says so in the group."""
        given = {"app": "answering:replica", "port": free_port(), **options}
        self.replicas[name] = ReplicaProcess(
            self.folder,
            ReplicaOptions(group=self.group, wanted=self.wanted, name=name, **given),
            self.store,
        )
        return self.replicas[name]

    def front(self, *words: str) -> FrontProcess:
        """Start a front; it listens when this returns."""
        given = ("front", "--group", self.group, "--replicas", str(self.wanted), *words)
        front = FrontProcess(self.folder, *given, port=free_port(), env={})
        self.fronts.append(front)
        front.wait_ready()
        return front

    def view(self) -> GroupView:
        return read_view(self.keyspace)[0]

    def serving(self) -> set[str]:
        return {replica.name for replica in self.view().serving}

    def wait_serving(self, *names: str) -> None:
        until(lambda: self.serving() == set(names))

    def wait_ready(self, *names: str) -> None:
        """Wait until these can serve, whether they do or stand by."""

        def ready() -> bool:
            for name in names:
                assert self.replicas[name].running, self.replicas[name].said
            replicas = self.view().replicas
            return all(name in replicas and replicas[name].state == "ready" for name in names)

        until(ready)

    def close(self) -> None:
        for process in [*self.replicas.values(), *self.fronts]:
            process.kill()
        self.keyspace.close()
        remove_unused()


class FrontProcess(ServerProcess):
    """A front of a group, or with ``words`` another ``ckpt serve``, in a process of its own."""

    def __init__(self, folder: Path, *words: str, port: int, env: dict[str, str]) -> None:
        self.port = port
        super().__init__(
            [sys.executable, "-m", "ckpt", "serve", *words, "--port", str(port)],
            ready_url=f"http://127.0.0.1:{port}{headers.STATUS}",
            log=folder / f"front-{port}.log",
            env=env,
        )

    @property
    def said(self) -> str:
        return self.log.read_text()


def program_environment(store: Path) -> dict[str, str]:
    """The environment in which ``answering:replica`` is found, and its store."""
    return {
        "ANSWERING_STORE": str(store),
        "PYTHONPATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }


@dataclass(frozen=True)
class LoadResult:
    """One request of a load: when it was due and how long after that its answer was there."""

    due_s: float
    seconds: float
    status: int
    step: int
    replica: str
    problem: str


class Load:
    """Requests at a fixed rate, whatever their answers do, from threads of this process.

    A latency counts from the time at which a request was due, so requests that others held up count
    as late (no coordinated omission). Each answer is compared with what its generation must answer.
    """

    def __init__(
        self,
        port: int,
        *,
        rate: float,
        workers: int = 16,
        method: str = "POST",
        path: str = "/answer",
        deadline_ms: int = 60_000,
    ) -> None:
        self._port = port
        self._method = method
        self._path = path
        self._deadline_ms = deadline_ms
        self._due = self._ticks(rate)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.results: list[LoadResult] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(workers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[LoadResult]:
        return [result for result in self.results if result.problem]

    def wait_for(self, number: int) -> None:
        """Until so many more requests are answered."""
        before = len(self.results)
        until(lambda: len(self.results) >= before + number)

    def percentile_s(self, share: float) -> float:
        """The latency that ``share`` of the requests are within."""
        times = sorted(result.seconds for result in self.results)
        return times[min(len(times) - 1, int(share * len(times)))]

    @staticmethod
    def _ticks(rate: float) -> Iterator[float]:
        begun_s = time.monotonic()
        yield from (begun_s + number / rate for number in itertools.count())

    def _work(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        given = {headers.DEADLINE_MS: str(self._deadline_ms)}
        while not self._stop.is_set():
            with self._lock:
                due_s = next(self._due)
            if self._stop.wait(max(0.0, due_s - time.monotonic())):
                break
            try:
                connection.request(self._method, self._path, body=b"x", headers=given)
                response = connection.getresponse()
                reply = HttpReply(
                    response.status, CIMultiDict(response.headers.items()), response.read()
                )
                step = check_reply(reply)
                problem = ""
            except AssertionError as error:
                step, problem = -1, str(error) or "a wrong answer"
            except OSError as error:
                connection.close()
                reply, step, problem = HttpReply(0, {}, b""), -1, repr(error)
            seconds = time.monotonic() - due_s
            self.results.append(
                LoadResult(due_s, seconds, reply.status, step, reply.replica, problem)
            )
        connection.close()


class HaproxyProcess(ServerProcess):
    """A real HAProxy in front of a group, and the process that keeps it up to date."""

    def __init__(self, group: ServingGroup, *words: str) -> None:
        self.port = free_port()
        self.socket = group.folder / "ha.sock"
        self._folder = group.folder
        self._controls = ("--group", group.group, "--socket", str(self.socket))
        shown = subprocess.run(
            [
                *(sys.executable, "-m", "ckpt", "serve", "haproxy", "--config", *self._controls),
                *("--port", str(self.port), *words),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        self.config = group.folder / "haproxy.cfg"
        self.config.write_text(shown.stdout)
        super().__init__(
            [require("haproxy"), "-f", str(self.config)],
            ready_url=f"http://127.0.0.1:{self.port}/answer",
            log=group.folder / "haproxy.log",
            env={},
        )
        self.controller = self.control()

    def control(self) -> subprocess.Popen[bytes]:
        """Start the process that tells HAProxy who serves."""
        with (self._folder / "controller.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ckpt", "serve", "haproxy", *self._controls],
                stdout=log,
                stderr=log,
            )

    @property
    def said(self) -> str:
        """What the controller said."""
        return (self._folder / "controller.log").read_text()

    def close(self) -> None:
        self.controller.kill()
        self.controller.wait()
        self.kill()
