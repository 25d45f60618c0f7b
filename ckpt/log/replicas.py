"""The replicas of one log on several stores: read what each holds, create a record on many.

What counts is decided in ``quorum``, not here. Each store has a worker that does its calls in
order, so a store that is only slow receives every record in the end. A call returns when enough
stores answered, and waits for the rest only as long again as those took. A worker that has been in
one call for too long is not waited for.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Protocol, TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_again, read_alone
from ckpt.errors import (
    CkptError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.records import RECORD_BYTES_MAX, Closed, Record
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.quorum import NoAnswer, StoreRecords
from ckpt.log.reader import (
    RECORDS_AT_ONCE,
    LogObject,
    listed_content,
    log_objects,
    read_all,
    read_at,
)
from ckpt.log.sequencers import KeyTaken, WriteUnknown, create_once
from ckpt.threads import run_into_future, start_thread

# ---- workers: ask several stores at once, without waiting for slow ones

T = TypeVar("T")

GRACE_S_MIN = 0.1
GRACE_S_MAX = 2.0
"""How long to wait for the remaining answers: as long as the first took, within these limits."""

STUCK_S = 5.0
"""A call that takes longer than this keeps its worker from being waited for."""

WAITING_MAX = 4096
"""How many calls may wait for one store. What a hanging store misses beyond that, a scrub
repairs."""

Enough = Callable[[Mapping[int, T]], bool]
"""Whether the answers of some stores, by number, are enough."""


class StoreWorkers(Protocol):
    """Asks several stores at once."""

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """Make each call for the store with its number; return the answers when it is time to
        continue.

        An exception from a call is raised. A store that did not answer in time is absent; its call
        continues in the background.
        """
        ...


class ThreadWorkers:
    """One thread for each store that has work. It ends with its work, and blocks no exit."""

    def __init__(self) -> None:
        self._workers: dict[int, _StoreWorker] = {}
        self._changed = threading.Condition()

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        began_s = time.monotonic()
        futures: dict[int, Future[T]] = {}
        for number, call in calls.items():
            future = self._worker(number).submit(call)
            if future is not None:
                futures[number] = future
                future.add_done_callback(self._wake)
        enough_s: float | None = None
        while True:
            with self._changed:
                done = {number: future for number, future in futures.items() if future.done()}
                now_s = time.monotonic()
                if enough_s is None and enough(
                    {number: future.result() for number, future in done.items()}
                ):
                    enough_s = now_s
                left_s = self._left_s(futures, enough_s, now_s, began_s)
                if left_s is None or left_s <= 0:
                    return {number: future.result() for number, future in done.items()}
                self._changed.wait(left_s)

    def _left_s(
        self, futures: Mapping[int, Future[T]], enough_s: float | None, now_s: float, began_s: float
    ) -> float | None:
        """How long to wait for more answers; None: do not wait."""
        waiting = [number for number, future in futures.items() if not future.done()]
        if not waiting:
            return None
        if enough_s is None:
            return GRACE_S_MAX  # no limit here, backends have their own; only look again after that
        if all(self._workers[number].stuck(now_s) for number in waiting):
            return None
        grace_s = min(max(enough_s - began_s, GRACE_S_MIN), GRACE_S_MAX)
        return enough_s + grace_s - now_s

    def _worker(self, number: int) -> _StoreWorker:
        return self._workers.setdefault(number, _StoreWorker(f"ckpt-log-{number}"))

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify_all()


class _StoreWorker:
    """Calls to one store, one at a time, in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._since_s: float | None = None

    def stuck(self, now_s: float) -> bool:
        """Whether the current call has taken too long."""
        since_s = self._since_s
        return since_s is not None and now_s - since_s > STUCK_S

    def submit(self, call: Callable[[], T]) -> Future[T] | None:
        """Queue ``call``; None if too many calls wait."""
        future: Future[T] = Future()

        with self._lock:
            if len(self._waiting) >= WAITING_MAX:
                return None
            self._waiting.append(lambda: run_into_future(future, call))
            # ``_since_s`` is None exactly while no thread runs, so one thread is started.
            idle, self._since_s = self._since_s is None, self._since_s or time.monotonic()
        if idle:
            start_thread(self._work, name=self._name)
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._since_s = None
                    return
                run = self._waiting.popleft()
                self._since_s = time.monotonic()
            run()
            del run  # its arguments would stay in memory until the next call


