"""Places that a real etcd gives out, and logs on stores that can't give them out themselves."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from kit.etcd import EtcdCluster, require
from kit.logs.small import Store, commit, made, three

from ckpt.errors import FencedError, UnavailableError, UsageError
from ckpt.ipc.cluster_spec import NODES_VARIABLE, NodesSpec, nodes_to_environment
from ckpt.keyspace.address import EtcdOptions, parse_etcd_url
from ckpt.log import sequencers as room
from ckpt.log.sequencers import (
    SEQUENCER_VARIABLE,
    STATE_VARIABLE,
    Appended,
    EtcdSequencer,
    KeyTaken,
    WriteUnknown,
    etcd_of_environment,
)
from ckpt.maintenance import store_set as sets
from ckpt.values import SnapshotId


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    require()
    with EtcdCluster(tmp_path_factory.mktemp("etcd") / "one", 1) as found:
        yield found


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    require()
    with EtcdCluster(tmp_path_factory.mktemp("etcd") / "other", 1) as found:
        yield found


@pytest.fixture
def named(cluster: EtcdCluster, monkeypatch: pytest.MonkeyPatch) -> EtcdCluster:
    """An etcd that the environment names. Each log in it is a new one."""
    monkeypatch.setenv(SEQUENCER_VARIABLE, address(cluster.endpoints))
    return cluster


@pytest.fixture
def log_id() -> str:
    return secrets.token_hex(16)


def address(endpoints: Sequence[str]) -> str:
    return f"etcd://{','.join(endpoints)}"


def wiped(cluster: EtcdCluster) -> None:
    cluster.stop()
    cluster.wipe()
    cluster.start()


def sequencer(cluster: EtcdCluster, log_id: str) -> EtcdSequencer:
    return EtcdSequencer(EtcdOptions(endpoints=cluster.endpoints), log_id)


@pytest.mark.slow
def test_claiming_again_is_harmless_and_tells_who_has_the_place(
    named: EtcdCluster, log_id: str
) -> None:
    etcd = sequencer(named, log_id)
    assert etcd.append(0, b"a") == Appended()
    assert etcd.append(0, b"a") == Appended()
    assert etcd.append(0, b"b") == KeyTaken(b"a")
    assert etcd.append(1, b"b") == Appended()
    assert sequencer(named, log_id[::-1]).append(0, b"x") == Appended(), "another log"


@pytest.mark.slow
def test_of_many_that_claim_at_once_each_place_has_one_winner(
    named: EtcdCluster, log_id: str
) -> None:
    racers, each = 4, 25
    won: list[dict[int, bytes]] = [{} for _ in range(racers)]

    def race(me: int) -> None:
        etcd, seq = sequencer(named, log_id), 0
        while len(won[me]) < each:
            data = b"%d of %d" % (len(won[me]), me)
            match etcd.append(seq, data):
                case Appended():
                    won[me][seq] = data
                    seq += 1
                case KeyTaken():
                    seq += 1
                case WriteUnknown(why):
                    raise AssertionError(why)

    threads = [threading.Thread(target=race, args=(me,)) for me in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120.0)
    assert sorted(seq for one in won for seq in one) == list(range(racers * each)), (
        "no gap, no place twice"
    )


@pytest.mark.slow
def test_a_writer_that_slept_while_many_places_went_reads_the_log_again(
    named: EtcdCluster, log_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ETCD_RECORDS_KEPT", 5)
    etcd = sequencer(named, log_id)
    for seq in range(10):
        assert etcd.append(seq, b"%d" % seq) == Appended()
    slept = etcd.append(2, b"late")
    assert isinstance(slept, WriteUnknown) and "next=10" in slept.reason
    assert etcd.append(7, b"late") == KeyTaken(b"7")


@pytest.mark.slow
def test_an_etcd_that_lost_its_data_goes_on_from_the_place_that_is_claimed(
    named: EtcdCluster, log_id: str
) -> None:
    etcd = sequencer(named, log_id)
    name = etcd.name
    for seq in range(3):
        etcd.append(seq, b"%d" % seq)
    wiped(named)
    assert etcd.name == name, "it is known again"
    assert etcd.append(7, b"seven") == Appended()
    assert isinstance(etcd.append(3, b"late"), WriteUnknown), "what is behind is read again"
    assert etcd.append(8, b"eight") == Appended()


@pytest.mark.slow
def test_no_etcd_is_no_answer(named: EtcdCluster, log_id: str) -> None:
    etcd = sequencer(named, log_id)
    named.stop()
    try:
        assert isinstance(etcd.append(0, b"a"), WriteUnknown)
        with pytest.raises(UnavailableError, match="etcd did not answer"):
            _ = etcd.name
    finally:
        named.start()
    assert etcd.append(0, b"a") == Appended()


@pytest.mark.parametrize("able", range(3))
def test_any_machine_writes_where_etcd_gives_out_the_places(
    named: EtcdCluster, able: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stores = [Store(f"s{n}", once=n < able) for n in range(3)]
    journal = made(stores)
    commit(journal, journal.open_epoch(resume=None), 1)
    state = made(stores).refresh()
    assert state.stores is not None and state.stores.sequencer.startswith("etcd:")
    assert not list((tmp_path / "state").glob("*.sqlite3")), "no file of this machine"
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "elsewhere"))
    elsewhere = made(stores)
    stores[2].up = False
    commit(elsewhere, elsewhere.open_epoch(resume=SnapshotId(1, 1)), 2)
    with pytest.raises(FencedError):
        commit(journal, 1, 2)
    assert made(stores).refresh().newest() == SnapshotId(2, 2)


@pytest.mark.slow
def test_a_wiped_etcd_is_seeded_by_the_stores_and_the_log_stays_one(named: EtcdCluster) -> None:
    stores = three(once=False)
    journal = made(stores)
    epoch = journal.open_epoch(resume=None)
    for step in range(1, 4):
        commit(journal, epoch, step)
    wiped(named)
    commit(made(stores), epoch, 4)
    commit(journal, epoch, 5)
    assert [one.snapshot.step for one in made(stores).refresh().snapshots] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_commits_wait_while_etcd_is_away_and_go_on_after(named: EtcdCluster) -> None:
    stores = three(once=False)
    journal = made(stores)
    epoch = journal.open_epoch(resume=None)
    commit(journal, epoch, 1)
    named.stop()
    try:
        with pytest.raises(UnavailableError, match="etcd did not answer"):
            commit(journal, epoch, 2)
        assert made(stores).refresh().newest() == SnapshotId(1, 1), "reading needs no etcd"
    finally:
        named.start()
    commit(journal, epoch, 2)
    assert made(stores).refresh().newest() == SnapshotId(1, 2)


@pytest.mark.slow
def test_another_etcd_or_none_gives_out_nothing_until_somebody_takes_over(
    named: EtcdCluster, other: EtcdCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = three(once=False)
    journal = made(stores)
    epoch = journal.open_epoch(resume=None)
    commit(journal, epoch, 1)
    monkeypatch.delenv(SEQUENCER_VARIABLE)
    with pytest.raises(UsageError, match=f"its address is not set.*{SEQUENCER_VARIABLE}"):
        commit(made(stores), epoch, 2)
    monkeypatch.setenv(SEQUENCER_VARIABLE, address(other.endpoints))
    with pytest.raises(UsageError, match="another etcd gives out the positions"):
        commit(made(stores), epoch, 2)
    again = made(stores)
    backend = again.access._backend  # type: ignore[attr-defined]
    assert sets.take_over(again, backend).sequencer == sequencer(other, again.log_id).name
    commit(made(stores), epoch, 2)
    assert made(stores).refresh().newest() == SnapshotId(1, 2)
    monkeypatch.setenv(SEQUENCER_VARIABLE, address(named.endpoints))
    with pytest.raises(UsageError, match="another etcd gives out the positions"):
        commit(journal, epoch, 3)


def test_where_nodes_meet_in_etcd_it_gives_out_the_places_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SEQUENCER_VARIABLE, raising=False)
    assert etcd_of_environment() is None
    spec = NodesSpec(where="etcd://a:1,b:2", job="j", nodes_min=1, nodes_max=2, ca_file="/ca.pem")
    monkeypatch.setenv(NODES_VARIABLE, nodes_to_environment(spec)[NODES_VARIABLE])
    assert etcd_of_environment() == EtcdOptions(endpoints=("a:1", "b:2"), ca=Path("/ca.pem"))
    monkeypatch.setenv(
        NODES_VARIABLE,
        nodes_to_environment(NodesSpec(where="/f", job="j", nodes_min=1, nodes_max=2))[
            NODES_VARIABLE
        ],
    )
    assert etcd_of_environment() is None, "nodes of one machine have that machine's file"


def test_an_address_names_files_and_user_and_a_wrong_one_says_why(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("geheim\n")
    found = parse_etcd_url(
        f"etcd://a,b:77?ca=/c.pem&cert=/d.pem&key=/e.pem&user=me&password_file={secret}"
    )
    assert found == EtcdOptions(
        endpoints=("a", "b:77"),
        ca=Path("/c.pem"),
        cert=Path("/d.pem"),
        key=Path("/e.pem"),
        user="me",
        password="geheim",
    )
    for wrong, why in (
        ("http://a:1", "begins with etcd://"),
        ("etcd://a:1?what=1", "unknown=.'what'."),
        ("etcd://a:1?x", "not an address"),
        ("etcd://", "not an etcd endpoint"),
        (f"etcd://a?user=me&password_file={tmp_path}/none", "password can't be read"),
        ("etcd://a?user=me", "needs a password"),
    ):
        with pytest.raises(UsageError, match=why):
            parse_etcd_url(wrong)
