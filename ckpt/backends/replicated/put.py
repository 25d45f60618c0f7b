"""Write to all stores at once, and return when enough have the object.

What a store may still read after that is never the caller's memory: it gets bytes that nobody can change, a copy, or a loan
that is taken back before the put returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ckpt.backends.base import Buffer
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated import put_race as races
from ckpt.backends.replicated.buffers import Copied, Loan, TakenBackError, immutable
from ckpt.backends.replicated.group import Group, Mailbox, Member, busy, silent
from ckpt.backends.replicated.ledger import Need, Proof, Why
from ckpt.backends.replicated.policy import commonest
from ckpt.backends.replicated.put_race import How, Side, Taker, feed
from ckpt.errors import CkptError, KeyExistsError, StoreDeniedError, StoreFullError, UnavailableError

Answer = tuple[int, "CkptError | None"]

Writes = Callable[[Member, str, "Sequence[Buffer]"], None]
"""Stores an object in one store."""

MEMORY_LOOK_S = 0.02
"""How often a put looks for memory where a store has not yet taken what it was given before."""

_SLOW = "slower than the others by more than the grace"
_ALONE = "the store is left alone"


class Put:
    """One put. The thread that made it runs it; threads of stores answer, also after it has returned.

    ``how``: write so to each store, once, and lend to none. ``proof`` is of the whole object, to mend what holds another.
    """

    def __init__(
        self, group: Group, key: str, data: Sequence[Buffer], *, how: Writes | None = None, proof: Proof | None = None
    ) -> None:
        self._group = group
        self._key = key
        self._data = data
        self._size_bytes = sum(memoryview(buffer).nbytes for buffer in data)
        self._how = how
        self._proof = proof
        self._immutable = immutable(data)
        self._loan = Loan(key)
        self._copied = Copied(group.memory, data, self._size_bytes)
        self._mailbox: Mailbox[Answer] = Mailbox()
        self._jobs: dict[int, Callable[[], None]] = {}
        self._lent: set[int] = set()
        self._claimed: set[int] = set()
        self._copy_of: set[int] = set()
        self._wanting: dict[int, How] = {}
        self._durable = False
        self._errors: dict[int, CkptError] = {}

    def run(self, *, holders: frozenset[int] = frozenset(), failed: Mapping[int, CkptError] = {}) -> None:
        """Write, and return when the object is durable.

        ``holders`` have it already; ``failed`` are not written to. Raises what most of the stores that failed raised, with
        each of them named, where the quorum can't be reached.
        """
        group = self._group
        group.look_for_stalls()
        everybody = frozenset(range(len(group.members)))
        race = races.begin(group.quorum, size_bytes=self._size_bytes, now_s=time.monotonic(), apart=everybody)
        try:
            for place in holders:
                race = races.acked(race, place, time.monotonic())
            for place, error in failed.items():
                race = self._failed(race, place, error, passing=False)
            # One that doesn't count stays apart: it is filled as a whole before it does.
            race = self._feed(race, group.quorum.takers - holders - failed.keys())
            while True:
                now_s = time.monotonic()
                match races.decide(race, now_s, pace=group.pace):
                    case races.Again(places):
                        for place in places:
                            race = self._give(race, place, self._last_resort())
                    case races.Wait(until_s):
                        wait_s = until_s - now_s
                        got = self._mailbox.get(min(wait_s, MEMORY_LOOK_S) if self._wanting else wait_s)
                        if got is not None:
                            race = self._heard(race, *got)
                        for place, how in tuple(self._wanting.items()):
                            race = self._give(race, place, how)
                    case races.Done():
                        self._durable = True
                        return
                    case races.Failed():
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
            Taker(
                usable=member.writing.circuit.usable,
                room=member.writing.lane.room,
                borrows=member.borrower is not None and self._how is None,
                expected_s=speeds.expected_s(member.writing.speed, self._size_bytes),
            )
            for member in group.members
        ]
        hows = feed(takers, group.quorum, immutable=self._immutable, pace=group.pace)
        # Who needs no copy begins first.
        for place in sorted(places, key=lambda place: hows[place] is not How.LENT):
            if hows[place] is How.SPARED and not self._ready(place, How.SPARED):
                continue
            if hows[place] is not How.LATER:
                race = self._give(race, place, hows[place])
        return race

    def _last_resort(self) -> How:
        """How stores get the bytes that were left apart, and are asked because the others do not suffice."""
        return How.AS_IS if self._immutable else How.COPIED

    def _ready(self, place: int, how: How) -> bool:
        """Prepare what ``place`` is given; False where there is no memory for it."""
        if place in self._jobs:
            return True
        member = self._group.members[place]
        if how is How.LENT:
            self._lent.add(place)
            self._jobs[place] = self._job(member, lambda: self._lend(member))
            return True
        if not self._group.memory.claim(place, self._size_bytes):
            return False
        self._claimed.add(place)
        if how is How.AS_IS:
            data = self._data
        else:
            data = self._copied.hold()
            self._copy_of.add(place)
        write = self._how or _put
        self._jobs[place] = self._job(member, lambda: write(member, self._key, data))
        return True

    def _give(self, race: races.PutRace, place: int, how: How) -> races.PutRace:
        """Hand the bytes to the store, or go on wanting memory for them as long as the put lasts."""
        race = races.given(race, (place,))
        member = self._group.members[place]
        if not self._ready(place, how):
            self._wanting[place] = how
            return race
        self._wanting.pop(place, None)
        if not member.writing.lane.submit(self._jobs[place], key=self._key):
            return self._failed(race, place, busy(member), passing=True)
        return race

    def _lend(self, member: Member) -> None:
        assert member.borrower is not None, "only borrowers are lent to"
        self._loan.still_lent()
        member.borrower.put_lent(self._key, self._data, self._loan.still_lent)

    def _job(self, member: Member, put: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            answer: CkptError | None = None
            try:
                member.write(self._size_bytes, put)
            except CkptError as error:
                answer = error
            if not self._mailbox.put((member.place, answer)):
                self._late(member.place, answer)

        return job

    # What became of it.

    def _heard(self, race: races.PutRace, place: int, answer: CkptError | None) -> races.PutRace:
        if answer is None:
            self._errors.pop(place, None)
            return races.acked(race, place, time.monotonic())
        return self._failed(race, place, answer, passing=self._how is None and _passing(answer))

    def _failed(self, race: races.PutRace, place: int, error: CkptError, *, passing: bool) -> races.PutRace:
        self._errors[place] = error
        group = self._group
        return races.failed(race, place, time.monotonic(), passing=passing, pace=group.pace, jitter=group.jitter())

    def _last_words(self, race: races.PutRace) -> races.PutRace:
        """Hear a moment longer who else fails and why; and, where this thread itself stood still, what was said meanwhile."""
        until_s = time.monotonic() + self._group.pace.grace_s_min
        while race.at(Side.OUT) and (got := self._mailbox.get(until_s - time.monotonic())) is not None:
            race = self._heard(race, *got)
        return race

    def _error(self, race: races.PutRace) -> CkptError:
        group, errors = self._group, self._errors
        waited_s = time.monotonic() - race.start_s
        for place in race.at(Side.OUT):
            member = group.members[place]
            errors[place] = _no_memory(member) if place in self._wanting else silent(member, waited_s)
        acks = race.at(Side.ACKED)
        each = " | ".join(f"{group.members[place].url}: {error}" for place, error in sorted(errors.items()))
        ignored = [group.members[place].url for place in sorted(acks - group.quorum.takers)]
        said = race.at(Side.FAILED, Side.RESTING) & group.quorum.takers
        kind = commonest([errors[place] for place in sorted(said)])
        return kind(
            f"too few stores took the object. key={self._key} acknowledged={len(acks & group.quorum.takers)} "
            f"needed={group.quorum.write}{f' not_counting={ignored}' if ignored else ''} [{each}]; repeat when they do"
        )

    def _finish(self, race: races.PutRace) -> None:
        """No store may use the caller's memory from here on, and who has not acknowledged is caught up."""
        self._loan.take_back()
        group, out = self._group, race.at(Side.OUT) - self._wanting.keys()
        if self._durable:
            for place in out - self._lent:
                group.set_out(place, self._key)
            for place in out & self._lent:
                # Until it says otherwise the object counts as missing there: it may never say anything.
                group.members[place].cut_off(self._size_bytes, time.monotonic() - race.start_s)
                self._missing(place, _SLOW, alarm=False)
            for place in race.at(Side.FAILED, Side.RESTING, Side.APART) | self._wanting.keys():
                alone = not group.members[place].writing.circuit.usable
                error = self._errors.get(place, _ALONE if alone else _SLOW)
                self._missing(place, error, alarm=alone or place in self._errors)
        drained = self._mailbox.close()
        self._data = ()
        self._copied.over()
        for place in range(len(group.members)):
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
            self._group.settle(place, self._key)
        elif not isinstance(answer, TakenBackError):
            self._missing(place, answer, alarm=True)
        if place not in self._lent:
            self._group.arrived(place, self._key)

    def _missing(self, place: int, why: CkptError | str, *, alarm: bool) -> None:
        need = Need(Why.MISSING)
        if isinstance(why, KeyExistsError) and self._proof is not None:
            need = Need(Why.DAMAGED, self._proof)
        self._group.note(place, self._key, need, why=str(why), alarm=alarm)

    def _release(self, place: int) -> None:
        self._jobs.pop(place, None)
        if place in self._claimed:
            self._group.memory.free(place, self._size_bytes)
        if place in self._copy_of:
            self._copied.let_go()


def _put(member: Member, key: str, data: Sequence[Buffer]) -> None:
    member.store.put(key, data)


def _passing(error: CkptError) -> bool:
    """Whether trying again in a moment may help."""
    return isinstance(error, UnavailableError) and not isinstance(error, StoreFullError | StoreDeniedError)


def _no_memory(member: Member) -> UnavailableError:
    return UnavailableError(
        f"no memory is left for what this store has not taken yet. store={member.url}; repeat later"
    )
