"""A serving group for tests: a training job that commits, replica processes, and requests."""

from __future__ import annotations

import http.client
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt.keyspace.base import Keyspace
from ckpt.serve import headers
from ckpt.serve.group.member import open_group, read_view
from ckpt.serve.group.records import GroupView
from ckpt.serve.processes.options import ReplicaOptions, encode_options
from ckpt.session.checkpointer import Checkpointer
from kit.keepers.served import until
from kit.programs import answering
from kit.servers.process import ServerProcess, free_port

PROGRAMS = Path(answering.__file__).parent


@dataclass(frozen=True)
class HttpReply:
    """What came back for a request."""

    status: int
    headers: dict[str, str]
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
        return HttpReply(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def check_reply(reply: HttpReply) -> int:
    """That a reply of ``answering`` is what its generation must answer; its step."""
    assert reply.status == 200, (reply.status, reply.body)
    step = reply.json["step"]
    assert reply.json["values"] == [float(step)], "two generations in one reply"
    assert reply.generation.endswith(f"-{step}")
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
            [
                sys.executable,
                "-m",
                "ckpt.serve.processes.replica",
                encode_options(options),
            ],
            ready_url=f"http://127.0.0.1:{options.port}{headers.STATUS}",
            log=folder / f"{options.name}.log",
            env={
                "ANSWERING_STORE": str(store),
                "PYTHONPATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                "OMP_NUM_THREADS": "1",
            },
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

    def start(self, name: str, **options: Any) -> ReplicaProcess:
        """Start a replica; it is there when it says so in the group."""
        given = {"app": "answering:replica", "port": free_port(), **options}
        self.replicas[name] = ReplicaProcess(
            self.folder,
            ReplicaOptions(group=self.group, wanted=self.wanted, name=name, **given),
            self.store,
        )
        return self.replicas[name]

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
        for replica in self.replicas.values():
            replica.kill()
        self.keyspace.close()
