"""The keepers of this machine and their reports, as text and JSON.

Reading a report starts no keeper and removes nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ckpt.cli.echo import JsonValue, wants_json
from ckpt.cli.output import human_bytes, human_time
from ckpt.errors import CkptError, NotFoundError, UsageError
from ckpt.events import Fact
from ckpt.ipc.client import KeeperClient
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    WIRE_VERSION,
    GetStatus,
    Hello,
    KeeperReport,
    RankReport,
    SlotReport,
    Status,
    StoreBehind,
)
from ckpt.ipc.runtime_dir import JobFolder, list_jobs
from ckpt.values import SnapshotId, SnapshotInfo

ANSWER_S_MAX = 5.0
"""Timeout of one answer. A keeper answers from memory, so one that takes longer hangs."""


@dataclass(frozen=True, slots=True)
class KeeperIdentity:
    """A keeper, living or dead, and its runtime folder.

    ``pid`` is 0 and the texts are empty if the folder has no description of the keeper.
    """

    job: str
    store: str
    pid: int
    folder: Path


@dataclass(frozen=True, slots=True)
class LiveKeeper:
    """A keeper that answered."""

    keeper: KeeperIdentity
    report: KeeperReport


@dataclass(frozen=True, slots=True)
class SilentKeeper:
    """A keeper that holds its lock and did not answer.

    It hangs, is stopped, is just starting, or speaks another protocol version.
    """

    keeper: KeeperIdentity
    problem: str


@dataclass(frozen=True, slots=True)
class DeadKeeper:
    """A runtime folder without a keeper: the keeper was killed and not replaced."""

    keeper: KeeperIdentity


KeeperAnswer = LiveKeeper | SilentKeeper | DeadKeeper


class KeeperQuery:
    """A connection to a keeper, as a tool.

    Raises UnavailableError if nothing listens or the answer takes too long.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._calls = KeeperClient(MessageSocket(folder.connect()))
        try:
            self._calls.call(
                Hello(version=WIRE_VERSION, role="tool", pid=os.getpid()), timeout_s=ANSWER_S_MAX
            )
        except BaseException:
            self._calls.close()
            raise

    def report(self) -> KeeperReport | None:
        """The keeper's report; None if it has no ranks yet."""
        return self._calls.ask(GetStatus(), Status, timeout_s=ANSWER_S_MAX).report

    def close(self) -> None:
        """Close the connection."""
        self._calls.close()


def query_all() -> list[KeeperAnswer]:
    """The answer of each keeper of this user, sorted by job and store."""
    answers = (query(folder) for folder in list_jobs())
    return sorted(
        (answer for answer in answers if answer is not None),
        key=lambda answer: (answer.keeper.job, answer.keeper.store),
    )


def query(folder: JobFolder) -> KeeperAnswer | None:
    """The answer of one folder's keeper; None if there is none and never was one."""
    keeper = keeper_identity(folder)
    try:
        connection = KeeperQuery(folder)
        try:
            report = connection.report()
        finally:
            connection.close()
    except CkptError as error:
        if folder.has_keeper():
            return SilentKeeper(keeper, str(error))
        # Without a description the folder was removed meanwhile, or its first keeper is starting.
        return DeadKeeper(keeper) if folder.read_info() is not None else None
    return (
        SilentKeeper(keeper, "it has no ranks yet")
        if report is None
        else LiveKeeper(keeper, report)
    )


def keeper_identity(folder: JobFolder) -> KeeperIdentity:
    """The keeper as the folder describes it."""
    info = folder.read_info()
    return (
        KeeperIdentity(info.job, info.store, info.pid, folder.path)
        if info is not None
        else KeeperIdentity("", "", 0, folder.path)
    )


def choose_keeper(keepers: Sequence[KeeperIdentity], wanted: str | None) -> int:
    """The number of the keeper that the user means, by the name of the job or of the folder.

    Raises NotFoundError if none fits, UsageError if several do.
    """
    fitting = [
        number
        for number, keeper in enumerate(keepers)
        if wanted is None or wanted in (keeper.job, keeper.folder.name)
    ]
    if not fitting:
        text = "no job runs here." if wanted is None else f"no such job runs here. job={wanted}"
        raise NotFoundError(f"{text} 'ckpt ps' lists what does")
    if len(fitting) > 1:
        names = ", ".join(
            f"{keepers[number].folder.name} ({keepers[number].job} in {keepers[number].store})"
            for number in fitting
        )
        raise UsageError(f"several jobs fit; name one by its folder. folders={names}")
    return fitting[0]


