"""Read from the nearest store, from a second one beside it where the first is slow, from the next where one is wrong.

Each store reads into memory of ours, and the reader's own thread copies to the caller's: a call that hangs may still write
into what it was given long after the read has returned.
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
from ckpt.backends.replicated.group import Group, Mailbox, Member, busy, silent
from ckpt.backends.replicated.ledger import Need, Proof, Why
from ckpt.backends.replicated.policy import commonest, hedge_s, stall_s
from ckpt.backends.replicated.read_race import Found, Verdict
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format.canonical import digest


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one store in memory of ours, until they are let go."""

    group: Group
    place: int
    buffer: PooledBuffer

    def let_go(self) -> None:
        """The memory may be used for something else."""
        self.group.memory.reuse(self.buffer)
        self.group.memory.free(self.place, len(self.buffer.view))


Answer = tuple[int, "Piece | CkptError"]


@dataclass(slots=True)
class _Reading:
    """One read: who has answered what, and what the last bad answer of each store was."""

    group: Group
    key: str
    size_bytes: int
    start: Callable[[Member, Mailbox[Answer]], Piece]
    judge: Callable[[Piece], str | None]
    mailbox: Mailbox[Answer] = field(default_factory=Mailbox)
    errors: dict[int, CkptError] = field(default_factory=dict)

    def run(self) -> races.ReadRace:
        """The race as it ended, with one store right. Raises what the docstring of ``read_into`` says."""
        group = self.group
        group.look_for_stalls()
        race = races.begin(group.quorum, group.nearest(self.size_bytes), group.usable())
        try:
            while True:
                now_s = time.monotonic()
                race, move = races.decide(race, now_s, pace=group.pace, jitter=group.jitter())
                match move:
                    case races.Ask(place):
                        race = self._ask(race, place, now_s)
                    case races.Wait(until_s):
                        got = self.mailbox.get(until_s - now_s)
                        if got is not None:
                            race = self._heard(race, *got)
                    case races.Deliver():
                        return race
                    case races.Lost(verdict):
                        raise self._error(race, verdict)
        finally:
            if race.asked:
                group.wake()  # to see it if one of them hangs
            for _, answer in self.mailbox.close():
                if isinstance(answer, Piece):
                    answer.let_go()

    def _ask(self, race: races.ReadRace, place: int, now_s: float) -> races.ReadRace:
        member, pace = self.group.members[place], self.group.pace
        member.asked(member.reading)
        if not member.reading.lane.submit(self._job(member)):
            self.errors[place] = busy(member)
            return races.heard(race, place, Found.SILENT)
        late_s = now_s + hedge_s(member.reading.speed, self.size_bytes, pace)
        return races.asked(race, place, late_s=late_s, lost_s=now_s + stall_s(pace, self.size_bytes))

    def _job(self, member: Member) -> Callable[[], None]:
        def job() -> None:
            if self.mailbox.closed():
                return
            answer: Piece | CkptError
            try:
                answer = self.start(member, self.mailbox)
            except CkptError as error:
                answer = error
            if not self.mailbox.put((member.place, answer)) and isinstance(answer, Piece):
                answer.let_go()

        return job

    def _heard(self, race: races.ReadRace, place: int, answer: Piece | CkptError) -> races.ReadRace:
        match answer:
            case Piece():
                try:
                    why = self.judge(answer)
                finally:
                    answer.let_go()
                if why is None:
                    return races.heard(race, place, Found.RIGHT)
                url = self.group.members[place].url
                self.errors[place] = IntegrityError(f"{why}. key={self.key} store={url}")
                return races.heard(race, place, Found.WRONG)
            case NotFoundError():
                found = Found.MISSING
            case IntegrityError():
                found = Found.SHORT
            case _:
                found = Found.SILENT
        self.errors[place] = answer
        return races.heard(race, place, found)

    def _error(self, race: races.ReadRace, verdict: Verdict) -> CkptError:
        waited_s = stall_s(self.group.pace, self.size_bytes)
        for member in self.group.members:
            if race.found.get(member.place) in (None, Found.SILENT):
                self.errors.setdefault(member.place, silent(member, waited_s))
        each = " | ".join(f"{self.group.members[place].url}: {error}" for place, error in sorted(self.errors.items()))
        match verdict:
            case Verdict.NOT_FOUND:
                return NotFoundError(f"no store has the object. key={self.key} [{each}]")
            case Verdict.DAMAGED:
                return IntegrityError(f"no store has right bytes of the object. key={self.key} [{each}]")
            case Verdict.UNAVAILABLE:
                return UnavailableError(
                    f"too few stores answer to read the object, or to know that it is nowhere. key={self.key} [{each}]; "
                    f"repeat when they do"
                )


