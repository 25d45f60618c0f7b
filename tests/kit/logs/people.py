"""Who acts in the simulated world: writers, readers that live long, and a person who changes the
set of stores."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ckpt.errors import (
    CkptError,
    CommitUnknownError,
    ConflictError,
    FencedError,
    IntegrityError,
    KeyExistsError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.manifest import Manifest, PartRef
from ckpt.format.records import BY_STORES, Stores
from ckpt.format.store import JobRecord
from ckpt.log.journal import Journal
from ckpt.log.replicated import ReplicatedLog
from ckpt.log.state import LogState, StoreSet
from ckpt.values import SnapshotId
from kit.logs.ledger import JOB
from kit.logs.simulation import Death, LogSimulation, Process, Way
from kit.logs.stores import SmallReplicated


@dataclass(frozen=True)
class Plan:
    """What a user says: at which sites the log is, by number, and on how many a record must be."""

    sites: tuple[int, ...]
    write_quorum: int


class Scene:
    """A world, and what its people know and did."""

    def __init__(self, world: LogSimulation, plan: Plan) -> None:
        self.world = world
        self.plan = plan
        self.opened: list[int] = []
        self.committed: dict[SnapshotId, str] = {}
        self.dropped: set[SnapshotId] = set()
        self.refused: set[str] = set()

    def known_plan(self) -> Plan:
        """What a user says who knows where the log lies now."""
        members = self.world.ledger.latest.stores
        if members is None:
            return self.plan
        sites: list[int] = []
        everywhere = range(len(self.world.sites))
        for store_id in (
            members.ids
        ):  # where several were one after the other, the last is named once, and some other place
            free = [
                n
                for n in (self.world.where.get(store_id), *everywhere)
                if n is not None and n not in sites
            ]
            sites.append(free[0])
        self.plan = Plan(tuple(sites), members.write_quorum)
        return self.plan

    def backend(self, process: Process, plan: Plan) -> SmallReplicated:
        """The stores of a plan, as a process reaches them."""
        return SmallReplicated(
            [Way(self.world.sites[n], process) for n in plan.sites], plan.write_quorum
        )

    def told(self, journal: Journal) -> None:
        """An operation of this journal succeeded."""
        state = journal._state
        assert state is not None and state.head_digest
        self.world.ledger.tell(state.head_digest)

    def strays(self) -> bool:
        """Whether a store that was wiped was made another log's at some time: such a one has to be
        cleared by hand."""
        return len(self.world.ledger.logs) > 1

    def seen(self, state: LogState, told: int, *, flagged: bool) -> None:
        """What a reader saw; ``told``: how many records writers had been told of when it began."""
        ledger = self.world.ledger
        chain = ledger.chain(state.head_digest)
        for seq, digest in enumerate(chain[:-1]):
            assert ledger.winner.get(seq) == digest, f"what is followed counts. seq={seq}"
        if not flagged:
            assert len(chain) >= told, f"what was told is seen. told={told} seen={len(chain)}"
            assert chain[:told] == ledger.told[:told], "there is one history"


class Person:
    """One who acts as a process, with a journal of its own, and starts anew when killed."""

    def __init__(self, scene: Scene, name: str, folder: str) -> None:
        self.scene = scene
        self.world = scene.world
        self.name = name
        self.folder = folder
        self.lives = 0
        self.process: Process | None = None
        self.journal: Journal | None = None
        self.everywhere = False

    def act(self) -> None:
        self.world.busy.append(self)
        if self.process is None:
            self.lives += 1
            self.process = Process(self.world, self.folder)
        try:
            with self.process.running():
                self.do()
        except Death:
            self.process.end()
            self.process = self.journal = None
            self.died()
        except (CkptError, CommitUnknownError) as error:
            self.failed(error)
        finally:
            self.world.busy.remove(self)

    def open(self, *, create: bool) -> Journal:
        """A journal of this life."""
        if self.journal is None and self.everywhere:
            # As who changes the set: with the stores of the old set and the new one.
            plan = Plan(tuple(range(len(self.world.sites))), self.scene.plan.write_quorum)
            assert self.process is not None
            self.journal = Journal.open(self.scene.backend(self.process, plan), job=JOB)
        if self.journal is None:
            assert self.process is not None
            before = self.scene.plan
            plan = self.scene.known_plan()
            backend = self.scene.backend(
                self.process, before if self.world.dice.random() < 0.1 else plan
            )
            self.journal = Journal.open(backend, job=JOB, create=create)
        return self.journal

    def do(self) -> None:
        raise NotImplementedError

    def died(self) -> None:
        """What is forgotten with a process."""

    def failed(self, error: CkptError) -> None:
        """Any error of an action."""


class Writer(Person):
    """Opens epochs, commits what it or a dead one captured, drops and tags."""

    def __init__(self, scene: Scene, name: str, folder: str, *, may_write: bool = True) -> None:
        super().__init__(scene, name, folder)
        self.may_write = may_write
        self.epoch = 0
        self.step = 0
        self.last: Manifest | None = None

    def died(self) -> None:
        self.epoch = 0

    def failed(self, error: CkptError) -> None:
        match error:
            case FencedError():
                assert self.world.ledger.winner, "somebody else opened an epoch"
                self.world.note("fenced")
                self.epoch = 0
            case CommitUnknownError():
                self.world.note("unknown")
            case UsageError():
                self.world.note("usage")
                known = (
                    "the log is on",
                    "gives out the positions",
                    "does not give out the positions",
                )
                assert any(fact in str(error) for fact in known) or self.scene.strays(), str(error)
                self.journal = None
            case ConflictError() | IntegrityError() | UnavailableError() | NotFoundError():
                self.world.note(type(error).__name__)
            case _:
                raise error

    def do(self) -> None:
        journal = self.open(create=True)
        dice = self.world.dice
        if self.epoch == 0 or dice.random() < 0.1:
            self.epoch = journal.open_epoch(resume=self._resume(journal))
            self._told(journal)
            self.scene.opened.append(self.epoch)
            return
        match dice.random():
            case x if x < 0.7:
                self._commit(journal)
            case x if x < 0.85:
                found = journal.refresh().snapshots
                if len(found) > 1:
                    pair = found[0].snapshot
                    self.scene.dropped.add(pair)  # from now on either is right
                    journal.drop([pair], floor=pair if dice.random() < 0.5 else None)
                    self._told(journal)
            case _:
                newest = journal.refresh().newest()
                if newest is not None:
                    journal.tag(dice.choice("ab"), newest)
                    self._told(journal)

    def _told(self, journal: Journal) -> None:
        assert self.may_write, "this machine gives out no places"
        self.scene.told(journal)

    def _resume(self, journal: Journal) -> SnapshotId | None:
        line = journal.refresh().lineage
        return self.world.dice.choice([*line[:2], None]) if line else None

    def _commit(self, journal: Journal) -> None:
        found = self.last
        if found is None or self.world.dice.random() < 0.5:
            found = self.last = self._manifest(journal)
        # Else it repeats what it, or a life before, did not hear of: also as a keeper does for a
        # dead epoch.
        try:
            journal.commit(found, epoch=self.epoch)
        except ConflictError:
            self.scene.refused.add(found.digest)
            self.last = None
            raise
        self._told(journal)
        self.world.note("commits")
        self.scene.committed[found.snapshot] = found.digest
        self.scene.refused.discard(found.digest)
        self.last = None

    def _manifest(self, journal: Journal) -> Manifest:
        self.step += 1
        captured = self.epoch if self.world.dice.random() < 0.8 else max(1, self.epoch - 1)
        pair = SnapshotId(captured, self.step)
        base = journal.refresh().newest()
        writer = keys.writer_name(self.name, f"{self.lives:016x}")
        ref = PartRef(key=keys.part_key(pair, writer), digest="0" * 32, size_bytes=1, rank=0)
        return Manifest(
            job=JOB,
            snapshot=pair,
            world_size=1,
            base=base if base != pair else None,
            parts=(ref,),
            size_bytes=1,
            new_bytes=1,
            created_unix_s=float(self.epoch),
            metadata={"by": f"{self.name} {self.lives}"},
        )


class Reader(Person):
    """Looks at the log again and again with the same journal."""

    def do(self) -> None:
        journal = self.open(create=False)
        told = len(self.world.ledger.told)
        state = journal.refresh()
        self.world.note("flagged looks" if state.stale_reason else "sure looks")
        self.scene.seen(state, told, flagged=bool(state.stale_reason))
        if self.world.dice.random() < 0.1:
            self.journal = None

    def failed(self, error: CkptError) -> None:
        assert isinstance(error, NotFoundError | UnavailableError | UsageError), error
        self.journal = None


class Operator(Person):
    """Replaces a store that was lost, swaps one for another, changes W: by a record, after the log
    was copied."""

    def do(self) -> None:
        ledger, dice = self.world.ledger, self.world.dice
        members = ledger.state.stores
        if members is None or any(
            isinstance(one, Operator) for one in self.world.busy if one is not self
        ):
            return
        if ledger.latest.stores != members:
            self._finish_change()
            return
        lost = [site for site in self.world.sites if site.lost]
        if lost and dice.random() < 0.3:
            self.world.declare_lost(dice.choice(lost))
            return
        inside = {
            site.body.store_id: site.number
            for site in self.world.sites
            if site.body.store_id in members.ids and not site.lost
        }
        for store_id, number in inside.items():
            if number in self.world.unfilled:
                self._fill(number)
                self._healed(number, store_id)
                return
        outside = [
            site.number
            for site in self.world.sites
            if site.number not in inside.values()
            and not site.lost
            and (site.creates or members.sequencer != BY_STORES)
        ]
        gone = [place for place, store_id in enumerate(members.ids) if store_id not in inside]
        if gone and len(inside) < members.write_quorum:
            self._give_up(members, inside, dice.choice([None, *outside]))
            return
        if outside and (gone or dice.random() < 0.5):
            self._replace(
                members, gone[0] if gone else dice.randrange(len(members.ids)), dice.choice(outside)
            )
        else:
            self._append(members.ids, dice.randint(len(members.ids) // 2 + 1, len(members.ids)))

    def _replace(self, members: StoreSet, place: int, number: int) -> None:
        """Take the store at a site into the set, in place of another one."""
        if not self.world.may_lose(number):
            return
        store_id = self._prepare(number)
        ids = tuple(store_id if n == place else known for n, known in enumerate(members.ids))
        if not self.world.may_lose(number, ids):
            return
        self.world.unfilled.add(number)
        self._append(ids, members.write_quorum)
        self._fill(number)
        self._healed(number, store_id)

    def _give_up(self, members: StoreSet, left: Collection[str], number: int | None) -> None:
        """Too few stores are left for a record of the whole set: they go on by themselves, or with
        the store at a site."""
        world = self.world
        ids = tuple(store_id for store_id in members.ids if store_id in left)
        if not self._may_give_up(ids, members):
            return
        if number is not None and not world.may_lose(number):
            number = None
        if number is None and len(ids) == 1 and members.sequencer != BY_STORES:
            return  # what overwrites holds no log alone
        journal = self._everywhere()
        assert isinstance(journal.access, ReplicatedLog)
        here = {site.body.store_id for site in world.sites if not site.lost}
        pending = {store_id for one in world.ledger.sets() for store_id in one}
        world.ledger.give_up(pending - here)
        with journal.access.declared_lost(world.ledger.declared_lost):
            # First of all: what is not decided yet is, and what is filled has all of it.
            state = journal.refresh_confirmed()
            if state.head_digest:
                self.scene.told(journal)  # who gave stores up before may have died in between
            if state.stores != members:
                return  # or nothing was heard of the log
            # As `remove` does: what was recorded when W was lower is on fewer stores.
            for site in world.sites:
                if site.body.store_id in ids:
                    self._fill(site.number)
            store_id = ""
            if number is not None:
                store_id = self._prepare(number)
                ids = (*ids, store_id)
                world.unfilled.add(number)
            quorum = len(ids) // 2 + 1
            world.quorum_min = min(world.quorum_min, quorum)
            self._change(journal, Stores(ids, quorum, members.sequencer), members)
        world.note("gave up stores")
        if number is not None:
            self._fill(number)
            self._healed(number, store_id)

    def _may_give_up(self, left: Collection[str], members: StoreSet) -> bool:
        """Whether those that are left have all that was told, and are too few to need no word."""
        sites = [site.number for site in self.world.sites if site.body.store_id in left]
        return members.answers_min <= len(left) < members.write_quorum and not (
            self.world.hurt.intersection(sites)
        )

    def _append(self, ids: tuple[str, ...], quorum: int) -> None:
        self.world.quorum_min = min(self.world.quorum_min, quorum)
        if not self.world.may_lose(-1, ids):
            return
        before = self.world.ledger.state.stores
        assert before is not None
        self._change(self._everywhere(), Stores(ids, quorum, before.sequencer), before)

    def _change(self, journal: Journal, body: Stores, before: StoreSet) -> None:
        self.world.planned.append((math.inf, body.ids))
        try:
            journal.change_stores(body, before=before)
        finally:
            self.world.planned[-1] = (self.world.ledger.latest.next_seq + 1, body.ids)
        self.scene.told(journal)
        self.world.note("set changes")

    def _finish_change(self) -> None:
        """Of a change it is not known whether it counts: it is looked at until it does, or not, for
        good."""
        journal = self._everywhere()
        assert isinstance(journal.access, ReplicatedLog)
        here = {site.body.store_id for site in self.world.sites if not site.lost}
        told, latest = self.world.ledger.state.stores, self.world.ledger.latest.stores
        for members in filter(None, (told, latest)):
            left = here.intersection(members.ids)
            if self._may_give_up(left, members):
                self.world.ledger.give_up(set(members.ids) - left)
        with journal.access.declared_lost(self.world.ledger.declared_lost):
            if journal.refresh_confirmed().head_digest:
                self.scene.told(journal)

    def _everywhere(self) -> Journal:
        plan = Plan(tuple(range(len(self.world.sites))), self.scene.plan.write_quorum)
        return Journal.open(self.scene.backend(self._process(), plan), job=JOB)

    def _healed(self, number: int, store_id: str) -> None:
        """The store has all that was told, if it is still the same, and still in the set."""
        members = self.world.ledger.state.stores
        assert members is not None
        site = self.world.sites[number]
        if not site.lost and site.body.store_id == store_id in members.ids:
            self.world.unfilled.discard(number)

    def _prepare(self, number: int) -> str:
        """Copy what was told to a store that is not in the set, then give it an id of its own:
        last, for that makes it one."""
        self._fill(number)
        body = self.world.sites[number].body
        if not body.store_id:
            source = next(site.body for site in self.world.sites if site.body.store_id)
            record = JobRecord.decode(source.first_bytes[keys.JOB_KEY])
            # Where a late put may replace what is there, it is the same id: another one would make
            # another store of it.
            body.planned_id = body.planned_id or f"{self.world.dice.getrandbits(128):032x}"
            mine = JobRecord(job=JOB, store_id=body.planned_id, log_id=record.log_id)
            self._put(Way(self.world.sites[number], self._process()), keys.JOB_KEY, mine.encode())
        return self.world.sites[number].body.store_id or body.planned_id

    def _fill(self, number: int) -> None:
        """Copy the log and all manifests."""
        ledger = self.world.ledger
        way = Way(self.world.sites[number], self._process())
        for digest in ledger.told[:]:
            record = ledger.records[digest]
            data = record.encode()
            there = [
                way.site.body.first_bytes.get(key(record.seq))
                for key in (keys.log_key, keys.settled_key)
            ]
            if data not in there and there[0] is None:
                self._put(way, keys.log_key(record.seq), data)
            elif data not in there:
                # Whatever was settled there lost in a later round.
                way.put(keys.settled_key(record.seq), [data])
        for site in self.world.sites:
            for key, data in list(site.body.first_bytes.items()):
                if key.startswith(keys.MANIFESTS) and key not in way.site.body.first_bytes:
                    self._put(way, key, data)

    def _put(self, way: Way, key: str, data: bytes) -> None:
        try:
            way.put(key, [data], create_only=way.site.creates)
        except KeyExistsError as error:
            raise UnavailableError("a late put came first; look again") from error

    def _process(self) -> Process:
        assert self.process is not None
        return self.process

    def failed(self, error: CkptError) -> None:
        known = ("positions", "more than the stores of the set that exist")
        assert (
            not isinstance(error, UsageError)
            or any(text in str(error) for text in known)
            or self.scene.strays()
        ), error
        self.world.note("changes that failed")
