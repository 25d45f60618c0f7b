"""A world of stores that are slow, dead, full, hanging, lying and rotting, on a clock of its own,
around the decisions.

Everything that decides is the real code; threads, memory and stores are played here. One seed is
one run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from ckpt.backends.replicated import ledger as ledgers
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated import put_race, read_race
from ckpt.backends.replicated.buffers import Loan, TakenBackError
from ckpt.backends.replicated.ledger import (
    CopyFault,
    LeaveToScrub,
    RepairCopy,
    RepairLater,
    RepairNeed,
    VerifiedRange,
    equal_outside,
    no_verified_source,
    plan_repair,
)
from ckpt.backends.replicated.policy import (
    Circuit,
    CircuitEvent,
    CircuitState,
    Quorum,
    ReadCandidate,
    ReplicationLimits,
    StoreSpeed,
    advance,
    probe_due,
    stall_s,
)
from ckpt.backends.replicated.put_race import Handover, PutState, PutTarget, plan_handover
from ckpt.backends.replicated.read_race import ReadFailure, ReadResult
from ckpt.format.canonical import digest
from kit.replicated.clock import Clock, Process, Step

PACE = ReplicationLimits(keys_max=10_000)
BODY_BYTES = 24
LOOK_S = 1.0
MOODS = ("well", "well", "slow", "dead", "full", "hangs", "lies", "flaky")


class SilentError(Exception):
    """The store did not answer, or with an error that may pass."""


class FullError(Exception):
    """The store takes nothing."""


@dataclass
class Store:
    place: int
    quick_s: float
    mood: str = "well"
    objects: dict[str, bytes] = field(default_factory=dict)
    ever: dict[str, set[bytes]] = field(default_factory=dict)
    hung: list[Callable[[], None]] = field(default_factory=list)
    reading: Circuit = field(default_factory=Circuit)
    writing: Circuit = field(default_factory=Circuit)
    gets: StoreSpeed = field(default_factory=StoreSpeed)
    puts: StoreSpeed = field(default_factory=StoreSpeed)
    mending: bool = False


class ReplicationSimulation(Clock):
    def __init__(self, seed: int, *, clean: bool) -> None:
        super().__init__()
        self.dice = random.Random(seed)
        stores = self.dice.choice((2, 3, 3, 3, 4, 5))
        write = self.dice.randrange(stores // 2 + 1, stores + 1)
        self.quorum = Quorum(stores, write, frozenset(range(stores)))
        self.clean = clean
        self.stores = [Store(place, self.dice.choice((0.01, 0.05, 0.5))) for place in range(stores)]
        self.ledger = ledgers.empty_ledger(stores)
        self.right: dict[str, bytes] = {}
        self.acked: dict[str, bytes] = {}
        self.harmed: set[str] = set()
        self.delivered = self.mended = self.failed_puts = 0

    # What stores do.

    def call(
        self,
        place: int,
        side: str,
        act: Callable[[Store], object],
        hear: Callable[[int, object], None],
    ) -> None:
        """Call a store; ``hear`` gets what it returns or raises, if ever."""
        store = self.stores[place]
        start_s = self.now_s
        done = [False]

        def finish() -> None:
            done[0] = True
            answer: object
            try:
                if store.mood == "dead" or (store.mood == "flaky" and self.dice.random() < 0.4):
                    if side == "writing" and self.dice.random() < 0.3:
                        act(store)  # a lost reply
                    raise SilentError
                if store.mood == "full" and side == "writing":
                    raise FullError
                answer = act(store)
            except (SilentError, FullError, TakenBackError) as error:
                answer = error
            sign = {SilentError: CircuitEvent.FAILED, FullError: CircuitEvent.REFUSED}.get(
                type(answer), CircuitEvent.ANSWERED
            )
            if sign is CircuitEvent.ANSWERED:
                learn = speeds.with_measurement(
                    store.gets if side == "reading" else store.puts, 100, self.now_s - start_s
                )
                if side == "reading":
                    store.gets = learn
                else:
                    store.puts = learn
            if not isinstance(answer, TakenBackError):
                self._sign(store, side, sign)
            hear(place, answer)

        def stalled() -> None:
            if not done[0]:
                self._sign(store, side, CircuitEvent.STALLED)

        if store.mood == "hangs":
            store.hung.append(finish)
        else:
            slow = 50 if store.mood == "slow" else 1
            self.at(self.now_s + store.quick_s * slow * self.dice.uniform(0.5, 2), finish)
        self.at(self.now_s + stall_s(PACE, 0), stalled)

    def _sign(self, store: Store, side: str, sign: CircuitEvent) -> None:
        circuit = advance(
            getattr(store, side), sign, self.now_s, limits=PACE, jitter=self.dice.random()
        )
        setattr(store, side, circuit)

    def feel(self, store: Store, mood: str) -> None:
        store.mood = mood
        hung, store.hung = store.hung, []
        if mood == "hangs":
            store.hung = hung
            return
        for finish in hung:
            self.at(self.now_s + self.dice.uniform(0, 0.1), finish)

    def seen(self, store: Store, key: str, low: int, high: int) -> bytes | None:
        """What a read of a range gives."""
        body = store.objects.get(key)
        if body is None:
            return None
        part = bytearray(body[low:high])
        if store.mood == "lies" and part and self.dice.random() < 0.5:
            part[self.dice.randrange(len(part))] ^= 1 << self.dice.randrange(8)
        return bytes(part)

    # Operations, as the effects do them.

    def put(self, key: str) -> Callable[[Process], Step]:
        body = self.right[key]

        def steps(process: Process) -> Step:
            loan = Loan(key)
            takers = [
                PutTarget(
                    usable=one.writing.usable,
                    has_room=True,
                    borrows=one.place % 2 == 0,
                    expected_s=speeds.expected_s(one.puts, 100),
                )
                for one in self.stores
            ]
            hows = plan_handover(takers, self.quorum, immutable=False, limits=PACE)
            durable = [False, False]

            def give(place: int) -> None:
                lent = hows[place] is Handover.LENT

                def act(store: Store) -> None:
                    # Lent memory holds anything once it was taken back.
                    data = b"\xff" * BODY_BYTES if lent and loan.over else body
                    if lent:
                        loan.still_lent()
                    store.objects[key] = data
                    store.ever.setdefault(key, set()).add(data)

                self.call(place, "writing", act, hear)

            def hear(place: int, answer: object) -> None:
                if not durable[1]:
                    self.answer(process, place, answer)
                elif durable[0] and answer is None:
                    self.ledger = ledgers.without_need(self.ledger, place, key)
                elif durable[0] and not isinstance(answer, TakenBackError):
                    self.note(place, key, RepairNeed(CopyFault.MISSING))

            apart = frozenset(place for place, how in enumerate(hows) if how is Handover.LATER)
            race = put_race.begin_put(self.quorum, size_bytes=0, now_s=self.now_s, held_back=apart)
            for place in range(self.quorum.stores):
                if place not in apart:
                    give(place)
            while True:
                match put_race.decide(race, self.now_s, limits=PACE):
                    case put_race.SendTo(places):
                        race = put_race.with_sent(race, places)
                        for place in places:
                            give(place)
                    case put_race.WaitForAck(until_s):
                        got = yield until_s
                        if got is not None:
                            race = self._put_heard(race, *got)
                    case end:
                        break
            loan.take_back()
            durable[1] = True
            if isinstance(end, put_race.PutFailed):
                self.failed_puts += 1
                return
            durable[0] = True
            acks = race.in_state(PutState.ACKED)
            assert len(acks & self.quorum.counting) >= self.quorum.write
            assert self.harmed or all(self.stores[place].objects.get(key) == body for place in acks)
            self.acked[key] = body
            for place in end.behind:
                self.note(place, key, RepairNeed(CopyFault.MISSING))
            for place, answer in process.answers:
                hear(place, answer)

        return steps

    def _put_heard(self, race: put_race.PutRace, place: int, answer: object) -> put_race.PutRace:
        if answer is None:
            return put_race.with_ack(race, place, self.now_s)
        passing = isinstance(answer, SilentError)
        return put_race.with_failure(
            race, place, self.now_s, transient=passing, limits=PACE, jitter=self.dice.random()
        )

    def read(self, key: str, low: int, high: int) -> Callable[[Process], Step]:
        wanted = self.right[key][low:high]

        def steps(process: Process) -> Step:
            candidates = [
                ReadCandidate(one.place, one.reading.usable, speeds.expected_s(one.gets, 100), 0.0)
                for one in self.stores
            ]
            usable = frozenset(one.place for one in self.stores if one.reading.usable)
            race = read_race.begin_read(
                self.quorum, speeds.read_order(candidates, prefer=()), usable
            )
            out = b""
            while True:
                race, move = read_race.decide(
                    race, self.now_s, limits=PACE, jitter=self.dice.random()
                )
                match move:
                    case read_race.AskStore(place):
                        late_s = self.now_s + speeds.hedge_s(self.stores[place].gets, 100, PACE)
                        race = read_race.with_asked(
                            race, place, late_s=late_s, lost_s=self.now_s + stall_s(PACE, 0)
                        )
                        self.call(
                            place,
                            "reading",
                            lambda store: self.seen(store, key, low, high),
                            lambda place, answer: self.answer(process, place, answer),
                        )
                    case read_race.WaitForRead(until_s):
                        got = yield until_s
                        if got is not None:
                            place, answer = got
                            found = self._found(answer, wanted)
                            out = (
                                answer
                                if found is ReadResult.RIGHT and isinstance(answer, bytes)
                                else out
                            )
                            race = read_race.with_result(race, place, found)
                    case end:
                        break
            if isinstance(end, read_race.DeliverRead):
                assert out == wanted, "wrong bytes were delivered"
                self.delivered += 1
                proof = VerifiedRange(low, high - low, digest(wanted))
                for place, found in race.results.items():
                    if found is ReadResult.MISSING:
                        self.note(place, key, RepairNeed(CopyFault.MISSING, proof))
                    elif found in (ReadResult.WRONG, ReadResult.SHORT):
                        self.note(place, key, RepairNeed(CopyFault.DAMAGED, proof))
            elif isinstance(end, read_race.GiveUpRead) and end.failure is ReadFailure.NOT_FOUND:
                assert key not in self.acked or key in self.harmed, (
                    "an acknowledged object is said to be nowhere"
                )

        return steps

    def _found(self, answer: object, wanted: bytes) -> ReadResult:
        match answer:
            case None:
                return ReadResult.MISSING
            case bytes() if len(answer) < len(wanted):
                return ReadResult.SHORT
            case bytes():
                return ReadResult.RIGHT if digest(answer) == digest(wanted) else ReadResult.WRONG
            case _:
                return ReadResult.SILENT

    def healed(self) -> bool:
        """Whether nothing is known to be missing and every store is asked as usual."""
        return not any(self.ledger.needs) and all(
            one.reading.usable and one.writing.usable for one in self.stores
        )

    def note(self, place: int, key: str, need: RepairNeed) -> None:
        self.ledger = ledgers.with_need(self.ledger, place, key, need, keys_max=PACE.keys_max)

    # The caretaker.

    def care(self) -> None:
        """Look once, as the caretaker does each second."""
        for store in self.stores:
            entry = ledgers.next_need(self.ledger, store.place)
            for side in ("reading", "writing"):
                if probe_due(getattr(store, side), self.now_s):
                    self._sign(store, side, CircuitEvent.PROBED)
                    if entry is None or side == "reading":
                        self.call(store.place, side, lambda one: None, lambda place, answer: None)
            if (
                entry is None
                or store.mending
                or self.now_s < entry[1].due_s
                or store.writing.state is CircuitState.OPEN
            ):
                continue
            store.mending = True
            self.start(self.mend(store, *entry))
        self.at(self.now_s + LOOK_S, self.care)

    def mend(self, target: Store, key: str, need: RepairNeed) -> Callable[[Process], Step]:
        def steps(process: Process) -> Step:
            end = yield from self._mend(process, target, key, need)
            target.mending = False
            if end == "later":
                jitter = self.dice.random()
                self.ledger = ledgers.postponed(
                    self.ledger, target.place, key, self.now_s, limits=PACE, jitter=jitter
                )
            elif end == "leave":
                self.ledger = ledgers.left_to_scrub(self.ledger, target.place, key)
            else:
                self.ledger = ledgers.without_need(self.ledger, target.place, key)

        return steps

    def _ask(
        self, process: Process, place: int, side: str, act: Callable[[Store], object]
    ) -> Generator[float, object, object]:
        heard: list[object] = []

        def hear(_: int, answer: object) -> None:
            if not given_up:
                heard.append(answer)
                self.answer(process, place, answer)

        given_up: list[bool] = []
        until_s = self.now_s + PACE.call_s
        self.call(place, side, act, hear)
        while not heard and self.now_s < until_s:
            yield until_s
        given_up.append(True)
        return heard[0] if heard else SilentError()

    def _mend(
        self, process: Process, target: Store, key: str, need: RepairNeed
    ) -> Generator[float, object, str]:
        sizes: dict[int, int | None] = {}
        for one in self.stores:
            size = yield from self._ask(
                process,
                one.place,
                "reading",
                lambda s: len(s.objects[key]) if key in s.objects else None,
            )
            if not isinstance(size, Exception):
                sizes[one.place] = size
        plan = plan_repair(need, target.place, sizes, self.quorum)
        match plan:
            case RepairLater():
                return "later"
            case LeaveToScrub():
                return "leave"
            case RepairCopy(sources, size_bytes, compare, all_known):
                for place in sources:
                    body = yield from self._ask(
                        process, place, "reading", lambda s: self.seen(s, key, 0, size_bytes)
                    )
                    if not isinstance(body, bytes) or len(body) != size_bytes:
                        all_known = False
                        continue
                    proof = need.verified
                    if (
                        proof is not None
                        and digest(body[proof.offset_bytes : proof.end_bytes]) != proof.digest
                    ):
                        continue
                    return (yield from self._replace(process, target, key, need, body, compare))
                return (
                    "leave"
                    if isinstance(no_verified_source(all_answered=all_known), LeaveToScrub)
                    else "later"
                )
            case _:
                return "well"

    def _replace(
        self,
        process: Process,
        target: Store,
        key: str,
        need: RepairNeed,
        body: bytes,
        compare: bool,
    ) -> Generator[float, object, str]:
        if compare:
            mine = yield from self._ask(
                process, target.place, "reading", lambda s: self.seen(s, key, 0, len(body))
            )
            if not isinstance(mine, bytes):
                return "later"
            if not equal_outside(memoryview(mine), memoryview(body), 0, need):
                return "leave"

        def act(store: Store) -> None:
            store.objects[key] = body
            store.ever.setdefault(key, set()).add(body)

        done = yield from self._ask(process, target.place, "writing", act)
        if done is not None:
            return "later"
        self.mended += 1
        return "mended"
