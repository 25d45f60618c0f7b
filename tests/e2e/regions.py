"""Three stores of one job as a test handles them: buckets of real S3 servers behind a proxy, and folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from named import digest
from servers.proxy import FaultProxy
from servers.s3 import S3Server

import ckpt
from ckpt.commit.journal import Journal
from ckpt.replicate.job import open_job
from ckpt.values import SnapshotId

CLI_WAIT_S = 120.0
"""No command takes longer; against hangs only."""


class Region(Protocol):
    """One store, seen past ckpt: the objects that are really there."""

    @property
    def url(self) -> str:
        """What ckpt is given."""
        ...

    @property
    def options(self) -> dict[str, object] | None:
        """Its storage options."""
        ...

    def objects(self) -> dict[str, bytes]:
        """Everything that is there."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write what nobody asked for."""
        ...

    def delete(self, key: str) -> None:
        """Lose an object."""
        ...


class Bucketed:
    """A bucket of a server, which a job reaches through a proxy and the test directly."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.server, self.proxy = server, proxy
        self.name = server.bucket().name

    @property
    def url(self) -> str:
        """See Region."""
        return f"s3://{self.name}/some/run"

    @property
    def options(self) -> dict[str, object]:
        """See Region: by way of the proxy."""
        return {**self.server.options, "endpoint_url": self.proxy.endpoint}

    def objects(self) -> dict[str, bytes]:
        """See Region."""
        client = self.server.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix="some/run/")
        names = [one["Key"] for page in pages for one in page.get("Contents", ())]
        return {
            name.removeprefix("some/run/"): client.get_object(Bucket=self.name, Key=name)["Body"].read()
            for name in names
        }

    def put(self, key: str, data: bytes) -> None:
        """See Region."""
        self.server.client().put_object(Bucket=self.name, Key=f"some/run/{key}", Body=data)

    def delete(self, key: str) -> None:
        """See Region."""
        self.server.client().delete_object(Bucket=self.name, Key=f"some/run/{key}")

    def wipe(self) -> None:
        """The server comes back with nothing but an empty bucket of that name."""
        self.server.wipe()
        self.server.bucket(self.name)


class Folder:
    """A folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def url(self) -> str:
        """See Region."""
        return str(self.path)

    @property
    def options(self) -> None:
        """See Region."""
        return

    def objects(self) -> dict[str, bytes]:
        """See Region."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            key = path.relative_to(self.path).as_posix()
            if path.is_file() and not key.startswith("."):
                found[key] = path.read_bytes()
        return found

    def put(self, key: str, data: bytes) -> None:
        """See Region."""
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(0o600) if path.exists() else None
        path.write_bytes(data)

    def delete(self, key: str) -> None:
        """See Region."""
        (self.path / key).unlink()

    def wipe(self) -> None:
        """A new disk in its place."""
        shutil.rmtree(self.path)
        self.path.mkdir()


@dataclass(frozen=True)
class Done:
    """A command's end."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What it printed with ``--json``."""
        assert self.out, self
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass(frozen=True)
class Stores:
    """The stores of one job, in the user's order."""

    regions: Sequence[Region]
    write_quorum: int | None = 2
    encryption_key: str | None = None

    def arguments(self) -> dict[str, object]:
        """What ``Checkpointer`` and ``resilient`` are given."""
        many = len(self.regions) > 1
        found: dict[str, object] = {
            "store": [one.url for one in self.regions] if many else self.regions[0].url,
            "storage_options": [one.options for one in self.regions] if many else self.regions[0].options,
        }
        if many and self.write_quorum is not None:
            found["write_quorum"] = self.write_quorum
        if self.encryption_key is not None:
            found["encryption_key"] = self.encryption_key
        return found

    def write_to(self, folder: Path) -> None:
        """Tell the programs that work in ``folder``."""
        folder.mkdir(exist_ok=True)
        (folder / "stores.json").write_text(json.dumps(self.arguments()))

    def options(self, *, first: int = 1) -> list[str]:
        """The command line's words for the stores' options."""
        words = []
        for number, one in enumerate(self.regions, first):
            for name, value in (one.options or {}).items():
                words += ["--storage-option", f"{number}:{name}={value}"]
        return words

    def ckpt(self, command: str, *words: str, env: dict[str, str] | None = None) -> Done:
        """Run ``ckpt`` on all stores: ``scrub``, ``gc`` and ``doctor`` take a list of URLs, the others one and replicas."""
        urls = [one.url for one in self.regions]
        named = urls if command in ("scrub", "gc", "doctor") else [urls[0], *_each("--replica", urls[1:])]
        key = ["--encryption-key", self.encryption_key] if self.encryption_key is not None else []
        quorum = ["--write-quorum", str(self.write_quorum)] if len(urls) > 1 and self.write_quorum is not None else []
        head = [command]
        if command == "stores":
            head, words = [command, words[0]], words[1:]
        return run_ckpt(*head, *named, *self.options(), *quorum, *key, *words, env=env)

    def open(self) -> ckpt.Checkpointer:
        """As a program opens them."""
        return ckpt.Checkpointer(**self.arguments())  # type: ignore[arg-type]

    def fill(self, *, saves: int, records: int = 0) -> dict[int, str]:
        """Save ``saves`` snapshots, and write records until there are ``records``; digests of what was saved, by step."""
        found = {}
        state = {f"part{n}": torch.zeros(40_000) for n in range(4)}
        with self.open() as checkpointer:
            for step in range(1, saves + 1):
                for name in random.sample(sorted(state), 2):
                    state[name].normal_()
                checkpointer.save(state, step=step)
                found[step] = digest(state)
        if records:
            backend = open_job(**self._opening())
            journal = Journal.open(backend)
            while journal.refresh().next_seq < records:
                journal.tag(f"t{journal.refresh().next_seq % 3}", SnapshotId(1, 1 + journal.refresh().next_seq % saves))
            backend.close()
        return found

    def read_all(self) -> dict[int, str]:
        """Digests of all snapshots that ``fill`` made, restored by who has opened the stores just now."""
        found = {}
        with self.open() as checkpointer:
            for info in checkpointer.snapshots():
                state = {f"part{n}": torch.empty(40_000) for n in range(4)}
                assert checkpointer.restore(state, step=info.step).id == info.id
                found[info.step] = digest(state)
        return found

    def _opening(self) -> dict[str, Any]:
        given = self.arguments()
        urls = given.pop("store")
        return {"urls": urls if isinstance(urls, list) else [urls], "tell": lambda _: None, **given}


def run_ckpt(*words: str, env: dict[str, str] | None = None) -> Done:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", *words],
        capture_output=True, text=True, check=False, timeout=CLI_WAIT_S, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def kind_of(key: str) -> str:
    """What an object is: the first part of its key."""
    return key.partition("/")[0]


def same_everywhere(stores: Stores) -> None:
    """Every store holds the same objects, but for the id in its ``ckpt.json`` and what only asked what it can do."""
    first, *others = (_comparable(region) for region in stores.regions)
    for other, region in zip(others, stores.regions[1:], strict=True):
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        assert differ == [], f"{len(differ)} objects differ in {region.url}: {differ[:5]}"


def _comparable(region: Region) -> dict[str, bytes]:
    found = {key: data for key, data in region.objects().items() if not key.startswith(".probe/")}
    assert "ckpt.json" in found, region.url
    return {**found, "ckpt.json": b""}
