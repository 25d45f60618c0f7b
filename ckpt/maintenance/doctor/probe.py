"""Examining stores by using them: permissions, consistency, speed, and what they already hold.

An examination writes short-lived objects below ``probe/<random>/`` and deletes them, also after
failures.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
from ckpt.errors import CkptError, FormatVersionError, IntegrityError, NotFoundError
from ckpt.format import keys
from ckpt.format.canonical import digest
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.reader import read_new, read_start
from ckpt.maintenance.doctor.findings import Latency, StoreContent, StoreFindings

PROBE_FOLDER = "probe/"
"""Prefix of the short-lived objects of examinations."""
LISTED_MAX = 100
"""Keys that are listed in a place without a ckpt store."""


def read_content(store: Backend) -> StoreContent:
    """What ``store`` holds, from ``ckpt.json``, the log, or a list of its first keys.

    Raises UnavailableError, or a subclass, if it does not answer or denies access.
    """
    try:
        record = JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return _without_record(store)
    except IntegrityError as error:
        return StoreContent(kind="headless", problem=str(error))
    except FormatVersionError as error:
        return StoreContent(kind="unknown", problem=str(error))
    try:
        state, _ = read_start(store, record.job)
        state = read_new(store, state)
    except FormatVersionError as error:
        return StoreContent(kind="unknown", job=record.job, problem=str(error))
    newest = state.newest()
    return StoreContent(
        kind="store",
        job=record.job,
        store_id=record.store_id,
        log_id=record.log_id,
        snapshots=len(state.snapshots),
        newest="" if newest is None else str(newest),
        next_seq=state.next_seq,
        members=() if state.stores is None else state.stores.ids,
        write_quorum=0 if state.stores is None else state.stores.write_quorum,
        hole="" if state.hole is None else f"{state.hole.reason} seq={state.hole.seq}",
    )


def _without_record(store: Backend) -> StoreContent:
    if next(iter(store.list(keys.LOG)), None) is not None:
        return StoreContent(kind="headless", problem=f"{keys.JOB_KEY} is gone")
    # Probe objects that an earlier examination could not delete do not make the place foreign.
    first = [
        stat.key
        for stat in islice(store.list(""), LISTED_MAX)
        if not stat.key.startswith(PROBE_FOLDER)
    ]
    return StoreContent(kind="foreign") if first else StoreContent(kind="empty")


T = TypeVar("T")

SMALL_OPERATIONS = 20
SMALL_BYTES = 512
LARGE_BYTES = 16 << 20
"""Default size of the object that throughput is measured with."""


@dataclass(slots=True)
class StoreProbe:
    """One store under examination. ``close`` removes what was left by an operation that failed
    half-way."""

    store: Backend
    reopen: Callable[[], Backend] | None = None
    """Opens the same store again, for a second client."""
    clock: Callable[[], float] = time.perf_counter
    wall_clock: Callable[[], float] = time.time
    _prefix: str = field(default_factory=lambda: f"{PROBE_FOLDER}{secrets.token_hex(8)}/")
    _left: dict[str, None] = field(default_factory=dict)
    _failures: dict[str, str] = field(default_factory=dict)
    _times: dict[str, list[float]] = field(default_factory=dict)
    _wrong: bool = False
    """Other bytes were read than were put."""

    def run(self, *, large_bytes: int = LARGE_BYTES) -> StoreFindings:
        """Examine the store by itself. Errors of the store become findings."""
        content = self._try("reach", lambda: read_content(self.store))
        if content is None:
            return StoreFindings(url=self.store.url, failures=dict(self._failures))
        creates = self._try("create", lambda: self.store.capabilities().create_only)
        self._small()
        seen_put, seen_delete, seen_other = self._lists()
        up, down, right = self._large(large_bytes)
        skew, unsure = self._skew()
        folder = os.path.isdir(self.store.url)  # noqa: PTH112
        return StoreFindings(
            url=self.store.url,
            folder=folder,
            failures=dict(self._failures),
            create_only=creates,
            latency={name: _latency(times) for name, times in self._times.items()},
            up_bytes_per_s=up,
            down_bytes_per_s=down,
            read_back_right=False if self._wrong else right,
            arrival_check=str(getattr(self.store, "arrival_check", "")),
            list_after_put=seen_put,
            list_after_delete=seen_delete,
            other_client=seen_other,
            skew_s=skew,
            skew_unsure_s=unsure,
            free_bytes=_free_bytes(self.store.url) if folder else None,
            content=content,
        )

    def put_mark(self) -> str | None:
        """Put an object that only this place has; its key, or None if that failed."""
        key = f"{self._prefix}mark"
        return key if self._put(key, b"mark") else None

    def close(self) -> tuple[str, ...]:
        """Delete every probe object that may exist; the keys of those that could not be deleted."""
        for key in list(self._left):
            self._delete(key)
        return tuple(self._left)

    def _small(self) -> None:
        for number in range(SMALL_OPERATIONS):
            key, body = f"{self._prefix}small-{number}", secrets.token_bytes(SMALL_BYTES)
            if not self._put(key, body, timed=True):
                break
            data = self._timed("read", partial(read_alone, self.store, key, bytes_max=SMALL_BYTES))
            self._timed("stat", partial(self.store.stat, key))
            self._wrong = self._wrong or data not in (None, body)
            self._delete(key, timed=True)
            if self._failures:
                break
        for _ in range(SMALL_OPERATIONS):
            if self._timed("list", lambda: list(self.store.list(self._prefix))) is None:
                break

    def _lists(self) -> tuple[bool | None, bool | None, bool | None]:
        """Whether lists show a put, a delete, and a put over another connection."""
        key = f"{self._prefix}listed"
        if "put" in self._failures or "list" in self._failures or not self._put(key, b"listed"):
            return None, None, None
        seen = self._lists_it(self.store, key)
        other = None
        if self.reopen is not None:
            opened = self._try("reach", self.reopen)
            if opened is not None:
                with closing(opened):
                    other = self._lists_it(opened, key)
        gone = None
        if self._delete(key):
            still = self._lists_it(self.store, key)
            gone = None if still is None else not still
        return seen, gone, other

    def _large(self, size_bytes: int) -> tuple[float | None, float | None, bool | None]:
        """Bytes per second up and down, and whether the same bytes were read."""
        key = f"{self._prefix}large"
        if self._failures.keys() & {"put", "read"}:
            return None, None, None
        body = secrets.token_bytes(min(size_bytes, 1 << 20)) * max(1, size_bytes >> 20)
        start = self.clock()
        if not self._put(key, body):
            return None, None, None
        up = len(body) / max(self.clock() - start, 1e-9)
        out = bytearray(len(body))
        start = self.clock()
        try:
            self.store.read_into(key, memoryview(out))
        except IntegrityError as error:
            self._failures["read"] = str(error)
            return up, None, False
        except CkptError as error:
            self._failures["read"] = str(error)
            return up, None, None
        down = len(out) / max(self.clock() - start, 1e-9)
        self._delete(key)
        return up, down, digest(out) == digest(body)

    def _skew(self) -> tuple[float | None, float]:
        """How far the store's clock is ahead of ours, and how uncertain that is.

        The uncertainty is half of the put's duration, plus a second.
        """
        key = f"{self._prefix}clock"
        if "put" in self._failures:
            return None, 0.0
        before = self.wall_clock()
        if not self._put(key, b"clock"):
            return None, 0.0
        after = self.wall_clock()
        stat = self._try("read", lambda: self.store.stat(key))
        self._delete(key)
        # Most stores give times in whole seconds.
        unsure = (after - before) / 2 + 1.0
        return (
            (None, 0.0) if stat is None else (stat.modified_unix_s - (before + after) / 2, unsure)
        )

    def _lists_it(self, store: Backend, key: str) -> bool | None:
        listed = self._try("list", lambda: [stat.key for stat in store.list(self._prefix)])
        return None if listed is None else key in listed

    def _put(self, key: str, body: bytes, *, timed: bool = False) -> bool:
        def act() -> bool:
            self.store.put(key, [body])
            return True

        self._left[key] = None  # before the put: one whose reply is lost may have landed
        return bool(self._timed("put", act) if timed else self._try("put", act))

    def _delete(self, key: str, *, timed: bool = False) -> bool:
        def act() -> bool:
            self.store.delete(key)
            return True

        done = bool(self._timed("delete", act) if timed else self._try("delete", act))
        if done:
            self._left.pop(key, None)
        return done

    def _timed(self, name: str, act: Callable[[], T]) -> T | None:
        start = self.clock()
        result = self._try(name, act)
        if name not in self._failures:
            self._times.setdefault(name, []).append(self.clock() - start)
        return result

    def _try(self, name: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except CkptError as error:
            self._failures.setdefault(name, str(error))
            return None


def _latency(times: list[float]) -> Latency:
    ordered = sorted(times)
    return Latency(
        statistics.median(ordered),
        ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))],
        len(ordered),
    )


def _free_bytes(folder: str) -> int | None:
    try:
        facts = os.statvfs(folder)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


@dataclass(frozen=True, slots=True)
class ExaminedStore:
    """A store to examine, and a way to open it again (None: no second client is tried)."""

    store: Backend
    reopen: Callable[[], Backend] | None = None


def examine(
    stores: Sequence[ExaminedStore], *, large_bytes: int = LARGE_BYTES
) -> list[StoreFindings]:
    """Examine each store, one after the other so that they do not share the link.

    Cost for each store: some hundred small operations, and one object of ``large_bytes`` written
    and read. Objects that could not be deleted afterwards are named. Errors of the stores become
    findings; ``assess`` says what they mean.
    """
    probes = [StoreProbe(store.store, store.reopen) for store in stores]
    findings: list[StoreFindings] = []
    try:
        findings = [probe.run(large_bytes=large_bytes) for probe in probes]
        same = _same_places(probes, findings)
    finally:
        left = [probe.close() for probe in probes]
    return [
        replace(store, same_as=tuple(sorted(same[number])), leftovers=left[number])
        for number, store in enumerate(findings)
    ]


def _same_places(probes: Sequence[StoreProbe], findings: Sequence[StoreFindings]) -> list[set[int]]:
    """For each store the others that show its mark: two addresses may lead to one place."""
    same: list[set[int]] = [set() for _ in probes]
    for number, probe in enumerate(probes):
        if len(probes) < 2 or not findings[number].reached or "put" in findings[number].failures:
            continue
        key = probe.put_mark()
        for other, other_probe in enumerate(probes):
            if key is None or other == number or not findings[other].reached:
                continue
            if _sees(other_probe.store, key):
                same[number].add(other)
                same[other].add(number)
    return same


def _sees(store: Backend, key: str) -> bool:
    try:
        return store.stat(key) is not None
    except CkptError:
        return False
