"""Damage in a log that one store holds alone: second copies, and never absence instead of damage."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import ReplicatedBackend
from ckpt.errors import CommitUnknownError, IntegrityError, UnavailableError
from ckpt.format import keys
from ckpt.format.records import Tag, decode_record, make_record
from ckpt.log.catalog import load_index, snapshots
from ckpt.log.journal import Journal
from ckpt.log.select import select
from ckpt.restore.verify import verify
from ckpt.testing.sample import Piece, SampleWriter
from ckpt.values import Box, Leaf, LeafKind, SnapshotId

ROWS = 4096
STEPS = (1, 2, 3)


def pieces(rank: int, step: int) -> list[Piece]:
    """A leaf that changes and one that does not, in halves."""
    found = []
    for name, value in (("moving", step), ("frozen", 7)):
        leaf = Leaf(name=name, kind=LeafKind.TENSOR, dtype="uint8", shape=(2, ROWS))
        data = np.full((1, ROWS), 16 * value + rank, dtype=np.uint8)
        found.append(Piece(leaf, Box((rank, 0), (1, ROWS)), data))
    return found


def filled(store: MemoryBackend | ReplicatedBackend) -> SampleWriter:
    """Three snapshots of two ranks."""
    writer = SampleWriter(store)
    epoch = writer.open_epoch()
    for step in STEPS:
        writer.write(SnapshotId(epoch, step), [pieces(rank, step) for rank in range(2)])
    return writer


def objects(store: MemoryBackend) -> dict[str, bytes]:
    """Every object of a store."""
    found = {}
    for stat in store.list(""):
        out = bytearray(stat.size_bytes)
        store.read_into(stat.key, memoryview(out))
        found[stat.key] = bytes(out)
    return found


def flip(store: MemoryBackend, key: str, at: int, mask: int) -> None:
    """Change one byte of an object."""
    data = bytearray(objects(store)[key])
    data[at % len(data)] ^= mask
    store.put(key, [bytes(data)])


def damaged_steps(store: MemoryBackend) -> tuple[set[int], set[str]]:
    """The steps that cannot be read whole, and the damaged packs that are named. Fails if one is
    not even listed."""
    state = Journal.open(store).refresh()
    assert state.hole is None, state.hole
    assert [info.step for info in snapshots(store, state) if not info.problem] == list(STEPS)
    steps, named = set(), set()
    for step in STEPS:
        report = verify(load_index(store, state, select(state, step=step)), store)
        # It names a first copy that is damaged as well; what that holds was just read.
        bad = {damaged.key for damaged in report.damaged if damaged.key.startswith(keys.PACKS)}
        if bad:
            steps.add(step)
            named |= bad
    return steps, named


@pytest.fixture(scope="module")
def sample() -> Iterator[dict[str, bytes]]:
    """The objects of a store."""
    store = MemoryBackend()
    filled(store)
    yield objects(store)


def check(sample: dict[str, bytes], key: str, at: int, mask: int) -> None:
    """One flipped byte costs nothing, but in a pack: then what needs it is named."""
    store = MemoryBackend()
    for name, data in sample.items():
        store.put(name, [data])
    clean = Journal.open(store).refresh()
    needing = {
        step
        for step in STEPS
        if any(
            location.pack == key
            and location.offset_bytes <= at % len(sample[key])
            and at % len(sample[key]) < location.offset_bytes + location.stored_bytes
            for location in load_index(store, clean, select(clean, step=step)).locations().values()
        )
    }
    flip(store, key, at, mask)
    steps, named = damaged_steps(store)
    assert steps == needing, key
    assert named == ({key} if needing else set())
    # It goes on, and what follows is whole.
    journal = Journal.open(store)
    journal.tag("after", select(journal.refresh()))
    assert Journal.open(store).refresh().tags == {"after": SnapshotId(1, 3)}


def test_each_object_but_packs_has_two_copies(sample: dict[str, bytes]) -> None:
    for key, data in sample.items():
        if not key.startswith((keys.PACKS, keys.COPIES)):
            assert sample[keys.copy_key(key)] == data, key


def test_flipped_bit_of_any_object_costs_at_most_what_its_pack_holds(
    sample: dict[str, bytes],
) -> None:
    for number, (key, data) in enumerate(sample.items()):
        check(sample, key, (number * 37) % len(data), 1)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draw=st.data())
def test_flipped_byte_anywhere_costs_at_most_what_its_pack_holds(
    sample: dict[str, bytes], draw: st.DataObject
) -> None:
    key = draw.draw(st.sampled_from(sorted(sample)))
    at = draw.draw(st.integers(0, len(sample[key]) - 1))
    check(sample, key, at, draw.draw(st.integers(1, 255)))


@pytest.mark.slow
def test_every_byte_of_every_small_object(sample: dict[str, bytes]) -> None:
    for key, data in sample.items():
        if not key.startswith((keys.PACKS, keys.COPIES)):
            for at in range(0, len(data), 3):
                check(sample, key, at, 1 << at % 8)


def test_missing_first_copies_hide_no_snapshot_but_decide_nothing_at_the_end(
    sample: dict[str, bytes],
) -> None:
    end = sum(key.startswith(keys.LOG) for key in sample)
    for gone in ([0], [1], [0, 1, 2], [1, 2], list(range(1, end - 1, 2)), list(range(end - 1))):
        store = MemoryBackend()
        for name, data in sample.items():
            store.put(name, [data])
        for seq in gone:
            store.delete(keys.log_key(seq))
        assert damaged_steps(store) == (set(), set()), gone
        journal = Journal.open(store)
        journal.tag("after", select(journal.refresh()))
        assert Journal.open(store).refresh().tags == {"after": SnapshotId(1, 3)}
    # No listed record follows the last one: what has no position in the log does not count.
    store = MemoryBackend()
    for name, data in sample.items():
        store.put(name, [data])
    store.delete(keys.log_key(end - 1))
    assert Journal.open(store).refresh().next_seq == end - 1


def test_second_copy_outside_of_the_chain_fills_no_gap(sample: dict[str, bytes]) -> None:
    store = MemoryBackend()
    for name, data in sample.items():
        store.put(name, [data])
    right = decode_record(sample[keys.log_key(1)])
    other = make_record(
        right.body, job=right.job, seq=1, epoch=1, write_id="other", prev=right.prev
    )
    store.delete(keys.log_key(1))
    for copy in (other.encode(), sample[keys.log_key(0)], b"rot", None):
        if copy is None:
            store.delete(keys.copy_key(keys.log_key(1)))
        else:
            store.put(keys.copy_key(keys.log_key(1)), [copy])
        state = Journal.open(store).refresh()
        assert state.hole is not None
        assert (state.hole.seq, state.next_seq) == (1, 1)


def test_version_number_that_a_flip_made_newer_is_damage(sample: dict[str, bytes]) -> None:
    for key in (keys.JOB_KEY, keys.log_key(1)):
        name = b'"format_version":' if key == keys.JOB_KEY else b'"v":'
        at = sample[key].index(name) + len(name)
        check(sample, key, at, 2)


def test_damage_of_both_copies_is_never_reported_as_absence(sample: dict[str, bytes]) -> None:
    store = MemoryBackend()
    for name, data in sample.items():
        store.put(name, [data])
    for key in (keys.log_key(1), keys.copy_key(keys.log_key(1))):
        flip(store, key, 20, 4)
    state = Journal.open(store).refresh()
    assert state.hole is not None
    for wanted in ({}, {"step": 2}, {"epoch": 1}, {"tag": "best"}):
        with pytest.raises(IntegrityError, match="as far as the log can be read"):
            select(state, **wanted)  # type: ignore[arg-type]
    for key in (keys.JOB_KEY, keys.copy_key(keys.JOB_KEY)):
        flip(store, key, 20, 4)
    with pytest.raises(IntegrityError):
        Journal.open(store)


def test_store_from_before_there_were_second_copies_gets_them_from_the_next_writer(
    sample: dict[str, bytes],
) -> None:
    store = MemoryBackend()
    for name, data in sample.items():
        if not name.startswith(keys.COPIES):
            store.put(name, [data])
    assert damaged_steps(store) == (set(), set())
    journal = Journal.open(store)
    last = journal.refresh().next_seq - 1
    journal.tag("best", SnapshotId(1, 3))
    held = objects(store)
    for key in (keys.JOB_KEY, keys.log_key(last), keys.log_key(last + 1)):
        assert held[keys.copy_key(key)] == held[key]


def test_copy_that_cannot_be_written_does_not_fail_the_record_and_stays_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryBackend()
    writer = filled(store)
    put, refusing = MemoryBackend.put, [True]

    def refuse(self: MemoryBackend, key: str, data, *, create_only: bool = False) -> None:  # type: ignore[no-untyped-def]
        if key.startswith(keys.COPIES) and refusing:
            raise UnavailableError("the store does not answer")
        put(self, key, data, create_only=create_only)

    monkeypatch.setattr(MemoryBackend, "put", refuse)
    writer.journal.tag("one", SnapshotId(1, 1))
    refusing.clear()
    writer.journal.tag("two", SnapshotId(1, 2))
    held = objects(store)
    end = writer.journal.refresh().next_seq
    assert all(keys.copy_key(keys.log_key(seq)) in held for seq in range(end))


@pytest.mark.parametrize("others_between", [False, True])
def test_record_whose_replies_were_lost_gets_its_copy_from_its_own_writer(
    monkeypatch: pytest.MonkeyPatch, others_between: bool
) -> None:
    store = MemoryBackend()
    writer = filled(store)
    epoch = writer.journal.refresh().epoch
    put, read_into, silent = MemoryBackend.put, MemoryBackend.read_into, [""]
    writer.journal.tag("before", SnapshotId(1, 1))
    lost = keys.log_key(writer.journal.refresh().next_seq)

    def put_silently(self: MemoryBackend, key: str, data, *, create_only: bool = False) -> None:  # type: ignore[no-untyped-def]
        put(self, key, data, create_only=create_only)
        if key == silent[0]:
            raise UnavailableError("the reply was lost")

    def read_silently(self: MemoryBackend, key: str, out, *, offset_bytes: int = 0) -> None:  # type: ignore[no-untyped-def]
        if key == silent[0]:
            raise UnavailableError("the store does not answer")
        read_into(self, key, out, offset_bytes=offset_bytes)

    monkeypatch.setattr(MemoryBackend, "put", put_silently)
    monkeypatch.setattr(MemoryBackend, "read_into", read_silently)
    silent[0] = lost
    body = Tag("one", SnapshotId(1, 1))
    with pytest.raises(CommitUnknownError):
        writer.journal.append(body, epoch=epoch, write_id="again")
    silent[0] = ""
    assert keys.copy_key(lost) not in objects(store), "it may not have got its position"
    if others_between:
        writer.journal.tag("two", SnapshotId(1, 2))
    else:
        writer.journal.append(body, epoch=epoch, write_id="again")
    held = objects(store)
    assert held[keys.copy_key(lost)] == held[lost]


def test_second_copies_are_no_votes_of_a_log_on_several_stores() -> None:
    stores = [MemoryBackend(str(number)) for number in range(3)]
    several = ReplicatedBackend(stores, write_quorum=2, emit=lambda _: None, seed=1)
    filled(several)
    assert several.await_caught_up(10.0)
    state = Journal.open(several).refresh()
    last = keys.log_key(state.next_seq - 1)
    assert not any(key.startswith(keys.COPIES) for store in stores for key in objects(store))
    # A record that only lies in second copies does not count, whatever it says.
    for store in stores:
        data = objects(store)[last]
        store.put(keys.copy_key(last), [data])
        store.delete(last)
    assert Journal.open(several).refresh().next_seq == state.next_seq - 1
    several.close()
