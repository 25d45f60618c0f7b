"""Whether an object is there, which ones are, and removing one: answers of several stores made into one."""

from __future__ import annotations

import heapq
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckpt.backends.base import Stat
from ckpt.backends.replicated.group import Group, silent
from ckpt.backends.replicated.member import Member
from ckpt.backends.replicated.quorum import commonest
from ckpt.errors import CkptError, UnavailableError

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