def job_command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command ``--json`` and ``--debug``; it gets the keyword ``as_json``."""

    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option(
        "--debug", is_flag=True, expose_value=False, help="Print the traceback of an error."
    )
    @click.pass_context
    @functools.wraps(function)
    def command(ctx: click.Context, /, *, as_json: bool, **others: object) -> int | None:
        return function(as_json=wants_json(ctx, as_json), **others)

    return command


# ---- a report as table rows for people and as JSON for programs

RANK_COLUMNS = (
    "RANK",
    "SUPERVISOR",
    "TRAINER",
    "STEP",
    "PHASE",
    "IDLE",
    "STAGED",
    "SKIPPED",
    "SLOTS",
)
"""Heads of ``rank_rows``. SLOTS has each slot's snapshot, with ``*`` while an upload uses it."""

LIVE_COLUMNS = (
    "RANK",
    "TRAINER",
    "STEP",
    "STEPS/S",
    "IDLE",
    "PHASE",
    "STAGED",
    "SKIPPED",
    "HELD",
    "SLOTS",
)
"""Heads of ``live_rows``. HELD counts the slots that uploads use."""

RECOVERY_COLUMNS = ("ATTEMPT", "WHY", "TOOK", "FROM", "REDONE", "PHASES")
"""Heads of ``recovery_rows``."""

NUMERIC_COLUMNS = frozenset(
    (
        "RANK",
        "SUPERVISOR",
        "TRAINER",
        "STEP",
        "STEPS/S",
        "IDLE",
        "STAGED",
        "SKIPPED",
        "HELD",
        "ATTEMPT",
    )
)
"""Right-aligned columns."""

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class ReportSample:
    """A report and its arrival time, in seconds of a monotonic clock."""

    at_s: float
    report: KeeperReport


def human_seconds(seconds: float) -> str:
    """``0.0123`` as ``12 ms``, ``75.0`` as ``1 min 15 s``."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def snapshot_text(snapshot: SnapshotId | None) -> str:
    """A snapshot as ``epoch:step``, the form that commands take."""
    return NOTHING if snapshot is None else f"{snapshot.epoch}:{snapshot.step}"


def summary(report: KeeperReport) -> list[tuple[str, str]]:
    """The job's facts beside its ranks, each with a label."""
    held = sum(slot.held for rank in report.ranks for slot in rank.slots)
    epoch = f", epoch {report.epoch}" if report.epoch else ""
    return [
        ("job", report.job),
        ("store", report.store),
        (
            "keeper",
            f"pid {report.pid}, up {human_seconds(report.since_s)}, "
            f"{human_bytes(report.rss_bytes)}",
        ),
        ("state", f"{report.state}, attempt {report.attempt}{epoch}"),
        ("complete", snapshot_text(report.complete)),
        ("durable", _durable_text(report.durable)),
        ("uploads", f"{report.uploads} in flight, {held} slots held"),
        ("slots", human_bytes(report.slot_bytes)),
        *(("behind", _behind_text(store)) for store in report.behind),
    ]


def _behind_text(store: StoreBehind) -> str:
    least = "at least " if store.more else ""
    return f"{store.store} lacks {least}{store.objects} objects that other stores have"


def rank_rows(report: KeeperReport) -> list[tuple[str, ...]]:
    """One row of ``RANK_COLUMNS`` for each rank."""
    return [
        (
            str(rank.rank),
            _pid_text(rank.supervisor_pid),
            _pid_text(rank.trainer_pid),
            _steps_text(rank.completed),
            rank.phase,
            human_seconds(rank.idle_s),
            str(rank.staged),
            str(rank.skipped),
            _slots_text(rank.slots),
        )
        for rank in report.ranks
    ]


def live_rows(report: KeeperReport, rates: Mapping[int, float | None]) -> list[tuple[str, ...]]:
    """One row of ``LIVE_COLUMNS`` for each rank; ``rates`` is from ``steps_per_s``."""
    return [
        (
            str(rank.rank),
            _pid_text(rank.trainer_pid),
            _steps_text(rank.completed),
            _rate_text(rates.get(rank.rank)),
            human_seconds(rank.idle_s),
            rank.phase,
            str(rank.staged),
            str(rank.skipped),
            str(sum(slot.held for slot in rank.slots)),
            _slots_text(rank.slots),
        )
        for rank in report.ranks
    ]


def recovery_rows(recoveries: Sequence[Mapping[str, Fact]], *, last: int) -> list[tuple[str, ...]]:
    """One row of ``RECOVERY_COLUMNS`` for each of the last recoveries, newest first.

    FROM is the restored step. A fact whose name ends in ``_s`` is the duration of a phase; phases
    are in the order in which they happened.
    """
    return [
        (
            _fact_text(facts.get("attempt")),
            _fact_text(facts.get("why")),
            _seconds_text(facts.get("seconds")),
            _fact_text(facts.get("resumed")),
            _fact_text(facts.get("steps_lost")),
            ", ".join(
                f"{name[:-2]} {_seconds_text(value)}"
                for name, value in facts.items()
                if name.endswith("_s")
            ),
        )
        for facts in reversed(recoveries[-last:])
    ]


