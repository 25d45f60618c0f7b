"""A scrub of a log that one store holds alone: both copies of each small object become right."""

from __future__ import annotations

import pytest
from kit.damage import without_second_copies

from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.select import select
from ckpt.maintenance.copies import flip_back
from ckpt.maintenance.scrub.report import ScrubReport
from ckpt.maintenance.scrub.scrub import scrub
from ckpt.testing.sample import write_sample_store


def objects(store: MemoryBackend) -> dict[str, bytes]:
    """Every object of a store."""
    found = {}
    for stat in store.list(""):
        out = bytearray(stat.size_bytes)
        store.read_into(stat.key, memoryview(out))
        found[stat.key] = bytes(out)
    return found


def flip(store: MemoryBackend, key: str, *, at: int = 20, mask: int = 4) -> None:
    data = bytearray(objects(store)[key])
    data[at] ^= mask
    store.put(key, [bytes(data)])


def scrubbed(store: MemoryBackend, *, repair: bool = True) -> ScrubReport:
    report = scrub([store], 1, repair=repair)
    assert report is not None
    return report


@pytest.fixture
def store() -> MemoryBackend:
    store = MemoryBackend()
    write_sample_store(store)
    return store


def small(store: MemoryBackend) -> list[str]:
    """The objects that have a second copy."""
    return [key for key in objects(store) if not key.startswith((keys.PACKS, keys.COPIES))]


def test_damage_of_one_copy_is_told_and_mended_from_the_other(store: MemoryBackend) -> None:
    right = objects(store)
    assert scrubbed(store).problems == ()
    for first in small(store):
        for key in (first, keys.copy_key(first)):
            flip(store, key)
            told = scrubbed(store, repair=False)
            assert not told.ok, key
            assert [problem.key for problem in told.problems] == [key]
            report = scrubbed(store)
            assert report.ok, (key, report)
            assert [problem.repaired for problem in report.problems] == [True]
            assert objects(store) == right, key


def test_store_without_second_copies_gets_them_all_and_that_is_no_damage(
    store: MemoryBackend,
) -> None:
    right = objects(store)
    without_second_copies(store)
    assert scrubbed(store, repair=False).ok
    report = scrubbed(store)
    assert report.ok
    assert report.problems == ()
    assert objects(store) == right


def test_damaged_byte_is_undone_by_the_digest_where_there_is_no_second_copy(
    store: MemoryBackend,
) -> None:
    right = objects(store)
    for mask in (4, 0x5A):
        for key in small(store):
            without_second_copies(store)
            flip(store, key, mask=mask)
            report = scrubbed(store)
            assert report.ok, (key, mask, report.problems)
            assert objects(store) == right, (key, mask)


def test_lost_ckpt_json_is_made_anew_from_the_log(store: MemoryBackend) -> None:
    store.delete(keys.JOB_KEY)
    second = objects(store)[keys.copy_key(keys.JOB_KEY)]
    assert scrubbed(store).ok
    assert objects(store)[keys.JOB_KEY] == second, "its id is that of the second copy"
    for key in (keys.JOB_KEY, keys.copy_key(keys.JOB_KEY)):
        store.put(key, [b"rot"])
    assert scrubbed(store).ok
    state = Journal.open(store, job="sample").refresh()
    assert state.hole is None
    assert load_index(store, state, select(state)).manifest.snapshot.step == 30


def test_what_two_damaged_bytes_cost_is_told_and_not_invented(store: MemoryBackend) -> None:
    key = keys.log_key(2)
    for copy in (key, keys.copy_key(key)):
        flip(store, copy)
        flip(store, copy, at=30)
    report = scrubbed(store)
    assert not report.ok
    assert report.hole is not None
    assert report.hole.seq == 2


def test_search_gives_up_on_large_objects() -> None:
    assert flip_back(b"x" * (33 << 10), lambda _: True) is None
    assert flip_back(b"abc", lambda trial: trial == b"abd") == b"abd"
    assert flip_back(b"abc", lambda trial: trial == b"bbd") is None
