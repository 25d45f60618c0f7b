"""What a keeper tells tools about itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ckpt.ipc.report import RankReport, Report
from ckpt.keeper.attempts.supervisors import Crew
from ckpt.keeper.job import Job

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def report(job: Job, crew: Crew) -> Report:
    """All of it, at one moment."""
    roster = crew.roster
    complete = job.slots.complete(job.ranks) if job.slots is not None else []
    state = "lingering"
    if job.members:
        state = roster.state.value if roster is not None and crew.supervised else "in place"
    return Report(
        job=job.spec.job, store=job.spec.store, pid=os.getpid(), boot=job.boot, launch=job.launch, attempt=crew.attempt,
        epoch=job.uploads.epoch if job.uploads is not None else 0, state=state,
        since_s=time.monotonic() - job.times.began_s, complete=complete[0] if complete else None,
        durable=job.uploads.durable if job.uploads is not None else None,
        uploads=job.uploads.in_flight if job.uploads is not None else 0,
        slot_bytes=job.slots.total_bytes if job.slots is not None else 0, rss_bytes=_own_bytes(),
        ranks=tuple(_rank(job, crew, rank) for rank in range(job.ranks)), recoveries=tuple(crew.recoveries),
        nodes=job.nodes.standbys.report() if job.nodes is not None else (),
        mirror_bytes=job.nodes.memory.sent_bytes if job.nodes is not None else 0,
        refused=job.nodes.refused if job.nodes is not None else {},
    )  # fmt: skip


def _rank(job: Job, crew: Crew, rank: int) -> RankReport:
    assert job.board is not None and job.slots is not None, "there are ranks"
    words = job.board.rank(rank)
    member = crew.roster.members.get(rank) if crew.roster is not None else None
    alone = next((peer.hello for peer in job.members if peer.role == "trainer" and peer.rank == rank), None)
    trainer_pid = member.trainer_pid if member is not None else alone.pid if alone is not None else 0
    now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    completed = words.completed
    return RankReport(
        rank=rank, supervisor_pid=member.pid if member is not None else 0, trainer_pid=trainer_pid,
        completed=-1 if completed is None else completed, phase=words.phase.name.lower(),
        idle_s=(now_ns - words.beat_ns) / 1e9 if words.beat_ns else 0.0, staged=words.staged, skipped=words.skipped,
        slots=job.slots.report(rank),
    )  # fmt: skip


def _own_bytes() -> int:
    """Memory of this process that is no slot: resident pages that are not shared."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(fields[1]) - int(fields[2])) * PAGE_BYTES
