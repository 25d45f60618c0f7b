from __future__ import annotations

import pytest

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import (
    IntegrityError,
    KeyExistsError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)
from ckpt.testing.contract import keys, read
from ckpt.testing.faults import Call, CountingBackend, Fault, FaultyBackend, Harm


def faulty(*faults: Fault, seed: int = 0) -> tuple[FaultyBackend, MemoryBackend]:
    inner = MemoryBackend()
    return FaultyBackend(inner, faults, seed=seed), inner


def test_lost_request_leaves_nothing_and_repeat_works() -> None:
    store, inner = faulty(Fault(harm=Harm.LOST_REQUEST, op="put"))
    with pytest.raises(UnavailableError):
        store.put("a", [b"x"])
    assert keys(inner) == []
    store.put("a", [b"x"])
    assert store.struck == [("put", "a", Harm.LOST_REQUEST)]


def test_lost_reply_leaves_the_object_and_repeat_meets_it() -> None:
    store, inner = faulty(Fault(harm=Harm.LOST_REPLY, op="put"))
    with pytest.raises(UnavailableError):
        store.put("a", [b"x"], create_only=True)
    assert read(inner, "a") == b"x"
    with pytest.raises(KeyExistsError):
        store.put("a", [b"x"], create_only=True)


def test_full_denied_and_read_only_raise_their_errors_with_nothing_done() -> None:
    for harm, error in (
        (Harm.FULL, StoreFullError),
        (Harm.DENIED, StoreDeniedError),
        (Harm.READ_ONLY, StoreDeniedError),
    ):
        store, inner = faulty(Fault(harm=harm, op="put", times=None))
        for _ in range(3):
            with pytest.raises(error):
                store.put("a", [b"x"])
        assert keys(inner) == []


def test_read_only_store_still_reads() -> None:
    store, inner = faulty(Fault(harm=Harm.READ_ONLY, times=None))
    inner.put("a", [b"x"])
    assert read(store, "a") == b"x"
    assert keys(store) == ["a"]
    with pytest.raises(StoreDeniedError):
        store.delete("a")


def test_truncated_read_says_so_and_flipped_read_differs_by_one_bit() -> None:
    store, inner = faulty(
        Fault(harm=Harm.TRUNCATED), Fault(harm=Harm.FLIPPED, op="read_into"), seed=3
    )
    inner.put("a", [bytes(100)])
    out = bytearray(100)
    with pytest.raises(IntegrityError):
        store.read_into("a", memoryview(out))
    assert int.from_bytes(read(store, "a"), "big").bit_count() == 1
    assert read(store, "a") == bytes(100)


def test_flipped_put_stores_one_wrong_bit_and_spares_the_callers_memory() -> None:
    store, inner = faulty(Fault(harm=Harm.FLIPPED, op="put"))
    mine = bytearray(50)
    store.put("a", [mine, mine])
    assert int.from_bytes(read(inner, "a"), "big").bit_count() == 1
    assert mine == bytes(50)


def test_slow_call_waits_as_long_as_planned() -> None:
    waits: list[float] = []
    store = FaultyBackend(
        MemoryBackend(), [Fault(harm=Harm.SLOW, delay_s=7.5, times=2)], sleep=waits.append
    )
    store.put("a", [b"x"])
    store.stat("a")
    store.stat("a")
    assert waits == [7.5, 7.5]


def test_fault_spares_other_keys_and_the_first_calls() -> None:
    store, _ = faulty(Fault(harm=Harm.LOST_REQUEST, op="put", key="log/", skip=1))
    store.put("packs/a", [b"x"])
    store.put("log/0", [b"x"])
    with pytest.raises(UnavailableError):
        store.put("log/1", [b"x"])
    store.put("log/2", [b"x"])


def test_same_seed_gives_the_same_faults() -> None:
    def outcome(seed: int) -> list[bool]:
        store, _ = faulty(Fault(harm=Harm.LOST_REQUEST, chance=0.5, times=None), seed=seed)
        lost = []
        for i in range(50):
            try:
                store.put(str(i), [b"x"])
                lost.append(False)
            except UnavailableError:
                lost.append(True)
        return lost

    assert outcome(1) == outcome(1) != outcome(2)
    assert 10 < sum(outcome(1)) < 40


def test_harm_during_list_and_delete_strikes() -> None:
    store, inner = faulty(
        Fault(harm=Harm.LOST_REQUEST, op="list"), Fault(harm=Harm.LOST_REPLY, op="delete")
    )
    inner.put("a", [b"x"])
    with pytest.raises(UnavailableError):
        keys(store)
    with pytest.raises(UnavailableError):
        store.delete("a")
    assert keys(store) == []


def test_counting_store_keeps_bytes_and_ranges() -> None:
    store = CountingBackend(MemoryBackend())
    store.put("packs/a", [b"12345", b"678"])
    store.put("log/0", [b"1"])
    store.read_into("packs/a", memoryview(bytearray(3)), offset_bytes=2)
    assert keys(store, "packs/") == ["packs/a"]
    assert store.calls("read_into") == [Call("read_into", "packs/a", 3, 2)]
    assert store.size_bytes("put") == 9
    assert store.size_bytes("put", prefix="packs/") == 8
    store.forget()
    assert store.calls() == []
