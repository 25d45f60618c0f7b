"""Reads from several stores: from the nearest, and from others if it is slow, wrong or silent.

Each store reads into memory of ours, and the reader's own thread copies to the caller's: a call
that hangs may still write into its buffer long after the read has returned.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt.backends.base import Stat
from ckpt.backends.checked import Check
from ckpt.backends.replicated import read_race as races
from ckpt.backends.replicated.buffers import PooledBuffer
from ckpt.backends.replicated.group import (
    AnswerQueue,
    StoreGroup,
    StoreReplica,
    busy_error,
    silent_error,
)
from ckpt.backends.replicated.ledger import CopyFault, RepairNeed, VerifiedRange
from ckpt.backends.replicated.policy import hedge_s, most_common_error, stall_s
from ckpt.backends.replicated.read_race import ReadFailure, ReadResult
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format.canonical import digest


@dataclass(frozen=True, slots=True)
class ReadBuffer:
    """Bytes of one store in our memory, until they are released."""

    group: StoreGroup
    index: int
    buffer: PooledBuffer

    def release(self) -> None:
        """The memory may be reused."""
        self.group.memory.recycle(self.buffer)
        self.group.memory.free(self.index, len(self.buffer.view))


ReadAnswer = tuple[int, "ReadBuffer | CkptError"]


@dataclass(slots=True)
class _QuorumRead:
    """One read: ``start`` reads from one store, ``verify`` returns what is wrong with the bytes.

    ``errors``: the last error of each store.
    """

    group: StoreGroup
    key: str
    size_bytes: int
    start: Callable[[StoreReplica, AnswerQueue[ReadAnswer]], ReadBuffer]
    verify: Callable[[ReadBuffer], str | None]
    answer_queue: AnswerQueue[ReadAnswer] = field(default_factory=AnswerQueue)
    errors: dict[int, CkptError] = field(default_factory=dict)

    def run(self) -> races.ReadRace:
        """The finished race, with one store right. Raises as ``read_into``."""
        group = self.group
        group.detect_stalls()
        race = races.begin_read(group.quorum, group.read_order(self.size_bytes), group.usable())
        try:
            while True:
                now_s = time.monotonic()
                race, move = races.decide(race, now_s, limits=group.limits, jitter=group.jitter())
                match move:
                    case races.AskStore(index):
                        race = self._ask(race, index, now_s)
                    case races.WaitForRead(until_s):
                        entry = self.answer_queue.get(until_s - now_s)
                        if entry is not None:
                            race = self._heard(race, *entry)
                    case races.DeliverRead():
                        return race
                    case races.GiveUpRead(failure):
                        raise self._error(race, failure)
        finally:
            if race.pending:
                group.wake()  # the repair thread detects it if one of them hangs
            # Memory of answers that arrived and were not needed. A store that answers later finds
            # the queue closed and releases its own (see _job).
            for _, answer in self.answer_queue.close():
                if isinstance(answer, ReadBuffer):
                    answer.release()

    def _ask(self, race: races.ReadRace, index: int, now_s: float) -> races.ReadRace:
        replica, limits = self.group.replicas[index], self.group.limits
        replica.mark_asked(replica.reading)
        if not replica.reading.threads.submit(self._job(replica)):
            self.errors[index] = busy_error(replica)
            return races.with_result(race, index, ReadResult.SILENT)
        # Two times: when to ask another store as well, and when to stop counting on this one.
        late_s = now_s + hedge_s(replica.reading.speed, self.size_bytes, limits)
        return races.with_asked(
            race, index, late_s=late_s, lost_s=now_s + stall_s(limits, self.size_bytes)
        )

    def _job(self, replica: StoreReplica) -> Callable[[], None]:
        def job() -> None:
            # Queued behind slow calls, and no longer needed.
            if self.answer_queue.closed():
                return
            answer: ReadBuffer | CkptError
            try:
                answer = self.start(replica, self.answer_queue)
            except CkptError as error:
                answer = error
            if not self.answer_queue.put((replica.index, answer)) and isinstance(
                answer, ReadBuffer
            ):
                answer.release()

        return job

    def _heard(
        self, race: races.ReadRace, index: int, answer: ReadBuffer | CkptError
    ) -> races.ReadRace:
        match answer:
            case ReadBuffer():
                try:
                    problem = self.verify(answer)
                finally:
                    answer.release()
                if problem is None:
                    return races.with_result(race, index, ReadResult.RIGHT)
                url = self.group.replicas[index].url
                self.errors[index] = IntegrityError(f"{problem}. key={self.key} store={url}")
                return races.with_result(race, index, ReadResult.WRONG)
            case NotFoundError():
                result = ReadResult.MISSING
            case IntegrityError():
                result = ReadResult.SHORT
            case _:
                result = ReadResult.SILENT
        self.errors[index] = answer
        return races.with_result(race, index, result)

    def _error(self, race: races.ReadRace, failure: ReadFailure) -> CkptError:
        waited_s = stall_s(self.group.limits, self.size_bytes)
        for replica in self.group.replicas:
            if race.results.get(replica.index) in (None, ReadResult.SILENT):
                self.errors.setdefault(replica.index, silent_error(replica, waited_s))
        per_store = " | ".join(
            f"{self.group.replicas[index].url}: {error}"
            for index, error in sorted(self.errors.items())
        )
        match failure:
            case ReadFailure.NOT_FOUND:
                return NotFoundError(f"no store has the object. key={self.key} [{per_store}]")
            case ReadFailure.DAMAGED:
                return IntegrityError(
                    f"no store has undamaged bytes of the object. key={self.key} [{per_store}]"
                )
            case ReadFailure.UNAVAILABLE:
                return UnavailableError(
                    "too few stores answer to read the object, or to know that it is nowhere. "
                    f"key={self.key} [{per_store}]; repeat when they do"
                )


def read_into(
    group: StoreGroup, key: str, out: memoryview, *, offset_bytes: int, check: Check | None
) -> None:
    """Fill ``out`` from the first store whose bytes are right; note what other stores lack.

    Raises NotFoundError, IntegrityError and UnavailableError as ``MultiStoreBackend`` says. Only
    the calling thread touches ``out`` and calls ``check``. Costs one copy of the bytes besides the
    reading.
    """
    target = out.cast("B")
    size = len(target)

    def start(replica: StoreReplica, answer_queue: AnswerQueue[ReadAnswer]) -> ReadBuffer:
        return read_from_store(
            group, replica, key, size, offset_bytes, given_up=answer_queue.closed
        )

    def verify(buffer: ReadBuffer) -> str | None:
        if size:
            # In the reader's thread, and only here: no store's thread ever writes to the caller's
            # memory.
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(buffer.buffer.view, np.uint8))
        return None if check is None else check(out)

    reading = _QuorumRead(group, key, size, start, verify)
    race = reading.run()
    if len(race.results) > 1:
        verified = None if check is None else VerifiedRange(offset_bytes, size, digest(target))
        _note_bad(group, key, race, verified, reading.errors)


def read_object(group: StoreGroup, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The whole object of the first store whose copy is right. Raises as ``read_into``."""
    right: list[bytes] = []

    def start(replica: StoreReplica, answer_queue: AnswerQueue[ReadAnswer]) -> ReadBuffer:
        stat = replica.read(0, lambda: replica.store.stat(key))
        if stat is None:
            raise NotFoundError(f"no such object. key={key} store={replica.url}")
        if stat.size_bytes > bytes_max:
            raise IntegrityError(
                f"too large to read. key={key} size_bytes={stat.size_bytes} "
                f"limit_bytes={bytes_max} store={replica.url}"
            )
        return read_from_store(
            group, replica, key, stat.size_bytes, 0, given_up=answer_queue.closed
        )

    def verify(buffer: ReadBuffer) -> str | None:
        data = bytes(buffer.buffer.view)
        problem = check(memoryview(data))
        if problem is None:
            right.append(data)
        return problem

    reading = _QuorumRead(group, key, 0, start, verify)
    race = reading.run()
    if len(race.results) > 1:
        _note_bad(
            group,
            key,
            race,
            VerifiedRange(0, len(right[0]), digest(right[0]), whole=True),
            reading.errors,
        )
    return right[0]