def read_into(group: Group, key: str, out: memoryview, *, offset_bytes: int, check: Check | None) -> None:
    """Fill ``out`` from the first store whose bytes are right; what others were found to lack is noted.

    Raises NotFoundError, IntegrityError and UnavailableError as ``Replicated`` says. Only the calling thread touches ``out``
    and calls ``check``. Costs one copy of the bytes beside the reading.
    """
    flat = out.cast("B")
    size = len(flat)

    def start(member: Member, mailbox: Mailbox[Answer]) -> Piece:
        return read_piece(group, member, key, size, offset_bytes, given_up=mailbox.closed)

    def judge(piece: Piece) -> str | None:
        if size:
            np.copyto(np.frombuffer(flat, np.uint8), np.frombuffer(piece.buffer.view, np.uint8))
        return None if check is None else check(out)

    reading = _Reading(group, key, size, start, judge)
    race = reading.run()
    if len(race.found) > 1:
        proof = None if check is None else Proof(offset_bytes, size, digest(flat))
        _note_bad(group, key, race, proof, reading.errors)


def read_object(group: Group, key: str, check: Check, *, bytes_max: int) -> bytes:
    """The whole object of the first store whose copy is right. Raises as ``read_into``."""
    right: list[bytes] = []

    def start(member: Member, mailbox: Mailbox[Answer]) -> Piece:
        stat = member.read(0, lambda: member.store.stat(key))
        if stat is None:
            raise NotFoundError(f"no such object. key={key} store={member.url}")
        if stat.size_bytes > bytes_max:
            raise IntegrityError(
                f"too large to be read. key={key} size_bytes={stat.size_bytes} limit_bytes={bytes_max} store={member.url}"
            )
        return read_piece(group, member, key, stat.size_bytes, 0, given_up=mailbox.closed)

    def judge(piece: Piece) -> str | None:
        data = bytes(piece.buffer.view)
        why = check(memoryview(data))
        if why is None:
            right.append(data)
        return why

    reading = _Reading(group, key, 0, start, judge)
    race = reading.run()
    if len(race.found) > 1:
        _note_bad(group, key, race, Proof(0, len(right[0]), digest(right[0]), whole=True), reading.errors)
    return right[0]


def read_piece(
    group: Group, member: Member, key: str, size: int, offset_bytes: int, *, given_up: Callable[[], bool] = bool
) -> Piece:
    """Read a range of one store in this thread, into memory of ours. Raises CkptError."""
    until_s = time.monotonic() + group.pace.call_s
    if not group.memory.claim(member.place, size, until_s=until_s, given_up=given_up):
        raise UnavailableError(f"no memory is left for reads of this store. store={member.url}; repeat later")
    try:
        buffer = group.memory.buffer(size)
        member.read(size, lambda: member.store.read_into(key, buffer.view, offset_bytes=offset_bytes))
    except BaseException:
        group.memory.free(member.place, size)
        raise
    return Piece(group, member.place, buffer)


def _note_bad(group: Group, key: str, race: races.ReadRace, proof: Proof | None, errors: dict[int, CkptError]) -> None:
    """Note what the stores that were not right lack, now that one was."""
    for place, found in race.found.items():
        match found:
            case Found.MISSING:
                need = Need(Why.MISSING, proof)
            case Found.WRONG | Found.SHORT:
                need = Need(Why.DAMAGED, proof)
            case _:
                continue
        group.note(place, key, need, why=str(errors[place]), alarm=True)


# Whether an object is there, which ones are, and removing one: answers of several stores made
# into one.

PAGE = 256
"""Entries of a listing that a store's thread hands over at once."""

PAGES_MAX = 4
"""Pages of one store that wait to be merged."""

_LOOK_S = 0.2

Answers = Mapping[int, "Stat | CkptError | None"]


def agreed(stats: Sequence[Stat]) -> Stat:
    """One answer of several about the same key: the length that most have, the greater of equals; the latest time.

    The latest, because a sweep spares what is young.
    """
    sizes = Counter(stat.size_bytes for stat in stats)
    size = max(sizes, key=lambda size: (sizes[size], size))
    return Stat(stats[0].key, size, max(stat.modified_unix_s for stat in stats))


