"""What trainers ask, answered by a real keeper over real sockets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from kit.keepers.served import Served, Trainer, open_epoch, until
from kit.keepers.slot_makers import descriptors

from ckpt.backends.file.store import FileBackend
from ckpt.errors import FencedError, IntegrityError, UsageError
from ckpt.ipc.messages import (
    Choices,
    Count,
    Done,
    Fenced,
    Forget,
    GetChoices,
    GetSlots,
    Number,
    Peek,
    Persist,
    Policy,
    Post,
    Refuse,
    RemoteError,
    SetTag,
    SlotCreated,
    SlotReleased,
    Slots,
    Value,
    VerifiedChunks,
)
from ckpt.log.journal import Journal
from ckpt.values import SnapshotId

Serve = Callable[..., Served]


@pytest.fixture
def pair(serve: Serve):
    served = serve()
    trainers = [served.trainer(rank, 2) for rank in range(2)]
    yield served, *trainers
    for one in trainers:
        one.leave()
    assert served.ends()


def test_messages_are_posted_counted_and_forgotten(pair) -> None:
    _, one, two = pair
    assert one.calls.ask(Peek(key="k"), Value).value is None
    two.calls.send(Post(key="k", value=b"v"))
    assert two.calls.ask(Count(key="c", amount=2), Number).number == 2
    assert one.calls.ask(Peek(key="k"), Value).value == b"v"
    assert one.calls.ask(Count(key="c", amount=3), Number).number == 5
    one.calls.send(Forget(key="k"))
    assert one.calls.ask(Peek(key="k", wait_s=0.0), Value).value is None


def test_a_waiting_question_is_answered_when_the_message_comes(pair) -> None:
    _, one, two = pair
    answers: list[bytes | None] = []
    asked = [
        threading.Thread(
            target=lambda who=who: answers.append(
                who.calls.ask(Peek(key="k", wait_s=30), Value).value
            )
        )
        for who in (one, one, two)
    ]
    for thread in asked:
        thread.start()
    assert two.calls.ask(Count(key="c", amount=1), Number).number == 1, (
        "others are answered meanwhile"
    )
    two.calls.send(Post(key="k", value=b"late"))
    for thread in asked:
        thread.join(10)
    assert answers == [b"late"] * 3


def test_a_question_that_waited_long_enough_gets_nothing(pair) -> None:
    _, one, _ = pair
    began_s = time.monotonic()
    assert one.calls.ask(Peek(key="k", wait_s=0.1), Value).value is None
    assert 0.1 <= time.monotonic() - began_s < 10.0


def test_slots_are_handed_over_and_back(pair) -> None:
    _, one, two = pair
    made = one.make(3)
    made.memory[8192:8195] = b"abc"
    reply, fds = two.calls.call_fds(GetSlots(rank=0))
    assert isinstance(reply, Slots)
    assert [(entry.index, entry.size_bytes) for entry in reply.slots] == [(3, made.size_bytes)]
    assert os.pread(fds[0], 3, 8192) == b"abc"
    os.close(fds[0])
    one.calls.send(SlotReleased(index=3))
    assert one.calls.ask(GetSlots(rank=0), Slots).slots == ()


def test_a_slot_with_no_descriptor_or_two_is_refused_and_none_is_kept(pair) -> None:
    served, one, _ = pair
    made = one.make(0)
    before = descriptors([made])
    with pytest.raises(UsageError, match="exactly one descriptor"):
        one.calls.call(SlotCreated(index=1, size_bytes=made.size_bytes))
    with pytest.raises(UsageError):
        one.calls.call(SlotCreated(index=1, size_bytes=made.size_bytes), [made.fd, made.fd])
    with pytest.raises(UsageError, match="taken"):
        one.calls.call(SlotCreated(index=0, size_bytes=made.size_bytes), [made.fd])
    one.calls.send(Post(key="k", value=b""), [made.fd])
    until(lambda: served.told("refused"))
    until(lambda: descriptors([made]) == before)


def test_what_all_hand_in_becomes_durable_and_all_hear_of_it(pair) -> None:
    served, one, two = pair
    assert one.calls.ask(GetChoices(), Choices).choices == ()
    assert open_epoch(one) == 1
    for trainer in (one, two):
        trainer.hand_in(SnapshotId(1, 5))
    for trainer in (one, two):
        outcome = trainer.outcome()
        assert (outcome.snapshot, outcome.error) == (SnapshotId(1, 5), None)
        assert outcome.info is not None
    until(lambda: not one.board.rank(0).slot(0).held)
    assert isinstance(one.calls.call(SetTag(name="good", snapshot=SnapshotId(1, 5))), Done)
    found = one.calls.ask(GetChoices(), Choices).choices
    assert [(choice.snapshot, choice.tier) for choice in found] == [
        (SnapshotId(1, 5), "staged"),
        (SnapshotId(1, 5), "durable"),
    ]
    state = Journal.open(FileBackend(served.store)).refresh()
    assert [entry.snapshot for entry in state.snapshots] == [SnapshotId(1, 5)]


def test_a_slot_that_is_not_sealed_fails_for_all_and_the_next_goes_through(pair) -> None:
    _, one, two = pair
    open_epoch(one)
    one.hand_in(SnapshotId(1, 1))
    two.make(0)
    two.calls.send(Persist(snapshot=SnapshotId(1, 1), index=0, generation=9))
    assert [trainer.outcome().error.code for trainer in (one, two)] == ["internal", "internal"]
    for trainer in (one, two):
        trainer.hand_in(SnapshotId(1, 2), index=1)
    assert all(trainer.outcome().error is None for trainer in (one, two))


def test_what_one_rank_refuses_fails_on_all(pair) -> None:
    _, one, two = pair
    open_epoch(one)
    one.hand_in(SnapshotId(1, 1))
    two.calls.send(
        Refuse(snapshot=SnapshotId(1, 1), error=RemoteError("integrity", "a leaf changed", 1))
    )
    errors = [trainer.outcome().error for trainer in (one, two)]
    assert all(error is not None and "a leaf changed" in error.text for error in errors)


def test_all_are_told_that_another_writer_took_over(pair) -> None:
    served, one, two = pair
    open_epoch(one)
    Journal.open(FileBackend(served.store)).open_epoch(resume=None)
    one.calls.ask(Count(key="c", amount=0), Number)
    with pytest.raises(FencedError):
        one.calls.ask(GetChoices(), Choices)
    assert "another writer" in one.events.next(Fenced).text
    assert "another writer" in two.events.next(Fenced).text
    with pytest.raises(FencedError):
        open_epoch(one)


def test_next_launch_on_the_same_keeper_is_not_fenced_by_what_fenced_the_last(
    serve: Serve,
) -> None:
    served = serve(Policy(linger_s=60.0, hang_s=0.0))
    supervisors = served.supervisors(1, launch="first")
    trainer = served.trainer(launch="first")
    open_epoch(trainer)
    Journal.open(FileBackend(served.store)).open_epoch(resume=None)
    with pytest.raises(FencedError):
        trainer.calls.ask(GetChoices(), Choices)
    trainer.leave()
    for supervisor in supervisors:
        supervisor.leave(planned=False)
    # So the keeper lingers, and the program is started again with as many ranks.
    supervisors = served.supervisors(1, launch="second")
    trainer = served.trainer(launch="second")
    assert open_epoch(trainer) == 3
    trainer.hand_in(SnapshotId(3, 1))
    assert trainer.outcome().error is None
    trainer.leave()
    for supervisor in supervisors:
        supervisor.leave()


def test_what_lies_beyond_is_forgotten_only_once_the_epoch_is_open(pair) -> None:
    _, one, two = pair
    beyond = SnapshotId(1, 7)
    assert open_epoch(one) == 1
    for trainer in (one, two):
        trainer.stage(beyond)
    with pytest.raises(UsageError, match="never opened"):
        open_epoch(one, SnapshotId(0, 3))
    assert one.board.newest_complete() == beyond
    assert open_epoch(one, SnapshotId(1, 5)) == 2
    assert one.board.newest_complete() is None, "before the number is answered"


def test_places_without_digests_are_refused_and_hurt_nobody(pair) -> None:
    served, one, two = pair
    open_epoch(one)
    one.calls.send(VerifiedChunks(base=SnapshotId(1, 1), digests=(b"x" * 16,), locations=()))
    until(lambda: served.told("refused"))
    assert two.calls.ask(Count(key="c", amount=1), Number).number == 1


def test_a_new_launch_finds_an_empty_room(serve: Serve) -> None:
    served = serve(Policy(linger_s=30.0))
    first = served.trainer(launch="a")
    first.calls.send(Post(key="k", value=b"dead"))
    assert first.calls.ask(Count(key="c", amount=4), Number).number == 4
    first.leave(planned=False)
    until(lambda: served.report().state == "lingering")
    second = served.trainer(launch="b")
    assert second.calls.ask(Peek(key="k"), Value).value is None
    assert second.calls.ask(Count(key="c", amount=0), Number).number == 0
    second.leave()


def test_an_answer_of_another_kind_is_no_answer(pair) -> None:
    _, one, _ = pair
    assert isinstance(one, Trainer)
    with pytest.raises(IntegrityError):
        one.calls.ask(Count(key="c", amount=1), Value)