# ---- replicas: what each store holds, and records created on many


NO_ANSWER_YET = NoAnswer("no answer yet")

CREATE_ONLY_TRIES = 3
"""How often a store must say that it does not create only once, before that is believed.

It may say so because it cannot be asked at the moment; each time it must answer another question.
"""


class LogReplicas:
    """The stores that hold one log, or will, by number in the user's order.

    Where a method takes "a majority" of answers: any majority of the stores given includes one that
    holds each counted record, because W is a majority too.
    """

    def __init__(self, stores: Sequence[Backend], workers: StoreWorkers | None = None) -> None:
        self.stores = tuple(stores)
        self.urls = tuple(store.url for store in stores)
        self._workers = workers or ThreadWorkers()
        self._create_only: frozenset[int] = frozenset()

    def job_records(self) -> list[JobRecord | NoAnswer | None]:
        """Each store's ``ckpt.json``; None if it has none, NoAnswer if it is damaged.

        Waits for a majority of answers, and a little longer for the others.
        """
        calls = {n: partial(_job, store) for n, store in enumerate(self.stores)}
        answers = self._workers.ask(calls, self._majority)
        return [answers.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def read_logs(
        self, after: int, log_id: str, *, of: Collection[str] = ()
    ) -> list[StoreRecords | NoAnswer]:
        """What each store holds of a log after position ``after``, at most 1,024 positions.

        Waits for a majority of answers, of stores with the ids ``of`` if given, and a little longer
        for the others. The store id in each answer is read after its records.
        """

        def enough(answers: Mapping[int, StoreRecords | NoAnswer]) -> bool:
            members = sum(
                isinstance(answer, StoreRecords) and answer.store_id in of
                for answer in answers.values()
            )
            return 2 * members > len(self.stores)

        calls = {n: partial(_read_log, store, after, log_id) for n, store in enumerate(self.stores)}
        answers = self._workers.ask(calls, enough if of else self._majority)
        return [answers.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def create(
        self, key: str, data: bytes, at: Mapping[int, str], quorum: int, *, vote: bool = False
    ) -> dict[int, bytes | NoAnswer]:
        """Create ``key`` on the stores with these numbers; returns what each holds there now, or
        NoAnswer.

        ``at`` gives the id of each store. It is checked after the write: if another store took its
        place, what the right one holds is not known. A store that does not create only once is read
        first, and written to if nothing is there; with ``vote`` it is left alone and counts as
        NoAnswer. Returns soon after ``quorum`` stores hold the same bytes; the others get them in
        the background.
        """
        answers: dict[int, bytes | NoAnswer] = dict.fromkeys(at, NO_ANSWER_YET)
        calls = {
            n: partial(_create, self.stores[n], key, data, vote=vote, store_id=at[n])
            for n in sorted(at)
        }
        answers.update(self._workers.ask(calls, lambda held: _most_copies(held) >= quorum))
        return answers

    def overwrite(
        self, key: str, data: bytes, at: Mapping[int, str], quorum: int
    ) -> dict[int, bytes | NoAnswer]:
        """Put ``data`` at ``key``, whatever is there: only for a record that certainly counts.

        Otherwise as ``create``.
        """
        answers: dict[int, bytes | NoAnswer] = dict.fromkeys(at, NO_ANSWER_YET)
        calls = {n: partial(_overwrite, self.stores[n], key, data, at[n]) for n in sorted(at)}
        answers.update(self._workers.ask(calls, lambda held: _most_copies(held) >= quorum))
        return answers

    def has_records(self, number: int) -> bool | NoAnswer:
        """Whether a store holds any record of a log."""
        calls = {number: partial(_listed, self.stores[number], keys.LOG)}
        listing = self._workers.ask(calls, bool).get(number, NO_ANSWER_YET)
        return listing if isinstance(listing, NoAnswer) else bool(listing)

    def make_store(self, number: int, record: JobRecord) -> JobRecord | NoAnswer:
        """Write ``ckpt.json`` in a store that has none; returns what is there afterwards."""
        store = self.stores[number]
        try:
            result = create_once(store, keys.JOB_KEY, record.encode(), bytes_max=JOB_BYTES_MAX)
        except UsageError:
            return _make_by_overwriting(store, record)  # it does not create a key only once
        except (UnavailableError, StoreFullError, StoreDeniedError) as error:
            return NoAnswer(str(error))
        if isinstance(result, WriteUnknown):
            return NoAnswer(result.reason)
        # Another process may have made it at the same time, so read what is there.
        return _job(store) or NoAnswer("what was written is not there")

    def list_keys(self, prefix: str) -> set[str]:
        """The keys below ``prefix`` on any store that answers."""
        calls = {n: partial(_listed, store, prefix) for n, store in enumerate(self.stores)}
        return {
            key
            for listing in self._workers.ask(calls, self._majority).values()
            if isinstance(listing, list)
            for key in listing
        }

    def read(self, key: str, *, bytes_max: int) -> list[bytes | NoAnswer]:
        """What each store holds at ``key``; NoAnswer also if there is nothing."""
        return self._read_each(lambda store: partial(read_alone, store, key, bytes_max=bytes_max))

    def read_position(self, seq: int, *, settled: bool) -> list[bytes | NoAnswer]:
        """What each store holds at the first or the settled key of a position, as ``read``."""
        return self._read_each(lambda store: partial(read_at, store, seq, settled=settled))

    def _read_each(
        self, reading: Callable[[Backend], Callable[[], bytes]]
    ) -> list[bytes | NoAnswer]:
        calls = {n: partial(_read, reading(store)) for n, store in enumerate(self.stores)}
        answers = self._workers.ask(calls, self._majority)
        return [answers.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def create_only_stores(self, at: Collection[int]) -> frozenset[int]:
        """The stores that are known to create a key only once.

        The others may do so too: a store that cannot be asked says no. It is asked again next time.
        """
        unknown = {
            n: partial(_creates_only, self.stores[n]) for n in at if n not in self._create_only
        }
        if unknown:
            answers = self._workers.ask(unknown, lambda known: 2 * len(known) > len(unknown))
            self._create_only |= {n for n, create_only in answers.items() if create_only}
        return self._create_only.intersection(at)

    def not_create_only(self, at: Collection[int]) -> frozenset[int]:
        """The stores that answer, but never say that they create a key only once."""
        calls = {n: partial(_never_creates_only, self.stores[n]) for n in at}
        answers = self._workers.ask(calls, lambda known: len(known) == len(at))
        return frozenset(n for n, never in answers.items() if never)

    def _majority(self, answers: Mapping[int, object]) -> bool:
        answered = sum(not isinstance(answer, NoAnswer) for answer in answers.values())
        return 2 * answered > len(self.stores)


def count_copies(data: bytes, answers: Mapping[int, bytes | NoAnswer]) -> int:
    """How many of the stores hold ``data``."""
    return sum(answer == data for answer in answers.values())


def _most_copies(answers: Mapping[int, bytes | NoAnswer]) -> int:
    counts = Counter(answer for answer in answers.values() if isinstance(answer, bytes))
    return max(counts.values(), default=0)


def _job(store: Backend) -> JobRecord | NoAnswer | None:
    try:
        return read_again(
            lambda: JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
        )
    except NotFoundError:
        return None
    except (UnavailableError, StoreDeniedError, IntegrityError, FormatVersionError) as error:
        return NoAnswer(str(error))


def _make_by_overwriting(store: Backend, record: JobRecord) -> JobRecord | NoAnswer:
    existing = _job(store)
    if existing is not None:
        return existing
    try:
        store.put(keys.JOB_KEY, [record.encode()])
    except (UnavailableError, StoreFullError, StoreDeniedError) as error:
        return NoAnswer(str(error))
    return _job(store) or NoAnswer("what was written is not there")


def _read_log(store: Backend, after: int, log_id: str) -> StoreRecords | NoAnswer:
    try:
        found = _records(store, after)
    except (UnavailableError, StoreDeniedError, NotFoundError) as error:
        return NoAnswer(str(error))  # NotFoundError: the bucket is missing
    # ``ckpt.json`` is read after the records: if another store came to this address in between,
    # its id does not match, and the records count for nothing.
    job = _job(store)
    if isinstance(job, NoAnswer):
        return job
    if job is not None and job.log_id != log_id:
        return StoreRecords("", elsewhere=job.log_id)
    return replace(found, store_id=job.store_id if job is not None else "")


def _records(store: Backend, after: int) -> StoreRecords:
    """What the store holds after a position, without its id."""
    listed = list(_first_positions(log_objects(store, after + 1), 2 * RECORDS_AT_ONCE))
    contents = read_all(listed, lambda found: _content(store, found))
    records: dict[int, Record] = {}
    settled: dict[int, Record] = {}
    later: dict[int, tuple[int, Record]] = {}
    damaged = set()
    newer = set()
    for found, content in zip(listed, contents, strict=True):
        match content:
            case Record() if found.round is None:
                records[found.seq] = content
            case Record() if found.round == 0:
                settled[found.seq] = content
            case Record() if found.round is not None:
                later[found.seq] = found.round, content  # rounds are listed in order
            case Closed():
                pass  # as good as nothing
            case FormatVersionError():
                damaged.add(found.seq)
                newer.add(found.seq)
            case _:
                damaged.add(found.seq)
    return StoreRecords("", records, settled, frozenset(damaged), frozenset(newer), later=later)


def _first_positions(listed: Iterable[LogObject], count: int) -> Iterator[LogObject]:
    """The objects of the first ``count`` positions, each with all its keys."""
    for number, (_, found) in enumerate(groupby(listed, key=lambda found: found.seq)):
        if number == count:
            return
        yield from found


def _content(store: Backend, found: LogObject) -> Record | Closed | FormatVersionError | None:
    """What is at a key; None if it is damaged."""
    try:
        content = listed_content(store, found)
    except (IntegrityError, NotFoundError):
        return None
    except FormatVersionError as error:
        return error  # or the version number itself is damaged
    return content if content.seq == found.seq else None


def _listed(store: Backend, prefix: str) -> list[str] | NoAnswer:
    try:
        return [stat.key for stat in store.list(prefix)]
    except (UnavailableError, StoreDeniedError, NotFoundError) as error:
        return NoAnswer(str(error))


def _read(read: Callable[[], bytes]) -> bytes | NoAnswer:
    try:
        return read()
    except (UnavailableError, StoreDeniedError, NotFoundError, IntegrityError) as error:
        return NoAnswer(str(error))


def _creates_only(store: Backend) -> bool:
    try:
        return store.capabilities().create_only
    except CkptError:
        return False


def _never_creates_only(store: Backend) -> bool:
    return all(
        not _creates_only(store) and isinstance(_job(store), JobRecord)
        for _ in range(CREATE_ONLY_TRIES)
    )


def _create(
    store: Backend, key: str, data: bytes, *, vote: bool, store_id: str
) -> bytes | NoAnswer:
    """Create the key and return what is there.

    NoAnswer if it was refused or unanswered: the put may have landed, or may land later.
    """
    stored = _put_or_read(store, key, data, vote=vote)
    return stored if isinstance(stored, NoAnswer) else _if_same_store(store, store_id, stored)


def _overwrite(store: Backend, key: str, data: bytes, store_id: str) -> bytes | NoAnswer:
    try:
        store.put(key, [data])
    except (UnavailableError, StoreFullError, StoreDeniedError, NotFoundError) as error:
        return NoAnswer(str(error))
    return _if_same_store(store, store_id, data)


def _if_same_store(store: Backend, store_id: str, stored: bytes) -> bytes | NoAnswer:
    """``stored``, if the store is still the one that was asked."""
    job = _job(store)
    if isinstance(job, NoAnswer):
        return job
    if job is None or job.store_id != store_id:
        return NoAnswer(
            f"another store is at this address now. expected={store_id} "
            f"found={job.store_id if job else None}"
        )
    return stored


def _put_or_read(store: Backend, key: str, data: bytes, *, vote: bool) -> bytes | NoAnswer:
    try:
        try:
            result = create_once(store, key, data, bytes_max=RECORD_BYTES_MAX)
        except UsageError as error:
            # The store does not create a key only once. Only this refusal is believed, not its
            # capabilities: they say no also while the store cannot be asked.
            if vote:
                return NoAnswer(str(error))
            if store.stat(key) is not None:
                return read_alone(store, key, bytes_max=RECORD_BYTES_MAX)
            store.put(key, [data])
            return data
    except (
        UnavailableError,
        StoreFullError,
        StoreDeniedError,
        NotFoundError,
        IntegrityError,
    ) as error:
        return NoAnswer(str(error))
    if isinstance(result, WriteUnknown):
        return NoAnswer(result.reason)
    return result.data if isinstance(result, KeyTaken) else data
