"""What every keyspace must do, and what membership must do over each of them. Subclassed once for
each driver's fixture."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import pytest

from ckpt.errors import NotFoundError
from ckpt.keyspace.base import (
    Delete,
    Equals,
    Exists,
    Keys,
    Keyspace,
    KeyValue,
    Leased,
    NoneOf,
    Put,
    Transaction,
    Unchanged,
)

Make = Callable[[], Keyspace]
DEADLINE_S = 60.0


def get(keyspace: Keyspace, key: str) -> bytes | None:
    (found,) = keyspace.transact(Transaction(reads=(Keys(key),))).found
    return found[0].value if found else None


def put(keyspace: Keyspace, key: str, value: bytes, lease_id: int = 0) -> int:
    return keyspace.transact(Transaction(then=(Put(key, value, lease_id),))).revision


def lease(keyspace: Keyspace, ttl_s: float = 60.0) -> int:
    return keyspace.grant(secrets.randbits(62) + 1, ttl_s).lease_id


class KeyspaceContract:
    """For a fixture ``make_keyspace``."""

    @pytest.mark.slow
    def test_a_transaction_writes_and_reads_at_one_revision(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        done = keyspace.transact(
            Transaction(
                then=(Put("a", b"1"), Put("b", b"2")),
                reads=(Keys("a", "c"), Keys("nothing"), Keys("b")),
            )
        )
        assert done.succeeded
        both, nothing, one = done.found
        assert [(kv.key, kv.value) for kv in both] == [("a", b"1"), ("b", b"2")]
        assert nothing == ()
        assert one == both[1:]
        assert {kv.created for kv in both} == {kv.changed for kv in both} == {done.revision}

    @pytest.mark.slow
    def test_a_transaction_whose_condition_fails_writes_nothing_and_reads_all_the_same(
        self, make_keyspace: Make
    ) -> None:
        keyspace = make_keyspace()
        put(keyspace, "a", b"1")
        done = keyspace.transact(
            Transaction((Unchanged("a", 0),), (Put("a", b"2"), Put("b", b"2")), (Keys("a", "c"),))
        )
        assert not done.succeeded
        assert [(kv.key, kv.value) for kv in done.found[0]] == [("a", b"1")]

    def test_each_condition_holds_exactly_where_it_says(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        lease_id = lease(keyspace)
        first = put(keyspace, "free", b"1")
        second = put(keyspace, "free", b"2")
        leased = put(keyspace, "leased", b"3", lease_id)
        for compare, holds in [
            (Unchanged("free", second), True),
            (Unchanged("free", first), False),
            (Unchanged("free", 0), False),
            (Unchanged("none", 0), True),
            (Unchanged("none", leased), False),
            (NoneOf(Keys("x", "z")), True),
            (NoneOf(Keys("f", "g")), False),
            (NoneOf(Keys("none")), True),
            (Exists("free"), True),
            (Exists("none"), False),
            (Equals("free", b"2"), True),
            (Equals("free", b"1"), False),
            (Equals("none", b""), False),
            (Leased("leased", lease_id), True),
            (Leased("leased", lease_id + 1), False),
            (Leased("free", lease_id), False),
            (Leased("none", lease_id), False),
        ]:
            assert keyspace.transact(Transaction((compare,))).succeeded is holds, compare

    def test_keys_without_values_are_read_with_their_revisions(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        put(keyspace, "a", b"1")
        changed = put(keyspace, "a", b"2")
        ((one,),) = keyspace.transact(Transaction(reads=(Keys("a", values=False),))).found
        assert (one.value, one.changed) == (b"", changed)
        assert one.created < changed

    def test_a_range_stops_before_its_end(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        for key in ("epoch", "epoch2", "leader", "leader2", "nodes/1"):
            put(keyspace, key, b"x")
        (found,) = keyspace.transact(Transaction(reads=(Keys("epoch", "leader\0"),))).found
        assert [kv.key for kv in found] == ["epoch", "epoch2", "leader"]

    def test_deleting_what_is_not_there_is_no_error(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        put(keyspace, "a", b"1")
        keyspace.transact(Transaction(then=(Delete("a"), Delete("none"))))
        assert get(keyspace, "a") is None

    def test_any_bytes_come_back(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        value = bytes(range(256)) * 64
        put(keyspace, "a", value)
        put(keyspace, "b", b"")
        assert get(keyspace, "a") == value
        assert get(keyspace, "b") == b""

    def test_a_key_goes_with_its_lease_and_others_stay(self, make_keyspace: Make) -> None:
        keyspace, other = make_keyspace(), make_keyspace()
        lease_id, second = lease(keyspace), lease(keyspace)
        put(keyspace, "a", b"1", lease_id)
        put(keyspace, "b", b"1", second)
        put(keyspace, "c", b"1")
        other.revoke(lease_id)
        assert [get(keyspace, key) for key in "abc"] == [None, b"1", b"1"]
        assert keyspace.renew(lease_id) == 0
        other.revoke(lease_id)

    def test_a_key_that_is_put_anew_belongs_to_its_new_lease(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        first, second = lease(keyspace), lease(keyspace)
        created = put(keyspace, "a", b"1", first)
        put(keyspace, "b", b"1", first)
        changed = put(keyspace, "a", b"2", second)
        keyspace.revoke(first)
        ((found,),) = keyspace.transact(Transaction(reads=(Keys("a"),))).found
        assert found == KeyValue("a", b"2", created, changed, second)
        assert get(keyspace, "b") is None
        keyspace.revoke(second)
        assert get(keyspace, "a") is None

    def test_keys_move_to_another_lease_in_one_transaction_or_not_at_all(
        self, make_keyspace: Make
    ) -> None:
        keyspace = make_keyspace()
        first, second, gone = (lease(keyspace) for _ in range(3))
        put(keyspace, "a", b"1", first)
        put(keyspace, "b", b"2", first)
        keyspace.revoke(gone)
        both = (Put("a", b"1", second), Put("b", b"2", second))
        with pytest.raises(NotFoundError):
            keyspace.transact(Transaction((Leased("a", first),), (both[0], Put("b", b"2", gone))))
        assert keyspace.transact(
            Transaction((Leased("a", first), Leased("b", first)), both)
        ).succeeded
        keyspace.revoke(first)
        assert [get(keyspace, key) for key in "ab"] == [b"1", b"2"]
        assert not keyspace.transact(Transaction((Leased("a", first),), both)).succeeded

    def test_a_put_under_a_lease_that_is_gone_is_refused(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        lease_id = lease(keyspace)
        keyspace.revoke(lease_id)
        with pytest.raises(NotFoundError):
            put(keyspace, "a", b"1", lease_id)
        assert get(keyspace, "a") is None

    def test_a_lease_that_was_granted_before_is_taken_as_it_is(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        lease_id = lease(keyspace, 60.0)
        put(keyspace, "a", b"1", lease_id)
        assert keyspace.grant(lease_id, 30.0).ttl_s == 60.0
        assert get(keyspace, "a") == b"1"

    @pytest.mark.slow
    def test_a_lease_runs_out_and_a_renewed_one_does_not(
        self, make_keyspace: Make, ttl_s: float
    ) -> None:
        keyspace, ttl_s = make_keyspace(), 2 * ttl_s
        began_s = time.monotonic()
        kept, left = (
            keyspace.grant(secrets.randbits(62) + 1, ttl_s),
            keyspace.grant(secrets.randbits(62) + 1, ttl_s),
        )
        put(keyspace, "kept", b"1", kept.lease_id)
        put(keyspace, "left", b"1", left.lease_id)
        while get(keyspace, "left") is not None:
            assert keyspace.renew(kept.lease_id) > 0
            assert time.monotonic() < began_s + DEADLINE_S
            time.sleep(0.1)
        assert left.ttl_s <= time.monotonic() - began_s
        assert get(keyspace, "kept") == b"1"
        assert keyspace.renew(left.lease_id) == 0

    def test_a_wait_sees_a_change_that_came_before_it(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        before = put(keyspace, "nodes/a", b"1")
        put(keyspace, "nodes/b", b"1")
        assert keyspace.wait((Keys("nodes/", "nodes0"),), before, timeout_s=DEADLINE_S)

    def test_a_wait_is_woken_by_a_change_of_another_process(self, make_keyspace: Make) -> None:
        keyspace, other = make_keyspace(), make_keyspace()
        ranges = (Keys("epoch", "leader\0"), Keys("nodes/", "nodes0"))
        for change in (
            lambda: put(other, "epoch", b"1"),
            lambda: put(other, "nodes/a", b"1"),
            lambda: other.transact(Transaction(then=(Delete("nodes/a"),))),
        ):
            now = keyspace.transact(Transaction(reads=(Keys("epoch"),))).revision
            assert not keyspace.wait(ranges, now, timeout_s=0.05)
            woken: list[bool] = []
            waiting = threading.Thread(
                target=lambda at=now, to=woken: to.append(
                    keyspace.wait(ranges, at, timeout_s=DEADLINE_S)
                )
            )
            waiting.start()
            change()
            waiting.join(DEADLINE_S)
            assert woken == [True]

    @pytest.mark.slow
    def test_a_wait_does_not_hear_of_other_keys(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        before = put(keyspace, "epoch", b"1")
        put(keyspace, "log/1", b"1")
        assert not keyspace.wait((Keys("epoch", "leader\0"),), before, timeout_s=0.3)

    @pytest.mark.slow
    def test_a_wait_sees_that_a_lease_ran_out(self, make_keyspace: Make, ttl_s: float) -> None:
        keyspace = make_keyspace()
        lease_id = lease(keyspace, ttl_s)
        before = put(keyspace, "nodes/a", b"1", lease_id)
        assert keyspace.wait((Keys("nodes/", "nodes0"),), before, timeout_s=DEADLINE_S)
        assert get(keyspace, "nodes/a") is None

    def test_of_many_that_create_a_key_one_wins(self, make_keyspace: Make) -> None:
        winners: list[int] = []
        start = threading.Barrier(6)

        def race(number: int, keyspace: Keyspace) -> None:
            start.wait(DEADLINE_S)
            if keyspace.transact(
                Transaction((Unchanged("one", 0),), (Put("one", b"%d" % number),))
            ).succeeded:
                winners.append(number)

        keyspaces = [make_keyspace() for _ in range(6)]
        threads = [
            threading.Thread(target=race, args=(n, keyspace))
            for n, keyspace in enumerate(keyspaces)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert [b"%d" % number for number in winners] == [get(keyspaces[0], "one")]

    @pytest.mark.slow
    def test_one_keyspace_serves_many_threads(self, make_keyspace: Make) -> None:
        keyspace = make_keyspace()
        rounds = 20
        done: list[int] = []

        def count() -> None:
            for _ in range(rounds):
                while True:
                    ((one,),) = keyspace.transact(Transaction(reads=(Keys("count"),))).found
                    raised = Put("count", b"%d" % (int(one.value) + 1))
                    if keyspace.transact(
                        Transaction((Unchanged("count", one.changed),), (raised,))
                    ).succeeded:
                        break
            done.append(1)

        put(keyspace, "count", b"0")
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert len(done) == 4
        assert get(keyspace, "count") == b"%d" % (4 * rounds)
