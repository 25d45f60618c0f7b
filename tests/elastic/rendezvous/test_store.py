"""The store of a round is what torch takes for one; nothing of it is seen in another round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from kit.agents import WAIT_S, Etcd

from ckpt.cluster.membership.open import open_keyspace
from ckpt.elastic.rendezvous.decide import RendezvousRound
from ckpt.elastic.rendezvous.store import RoundStore, UnrankedStore
from ckpt.errors import UnavailableError
from ckpt.keyspace.address import EtcdOptions
from ckpt.keyspace.base import Keyspace, Transaction, TransactionResult
from ckpt.keyspace.sqlite import SqliteKeyspace

Make = Callable[..., RoundStore]


class Forgetful:
    """A keyspace that loses answers: what was asked is done, and done again."""

    def __init__(self, inner: Keyspace) -> None:
        self._inner = inner
        self.lose = False
        self.wait = inner.wait

    def transact(self, transaction: Transaction) -> TransactionResult:
        if self.lose:
            self.lose = False
            self._inner.transact(transaction)
            raise UnavailableError("the answer was lost")
        return self._inner.transact(transaction)


@pytest.fixture
def keyspace(driver: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Keyspace]:
    """The keys of a job."""
    made: Keyspace = SqliteKeyspace(tmp_path / "job.db")
    if driver == "etcd":
        etcd: Etcd = request.getfixturevalue("etcd")
        made = open_keyspace(
            EtcdOptions(endpoints=(etcd.endpoint,), call_s=5.0), f"store {tmp_path}"
        )
    yield made
    made.close()


@pytest.fixture
def store(keyspace: Keyspace) -> Make:
    """Opens the store of a round."""

    def make(number: int = 1, **settings: object) -> RoundStore:
        lease = 7000 + number
        keyspace.grant(lease, 60.0)
        chosen = {
            "round_problem": str,
            "count_present": lambda: 2,
            "on_doomed": lambda why: None,
            **settings,
        }
        return RoundStore(
            chosen.pop("keyspace", keyspace), RendezvousRound(number, ("a", "b"), lease), **chosen
        )

    return make


def test_values_are_read_as_they_were_written(store: Make) -> None:
    one = store()
    one.set("a/b", "text")
    one.set("ü", b"\x00\xff")
    assert store().get("a/b") == b"text"
    assert dist.PrefixStore("p", one).underlying_store is not None
    assert one.multi_get(["a/b", "ü"]) == [b"text", b"\x00\xff"]
    one.multi_set(["x", "y"], ["1", "2"])
    assert one.num_keys() == 4
    assert one.delete_key("x")
    assert not one.delete_key("x")
    assert not one.check(["x", "y"])
    assert one.check(["a/b", "y"])


def test_a_round_sees_nothing_of_another(store: Make) -> None:
    store(1).set("a", "1")
    store(1).add("n", 1)
    assert not store(2).check(["a"])
    assert store(2).add("n", 1) == 1


def test_adding_counts_each_call_once(store: Make) -> None:
    one = store()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(one.add("n", 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(found) == list(range(1, 9))
    assert one.get("n") == b"8"
    one.set("n", "5")
    assert one.add("n", -2) == 3


@pytest.mark.slow
def test_an_answer_that_was_lost_changes_nothing(store: Make, keyspace: Keyspace) -> None:
    forgetful = Forgetful(keyspace)
    one = store(keyspace=forgetful)
    assert one.add("n", 1) == 1
    forgetful.lose = True
    assert one.add("n", 1) == 2
    forgetful.lose = True
    one.set("a", "1")
    forgetful.lose = True
    assert one.compare_set("a", "1", "2") == b"2"
    assert (one.get("n"), one.get("a")) == (b"2", b"2")


def test_a_value_is_set_where_the_expected_one_stands(store: Make) -> None:
    one = store()
    assert one.compare_set("a", "other", "1") == b"other"
    assert one.compare_set("a", "", "1") == b"1"
    assert one.compare_set("a", "2", "3") == b"1"
    assert one.compare_set("a", "1", "3") == b"3"


def test_waiting_ends_when_the_key_comes_or_the_time_is_over(store: Make) -> None:
    one = store()
    with pytest.raises(dist.DistStoreError):
        one.wait(["late"], timedelta(milliseconds=50))
    one.set_timeout(timedelta(milliseconds=50))
    with pytest.raises(dist.DistStoreError):
        one.get("late")
    threading.Timer(0.1, lambda: store().set("late", "now")).start()
    one.set_timeout(timedelta(seconds=WAIT_S))
    assert one.get("late") == b"now"
    one.wait(["late"])


def test_a_round_that_is_over_hands_out_ranks_of_nowhere(store: Make) -> None:
    told: list[str] = []
    one = store(round_problem=lambda: "b is gone", on_doomed=told.append)
    assert b"1000000" in one.get("torchelastic/role_info/1")
    assert told == ["b is gone"]
    assert one.wait_for_all(["MASTER_PORT"]) == "b is gone"


def test_a_store_of_nobody_else_waits_for_nobody() -> None:
    one = UnrankedStore(3)
    one.set("torchelastic/role_info/3", '{"role": "r", "rank": 3, "local_world_size": 4}')
    assert one.get("torchelastic/assigned_ranks/3") == b"[12, 12, 12, 12]"
    assert (one.add("n", 1), one.add("n", 2)) == (1, 3)
    one.wait(["torchelastic/agent/terminal_state/last_member", "n"])
    with pytest.raises(dist.DistStoreError):
        one.wait(["other"])
    with pytest.raises(dist.DistStoreError):
        one.get("other")
