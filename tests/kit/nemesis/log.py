"""What the log's history says: which snapshots exist, on which line; and whether states are what it
says. Pure.

It follows the rules of the log by itself, in a few lines, so that it can be held against what the
store's reader makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kit.nemesis.history import Committed, History, Opened, Pair


@dataclass
class Log:
    """The log as it was after its last record; ``wrong``: what no log may hold."""

    opens: dict[int, Opened] = field(default_factory=dict)
    commits: list[Committed] = field(default_factory=list)
    """Those that count, in order."""
    void: list[Committed] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return max(self.opens, default=0)

    def taken_in(self, pair: Pair) -> list[int]:
        """In which epoch each step of a pair's line was taken."""
        epoch, step = pair
        found: list[int] = []
        while epoch in self.opens:
            resume = self.opens[epoch].resume
            first = resume[1] if resume is not None else 0
            found = [epoch] * (step - first) + found
            if resume is None:
                return found
            epoch, step = resume
        return []

    def on_line(self, pair: Pair, epoch: int) -> bool:
        """Whether a pair is on the line of an epoch."""
        at: Pair | None = (epoch, 1 << 62)
        while at is not None and at[0] in self.opens:
            if at[0] == pair[0]:
                return pair[1] <= at[1]
            at = self.opens[at[0]].resume
        return False

    def newest(self) -> Pair | None:
        """The greatest pair that counts on the line of the newest epoch."""
        return max(
            (one.pair for one in self.commits if self.on_line(one.pair, self.epoch)), default=None
        )


def read_log(records: Sequence[Opened | Committed]) -> Log:
    """Follow the records in order."""
    log = Log()
    for record in records:
        if isinstance(record, Opened):
            _open(log, record)
        elif (
            record.writer != log.epoch
            or record.pair[0] not in log.opens
            or record.pair in [one.pair for one in log.commits]
        ):
            log.void.append(record)
        else:
            _commit(log, record)
    return log


def _open(log: Log, record: Opened) -> None:
    newest = log.newest()
    if record.epoch <= log.epoch or _is_superseded(log, record):
        return  # void
    log.opens[record.epoch] = record
    if record.resume is not None and not log.taken_in(record.resume) and record.resume[1] > 0:
        log.wrong.append(
            f"an epoch goes on from what was never trained. epoch={record.epoch} "
            f"from={record.resume}"
        )
    if newest is not None and not log.on_line(newest, record.epoch):
        log.wrong.append(
            f"an epoch goes on from before the newest snapshot. epoch={record.epoch} "
            f"from={record.resume} newest={newest}"
        )


def _is_superseded(log: Log, record: Opened) -> bool:
    """Whether a later membership epoch of the same line has opened an epoch before."""
    named = [one.membership for one in log.opens.values() if one.membership is not None]
    if record.membership is None or not named:
        return False
    line, number = named[-1]
    return line == record.membership[0] and number > record.membership[1]


def _commit(log: Log, record: Committed) -> None:
    log.commits.append(record)
    if not log.on_line(record.pair, log.epoch):
        log.wrong.append(
            f"a snapshot was committed that the line had gone on without. pair={record.pair} "
            f"epoch={log.epoch} seq={record.seq}"
        )


def records(history: History, log: Log) -> list[str]:
    """The log itself."""
    wrong = list(log.wrong)
    if history.hole:
        wrong.append(f"the log can't be read to its end. {history.hole}")
    if {one.pair for one in log.commits} != history.snapshots:
        wrong.append(
            f"the store's reader sees other snapshots than the log has. "
            f"differ={sorted({one.pair for one in log.commits} ^ history.snapshots)[:5]}"
        )
    if log.newest() != history.newest:
        wrong.append(
            f"the store's reader has another newest. reader={history.newest} log={log.newest()}"
        )
    return wrong


