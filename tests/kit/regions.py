"""The stores of one job, each in a place of its own: buckets of real S3 servers and folders, lost
and brought back by tests."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ckpt
from ckpt.cli.main import run
from ckpt.format.keys import JOB_KEY, SCRUBS, log_key, parse_settled_key
from ckpt.maintenance.gc.sweep import RESERVE_KEY
from kit.servers.proxy import FaultProxy
from kit.servers.s3 import Bucket

HARM_BYTES_MAX = 3
"""How many bytes of an object are changed at most."""


class Region:
    """One store, whatever holds it. Keys are as ckpt names them."""

    url: str
    options: dict[str, object] | None

    def keys(self) -> list[str]:
        """All that it holds, in order."""
        raise NotImplementedError

    def read(self, key: str) -> bytes:
        """One object."""
        raise NotImplementedError

    def write(self, key: str, data: bytes) -> None:
        """Put other bytes where an object is."""
        raise NotImplementedError

    def lose(self) -> None:
        """Let it be away."""
        raise NotImplementedError

    def come_back(self) -> None:
        """Let it answer again."""
        raise NotImplementedError

    def objects(self) -> dict[str, bytes]:
        """Everything, by key."""
        return {key: self.read(key) for key in self.keys()}

    def harm(self, key: str, chance: random.Random) -> None:
        """Change some bytes of an object. Of a pack the first one too, with which a chunk begins:
        nothing counts in between."""
        data = bytearray(self.read(key))
        places = {chance.randrange(len(data)) for _ in range(chance.randint(1, HARM_BYTES_MAX))}
        for place in places | ({0} if key.startswith("packs/") else set()):
            data[place] ^= chance.randint(1, 255)
        self.write(key, bytes(data))


class Folder(Region):
    """A folder of this machine. It is lost by being moved away."""

    options = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        self._away = path.with_name(f"{path.name}.away")

    def keys(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()
        )

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self.path / key
        path.chmod(0o644)
        path.write_bytes(data)

    def lose(self) -> None:
        self.path.rename(self._away)

    def come_back(self) -> None:
        self._away.rename(self.path)


class S3(Region):
    """A bucket of a server, reached by the job through a proxy where there is one, and by the test
    directly."""

    def __init__(self, bucket: Bucket, proxy: FaultProxy | None = None) -> None:
        self.server = bucket.server
        self.proxy = proxy
        self.url = bucket.url
        self._bucket = bucket
        self._prefix = bucket.url.removeprefix(f"s3://{bucket.name}/") + "/"

    @property
    def options(self) -> dict[str, object]:  # type: ignore[override]
        """Storage options; the proxy's address where there is one."""
        there = {} if self.proxy is None else {"endpoint_url": self.proxy.endpoint}
        return {**self.server.options, **there}

    def keys(self) -> list[str]:
        pages = self.server.client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self._bucket.name, Prefix=self._prefix)
        return [
            one["Key"].removeprefix(self._prefix)
            for page in found
            for one in page.get("Contents", [])
        ]

    def read(self, key: str) -> bytes:
        body = self.server.client().get_object(Bucket=self._bucket.name, Key=self._prefix + key)[
            "Body"
        ]
        data: bytes = body.read()
        return data

    def write(self, key: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self._bucket.name, Key=self._prefix + key, Body=data)

    def lose(self) -> None:
        self.server.stop()

    def come_back(self) -> None:
        self.server.start()

    def make_bucket(self) -> None:
        """As a person does after a loss: the server itself came back without it."""
        self.server.bucket(self._bucket.name)


