"""A world of stores in which anything may happen in the middle of anything: one seed is one run.

A process is stopped in the middle of an operation by running another process's whole action first.
Requests are lost before or after their effect, land much later, or land twice; lists miss what is
put while they are made; stores go down and come back, are wiped or rot; processes die anywhere.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ckpt.backends.base import Buffer, Capabilities, Stat
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import CkptError, KeyExistsError, UnavailableError, UsageError
from ckpt.format import keys
from ckpt.log.high_water import FILES
from ckpt.log.replicas import Enough
from ckpt.log.sequencers import STATE_VARIABLE
from kit.logs.ledger import Body, Ledger
from kit.logs.service import Service

T = TypeVar("T")

DEPTH_MAX = 3
LATE_MAX = 20
MARKS_WAIT_S = 60.0


class Death(BaseException):
    """The process is killed."""


class Actor(Protocol):
    """Who may act in the middle of another's operation."""

    def act(self) -> None:
        """Do one thing, whatever comes of it."""
        ...


@dataclass(frozen=True)
class Late:
    """A put that is still on its way."""

    key: str
    data: bytes
    create_only: bool


@dataclass(eq=False)
class Site:
    """An address, and what stands there now. ``creates``: a key is created only once."""

    number: int
    creates: bool
    body: Body = field(default_factory=lambda: Body(MemoryBackend()))
    up: bool = True
    lost: bool = False
    """Never up again, until somebody puts another store there."""
    late: list[Late] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"sim:{self.number}"


@dataclass(frozen=True, kw_only=True)
class Weather:
    """How often things happen, each the chance per operation."""

    lost_request: float = 0.03
    late: float = 0.04
    lost_reply: float = 0.04
    twice: float = 0.03
    death: float = 0.02
    change: float = 0.05
    disaster: float = 0.01
    nested: float = 0.08
    nested_in_votes: float = 0.08
    lazy: float = 0.5


CALM = Weather(
    lost_request=0,
    late=0,
    lost_reply=0,
    twice=0,
    death=0,
    change=0,
    disaster=0,
    nested=0,
    nested_in_votes=0,
    lazy=0,
)


