"""The copies of one log on several stores: reading what each holds, creating a record at many. No
decisions live here."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.checked import read_alone
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
from ckpt.format.records import RECORD_BYTES_MAX, Record, decode_record
from ckpt.format.store import JOB_BYTES_MAX, JobRecord
from ckpt.log.quorum import NoAnswer, StoreRecords
from ckpt.log.reader import RECORDS_AT_ONCE, read_all
from ckpt.log.sequencers import KeyTaken, WriteUnknown, create_once
from ckpt.threads import run_into_future, start_thread

# Asking several stores at once, without waiting for one that is slow once enough have answered.
#
# Each store has a lane: what it is asked waits in order, so that a store that is only slow gets
# every record in the end. A store whose lane has not moved for a while is not waited for at all
# where the others are enough.

T = TypeVar("T")

GRACE_S_MIN = 0.1
GRACE_S_MAX = 2.0
"""How long the rest is waited for after enough have answered: as long again as those took, within
these limits."""

STUCK_S = 5.0
"""A call that takes longer than this keeps its lane from being waited for."""

WAITING_MAX = 4096
"""How many calls may wait in one lane: what a store that hangs misses beyond them, a scrub brings
it later."""

Enough = Callable[[Mapping[int, T]], bool]
"""Whether the answers of some stores, by number, are enough."""


class StoreWorkers(Protocol):
    """How stores are asked together."""

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """Make each call for the store of its number; the answers there were when it was time to go
        on.

        A call that raises is raised. What did not answer in time is left out, and goes on behind.
        """
        ...


class ThreadWorkers:
    """A thread for each store that has something to do; it ends with its work, and holds up no
    exit."""

    def __init__(self) -> None:
        self._lanes: dict[int, _StoreWorker] = {}
        self._changed = threading.Condition()

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """See Lanes."""
        began_s = time.monotonic()
        futures: dict[int, Future[T]] = {}
        for number, call in calls.items():
            future = self._lane(number).submit(call)
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
        """How long to wait for more answers; None: not at all."""
        waiting = [number for number, future in futures.items() if not future.done()]
        if not waiting:
            return None
        if enough_s is None:
            return GRACE_S_MAX  # as long as it takes: backends give up by themselves; look again whether one is done
        if all(self._lanes[number].stuck(now_s) for number in waiting):
            return None
        grace_s = min(max(enough_s - began_s, GRACE_S_MIN), GRACE_S_MAX)
        return enough_s + grace_s - now_s

    def _lane(self, number: int) -> _StoreWorker:
        return self._lanes.setdefault(number, _StoreWorker(f"ckpt-log-{number}"))

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
        """Whether the call that is being made has taken too long."""
        since_s = self._since_s
        return since_s is not None and now_s - since_s > STUCK_S

    def submit(self, call: Callable[[], T]) -> Future[T] | None:
        """Queue ``call``; None where too many wait already."""
        future: Future[T] = Future()

        with self._lock:
            if len(self._waiting) >= WAITING_MAX:
                return None
            self._waiting.append(lambda: run_into_future(future, call))
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
            del run  # or it would keep what it holds alive until the next call


NO_ANSWER_YET = NoAnswer("no answer yet")

CREATE_ONLY_TRIES = 3
"""A store that says so often that it does not create only once, and answers other questions
meanwhile, is believed."""


class LogReplicas:
    """The stores that hold one log, or shall, by number in the user's order."""

    def __init__(self, stores: Sequence[Backend], lanes: StoreWorkers | None = None) -> None:
        self.stores = tuple(stores)
        self.urls = tuple(store.url for store in stores)
        self._lanes = lanes or ThreadWorkers()
        self._creators: frozenset[int] = frozenset()

    def job_records(self) -> list[JobRecord | NoAnswer | None]:
        """What each store's ``ckpt.json`` says; None where it has none. One that is damaged says
        nothing.

        A majority of answers is waited for, and a little longer for the others.
        """
        found = self._lanes.ask(
            {n: partial(_job, store) for n, store in enumerate(self.stores)}, self._most
        )
        return [found.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def read_logs(
        self, after: int, log_id: str, *, of: Collection[str] = ()
    ) -> list[StoreRecords | NoAnswer]:
        """What each store holds of a log behind place ``after``, 1,024 places at most; its id as it
        is afterwards.

        A majority of answers is waited for, of stores with the ids ``of`` where they are given, and
        a little longer for the others.
        """

        def enough(answers: Mapping[int, StoreRecords | NoAnswer]) -> bool:
            return 2 * sum(
                isinstance(one, StoreRecords) and one.store_id in of for one in answers.values()
            ) > len(self.stores)

        calls = {n: partial(_held, store, after, log_id) for n, store in enumerate(self.stores)}
        found = self._lanes.ask(calls, enough if of else self._most)
        return [found.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def create(
        self, key: str, data: bytes, at: Mapping[int, str], quorum: int, *, vote: bool = False
    ) -> dict[int, bytes | NoAnswer]:
        """Create ``key`` at the stores of these numbers; what each holds there now, or that this is
        not known.

        ``at`` gives the id of each store, which is looked at afterwards: another one may have come
        to stand there, and what it holds is not known. A store that does not create only once is
        looked at first, and written to if nothing is there; with ``vote`` it is left alone, and not
        known. Returns soon after ``quorum`` of them hold the same bytes; the others get it behind.
        """
        found: dict[int, bytes | NoAnswer] = dict.fromkeys(at, NO_ANSWER_YET)
        calls = {
            n: partial(_create, self.stores[n], key, data, vote=vote, store_id=at[n])
            for n in sorted(at)
        }
        found.update(self._lanes.ask(calls, lambda answers: _most_copies(answers) >= quorum))
        return found

    def has_records(self, number: int) -> bool | NoAnswer:
        """Whether a store holds any record of a log."""
        found = self._lanes.ask(
            {number: partial(_listed, self.stores[number], keys.LOG)}, bool
        ).get(number, NO_ANSWER_YET)
        return found if isinstance(found, NoAnswer) else bool(found)

    def make_store(self, number: int, record: JobRecord) -> JobRecord | NoAnswer:
        """Write ``ckpt.json`` in a store that has none; what is there then."""
        store = self.stores[number]
        try:
            made = create_once(store, keys.JOB_KEY, record.encode(), bytes_max=JOB_BYTES_MAX)
        except UsageError:
            return _make_anyhow(store, record)  # it does not create a key only once
        except (UnavailableError, StoreFullError, StoreDeniedError) as error:
            return NoAnswer(str(error))
        if isinstance(made, WriteUnknown):
            return NoAnswer(made.reason)
        return _job(store) or NoAnswer("what was written is not there")

    def list_keys(self, prefix: str) -> set[str]:
        """The keys that any store which answers has below ``prefix``."""
        calls = {n: partial(_listed, store, prefix) for n, store in enumerate(self.stores)}
        return {
            key
            for found in self._lanes.ask(calls, self._most).values()
            if isinstance(found, list)
            for key in found
        }

    def read(self, key: str, *, bytes_max: int) -> list[bytes | NoAnswer]:
        """What each store holds at ``key``, or that this is not known, or nothing."""
        calls = {n: partial(_read, store, key, bytes_max) for n, store in enumerate(self.stores)}
        found = self._lanes.ask(calls, self._most)
        return [found.get(n, NO_ANSWER_YET) for n in range(len(self.stores))]

    def create_only_stores(self, at: Collection[int]) -> frozenset[int]:
        """Those of the stores that are known to create a key only once.

        The others may do so all the same, for a store that can't be asked says no too; it is asked
        again.
        """
        unknown = {n: partial(_creates, self.stores[n]) for n in at if n not in self._creators}
        if unknown:
            answers = self._lanes.ask(unknown, lambda found: 2 * len(found) > len(unknown))
            self._creators |= {n for n, yes in answers.items() if yes}
        return self._creators.intersection(at)

    def not_create_only(self, at: Collection[int]) -> frozenset[int]:
        """Those of the stores that answer, and don't say that they create a key only once, however
        often they are asked."""
        answers = self._lanes.ask(
            {n: partial(_unable, self.stores[n]) for n in at}, lambda found: len(found) == len(at)
        )
        return frozenset(n for n, unable in answers.items() if unable)

    def _most(self, answers: Mapping[int, object]) -> bool:
        return 2 * sum(not isinstance(one, NoAnswer) for one in answers.values()) > len(self.stores)


def count_copies(data: bytes, found: Mapping[int, bytes | NoAnswer]) -> int:
    """How many of the stores hold ``data``."""
    return sum(held == data for held in found.values())


def _most_copies(found: Mapping[int, bytes | NoAnswer]) -> int:
    return max(
        Counter(held for held in found.values() if isinstance(held, bytes)).values(), default=0
    )


def _job(store: Backend) -> JobRecord | NoAnswer | None:
    try:
        return JobRecord.decode(read_alone(store, keys.JOB_KEY, bytes_max=JOB_BYTES_MAX))
    except NotFoundError:
        return None
    except (UnavailableError, StoreDeniedError, IntegrityError, FormatVersionError) as error:
        return NoAnswer(str(error))


def _make_anyhow(store: Backend, record: JobRecord) -> JobRecord | NoAnswer:
    found = _job(store)
    if found is not None:
        return found
    try:
        store.put(keys.JOB_KEY, [record.encode()])
    except (UnavailableError, StoreFullError, StoreDeniedError) as error:
        return NoAnswer(str(error))
    return _job(store) or NoAnswer("what was written is not there")


def _held(store: Backend, after: int, log_id: str) -> StoreRecords | NoAnswer:
    try:
        records, settled, damaged, newer = _records(store, after)
    except (UnavailableError, StoreDeniedError, NotFoundError) as error:
        return NoAnswer(str(error))  # not even the bucket that it is in may be there
    found = _job(store)  # last: a store that was swapped meanwhile holds nothing that counts
    if isinstance(found, NoAnswer):
        return found
    if found is not None and found.log_id != log_id:
        return StoreRecords("", elsewhere=found.log_id)
    return StoreRecords(
        found.store_id if found is not None else "", records, settled, damaged, newer
    )


def _records(
    store: Backend, after: int
) -> tuple[dict[int, Record], dict[int, Record], frozenset[int], frozenset[int]]:
    start = keys.log_key(after) if after >= 0 else ""
    listed = [stat.key for stat in islice(store.list(keys.LOG, after=start), 2 * RECORDS_AT_ONCE)]
    places = [(key, seq, False) for key in listed if (seq := keys.parse_log_key(key)) is not None]
    places += [
        (key, seq, True)
        for key in listed
        if (seq := keys.parse_settled_key(key)) is not None and seq > after
    ]
    found = read_all(places, lambda place: _record(store, place[0], place[1]))
    records: dict[int, Record] = {}
    settled: dict[int, Record] = {}
    damaged = set()
    newer = set()
    for (_, seq, second), record in zip(places, found, strict=True):
        if isinstance(record, Record):
            (settled if second else records)[seq] = record
        else:
            damaged.add(seq)
            if isinstance(record, FormatVersionError):
                newer.add(seq)
    return records, settled, frozenset(damaged), frozenset(newer)


def _record(store: Backend, key: str, seq: int) -> Record | FormatVersionError | None:
    try:
        record = decode_record(read_alone(store, key, bytes_max=RECORD_BYTES_MAX))
    except (IntegrityError, NotFoundError):
        return None
    except FormatVersionError as error:
        return error  # or damage to what says the version
    return record if record.seq == seq else None


def _listed(store: Backend, prefix: str) -> list[str] | NoAnswer:
    try:
        return [stat.key for stat in store.list(prefix)]
    except (UnavailableError, StoreDeniedError, NotFoundError) as error:
        return NoAnswer(str(error))


def _read(store: Backend, key: str, bytes_max: int) -> bytes | NoAnswer:
    try:
        return read_alone(store, key, bytes_max=bytes_max)
    except (UnavailableError, StoreDeniedError, NotFoundError, IntegrityError) as error:
        return NoAnswer(str(error))


def _creates(store: Backend) -> bool:
    try:
        return store.capabilities().create_only
    except CkptError:
        return False


def _unable(store: Backend) -> bool:
    return all(
        not _creates(store) and isinstance(_job(store), JobRecord) for _ in range(CREATE_ONLY_TRIES)
    )


def _create(
    store: Backend, key: str, data: bytes, *, vote: bool, store_id: str
) -> bytes | NoAnswer:
    """Create the key and say what is there. Refused or unanswered it isn't known: the put may have
    landed, or land yet."""
    held = _put_or_read(store, key, data, vote=vote)
    if isinstance(held, NoAnswer):
        return held
    there = _job(store)
    if isinstance(there, NoAnswer):
        return there
    if there is None or there.store_id != store_id:
        return NoAnswer(
            f"another store came to stand there. wanted={store_id} "
            f"found={there.store_id if there else None}"
        )
    return held


def _put_or_read(store: Backend, key: str, data: bytes, *, vote: bool) -> bytes | NoAnswer:
    try:
        try:
            made = create_once(store, key, data, bytes_max=RECORD_BYTES_MAX)
        except UsageError as error:
            # It does not create a key only once. What the capabilities say is not asked: no may
            # mean not known now.
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
    if isinstance(made, WriteUnknown):
        return NoAnswer(made.reason)
    return made.data if isinstance(made, KeyTaken) else data