def read_from_store(
    group: StoreGroup,
    replica: StoreReplica,
    key: str,
    size: int,
    offset_bytes: int,
    *,
    given_up: Callable[[], bool] = bool,
) -> ReadBuffer:
    """Read a range of one store in this thread, into our memory. Raises CkptError."""
    # Earlier reads of this store that hang hold its memory; others of its reads return some soon.
    until_s = time.monotonic() + group.limits.call_s
    if not group.memory.claim(replica.index, size, until_s=until_s, given_up=given_up):
        raise UnavailableError(
            f"no memory left for reads of this store. store={replica.url}; repeat later"
        )
    try:
        buffer = group.memory.buffer(size)
        replica.read(
            size, lambda: replica.store.read_into(key, buffer.view, offset_bytes=offset_bytes)
        )
    except BaseException:
        group.memory.free(replica.index, size)
        raise
    return ReadBuffer(group, replica.index, buffer)


def _note_bad(
    group: StoreGroup,
    key: str,
    race: races.ReadRace,
    verified: VerifiedRange | None,
    errors: dict[int, CkptError],
) -> None:
    """Note what the stores without right bytes lack, now that one store was right."""
    # Only now: while no store was right, a missing or wrong copy may be all that there is. A silent
    # store says nothing about its copy.
    for index, result in race.results.items():
        match result:
            case ReadResult.MISSING:
                need = RepairNeed(CopyFault.MISSING, verified)
            case ReadResult.WRONG | ReadResult.SHORT:
                need = RepairNeed(CopyFault.DAMAGED, verified)
            case _:
                continue
        group.backlog.note(index, key, need, reason=str(errors[index]), alarm=True)