class LogSimulation:
    """All stores, all processes, and what becomes of them."""

    def __init__(self, seed: int, sites: Sequence[Site], weather: Weather) -> None:
        self.dice = random.Random(seed)
        self.sites = list(sites)
        self.weather = weather
        self.ledger = Ledger()
        self.actors: list[Actor] = []
        self.busy: list[Actor] = []
        self.processes: list[Process] = []
        self.acting: Process | None = None
        self.unfilled: set[int] = set()
        """Sites that lost all, or were taken into the set, and were not filled since."""
        self.planned: list[tuple[float, tuple[str, ...]]] = []
        """Sets of stores that somebody asked for, and at which place they may come into force at
        the latest."""
        self.where: dict[str, int] = {}
        """At which site each store was."""
        self.quorum_min = 1
        """The lowest W that was ever in force."""
        self.rotten: list[tuple[Body, str, bytes]] = []
        self.service: Service | None = None
        """What gives out the log's places, where that is etcd."""
        self.counts: dict[str, int] = {}

    @property
    def hurt(self) -> set[int]:
        """Sites that lack, or may lack, something that was told to be there."""
        rotten = {body for body, _, _ in self.rotten}
        return self.unfilled | {site.number for site in self.sites if site.body in rotten}

    @property
    def losses_max(self) -> int:
        """How many stores may be lost without that anything is."""
        return self.quorum_min - 1

    def may_lose(self, number: int, ids: Sequence[str] = ()) -> bool:
        """Whether a site can lose something, and no set, also not one of these ``ids``, loses more
        than it promises to bear."""
        hurt = self.hurt | {number}
        alive = {site.body.store_id for site in self.sites if site.number not in hurt}
        self.planned = [(seq, plan) for seq, plan in self.planned if seq >= len(self.ledger.told)]
        sets = [
            one
            for one in (*self.ledger.sets(), *(plan for _, plan in self.planned), tuple(ids))
            if one
        ]
        lost = max(
            (sum(store_id not in alive for store_id in one) for one in sets), default=len(hurt)
        )
        return lost <= self.losses_max

    def note(self, what: str) -> None:
        """Count that something happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def tick(self, *, voting: bool = False) -> None:
        """Before any operation of any process."""
        dice, weather = self.dice, self.weather
        if weather is CALM:
            return
        if dice.random() < 0.2:
            self._land()
        if dice.random() < 0.1:
            self._catch_up()
        if dice.random() < weather.change:
            dice.choice(self.sites).up = False
        if dice.random() < 4 * weather.change:
            site = dice.choice(self.sites)
            site.up = not site.lost
        if dice.random() < weather.disaster:
            self._harm()
        chance = weather.nested_in_votes if voting else weather.nested
        if len(self.busy) < DEPTH_MAX and dice.random() < chance:
            idle = [actor for actor in self.actors if actor not in self.busy]
            if idle:
                dice.choice(idle).act()

    def fault(self) -> str:
        """What goes wrong with one put; empty for nothing."""
        chance = self.dice.random()
        for name in ("lost_request", "late", "lost_reply", "twice", "death"):
            chance -= getattr(self.weather, name)
            if chance < 0:
                return name
        return ""

    def land(self, site: Site, key: str, data: bytes, *, create_only: bool) -> None:
        """A put arrives. Raises KeyExistsError."""
        site.body.memory.put(key, [data], create_only=create_only)
        self.forget(site.body, key)
        self.ledger.landed(site.body, key, data)
        self.where[site.body.store_id] = site.number

    def forget(self, body: Body, key: str) -> None:
        """What rotted at a key is there no more."""
        self.rotten = [one for one in self.rotten if (one[0], one[1]) != (body, key)]

    def calm(self) -> None:
        """From now on nothing goes wrong, all stores answer, and what was on its way has
        arrived."""
        self.weather = CALM
        for site in self.sites:
            site.up = not site.lost
        while any(site.late for site in self.sites):
            self._land()
        while any(
            lane
            for process in self.processes
            for lanes in process.lanes
            for lane in lanes.waiting.values()
        ):
            self._catch_up()

    def mend(self) -> None:
        """What rotted is as it was."""
        for body, key, data in reversed(self.rotten):  # some rotted twice
            body.memory.put(key, [data])
        self.rotten.clear()

    def declare_lost(self, site: Site) -> None:
        """Somebody gives up a store that is lost, and puts an empty one at its address."""
        self.note("declared lost")
        site.body = Body(MemoryBackend())
        site.lost = False
        site.up = True

    def _land(self) -> None:
        sites = [site for site in self.sites if site.late]
        if sites:
            site = self.dice.choice(sites)
            late = site.late.pop(self.dice.randrange(len(site.late)))
            self.note("late puts")
            with contextlib.suppress(KeyExistsError):
                self.land(site, late.key, late.data, create_only=late.create_only)

    def _catch_up(self) -> None:
        """One lane of some process does something that its caller did not wait for."""
        lanes = [
            (one, number)
            for process in self.processes
            for one in process.lanes
            for number, lane in one.waiting.items()
            if lane
        ]
        if lanes:
            one, number = self.dice.choice(lanes)
            with one.process.running(undying=True):
                one.run_next(number)

    def _harm(self) -> None:
        """A store loses something for good, unless too many did already."""
        if (
            self.service is not None
            and all(site.creates for site in self.sites)
            and self.dice.random() < 0.3
        ):
            self.note(
                "etcd wiped"
            )  # a store that overwrites could get a record that had its place before, and one after
            self.service.wipe()
        site = self.dice.choice([site for site in self.sites if not site.lost] or self.sites)
        if site.lost or not self.may_lose(site.number):
            return
        if self.dice.random() < 0.3:
            self.note("lost for good")
            self.unfilled.add(site.number)
            site.lost, site.up = True, False
            site.late.clear()  # who asks will never know what became of it
            return
        if self.dice.random() < 0.5:
            self.note("wiped")
            self.unfilled.add(site.number)
            site.body = Body(MemoryBackend())
            # One that says which store it is, arriving only now, would make the new store pass for
            # the old one.
            site.late = [late for late in site.late if late.key != keys.JOB_KEY]
            return
        found = [stat.key for stat in site.body.memory.list("") if stat.size_bytes]
        if found:
            self.note("rotten")
            key = self.dice.choice(found[-6:] if self.dice.random() < 0.5 else found)
            data = read(site.body.memory, key)
            bad = bytearray(data)
            bad[self.dice.randrange(len(bad))] ^= 1 << self.dice.randrange(8)
            self.rotten.append((site.body, key, data))
            site.body.memory.put(key, [bytes(bad)])


class Process:
    """One process's life: its machine, and the lanes that die with it."""

    def __init__(self, world: LogSimulation, folder: str) -> None:
        self.world = world
        self.folder = folder
        self.lanes: list[InlineLanes] = []
        self.undying = 0
        self.patient = False
        """Whether it waits for all answers, enough or not."""
        world.processes.append(self)

    @contextlib.contextmanager
    def running(self, *, undying: bool = False) -> Iterator[None]:
        """While this process does something."""
        before, folder = self.world.acting, os.environ.get(STATE_VARIABLE)
        self.world.acting = self
        self.undying += undying
        os.environ[STATE_VARIABLE] = self.folder
        try:
            yield
        finally:
            self.world.acting = before
            self.undying -= undying
            if folder is None:
                del os.environ[STATE_VARIABLE]
            else:
                os.environ[STATE_VARIABLE] = folder
            # Marks are written in threads; one seed is one run only if each is there afterwards.
            assert FILES.settle(MARKS_WAIT_S), "marks are not written"

    def die(self) -> None:
        """It is killed here, unless it can't be."""
        if not self.undying:
            self.world.note("deaths")
            raise Death

    def end(self) -> None:
        """What its lanes still had to do is never done."""
        self.lanes.clear()
        self.world.processes.remove(self)


