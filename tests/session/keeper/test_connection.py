"""A trainer's link: what it says and asks, what it is told, and how it ends."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from ckpt.errors import CkptError, FencedError, IntegrityError, UnavailableError, UsageError
from ckpt.format.keys import pack_key, writer_name
from ckpt.ipc import messages as words
from ckpt.ipc.mailbox import wait_for_message
from ckpt.ipc.messages import Retention
from ckpt.session.keeper.connection import (
    KNOWN_CHUNKS_MAX,
    KeeperLink,
    LinkMailbox,
    verified_chunks,
)
from ckpt.staging.slot import read_slot
from ckpt.values import ChunkLocation, Codec, SnapshotId

WAIT_S = 60.0
SNAPSHOT = SnapshotId(1, 10)

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def test_both_connections_say_hello(keeper, link: KeeperLink) -> None:
    roles = [one.role for one in keeper.wait(words.Hello, 2) if isinstance(one, words.Hello)]
    assert roles == ["trainer", "events"]
    assert (link.welcome.boot, link.welcome.attempt, link.rank, link.size) == ("b", 3, 0, 2)
    assert link.lost is None


def test_refusal_at_hello_is_raised(make_keeper, connect) -> None:
    keeper = make_keeper(against=UsageError("another release"))
    with pytest.raises(UsageError, match="another release"):
        connect()
    keeper.close()


def test_no_keeper_is_unavailable(connect) -> None:
    with pytest.raises(UnavailableError, match="no keeper"):
        connect()


@pytest.mark.slow
def test_mailbox_of_a_rank_is_in_the_keeper(keeper, link: KeeperLink) -> None:
    mailbox = LinkMailbox(link, "1/")
    assert (mailbox.rank, mailbox.size) == (0, 2)
    assert mailbox.peek("a") is None
    assert mailbox.wait("a", 0.01) is None
    threading.Thread(
        target=lambda: (keeper.wait(words.Peek, 3), mailbox.post("a", b"\xff\x00"))
    ).start()
    assert wait_for_message(mailbox, "a", timeout_s=WAIT_S, awaited="a word") == b"\xff\x00"
    assert mailbox.count("n", 4) == 5
    mailbox.forget("a")
    (forget,) = keeper.wait(words.Forget)
    assert forget == words.Forget(key="1/a")


def test_board_and_slots_are_the_keepers_own_memory(keeper, link: KeeperLink, rank) -> None:
    rank.own.beat(12)
    assert keeper.board.rank(0).completed == 12
    slot = rank.stage().slot
    ((index, region),) = link.slots(0)
    found = read_slot(region.view)
    assert index == slot.number
    assert found is not None
    assert found[0].snapshot == SNAPSHOT
    region.close()


def descriptors() -> int:
    gc.collect()  # what other tests left in cycles
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_that_do_not_fit_the_answer_are_refused_and_closed(
    keeper, link: KeeperLink, rank
) -> None:
    rank.stage()
    keeper.spare_fds = 1
    before = descriptors()
    with pytest.raises(IntegrityError, match="descriptors=2"):
        link.board()
    with pytest.raises(IntegrityError, match="slots=1 descriptors=0"):
        link.slots(0)
    assert descriptors() <= before


def test_calls_about_snapshots_reach_the_keeper(keeper, link: KeeperLink) -> None:
    assert link.ask(words.GetChoices(), words.Choices).choices == (
        words.Choice(SNAPSHOT, "staged"),
    )
    retention = Retention(keep="last=2", grace_s=60.0)
    reply = link.ask(words.OpenEpoch(resume=SNAPSHOT, retention=retention), words.Number)
    assert (reply.number, reply.origin) == (7, "")
    with pytest.raises(FencedError, match="another writer"):
        link.call(words.SetTag(name="best", snapshot=SNAPSHOT))
    (opened,) = keeper.wait(words.OpenEpoch)
    assert isinstance(opened, words.OpenEpoch)
    assert (opened.resume, opened.retention) == (SNAPSHOT, retention)


def test_words_about_the_trainer_reach_the_keeper(keeper, link: KeeperLink) -> None:
    link.phase("tracked", leaves=3)
    link.failing(words.Failing(kind="ValueError", text="bad", fingerprint="f", step=4, final=True))
    link.finished()
    keeper.wait(words.Finished)
    phase, failing, _ = keeper.heard[-3:]
    assert isinstance(phase, words.Phase)
    assert (phase.name, dict(phase.facts)) == ("tracked", {"leaves": 3})
    assert failing == words.Failing(
        kind="ValueError", text="bad", fingerprint="f", step=4, final=True
    )


@pytest.mark.slow
def test_more_known_chunks_than_a_message_holds_are_cut_off(keeper, link: KeeperLink) -> None:
    place = ChunkLocation(
        pack_key(SNAPSHOT, writer_name("n" * 64, "f" * 16), 0), 2**40, 4 << 20, 4 << 20, Codec.RAW
    )
    link.send(
        verified_chunks(
            SNAPSHOT, {n.to_bytes(16, "big"): place for n in range(KNOWN_CHUNKS_MAX + 5)}
        )
    )
    (word,) = keeper.wait(words.VerifiedChunks)
    assert isinstance(word, words.VerifiedChunks)
    assert len(word.digests) == len(word.locations) == KNOWN_CHUNKS_MAX


def test_planned_leave_says_bye_and_tells_nobody_of_a_loss(keeper, connect) -> None:
    link = connect()
    told: list[CkptError] = []
    link.on_lost(told.append)
    link.close()
    link.close()
    keeper.wait(words.Bye, 2)
    assert told == []


def test_garbage_on_the_events_connection_is_a_loss(keeper, link: KeeperLink) -> None:
    came = threading.Event()
    link.on_lost(lambda error: came.set())
    keeper._events[0]._socket.sendall(b"\xff" * 8)
    assert came.wait(WAIT_S)
    assert "not a frame" in str(link.lost)


def test_next_keeper_is_given_board_and_slots(make_keeper, keeper, link: KeeperLink, rank) -> None:
    with pytest.raises(UsageError, match="only after"):
        link.reconnect(rank.board)
    rank.stage()
    keeper.die()
    link._thread.join(WAIT_S)
    heir = make_keeper(new=True)
    link.reconnect(rank.board)
    rank.shared.hand_over_all(rank.pool.slots)
    assert link.lost is None
    assert [type(one) for one in heir.heard if not isinstance(one, words.Hello)] == [
        words.BoardKept,
        words.SlotCreated,
    ]
    ((_, region),) = link.slots(0)
    region.close()
    link.close()
    heir.close()


@forks
def test_forked_child_leaves_the_connection_to_its_parent(keeper, link: KeeperLink) -> None:
    child = os.fork()
    if child == 0:
        try:
            LinkMailbox(link, "").peek("a")
        except UnavailableError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert LinkMailbox(link, "").peek("a") is None
    assert link.lost is None
