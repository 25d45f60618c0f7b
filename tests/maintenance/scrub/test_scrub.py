"""Damage at rest in any copy of any object, and what a scrub makes of it."""

from __future__ import annotations

import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from kit.damage import (
    SOAK,
    bytes_of,
    faults_of,
    flip,
    folded,
    harm,
    names_nothing_missing,
    objects_of,
    record_of,
    replicate,
    without_second_copies,
)

from ckpt.backends.base import Backend
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import NotFoundError, UnavailableError, UsageError
from ckpt.events import Event
from ckpt.format import keys
from ckpt.format.records import Tag, decode_record, make_record
from ckpt.format.scrubs import ScrubCursor
from ckpt.log.catalog import load_index
from ckpt.log.journal import Journal
from ckpt.log.state import Committed
from ckpt.maintenance.copies import CopyStatus
from ckpt.maintenance.scrub.history import ScrubCursors, record_scrub
from ckpt.maintenance.scrub.report import ScrubReport
from ckpt.maintenance.scrub.scrub import Scrub, scrub
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm
from ckpt.testing.sample import SampleWriter, damage, sample_ranks, write_sample_store
from ckpt.values import ChunkLocation, SnapshotId

SEEDS = range(200 if SOAK else 12)


def scrubbed(stores: list[Backend], **options: object) -> ScrubReport:
    report = scrub(stores, len(stores) // 2 + 1, **options)  # type: ignore[arg-type]
    assert report is not None
    assert report.complete
    return report


def places(store: Backend, step: int) -> list[tuple[bytes, ChunkLocation]]:
    index = load_index(store, folded(store), SnapshotId(1, step))
    return [
        place
        for part in index.parts
        for shard in part.shards
        for place in zip(shard.digests, shard.locations, strict=True)
    ]


@pytest.mark.slow
def test_sound_stores_are_found_sound_and_nothing_is_written(three: list[FileBackend]) -> None:
    counting = [CountingBackend(store) for store in three]
    report = scrubbed(counting)
    assert report.ok
    assert not report.has_findings
    assert report.snapshots == 3
    assert [tally.objects for tally in report.stores] == [tally.ok for tally in report.stores]
    assert len({tally.objects for tally in report.stores}) == 1
    assert not any(store.calls("put") or store.calls("delete") for store in counting)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_one_harmed_copy_of_every_object_is_mended(
    three: list[FileBackend], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    harmed = {
        key: (number := rng.randrange(3), harm(three[number].url, key, rng))
        for key in objects_of(three[0])
    }
    report = scrubbed(list(three), threads=rng.choice((1, 3)))
    assert report.ok, report
    assert report.lost == report.unrepaired == 0
    assert all(
        trouble.repaired and trouble.store == harmed[trouble.key][0] for trouble in report.problems
    )
    for store in three:
        assert faults_of(store, truth) == []
        assert store.stat(keys.JOB_KEY) is not None
    assert not scrubbed(list(three)).has_findings


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_any_harm_to_two_of_three_copies_ends_with_all_right(
    three: list[FileBackend], seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    for key in objects_of(three[0]):
        if key.startswith(keys.LOG) and key == max(objects_of(three[0], keys.LOG)):
            continue  # the last record on one of three stores may not count: see below
        for number in rng.sample(range(3), 2):
            harm(three[number].url, key, rng)
    report = scrubbed(list(three))
    assert report.ok, report
    for store in three:
        assert faults_of(store, truth) == []
    assert not scrubbed(list(three)).has_findings


def test_pack_of_which_no_copy_is_whole_is_put_together_from_all(three: list[FileBackend]) -> None:
    _, first = places(three[0], 10)[0]
    wanted = sorted({at.offset_bytes for _, at in places(three[0], 10) if at.pack == first.pack})
    truth = bytes_of(three[0], first.pack)
    for number, store in enumerate(three):
        for offset in wanted:
            if wanted.index(offset) % 3 != number:
                flip(store.url, first.pack, offset)
    report = scrubbed(list(three))
    assert report.ok
    assert [(trouble.key, trouble.repaired) for trouble in report.problems] == [
        (first.pack, True)
    ] * 3
    assert [bytes_of(store, first.pack) for store in three] == [truth] * 3


def test_chunk_that_no_store_has_is_reported_exactly_and_the_rest_is_mended(
    three: list[FileBackend], tmp_path: Path
) -> None:
    rng = random.Random(3)
    found = places(three[0], 10)
    _, lost = next(place for place in found if place[1].offset_bytes > 0)
    for store in three:
        flip(store.url, lost.pack, lost.offset_bytes + 1)
    others = [key for key in objects_of(three[0]) if key != lost.pack]
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    for key in others:
        harm(three[rng.randrange(3)].url, key, rng)
    report = scrubbed(list(three))
    assert not report.ok
    assert (report.lost, report.unrepaired) == (1, 0)
    gone = [trouble for trouble in report.problems if trouble.lost]
    assert [(trouble.key, trouble.store, trouble.offsets) for trouble in gone] == [
        (lost.pack, number, (lost.offset_bytes,)) for number in range(3)
    ]
    assert all(trouble.repaired for trouble in report.problems if not trouble.lost)
    again = scrubbed(list(three))
    assert [trouble.key for trouble in again.problems] == [lost.pack] * 3
    assert objects_of(three[1], keys.PARTS, keys.LOG) == objects_of(truth, keys.PARTS, keys.LOG)


def test_damaged_pack_never_spreads_to_a_store_that_lacks_it(trio: list[FileBackend]) -> None:
    _, lost = places(trio[0], 10)[0]
    flip(trio[0].url, lost.pack, lost.offset_bytes)
    flip(trio[1].url, lost.pack, lost.offset_bytes)
    (Path(trio[2].url) / lost.pack).unlink()
    report = scrubbed(list(trio))
    assert report.lost == 1
    assert trio[2].stat(lost.pack) is None


def test_manifest_that_no_store_has_is_lost_and_its_snapshot_named(trio: list[FileBackend]) -> None:
    key = next(key for key in objects_of(trio[0], keys.MANIFESTS) if "20-" in key)
    for store in trio:
        flip(store.url, key, 5)
    report = scrubbed(list(trio))
    assert report.lost == 1
    assert report.untraced == (SnapshotId(1, 20),)
    assert report.snapshots == 3


def test_wiped_store_is_left_alone_unless_it_is_to_be_filled(
    three: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    old = record_of(three[1])
    shutil.rmtree(three[1].url)
    report = scrubbed(list(three))
    assert (report.ok, report.away, report.stores[1].role) == (False, 1, "empty")
    assert report.unrepaired == report.lost == 0
    assert not Path(three[1].url).exists()

    report = scrubbed(list(three), fill_empty=True)
    assert report.ok, report
    assert faults_of(three[1], truth) == []
    new = record_of(three[1])
    assert new.store_id != old.store_id
    assert new.log_id == old.log_id
    assert not scrubbed(list(three)).has_findings


def test_two_wiped_stores_of_three_are_filled_from_the_last(
    three: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    last = max(objects_of(three[0], keys.LOG))
    for number in (0, 2):
        shutil.rmtree(three[number].url)
    report = scrubbed(list(three), fill_empty=True)
    known = folded(truth).stores is not None
    for number in (0, 2):
        wrong = faults_of(three[number], truth)
        # The last record is on fewer stores than the log's quorum: whether it counts can't be known
        # from one of three.
        assert wrong == ([last] if known else [])
    assert report.lost == 0


def test_folder_whose_log_is_gone_gets_it_in_order(trio: list[FileBackend], tmp_path: Path) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    shutil.rmtree(Path(trio[2].url) / "log")
    counting = CountingBackend(trio[2])
    report = scrubbed([trio[0], trio[1], counting])
    assert report.ok
    written = [call.key for call in counting.calls("put")]
    assert written == sorted(objects_of(truth, keys.LOG))


def test_store_that_lacks_an_object_that_could_not_be_written_gets_no_record(
    trio: list[FileBackend],
) -> None:
    pack = places(trio[0], 10)[0][1].pack
    shutil.rmtree(Path(trio[2].url) / "log")
    (Path(trio[2].url) / pack).unlink()
    full = FaultyBackend(trio[2], [Fault(harm=Harm.FULL, key=keys.PACKS, times=None)])
    report = scrubbed([trio[0], trio[1], full])
    assert not report.ok
    assert report.unrepaired > 0
    assert objects_of(trio[2], keys.LOG) == {}
    assert "full" in report.stores[2].problem


def test_lone_store_is_checked_and_its_damage_is_told(lone: Path, tmp_path: Path) -> None:
    store = replicate(lone, tmp_path / "s", None)
    pack = places(store, 20)[0][1]
    flip(store.url, pack.pack, pack.offset_bytes)
    report = scrubbed([store])
    assert not report.ok
    assert report.lost == 1
    assert report.problems[0].offsets == (pack.offset_bytes,)


def test_hole_of_a_lone_log_is_told_and_mended_from_a_replica(lone: Path, tmp_path: Path) -> None:
    store = replicate(lone, tmp_path / "s", None)
    other = replicate(lone, tmp_path / "o", 7)
    without_second_copies(store)
    (Path(store.url) / keys.log_key(2)).unlink()
    alone = scrubbed([store])
    assert alone.hole is not None
    assert alone.hole.seq == 2
    assert not alone.ok
    assert scrubbed([store, other]).ok
    assert folded(store).hole is None


def test_truth_told_by_the_caller_fills_a_hole_that_no_store_can(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    for store in trio:
        flip(store.url, keys.log_key(3), 9)
    report = scrubbed(list(trio))
    assert report.hole is not None
    report = scrubbed(list(trio), counted_record=lambda seq: bytes_of(truth, keys.log_key(seq)))
    assert report.ok, report
    assert all(faults_of(store, truth) == [] for store in trio)


def test_last_record_on_too_few_stores_is_not_copied_unless_truth_says_so(
    trio: list[FileBackend],
) -> None:
    state = folded(trio[0])
    body = Tag("late", SnapshotId(1, 30))
    record = make_record(
        body, job=state.job, seq=state.next_seq, epoch=1, write_id="w", prev=state.head_digest
    )
    trio[1].put(keys.log_key(record.seq), [record.encode()])
    report = scrubbed(list(trio))
    assert trio[0].stat(keys.log_key(record.seq)) is None
    assert trio[2].stat(keys.log_key(record.seq)) is None
    assert report.unrepaired == report.lost == 0
    report = scrubbed(
        list(trio), counted_record=lambda seq: record.encode() if seq == record.seq else None
    )
    assert report.ok
    assert all(bytes_of(store, keys.log_key(record.seq)) == record.encode() for store in trio)


def test_damaged_vote_that_reached_too_few_stores_is_no_hole(trio: list[FileBackend]) -> None:
    """A writer died over it: whatever it was, it was told to nobody."""
    state = folded(trio[0])
    trio[1].put(keys.log_key(state.next_seq), [b'{"torn'])
    report = scrubbed(list(trio))
    assert report.ok
    assert report.hole is None


def test_record_that_lost_a_race_stays_and_the_right_one_goes_to_the_second_key(
    trio: list[FileBackend],
) -> None:
    right = bytes_of(trio[0], keys.log_key(3))
    assert right is not None
    mine = decode_record(right)
    other = make_record(
        Tag("never", SnapshotId(1, 10)),
        job=mine.job,
        seq=3,
        epoch=1,
        write_id="loser",
        prev=mine.prev,
    ).encode()
    (Path(trio[2].url) / keys.log_key(3)).write_bytes(other)
    report = scrubbed(list(trio))
    assert report.ok
    assert bytes_of(trio[2], keys.log_key(3)) == other
    assert bytes_of(trio[2], keys.settled_key(3)) == right
    assert not scrubbed(list(trio)).has_findings
    (Path(trio[2].url) / keys.settled_key(3)).write_bytes(b"noise")
    assert scrubbed(list(trio)).ok
    assert bytes_of(trio[2], keys.settled_key(3)) == right


@pytest.mark.parametrize("noisy", [keys.log_key(3), keys.settled_key(3)])
def test_damage_at_one_key_of_a_place_is_mended_though_the_other_has_the_record(
    trio: list[FileBackend], noisy: str
) -> None:
    right = bytes_of(trio[0], keys.log_key(3))
    assert right is not None
    for store in trio:
        store.put(keys.settled_key(3), [right])
    (Path(trio[1].url) / noisy).write_bytes(b"noise")
    report = scrubbed(list(trio))
    assert report.ok
    assert [(trouble.key, trouble.store, trouble.repaired) for trouble in report.problems] == [
        (noisy, 1, True)
    ]
    assert bytes_of(trio[1], noisy) == right


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_lost_ckpt_json_comes_back_with_the_same_id(trio: list[FileBackend], how: str) -> None:
    record = record_of(trio[1])
    path = Path(trio[1].url) / keys.JOB_KEY
    path.unlink() if how == "gone" else path.write_bytes(b"{}")
    report = scrubbed(list(trio), repair=False)
    assert not report.ok
    assert not path.exists() or path.read_bytes() == b"{}"
    report = scrubbed(list(trio))
    assert report.ok, report
    assert record_of(trio[1]) == record
    assert not scrubbed(list(trio)).has_findings


def test_two_lost_ids_are_not_guessed(trio: list[FileBackend]) -> None:
    for number in (0, 1):
        (Path(trio[number].url) / keys.JOB_KEY).unlink()
    report = scrubbed(list(trio))
    assert not report.ok
    assert [tally.role for tally in report.stores] == ["headless", "headless", "ready"]
    assert "id is unknown" in report.stores[0].problem


def test_objects_that_nothing_refers_to_are_counted_and_left_alone(trio: list[FileBackend]) -> None:
    packs = sorted(objects_of(trio[0], keys.PACKS))
    strays = {
        packs[0].replace("0.pack", "7.pack"): b"p" * 10,
        packs[-1].replace("0.pack", "7.pack"): b"p" * 20,
        keys.part_key(SnapshotId(9, 9), "other-00000000000000aa"): b"q" * 30,
        keys.manifest_key(SnapshotId(1, 25), "0" * 32): b"m" * 40,
    }
    for key, data in strays.items():
        trio[1].put(key, [data])
    report = scrubbed(list(trio))
    assert report.ok
    assert [(tally.orphans, tally.orphan_bytes) for tally in report.stores] == [
        (0, 0),
        (4, 100),
        (0, 0),
    ]
    assert all(bytes_of(trio[1], key) == data for key, data in strays.items())


def test_snapshot_that_is_dropped_and_swept_meanwhile_is_no_damage(
    lone: Path, tmp_path: Path
) -> None:
    store = replicate(lone, tmp_path / "s", None)
    now = [0.0]

    class Sweeping(CountingBackend):
        """Drops and sweeps a snapshot right after the log was read."""

        swept = False

        def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
            if key.startswith(keys.MANIFESTS) and not self.swept:
                self.swept = True
                Journal.open(store).drop([SnapshotId(1, 10)])
                for stat in list(store.list(keys.PARTS)):
                    if "0010/" in stat.key:
                        store.delete(stat.key)
                now[0] += 3600.0
            super().read_into(key, out, offset_bytes=offset_bytes)

    report = Scrub([Sweeping(store)], 1, clock=lambda: now[0]).run()
    assert report is not None
    assert report.lost == report.problems_total == 0


def test_stopped_scrub_goes_on_where_it_was_and_finds_the_same(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    rng = random.Random(5)
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    for key in objects_of(trio[0]):
        harm(trio[rng.randrange(3)].url, key, rng)

    stop = threading.Event()

    class Stopping(CountingBackend):
        """Sets ``stop`` at each 7th read."""

        def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
            super().read_into(key, out, offset_bytes=offset_bytes)
            if len(self.calls("read_into")) % 7 == 0 and not key.startswith((keys.LOG, keys.FOLDS)):
                stop.set()

    work = Scrub([Stopping(trio[0]), trio[1], trio[2]], 2)
    runs = 0
    while True:
        report = work.run(stop)
        runs += 1
        assert runs < 100
        if report is not None and report.complete:
            break
        stop.clear()
    assert runs > 2
    assert report.ok, report
    assert report.problems_total == sum(tally.missing + tally.damaged for tally in report.stores)
    assert (
        len({(trouble.key, trouble.store) for trouble in report.problems}) == report.problems_total
    )
    assert all(faults_of(store, truth) == [] for store in trio)


def test_store_that_does_not_answer_is_away_and_the_others_are_mended(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    rng = random.Random(1)
    for key in objects_of(trio[0]):
        harm(trio[rng.randrange(2)].url, key, rng)
    silent = FaultyBackend(trio[2], [Fault(harm=Harm.LOST_REQUEST, times=None)])
    report = scrubbed([trio[0], trio[1], silent])
    assert [tally.role for tally in report.stores] == ["ready", "ready", "away"]
    assert not report.ok
    assert report.lost == 0
    wrong = {key for number in (0, 1) for key in faults_of(trio[number], truth)}
    # With one store silent, the last record is on one of three only where a copy of it was harmed:
    # it is not guessed.
    assert wrong <= {max(objects_of(truth, keys.LOG))}


def test_store_that_falls_silent_half_way_is_given_up_after_a_few_objects(
    trio: list[FileBackend],
) -> None:
    silent = FaultyBackend(
        trio[1], [Fault(harm=Harm.LOST_REQUEST, op="read_into", key=keys.PACKS, times=None)]
    )
    report = scrubbed([trio[0], silent, trio[2]])
    assert report.stores[1].role == "away"
    assert report.stores[0].ok == report.stores[2].ok == report.stores[0].objects
    assert report.lost == 0


def test_no_store_that_answers_is_an_error(trio: list[FileBackend], tmp_path: Path) -> None:
    silent = [FaultyBackend(store, [Fault(harm=Harm.LOST_REQUEST, times=None)]) for store in trio]
    with pytest.raises(UnavailableError):
        scrubbed(list(silent))
    with pytest.raises(NotFoundError):
        scrubbed([FileBackend(tmp_path / "nothing")])


def test_stores_that_do_not_belong_together_are_refused(lone: Path, tmp_path: Path) -> None:
    one = replicate(lone, tmp_path / "a", None)
    same = replicate(lone, tmp_path / "b", None)
    other = MemoryBackend("other")
    write_sample_store(other)
    with pytest.raises(UsageError, match="one and the same"):
        scrubbed([one, same])
    with pytest.raises(UsageError, match="do not hold one log"):
        scrubbed([one, other])


def test_looking_only_writes_nothing(trio: list[FileBackend]) -> None:
    rng = random.Random(9)
    for key in objects_of(trio[0]):
        harm(trio[rng.randrange(3)].url, key, rng)
    before = [objects_of(store) for store in trio]
    report = scrubbed(list(trio), repair=False)
    assert not report.ok
    assert report.lost == 0
    assert report.unrepaired == report.problems_total > 0
    assert [objects_of(store) for store in trio] == before


def test_events_tell_of_damage_of_what_was_mended_and_of_the_end(trio: list[FileBackend]) -> None:
    told: list[Event] = []
    flip(trio[0].url, next(iter(objects_of(trio[0], keys.PARTS))), 9)
    scrubbed(list(trio), emit=told.append)
    assert [(event.kind, event.alarm) for event in told] == [
        ("scrub-mended", False),
        ("scrub-damage", True),
        ("scrub-done", False),
    ]


def test_only_some_snapshots_are_read_where_only_they_are_asked_for(
    trio: list[FileBackend],
) -> None:
    flip(trio[0].url, next(key for key in objects_of(trio[0], keys.PARTS) if "0010/" in key), 9)
    newest = Scrub(list(trio), 2, repair=False, only=frozenset((SnapshotId(1, 30),))).run()
    oldest = Scrub(list(trio), 2, repair=False, only=frozenset((SnapshotId(1, 10),))).run()
    assert newest is not None
    assert oldest is not None
    assert newest.ok
    assert not oldest.ok


def test_small_budget_scrubs_in_rounds_and_finds_the_same(
    trio: list[FileBackend], tmp_path: Path
) -> None:
    truth = replicate(tmp_path / "0", tmp_path / "truth", None)
    rng = random.Random(11)
    for key in objects_of(trio[0], keys.PACKS):
        harm(trio[rng.randrange(3)].url, key, rng)
    report = Scrub(list(trio), 2, budget_bytes=1).run()
    assert report is not None
    assert report.ok
    assert all(faults_of(store, truth) == [] for store in trio)
    assert [tally.orphans for tally in report.stores] == [0, 0, 0]


class Cut(CountingBackend):
    """A store on which each process's scrub is cut short after some reads of packs."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.stop = threading.Event()
        self.left = 0

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        super().read_into(key, out, offset_bytes=offset_bytes)
        self.left -= key.startswith(keys.PACKS)
        if self.left <= 0:
            self.stop.set()


def scrub_in_lives(store: Cut, rng: random.Random, **options: int) -> tuple[set[int], int]:
    """Scrub until the end in processes that each read a few packs; the steps of the snapshots that
    were verified then, and how many lives it took."""
    for life in range(1, 200):
        store.stop, store.left = threading.Event(), rng.randrange(1, 4)
        verified: list[Committed] = []
        cursors = ScrubCursors([store], every_s=rng.choice((0.0, 1e9)))
        report = Scrub([store], 1, **options).run(
            store.stop, on_verified=verified.extend, cursors=cursors
        )
        if report is not None and report.complete:
            return {entry.snapshot.step for entry in verified}, life
    raise AssertionError("each life began anew")


@pytest.mark.parametrize("seed", range(100 if SOAK else 4))
def test_scrub_that_no_process_lives_to_end_reads_each_pack_once(seed: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    inner = MemoryBackend()
    write_sample_store(inner, steps=range(10, 80, 10))
    packs = [stat.key for stat in inner.list(keys.PACKS)]
    for key in rng.sample(packs, rng.randrange(3)):
        damage(inner, key, 0)
    whole: list[Committed] = []
    alone = Scrub([inner], 1).run(on_verified=whole.extend)
    store = Cut(inner)
    verified, lives = scrub_in_lives(store, rng, budget_bytes=rng.choice((1, 1 << 20)))
    assert verified == {entry.snapshot.step for entry in whole}
    read = [call.key for call in store.calls("read_into", prefix=keys.PACKS)]
    assert set(read) == set(packs)
    assert len(read) <= len(packs) + lives, "no more than the one at which it was cut"
    assert lives > 2 and alone is not None


def test_snapshot_that_came_while_a_scrub_was_cut_short_is_not_verified_by_it() -> None:
    inner = MemoryBackend()
    writer = write_sample_store(inner, steps=(10, 20, 30))
    store = Cut(inner)
    store.left = 2
    cursors = ScrubCursors([store])
    report = Scrub([store], 1).run(store.stop, cursors=cursors)
    assert report is not None and not report.complete and cursors.read() is not None
    writer.write(SnapshotId(1, 40), sample_ranks(40))
    writer.journal.untag("best")
    writer.journal.drop([SnapshotId(1, 10)])
    verified, _ = scrub_in_lives(store, random.Random(0))
    assert verified == {20, 30}


def test_scrub_goes_on_where_a_copy_could_not_be_repaired_or_with_another_store_anew(
    trio: list[FileBackend],
) -> None:
    packs = sorted(objects_of(trio[0], keys.PACKS))
    Path(trio[2].url, packs[1]).unlink()
    refusing = FaultyBackend(trio[2], [Fault(harm=Harm.FULL, op="put", key=keys.PACKS, times=None)])
    cursors = ScrubCursors(trio, every_s=0.0)
    cut = Scrub([*trio[:2], refusing], 2).run(cursors=cursors)
    assert cut is not None and cut.complete and not cut.ok
    at = cursors.read()
    assert at is not None and at.last_pack == packs[0], "no record may reach a store that lacks one"
    report = Scrub(list(trio), 2).run(cursors=cursors)
    assert report is not None and report.ok and trio[2].stat(packs[1]) is not None
    assert cursors.read() is not None
    cursors.keep(replace(at, last_pack=packs[-1], store_ids=at.store_ids[:2]))
    Path(trio[1].url, packs[0]).unlink()
    report = Scrub(list(trio), 2).run(cursors=cursors)
    assert report is not None and trio[1].stat(packs[0]) is not None


def test_scrub_gone_on_with_gives_no_store_a_record_of_a_snapshot_whose_packs_it_left_out(
    trio: list[FileBackend],
) -> None:
    before = folded(trio[0])
    stores = open_stores([store.url for store in trio], emit=lambda event: None)
    journal = Journal.open(stores)
    journal.open_epoch(resume=before.snapshots[-1].snapshot)
    writer = SampleWriter(stores, job=journal.job, _journal=journal, _writes=1000)
    writer.write(SnapshotId(journal.refresh().epoch, 40), sample_ranks(40))
    stores.close()
    added = folded(trio[0])
    packs = sorted(objects_of(trio[0], keys.PACKS))
    # The third store had every object of the snapshots that the scrub began with, and then missed
    # the new one, whose packs have keys below the one that the scrub had come to.
    Path(trio[2].url, packs[-1]).unlink()
    for seq in range(1, added.next_seq):
        Path(trio[2].url, keys.log_key(seq)).unlink()
    cursors = ScrubCursors(trio)
    cursor = ScrubCursor(
        at_unix_ms=cursors.now_unix_ms(),
        last_pack=packs[-1],
        store_ids=tuple(record_of(store).store_id for store in trio),
        sound=frozenset((one.snapshot, one.manifest_digest) for one in before.snapshots),
    )
    cursors.keep(cursor)
    report = Scrub(list(trio), 2).run(cursors=cursors)
    assert report is not None and report.complete
    assert folded(trio[2]).next_seq == added.snapshots[-1].seq, "up to the new snapshot's record"
    assert names_nothing_missing(trio[2])
    report = Scrub(list(trio), 2).run()
    assert report is not None and report.ok
    assert all(faults_of(store, trio[0]) == [] for store in trio)


def test_store_that_fell_silent_is_not_asked_to_take_the_cursor() -> None:
    inner = MemoryBackend()
    write_sample_store(inner, steps=range(10, 80, 10))
    other = MemoryBackend("other")
    for key, data in objects_of(inner).items():
        other.put(key, [data or b""])
    other.put(keys.JOB_KEY, [replace(record_of(inner), store_id="1" * 32).encode()])
    fault = Fault(harm=Harm.LOST_REQUEST, op="read_into", key=keys.PACKS, skip=1, times=None)
    answering, silent = CountingBackend(inner), CountingBackend(FaultyBackend(other, [fault]))
    stores = [answering, silent]
    report = Scrub(stores, 1).run(cursors=ScrubCursors(stores, every_s=0.0))
    assert report is not None and report.away == 1
    noted = [len(store.calls("put", prefix=keys.SCRUB_CURSOR_KEY)) for store in stores]
    assert 0 < noted[1] < noted[0], "once it is away nothing waits for it"


@pytest.mark.parametrize(
    ("at_s", "ended_s", "known"),
    [
        (-100, -200, True),
        (-100, -50, False),
        (-100, 3600, True),
        (600, -200, False),
        (-8 * 86400, None, False),
    ],
)
def test_cursor_counts_until_a_scrub_ends_and_for_a_week(
    at_s: int, ended_s: int | None, known: bool
) -> None:
    store, now = MemoryBackend(), 10**12
    write_sample_store(store)
    if ended_s is not None:
        record_scrub([store], (), now_unix_ms=now + ended_s * 1000)
    cursors = ScrubCursors([store], now_unix_ms=lambda: now)
    pack = next(stat.key for stat in store.list(keys.PACKS))
    entry = (SnapshotId(1, 10), "0" * 32)
    cursor = ScrubCursor(
        at_unix_ms=now + at_s * 1000, last_pack=pack, store_ids=("a",), sound=frozenset([entry])
    )
    cursors.keep(cursor)
    assert cursors.read() == (cursor if known else None)
    store.put(keys.SCRUB_CURSOR_KEY, [b"{}"])
    assert cursors.read() is None
    with pytest.raises(UsageError):
        cursors.keep(replace(cursor, last_pack="packs/"))


@pytest.mark.slow
def test_log_longer_than_a_window_is_compared_with_its_folds(tmp_path: Path) -> None:
    store = MemoryBackend("long")
    writer = SampleWriter(store)
    writer.open_epoch()
    writer.write(SnapshotId(1, 1), sample_ranks(1))
    for number in range(2100):
        writer.journal.tag(f"t{number % 5}", SnapshotId(1, 1))
    other = MemoryBackend("copy")
    for key, data in objects_of(store).items():
        assert data is not None
        other.put(key, [data])
    other.put(keys.JOB_KEY, [replace(record_of(store), store_id="1" * 32).encode()])
    assert list(objects_of(store, keys.FOLDS)) == [keys.fold_key(seq) for seq in (1919, 1983, 2047)]
    truth = objects_of(store)
    for seq in (0, 1023, 1024, 1025, 2047, 2101):
        other.delete(keys.log_key(seq))
    other.delete(keys.fold_key(1983))
    store.put(keys.fold_key(2047), [truth[keys.fold_key(1983)] or b""])
    report = scrubbed([store, other])
    assert report.ok, report.problems
    assert {trouble.key for trouble in report.problems} == {
        *(keys.log_key(seq) for seq in (0, 1023, 1024, 1025, 2047, 2101)),
        keys.fold_key(1983),
        keys.fold_key(2047),
    }
    assert objects_of(store) == objects_of(other) == truth


@pytest.mark.slow
def test_fold_that_is_wrong_everywhere_is_made_anew() -> None:
    store = MemoryBackend("long")
    writer = SampleWriter(store)
    writer.open_epoch()
    writer.write(SnapshotId(1, 1), sample_ranks(1))
    for number in range(1100):
        writer.journal.tag(f"t{number % 5}", SnapshotId(1, 1))
    right = bytes_of(store, keys.fold_key(1023))
    store.put(keys.fold_key(1023), [b"noise"])
    report = scrubbed([store])
    assert report.ok
    assert bytes_of(store, keys.fold_key(1023)) == right


def log_past_a_fold(store: Backend) -> SampleWriter:
    """Snapshots before and behind the log's first fold, at record 63."""
    writer = SampleWriter(store)
    writer.open_epoch()
    writer.write(SnapshotId(1, 1), sample_ranks(1))
    for number in range(70):
        writer.journal.tag(f"t{number % 5}", SnapshotId(1, 1))
    writer.write(SnapshotId(1, 2), sample_ranks(2))
    return writer


def test_record_lost_before_a_fold_hides_no_snapshot_and_no_live_object() -> None:
    store = MemoryBackend("long")
    log_past_a_fold(store)
    without_second_copies(store)
    store.delete(keys.log_key(7))
    report = scrubbed([store])
    assert report.hole is None
    assert (report.snapshots, report.records) == (2, 73)
    assert report.lost == 1
    assert not report.ok
    assert [(entry.key, entry.lost) for entry in report.problems] == [(keys.log_key(7), True)]
    assert [one.orphans for one in report.stores] == [0]


@pytest.mark.parametrize("gone", [(7, 17), (7, 8, 30, 62), (0, 2, 4)])
def test_records_between_lost_ones_are_neither_lost_nor_damaged(gone: tuple[int, ...]) -> None:
    store, other = MemoryBackend("long"), MemoryBackend("copy")
    log_past_a_fold(store)
    without_second_copies(store)
    truth = objects_of(store)
    for key, data in truth.items():
        assert data is not None
        other.put(key, [data])
    other.put(keys.JOB_KEY, [replace(record_of(store), store_id="1" * 32).encode()])
    for seq in gone:
        store.delete(keys.log_key(seq))
        other.delete(keys.log_key(seq))
        del truth[keys.log_key(seq)]
    store.put(keys.log_key(gone[-1]), [b"rot"])
    truth[keys.log_key(gone[-1])] = b"rot"
    other.delete(keys.log_key(12))
    report = scrubbed([store, other])
    assert (report.lost, report.unrepaired, report.hole) == (len(gone), 0, None)
    assert {(entry.key, entry.store, entry.status) for entry in report.problems if entry.lost} == {
        (keys.log_key(seq), number, CopyStatus.MISSING) for seq in gone for number in (0, 1)
    } - {(keys.log_key(gone[-1]), 0, CopyStatus.MISSING)} | {
        (keys.log_key(gone[-1]), 0, CopyStatus.DAMAGED)
    }
    assert objects_of(store) == truth
    del truth[keys.log_key(gone[-1])]
    assert objects_of(other) == truth


def test_old_records_between_lost_ones_that_nothing_proves_are_not_called_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ckpt.log.fold.RECENT_MAX", 32)
    monkeypatch.setattr("ckpt.log.stored_fold.RECENT_MAX", 32)
    stores = [MemoryBackend(str(number)) for number in range(3)]
    several = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)
    log_past_a_fold(several)
    assert several.await_caught_up(10.0)
    several.close()
    for store in stores:
        store.delete(keys.log_key(7))
        store.delete(keys.log_key(17))
        store.delete(keys.log_key(50))
    stores[1].delete(keys.log_key(12))
    report = scrubbed(list(stores))
    assert report.lost == 3
    assert {entry.key for entry in report.problems if entry.lost} == {
        keys.log_key(seq) for seq in (7, 17, 50)
    }
    # Behind 17 the fold knows who wrote which record; before it nothing does, so nothing is copied.
    unproven = [entry for entry in report.problems if not entry.lost]
    assert {entry.status for entry in unproven} == {CopyStatus.UNREADABLE}
    assert {entry.key for entry in unproven} == {keys.log_key(seq) for seq in range(8, 17)}
    assert all("cannot be proven" in entry.message for entry in unproven)
    assert stores[1].stat(keys.log_key(12)) is None


def test_records_around_a_lost_one_are_mended_in_each_store() -> None:
    store, other = MemoryBackend("long"), MemoryBackend("copy")
    log_past_a_fold(store)
    without_second_copies(store)
    for key, data in objects_of(store).items():
        assert data is not None
        other.put(key, [data])
    other.put(keys.JOB_KEY, [replace(record_of(store), store_id="1" * 32).encode()])
    truth = objects_of(store)
    for one in (store, other):
        one.delete(keys.log_key(7))
    for seq in (5, 8, 40, 66):
        other.delete(keys.log_key(seq))
    report = scrubbed([store, other])
    assert (report.lost, report.unrepaired, report.hole) == (1, 0, None)
    del truth[keys.log_key(7)]
    assert objects_of(store) == objects_of(other) == truth


def test_what_was_scrubbed_restores(three: list[FileBackend]) -> None:
    rng = random.Random(21)
    for key in objects_of(three[0]):
        harm(three[rng.randrange(3)].url, key, rng)
    scrubbed(list(three))
    assert all(names_nothing_missing(store) for store in three)
