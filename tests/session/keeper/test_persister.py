"""Snapshots handed to a keeper: it has them on return, and its word settles them."""

from __future__ import annotations

import os
import signal

import pytest

from ckpt.errors import CkptError, FencedError, UnavailableError, UsageError
from ckpt.format.canonical import digest
from ckpt.ipc import messages as words
from ckpt.ipc.messages import RemoteError
from ckpt.session.keeper.connection import KeeperLink, LinkMailbox
from ckpt.session.keeper.persister import KeeperPersister
from ckpt.values import ChunkLocation, Codec, SnapshotId, SnapshotInfo

WAIT_S = 60.0
SNAPSHOT = SnapshotId(1, 10)
INFO = SnapshotInfo(epoch=1, step=10, world_size=2, size_bytes=9, new_bytes=9, created_unix_s=1.0)


def test_submitted_slot_is_handed_over_and_settled_by_the_keepers_word(keeper, rank) -> None:
    staged = rank.stage()
    future = rank.persister.submit(staged, tags=("best",))
    (word,) = keeper.wait(words.Persist)
    assert word == words.Persist(
        snapshot=SNAPSHOT, index=0, generation=1, tags=("best",), shared={"g": (2, "d")}
    )
    assert not staged.slot.pinned
    assert rank.own.slot(0).held
    assert rank.persister.in_flight == 1
    keeper.say(words.Outcome(snapshot=SNAPSHOT, info=INFO))
    assert future.result(WAIT_S) == INFO
    rank.persister.close()
    assert (rank.persister.in_flight, rank.persister.passed_step, rank.persister.last_info) == (
        0,
        10,
        INFO,
    )
    assert rank.persister.durable_at_s is not None
    assert [event.kind for event in rank.events] == ["durable"]


def test_failed_and_untagged_snapshots_say_so(keeper, rank) -> None:
    first = rank.persister.submit(rank.stage(), tags=())
    second = rank.persister.submit(rank.stage(11), tags=("best",))
    keeper.wait(words.Persist, 2)
    error = RemoteError("fenced", "another writer", 0)
    keeper.say(words.Outcome(snapshot=SNAPSHOT, error=error))
    keeper.say(words.Outcome(snapshot=SnapshotId(1, 11), info=INFO, error=error))
    for future in (first, second):
        with pytest.raises(FencedError, match="rank 0: another writer"):
            future.result(WAIT_S)
    assert [event.kind for event in rank.events] == ["save-failed", "durable", "tag-failed"]
    assert rank.persister.last_info == INFO


def test_refused_snapshot_is_in_flight_until_all_ranks_know(keeper, rank) -> None:
    rank.persister.submit_failure(SNAPSHOT, UnavailableError("no slot"))
    again = rank.persister.submit(rank.stage(), tags=())
    (word,) = keeper.wait(words.Refuse)
    assert word == words.Refuse(snapshot=SNAPSHOT, error=RemoteError("unavailable", "no slot", 0))
    keeper.say(words.Outcome(snapshot=SNAPSHOT, error=RemoteError("unavailable", "no slot", 0)))
    keeper.say(words.Outcome(snapshot=SNAPSHOT, info=INFO))
    assert again.result(WAIT_S) == INFO
    assert rank.persister.in_flight == 0


def test_outcome_of_an_earlier_attempt_is_told_and_disturbs_nothing(keeper, rank) -> None:
    future = rank.persister.submit(rank.stage(11), tags=())
    keeper.say(words.Outcome(snapshot=SNAPSHOT, info=INFO))
    keeper.say(words.Outcome(snapshot=SnapshotId(1, 11), info=INFO))
    assert future.result(WAIT_S) == INFO
    assert [event.kind for event in rank.events] == ["durable", "durable"]
    assert rank.persister.passed_step == 11