class InlineLanes:
    """See Lanes: one call after the other, in an order that the dice choose; some are made long
    after their caller went on."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.waiting: dict[int, deque[Callable[[], object]]] = {}
        process.lanes.append(self)

    def ask(self, calls: Mapping[int, Callable[[], T]], enough: Enough[T]) -> dict[int, T]:
        """See Lanes."""
        world = self.process.world
        answers: dict[int, T] = {}
        order = sorted(calls)
        world.dice.shuffle(order)
        for number in order:
            if (
                not self.process.patient
                and enough(answers)
                and world.dice.random() < world.weather.lazy
            ):
                self.waiting.setdefault(number, deque()).append(calls[number])
                continue
            while self.waiting.get(number):
                self.run_next(number)
            answers[number] = calls[number]()
        return answers

    def run_next(self, number: int) -> None:
        """Make the first call that waits in a lane."""
        with contextlib.suppress(CkptError):
            self.waiting[number].popleft()()


class Way:
    """One process's way to a store."""

    def __init__(self, site: Site, process: Process) -> None:
        self.site = site
        self.process = process
        self.world = process.world

    @property
    def url(self) -> str:
        return self.site.url

    def capabilities(self) -> Capabilities:
        """A store that can't be asked says no."""
        creates = self.site.creates and self.site.up
        return Capabilities(create_only=creates, read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        if create_only and not self.site.creates:
            raise UsageError("this store does not create a key only once")
        self._go(voting=key.startswith(keys.LOG))
        late = Late(key, b"".join(data), create_only)
        fault = self.world.fault()
        if key == keys.JOB_KEY and not self.site.creates and fault in ("late", "twice"):
            fault = ""  # a store whose name may be overwritten at any time is no store
        if fault == "lost_request":
            raise UnavailableError("no route")
        if fault in ("late", "twice") and len(self.site.late) < LATE_MAX:
            self.site.late.append(late)
        if fault == "late":
            raise UnavailableError("reply lost, may land later")
        self.world.land(self.site, late.key, late.data, create_only=create_only)
        if fault == "lost_reply":
            raise UnavailableError("reply lost")
        if fault == "death":
            self._die()

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._look()
        self.site.body.memory.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._look()
        return self.site.body.memory.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """What was there when the list began, and perhaps some of what came since."""
        self._look()
        before = list(self.site.body.memory.list(prefix, after=after))
        self._go()
        known = {stat.key for stat in before}
        new = [
            stat
            for stat in self.site.body.memory.list(prefix, after=after)
            if stat.key not in known
        ]
        found = before + [stat for stat in new if self.world.dice.random() < 0.5]
        yield from sorted(found, key=lambda stat: stat.key)

    def delete(self, key: str) -> None:
        assert keys.parse_fold_key(key) is not None, "the log deletes nothing but folds"
        self._go()
        self.site.body.memory.delete(key)
        self.site.body.first_bytes.pop(key, None)
        self.world.forget(self.site.body, key)

    def close(self) -> None:
        pass

    def _go(self, *, voting: bool = False) -> None:
        self.world.tick(voting=voting)
        if self.world.dice.random() < self.world.weather.death / 2:
            self._die()
        if not self.site.up:
            raise UnavailableError("down")

    def _look(self) -> None:
        if self.world.dice.random() < 0.1:
            self.world.tick()
        if not self.site.up or self.world.dice.random() < self.world.weather.lost_request / 4:
            raise UnavailableError("down, or no route")

    def _die(self) -> None:
        self.process.die()


class Still:
    """A store as it is, without anything happening; ``heard`` False: it does not answer."""

    def __init__(self, site: Site, *, heard: bool = True) -> None:
        self.site = site
        self.heard = heard

    @property
    def url(self) -> str:
        return self.site.url

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=self.site.creates, read_bytes_best=1, concurrency_best=1)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        raise AssertionError("who looks changes nothing")

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._answer().read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._answer().stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._answer().list(prefix, after=after)

    def delete(self, key: str) -> None:
        raise AssertionError("who looks changes nothing")

    def close(self) -> None:
        pass

    def _answer(self) -> MemoryBackend:
        if not self.heard:
            raise UnavailableError("not heard")
        return self.site.body.memory


def read(store: MemoryBackend, key: str) -> bytes:
    """A whole object."""
    stat = store.stat(key)
    assert stat is not None
    out = bytearray(stat.size_bytes)
    store.read_into(key, memoryview(out))
    return bytes(out)
