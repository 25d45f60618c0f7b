"""Reads: the first right copy, never two writers in the caller's memory, and what was bad is mended
only where that is safe."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from kit.replicated.stores import (
    PATIENT,
    QUICK,
    STEADY,
    WAIT_S,
    Gated,
    Heard,
    Remembering,
    away,
    read,
    replicated,
    wait_until,
)

from ckpt.backends.checked import read_checked, read_object
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError
from ckpt.format.canonical import digest
from ckpt.testing.faults import CountingBackend, Fault, FaultyBackend, Harm

RIGHT = bytes(range(256)) * 40
QUARTER = len(RIGHT) // 4


def check_for(right: bytes, of: bytes = RIGHT):  # type: ignore[no-untyped-def]
    wanted = digest(right)
    return lambda data: None if digest(data) == wanted else "wrong bytes"


def quarter(store, number: int) -> bytes:  # type: ignore[no-untyped-def]
    """A checked read of a quarter of the object at ``k``."""
    at = number * QUARTER
    out = bytearray(QUARTER)
    read_checked(store, "k", memoryview(out), check_for(RIGHT[at : at + QUARTER]), offset_bytes=at)
    return bytes(out)


def filled(names: str = "abc") -> list[Remembering]:
    memories = [Remembering(name) for name in names]
    for memory in memories:
        memory.put("k", [RIGHT])
    return memories


def flipped(*at: int) -> bytes:
    body = bytearray(RIGHT)
    for offset in at:
        body[offset] ^= 0x10
    return bytes(body)


def test_nearest_store_alone_is_read_while_it_is_quick() -> None:
    stores = [CountingBackend(memory) for memory in filled()]
    with replicated(stores, pace=PATIENT, prefer=(2,)) as store:
        for number in range(20):
            assert quarter(store, number % 4) == RIGHT[number % 4 * QUARTER :][:QUARTER]
    assert [len(one.calls("read_into")) for one in stores] == [0, 0, 20]


def test_slow_first_store_is_hedged_and_writes_nothing_into_the_callers_memory_later() -> None:
    memories = filled()
    stores = [Gated(memory) for memory in memories]
    memories[0].write_at_rest("k", b"\xee" * len(RIGHT))
    with replicated(stores, prefer=(0, 1, 2)) as store:
        stores[0].stop("read_into")
        out = bytearray(len(RIGHT))
        read_checked(store, "k", memoryview(out), check_for(RIGHT))
        assert bytes(out) == RIGHT
        assert [one.count("read_into") for one in stores[:2]] == [1, 1]
        stores[0].release()
        wait_until(lambda: stores[0].inside == 0)
        wait_until(lambda: store._process_state().group.memory.used_bytes == 0)
        assert bytes(out) == RIGHT


def test_two_slow_stores_are_hedged_by_the_third() -> None:
    stores = [Gated(memory) for memory in filled()]
    with replicated(stores, prefer=(0, 1, 2)) as store:
        for one in stores[:2]:
            one.stop("read_into")
        assert read(store, "k", len(RIGHT)) == RIGHT
        assert [one.count("read_into") for one in stores] == [1, 1, 1]


def test_quick_first_store_is_not_hedged() -> None:
    stores = [Gated(memory) for memory in filled()]
    pace = dataclasses.replace(QUICK, hedge_s_first=WAIT_S, hedge_s_min=WAIT_S, hedge_s_max=WAIT_S)
    with replicated(stores, pace=pace, prefer=(1,)) as store:
        gate = threading.Timer(0.1, stores[1].release)
        stores[1].stop("read_into")
        gate.start()
        assert read(store, "k", len(RIGHT)) == RIGHT
    assert [one.count("read_into") for one in stores] == [0, 1, 0]


@pytest.mark.slow
def test_hung_store_is_no_longer_read_from_and_is_asked_again_when_it_is_back() -> None:
    heard = Heard()
    stores = [Gated(memory) for memory in filled()]
    with replicated(stores, prefer=(0,), tell=heard) as store:
        stores[0].stop("read_into", "stat")  # what asks whether it is back hangs too
        assert read(store, "k", 10) == RIGHT[:10]
        down = heard.wait_for("store-down")
        assert "has not returned" in down.text
        asked = stores[0].count("read_into")
        for _ in range(30):
            assert read(store, "k", 10) == RIGHT[:10]
        assert stores[0].count("read_into") == asked
        stores[0].release()
        heard.wait_for("store-back")
        assert read(store, "k", 10) == RIGHT[:10]
        assert stores[0].count("read_into") == asked + 1


@pytest.mark.parametrize(
    "harm", [Harm.LOST_REQUEST, Harm.TRUNCATED, Harm.FLIPPED, Harm.DENIED, Harm.LOST_REPLY]
)
def test_failing_or_lying_first_stores_are_fallen_over(harm: Harm) -> None:
    memories = filled()
    bad = [Fault(harm=harm, op="read_into", times=None)]
    # Two stores that lied in the same way would agree with each other.
    stores = [
        FaultyBackend(memories[0], bad, seed=1),
        FaultyBackend(memories[1], bad, seed=2),
        memories[2],
    ]
    with replicated(stores, prefer=(0, 1, 2), pace=STEADY) as store:
        for number in range(4):
            assert quarter(store, number) == RIGHT[number * QUARTER :][:QUARTER]
    assert all(memory.versions["k"] == {RIGHT} for memory in memories)


def test_missing_copy_met_on_the_way_is_brought_back() -> None:
    heard = Heard()
    memories = filled()
    memories[0].wipe()
    with replicated(memories, prefer=(0,), tell=heard, pace=STEADY) as store:
        assert quarter(store, 1) == RIGHT[QUARTER : 2 * QUARTER]
        assert store.await_caught_up(WAIT_S)
        assert memories[0].held("k") == RIGHT
        assert heard.wait_for("under-replicated").facts["need"] == "missing"
        assert heard.wait_for("copy-mended").facts["objects"] == 1


def test_damage_at_rest_is_mended_where_the_copies_agree_about_the_rest() -> None:
    heard = Heard()
    memories = filled()
    memories[0].write_at_rest("k", flipped(QUARTER + 5))
    with replicated(memories, prefer=(0,), tell=heard, pace=STEADY) as store:
        assert quarter(store, 0) == RIGHT[:QUARTER]
        assert quarter(store, 1) == RIGHT[QUARTER : 2 * QUARTER]
        assert store.await_caught_up(WAIT_S)
        assert memories[0].held("k") == RIGHT
        assert heard.wait_for("under-replicated").facts["need"] == "damaged"
        heard.wait_for("copy-mended")


def test_copies_damaged_in_different_places_keep_each_others_only_right_bytes() -> None:
    heard = Heard()
    memories = filled("ab")
    memories[0].write_at_rest("k", first := flipped(5))
    memories[1].write_at_rest("k", second := flipped(3 * QUARTER + 5))
    with replicated(memories, prefer=(0,), tell=heard, pace=STEADY) as store:
        for _ in range(3):
            for number in range(4):
                assert quarter(store, number) == RIGHT[number * QUARTER :][:QUARTER]
        wait_until(lambda: not any(one.keys for one in store.behind()))
        assert (memories[0].held("k"), memories[1].held("k")) == (first, second)
        assert any(one.overflow for one in store.behind())
        assert "ckpt scrub" in heard.events[-1].text


def test_truncated_copy_is_mended_and_a_longer_one_is_left() -> None:
    memories = filled()
    memories[0].write_at_rest("k", RIGHT[: 2 * QUARTER])
    with replicated(memories, prefer=(0,), pace=STEADY) as store:
        assert quarter(store, 3) == RIGHT[3 * QUARTER :]
        assert store.await_caught_up(WAIT_S)
        assert memories[0].held("k") == RIGHT
        memories[0].write_at_rest("k", longer := flipped(0) + b"more")
        assert quarter(store, 0) == RIGHT[:QUARTER]
        wait_until(lambda: store.behind()[0].keys == 0)
        assert store.behind()[0].overflow
    assert memories[0].held("k") == longer


def test_read_that_went_wrong_once_leaves_a_right_copy_alone() -> None:
    memories = filled()
    stores = [
        CountingBackend(FaultyBackend(memories[0], [Fault(harm=Harm.FLIPPED, op="read_into")])),
        *memories[1:],
    ]
    with replicated(stores, prefer=(0,), pace=STEADY) as store:
        assert quarter(store, 0) == RIGHT[:QUARTER]
        assert store.await_caught_up(WAIT_S)
    assert not stores[0].calls("put")


def test_whole_checked_object_replaces_whatever_is_there() -> None:
    memories = filled()
    memories[0].write_at_rest("k", b"something else altogether")
    memories[1].write_at_rest("k", flipped(0, 9000))
    with replicated(memories, prefer=(0, 1), pace=STEADY) as store:
        assert read_object(store, "k", check_for(RIGHT), bytes_max=1 << 20) == RIGHT
        assert store.await_caught_up(WAIT_S)
    assert [memory.held("k") for memory in memories] == [RIGHT] * 3


def test_too_large_copy_is_passed_over() -> None:
    memories = filled()
    memories[0].write_at_rest("k", RIGHT * 3)
    with replicated(memories, prefer=(0,), pace=STEADY) as store:
        assert read_object(store, "k", check_for(RIGHT), bytes_max=len(RIGHT)) == RIGHT
        assert store.await_caught_up(WAIT_S)
        assert memories[0].held("k") == RIGHT
        with pytest.raises(IntegrityError, match="too large to read"):
            read_object(store, "k", check_for(RIGHT), bytes_max=5)


def test_not_found_needs_enough_stores_that_say_so() -> None:
    memories = filled()
    with replicated(memories) as store:
        with pytest.raises(NotFoundError, match=r"key=none .*memory:a.*memory:b.*memory:c"):
            read(store, "none", 1)
        memories[0].away = away(memories[0])
        with pytest.raises(NotFoundError):
            read(store, "none", 1)
        memories[1].away = away(memories[1])
        with pytest.raises(
            UnavailableError, match=r"too few stores answer .*memory:a: the store is away"
        ):
            read(store, "none", 1)
        memories[0].away = None
        store.count_only(frozenset({1, 2}))
        with pytest.raises(UnavailableError):
            read(store, "none", 1)


def test_last_copy_beyond_the_quorum_is_found() -> None:
    memories = filled()
    memories[0].wipe()
    memories[1].wipe()
    with replicated(memories, prefer=(0, 1, 2), pace=STEADY) as store:
        assert read(store, "k", len(RIGHT)) == RIGHT
        assert store.await_caught_up(WAIT_S)
    assert [memory.held("k") for memory in memories] == [RIGHT] * 3


def test_damage_everywhere_is_integrity_and_unavailable_where_a_silent_store_might_have_it() -> (
    None
):
    memories = filled()
    for memory in memories[:2]:
        memory.write_at_rest("k", flipped(3))
    memories[2].away = away(memories[2])
    with replicated(memories, pace=STEADY) as store:
        with pytest.raises(UnavailableError):
            quarter(store, 0)
        memories[2].away = None
        memories[2].write_at_rest("k", flipped(4))
        with pytest.raises(IntegrityError, match=r"no store has undamaged bytes .*wrong bytes"):
            quarter(store, 0)
        assert quarter(store, 1) == RIGHT[QUARTER : 2 * QUARTER]
    assert [memory.held("k") for memory in memories] == [flipped(3), flipped(3), flipped(4)]


def test_stores_that_failed_for_a_moment_are_asked_again() -> None:
    memories = filled("ab")
    once = [Fault(harm=Harm.LOST_REQUEST, op="read_into")]
    with replicated([FaultyBackend(memory, once) for memory in memories]) as store:
        assert read(store, "k", len(RIGHT)) == RIGHT


def test_raising_check_leaves_no_memory_held() -> None:
    def explode(data: memoryview) -> str | None:
        raise ZeroDivisionError

    with replicated(filled()) as store:
        with pytest.raises(ZeroDivisionError):
            read_checked(store, "k", memoryview(bytearray(10)), explode)
        wait_until(lambda: store._process_state().group.memory.used_bytes == 0)


def test_deleted_while_missing_somewhere_does_not_come_back() -> None:
    memories = [Remembering(name) for name in "abc"]
    memories[2].away = away(memories[2])
    with replicated(memories) as store:
        store.put("k", [b"x"])
        with pytest.raises(UnavailableError, match="not all stores removed"):
            store.delete("k")
        memories[2].away = None
        assert store.await_caught_up(WAIT_S)
    assert [memory.held("k") for memory in memories] == [None] * 3


def test_deleted_object_is_not_brought_back_from_a_store_that_kept_it() -> None:
    memories = [Remembering(name) for name in "abc"]
    keeps = FaultyBackend(memories[0], [Fault(harm=Harm.READ_ONLY, op="delete", times=None)])
    memories[2].away = away(memories[2])
    with replicated([keeps, *memories[1:]]) as store:
        store.put("k", [b"x"])
        with pytest.raises(UnavailableError, match="not all stores removed"):
            store.delete("k")
        memories[2].away = None
        assert store.await_caught_up(WAIT_S)
    assert [memory.held("k") for memory in memories] == [b"x", None, None]


def test_object_gone_everywhere_is_no_longer_missed() -> None:
    memories = [Remembering(name) for name in "abc"]
    memories[2].away = away(memories[2])
    with replicated(memories) as store:
        store.put("k", [b"x"])
        for memory in memories[:2]:
            memory.wipe()  # another process deleted it
        memories[2].away = None
        assert store.await_caught_up(WAIT_S)
    assert memories[2].held("k") is None


@pytest.mark.slow
def test_store_that_hangs_while_another_is_mended_from_it_is_given_up_for_the_next() -> None:
    memories = filled()
    memories[2].wipe()
    stores = [Gated(memory) for memory in memories]
    with replicated(stores, prefer=(2, 0, 1)) as store:
        stores[0].stop("read_into")
        assert quarter(store, 0) == RIGHT[:QUARTER]
        assert store.await_caught_up(WAIT_S)
        assert memories[2].held("k") == RIGHT
        stores[0].release()
        wait_until(lambda: store._process_state().group.memory.used_bytes == 0)


def test_copy_that_rotted_before_it_could_be_copied_is_left_to_a_scrub() -> None:
    memories = filled("ab")
    memories[0].wipe()
    stores = [Gated(memory) for memory in memories]
    with replicated(stores, pace=STEADY, prefer=(0,)) as store:
        stores[0].stop("stat")
        assert quarter(store, 0) == RIGHT[:QUARTER]
        stores[0].wait_inside()
        memories[1].write_at_rest("k", flipped(1))
        stores[0].release()
        wait_until(lambda: store.behind()[0].keys == 0)
        assert store.behind()[0].overflow
    assert memories[0].held("k") is None


def test_plain_memory_backend_reads_empty_ranges() -> None:
    with replicated([MemoryBackend(name) for name in "ab"]) as store:
        store.put("k", [b""])
        assert read(store, "k", 0) == b""