@dataclass(frozen=True)
class Regions:
    """All stores of one job, in its order."""

    stores: tuple[Region, ...]
    quorum: int = 2
    key: str | None = None

    @property
    def urls(self) -> list[str]:
        return [store.url for store in self.stores]

    def but(self, *lost: Region) -> Regions:
        """The same without some of them."""
        return Regions(
            tuple(store for store in self.stores if store not in lost), self.quorum, self.key
        )

    def only(self, store: Region) -> Regions:
        """One of them, as if it were alone."""
        return Regions((store,), 1, self.key)

    @property
    def words(self) -> list[str]:
        """What the program ``stored.py`` is told of them."""
        words = ["--stores", json.dumps(self.urls), "--quorum", str(self.quorum)]
        return [*words, "--key", self.key] if self.key else words

    @property
    def environment(self) -> dict[str, str]:
        """What it finds in its environment."""
        return {"STORED_OPTIONS": json.dumps([store.options for store in self.stores])}

    def reader(self) -> ckpt.Checkpointer:
        """One that has no part in the job."""
        several = len(self.stores) > 1
        return ckpt.Checkpointer(
            self.urls,
            storage_options=[store.options for store in self.stores],
            write_quorum=self.quorum if several else None,
            encryption_key=self.key,
        )

    def newest_step(self) -> int:
        """The step of the newest snapshot; -1 for none."""
        with self.reader() as reader:
            newest = reader.latest()
        return -1 if newest is None else newest.step

    def ask(self, *words: str, new: Region | None = None) -> tuple[int, dict[str, Any]]:
        """Run a command that names one store and its ``--replica``: its exit status, and what it or
        its error says."""
        stores = [self.urls[0]]
        for url in self.urls[1:]:
            stores += ["--replica", url]
        there = [
            *words,
            *stores,
            "--json",
            *_option_words([store.options for store in self.stores]),
        ]
        there += ["--write-quorum", str(self.quorum)] if len(self.stores) > 1 else []
        if new is not None:
            there += [
                "--store",
                new.url,
                *_option_words([new.options], name="--store-option", numbered=False),
            ]
        return ask(*there, key=self.key)

    def ask_all(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Run one of ``ckpt``'s commands that name all stores alike."""
        options = _option_words([store.options for store in self.stores])
        quorum = ["--write-quorum", str(self.quorum)] if words[0] in ("scrub", "gc") else []
        return ask(*words, *self.urls, "--json", *options, *quorum, key=self.key)

    def counting(self) -> dict[str, str]:
        """The id of each store that counts, by its address; empty where they can't be asked at this
        moment."""
        status, said = self.ask("stores", "show")
        return (
            {}
            if status
            else {one["url"]: one["store_id"] for one in said["stores"] if one["counts"]}
        )


def ask(*words: str, key: str | None = None) -> tuple[int, dict[str, Any]]:
    """Run one command line of ``ckpt`` in this process: its exit status, and its document (of an
    error, the error's)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([*words, *(["--encryption-key", key] if key else [])])
    said = out.getvalue() or next(
        (line for line in err.getvalue().splitlines() if line.startswith('{"error"')), "{}"
    )
    return status, {**json.loads(said), "stderr": err.getvalue()}


def _option_words(
    options: Sequence[Mapping[str, object] | None],
    *,
    name: str = "--storage-option",
    numbered: bool = True,
) -> list[str]:
    words = []
    for number, one in enumerate(options, 1):
        for option, value in (one or {}).items():
            words += [name, f"{number}:{option}={value}" if numbered else f"{option}={value}"]
    return words


OWN = (SCRUBS, RESERVE_KEY)


def unequal(stores: Collection[Region]) -> list[str]:
    """What is not the same everywhere. A ``ckpt.json`` is its store's own, as are its reserve and
    what was read of it; a record may be at either of its place's keys."""
    found = [
        {key: data for key, data in _by_place(store.objects()).items() if not key.startswith(OWN)}
        for store in stores
    ]
    return [
        f"{key} of {[len(one.get(key, b'')) for one in found]} bytes"
        for key in sorted({key for one in found for key in one})
        if any(key not in one for one in found)
        or (key != JOB_KEY and len({one[key] for one in found}) > 1)
    ]


def _by_place(objects: Mapping[str, bytes]) -> dict[str, bytes]:
    """The same, with each record under its place's first key: the one at the second key has won."""
    seqs = {key: parse_settled_key(key) for key in objects}
    firsts = {key: log_key(seq) for key, seq in seqs.items() if seq is not None}
    kept = {key: data for key, data in objects.items() if key not in firsts}
    return {**kept, **{first: objects[key] for key, first in firsts.items()}}