def test_base_is_named_before_the_first_snapshot_only(keeper, rank) -> None:
    places = {digest(b"%d" % n): ChunkLocation("packs/p", n, 1, 1, Codec.RAW) for n in range(3)}
    rank.persister.refer_to(SnapshotId(0, 9), places)
    (word,) = keeper.wait(words.VerifiedChunks)
    assert word == words.VerifiedChunks(
        base=SnapshotId(0, 9), digests=tuple(places), locations=tuple(places.values())
    )
    rank.persister.submit(rank.stage(), tags=())
    rank.persister.refer_to(SnapshotId(0, 9), places)
    keeper.wait(words.Persist)
    assert len(keeper.wait(words.VerifiedChunks)) == 1
    rank.persister.abandon()


def test_lost_keeper_fails_what_is_in_flight_and_what_comes(keeper, link: KeeperLink, rank) -> None:
    future = rank.persister.submit(rank.stage(), tags=())
    late = rank.stage(11)
    keeper.wait(words.Persist)
    keeper.die()
    with pytest.raises(UnavailableError, match="keeper"):
        future.result(WAIT_S)
    told: list[CkptError] = []
    link.on_lost(told.append)
    assert told == [link.lost]
    with pytest.raises(UnavailableError):
        LinkMailbox(link, "").peek("a")
    with pytest.raises(UnavailableError):
        rank.persister.submit(late, tags=()).result(WAIT_S)
    assert not rank.own.slot(late.slot.number).held
    rank.persister.submit_failure(SnapshotId(1, 12), UnavailableError("no slot"))
    rank.persister.refer_to(SNAPSHOT, {})
    rank.persister.close()
    assert rank.persister.in_flight == 0
    assert [event.kind for event in rank.events] == ["save-failed"] * 3


def test_abandoned_persister_waits_for_nothing(rank) -> None:
    future = rank.persister.submit(rank.stage(), tags=())
    rank.persister.abandon()
    with pytest.raises(UnavailableError, match="the keeper continues with it"):
        future.result(0)
    rank.persister.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_trainer_killed_right_after_submit_loses_nothing(keeper, connect, make_rank) -> None:
    child = os.fork()
    if child == 0:
        link = connect()
        rank = make_rank(link)
        rank.persister.submit(rank.stage(), tags=("last",))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (word,) = keeper.wait(words.Persist)
    assert isinstance(word, words.Persist)
    entry = keeper.board.rank(0).slot(word.index)
    assert (entry.snapshot, entry.generation, entry.held) == (SNAPSHOT, word.generation, True)
    assert word.index in keeper.slots


def test_message_too_long_fails_at_once_and_a_keeper_that_takes_none_counts_as_lost(
    link: KeeperLink, rank, monkeypatch
) -> None:
    persister = KeeperPersister(link, rank.shared, emit=rank.events.append, survives=True)
    errors: list[CkptError] = [UsageError("too long"), UnavailableError("it reads nothing")]

    def send(message: words.Message) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(link, "send", send)
    too_long = rank.stage()
    with pytest.raises(UsageError, match="too long"):
        persister.submit(too_long, tags=()).result(0)
    assert not rank.own.slot(too_long.slot.number).held
    assert link.lost is None
    future = persister.submit(rank.stage(11), tags=())
    persister.lost.result(WAIT_S)
    assert link.lost is not None
    assert not future.done()
    monkeypatch.setattr(link, "send", sent := [].append)
    persister.take_up([SnapshotId(1, 11)], {})  # the same keeper: it never heard of it
    with pytest.raises(UnavailableError, match="did not take"):
        future.result(0)
    assert [type(message) for message in sent.__self__] == [words.Refuse]
    persister.close()


def test_slot_stays_held_if_the_loss_is_noticed_while_the_message_is_sent(
    keeper, link: KeeperLink, rank, monkeypatch
) -> None:
    persister = KeeperPersister(link, rank.shared, emit=rank.events.append, survives=True)

    def send(message: words.Message) -> None:
        keeper.die()
        persister.lost.result(WAIT_S)
        raise UnavailableError("the connection is lost")

    monkeypatch.setattr(link, "send", send)
    staged = rank.stage()
    future = persister.submit(staged, tags=())
    assert not future.done()
    assert rank.own.slot(staged.slot.number).held
    persister.close()
    assert future.done()
