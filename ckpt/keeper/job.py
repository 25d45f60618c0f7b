"""One job in its keeper, from the first hello until nothing is left to do: what each client says,
and when to end.

No sockets and no waiting: the loop (``daemon``) passes in what clients send. ``Supervisors``
follows the attempts, ``TrainerCalls`` answers trainers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt.errors import ConflictError, UsageError
from ckpt.events import Emit
from ckpt.ipc.board import RANKS_MAX
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.frames import close_fds
from ckpt.ipc.messages import (
    WIRE_VERSION,
    Bye,
    GetStatus,
    Hello,
    KeeperReport,
    Message,
    RankReport,
    Status,
    Welcome,
)
from ckpt.keeper.attempts.supervisors import Supervisors
from ckpt.keeper.connection import ClientConnection
from ckpt.keeper.job_state import JobState
from ckpt.keeper.slots import Estate, PostToLoop
from ckpt.keeper.trainer_calls import TrainerCalls

FLUSH_WAIT_S = 600.0
"""How long a keeper without clients tries to make durable what it promised."""

TIDY_WAIT_S = 120.0
"""How long it then drops and deletes old snapshots; the rest is left to the next run."""

INHERIT_WAIT_S = 10.0
"""How long a keeper that took slots over waits for the launch that caused it. After that it acts as
if its program had been cut off."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class JobTimes:
    """When something happened, in CLOCK_MONOTONIC seconds; None: it did not."""

    began_s: float
    inherited_s: float | None = None
    """When slots were taken over for a launch that has not said hello yet."""
    abandoned_s: float | None = None
    idle_s: float | None = None
    tidy_s: float | None = None


