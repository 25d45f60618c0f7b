"""Puts: durable at the quorum, never a wrong byte under a key, whatever hangs and whoever reuses
the memory."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.replicated.stores import (
    PATIENT,
    QUICK,
    WAIT_S,
    Gated,
    Heard,
    Lending,
    LendingFolder,
    Remembering,
    away,
    read,
    replicated,
    wait_until,
)

from ckpt.backends.base import Backend, Buffer
from ckpt.backends.memory import MemoryBackend
from ckpt.backends.replicated.store import StoreBacklog
from ckpt.errors import StoreDeniedError, StoreFullError, UnavailableError, UsageError
from ckpt.testing.contract import aligned_memory
from ckpt.testing.faults import Fault, FaultyBackend, Harm

RIGHT = b"right" * 20_000
SEEDS = range(8)


def scribbled(size: int) -> tuple[list[memoryview], Callable[[], None]]:
    """A slot's memory with RIGHT in it as buffers, and what its owner does as soon as the put is
    back."""
    memory = memoryview(bytearray(RIGHT))
    cuts = range(0, len(memory), size)

    def scribble() -> None:
        memory[:] = b"WRONG" * (len(memory) // 5)

    return [memory[at : at + size] for at in cuts], scribble


@pytest.mark.parametrize("kind", [Gated, Lending])
def test_hang_in_mid_put_neither_holds_the_caller_nor_stores_wrong_bytes(kind: type[Gated]) -> None:
    memories = [Remembering(name) for name in "abc"]
    stores = [kind(memory) for memory in memories]
    with replicated(stores) as store:
        stores[2].stop("put")
        data, scribble = scribbled(1000)
        store.put("k", data)
        scribble()
        assert [memory.held("k") for memory in memories] == [RIGHT, RIGHT, None]
        assert store.behind()[2].keys == 1
        stores[2].release()
        assert store.await_caught_up(WAIT_S)
    assert [memory.versions["k"] for memory in memories] == [{RIGHT}] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gated, Lending])
def test_two_hanging_stores_fail_the_put_in_time_and_store_nothing_wrong(kind: type[Gated]) -> None:
    memories = [Remembering(name) for name in "abc"]
    stores = [kind(memory) for memory in memories]
    with replicated(stores) as store:
        stores[0].stop("put")
        stores[1].stop("put")
        data, scribble = scribbled(1000)
        with pytest.raises(
            UnavailableError, match=r"acknowledged=1 needed=2.*memory:a.*does not answer.*memory:b"
        ):
            store.put("k", data)
        scribble()
        for gated in stores:
            gated.release()
        store.close()
    assert all(memory.versions.get("k", {RIGHT}) == {RIGHT} for memory in memories)


def test_real_folder_that_was_lent_memory_stores_nothing_once_it_is_taken_back(
    tmp_path: Path,
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Slow(LendingFolder):
        def put_lent(
            self,
            key: str,
            data: list[Buffer],
            still_lent: Callable[[], None],
            *,
            create_only: bool = False,
        ) -> None:
            def late() -> None:
                reached.set()
                assert go_on.wait(WAIT_S)
                still_lent()

            super().put_lent(key, data, late, create_only=create_only)

    stores = [LendingFolder(tmp_path / "a"), LendingFolder(tmp_path / "b"), Slow(tmp_path / "c")]
    with replicated(stores, pace=QUICK) as store:
        data, scribble = scribbled(len(RIGHT))
        store.put("k", data)
        scribble()
        assert reached.wait(WAIT_S)
        assert stores[2].stat("k") is None
        go_on.set()
        assert store.await_caught_up(WAIT_S)
        assert [read(one, "k", len(RIGHT)) == RIGHT for one in stores] == [True] * 3
    assert [entry.key for entry in stores[2].list("")] == ["k"]


@pytest.mark.slow
def test_well_stores_that_borrow_get_the_callers_own_memory() -> None:
    stores = [Lending(MemoryBackend(name)) for name in "abc"]
    with replicated(stores, pace=PATIENT, budget_bytes=3) as store:
        memory = aligned_memory(64 << 20)
        for number in range(3):
            store.put(f"packs/{number}", [memory])
    assert all(handed[0] is memory for one in stores for handed in one.handed)
    assert [len(one.handed) for one in stores] == [3, 3, 3]


def test_stores_that_do_not_borrow_share_one_copy() -> None:
    seen: list[Buffer] = []

    class Watching(MemoryBackend):
        def put(self, key: str, data: list[Buffer], *, create_only: bool = False) -> None:
            seen.extend(data)
            super().put(key, data, create_only=create_only)

    with replicated([Watching(name) for name in "abc"], pace=PATIENT) as store:
        memory = memoryview(bytearray(RIGHT))
        store.put("k", [memory[:10], memory[10:]])
        assert len({id(one.obj) for one in seen}) == 1
        assert seen[0].obj is not memory.obj
        assert all(len(one) == len(RIGHT) for one in seen)


def test_bytes_that_nobody_can_change_are_handed_on_as_they_are() -> None:
    stores = [Gated(MemoryBackend(name)) for name in "abc"]
    handed: list[Buffer] = []

    class Watching(MemoryBackend):
        def put(self, key: str, data: list[Buffer], *, create_only: bool = False) -> None:
            handed.extend(data)
            super().put(key, data, create_only=create_only)

    stores[0].inner = Watching("a")
    with replicated(stores, pace=PATIENT) as store:
        stores[0].inner, plain = Watching("a"), Watching("d")
        store.put("k", [RIGHT, memoryview(RIGHT)[3:]])
        assert plain.held("k") is None if hasattr(plain, "held") else True
    assert b"".join(handed) == RIGHT + RIGHT[3:]


def test_put_returns_at_the_quorum_and_the_straggler_finishes_from_its_copy() -> None:
    stores = [Gated(Remembering(name)) for name in "abc"]
    with replicated(stores) as store:
        stores[1].stop("put")
        data, scribble = scribbled(len(RIGHT))
        store.put("k", data)
        scribble()
        assert store.behind()[1] == StoreBacklog("memory:b", 1, False)
        stores[1].release()
        assert store.await_caught_up(WAIT_S)
    assert stores[1].inner.held("k") == RIGHT
    assert stores[1].count("put") == 1


def test_failed_put_names_each_store_and_raises_what_most_said() -> None:
    harms = [Harm.FULL, Harm.DENIED, Harm.FULL]
    stores = [
        FaultyBackend(MemoryBackend(name), [Fault(harm=harm, op="put", times=None)])
        for name, harm in zip("abc", harms, strict=True)
    ]
    with (
        replicated(stores) as store,
        pytest.raises(
            StoreFullError,
            match=r"key=k acknowledged=0 needed=2.*memory:a.*full.*memory:b.*refuses.*memory:c",
        ),
    ):
        store.put("k", [b"x"])
    stores = [
        FaultyBackend(
            MemoryBackend(name),
            [Fault(harm=Harm.DENIED, op="put", times=None)] if name != "a" else [],
        )
        for name in "abc"
    ]
    with (
        replicated(stores) as store,
        pytest.raises(StoreDeniedError, match="acknowledged=1 needed=2"),
    ):
        store.put("k", [b"x"])


def test_what_may_pass_is_tried_again_and_what_will_not_is_not() -> None:
    flaky = [Fault(harm=Harm.LOST_REPLY, op="put", times=2)]
    stores = [FaultyBackend(MemoryBackend("a"), flaky), FaultyBackend(MemoryBackend("b"), flaky)]
    with replicated(stores, write_quorum=2) as store:
        store.put("k", [b"x"])
        assert store.await_caught_up(WAIT_S)
    assert [len(one.struck) for one in stores] == [2, 2]
    full = FaultyBackend(MemoryBackend("a"), [Fault(harm=Harm.FULL, op="put", times=None)])
    with (
        replicated([full, MemoryBackend("b")], write_quorum=2) as store,
        pytest.raises(StoreFullError),
    ):
        store.put("k", [b"x"])
    assert len(full.struck) == 1


def test_full_store_is_told_once_left_alone_and_caught_up_when_it_has_room() -> None:
    heard = Heard()
    memories = [Remembering(name) for name in "abc"]
    memories[2].away = StoreFullError("the store is full.")
    with replicated(memories, tell=heard) as store:
        for number in range(20):
            store.put(f"k/{number}", [bytes([number])])
        down = heard.wait_for("store-down")
        assert down.alarm
        assert down.facts["store"] == "memory:c"
        behind = heard.wait_for("under-replicated")
        assert behind.alarm
        assert heard.kinds().count("under-replicated") == 1
        memories[2].away = None
        assert store.await_caught_up(WAIT_S)
        heard.wait_for("store-back")
        assert heard.wait_for("copy-mended").facts["store"] == "memory:c"
        assert [memories[2].held(f"k/{n}") for n in range(20)] == [bytes([n]) for n in range(20)]
        assert store.behind() == tuple(StoreBacklog(f"memory:{name}", 0, False) for name in "abc")


def test_more_misses_than_are_remembered_ask_for_a_scrub() -> None:
    heard = Heard()
    memories = [Remembering(name) for name in "abc"]
    memories[2].away = away(memories[2])
    pace = dataclasses.replace(QUICK, keys_max=5)
    with replicated(memories, tell=heard, pace=pace) as store:
        for number in range(9):
            store.put(f"k/{number}", [b"x"])
        assert store.behind()[2] == StoreBacklog("memory:c", 5, True)
        assert (
            "ckpt scrub"
            in [event.text for event in heard.events if event.kind == "under-replicated"][-1]
        )
        memories[2].away = None
        assert not store.await_caught_up(0.0)
        wait_until(lambda: store.behind()[2].keys == 0)
        store.scrubbed(2)
        assert store.await_caught_up(WAIT_S)


def test_only_counting_stores_make_the_quorum_and_are_written_to() -> None:
    memories = [Remembering(name) for name in "abc"]
    with replicated(memories) as store:
        store.count_only(frozenset({0, 1}))
        store.put("k", [b"x"])
        assert store.await_caught_up(WAIT_S)
        assert [memory.held("k") for memory in memories] == [b"x", b"x", None]
        memories[1].away = away(memories[1])
        with pytest.raises(UnavailableError, match=r"acknowledged=1 needed=2"):
            store.put("l", [b"x"])
        with pytest.raises(UsageError):
            store.count_only(frozenset({3}))


@pytest.mark.slow
def test_dead_store_costs_later_puts_nothing() -> None:
    stores = [Lending(Remembering(name)) for name in "abc"]
    with replicated(stores, pace=QUICK) as store:
        stores[0].stop("put")
        store.put("k/0", [b"x"])
        wait_until(lambda: not store._process_state().group.replicas[0].writing.circuit.usable)
        asked = stores[0].count("put")
        for number in range(1, 50):
            store.put(f"k/{number}", [b"x"])
        assert stores[0].count("put") <= asked + 1  # a probe
        assert store.behind()[0].keys == 50
        stores[0].release()
        assert store.await_caught_up(WAIT_S)
        assert all(stores[0].inner.held(f"k/{n}") == b"x" for n in range(50))


@pytest.mark.slow
def test_hung_store_holds_a_bounded_share_of_memory_and_the_others_go_on() -> None:
    stores = [Gated(MemoryBackend(name)) for name in "abc"]
    budget = 3 << 20
    with replicated(stores, budget_bytes=budget) as store:
        stores[2].stop("put")
        memory = memoryview(bytearray(400_000))
        for number in range(12):
            store.put(f"k/{number}", [memory])
            assert store._process_state().group.memory.used_bytes <= budget // 3 * 3
        assert store._process_state().group.memory.used_bytes <= budget // 3
        stores[2].release()
        assert store.await_caught_up(WAIT_S)
        wait_until(lambda: store._process_state().group.memory.used_bytes == 0)


def test_put_after_put_and_delete_after_put_keep_their_order_at_a_straggler() -> None:
    stores = [Gated(Remembering(name)) for name in "abc"]
    with replicated(stores) as store:
        stores[2].stop("put")
        store.put("k", [b"old"])
        with ThreadPoolExecutor(1) as pool:
            deleting = pool.submit(store.delete, "k")
            wait_until(lambda: stores[0].inner.held("k") is None)
            stores[2].release()
            deleting.result(WAIT_S)
        assert store.await_caught_up(WAIT_S)
        assert [one.inner.held("k") for one in stores] == [None] * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_no_store_ever_holds_a_wrong_version_while_memory_is_reused_and_stores_hang(
    seed: int,
) -> None:
    dice = random.Random(seed)
    memories = [Remembering(name) for name in "abc"]
    stores = [dice.choice([Gated, Lending])(memory) for memory in memories]
    pace = dataclasses.replace(
        QUICK,
        hedge_s_first=0.01,
        hedge_s_min=0.005,
        grace_s_min=0.002,
        grace_s_max=0.005,
        stall_s=0.3,
        call_s=0.5,
        probe_s_first=0.02,
        probe_s_max=0.05,
        retry_s_first=0.005,
        retry_s_max=0.02,
    )
    right: dict[str, bytes] = {}

    def write(me: int) -> None:
        rng = random.Random(seed * 100 + me)
        slot = memoryview(bytearray(8000))
        for turn in range(25):
            body = rng.randbytes(rng.randrange(1, 8000))
            key = f"k/{me}/{turn}"
            right[key] = body
            slot[: len(body)] = body
            cut = rng.randrange(len(body) + 1)
            try:
                store.put(key, [slot[:cut], slot[cut : len(body)]])
            except UnavailableError:
                continue  # both others hung: nothing is promised
            finally:
                slot[:] = b"\xff" * len(slot)
            assert sum(memory.held(key) == body for memory in memories) >= 2

    def trouble() -> None:
        while not over.wait(dice.random() * 0.03):
            one = dice.choice(stores)
            one.release() if one.shut else one.stop("put")

    over = threading.Event()
    print(f"seed={seed}")
    with replicated(stores, pace=pace) as store, ThreadPoolExecutor(4) as pool:
        troubles = pool.submit(trouble)
        try:
            list(pool.map(write, range(3)))
        finally:
            over.set()
        troubles.result()
        for one in stores:
            one.release()
        assert store.await_caught_up(WAIT_S)
    for memory in memories:
        for key, versions in memory.versions.items():
            assert versions == {right[key]}, (seed, memory.url, key)


def test_writer_that_stood_still_hears_first_what_was_acknowledged_meanwhile() -> None:
    memories = [Remembering(name) for name in "abc"]
    with replicated(memories, pace=dataclasses.replace(QUICK, stall_s=0.0)) as store:
        store.put("k", [b"x"])
        assert [memory.held("k") for memory in memories].count(b"x") >= 2


def test_usage_errors_come_before_any_store_is_asked() -> None:
    stores: list[Backend] = [MemoryBackend(name) for name in "abc"]
    with replicated(stores) as store:
        with pytest.raises(UsageError):
            store.put("../a", [b"x"])
        with pytest.raises(UsageError):
            store.read_into("a", memoryview(bytearray(1)), offset_bytes=-1)
    with pytest.raises(UsageError, match="closed"):
        store.put("a", [b"x"])