def steps_per_s(samples: Sequence[ReportSample]) -> dict[int, float | None]:
    """Steps per second of each rank, since the oldest sample of the same trainer.

    None if the last sample is the only one of its trainer.
    """
    if not samples:
        return {}
    last = samples[-1]
    return {rank.rank: _rate(rank, last, samples) for rank in last.report.ranks}


def report_json(report: KeeperReport) -> dict[str, JsonValue]:
    """The report as one JSON document."""
    return {
        "job": report.job,
        "store": report.store,
        "pid": report.pid,
        "launch": report.launch,
        "state": report.state,
        "since_s": report.since_s,
        "attempt": report.attempt,
        "epoch": report.epoch,
        "complete": snapshot_json(report.complete),
        "durable": _durable_json(report.durable),
        "uploads": report.uploads,
        "slot_bytes": report.slot_bytes,
        "rss_bytes": report.rss_bytes,
        "ranks": [_rank_json(rank) for rank in report.ranks],
        "recoveries": [dict(facts) for facts in report.recoveries],
        "mirror_bytes": report.mirror_bytes,
        "refused": dict(report.refused),
        "behind": [
            {"store": one.store, "objects": one.objects, "more": one.more} for one in report.behind
        ],
    }


def live_json(samples: Sequence[ReportSample]) -> dict[str, JsonValue]:
    """The last sample's report as one JSON document, with ``steps_per_s`` for each rank."""
    report = samples[-1].report
    rates = steps_per_s(samples)
    ranks: list[JsonValue] = [
        {**_rank_json(rank), "steps_per_s": rates[rank.rank]} for rank in report.ranks
    ]
    return {**report_json(report), "ranks": ranks}


def _rate(rank: RankReport, last: ReportSample, samples: Sequence[ReportSample]) -> float | None:
    for sample in samples:
        for before in sample.report.ranks:
            same = (before.rank, before.trainer_pid) == (rank.rank, rank.trainer_pid)
            same = (
                same
                and sample.report.attempt == last.report.attempt
                and 0 <= before.completed <= rank.completed
            )
            if same and sample.at_s < last.at_s:
                return (rank.completed - before.completed) / (last.at_s - sample.at_s)
    return None


def _rank_json(rank: RankReport) -> dict[str, JsonValue]:
    return {
        "rank": rank.rank,
        "supervisor_pid": rank.supervisor_pid or None,
        "trainer_pid": rank.trainer_pid or None,
        "completed": rank.completed if rank.completed >= 0 else None,
        "phase": rank.phase,
        "idle_s": rank.idle_s,
        "staged": rank.staged,
        "skipped": rank.skipped,
        "slots": [
            {
                "index": slot.index,
                "size_bytes": slot.size_bytes,
                "snapshot": snapshot_json(slot.snapshot),
                "held": slot.held,
            }
            for slot in rank.slots
        ],
    }


def snapshot_json(snapshot: SnapshotId | None) -> JsonValue:
    return None if snapshot is None else {"epoch": snapshot.epoch, "step": snapshot.step}


def _durable_json(info: SnapshotInfo | None) -> JsonValue:
    if info is None:
        return None
    return {
        "epoch": info.epoch,
        "step": info.step,
        "size_bytes": info.size_bytes,
        "new_bytes": info.new_bytes,
        "created_unix_s": info.created_unix_s,
        "tags": list(info.tags),
    }


def _durable_text(info: SnapshotInfo | None) -> str:
    if info is None:
        return NOTHING
    tags = f" ({', '.join(info.tags)})" if info.tags else ""
    return f"{snapshot_text(info.id)}{tags}, committed {human_time(info.created_unix_s)}"


def _pid_text(pid: int) -> str:
    return str(pid) if pid else NOTHING


def _steps_text(completed: int) -> str:
    return str(completed) if completed >= 0 else NOTHING


def _rate_text(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:.2f}"


def _slots_text(slots: Sequence[SlotReport]) -> str:
    return (
        " ".join(snapshot_text(slot.snapshot) + ("*" if slot.held else "") for slot in slots)
        or NOTHING
    )


def _fact_text(value: Fact) -> str:
    return NOTHING if value is None else str(value)


def _seconds_text(value: Fact) -> str:
    return human_seconds(value) if isinstance(value, float | int) else _fact_text(value)
