"""Deletes what no snapshot needs any more, store by store. A death at any moment harms nothing; a repeat finishes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ckpt.backends.base import Backend, Stat
from ckpt.backends.checked import read_alone, stores_of, write_quorum_of
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.events import Event, Fact, Tell
from ckpt.format import keys
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.state import LogState
from ckpt.maintenance.gc.plan import PREFIXES, Judge, Referred, Verdict
from ckpt.maintenance.gc.sweep import Answering, dropped_within, referred
from ckpt.maintenance.gc.sweep_clock import store_clock

GRACE_S = 86400.0
"""How long dropped snapshots stay readable, by the clock of each store: longer than any restore takes."""
DELETES_AT_ONCE = 16
BATCH = 1000
"""Objects given to the store's threads at once; the same as one request of the S3 protocol may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSweep:
    """What was found and done in one store. ``problem`` says why the rest was left for the next time; empty: it is all done.

    ``objects`` and ``size_bytes`` are by verdict, as the store was listed; ``deleted`` and ``deleted_bytes`` what went.
    """

    url: str
    objects: Counter[Verdict] = field(default_factory=Counter)
    size_bytes: Counter[Verdict] = field(default_factory=Counter)
    deleted: int = 0
    deleted_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """What a sweep came to. ``held`` names snapshots whose records can't be read, so that no pack was deleted, and why."""

    stores: tuple[StoreSweep, ...]
    held: tuple[Referred, ...]

    @property
    def ok(self) -> bool:
        """Whether every store is as clean as it can be now."""
        return not self.held and not any(one.problem for one in self.stores)


def sweep(
    backend: Backend,
    state: LogState,
    *,
    grace_s: float = GRACE_S,
    going: Sequence[Referred] = (),
    dry_run: bool = False,
    clock: Callable[[Backend], float] = store_clock,
    tell: Tell = lambda _: None,
) -> SweepReport:
    """Delete the packs, parts and manifests that are garbage in ``state``, the log as it is now or was before.

    ``going`` are snapshots that count as just dropped, for a dry run, which deletes nothing. A store that does not answer, or
    is another log's, is left out and told. Raises IntegrityError or UnavailableError where the log can't be known (a hole,
    too few stores), or a manifest or part can't be asked for. Cost: all manifests and parts of existing snapshots are read,
    the log's records within the grace, and manifests, parts and packs of each store listed.
    """
    require_known(state)
    stores = [_meet(store, state, clock) for store in stores_of(backend)]
    answering = [one for one in stores if isinstance(one, Answering)]
    quorum = write_quorum_of(backend)
    exist = referred(backend, state)
    dropped = dropped_within(backend, state, answering, grace_s=grace_s, write_quorum=quorum) if grace_s > 0 else []
    judge = Judge(state, exist=exist, dropped=[*dropped, *(going if grace_s > 0 else ())], grace_s=grace_s)
    done = tuple(one if isinstance(one, StoreSweep) else _sweep_store(one, judge, dry_run=dry_run) for one in stores)
    report = SweepReport(stores=done, held=tuple(one for one in (*exist, *dropped) if one.problem))
    for event in _events(report):
        tell(event)
    return report


def require_known(state: LogState) -> None:
    """Raises IntegrityError or UnavailableError where what is newest can't be known: then nothing may be deleted."""
    if state.hole is not None:
        raise IntegrityError(
            f"the log has a hole, so nothing is deleted. seq={state.hole.seq} why={state.hole.reason} bring that record back "
            "from a copy of the store"
        )
    if state.short:
        raise UnavailableError(f"too few stores answer, so nothing is deleted. why={state.short} repeat when they do")


def _meet(store: Backend, state: LogState, clock: Callable[[Backend], float]) -> Answering | StoreSweep:
    """Look whether the store is one of this log's and what time it has."""
    try:
        record = JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
        listed = state.stores is None or record.store_id in state.stores.ids
        if record.job != state.job or not listed:
            return StoreSweep(
                url=store.url, problem=f"not a store of this log. its_job={record.job!r} store_id={record.store_id}"
            )
        return Answering(store, clock(store))
    except NotFoundError:
        return StoreSweep(url=store.url, problem=f"not a store of this log: it has no {keys.JOB_KEY}")
    except (UnavailableError, IntegrityError) as error:
        return StoreSweep(url=store.url, problem=str(error))


def _sweep_store(one: Answering, judge: Judge, *, dry_run: bool) -> StoreSweep:
    objects: Counter[Verdict] = Counter()
    sizes: Counter[Verdict] = Counter()
    deleted = deleted_bytes = 0
    problem = ""
    try:
        for prefix in PREFIXES:
            garbage: list[Stat] = []
            for stat in one.store.list(prefix):
                verdict = judge.verdict(stat, now_unix_s=one.now_unix_s)
                objects[verdict] += 1
                sizes[verdict] += stat.size_bytes
                if verdict is Verdict.GARBAGE:
                    garbage.append(stat)
            if not dry_run:
                for stat in _delete(one.store, garbage):
                    deleted += 1
                    deleted_bytes += stat.size_bytes
    except CkptError as error:
        problem = str(error)
    return StoreSweep(
        url=one.store.url, objects=objects, size_bytes=sizes, deleted=deleted, deleted_bytes=deleted_bytes, problem=problem,
    )  # fmt: skip


def _delete(store: Backend, garbage: Sequence[Stat]) -> Iterator[Stat]:
    """Delete the objects, several at once, and give each when it is gone. The first error ends it."""
    width = min(DELETES_AT_ONCE, store.capabilities().concurrency_best) if garbage else 1
    if width <= 1:
        for stat in garbage:
            store.delete(stat.key)
            yield stat
        return
    pool = ThreadPoolExecutor(max_workers=width, thread_name_prefix="ckpt-sweep")
    try:
        for start in range(0, len(garbage), BATCH):
            batch = garbage[start : start + BATCH]
            for stat, _ in zip(batch, pool.map(store.delete, [stat.key for stat in batch]), strict=True):
                yield stat
    finally:
        pool.shutdown(cancel_futures=True)


def _events(report: SweepReport) -> Iterator[Event]:
    for one in report.stores:
        facts: dict[str, Fact] = {"store": one.url, "deleted": one.deleted, "deleted_bytes": one.deleted_bytes}
        if one.problem:
            yield Event("sweep-stopped", f"a store was not swept to the end: {one.problem}", facts, alarm=True)
        else:
            yield Event("swept", f"swept {one.url}", facts)
    for held in report.held:
        where: dict[str, Fact] = {"epoch": held.snapshot.epoch, "step": held.snapshot.step}
        text = f"no pack was deleted, for nobody knows which ones {held.snapshot} needs: {held.problem}"
        yield Event("sweep-held", text, where, alarm=True)
