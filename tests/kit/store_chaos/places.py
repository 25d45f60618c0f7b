"""The places of a job's stores, and what can be done to each behind its back: an S3 server behind a
proxy, or a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import boto3
import botocore.exceptions
from botocore.config import Config

from ckpt.testing.crashes import OpCall
from kit.servers.process import free_port
from kit.servers.proxy import FaultProxy
from kit.servers.s3 import KEY, REGION, SECRET, Bucket, S3Server
from kit.store_chaos.rot import spoil_some
from kit.store_chaos.rules import DISK, RULES, DiskFault, Spoiler

T = TypeVar("T")

TIMEOUT_S = 1.0
"""What clients are told, so that a server that hangs costs no minutes."""

PATIENT_S = 30.0
HANDS = ThreadPoolExecutor(1, thread_name_prefix="chaos-hands")
"""Who starts servers: they die with the thread that did, which may be a proxy's."""


Options = dict[str, object]


class Place(Protocol):
    """One store's place. ``strike`` begins a fault of a kind (see ``chaos_schedule``), ``heal``
    ends it."""

    spoiler: Spoiler

    @property
    def url(self) -> str: ...
    def options(self, *, way: str) -> Options | None: ...
    def strike(self, kind: str, seed: int) -> None: ...
    def heal(self, kind: str) -> None: ...
    def keys(self) -> list[str]: ...
    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def remove(self, key: str) -> None: ...
    def close(self) -> None: ...


class S3Place:
    """A bucket of a real server. Ways to it: ``proxied``, ``direct``, and ``dead``, where nobody
    listens."""

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._bucket: Bucket = server.bucket()
        self.spoiler = Spoiler()
        self._proxy = FaultProxy(server.endpoint, self.spoiler)
        self._dead = free_port()
        self._client = _patient_client(server)

    @property
    def url(self) -> str:
        return self._bucket.url

    def options(self, *, way: str) -> Options:
        timeout_s = PATIENT_S if way == "direct" else TIMEOUT_S
        endpoint = {"proxied": self._proxy.endpoint, "direct": self._server.endpoint}.get(way)
        return {
            **self._bucket.options,
            "endpoint_url": endpoint or f"http://127.0.0.1:{self._dead}",
            "config_kwargs": {
                "connect_timeout": timeout_s,
                "read_timeout": timeout_s,
                "retries": {"max_attempts": {"proxied": 1, "direct": 3}.get(way, 0)},
            },
        }

    def strike(self, kind: str, seed: int) -> None:
        match kind:
            case "kill":
                self._server.stop()
            case "freeze":
                self._server.freeze()
            case "wipe":
                HANDS.submit(self._server.wipe).result()
                self._make_bucket()
            case "wipe-bare":
                HANDS.submit(self._server.wipe).result()
            case "wipe-down":
                HANDS.submit(self._server.wipe).result()
                self._make_bucket()
                self._server.stop()
            case "rot" | "lose":
                spoil_some(self, kind, seed)
            case _:
                self.spoiler.rule = RULES[kind](seed)

    def heal(self, kind: str) -> None:
        self.spoiler.rule = None
        HANDS.submit(self._server.start).result()
        if kind in ("wipe-bare", "wipe-down"):
            with suppress(
                botocore.exceptions.ClientError
            ):  # it is there: a server that keeps its data came back
                self._make_bucket()

    def keys(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket.name, Prefix=self._prefix
        )
        return [
            one["Key"][len(self._prefix) :] for page in pages for one in page.get("Contents", ())
        ]

    def read(self, key: str) -> bytes:
        got: bytes = self._client.get_object(Bucket=self._bucket.name, Key=self._prefix + key)[
            "Body"
        ].read()
        return got

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket.name, Key=self._prefix + key, Body=data)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=self._bucket.name, Key=self._prefix + key)

    def close(self) -> None:
        self._proxy.close()
        self.heal("")
        self._client.close()

    def _make_bucket(self) -> None:
        self._client.create_bucket(Bucket=self._bucket.name)

    @property
    def _prefix(self) -> str:
        return self.url.split("/", 3)[3] + "/"


def _patient_client(server: S3Server) -> Any:
    """A client that finds the server again after it was killed."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 5}, proxies={}),
    )


class FolderPlace:
    """A folder whose disk fails: ``around`` goes into its system calls. ``dead`` is below a
    file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ".aside")
        self._file = path.with_name(path.name + ".file")
        self._file.write_bytes(b"")
        self._fault: DiskFault | None = None
        self.spoiler = Spoiler()

    @property
    def url(self) -> str:
        return str(self._path)

    def options(self, *, way: str) -> None:
        return None

    @property
    def dead_url(self) -> str:
        """Where there can be no folder."""
        return str(self._file / "store")

    def around(self, call: OpCall, run: Callable[[], T], half: Callable[[], object]) -> T:
        """See Around: fails as the disk does at the moment."""
        if self._fault is not None and call.path.startswith(f"{self._path}/"):
            self._fault(call)
        return run()

    def strike(self, kind: str, seed: int) -> None:
        match kind:
            case "wipe":
                shutil.rmtree(self._path, ignore_errors=True)
            case "away" | "broken":
                if self._path.exists():
                    self._path.rename(self._aside)
                self._path.mkdir() if kind == "away" else self._path.write_bytes(b"")
            case "rot" | "lose":
                spoil_some(self, kind, seed)
            case _:
                self._fault = DISK[kind](seed)

    def heal(self, kind: str) -> None:
        self._fault = None
        if kind == "away":
            shutil.rmtree(
                self._path, ignore_errors=True
            )  # what was written meanwhile is on the other disk
        if kind == "broken":
            self._path.unlink()
        if kind in ("away", "broken") and self._aside.exists():
            self._aside.rename(self._path)

    def keys(self) -> list[str]:
        found = (path for path in self._path.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._path).as_posix() for path in found)

    def read(self, key: str) -> bytes:
        return (self._path / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        (self._path / key).write_bytes(data)

    def remove(self, key: str) -> None:
        (self._path / key).unlink()

    def close(self) -> None:
        """Nothing runs."""