# ---- stat, delete and list: answers of several stores combined into one.

PAGE_ENTRIES = 256
"""Entries of a listing that a store's thread hands over at once."""

PAGES_MAX = 4
"""Pages of one store waiting to be merged."""

_POLL_S = 0.2

StatAnswers = Mapping[int, "Stat | CkptError | None"]


def merge_stats(stats: Sequence[Stat]) -> Stat:
    """One answer from several about the same key.

    The length is the most common one, the greater of equals. The time is the latest one, because a
    sweep spares young objects.
    """
    sizes = Counter(stat.size_bytes for stat in stats)
    size = max(sizes, key=lambda size: (sizes[size], size))
    return Stat(stats[0].key, size, max(stat.modified_unix_s for stat in stats))


def stat(group: StoreGroup, key: str) -> Stat | None:
    """The object's key, length and time; None if enough stores say that it is not there.

    Raises UnavailableError if too few stores answer.
    """
    group.detect_stalls()

    def answered(answers: StatAnswers) -> bool:
        return group.quorum.is_read_quorum(_stats_of(answers).keys())

    def unanimous(answers: StatAnswers) -> bool:
        lengths = {
            answer.size_bytes for answer in _stats_of(answers).values() if answer is not None
        }
        return answered(answers) and len(lengths) == 1

    answers = group.ask(
        group.usable(), lambda replica: _stat(replica, key), enough=unanimous, nearly=answered
    )
    if not answered(answers):
        # Too few usable stores answered: ask all others too, also those with an open circuit.
        rest = frozenset(range(len(group.replicas))) - _stats_of(answers).keys()
        before = answers
        answers = before | group.ask(
            rest,
            lambda replica: _stat(replica, key),
            enough=lambda more: unanimous({**before, **more}),
            nearly=lambda more: answered({**before, **more}),
        )
    stats = _stats_of(answers)
    copies = [answer for answer in stats.values() if answer is not None]
    if copies:
        return merge_stats(copies)
    if group.quorum.proves_absent(stats.keys()):
        return None
    errors = [
        f"{group.replicas[p].url}: {a}"
        for p, a in sorted(answers.items())
        if isinstance(a, CkptError)
    ]
    raise UnavailableError(
        f"too few stores answer to know whether the object is there. key={key} "
        f"answered={len(stats)} [{' | '.join(errors)}]; repeat when they do"
    )


def delete(group: StoreGroup, key: str) -> None:
    """Remove the object from all stores.

    Raises, naming them, if some stores could not be asked: they may still hold it.
    """
    group.detect_stalls()
    # Forget needs before the deletes, so that no repair writes the object again, and afterwards
    # those noted meanwhile.
    group.backlog.forget(key)

    def remove(replica: StoreReplica) -> bool:
        replica.write(0, lambda: replica.store.delete(key))
        return True

    answers = group.ask(
        range(len(group.replicas)), remove, side=lambda replica: replica.writing, key=key
    )
    group.backlog.forget(key)
    failed = {
        index: answer for index, answer in sorted(answers.items()) if isinstance(answer, CkptError)
    }
    if failed:
        per_store = " | ".join(
            f"{group.replicas[index].url}: {error}" for index, error in failed.items()
        )
        error_type = most_common_error(list(failed.values()))
        raise error_type(
            f"not all stores removed the object. key={key} [{per_store}]; repeat when they answer"
        )


