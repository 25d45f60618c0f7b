"""What the operations on several stores share: the stores, the quorum, what is known to be missing where, and who is told."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from ckpt.backends.base import Backend
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated import replicate_ledger as ledgers
from ckpt.backends.replicated.buffers import Memory
from ckpt.backends.replicated.mailbox import Mailbox
from ckpt.backends.replicated.member import Member, Side
from ckpt.backends.replicated.pace import Pace
from ckpt.backends.replicated.policy import Candidate
from ckpt.backends.replicated.quorum import Quorum
from ckpt.backends.replicated.replicate_ledger import Need
from ckpt.errors import CkptError, UnavailableError
from ckpt.events import Event, Tell

T = TypeVar("T")


def _never(answers: Mapping[int, object]) -> bool:
    return False


class Group:
    """The stores behind one replicated backend, in one process. Thread-safe."""

    def __init__(
        self, stores: Sequence[Backend], quorum: Quorum, *, prefer: Sequence[int], pace: Pace, budget_bytes: int,
        seed: int | None, tell: Tell,
    ) -> None:  # fmt: skip
        self.quorum = quorum
        self.pace = pace
        self.memory = Memory(len(stores), budget_bytes=budget_bytes)
        self._prefer = tuple(prefer)
        self._dice = random.Random(seed)
        self._tell = tell
        self.change = threading.Condition()
        self._ledger = ledgers.empty(len(stores))
        self._aside: tuple[dict[str, Need], ...] = tuple({} for _ in stores)
        self._on_the_way: dict[tuple[int, str], int] = {}
        self._alarmed: set[int] = set()
        self.wake: Callable[[], None] = lambda: None
        self.members = tuple(
            Member(place, store, pace=pace, jitter=self.jitter, changed=self._circuit_changed)
            for place, store in enumerate(stores)
        )

    def jitter(self) -> float:
        """A random number in [0, 1)."""
        return self._dice.random()

    def tell(self, kind: str, text: str, *, alarm: bool = False, **facts: str | int) -> None:
        """Say what happened."""
        self._tell(Event(kind, text, facts, alarm))

    def nearest(self, size_bytes: int) -> tuple[int, ...]:
        """The places in the order in which to read ``size_bytes`` from them."""
        now_s = time.monotonic()
        candidates = [
            Candidate(
                member.place,
                member.reading.circuit.usable,
                speeds.expected_s(member.reading.speed, size_bytes),
                now_s - member.reading.asked_s,
            )
            for member in self.members
        ]
        return speeds.nearest(candidates, prefer=self._prefer)

    def usable(self) -> frozenset[int]:
        """The places that can be read from as usual."""
        return frozenset(member.place for member in self.members if member.reading.circuit.usable)

    def look_for_stalls(self) -> None:
        """Count calls that take far too long as hung."""
        for member in self.members:
            member.look_for_stalls()

    def count_only(self, quorum: Quorum) -> None:
        """From now on ``quorum`` says which stores count. What one missed shortly before it did is brought to it.

        It was filled, or answered again, while objects were on their way to the others, whose records came later.
        """
        with self.change:
            again = quorum.takers - self.quorum.takers
            self.quorum = quorum
            missed = [(place, self._aside[place].copy()) for place in sorted(again)]
            for place in again:
                self._aside[place].clear()
        for place, needs in missed:
            for key, need in needs.items():
                self.note(place, key, need, why="written while the store did not count", alarm=False)

    # What is missing where.

    @property
    def ledger(self) -> ledgers.Ledger:
        """What is known to be missing now."""
        return self._ledger

    def note(self, place: int, key: str, need: Need, *, why: str, alarm: bool) -> None:
        """``key`` is not as it should be at ``place``. The first of a store is told; ``alarm``: loudly.

        For a store that doesn't count it is put aside until it does, the newest of it: the rest it is filled with.
        """
        with self.change:
            if place not in self.quorum.takers:
                aside = self._aside[place]
                aside[key] = need
                if len(aside) > self.pace.keys_max:
                    del aside[next(iter(aside))]
                return
            scrub = self._ledger.scrub[place]
            self._ledger = ledgers.noted(self._ledger, place, key, need, keys_max=self.pace.keys_max)
            first = place not in self._alarmed
            overflows = self._ledger.scrub[place] and not scrub
            if alarm or overflows:
                self._alarmed.add(place)
        if (alarm and first) or overflows:
            self.tell(
                "under-replicated",
                f"objects are missing or damaged in {self.members[place].url} and will be mended from other stores"
                + ("; more than are remembered: run `ckpt scrub`" if overflows else ""),
                alarm=True,
                store=self.members[place].url,
                key=key,
                need=need.why.value,
                why=why,
            )
        self.wake()

    def settle(self, place: int, key: str) -> None:
        """``key`` is as it should be at ``place``."""
        self._turn(lambda ledger: ledgers.settled(ledger, place, key))

    def forget(self, key: str) -> None:
        """``key`` is deleted, and nowhere missing any more."""
        with self.change:
            for aside in self._aside:
                aside.pop(key, None)
        self._turn(lambda ledger: ledgers.dropped(ledger, key))

    def put_off(self, place: int, key: str) -> None:
        """``key`` could not be mended at ``place`` now."""
        now_s, jitter = time.monotonic(), self.jitter()
        self._turn(lambda ledger: ledgers.put_off(ledger, place, key, now_s, pace=self.pace, jitter=jitter))

    def leave(self, place: int, key: str, why: str) -> None:
        """``key`` can only be mended by a scrub."""
        self._turn(lambda ledger: ledgers.left(ledger, place, key))
        url = self.members[place].url
        text = f"a copy in {url} can't be mended without looking at every chunk: {why}; run `ckpt scrub`"
        self.tell("under-replicated", text, alarm=True, store=url, key=key, why=why)

    def scrubbed(self, place: int) -> None:
        """A scrub has been through the store."""
        self._turn(lambda ledger: ledgers.scrubbed(ledger, place))

    def hasten(self) -> None:
        """Mend and probe without pauses."""
        self._turn(ledgers.hastened)
        self.wake()

    def _turn(self, turn: Callable[[ledgers.Ledger], ledgers.Ledger]) -> None:
        with self.change:
            self._ledger = turn(self._ledger)
            self._alarmed = {place for place in self._alarmed if self._ledger.needs[place] or self._ledger.scrub[place]}
            self.change.notify_all()

    # What a put that has returned still writes in the background.

    def set_out(self, place: int, key: str) -> None:
        """A put of ``key`` goes on at ``place`` after its caller was told that it is done."""
        with self.change:
            self._on_the_way[place, key] = self._on_the_way.get((place, key), 0) + 1

    def arrived(self, place: int, key: str) -> None:
        """It ended."""
        with self.change:
            left = self._on_the_way.pop((place, key)) - 1
            if left:
                self._on_the_way[place, key] = left
            self.change.notify_all()

    def behind(self, place: int) -> int:
        """How many keys the store is known to miss, those on their way included."""
        with self.change:
            away = {key for at, key in self._on_the_way if at == place}
            return len(away | self._ledger.needs[place].keys())

    def caught_up(self) -> bool:
        """Whether nothing is known to be missing anywhere."""
        with self.change:
            return not self._on_the_way and not any(self._ledger.needs) and not any(self._ledger.scrub)

    # Small calls to several stores at once.

    def ask(
        self, places: Iterable[int], call: Callable[[Member], T], *, side: Callable[[Member], Side] | None = None,
        key: str | None = None, enough: Callable[[Mapping[int, T | CkptError]], bool] = _never,
        nearly: Callable[[Mapping[int, T | CkptError]], bool] = _never,
    ) -> dict[int, T | CkptError]:  # fmt: skip
        """What ``call`` gives for each of ``places``, asked at once.

        ``enough`` says when no more answers are needed, ``nearly`` when the others need not be waited for as long as that.
        A store that does not answer within ``Pace.call_s`` gives UnavailableError. Calls go through the reading side by
        default; ``key`` keeps them in order with other writes of that key. Thread-safe.
        """
        mailbox: Mailbox[tuple[int, T | CkptError]] = Mailbox()
        answers: dict[int, T | CkptError] = {}
        waiting = set()
        for place in places:
            member = self.members[place]
            lane = (side(member) if side else member.reading).lane
            if lane.submit(_asking(member, call, mailbox), key=key):
                waiting.add(place)
            else:
                answers[place] = busy(member)
        until_s = time.monotonic() + self.pace.call_s
        hurried = False
        while waiting and not enough(answers):
            if not hurried and nearly(answers):
                hurried, until_s = True, min(until_s, time.monotonic() + self.pace.hedge_s_first)
            got = mailbox.get(until_s - time.monotonic())
            if got is None:
                break
            answers[got[0]] = got[1]
            waiting.discard(got[0])
        mailbox.close()
        if waiting:
            self.wake()  # to see it if one of them hangs
        if not enough(answers):
            answers |= {place: silent(self.members[place], self.pace.call_s) for place in waiting}
        return answers

    def _circuit_changed(self, member: Member, side: str, why: str) -> None:
        store, behind = member.url, self.behind(member.place)
        circuit = member.reading.circuit if side == "reading" else member.writing.circuit
        if circuit.usable:
            if member.well:
                self.tell(
                    "store-back", f"{member.url} answers again, and gets what it missed", store=store, behind=behind
                )
        elif circuit.openings == 1:
            text = f"{member.url} is left alone for {side}: {why}; it is looked at again by and by"
            self.tell("store-down", text, alarm=True, side=side, store=store, behind=behind)
        self.wake()


def busy(member: Member) -> UnavailableError:
    """The store's queue is full: as good as not answering."""
    return UnavailableError(f"too many calls wait for the store already. store={member.url}; repeat later")


def silent(member: Member, waited_s: float) -> UnavailableError:
    """The store did not answer in time."""
    return UnavailableError(f"the store does not answer. store={member.url} waited_s={waited_s:.1f}; repeat later")


def _asking(
    member: Member, call: Callable[[Member], T], mailbox: Mailbox[tuple[int, T | CkptError]]
) -> Callable[[], None]:
    def job() -> None:
        answer: T | CkptError
        try:
            answer = call(member)
        except CkptError as error:
            answer = error
        mailbox.put((member.place, answer))

    return job
