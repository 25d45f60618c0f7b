"""Read from the nearest store, from a second one beside it where the first is slow, from the next where one is wrong.

Each store reads into memory of ours, and the reader's own thread copies to the caller's: a call that hangs may still write
into what it was given long after the read has returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ckpt.backends.checked import Check
from ckpt.backends.replicated import read_race as races
from ckpt.backends.replicated.buffers import PooledBuffer
from ckpt.backends.replicated.group import Group, busy, silent
from ckpt.backends.replicated.mailbox import Mailbox
from ckpt.backends.replicated.member import Member
from ckpt.backends.replicated.pace import stall_s
from ckpt.backends.replicated.policy import hedge_s
from ckpt.backends.replicated.read_race import Found, Verdict
from ckpt.backends.replicated.replicate_ledger import Need, Proof, Why
from ckpt.errors import CkptError, IntegrityError, NotFoundError, UnavailableError
from ckpt.format.digest import digest


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