def listing(group: StoreGroup, prefix: str, after: str) -> Iterator[Stat]:
    """All objects that any answering store lists, in key order.

    Holds a few pages per store in memory. A store that fails or stops answering is left out from
    there on. Raises UnavailableError as soon as the remaining stores together might miss an
    acknowledged object.
    """
    group.detect_stalls()
    streams = {replica.index: _ListingStream(replica) for replica in group.replicas}
    errors: dict[int, CkptError] = {}
    # Stores with an open circuit are left out unless the others cannot give a complete listing.
    usable = group.usable()
    if not group.quorum.is_read_quorum(usable):
        usable = frozenset(streams)
    # A merge of sorted streams: each store has one entry in the heap, its next one.
    heap: list[tuple[str, int, Stat]] = []
    try:
        for index in usable:
            streams[index].begin(prefix, after)

        def advance(index: int) -> None:
            try:
                entry = streams[index].next(group.limits.call_s)
            except CkptError as error:
                errors[index] = error
                # The stores left might all miss an object that was acknowledged; then the listing
                # would look complete without being so.
                if not group.quorum.is_read_quorum(usable - errors.keys()):
                    raise _too_few(group, prefix, errors, usable) from error
                return
            if entry is not None:
                heapq.heappush(heap, (entry.key, index, entry))

        for index in usable:
            advance(index)
        while heap:
            same = [heapq.heappop(heap)]
            while heap and heap[0][0] == same[0][0]:
                same.append(heapq.heappop(heap))
            yield merge_stats([entry for _, _, entry in same])
            for _, index, _ in same:
                advance(index)
    finally:
        # The caller may stop early, and a store may hang: no thread is waited for.
        for stream in streams.values():
            stream.stop()


def _stats_of(answers: StatAnswers) -> dict[int, Stat | None]:
    return {index: answer for index, answer in answers.items() if not isinstance(answer, CkptError)}


def _stat(replica: StoreReplica, key: str) -> Stat | None:
    return replica.read(0, lambda: replica.store.stat(key))


def _too_few(
    group: StoreGroup, prefix: str, errors: Mapping[int, CkptError], asked: frozenset[int]
) -> UnavailableError:
    texts = {
        replica.index: str(errors.get(replica.index, "not used at the moment"))
        for replica in group.replicas
    }
    per_store = " | ".join(
        f"{group.replicas[index].url}: {text}"
        for index, text in texts.items()
        if index in errors or index not in asked
    )
    return UnavailableError(
        f"too few stores answer for a complete listing. prefix={prefix} "
        f"answered={len(asked) - len(errors)} [{per_store}]; repeat when they do"
    )


@dataclass(slots=True)
class _ListingStream:
    """One store's listing, fetched page by page in a thread of its own, so that it may hang."""

    replica: StoreReplica
    pages: queue.Queue[list[Stat] | CkptError | None] = field(
        default_factory=lambda: queue.Queue(PAGES_MAX)
    )
    page: list[Stat] = field(default_factory=list)
    at: int = 0
    over: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self, prefix: str, after: str) -> None:
        """Start fetching."""
        thread = threading.Thread(
            target=self._fetch,
            args=(prefix, after),
            name=f"ckpt-list-{self.replica.index}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:
            # The interpreter exits and starts no threads: fetch here, into an unbounded queue.
            self.pages = queue.Queue()
            self._fetch(prefix, after)

    def stop(self) -> None:
        """Fetch no more."""
        self.stopped.set()

    def next(self, wait_s: float) -> Stat | None:
        """The next entry, None at the end.

        Raises what the store raised, and UnavailableError if it does not answer.
        """
        while self.at == len(self.page) and not self.over:
            try:
                # Per page: a long listing may take long in total, as long as pages keep arriving.
                item = self.pages.get(timeout=wait_s)
            except queue.Empty:
                raise silent_error(self.replica, wait_s) from None
            match item:
                case None:
                    self.over = True
                case CkptError():
                    raise item
                case list():
                    self.page, self.at = item, 0
        if self.over:
            return None
        self.at += 1
        return self.page[self.at - 1]

    def _fetch(self, prefix: str, after: str) -> None:
        try:
            pages = self.replica.read(
                0, lambda: _paged(self.replica.store.list(prefix, after=after))
            )
            while (page := self.replica.read(0, lambda: next(pages, None))) is not None:
                if not self._hand(page):
                    return
        except CkptError as error:
            self._hand(error)
        else:
            self._hand(None)

    def _hand(self, item: list[Stat] | CkptError | None) -> bool:
        # Never blocks for good, so that the thread ends after the caller stopped the listing.
        while not self.stopped.is_set():
            try:
                self.pages.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False


def _paged(entries: Iterator[Stat]) -> Iterator[list[Stat]]:
    page: list[Stat] = []
    for entry in entries:
        page.append(entry)
        if len(page) == PAGE_ENTRIES:
            yield page
            page = []
    if page:
        yield page