def kept(history: History, log: Log) -> list[str]:
    """No record, once there, went or changed; one place of the log holds the same on each store,
    and most stores have it."""
    wrong = []
    first: dict[tuple[int, str], str] = {}
    for one in history.sightings:
        known = first.setdefault((one.store, one.key), one.digest or "")
        if one.digest is None:
            wrong.append(f"a record of the log vanished. store={one.store} key={one.key}")
        elif one.digest != known:
            wrong.append(f"a record of the log changed. store={one.store} key={one.key}")
    for place, digest in first.items():
        if digest and history.log_digests.get(place) != digest:
            wrong.append(f"a record of the log is not what it was. store={place[0]} key={place[1]}")
    of_key: dict[str, list[str]] = {}
    for (_, key), digest in history.log_digests.items():
        of_key.setdefault(key, []).append(digest)
    for key, digests in of_key.items():
        if len(set(digests)) > 1:
            wrong.append(f"two records at one place of the log. key={key}")
        if 2 * len(digests) <= history.stores:
            wrong.append(
                f"a record is on too few stores. key={key} on={len(digests)} "
                f"stores={history.stores}"
            )
    return wrong


def contents(history: History, log: Log) -> list[str]:
    """Every snapshot that was ever committed is there, and holds the undisturbed state of its
    line."""
    wrong = []
    for one in log.commits:
        found = history.contents.get(one.pair, "it is gone")
        if isinstance(found, str):
            wrong.append(f"a committed snapshot can't be read. pair={one.pair} why={found}")
        elif (found.step, found.value) != (one.pair[1], history.reference[one.pair[1]]):
            wrong.append(f"a snapshot holds a wrong state. pair={one.pair}")
        elif list(found.trail) != log.taken_in(one.pair):
            wrong.append(
                "a snapshot is not of its line. "
                f"pair={one.pair}{_differ(found.trail, log.taken_in(one.pair))}"
            )
    return wrong


def trained(history: History, log: Log) -> list[str]:
    """What was committed or gone on from, all ranks of its epoch had completed."""
    done: dict[int, dict[int, int]] = {}
    for one in history.steps:
        ranks = done.setdefault(one.epoch, dict.fromkeys(range(one.who.world), 0))
        ranks[one.who.rank] = max(ranks[one.who.rank], one.step + 1)
    pairs = [one.pair for one in log.commits]
    pairs += [one.resume for one in log.opens.values() if one.resume is not None]
    wrong = []
    for pair in dict.fromkeys(pairs):
        started = log.opens[pair[0]].resume if pair[0] in log.opens else None
        if started is not None and started[1] == pair[1]:
            continue  # captured before a step of its own
        reached = min(done.get(pair[0], {0: 0}).values())
        if reached < pair[1]:
            wrong.append(
                f"a snapshot is of a step that not all ranks completed. pair={pair} "
                f"reached={reached}"
            )
    return wrong


def lines(history: History, log: Log) -> list[str]:
    """What trainers went on from, and ended with, is what the log says."""
    wrong = []
    for one in history.entered:
        opened = log.opens.get(one.epoch)
        if opened is None:
            wrong.append(f"trained in an epoch that was never opened. {one.who} epoch={one.epoch}")
        elif opened.resume != one.pair:
            wrong.append(
                f"went on from another pair than its epoch. {one.who} from={one.pair} "
                f"epoch's={opened.resume}"
            )
        elif one.pair is not None and list(one.trail) != log.taken_in(one.pair):
            wrong.append(
                f"restored what is not of its line. {one.who} "
                f"{_differ(one.trail, log.taken_in(one.pair))}"
            )
    end = log.newest()
    if end is None or end[1] != history.finish:
        wrong.append(f"the last state is not durable. newest={end} finish={history.finish}")
    else:
        wrong += [
            f"the final state is not of the newest line. rank={rank} "
            f"{_differ(final.trail, log.taken_in(end))}"
            for rank, final in history.finals.items()
            if list(final.trail) != log.taken_in(end)
        ]
    return wrong


LOG_RULES: tuple[Callable[[History, Log], list[str]], ...] = (
    records,
    kept,
    contents,
    trained,
    lines,
)


def _differ(found: Sequence[int], wanted: Sequence[int]) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
        min(len(found), len(wanted)),
    )
    here, there = list(found[at : at + 3]), list(wanted[at : at + 3])
    return f" at step {at}: {here} of {len(found)}, the line has {there} of {len(wanted)}"