class Job:
    """The parts of one job and its life. ``drain`` reads what trainers sent before they died;
    ``stacks``: a folder.

    The job ends if no client is connected, nothing is in flight, and either all clients left as
    planned or none came back in time.
    """

    def __init__(
        self,
        spec: KeeperSpec,
        *,
        incarnation: str,
        post: PostToLoop,
        emit: Emit,
        drain: Callable[[], object],
        stacks: Path,
        estate: Estate | None = None,
    ) -> None:
        self.state = JobState.create(spec, incarnation=incarnation, post=post, emit=emit)
        self._stores, self._access = spec.stores_digest(), spec.access_digest()
        if estate is not None:
            self.state.memory.inherit(estate)
        self.met_anyone = False
        """Whether a client other than a tool has said hello."""
        self._calls = TrainerCalls(self.state)
        self._supervisors = Supervisors(self.state, self._calls, stacks=stacks, drain=drain)
        self._times = JobTimes(time.monotonic())
        if estate is not None and estate.slots:
            self._times.inherited_s = self._times.began_s

    # ---- what clients say

    def hello(self, client: ClientConnection, hello: Hello) -> None:
        """Admit a client. Raises UsageError, ConflictError or UnavailableError if it can't be
        admitted."""
        if client.hello is not None:
            raise UsageError("a client said hello twice.")
        if hello.version != WIRE_VERSION:
            raise UsageError(
                f"another release of torch-ckpt holds this job. theirs={WIRE_VERSION} "
                f"ours={hello.version}; end that run first"
            )
        if hello.role not in ("supervisor", "trainer", "events", "tool"):
            raise UsageError(f"unknown role. role={hello.role!r}")
        self.met_anyone |= hello.role != "tool"
        state, attempt = self.state, self._supervisors.attempt
        if hello.role == "tool":
            client.admit(hello)
            client.send(
                Welcome(id=hello.id, boot=state.incarnation, pid=os.getpid(), attempt=attempt)
            )
            return
        if self._serves_other(hello):
            client.ask_settings(hello)
            return
        new = self.admit(hello)
        client.admit(hello)
        if hello.role == "supervisor":
            self._supervisors.join(client, hello, new=new)
            return
        if new and state.memory.slots is not None and state.memory.board is not None:
            self._calls.clear()
            state.memory.board.begin_attempt(max(state.memory.board.attempt, attempt) + 1)
            state.memory.slots.sync_board()
        state.welcome(client, hello, attempt=attempt, new=new)
        if attempt and hello.role == "events":
            self._supervisors.repeat_stop(client)

    def handle(self, client: ClientConnection, message: Message, fds: list[int]) -> None:
        """Obey one message of an admitted client. Owns ``fds``. Raises UsageError for one that its
        role does not send."""
        match message:
            case Bye():
                client.planned = True
            case GetStatus():
                client.send(Status(id=message.id, report=self.report()))
            case _ if client.role != "tool" and (
                self._supervisors.handle(client, message, fds)
                or (self.state.memory.board and self._calls.handle(client, message, fds))
            ):
                return
            case _:
                close_fds(fds)
                raise UsageError(
                    f"a {client.role} does not send this message. message={type(message).__name__}"
                )

    def disconnected(self, client: ClientConnection) -> None:
        """A connection ended; ``client`` is no longer among the clients."""
        self._calls.disconnected(client)
        if client.role == "supervisor":
            self._supervisors.disconnected(client)
        if client.role in ("", "tool"):
            return
        launch = self.state.launch
        if client.role == "trainer" and not client.planned and not self._supervisors.supervised:
            launch.trainer_lost()
            # What it had not submitted is submitted or refused for it, so that other ranks' uploads
            # can complete.
            self.state.uploads.attempt_ended()
        cut_off = not client.planned or launch.cut_off or self._supervisors.cut_off
        if not self.state.clients.members and cut_off and not self._supervisors.ended_well:
            self._abandon()

    # ---- the launches

    def admit(self, hello: Hello) -> bool:
        """Make the client's launch the current one; True if this keeper is new to it.

        Raises ConflictError if another launch of the job is still alive here. Raises
        UnavailableError while an earlier launch with another number of ranks has a snapshot to
        upload, which would be lost: the client asks again.
        """
        if not 1 <= hello.ranks <= RANKS_MAX or not 0 <= hello.rank < hello.ranks:
            raise UsageError(f"rank out of range. rank={hello.rank} ranks={hello.ranks}")
        state = self.state
        same_ranks = hello.ranks == state.memory.ranks
        if hello.launch == state.launch.id and same_ranks:
            self._times.abandoned_s = self._times.idle_s = None
            return False
        self._check_alone()
        if not same_ranks:
            state.uploads.check_flushed()
        state.launch.begin(hello)
        if not same_ranks:  # what the old ranks staged can't belong to the new ones
            state.memory.close()
            state.uploads.discard()
            state.memory.resize(hello.ranks)
        state.uploads.new_launch()
        self._times.abandoned_s = self._times.idle_s = self._times.inherited_s = None
        return True

    def _check_alone(self) -> None:
        """Raise ConflictError if processes of a launch live here."""
        state = self.state
        others = sorted(
            {client.hello.pid for client in state.clients.members if client.hello is not None}
        )
        if others:
            raise ConflictError(
                f"this job is running already on this node. job={state.spec.job!r} "
                f"store={state.spec.store} pids={others}; stop it first, or give this run another "
                "job name"
            )

    def _serves_other(self, hello: Hello) -> bool:
        """Whether a new launch has other settings than this keeper, which must end then.

        Raises ConflictError if a rank of the current launch names other stores than the others.
        """
        state = self.state
        if not hello.stores:
            return False
        if hello.launch == state.launch.id:
            # What its ranks pass for access may differ: each may hold a token of its own.
            if hello.stores != self._stores:
                raise ConflictError(
                    "this process names other stores, another write quorum or another encryption "
                    f"key than its launch. job={state.spec.job!r} rank={hello.rank} "
                    f"launch_stores={list(state.spec.stores)} "
                    f"write_quorum={state.spec.write_quorum}; pass the same on all ranks, and in "
                    "all sessions that write to one job"
                )
            return False
        if (hello.stores, hello.access) == (self._stores, self._access):
            return False
        self._check_alone()
        return True

    def may_end_for(self, hello: Hello, settings: KeeperSpec) -> bool:
        """Whether a keeper with ``settings`` may follow this one now. Raises the reason why it may
        not; false: since ``hello`` was answered another rank of its launch was admitted here, so
        it would be as well."""
        if hello.launch == self.state.launch.id:
            return False
        self._check_alone()
        ours, theirs = self.state.spec, settings
        if (ours.store, ours.job) != (theirs.store, theirs.job):
            raise UsageError(
                f"another job's settings. job={theirs.job!r} ours={ours.job!r} store={theirs.store}"
            )
        return True

    def _abandon(self) -> None:
        """All clients are gone, and not as planned: upload the newest snapshot, and wait for one to
        come back."""
        self._times.abandoned_s = time.monotonic()
        self.state.uploads.attempt_ended()
        self.state.uploads.flush_newest()

    # ---- time

    def tick(self) -> float:
        """Do what is due; returns the seconds until the next tick is needed."""
        inherited_s = self._times.inherited_s
        if inherited_s is not None and time.monotonic() - inherited_s > INHERIT_WAIT_S:
            self._times.inherited_s = None
            self._abandon()
        return min(self._supervisors.tick(), self._calls.tick(time.monotonic()))

    def over(self) -> bool:
        """Whether the keeper may end."""
        state, times, now_s = self.state, self._times, time.monotonic()
        if state.clients.members:
            times.idle_s = times.tidy_s = None
            return False
        if state.launch.cluster.busy:
            return False
        if times.inherited_s is not None:
            return False
        if (
            times.abandoned_s is not None
            and now_s - times.abandoned_s < state.launch.policy.linger_s
        ):
            return False
        uploads = state.uploads.current
        if uploads is None:
            return True
        if times.idle_s is None:
            times.idle_s = now_s
        if not state.uploads.idle:
            return now_s - times.idle_s > FLUSH_WAIT_S
        begin = times.tidy_s is None
        if times.tidy_s is None:
            times.tidy_s = now_s
        return uploads.finish_retention(begin=begin) or now_s - times.tidy_s > TIDY_WAIT_S

    def close(self) -> None:
        """Free everything. The nodes come first: their parts read slots and board."""
        self.state.launch.cluster.close()
        self.state.uploads.close()
        self.state.memory.close()

    # ---- for tools

    def report(self) -> KeeperReport:
        """What the keeper says of itself and its ranks at this moment."""
        state, supervisors = self.state, self._supervisors
        roster, slots, uploads = supervisors.roster, state.memory.slots, state.uploads.current
        complete = slots.complete_snapshots(state.memory.ranks) if slots is not None else []
        doing = "lingering"
        if state.clients.members:
            doing = (
                roster.state.value if roster is not None and supervisors.supervised else "in place"
            )
        cluster = state.launch.cluster.status()
        return KeeperReport(
            job=state.spec.job,
            store=state.spec.store,
            pid=os.getpid(),
            boot=state.incarnation,
            launch=state.launch.id,
            attempt=supervisors.attempt,
            epoch=uploads.epoch if uploads is not None else 0,
            state=doing,
            since_s=time.monotonic() - self._times.began_s,
            complete=complete[0] if complete else None,
            durable=uploads.durable if uploads is not None else None,
            uploads=uploads.in_flight if uploads is not None else 0,
            slot_bytes=slots.total_bytes if slots is not None else 0,
            rss_bytes=_own_bytes(),
            ranks=tuple(self._rank_report(rank) for rank in range(state.memory.ranks)),
            recoveries=tuple(supervisors.recoveries),
            nodes=cluster.nodes,
            mirror_bytes=cluster.mirror_bytes,
            refused=dict(cluster.refused),
            behind=uploads.stores_behind if uploads is not None else (),
        )

    def _rank_report(self, rank: int) -> RankReport:
        memory, roster = self.state.memory, self._supervisors.roster
        assert memory.board is not None and memory.slots is not None, "there are ranks"
        board = memory.board.rank(rank)
        entry = roster.members.get(rank) if roster is not None else None
        members = self.state.clients.members
        alone = next(
            (one.hello for one in members if one.role == "trainer" and one.rank == rank), None
        )
        trainer_pid = (
            entry.trainer_pid if entry is not None else alone.pid if alone is not None else 0
        )
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        completed = board.completed
        return RankReport(
            rank=rank,
            supervisor_pid=entry.pid if entry is not None else 0,
            trainer_pid=trainer_pid,
            completed=-1 if completed is None else completed,
            phase=board.phase.name.lower(),
            idle_s=(now_ns - board.beat_ns) / 1e9 if board.beat_ns else 0.0,
            staged=board.staged,
            skipped=board.skipped,
            slots=memory.slots.report(rank),
        )


def _own_bytes() -> int:
    """Memory of this process that is no slot: resident pages that are not shared."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES
