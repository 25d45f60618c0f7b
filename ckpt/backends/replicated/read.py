"""Read from the nearest store, from a second one beside it where the first is slow, from the next
where one is wrong.

Each store reads into memory of ours, and the reader's own thread copies to the caller's: a call
that hangs may still write into what it was given long after the read has returned.
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
    """Bytes of one store in memory of ours, until they are let go."""

    group: StoreGroup
    index: int
    buffer: PooledBuffer

    def release(self) -> None:
        """The memory may be used for something else."""
        self.group.memory.recycle(self.buffer)
        self.group.memory.free(self.index, len(self.buffer.view))


ReadAnswer = tuple[int, "ReadBuffer | CkptError"]


@dataclass(slots=True)
class _QuorumRead:
    """One read: who has answered what, and what the last bad answer of each store was."""

    group: StoreGroup
    key: str
    size_bytes: int
    start: Callable[[StoreReplica, AnswerQueue[ReadAnswer]], ReadBuffer]
    judge: Callable[[ReadBuffer], str | None]
    mailbox: AnswerQueue[ReadAnswer] = field(default_factory=AnswerQueue)
    errors: dict[int, CkptError] = field(default_factory=dict)

    def run(self) -> races.ReadRace:
        """The race as it ended, with one store right. Raises what the docstring of ``read_into``
        says."""
        group = self.group
        group.detect_stalls()
        race = races.begin_read(group.quorum, group.read_order(self.size_bytes), group.usable())
        try:
            while True:
                now_s = time.monotonic()
                race, move = races.decide(race, now_s, limits=group.limits, jitter=group.jitter())
                match move:
                    case races.AskStore(place):
                        race = self._ask(race, place, now_s)
                    case races.WaitForRead(until_s):
                        got = self.mailbox.get(until_s - now_s)
                        if got is not None:
                            race = self._heard(race, *got)
                    case races.DeliverRead():
                        return race
                    case races.GiveUpRead(verdict):
                        raise self._error(race, verdict)
        finally:
            if race.asked:
                group.wake()  # to see it if one of them hangs
            for _, answer in self.mailbox.close():
                if isinstance(answer, ReadBuffer):
                    answer.release()

    def _ask(self, race: races.ReadRace, place: int, now_s: float) -> races.ReadRace:
        member, pace = self.group.replicas[place], self.group.limits
        member.mark_asked(member.reading)
        if not member.reading.threads.submit(self._job(member)):
            self.errors[place] = busy_error(member)
            return races.with_result(race, place, ReadResult.SILENT)
        late_s = now_s + hedge_s(member.reading.speed, self.size_bytes, pace)
        return races.with_asked(
            race, place, late_s=late_s, lost_s=now_s + stall_s(pace, self.size_bytes)
        )

    def _job(self, member: StoreReplica) -> Callable[[], None]:
        def job() -> None:
            if self.mailbox.closed():
                return
            answer: ReadBuffer | CkptError
            try:
                answer = self.start(member, self.mailbox)
            except CkptError as error:
                answer = error
            if not self.mailbox.put((member.index, answer)) and isinstance(answer, ReadBuffer):
                answer.release()

        return job

    def _heard(
        self, race: races.ReadRace, place: int, answer: ReadBuffer | CkptError
    ) -> races.ReadRace:
        match answer:
            case ReadBuffer():
                try:
                    why = self.judge(answer)
                finally:
                    answer.release()
                if why is None:
                    return races.with_result(race, place, ReadResult.RIGHT)
                url = self.group.replicas[place].url
                self.errors[place] = IntegrityError(f"{why}. key={self.key} store={url}")
                return races.with_result(race, place, ReadResult.WRONG)
            case NotFoundError():
                found = ReadResult.MISSING
            case IntegrityError():
                found = ReadResult.SHORT
            case _:
                found = ReadResult.SILENT
        self.errors[place] = answer
        return races.with_result(race, place, found)

    def _error(self, race: races.ReadRace, verdict: ReadFailure) -> CkptError:
        waited_s = stall_s(self.group.limits, self.size_bytes)
        for member in self.group.replicas:
            if race.found.get(member.index) in (None, ReadResult.SILENT):
                self.errors.setdefault(member.index, silent_error(member, waited_s))
        each = " | ".join(
            f"{self.group.replicas[place].url}: {error}"
            for place, error in sorted(self.errors.items())
        )
        match verdict:
            case ReadFailure.NOT_FOUND:
                return NotFoundError(f"no store has the object. key={self.key} [{each}]")
            case ReadFailure.DAMAGED:
                return IntegrityError(
                    f"no store has right bytes of the object. key={self.key} [{each}]"
                )
            case ReadFailure.UNAVAILABLE:
                return UnavailableError(
                    "too few stores answer to read the object, or to know that it is nowhere. "
                    f"key={self.key} [{each}]; "
                    f"repeat when they do"
                )


def read_into(
    group: StoreGroup, key: str, out: memoryview, *, offset_bytes: int, check: Check | None
) -> None:
    """Fill ``out`` from the first store whose bytes are right; what others were found to lack is
    noted.

    Raises NotFoundError, IntegrityError and UnavailableError as ``Replicated`` says. Only the
    calling thread touches ``out`` and calls ``check``. Costs one copy of the bytes beside the
    reading.
    """
    flat = out.cast("B")
    size = len(flat)

    def start(member: StoreReplica, mailbox: AnswerQueue[ReadAnswer]) -> ReadBuffer:
        return read_from_store(group, member, key, size, offset_bytes, given_up=mailbox.closed)

    def judge(piece: ReadBuffer) -> str | None:
        if size:
            np.copyto(np.frombuffer(flat, np.uint8), np.frombuffer(piece.buffer.view, np.uint8))
        return None if check is None else check(out)

    reading = _QuorumRead(group, key, size, start, judge)
    race = reading.run()
    if len(race.found) > 1:
        proof = None if check is None else VerifiedRange(offset_bytes, size, digest(flat))
        _note_bad(group, key, race, proof, reading.errors)


def read_object(group: StoreGroup, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The whole object of the first store whose copy is right. Raises as ``read_into``."""
    right: list[bytes] = []

    def start(member: StoreReplica, mailbox: AnswerQueue[ReadAnswer]) -> ReadBuffer:
        stat = member.read(0, lambda: member.store.stat(key))
        if stat is None:
            raise NotFoundError(f"no such object. key={key} store={member.url}")
        if stat.size_bytes > bytes_max:
            raise IntegrityError(
                f"too large to be read. key={key} size_bytes={stat.size_bytes} "
                f"limit_bytes={bytes_max} store={member.url}"
            )
        return read_from_store(group, member, key, stat.size_bytes, 0, given_up=mailbox.closed)

    def judge(piece: ReadBuffer) -> str | None:
        data = bytes(piece.buffer.view)
        why = check(memoryview(data))
        if why is None:
            right.append(data)
        return why

    reading = _QuorumRead(group, key, 0, start, judge)
    race = reading.run()
    if len(race.found) > 1:
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
    member: StoreReplica,
    key: str,
    size: int,
    offset_bytes: int,
    *,
    given_up: Callable[[], bool] = bool,
) -> ReadBuffer:
    """Read a range of one store in this thread, into memory of ours. Raises CkptError."""
    until_s = time.monotonic() + group.limits.call_s
    if not group.memory.claim(member.index, size, until_s=until_s, given_up=given_up):
        raise UnavailableError(
            f"no memory is left for reads of this store. store={member.url}; repeat later"
        )
    try:
        buffer = group.memory.buffer(size)
        member.read(
            size, lambda: member.store.read_into(key, buffer.view, offset_bytes=offset_bytes)
        )
    except BaseException:
        group.memory.free(member.index, size)
        raise
    return ReadBuffer(group, member.index, buffer)


def _note_bad(
    group: StoreGroup,
    key: str,
    race: races.ReadRace,
    proof: VerifiedRange | None,
    errors: dict[int, CkptError],
) -> None:
    """Note what the stores that were not right lack, now that one was."""
    for place, found in race.found.items():
        match found:
            case ReadResult.MISSING:
                need = RepairNeed(CopyFault.MISSING, proof)
            case ReadResult.WRONG | ReadResult.SHORT:
                need = RepairNeed(CopyFault.DAMAGED, proof)
            case _:
                continue
        group.note_need(place, key, need, reason=str(errors[place]), alarm=True)


# Whether an object is there, which ones are, and removing one: answers of several stores made
# into one.

PAGE_ENTRIES = 256
"""Entries of a listing that a store's thread hands over at once."""

PAGES_MAX = 4
"""Pages of one store that wait to be merged."""

_LOOK_S = 0.2

StatAnswers = Mapping[int, "Stat | CkptError | None"]


def merge_stats(stats: Sequence[Stat]) -> Stat:
    """One answer of several about the same key: the length that most have, the greater of equals;
    the latest time.

    The latest, because a sweep spares what is young.
    """
    sizes = Counter(stat.size_bytes for stat in stats)
    size = max(sizes, key=lambda size: (sizes[size], size))
    return Stat(stats[0].key, size, max(stat.modified_unix_s for stat in stats))


def stat(group: StoreGroup, key: str) -> Stat | None:
    """The object's facts; None where enough stores say that it isn't there. Raises UnavailableError
    where too few answer."""
    group.detect_stalls()

    def answered(answers: StatAnswers) -> bool:
        return group.quorum.is_read_quorum(_told(answers).keys())

    def known(answers: StatAnswers) -> bool:
        found = {answer.size_bytes for answer in _told(answers).values() if answer is not None}
        return answered(answers) and len(found) == 1

    answers = group.ask(
        group.usable(), lambda member: _stat(member, key), enough=known, nearly=answered
    )
    if not answered(answers):
        rest = frozenset(range(len(group.replicas))) - _told(answers).keys()
        before = answers
        answers = before | group.ask(
            rest,
            lambda member: _stat(member, key),
            enough=lambda more: known({**before, **more}),
            nearly=lambda more: answered({**before, **more}),
        )
    told = _told(answers)
    found = [answer for answer in told.values() if answer is not None]
    if found:
        return merge_stats(found)
    if group.quorum.proves_absent(told.keys()):
        return None
    errors = [
        f"{group.replicas[p].url}: {a}"
        for p, a in sorted(answers.items())
        if isinstance(a, CkptError)
    ]
    raise UnavailableError(
        f"too few stores answer to know whether the object is there. key={key} "
        f"answered={len(told)} "
        f"[{' | '.join(errors)}]; repeat when they do"
    )


