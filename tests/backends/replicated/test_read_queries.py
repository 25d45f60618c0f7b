"""stat, list, delete and create over several stores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.replicated.stores import (
    QUICK,
    WAIT_S,
    Gated,
    Remembering,
    away,
    read,
    replicated,
    wait_until,
)

from ckpt.backends.base import Capabilities, Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.read import PAGE_ENTRIES, merge_stats
from ckpt.errors import KeyExistsError, StoreDeniedError, UnavailableError, UsageError
from ckpt.testing.faults import Fault, FaultyBackend, Harm


def three() -> list[Remembering]:
    return [Remembering(name) for name in "abc"]


def keys(store, prefix: str = "", after: str = "") -> list[str]:  # type: ignore[no-untyped-def]
    return [entry.key for entry in store.list(prefix, after=after)]


def test_stat_says_none_only_where_enough_stores_do() -> None:
    memories = three()
    with replicated(memories) as store:
        assert store.stat("k") is None
        memories[0].away = away(memories[0])
        assert store.stat("k") is None
        memories[1].away = away(memories[1])
        with pytest.raises(UnavailableError, match=r"answered=1 .*memory:a.*memory:b"):
            store.stat("k")
        memories[2].put("k", [b"x"])
        found = store.stat("k")
        assert found is not None
        assert found.size_bytes == 1


@pytest.mark.slow
def test_stat_does_not_wait_for_a_hanging_store() -> None:
    stores = [Gated(memory) for memory in three()]
    with replicated(stores) as store:
        store.put("k", [b"x"])
        assert store.await_caught_up(WAIT_S)
        stores[1].stop("stat")
        found = store.stat("k")
        assert found is not None
        assert store.stat("none") is None
        stores[2].stop("stat")
        with pytest.raises(UnavailableError):
            store.stat("none")


def test_stat_believes_the_length_that_most_copies_have() -> None:
    memories = three()
    memories[0].put("k", [b"1"])
    for memory in memories[1:]:
        memory.put("k", [b"123"])
    with replicated(memories) as store:
        found = store.stat("k")
        assert found is not None
        assert found.size_bytes == 3


def test_answers_that_differ_are_settled_by_number_then_length_and_the_latest_time() -> None:
    assert merge_stats([Stat("k", 5, 1.0), Stat("k", 3, 9.0), Stat("k", 3, 2.0)]) == Stat(
        "k", 3, 9.0
    )
    assert merge_stats([Stat("k", 5, 1.0), Stat("k", 3, 9.0)]) == Stat("k", 5, 9.0)


def test_list_is_the_union_in_key_order() -> None:
    memories = three()
    for number in range(3 * PAGE_ENTRIES):
        memories[number % 3].put(f"k/{number:05}", [b"x"])
        memories[(number + 1) % 3].put(f"k/{number:05}", [b"x"])
    for place, memory in enumerate(memories):
        memory.put(f"only/{place}", [b"x"])
    with replicated(memories) as store:
        assert keys(store, "k/") == [f"k/{number:05}" for number in range(3 * PAGE_ENTRIES)]
        assert keys(store, "", "k/00766") == ["k/00767", "only/0", "only/1", "only/2"]


def test_list_leaves_out_a_store_that_fails_and_raises_where_too_few_are_left() -> None:
    memories = three()
    for memory in memories:
        memory.put("k", [b"x"])
    with replicated(memories) as store:
        memories[0].away = away(memories[0])
        assert keys(store) == ["k"]
        memories[1].away = away(memories[1])
        with pytest.raises(UnavailableError, match="too few stores answer for a complete listing"):
            keys(store)
        memories[1].away = None
        store.count_only(frozenset({0, 1}))
        with pytest.raises(UnavailableError):
            keys(store)


@pytest.mark.slow
def test_list_goes_on_without_a_store_that_hangs_on_the_way() -> None:
    stores = [Gated(memory) for memory in three()]
    with replicated(stores) as store:
        for number in range(5):
            store.put(f"k/{number}", [b"x"])
        assert store.await_caught_up(WAIT_S)
        stores[2].stop("list")
        assert keys(store) == [f"k/{number}" for number in range(5)]


def test_list_that_breaks_midway_in_too_many_stores_raises_midway() -> None:
    class Breaking(Remembering):
        def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
            for number in range(2 * PAGE_ENTRIES):
                yield Stat(f"k/{number:05}", 1, 0.0)
            raise away(self)

    with replicated([Breaking("a"), Breaking("b"), Remembering("c")]) as store:
        seen = []
        with pytest.raises(UnavailableError):
            seen.extend(store.list("k/"))
        entries = store.list("k/")
        assert next(entries).key == "k/00000"


def test_abandoned_list_ends_its_threads() -> None:
    memories = three()
    for number in range(20 * PAGE_ENTRIES):
        memories[0].put(f"k/{number}", [b"x"])
    with replicated(memories) as store:
        entries = store.list("")
        next(entries)
        entries.close()
        wait_until(
            lambda: not any(thread.name.startswith("ckpt-list") for thread in threading.enumerate())
        )


def test_delete_names_the_stores_that_still_hold_it() -> None:
    memories = three()
    stores = [
        FaultyBackend(memories[0], [Fault(harm=Harm.READ_ONLY, op="delete", times=None)]),
        *memories[1:],
    ]
    with replicated(stores) as store:
        store.put("k", [b"x"])
        assert store.await_caught_up(WAIT_S)
        with pytest.raises(
            StoreDeniedError, match=r"not all stores removed the object. key=k .memory:a"
        ):
            store.delete("k")
        assert [memory.held("k") for memory in memories] == [b"x", None, None]
        assert store.await_caught_up(WAIT_S)
    assert [memory.held("k") for memory in memories] == [b"x", None, None]


def test_capabilities_are_what_all_can_do() -> None:
    class Plain(MemoryBackend):
        def capabilities(self) -> Capabilities:
            return Capabilities(create_only=False, read_bytes_best=1 << 20, concurrency_best=9)

    with replicated([MemoryBackend("a"), Plain("b")]) as store:
        can = store.capabilities()
        assert (can.create_only, can.read_bytes_best, can.concurrency_best) == (False, 1 << 20, 9)
        with pytest.raises(UsageError, match="not every store promises"):
            store.put("k", [b"x"], create_only=True)


@pytest.mark.slow
def test_create_has_one_winner_whatever_the_stores_do() -> None:
    for seed in range(40):
        memories = three()
        flaky = [
            FaultyBackend(
                memory,
                [Fault(harm=Harm.LOST_REQUEST, op="put", times=None, chance=0.3)],
                seed=seed * 3 + place,
            )
            for place, memory in enumerate(memories)
        ]
        gate = threading.Barrier(4)

        def race(me: int, flaky=flaky, gate=gate) -> bool:  # type: ignore[no-untyped-def]
            with replicated(flaky) as store:
                gate.wait(WAIT_S)
                try:
                    store.put("k", [b"writer %d" % me], create_only=True)
                except (KeyExistsError, UnavailableError):
                    return False
                return True

        with ThreadPoolExecutor(4) as pool:
            won = [me for me, result in enumerate(pool.map(race, range(4))) if result]
        assert len(won) <= 1, seed
        for me in won:
            assert [memory.held("k") for memory in memories].count(b"writer %d" % me) >= 2, seed


def test_create_reports_taken_and_mends_what_a_loser_left() -> None:
    memories = three()
    memories[2].put("k", [b"left by a loser"])
    with replicated(memories) as store:
        store.put("k", [b"mine"], create_only=True)
        assert store.await_caught_up(WAIT_S)
        assert [memory.held("k") for memory in memories] == [b"mine"] * 3
        with pytest.raises(KeyExistsError):
            store.put("k", [b"mine"], create_only=True)


def test_create_counts_equal_bytes_that_an_earlier_try_left() -> None:
    memories = three()
    memories[1].put("k", [b"mine"])
    memories[2].away = away(memories[2])
    with replicated(memories) as store:
        store.capabilities()
        store.put("k", [bytearray(b"mi"), b"ne"], create_only=True)
        assert read(store, "k", 4) == b"mine"


@pytest.mark.slow
def test_create_goes_past_a_first_store_that_hangs() -> None:
    stores = [Gated(memory) for memory in three()]
    with replicated(stores, pace=QUICK) as store:
        stores[0].stop("put")
        store.put("k", [b"x"], create_only=True)
        assert [one.inner.held("k") for one in stores] == [None, b"x", b"x"]
        stores[0].release()
        assert store.await_caught_up(WAIT_S)
        assert [one.inner.held("k") for one in stores] == [b"x"] * 3
