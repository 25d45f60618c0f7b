"""Write to all stores at once, and return when enough have the object.

What a store may still read after that is never the caller's memory: it gets bytes that nobody can
change, a copy, or a loan that is taken back before the put returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ckpt.backends.base import Buffer
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated import put_race as races
from ckpt.backends.replicated.buffers import Loan, SharedCopy, TakenBackError, is_immutable
from ckpt.backends.replicated.group import (
    AnswerQueue,
    StoreGroup,
    StoreReplica,
    busy_error,
    silent_error,
)
from ckpt.backends.replicated.ledger import CopyFault, RepairNeed, VerifiedRange
from ckpt.backends.replicated.policy import most_common_error
from ckpt.backends.replicated.put_race import Handover, PutState, PutTarget, plan_handover
from ckpt.errors import (
    CkptError,
    KeyExistsError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)

PutAnswer = tuple[int, "CkptError | None"]

StoreWrite = Callable[[StoreReplica, str, "Sequence[Buffer]"], None]
"""Stores an object in one store."""

MEMORY_POLL_S = 0.02
"""How often a put looks for memory where a store has not yet taken what it was given before."""

_SLOW = "slower than the others by more than the grace"
_ALONE = "the store is left alone"


class QuorumPut:
    """One put. The thread that made it runs it; threads of stores answer, also after it has
    returned.

    ``how``: write so to each store, once, and lend to none. ``proof`` is of the whole object, to
    mend what holds another.
    """

    def __init__(
        self,
        group: StoreGroup,
        key: str,
        data: Sequence[Buffer],
        *,
        write: StoreWrite | None = None,
        verified: VerifiedRange | None = None,
    ) -> None:
        self._group = group
        self._key = key
        self._data = data
        self._size_bytes = sum(memoryview(buffer).nbytes for buffer in data)
        self._how = write
        self._proof = verified
        self._immutable = is_immutable(data)
        self._loan = Loan(key)
        self._copied = SharedCopy(group.memory, data, self._size_bytes)
        self._mailbox: AnswerQueue[PutAnswer] = AnswerQueue()
        self._jobs: dict[int, Callable[[], None]] = {}
        self._lent: set[int] = set()
        self._claimed: set[int] = set()
        self._copy_of: set[int] = set()
        self._wanting: dict[int, Handover] = {}
        self._durable = False
        self._errors: dict[int, CkptError] = {}

    def run(
        self, *, holders: frozenset[int] = frozenset(), failed: Mapping[int, CkptError] = {}
    ) -> None:
        """Write, and return when the object is durable.

        ``holders`` have it already; ``failed`` are not written to. Raises what most of the stores
        that failed raised, with each of them named, where the quorum can't be reached.
        """
        group = self._group
        group.detect_stalls()
        everybody = frozenset(range(len(group.replicas)))
        race = races.begin_put(
            group.quorum, size_bytes=self._size_bytes, now_s=time.monotonic(), held_back=everybody
        )
        try:
            for place in holders:
                race = races.with_ack(race, place, time.monotonic())
            for place, error in failed.items():
                race = self._failed(race, place, error, passing=False)
            # One that doesn't count stays apart: it is filled as a whole before it does.
            race = self._feed(race, group.quorum.voters - holders - failed.keys())
            while True:
                now_s = time.monotonic()
                match races.decide(race, now_s, limits=group.limits):
                    case races.SendTo(places):
                        for place in places:
                            race = self._give(race, place, self._last_resort())
                    case races.WaitForAck(until_s):
                        wait_s = until_s - now_s
                        got = self._mailbox.get(
                            min(wait_s, MEMORY_POLL_S) if self._wanting else wait_s
                        )
                        if got is not None:
                            race = self._heard(race, *got)
                        for place, how in tuple(self._wanting.items()):
                            race = self._give(race, place, how)
                    case races.PutDone():
                        self._durable = True
                        return
                    case races.PutFailed():
                        race = self._last_words(race)
                        if race.quorum_s is None:
                            raise self._error(race)
        finally:
            self._finish(race)

    # Handing over.

    def _feed(self, race: races.PutRace, places: frozenset[int]) -> races.PutRace:
        """Give each store the bytes as the rule says."""
        group = self._group
        takers = [
            PutTarget(
                usable=member.writing.circuit.usable,
                has_room=member.writing.threads.has_room,
                borrows=member.borrower is not None and self._how is None,
                expected_s=speeds.expected_s(member.writing.speed, self._size_bytes),
            )
            for member in group.replicas
        ]
        hows = plan_handover(takers, group.quorum, immutable=self._immutable, limits=group.limits)
        # Who needs no copy begins first.
        for place in sorted(places, key=lambda place: hows[place] is not Handover.LENT):
            if hows[place] is Handover.SPARED and not self._ready(place, Handover.SPARED):
                continue
            if hows[place] is not Handover.LATER:
                race = self._give(race, place, hows[place])
        return race

    def _last_resort(self) -> Handover:
        """How stores get the bytes that were left apart, and are asked because the others do not
        suffice."""
        return Handover.AS_IS if self._immutable else Handover.COPIED

    def _ready(self, place: int, how: Handover) -> bool:
        """Prepare what ``place`` is given; False where there is no memory for it."""
        if place in self._jobs:
            return True
        member = self._group.replicas[place]
        if how is Handover.LENT:
            self._lent.add(place)
            self._jobs[place] = self._job(member, lambda: self._lend(member))
            return True
        if not self._group.memory.claim(place, self._size_bytes):
            return False
        self._claimed.add(place)
        if how is Handover.AS_IS:
            data = self._data
        else:
            data = self._copied.acquire()
            self._copy_of.add(place)
        write = self._how or _put
        self._jobs[place] = self._job(member, lambda: write(member, self._key, data))
        return True

    def _give(self, race: races.PutRace, place: int, how: Handover) -> races.PutRace:
        """Hand the bytes to the store, or go on wanting memory for them as long as the put
        lasts."""
        race = races.with_sent(race, (place,))
        member = self._group.replicas[place]
        if not self._ready(place, how):
            self._wanting[place] = how
            return race
        self._wanting.pop(place, None)
        if not member.writing.threads.submit(self._jobs[place], key=self._key):
            return self._failed(race, place, busy_error(member), passing=True)
        return race

    def _lend(self, member: StoreReplica) -> None:
        assert member.borrower is not None, "only borrowers are lent to"
        self._loan.still_lent()
        member.borrower.put_lent(self._key, self._data, self._loan.still_lent)

    def _job(self, member: StoreReplica, put: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            answer: CkptError | None = None
            try:
                member.write(self._size_bytes, put)
            except CkptError as error:
                answer = error
            if not self._mailbox.put((member.index, answer)):
                self._late(member.index, answer)

        return job

    # What became of it.

    def _heard(self, race: races.PutRace, place: int, answer: CkptError | None) -> races.PutRace:
        if answer is None:
            self._errors.pop(place, None)
            return races.with_ack(race, place, time.monotonic())
        return self._failed(race, place, answer, passing=self._how is None and _passing(answer))

    def _failed(
        self, race: races.PutRace, place: int, error: CkptError, *, passing: bool
    ) -> races.PutRace:
        self._errors[place] = error
        group = self._group
        return races.with_failure(
            race,
            place,
            time.monotonic(),
            transient=passing,
            limits=group.limits,
            jitter=group.jitter(),
        )

    def _last_words(self, race: races.PutRace) -> races.PutRace:
        """Hear a moment longer who else fails and why; and, where this thread itself stood still,
        what was said meanwhile."""
        until_s = time.monotonic() + self._group.limits.grace_s_min
        while (
            race.in_state(PutState.SENT)
            and (got := self._mailbox.get(until_s - time.monotonic())) is not None
        ):
            race = self._heard(race, *got)
        return race

    def _error(self, race: races.PutRace) -> CkptError:
        group, errors = self._group, self._errors
        waited_s = time.monotonic() - race.start_s
        for place in race.in_state(PutState.SENT):
            member = group.replicas[place]
            errors[place] = (
                _no_memory(member) if place in self._wanting else silent_error(member, waited_s)
            )
        acks = race.in_state(PutState.ACKED)
        each = " | ".join(
            f"{group.replicas[place].url}: {error}" for place, error in sorted(errors.items())
        )
        ignored = [group.replicas[place].url for place in sorted(acks - group.quorum.voters)]
        said = race.in_state(PutState.FAILED, PutState.RETRYING) & group.quorum.voters
        kind = most_common_error([errors[place] for place in sorted(said)])
        return kind(
            f"too few stores took the object. key={self._key} "
            f"acknowledged={len(acks & group.quorum.voters)} "
            f"needed={group.quorum.write}{f' not_counting={ignored}' if ignored else ''} [{each}]; "
            "repeat when they do"
        )

    def _finish(self, race: races.PutRace) -> None:
        """No store may use the caller's memory from here on, and who has not acknowledged is caught
        up."""
        self._loan.take_back()
        group, out = self._group, race.in_state(PutState.SENT) - self._wanting.keys()
        if self._durable:
            for place in out - self._lent:
                group.background_put_started(place, self._key)
            for place in out & self._lent:
                # Until it says otherwise the object counts as missing there: it may never say
                # anything.
                group.replicas[place].cut_off(self._size_bytes, time.monotonic() - race.start_s)
                self._missing(place, _SLOW, alarm=False)
            for place in (
                race.in_state(PutState.FAILED, PutState.RETRYING, PutState.HELD_BACK)
                | self._wanting.keys()
            ):
                alone = not group.replicas[place].writing.circuit.usable
                error = self._errors.get(place, _ALONE if alone else _SLOW)
                self._missing(place, error, alarm=alone or place in self._errors)
        drained = self._mailbox.close()
        self._data = ()
        self._copied.forget_source()
        for place in range(len(group.replicas)):
            if place not in out:
                self._release(place)
        for place, answer in drained:
            self._late(place, answer)
        if out:
            group.wake()  # to see it if one of them hangs

    def _late(self, place: int, answer: CkptError | None) -> None:
        """A store ended after the put did."""
        self._release(place)
        if not self._durable:
            return
        if answer is None:
            self._group.settle_need(place, self._key)
        elif not isinstance(answer, TakenBackError):
            self._missing(place, answer, alarm=True)
        if place not in self._lent:
            self._group.background_put_ended(place, self._key)

    def _missing(self, place: int, why: CkptError | str, *, alarm: bool) -> None:
        need = RepairNeed(CopyFault.MISSING)
        if isinstance(why, KeyExistsError) and self._proof is not None:
            need = RepairNeed(CopyFault.DAMAGED, self._proof)
        self._group.note_need(place, self._key, need, reason=str(why), alarm=alarm)

    def _release(self, place: int) -> None:
        self._jobs.pop(place, None)
        if place in self._claimed:
            self._group.memory.free(place, self._size_bytes)
        if place in self._copy_of:
            self._copied.release()


def _put(member: StoreReplica, key: str, data: Sequence[Buffer]) -> None:
    member.store.put(key, data)


def _passing(error: CkptError) -> bool:
    """Whether trying again in a moment may help."""
    return isinstance(error, UnavailableError) and not isinstance(
        error, StoreFullError | StoreDeniedError
    )


def _no_memory(member: StoreReplica) -> UnavailableError:
    return UnavailableError(
        f"no memory is left for what this store has not taken yet. store={member.url}; repeat later"
    )
