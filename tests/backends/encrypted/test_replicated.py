"""Encryption around several stores: a copy that does not decrypt sends the reader to another one,
which mends it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence

import pytest

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.checked import (
    Check,
    MultiStoreBackend,
    read_alone,
    read_checked,
    read_object,
    stores_of,
    write_quorum_of,
)
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, NotFoundError, UsageError
from ckpt.testing.contract import read

OLD, NEW, STRANGE = (
    EncryptionKey.of(hashlib.sha256(name).digest()) for name in (b"old", b"new", b"strange")
)
PACK, MANIFEST = "packs/a", "manifests/m"
BODY = random.Random(1).randbytes(400_000)


class Pair:
    """Two stores as one: writes to both, reads the first copy that is right and mends the other
    with it."""

    def __init__(self) -> None:
        self.left, self.right = MemoryBackend("left"), MemoryBackend("right")
        self.mended: list[tuple[str, str]] = []
        self.counting: frozenset[int] | None = None

    @property
    def stores(self) -> tuple[Backend, ...]:
        return (self.left, self.right)

    @property
    def write_quorum(self) -> int:
        return 2

    @property
    def url(self) -> str:
        return "pair:"

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        self.counting = full

    def await_caught_up(
        self, timeout_s: float, *, of: frozenset[int] | None = None, least: int | None = None
    ) -> bool:
        return False  # it keeps no account of what its stores miss

    def capabilities(self) -> Capabilities:
        return self.left.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        for store in self.stores:
            store.put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self.read_checked(key, out, lambda _: None, offset_bytes=offset_bytes)

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        def look(store: Backend) -> str | None:
            store.read_into(key, out, offset_bytes=offset_bytes)
            return check(out)

        self._first_right(key, look)

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        found = [b""]

        def look(store: Backend) -> str | None:
            found[0] = read_alone(store, key, bytes_max=bytes_max)
            return check(memoryview(found[0]))

        self._first_right(key, look)
        return found[0]

    def stat(self, key: str) -> Stat | None:
        return self.left.stat(key) or self.right.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self.left.list(prefix, after=after)

    def delete(self, key: str) -> None:
        for store in self.stores:
            store.delete(key)

    def close(self) -> None:
        """Nothing to close."""

    def _first_right(self, key: str, look: Callable[[Backend], str | None]) -> None:
        wrong: list[tuple[Backend, str]] = []
        for store in self.stores:
            try:
                why = look(store)
            except (NotFoundError, IntegrityError) as error:
                why = str(error)
            if why is None:
                for bad, _ in wrong:
                    bad.put(key, [whole(store, key)])
                    self.mended.append((bad.url, key))
                return
            wrong.append((store, why))
        if all(store.stat(key) is None for store in self.stores):
            raise NotFoundError(f"no such object. key={key}")
        raise IntegrityError(f"no copy is right. key={key} why={[why for _, why in wrong]}")


def whole(store: Backend, key: str) -> bytes:
    return read_alone(store, key, bytes_max=1 << 40)


def flip(store: Backend, key: str, at: int) -> None:
    body = bytearray(whole(store, key))
    body[at] ^= 1
    store.put(key, [body])


def right(expected: bytes) -> Check:
    return lambda found: None if found == expected else "other bytes"


@pytest.fixture
def pair() -> Pair:
    return Pair()


@pytest.fixture
def store(pair: Pair) -> Backend:
    return encrypted(pair, EncryptionKeys(NEW))


def test_several_stores_stay_several_and_one_stays_one(pair: Pair, store: Backend) -> None:
    assert isinstance(store, MultiStoreBackend)
    assert not isinstance(encrypted(MemoryBackend(), EncryptionKeys(NEW)), MultiStoreBackend)
    assert write_quorum_of(store) == 2
    assert [one.url for one in stores_of(store)] == ["memory:left", "memory:right"]
    store.count_only(frozenset({1}))
    assert pair.counting == {1}


def test_log_is_written_to_each_store_as_it_is(pair: Pair, store: Backend) -> None:
    first = stores_of(store)[0]
    first.put("log/1", [b"record"], create_only=True)
    assert whole(pair.left, "log/1") == b"record"
    pair.right.put("log/1", [b"record"])
    assert read_object(store, "log/1", right(b"record"), bytes_max=100) == b"record"
    out = memoryview(bytearray(3))
    read_checked(store, "log/1", out, right(b"cor"), offset_bytes=2)
    assert not pair.mended


def test_both_copies_hold_the_same_bytes(pair: Pair, store: Backend) -> None:
    store.put(PACK, [BODY])
    assert whole(pair.left, PACK) == whole(pair.right, PACK)
    assert [read(one, PACK) for one in stores_of(store)] == [BODY, BODY]


@pytest.mark.parametrize("at", [0, 7, 9, 20, 30, 45, 60, 64, 140_000, 400_000])
@pytest.mark.parametrize("ends", [(0, len(BODY)), (0, 100), (120_000, 160_000), (390_000, 400_000)])
def test_damaged_copy_is_passed_over_and_mended_where_it_was_read(
    pair: Pair, store: Backend, at: int, ends: tuple[int, int]
) -> None:
    start, stop = ends
    store.put(PACK, [BODY])
    good = whole(pair.right, PACK)
    flip(pair.left, PACK, at)
    out = memoryview(bytearray(stop - start))
    read_checked(store, PACK, out, right(BODY[start:stop]), offset_bytes=start)
    assert out == BODY[start:stop]
    assert read(store, PACK, start, stop) == BODY[start:stop]
    assert whole(pair.right, PACK) == good
    assert whole(pair.left, PACK) == good or not pair.mended


def test_plain_read_of_a_damaged_copy_is_mended_too(pair: Pair, store: Backend) -> None:
    store.put(PACK, [BODY])
    flip(pair.left, PACK, 100)
    assert read(store, PACK) == BODY
    assert pair.mended == [("memory:left", PACK)]
    assert whole(pair.left, PACK) == whole(pair.right, PACK)


def test_callers_check_sends_the_reader_to_another_copy(pair: Pair, store: Backend) -> None:
    left, right_side = stores_of(store)
    left.put(PACK, [b"older"])
    right_side.put(PACK, [b"newer"])
    left.put(MANIFEST, [b"older manifest"])
    right_side.put(MANIFEST, [b"newer"])
    out = memoryview(bytearray(5))
    read_checked(store, PACK, out, right(b"newer"))
    assert out == b"newer"
    assert read_object(store, MANIFEST, right(b"newer"), bytes_max=100) == b"newer"
    assert pair.mended == [("memory:left", PACK), ("memory:left", MANIFEST)]
    assert read(left, MANIFEST) == b"newer"
    with pytest.raises(IntegrityError):
        read_checked(store, PACK, out, right(b"other"))
    with pytest.raises(IntegrityError):
        read_object(store, MANIFEST, right(b"other"), bytes_max=100)


def test_callers_check_finds_another_copy_of_a_range_though_headers_differ(
    pair: Pair, store: Backend
) -> None:
    left, right_side = stores_of(store)
    left.put(PACK, [b"older, and longer"])
    right_side.put(PACK, [b"newer"])
    out = memoryview(bytearray(3))
    for _ in range(2):
        read_checked(store, PACK, out, right(b"wer"), offset_bytes=2)
        assert out == b"wer"
    assert read(left, PACK) == b"newer"


@pytest.mark.parametrize("at", [0, 20, 50, 60, 64, -1])
def test_small_object_with_a_damaged_copy_is_read_and_mended(
    pair: Pair, store: Backend, at: int
) -> None:
    store.put(MANIFEST, [b"{}"])
    flip(pair.left, MANIFEST, at)
    assert read_object(store, MANIFEST, right(b"{}"), bytes_max=2) == b"{}"
    assert pair.mended == [("memory:left", MANIFEST)]
    with pytest.raises(IntegrityError):
        read_object(store, MANIFEST, right(b"{}"), bytes_max=1)


def test_missing_and_truncated_copies_are_passed_over(pair: Pair, store: Backend) -> None:
    store.put(PACK, [BODY])
    pair.left.delete(PACK)
    assert read(store, PACK, 100_000, 100_100) == BODY[100_000:100_100]
    for stop in (40, 64, 64 + 131_088, 64 + 131_088 + 9):
        pair.left.put(PACK, [whole(pair.right, PACK)[:stop]])
        assert store.stat(PACK).size_bytes == len(BODY)  # type: ignore[union-attr]
        assert read(store, PACK) == BODY
    with pytest.raises(NotFoundError):
        read_object(store, "parts/none", right(b""), bytes_max=10)
    with pytest.raises(NotFoundError):
        read_checked(store, "parts/none", memoryview(bytearray(1)), right(b""))


def test_damage_everywhere_is_an_error_and_nothing_is_mended(pair: Pair, store: Backend) -> None:
    store.put(PACK, [BODY])
    flip(pair.left, PACK, 140_000)
    flip(pair.right, PACK, 140_001)
    for start in (0, 131_072):
        with pytest.raises(IntegrityError):
            read(store, PACK, start, 170_000)
    assert not pair.mended


def test_wrong_key_mends_nothing(pair: Pair) -> None:
    encrypted(pair, EncryptionKeys(OLD)).put(PACK, [BODY])
    encrypted(pair, EncryptionKeys(OLD)).put(MANIFEST, [b"{}"])
    stranger = encrypted(pair, EncryptionKeys(STRANGE))
    for start in (0, 131_072):
        with pytest.raises(UsageError, match="wrong encryption key"):
            read(stranger, PACK, start, 170_000)
    with pytest.raises(UsageError, match="wrong encryption key"):
        read_object(stranger, MANIFEST, right(b"{}"), bytes_max=100)
    assert not pair.mended


def test_copies_under_different_keys_are_read_whichever_is_sound(pair: Pair) -> None:
    for damaged, at in ((0, 140_000), (1, 140_000), (0, 30), (1, 30)):
        encrypted(pair.left, EncryptionKeys(OLD)).put(PACK, [BODY])
        encrypted(pair.right, EncryptionKeys(NEW)).put(PACK, [BODY])
        flip(pair.stores[damaged], PACK, at)
        both = encrypted(pair, EncryptionKeys(NEW, (OLD,)))
        assert read(both, PACK, 132_000, 144_000) == BODY[132_000:144_000]
        assert read(both, PACK) == BODY


def test_copy_put_into_one_store_is_alike_after_a_change_of_keys(pair: Pair) -> None:
    encrypted(pair, EncryptionKeys(OLD)).put(PACK, [BODY])
    good = whole(pair.right, PACK)
    left, right_side = stores_of(encrypted(pair, EncryptionKeys(NEW, (OLD,))))
    pair.left.delete(PACK)
    left.put(PACK, [read(right_side, PACK)])
    assert whole(pair.left, PACK) == good
    left.put("packs/b", [b"fresh"])
    assert read(encrypted(pair.left, EncryptionKeys(NEW)), "packs/b") == b"fresh"
