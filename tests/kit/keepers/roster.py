"""Supervisors, trainers and their sockets around a roster, as a model: every order in which words
can arrive.

A state is a value; ``moves`` gives all that may happen next. The roster is checked against what
really lives in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ckpt.ipc.messages import Failing, Policy
from ckpt.keeper.attempts import roster as rules
from ckpt.keeper.attempts.events import (
    AttemptOver,
    EpochChanged,
    GatheringTimedOut,
    GraceExpired,
    Hung,
    JobEnded,
    KillAll,
    LeaveAll,
    LeaveNodes,
    LeaveOne,
    Pause,
    PauseOver,
    PreemptRequested,
    ReportEnded,
    RequestEpoch,
    RequestStop,
    RosterAction,
    RosterEvent,
    StartAll,
    SupervisorJoined,
    SupervisorLeft,
    TrainerDied,
    TrainerEntered,
    TrainerFailing,
    TrainerFinished,
    TrainerKilled,
    TrainerProgressed,
    TrainerStarted,
)
from ckpt.keeper.attempts.roster import PREEMPTED_STATUS, RankState, Roster, RosterState

STATUS_OF = {
    "ends": 0,
    "stops": PREEMPTED_STATUS,
    "raises": 1,
    "refuses": 2,
    "killed": -9,
    "interrupted": -2,
}
ERROR = Failing(kind="ValueError", text="bad", fingerprint="f", step=3)
FINAL = Failing(kind="UsageError", text="wrong", fingerprint="u", step=0, final=True)


@dataclass(frozen=True)
class Side:
    """One rank: its supervisor, its trainer, and the words on their way in both directions."""

    there: str = "absent"  # absent, up, gone
    trainer: int = 0  # attempt of the one that lives, 0: none
    done: int = 0  # attempt whose trainer ended by itself, well
    up: tuple[RosterEvent, ...] = ()
    down: tuple[RosterAction, ...] = ()


@dataclass(frozen=True)
class RosterSimulation:
    """All of it. ``faults`` are those that may still happen; ``gap_s`` passes between two of them.

    With several nodes: ``epoch`` is the newest, ``asked`` what this node asked for and has not got
    yet.
    """

    roster: Roster
    sides: tuple[Side, ...]
    faults: int
    gap_s: float = 5.0
    now_s: float = 100.0
    completed: int = 0
    asked_to_stop: bool = False
    stops: bool = False
    owes: tuple[str, ...] = field(default=())
    epoch: int = 0
    asked: RequestEpoch | None = None
    said_ended: bool = False

    def key(self) -> object:
        """Equal for states that go on equally."""
        one = self.roster
        members = tuple(sorted(one.members.items()))
        known = (
            one.attempt,
            one.state,
            members,
            one.failures,
            one.record,
            one.preempted,
            one.status,
            one.newest_epoch,
            one.job_ended,
            one.moved,
        )
        return (
            known,
            self.epoch,
            self.asked,
            self.sides,
            self.faults,
            self.now_s,
            self.completed,
            self.asked_to_stop,
            self.stops,
        )

    def at_rest(self) -> bool:
        """Whether everybody has come and every word has arrived."""
        return self.roster.state is not RosterState.PAUSING and all(
            side.there != "absent" and not side.up and not side.down for side in self.sides
        )


def world(
    ranks: int,
    *,
    faults: int,
    gap_s: float = 5.0,
    policy: Policy | None = None,
    attempt: int = 0,
    shared: bool = False,
) -> RosterSimulation:
    """A launch that nobody has joined yet; ``shared``: on one node of several."""
    roster = Roster("l", ranks, policy or Policy(), attempt, shared=shared)
    return RosterSimulation(
        roster, tuple(Side() for _ in range(ranks)), faults, gap_s, epoch=attempt
    )


def moves(now: RosterSimulation) -> Iterator[tuple[str, RosterSimulation]]:
    """All that may happen next, with a name."""
    for rank, side in enumerate(now.sides):
        if side.there == "absent":
            yield (
                f"{rank} joins",
                put(now, rank, there="up", up=(SupervisorJoined(rank, rank, 50 + rank),)),
            )
            if (
                now.roster.attempt and now.faults
            ):  # it met an earlier keeper, which did not hear how its trainer ended
                fewer = replace(now, faults=now.faults - 1)
                for status in (0, -9):
                    joined = SupervisorJoined(rank, rank, 50 + rank, status)
                    done = int(not status)
                    yield (
                        f"{rank} joins late, {status}",
                        put(fewer, rank, there="up", done=done, up=(joined,)),
                    )
        if side.up:
            yield (
                f"keeper hears {rank}: {side.up[0]}",
                hear(put(now, rank, up=side.up[1:]), side.up[0]),
            )
        if side.there == "up" and side.down:
            yield f"{rank} hears {side.down[0]}", obey(now, rank)
        if side.trainer:
            yield f"{rank} ends", end(now, rank, "ends")
            if now.asked_to_stop:
                yield f"{rank} stops", end(now, rank, "stops")
    if now.roster.state is RosterState.PAUSING:
        yield "the pause is over", hear(now, PauseOver(now.roster.attempt))
    if now.asked is not None:
        yield from answers(now, now.asked)
    if now.faults:
        yield from faults(replace(now, faults=now.faults - 1, now_s=now.now_s + now.gap_s))


def answers(now: RosterSimulation, asked: RequestEpoch) -> Iterator[tuple[str, RosterSimulation]]:
    """What the nodes' leader may do about what this node asked for."""
    if asked.failure is None or not asked.failure.final:
        yield "an epoch comes", come(now, placed=True)
        if now.faults:
            yield (
                "an epoch without this node comes",
                come(replace(now, faults=now.faults - 1), placed=False),
            )
    if asked.failure is not None:
        yield (
            "the job ends",
            hear(replace(now, asked=None), JobEnded(1, asked.failure.text, now.now_s)),
        )


