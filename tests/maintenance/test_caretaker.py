"""The caretaker of a job's stores: what an earlier keeper knew to be missing is found again."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator

import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.elastic.decorator import resilient
from ckpt.events import Event
from ckpt.format import keys
from ckpt.log.high_water import FILES
from ckpt.log.journal import Journal
from ckpt.maintenance.caretaker import StoreCaretaker
from ckpt.maintenance.scrub.history import last_record, record_scrub, scrubbed_s_ago
from ckpt.maintenance.store_set import missing_by_listing
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.testing.sample import write_sample_store

WAIT_S = 20.0


def objects(store: MemoryBackend) -> set[str]:
    """The keys of packs, parts and manifests."""
    prefixes = (keys.PACKS, keys.PARTS, keys.MANIFESTS)
    return {stat.key for prefix in prefixes for stat in store.list(prefix)}


@pytest.fixture
def stores() -> list[MemoryBackend]:
    """Three stores that hold the same snapshots, and nobody who remembers anything of them."""
    stores = [MemoryBackend(str(number)) for number in range(3)]
    writing = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)
    write_sample_store(writing)
    assert writing.await_caught_up(WAIT_S)
    writing.close()
    return stores


@pytest.fixture
def backend(stores: list[MemoryBackend]) -> Iterator[ReplicatedBackend]:
    """The stores as a keeper that was just started has them."""
    opened = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=2)
    yield opened
    opened.close()


class Watched:
    """The events of a caretaker, and whether it has looked at all stores once."""

    def __init__(self, backend: ReplicatedBackend, *, newest: bool = True) -> None:
        self.events: list[Event] = []
        self.looks = 0
        self.changed = threading.Condition()
        self.caretaker = StoreCaretaker(
            backend,
            has_newest_epoch=lambda _: self._is_newest(newest),
            emit=self.events.append,
            interval_s=0.01,
        )

    def _is_newest(self, newest: bool) -> bool:
        with self.changed:
            self.looks += 1
            self.changed.notify_all()
        return newest

    def wait_compared(self, stores: int) -> None:
        """Until the listings of all stores were compared, and what was missing was brought."""
        until_s = time.monotonic() + WAIT_S
        while len(self.caretaker._coverage.compared) < stores:
            assert time.monotonic() < until_s, self.events
            threading.Event().wait(0.01)


def test_what_a_store_missed_is_brought_to_it_after_the_keeper_that_knew_it_is_gone(
    stores: list[MemoryBackend], backend: ReplicatedBackend
) -> None:
    whole = objects(stores[0])
    lost = [key for key in sorted(whole) if key.startswith(keys.PACKS)][:2]
    for key in lost:
        stores[2].delete(key)
    part = next(key for key in whole if key.startswith(keys.PARTS))
    stores[1].delete(part)
    assert missing_by_listing(stores) == [0, 1, 2]
    watched = Watched(backend)
    watched.wait_compared(3)
    watched.caretaker.stop(WAIT_S)
    assert [objects(store) for store in stores] == [whole] * 3
    alarms = [event.text for event in watched.events if event.alarm]
    assert [text.partition(", so")[0] for text in alarms] == [
        f"{stores[1].url} lacks 1 objects that another store has",
        f"{stores[2].url} lacks 2 objects that another store has",
    ]
    assert Journal.open(backend).refresh().stale_reason == ""


def test_whole_stores_are_compared_once_without_a_word(
    stores: list[MemoryBackend], backend: ReplicatedBackend
) -> None:
    watched = Watched(backend)
    watched.wait_compared(3)
    watched.caretaker.stop(WAIT_S)
    assert watched.events == []
    assert watched.looks == 0


def test_keeper_that_was_replaced_brings_nothing(
    stores: list[MemoryBackend], backend: ReplicatedBackend
) -> None:
    lost = next(key for key in objects(stores[0]) if key.startswith(keys.PACKS))
    stores[2].delete(lost)
    watched = Watched(backend, newest=False)
    with watched.changed:
        assert watched.changed.wait_for(lambda: watched.looks > 1, WAIT_S)
    watched.caretaker.stop(WAIT_S)
    assert lost not in objects(stores[2])


def test_jobs_scrub_once_a_day_unless_told_otherwise() -> None:
    assert inspect.signature(resilient).parameters["scrub_every"].default == "24h"


DAY_S = 24 * 3600.0


def now_unix_ms() -> int:
    return int(time.time() * 1000)


@pytest.mark.parametrize(
    ("ended_ago_s", "due"), [(2 * DAY_S, True), (DAY_S / 2, False), (-2 * DAY_S, True)]
)
def test_scrubs_are_due_by_when_the_last_one_of_any_keeper_ended(
    ended_ago_s: float, due: bool
) -> None:
    store = MemoryBackend()
    write_sample_store(store)
    record_scrub([store], (), now_unix_ms=now_unix_ms() - int(ended_ago_s * 1000))
    before = {stat.key for stat in store.list(keys.SCRUBS)}
    done, asked = threading.Event(), threading.Semaphore(0)
    caretaker = StoreCaretaker(
        store,
        has_newest_epoch=lambda _: asked.release() or True,
        emit=lambda event: done.set() if event.kind == "scrub-done" else None,
        scrub_every_s=DAY_S,
        interval_s=0.01,
    )
    assert asked.acquire(timeout=WAIT_S)
    assert not due or done.wait(WAIT_S)
    caretaker.stop(WAIT_S)
    assert done.is_set() == due
    if due:
        record = last_record([store])
        assert record is not None and len(record.verified) == 3
        ago_s = scrubbed_s_ago([store], now_unix_ms=now_unix_ms())
        assert ago_s is not None and ago_s < WAIT_S
    else:
        assert {stat.key for stat in store.list(keys.SCRUBS)} == before


def test_record_that_names_no_snapshot_hides_none_that_an_earlier_scrub_verified() -> None:
    first, second = MemoryBackend("1"), MemoryBackend("2")
    for store in (first, second):
        write_sample_store(store)
    entry = Journal.open(first).refresh().snapshots[0]
    record_scrub([first], [entry], now_unix_ms=now_unix_ms() - 1000)
    record_scrub([second], (), now_unix_ms=now_unix_ms())  # the first one did not answer
    record = last_record([first, second])
    assert record is not None and len(record.verified) == 1


def test_time_of_stores_that_were_never_scrubbed_counts_from_the_first_keeper() -> None:
    store = MemoryBackend()
    write_sample_store(store)
    asked = threading.Semaphore(0)
    for _ in range(2):
        caretaker = StoreCaretaker(
            store,
            has_newest_epoch=lambda _: asked.release() or True,
            emit=lambda _: None,
            scrub_every_s=DAY_S,
            interval_s=0.01,
        )
        assert asked.acquire(timeout=WAIT_S)
        caretaker.stop(WAIT_S)
        records = [stat.key for stat in store.list(keys.SCRUBS)]
        assert len(records) == 1, "the second keeper counts from the first one's record"


def test_store_that_takes_no_record_is_not_scrubbed_again_at_once() -> None:
    inner = MemoryBackend()
    write_sample_store(inner)
    record_scrub([inner], (), now_unix_ms=now_unix_ms() - int(2 * DAY_S * 1000))
    full = FaultyBackend(inner, [Fault(harm=Harm.FULL, op="put", times=None)])
    events: list[Event] = []
    asked = threading.Semaphore(0)
    caretaker = StoreCaretaker(
        full,
        has_newest_epoch=lambda _: asked.release() or True,
        emit=events.append,
        scrub_every_s=DAY_S,
        interval_s=0.01,
    )
    until_s = time.monotonic() + WAIT_S
    while "care-waits" not in (kinds := [event.kind for event in events]):
        assert time.monotonic() < until_s, kinds
        threading.Event().wait(0.01)
    while asked.acquire(timeout=0.2):  # it asks only if a scrub is due
        assert time.monotonic() < until_s, "it scrubs and scrubs"
    caretaker.stop(WAIT_S)
    assert [event.kind for event in events].count("scrub-done") == 1


class ShortLives:
    """Keepers over one store, of which each is stopped once it has read ``packs`` packs."""

    def __init__(self, store: MemoryBackend, packs: int) -> None:
        self.packs = packs
        self.counting = CountingBackend(store)
        self.ended = False

    def live(self) -> None:
        counting = self.counting
        before = len(counting.calls("read_into", prefix=keys.PACKS))
        caretaker: list[StoreCaretaker] = []
        known, over = threading.Event(), threading.Event()

        class Stopping(CountingBackend):
            def read_into(inner, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:  # noqa: N805
                counting.read_into(key, out, offset_bytes=offset_bytes)
                if len(counting.calls("read_into", prefix=keys.PACKS)) - before >= self.packs:
                    assert known.wait(WAIT_S)
                    caretaker[0]._stop.set()
                    over.set()

        def emit(event: Event) -> None:
            if event.kind == "scrub-done":
                self.ended = True
                over.set()

        caretaker.append(
            StoreCaretaker(
                Stopping(counting),
                has_newest_epoch=lambda _: True,
                emit=emit,
                scrub_every_s=DAY_S,
                interval_s=0.01,
            )
        )
        known.set()
        assert over.wait(WAIT_S)
        caretaker[0].stop(WAIT_S)


def test_keepers_that_live_shorter_than_a_scrub_takes_read_everything_once_together() -> None:
    store = MemoryBackend()
    write_sample_store(store, steps=range(10, 60, 10))
    record_scrub([store], (), now_unix_ms=now_unix_ms() - int(2 * DAY_S * 1000))
    packs = {stat.key for stat in store.list(keys.PACKS)}
    lives, count = ShortLives(store, packs=2), 0
    while not lives.ended:
        count += 1
        assert count <= len(packs), "each begins anew"
        lives.live()
    assert count > 2, "no keeper could do it alone"
    read = [call.key for call in lives.counting.calls("read_into", prefix=keys.PACKS)]
    assert sorted(read) == sorted(packs)
    record = last_record([store])
    assert record is not None and len(record.verified) == 5
    assert store.stat(keys.SCRUB_CURSOR_KEY) is None


def test_store_that_may_be_an_unmounted_disk_gets_no_record() -> None:
    whole, empty = MemoryBackend(), MemoryBackend()
    write_sample_store(whole)
    record_scrub([whole, empty], (), now_unix_ms=5)
    assert [stat.key for stat in whole.list("")][-1] == keys.scrub_key(5)
    assert list(empty.list("")) == []


@pytest.mark.parametrize("newest", [True, False])
def test_damage_in_a_store_alone_is_told_by_the_newest_writer(newest: bool) -> None:
    store = MemoryBackend()
    write_sample_store(store)
    pack = next(stat for stat in store.list(keys.PACKS))
    store.put(pack.key, [b"x" * pack.size_bytes])
    events: list[Event] = []
    told = threading.Event()
    asked = threading.Semaphore(0)

    def emit(event: Event) -> None:
        events.append(event)
        if event.kind == "scrub-done":
            told.set()

    def has_newest_epoch(journal: Journal) -> bool:
        asked.release()
        return newest

    caretaker = StoreCaretaker(
        store,
        has_newest_epoch=has_newest_epoch,
        emit=emit,
        scrub_every_s=0.01,
        interval_s=0.01,
    )
    if newest:
        assert told.wait(WAIT_S)
    else:
        assert asked.acquire(timeout=WAIT_S)
        assert asked.acquire(timeout=WAIT_S), "the first answer was acted on"
    caretaker.stop(WAIT_S)
    assert told.is_set() == newest
    assert any(event.alarm and pack.key in event.text for event in events) == newest


def test_marks_that_cannot_be_kept_are_told_once(
    backend: ReplicatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FILES, "trouble", lambda: "the folder does not answer.")
    watched = Watched(backend)
    watched.wait_compared(3)
    until_s = time.monotonic() + WAIT_S
    while "mark-unwritten" not in [event.kind for event in watched.events]:
        assert time.monotonic() < until_s
    for _ in range(3):
        watched.caretaker._look_at_marks()
    watched.caretaker.stop(WAIT_S)
    assert [event.alarm for event in watched.events if event.kind == "mark-unwritten"] == [True]
