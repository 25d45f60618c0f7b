"""Objects and listings as large as real jobs make them, on both servers with both clients."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from kit.s3_clients import open_with
from kit.servers.s3 import S3Server

from ckpt.backends.base import Backend
from ckpt.testing.contract import keys, read

pytestmark = pytest.mark.slow

MIB = 1 << 20
SIZE = 70 * MIB + 12345


@pytest.fixture(params=["s3_server", "moto_server"])
def store(
    request: pytest.FixtureRequest, client: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Backend, S3Server]]:
    server: S3Server = request.getfixturevalue(request.param)
    bucket = server.bucket()
    store = open_with(client, monkeypatch, bucket.url, bucket.options)
    yield store, server
    store.close()


@functools.cache
def body() -> bytes:
    return random.Random(1).randbytes(SIZE)


def test_object_in_several_parts_is_read_back_in_parallel_ranges(
    store: tuple[Backend, S3Server],
) -> None:
    backend, _ = store
    whole = body()
    cuts = [0, 5, 17 * MIB, 17 * MIB + 1, 40 * MIB, len(whole)]
    pieces = [memoryview(whole)[low:high] for low, high in itertools.pairwise(cuts)]
    backend.put("packs/a", pieces)
    backend.put("packs/b", [whole])
    rng = random.Random(2)
    starts = [rng.randrange(len(whole) - 9 * MIB) for _ in range(16)]

    def check(start: int) -> bool:
        stop = start + rng.randrange(1, 9 * MIB)
        return read(backend, "packs/a", start, stop) == whole[start:stop]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, starts))
    for key in ("packs/a", "packs/b"):
        assert read(backend, key) == whole


def test_several_large_puts_at_once_are_all_whole(store: tuple[Backend, S3Server]) -> None:
    backend, _ = store
    whole = memoryview(body())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: backend.put(f"packs/{n}", [whole[n : n + 33 * MIB]]), range(4)))
    for number in range(4):
        assert read(backend, f"packs/{number}") == whole[number : number + 33 * MIB]


@pytest.mark.parametrize("server", ["s3_server", "moto_server"])
def test_listing_of_more_than_one_page_is_whole_and_in_order(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = request.getfixturevalue(server).bucket()
    names = [f"log/{number:020d}.json" for number in range(1050)] + ["log.x", "logs/1", "packs/1"]
    with (
        closing(open_with("obstore", monkeypatch, bucket.url, bucket.options)) as writer,
        ThreadPoolExecutor(8) as pool,
    ):
        list(pool.map(lambda name: writer.put(name, [b"x"]), names))
    for client in ("obstore", "s3fs"):
        with closing(open_with(client, monkeypatch, bucket.url, bucket.options)) as store:
            assert keys(store) == sorted(names)
            assert keys(store, "log/") == names[:1050]
            assert keys(store, "log/", names[1020]) == names[1021:1050]