def come(now: RosterSimulation, *, placed: bool) -> RosterSimulation:
    """A new epoch of the job's nodes."""
    last = now.asked is not None and now.asked.failure is not None and now.asked.failure.final
    now = replace(now, epoch=now.epoch + 1, asked=now.asked if last else None)
    return hear(now, EpochChanged(now.epoch, placed, "another node failed", now.now_s))


def faults(now: RosterSimulation) -> Iterator[tuple[str, RosterSimulation]]:
    """What goes wrong."""
    for rank, side in enumerate(now.sides):
        if side.trainer:
            for how in ("raises", "refuses", "killed", "interrupted"):
                yield f"{rank} {how}", end(now, rank, how)
                yield (
                    f"{rank} {how}, a step later",
                    end(replace(now, completed=now.completed + 1), rank, how),
                )
            hung = Hung(rank, now.roster.attempt, f"rank {rank} hangs", now.now_s, now.completed)
            yield f"{rank} hangs", hear(now, hung)
            for word in (TrainerFinished(rank, side.trainer), TrainerEntered(rank, side.trainer)):
                yield f"{rank} says {word}", put(now, rank, up=(*side.up, word))
        if side.there == "up":
            left = SupervisorLeft(rank, rank, False, now.now_s, now.completed)
            yield (
                f"supervisor {rank} is killed",
                put(now, rank, there="gone", trainer=0, up=(*side.up, left), down=()),
            )
    if now.roster.shared:
        yield "another node fails", come(now, placed=True)
        yield "another node fails, this one is left out", come(now, placed=False)
        for status in (0, 1):  # 0: only where this node has no rank, which the leader knows
            if status or now.roster.state is RosterState.WAITING:
                ended = JobEnded(status, "ended elsewhere", now.now_s)
                yield f"the job ends elsewhere, {status}", hear(replace(now, asked=None), ended)
    if now.roster.state is RosterState.GATHERING:
        yield "gathering over", hear(now, GatheringTimedOut("ranks are missing", now.now_s))
    if not now.stops:
        yield "preempted", hear(replace(now, stops=True), PreemptRequested())
    else:
        yield "grace over", hear(now, GraceExpired(now.now_s))


def put(now: RosterSimulation, rank: int, **changes: object) -> RosterSimulation:
    """One rank changes."""
    sides = list(now.sides)
    sides[rank] = replace(sides[rank], **changes)
    return replace(now, sides=tuple(sides))


def end(now: RosterSimulation, rank: int, how: str) -> RosterSimulation:
    """A trainer ends by itself."""
    side = now.sides[rank]
    told: list[RosterEvent] = []
    if how in ("raises", "refuses"):
        told.append(TrainerFailing(rank, side.trainer, ERROR if how == "raises" else FINAL))
    told.append(TrainerDied(rank, side.trainer, STATUS_OF[how], now.now_s, now.completed))
    done = side.trainer if how == "ends" else side.done
    return put(now, rank, trainer=0, done=done, up=(*side.up, *told))


def obey(now: RosterSimulation, rank: int) -> RosterSimulation:
    """A supervisor does the next thing that it was told."""
    side = now.sides[rank]
    word, left = side.down[0], side.down[1:]
    match word:
        case StartAll(attempt):
            started = TrainerStarted(rank, attempt, 70 + rank, "fork")
            return put(now, rank, trainer=attempt, up=(*side.up, started), down=left)
        case KillAll(attempt):
            assert side.trainer in (0, attempt), "killed what was never to be killed"
            return put(now, rank, trainer=0, up=(*side.up, TrainerKilled(rank, attempt)), down=left)
        case _:
            gone = SupervisorLeft(rank, rank, True, now.now_s, now.completed)
            return put(now, rank, there="gone", trainer=0, up=(*side.up, gone), down=())


