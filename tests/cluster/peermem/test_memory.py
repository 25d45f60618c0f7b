"""A vault against a dictionary, and what a dictionary has none of: budgets, reservations, pins,
memory that is used again."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ckpt.cluster.peermem.memory import (
    SMALL_BYTES,
    IncomingObject,
    PeerMemory,
    ServedObject,
    TooLargeError,
    room_bytes,
)
from ckpt.errors import KeyExistsError, NotFoundError, StoreFullError, UsageError

BUDGET_BYTES = 1 << 20
KEYS = tuple(
    f"{node}/{slot}/{name}" for node in ("n1", "n2") for slot in "01" for name in ("a", "b")
)
SIZES = (
    0,
    1,
    4096,
    4097,
    SMALL_BYTES - 1,
    SMALL_BYTES,
    200_000,
    400_000,
    BUDGET_BYTES,
    BUDGET_BYTES + 1,
)


class VaultAgainstDict(RuleBasedStateMachine):
    """Every call's answer is that of a dictionary, unless it is that the budget is used up, and
    then it is."""

    @initialize(spare=st.sampled_from((0, BUDGET_BYTES // 2, BUDGET_BYTES)))
    def begin(self, spare: int) -> None:
        self.vault = PeerMemory(BUDGET_BYTES, spare_bytes_max=spare)
        self.model: dict[str, bytes] = {}
        self.coming: list[tuple[contextlib.ExitStack, IncomingObject, bytes]] = []
        self.readers: list[tuple[contextlib.ExitStack, ServedObject, bytes]] = []
        self.fill = 0

    def body(self, size: int) -> bytes:
        self.fill = self.fill % 250 + 1
        return bytes([self.fill]) * size

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from(SIZES))
    def reserve(self, key: str, size: int) -> None:
        stack, before = contextlib.ExitStack(), self.vault.stats()
        used = before.total_bytes - before.spare_bytes
        try:
            incoming = stack.enter_context(self.vault.incoming(key, size))
        except TooLargeError:
            assert size > BUDGET_BYTES
            assert self.vault.stats() == before
            return
        except StoreFullError:
            assert used + room_bytes(size) > BUDGET_BYTES or before.spare_bytes
            assert self.vault.stats() == before
            return
        assert len(incoming.view) == size
        self.coming.append((stack, incoming, self.body(size)))

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), create_only=st.booleans())
    def publish(self, data: st.DataObject, create_only: bool) -> None:
        stack, incoming, body = self.coming.pop(data.draw(st.integers(0, len(self.coming) - 1)))
        incoming.view[:] = body
        if create_only and incoming.key in self.model:
            with pytest.raises(KeyExistsError):
                incoming.publish(create_only=True)
        else:
            incoming.publish(create_only=create_only)
            self.model[incoming.key] = body
        stack.close()

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        stack, incoming, body = self.coming.pop(data.draw(st.integers(0, len(self.coming) - 1)))
        incoming.view[: len(body) // 2] = body[: len(body) // 2]
        stack.close()

    @rule(key=st.sampled_from(KEYS))
    def begin_to_read(self, key: str) -> None:
        stack = contextlib.ExitStack()
        if key not in self.model:
            with pytest.raises(NotFoundError):
                stack.enter_context(self.vault.reading(key))
            return
        self.readers.append((stack, stack.enter_context(self.vault.reading(key)), self.model[key]))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end_to_read(self, data: st.DataObject) -> None:
        stack, held, body = self.readers.pop(data.draw(st.integers(0, len(self.readers) - 1)))
        assert held.view == body
        stack.close()

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: str) -> None:
        assert self.vault.delete(key) == (self.model.pop(key, None) is not None)

    @rule(prefixes=st.lists(st.sampled_from(("n1/", "n2/", "n1/0/", "n2/1/b", "x")), max_size=3))
    def retain(self, prefixes: list[str]) -> None:
        kept = {
            key: body
            for key, body in self.model.items()
            if any(key.startswith(one) for one in prefixes)
        }
        assert self.vault.retain(prefixes) == len(self.model) - len(kept)
        self.model = kept

    @rule(
        prefix=st.sampled_from(("", "n1/", "n2/1/", "z")),
        after=st.sampled_from(("", "n1/0/a", "n1/1", "zz")),
        most=st.none() | st.integers(0, 3),
    )
    def list_some(self, prefix: str, after: str, most: int | None) -> None:
        wanted = sorted(key for key in self.model if key.startswith(prefix) and key > after)[:most]
        found = self.vault.list(prefix, after=after, entries_max=most)
        assert [(one.key, one.size_bytes) for one in found] == [
            (key, len(self.model[key])) for key in wanted
        ]

    @invariant()
    def readers_keep_what_they_read(self) -> None:
        for _, held, body in self.readers:
            assert held.view == body

    @invariant()
    def the_objects_are_the_models(self) -> None:
        for key in KEYS:
            found = self.vault.stat(key)
            assert (None if found is None else found.size_bytes) == (
                len(self.model[key]) if key in self.model else None
            )
            if found is not None:
                with self.vault.reading(key) as held:
                    assert held.view == self.model[key]

    @invariant()
    def memory_is_within_the_budget_and_accounted_for(self) -> None:
        found = self.vault.stats()
        assert found.total_bytes <= BUDGET_BYTES
        assert found.objects == len(self.model)
        assert found.objects_bytes >= sum(room_bytes(len(body)) for body in self.model.values())
        assert (found.incoming_bytes == 0) == (not self.coming)
        if not self.readers:
            assert found.removed_bytes == 0

    def teardown(self) -> None:
        for stack, *_ in (*getattr(self, "coming", ()), *getattr(self, "readers", ())):
            stack.close()


VaultAgainstDict.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestVaultAgainstDict = VaultAgainstDict.TestCase


def put(vault: PeerMemory, key: str, body: bytes) -> None:
    with vault.incoming(key, len(body)) as incoming:
        incoming.view[:] = body
        incoming.publish()


def held(vault: PeerMemory, key: str) -> bytes:
    with vault.reading(key) as found:
        return bytes(found.view)


def test_an_object_is_seen_only_once_published_and_replaces_at_once() -> None:
    vault = PeerMemory(BUDGET_BYTES)
    put(vault, "a", b"old")
    with vault.incoming("a", 5) as incoming:
        incoming.view[:] = b"newer"
        assert held(vault, "a") == b"old"
        incoming.publish()
        assert held(vault, "a") == b"newer"
    assert held(vault, "a") == b"newer"
    assert [one.key for one in vault.list()] == ["a"]


def test_a_length_beyond_the_budget_takes_no_memory() -> None:
    vault = PeerMemory(BUDGET_BYTES)
    before = vault.stats()
    with pytest.raises(TooLargeError), vault.incoming("a", 1 << 60):
        pass
    with (
        vault.incoming("a", BUDGET_BYTES // 2),
        pytest.raises(StoreFullError),
        vault.incoming("b", BUDGET_BYTES // 2 + 1),
    ):
        pass
    with (
        pytest.raises(StoreFullError),
        vault.incoming("b", BUDGET_BYTES - 1),
        vault.incoming("c", 1),
    ):
        pass
    assert vault.stats().total_bytes - vault.stats().spare_bytes == before.total_bytes


def test_reservations_of_a_machine_without_memory_are_refused() -> None:
    vault = PeerMemory(1 << 30, available=lambda: 5 << 20)
    with pytest.raises(StoreFullError, match="short of memory"), vault.incoming("a", 6 << 20):
        pass
    put(vault, "a", b"x" * (4 << 20))
    assert vault.stats().objects == 1


def test_small_objects_cost_a_page_and_their_number_is_bounded() -> None:
    vault = PeerMemory(10 * 4096)
    for number in range(10):
        put(vault, f"a/{number}", b"")
    with pytest.raises(StoreFullError), vault.incoming("a/10", 0):
        pass
    vault = PeerMemory(BUDGET_BYTES, objects_max=2)
    put(vault, "a", b"")
    with (
        vault.incoming("b", 0),
        pytest.raises(StoreFullError, match="too many objects"),
        vault.incoming("c", 0),
    ):
        pass


def test_freed_memory_is_used_again() -> None:
    vault = PeerMemory(BUDGET_BYTES)
    put(vault, "a", b"1" * 300_000)
    with vault.reading("a"):
        vault.delete("a")
        assert vault.stats().spare_bytes == 0, "it is still read"
    assert vault.stats().spare_bytes == room_bytes(300_000)
    put(vault, "c", b"3" * 290_000)
    assert vault.stats().spare_bytes == 0
    assert held(vault, "c") == b"3" * 290_000


def test_spare_memory_gives_way_to_objects() -> None:
    vault = PeerMemory(BUDGET_BYTES, spare_bytes_max=BUDGET_BYTES)
    for number in range(3):
        put(vault, f"a/{number}", b"1" * 300_000)
    vault.retain([])
    assert vault.stats().spare_bytes == 3 * room_bytes(300_000)
    put(vault, "b", b"2" * 900_000)
    assert vault.stats().total_bytes <= BUDGET_BYTES
    assert held(vault, "b") == b"2" * 900_000


def test_what_is_read_stays_and_is_charged_until_it_is_let_go() -> None:
    vault = PeerMemory(BUDGET_BYTES)
    put(vault, "a", b"1" * 400_000)
    with vault.reading("a") as found:
        vault.delete("a")
        assert vault.stat("a") is None
        assert vault.stats().removed_bytes == room_bytes(400_000)
        put(vault, "a", b"2" * 400_000)
        assert found.view == b"1" * 400_000
        with pytest.raises(StoreFullError), vault.incoming("c", 400_000):
            pass
    assert vault.stats().removed_bytes == 0
    put(vault, "c", b"3" * 400_000)


def test_descriptors_run_out_before_the_process_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (8, 8))
    vault = PeerMemory(BUDGET_BYTES)
    for number in range(4):
        put(vault, f"a/{number}", bytes([number]) * SMALL_BYTES)
    assert vault._blocks._descriptors == 2
    for number in range(4):
        assert held(vault, f"a/{number}") == bytes([number]) * SMALL_BYTES


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", ".tmp/a"])
def test_no_key_is_refused(key: str) -> None:
    vault = PeerMemory(BUDGET_BYTES)
    with pytest.raises(UsageError), vault.incoming(key, 1):
        pass
    with pytest.raises(UsageError), vault.reading(key):
        pass


def test_threads_see_whole_objects_only_and_leave_no_charge() -> None:
    vault = PeerMemory(BUDGET_BYTES)

    def work(me: int) -> None:
        for turn in range(60):
            body = bytes([me * 60 + turn & 255]) * (70_000 + turn)
            with contextlib.suppress(StoreFullError):
                put(vault, f"k/{turn % 3}", body)
            with contextlib.suppress(NotFoundError), vault.reading(f"k/{(turn + me) % 3}") as found:
                assert bytes(found.view) == bytes(found.view[:1]) * len(found.view)
            if turn % 7 == me:
                vault.delete(f"k/{turn % 3}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    vault.retain([])
    found = vault.stats()
    assert (found.objects, found.total_bytes - found.spare_bytes) == (0, 0)