def delete(group: StoreGroup, key: str) -> None:
    """Remove the object from all stores. Raises, naming them, where one could not be asked: it may
    hold it still."""
    group.detect_stalls()
    group.forget(key)

    def remove(member: StoreReplica) -> bool:
        member.write(0, lambda: member.store.delete(key))
        return True

    answers = group.ask(
        range(len(group.replicas)), remove, side=lambda member: member.writing, key=key
    )
    group.forget(key)
    failed = {
        place: answer for place, answer in sorted(answers.items()) if isinstance(answer, CkptError)
    }
    if failed:
        each = " | ".join(
            f"{group.replicas[place].url}: {error}" for place, error in failed.items()
        )
        kind = most_common_error(list(failed.values()))
        raise kind(
            f"not all stores removed the object. key={key} [{each}]; repeat when they answer"
        )


def listing(group: StoreGroup, prefix: str, after: str) -> Iterator[Stat]:
    """All objects that any answering store lists, in key order, one store's page at a time in
    memory.

    A store that fails or falls silent on the way is left out from there on. Raises UnavailableError
    as soon as fewer are left than could together hold every acknowledged object.
    """
    group.detect_stalls()
    streams = {member.index: _ListingStream(member) for member in group.replicas}
    errors: dict[int, CkptError] = {}
    usable = group.usable()
    if not group.quorum.is_read_quorum(usable):
        usable = frozenset(streams)
    heap: list[tuple[str, int, Stat]] = []
    try:
        for place in usable:
            streams[place].begin(prefix, after)

        def advance(place: int) -> None:
            try:
                entry = streams[place].next(group.limits.call_s)
            except CkptError as error:
                errors[place] = error
                if not group.quorum.is_read_quorum(usable - errors.keys()):
                    raise _too_few(group, prefix, errors, usable) from error
                return
            if entry is not None:
                heapq.heappush(heap, (entry.key, place, entry))

        for place in usable:
            advance(place)
        while heap:
            same = [heapq.heappop(heap)]
            while heap and heap[0][0] == same[0][0]:
                same.append(heapq.heappop(heap))
            yield merge_stats([entry for _, _, entry in same])
            for _, place, _ in same:
                advance(place)
    finally:
        for stream in streams.values():
            stream.stop()


def _told(answers: StatAnswers) -> dict[int, Stat | None]:
    return {place: answer for place, answer in answers.items() if not isinstance(answer, CkptError)}


def _stat(member: StoreReplica, key: str) -> Stat | None:
    return member.read(0, lambda: member.store.stat(key))


def _too_few(
    group: StoreGroup, prefix: str, errors: Mapping[int, CkptError], asked: frozenset[int]
) -> UnavailableError:
    reasons = {
        member.index: str(errors.get(member.index, "left alone")) for member in group.replicas
    }
    each = " | ".join(
        f"{group.replicas[place].url}: {why}"
        for place, why in reasons.items()
        if place in errors or place not in asked
    )
    return UnavailableError(
        f"too few stores answer for a complete listing. prefix={prefix} "
        f"answered={len(asked) - len(errors)} [{each}]; "
        f"repeat when they do"
    )


@dataclass(slots=True)
class _ListingStream:
    """One store's listing, fetched page by page in a thread of its own, so that it may hang."""

    member: StoreReplica
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
            name=f"ckpt-list-{self.member.index}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:
            # The interpreter ends and starts no thread any more: here, with room for all.
            self.pages = queue.Queue()
            self._fetch(prefix, after)

    def stop(self) -> None:
        """Fetch no more."""
        self.stopped.set()

    def next(self, wait_s: float) -> Stat | None:
        """The next entry, None at the end. Raises what the store raised, and UnavailableError where
        it says nothing."""
        while self.at == len(self.page) and not self.over:
            try:
                got = self.pages.get(timeout=wait_s)
            except queue.Empty:
                raise silent_error(self.member, wait_s) from None
            match got:
                case None:
                    self.over = True
                case CkptError():
                    raise got
                case list():
                    self.page, self.at = got, 0
        if self.over:
            return None
        self.at += 1
        return self.page[self.at - 1]

    def _fetch(self, prefix: str, after: str) -> None:
        try:
            pages = self.member.read(0, lambda: _paged(self.member.store.list(prefix, after=after)))
            while (page := self.member.read(0, lambda: next(pages, None))) is not None:
                if not self._hand(page):
                    return
        except CkptError as error:
            self._hand(error)
        else:
            self._hand(None)

    def _hand(self, item: list[Stat] | CkptError | None) -> bool:
        while not self.stopped.is_set():
            try:
                self.pages.put(item, timeout=_LOOK_S)
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
