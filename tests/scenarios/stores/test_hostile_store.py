"""Stores written by an enemy: every reading call answers with an error of ours, in bounded
memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import zstandard
from kit.damage import without_second_copies

import ckpt
from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.cli.main import run as cli
from ckpt.format.canonical import digest_hex
from ckpt.format.keys import log_key, parse_manifest_key

Json = dict[str, object]
Change = Callable[[Json], None]


def body(backend: Backend, key: str) -> bytes:
    stat = backend.stat(key)
    assert stat is not None
    out = bytearray(stat.size_bytes)
    backend.read_into(key, memoryview(out))
    return bytes(out)


def only(backend: Backend, prefix: str, *, last: bool = False) -> str:
    return [entry.key for entry in backend.list(prefix)][-1 if last else 0]


def sealed(record: Json) -> bytes:
    """As a writer that knows the format would seal it: digests that fit, whatever it says."""
    record.pop("digest", None)
    record["digest"] = digest_hex(msgspec.json.encode(record, order="sorted"))
    return msgspec.json.encode(record, order="sorted")


def rewrite(backend: Backend, key: str, change: Change) -> bytes:
    record = json.loads(body(backend, key))
    change(record)
    data = sealed(record)
    backend.put(key, [data])
    return data


def rewrite_commit(backend: Backend, change: Change) -> None:
    """Change the last record of the log."""
    rewrite(backend, only(backend, "log/", last=True), change)


def rewrite_manifest(backend: Backend, change: Change) -> None:
    """Change the manifest, and let the commit name the new one."""
    key = only(backend, "manifests/")
    record = json.loads(body(backend, key))
    change(record)
    data = sealed(record)
    parsed = parse_manifest_key(key)
    assert parsed is not None
    backend.put(key.replace(parsed[1], digest_hex(data)), [data])

    def name_it(commit: Json) -> None:
        assert isinstance(commit["body"], dict)
        commit["body"]["manifest_digest"] = digest_hex(data)

    rewrite_commit(backend, name_it)


def replace_part(backend: Backend, data: bytes) -> None:
    """Put other bytes as the part, and let manifest and commit vouch for them."""
    key = only(backend, "parts/")
    backend.put(key, [data])

    def vouch(manifest: Json) -> None:
        assert isinstance(manifest["parts"], list)
        manifest["parts"][0].update(digest=digest_hex(data), size_bytes=len(data))

    rewrite_manifest(backend, vouch)


def rewrite_part(backend: Backend, change: Change) -> None:
    wire = msgspec.msgpack.decode(
        zstandard.ZstdDecompressor().decompress(body(backend, only(backend, "parts/")))
    )
    change(wire)
    raw = msgspec.msgpack.encode(wire)
    replace_part(
        backend,
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(raw),
    )


def set_to(field: str, value: object) -> Change:
    def change(record: Json) -> None:
        assert field in record, sorted(record)
        record[field] = value

    return change


def in_body(field: str, value: object) -> Change:
    def change(record: Json) -> None:
        inner = record["body"]
        assert isinstance(inner, dict)
        inner[field] = value

    return change


def in_part_ref(field: str, value: object) -> Change:
    def change(record: Json) -> None:
        parts = record["parts"]
        assert isinstance(parts, list)
        parts[0][field] = value

    return change


def huge_frame() -> bytes:
    """A zstd frame that declares 1 TiB and holds nothing of it."""
    return (
        b"\x28\xb5\x2f\xfd"
        + bytes([0b11100100])
        + struct.pack("<Q", 1 << 40)
        + b"\x01\x00\x00"
        + bytes(4)
    )


def bomb() -> bytes:
    """A megabyte that becomes a gigabyte, honestly declared."""
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(1 << 30))


EVIL: dict[str, Callable[[Backend], object]] = {
    "job of a newer version": lambda b: rewrite(b, "ckpt.json", set_to("format_version", 99)),
    "job of version text": lambda b: rewrite(b, "ckpt.json", set_to("format_version", "1")),
    "job that is a list": lambda b: b.put("ckpt.json", [b"[]"]),
    "job that is nested deep": lambda b: b.put("ckpt.json", [b"[" * 60_000]),
    "job of a huge grid": lambda b: rewrite(b, "ckpt.json", set_to("chunk_bytes", 1 << 39)),
    "job that is huge": lambda b: b.put("ckpt.json", [bytes(1 << 20)]),
    "commit of a newer version": lambda b: rewrite_commit(b, set_to("v", 99)),
    "manifest of a newer version": lambda b: rewrite_manifest(b, set_to("format_version", 99)),
    "manifest whose parts are a dict": lambda b: rewrite_manifest(b, set_to("parts", {})),
    "manifest whose part climbs out": lambda b: rewrite_manifest(
        b, in_part_ref("key", "parts/../../../etc/passwd")
    ),
    "manifest whose part is absolute": lambda b: rewrite_manifest(
        b, in_part_ref("key", "/etc/passwd")
    ),
    "manifest whose part is huge": lambda b: rewrite_manifest(
        b, in_part_ref("size_bytes", 1 << 60)
    ),
    "manifest whose part is negative": lambda b: rewrite_manifest(b, in_part_ref("size_bytes", -1)),
    "manifest whose part has another digest": lambda b: rewrite_manifest(
        b, in_part_ref("digest", "0" * 32)
    ),
    "manifest of a huge world": lambda b: rewrite_manifest(b, set_to("world_size", 1 << 62)),
    "manifest of another job": lambda b: rewrite_manifest(b, set_to("job", "other")),
    "manifest whose metadata is a list": lambda b: rewrite_manifest(b, set_to("metadata", [1])),
    "part of a newer version": lambda b: rewrite_part(b, set_to("v", 99)),
    "part of packs that climb out": lambda b: rewrite_part(
        b, set_to("packs", ["packs/../../../etc/passwd"])
    ),
    "part of absolute packs": lambda b: rewrite_part(b, set_to("packs", ["/etc/passwd"])),
    "part whose leaves are a dict": lambda b: rewrite_part(b, set_to("leaves", {})),
    "part whose digests are text": lambda b: rewrite_part(b, set_to("digests", "x")),
    "part whose digests are short": lambda b: rewrite_part(b, set_to("digests", b"x")),
    "part of a huge rank": lambda b: rewrite_part(b, set_to("rank", 1 << 62)),
    "part of no chunks": lambda b: rewrite_part(b, set_to("offset_bytes", b"")),
    "part of a huge declared size": lambda b: replace_part(b, huge_frame()),
    "part that swells to a gigabyte": lambda b: replace_part(b, bomb()),
    "part that is no frame": lambda b: replace_part(b, b"hello"),
    "part that is empty": lambda b: replace_part(b, b""),
}


@pytest.fixture
def backend(tmp_path: Path) -> FileBackend:
    with ckpt.Checkpointer(str(tmp_path / "store"), job="job") as checkpointer:
        checkpointer.save({"state": {"x": torch.arange(5000), "name": "text"}}, step=1)
    store = FileBackend(tmp_path / "store")
    without_second_copies(store)  # they would be taken instead
    return store


def every_reading_call(store: str) -> list[Callable[[], object]]:
    def fresh() -> ckpt.Checkpointer:
        return ckpt.Checkpointer(store)

    return [
        lambda: fresh().restore({"state": {"x": torch.zeros(5000, dtype=torch.int64), "name": ""}}),
        lambda: fresh().read("state/x"),
        lambda: fresh().verify(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("evil", list(EVIL))
def test_hostile_record_is_an_error_of_ours(
    backend: FileBackend, evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    EVIL[evil](backend)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for call in every_reading_call(backend.url):
        with pytest.raises(ckpt.CkptError) as caught:
            call()
        assert not isinstance(caught.value, ckpt.InternalError)
    for command in ("show", "verify"):
        code = cli([command, backend.url])
        assert code in (0, 2, 10, 20), (command, code)
    capsys.readouterr()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if evil != "part that swells to a gigabyte":  # there the test itself makes the gigabyte
        assert grown < 64 << 20


def test_newer_versions_say_upgrade(backend: FileBackend) -> None:
    EVIL["part of a newer version"](backend)
    with pytest.raises(ckpt.FormatVersionError, match="upgrade"):
        ckpt.Checkpointer(backend).read("state/x")


@pytest.mark.parametrize("what", ["ckpt.json", "log", "packs", "parts", "manifests"])
def test_symbolic_link_in_a_store_is_not_followed(
    backend: FileBackend, tmp_path: Path, what: str
) -> None:
    root = Path(backend.url)
    target = next(path for path in [root / what, *(root / what).rglob("*")] if path.is_file())
    secret = tmp_path / "secret"
    target.rename(secret)
    target.symlink_to(secret)
    for call in every_reading_call(backend.url)[:2]:
        with pytest.raises(ckpt.CkptError):
            call()


def test_record_behind_the_last_one_of_another_writer_is_not_followed() -> None:
    store = MemoryBackend("gap")
    with ckpt.Checkpointer(store, job="job") as checkpointer:
        checkpointer.save({"state": {"x": 1}}, step=1)
    data = body(store, only(store, "log/", last=True))
    store.put(log_key(7), [data])
    info = ckpt.Checkpointer(store).latest()
    assert info is not None
    assert info.maybe_stale
    with pytest.raises(ckpt.IntegrityError, match="hole"):
        ckpt.Checkpointer(store).save({"state": {"x": 1}}, step=2)


@pytest.mark.slow
def test_hostile_class_names_import_nothing(tmp_path: Path) -> None:
    program = f"""
import sys, torch, ckpt, dataclasses
@dataclasses.dataclass
class Config:
    x: int
Config.__module__, Config.__qualname__ = "antigravity", "Popen"
with ckpt.Checkpointer({str(tmp_path / "store")!r}) as c:
    c.save({{"state": {{"c": Config(1)}}}}, step=1)
try:
    ckpt.Checkpointer({str(tmp_path / "store")!r}).restore({{"state": {{"c": None}}}})
except ckpt.CkptError:
    pass
assert "antigravity" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        env={**os.environ, "BROWSER": "true"},
    )