def stat(group: Group, key: str) -> Stat | None:
    """The object's facts; None where enough stores say that it isn't there. Raises UnavailableError where too few answer."""
    group.look_for_stalls()

    def answered(answers: Answers) -> bool:
        return group.quorum.answered(_told(answers).keys())

    def known(answers: Answers) -> bool:
        found = {answer.size_bytes for answer in _told(answers).values() if answer is not None}
        return answered(answers) and len(found) == 1

    answers = group.ask(group.usable(), lambda member: _stat(member, key), enough=known, nearly=answered)
    if not answered(answers):
        rest = frozenset(range(len(group.members))) - _told(answers).keys()
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
        return agreed(found)
    if group.quorum.absent(told.keys()):
        return None
    errors = [f"{group.members[p].url}: {a}" for p, a in sorted(answers.items()) if isinstance(a, CkptError)]
    raise UnavailableError(
        f"too few stores answer to know whether the object is there. key={key} answered={len(told)} "
        f"[{' | '.join(errors)}]; repeat when they do"
    )


def delete(group: Group, key: str) -> None:
    """Remove the object from all stores. Raises, naming them, where one could not be asked: it may hold it still."""
    group.look_for_stalls()
    group.forget(key)

    def remove(member: Member) -> bool:
        member.write(0, lambda: member.store.delete(key))
        return True

    answers = group.ask(range(len(group.members)), remove, side=lambda member: member.writing, key=key)
    group.forget(key)
    failed = {place: answer for place, answer in sorted(answers.items()) if isinstance(answer, CkptError)}
    if failed:
        each = " | ".join(f"{group.members[place].url}: {error}" for place, error in failed.items())
        kind = commonest(list(failed.values()))
        raise kind(f"not all stores removed the object. key={key} [{each}]; repeat when they answer")


def listing(group: Group, prefix: str, after: str) -> Iterator[Stat]:
    """All objects that any answering store lists, in key order, one store's page at a time in memory.

    A store that fails or falls silent on the way is left out from there on. Raises UnavailableError as soon as fewer are left
    than could together hold every acknowledged object.
    """
    group.look_for_stalls()
    streams = {member.place: _Stream(member) for member in group.members}
    errors: dict[int, CkptError] = {}
    usable = group.usable()
    if not group.quorum.answered(usable):
        usable = frozenset(streams)
    heap: list[tuple[str, int, Stat]] = []
    try:
        for place in usable:
            streams[place].begin(prefix, after)

        def advance(place: int) -> None:
            try:
                entry = streams[place].next(group.pace.call_s)
            except CkptError as error:
                errors[place] = error
                if not group.quorum.answered(usable - errors.keys()):
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
            yield agreed([entry for _, _, entry in same])
            for _, place, _ in same:
                advance(place)
    finally:
        for stream in streams.values():
            stream.stop()


def _told(answers: Answers) -> dict[int, Stat | None]:
    return {place: answer for place, answer in answers.items() if not isinstance(answer, CkptError)}


def _stat(member: Member, key: str) -> Stat | None:
    return member.read(0, lambda: member.store.stat(key))


def _too_few(group: Group, prefix: str, errors: Mapping[int, CkptError], asked: frozenset[int]) -> UnavailableError:
    reasons = {member.place: str(errors.get(member.place, "left alone")) for member in group.members}
    each = " | ".join(
        f"{group.members[place].url}: {why}" for place, why in reasons.items() if place in errors or place not in asked
    )
    return UnavailableError(
        f"too few stores answer for a complete listing. prefix={prefix} answered={len(asked) - len(errors)} [{each}]; "
        f"repeat when they do"
    )


@dataclass(slots=True)
class _Stream:
    """One store's listing, fetched page by page in a thread of its own, so that it may hang."""

    member: Member
    pages: queue.Queue[list[Stat] | CkptError | None] = field(default_factory=lambda: queue.Queue(PAGES_MAX))
    page: list[Stat] = field(default_factory=list)
    at: int = 0
    over: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)

    def begin(self, prefix: str, after: str) -> None:
        """Start fetching."""
        thread = threading.Thread(
            target=self._fetch, args=(prefix, after), name=f"ckpt-list-{self.member.place}", daemon=True
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
        """The next entry, None at the end. Raises what the store raised, and UnavailableError where it says nothing."""
        while self.at == len(self.page) and not self.over:
            try:
                got = self.pages.get(timeout=wait_s)
            except queue.Empty:
                raise silent(self.member, wait_s) from None
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
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page