def hear(now: RosterSimulation, event: RosterEvent) -> RosterSimulation:
    """The keeper takes one event; whatever it decides is checked, and told."""
    before = now.roster
    roster, actions = rules.step(before, event)
    now = replace(now, roster=roster)
    names = [type(action) for action in actions]
    ends = (StartAll, Pause, LeaveAll, RequestEpoch)
    assert sum(names.count(kind) for kind in ends) <= 1, actions
    if AttemptOver in names:
        standby = (
            roster.state is RosterState.WAITING
            and roster.newest_epoch is not None
            and not roster.newest_epoch.placed
        )
        assert names[-1] in ends or standby, "an attempt ends in another one, or all leave"
        assert all(not side.trainer for side in now.sides), "it is over, and something of it lives"
    for action in actions:
        now = _tell(now, before, action)
    _check(roster)
    return now


def _tell(now: RosterSimulation, before: Roster, action: RosterAction) -> RosterSimulation:
    match action:
        case StartAll(attempt):
            assert attempt == (now.epoch if before.shared else before.attempt + 1)
            assert attempt > before.attempt
            assert all(not side.trainer for side in now.sides), "two attempts live"
            assert not any(
                isinstance(word, StartAll) for side in now.sides for word in side.down
            ), "two will live"
            assert not any(side.done for side in now.sides), "a rank that ended is started again"
            assert not any(one.finished for one in before.members.values()), (
                "the rest of a program is run again"
            )
            fresh = before.state is RosterState.GATHERING and not before.shared
            assert fresh or not now.roster.preempted, "preempted, and started again"
        case KillAll():
            assert before.state is RosterState.RUNNING
        case RequestEpoch():
            assert before.shared
            assert all(not side.trainer for side in now.sides), (
                "asks for an epoch while something lives"
            )
            return replace(now, asked=action)
        case LeaveNodes():
            assert now.roster.preempted and before.shared
            assert all(not side.trainer for side in now.sides), "it leaves, and something lives"
            return now
        case ReportEnded():
            assert before.shared
            return replace(now, said_ended=True)
        case RequestStop():
            assert before.state is RosterState.RUNNING
            return replace(now, asked_to_stop=True)
        case LeaveAll(status, text):
            assert status > 0 or before.state is RosterState.WAITING
            assert text
        case LeaveOne(rank):
            return _send(now, rank, action)
        case AttemptOver():
            return now
        case Pause(attempt, seconds):
            assert not before.shared and attempt == before.attempt and seconds > 0
            assert all(not side.trainer for side in now.sides), "pauses while something lives"
            return now
    for rank in range(len(now.sides)):
        now = _send(now, rank, action)
    return now


def _send(now: RosterSimulation, rank: int, word: RosterAction) -> RosterSimulation:
    side = now.sides[rank]
    # To who has joined: its connection is known by its hello.
    known = side.there == "up" and not any(isinstance(event, SupervisorJoined) for event in side.up)
    return put(now, rank, down=(*side.down, word)) if known else now


def _check(roster: Roster) -> None:
    for offset in (-1, 1, 7):
        stale = roster.attempt + offset
        for event in (
            TrainerStarted(0, stale, 1, "fork"),
            TrainerDied(0, stale, 0, 0.0, 9),
            TrainerDied(0, stale, -9, 0.0, 9),
            TrainerKilled(0, stale),
            Hung(0, stale, "", 0.0, 9),
            TrainerFailing(0, stale, ERROR),
            TrainerFinished(0, stale),
            TrainerEntered(0, stale),
            TrainerProgressed(0, stale, "s", 10**9),
            PauseOver(stale),
        ):
            assert rules.step(roster, event) == (roster, []), (
                "a dead attempt's word changed something"
            )


def check_rest(now: RosterSimulation) -> None:
    """At rest nothing may be left to wait for: all train, or all have gone."""
    roster = now.roster
    if roster.state is RosterState.RUNNING:
        for rank, side in enumerate(now.sides):
            trains = side.there == "up" and side.trainer == roster.attempt
            ended = side.there == "gone" and rank not in roster.members
            assert trains or ended, f"rank {rank} neither trains nor has gone: {side} {roster}"
            assert not trains or roster.members[rank].seat is RankState.ALIVE
        return
    if roster.shared and roster.state is RosterState.WAITING:
        left_out = (
            roster.newest_epoch is not None
            and not roster.newest_epoch.placed
            and roster.newest_epoch.number > roster.attempt
        )
        assert now.asked is not None or left_out, f"waits for what nobody knows of: {roster}"
        assert all(
            side.there == "up" and not side.trainer for side in now.sides if side.there != "gone"
        )
        return
    assert roster.state is RosterState.OVER, f"hangs: {roster}"
    assert all(side.there == "gone" for side in now.sides), (
        f"a supervisor was never told to go: {now.sides}"
    )
