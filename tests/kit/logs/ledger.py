"""What really happened to a simulated log: every record that ever landed anywhere, and what writers
were told."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Record, Stores, decode_record
from ckpt.format.store import JobRecord
from ckpt.log.fold import empty, fold
from ckpt.log.quorum import is_placeholder
from ckpt.log.state import LogState, StoreSet

JOB = "sim"


@dataclass(eq=False)
class Body:
    """One life of a store, until it is wiped: what it holds, and who it says it is."""

    memory: MemoryBackend
    store_id: str = ""
    planned_id: str = ""
    first_bytes: dict[str, bytes] = field(default_factory=dict)


class Ledger:
    """Checks at each landing what must hold of all stores together (invariants 1, 2, 3, 5, 6 and 13
    of the design)."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.states: dict[str, LogState] = {}
        self.winner: dict[int, str] = {}
        """By place the record that counts: that was on W stores at some time."""
        self.logs: set[str] = set()
        """The ids of all logs that any store ever belonged to."""
        self.told: list[str] = []
        """The longest history that a writer was told of."""
        self._copies: dict[tuple[str, bool], set[Body]] = defaultdict(set)
        self._settled: dict[int, str] = {}

    def landed(self, body: Body, key: str, data: bytes) -> None:
        """Note what a store now holds at a key."""
        known = body.first_bytes.setdefault(key, data)
        assert known == data, f"the bytes of a key never change. key={key}"
        if key == keys.JOB_KEY:
            named = JobRecord.decode(data)
            body.store_id = named.store_id
            self.logs.add(named.log_id)
            for digest, second in list(self._copies):
                if body in self._copies[digest, second]:  # what is here counts from now on
                    self._count(self.records[digest])
        seq = keys.parse_log_key(key)
        second = seq is None
        seq = keys.parse_settled_key(key) if second else seq
        if seq is not None:
            record = decode_record(data)
            assert record.seq == seq
            self._meet(record)
            self._copies[record.digest, second].add(body)
            if second:
                assert self._settled.setdefault(seq, record.digest) == record.digest, (
                    "one record is settled a place"
                )
            self._count(record)

    def chain(self, digest: str) -> list[str]:
        """The digests of the records up to and with this one, from the first."""
        found = []
        while digest:
            found.append(digest)
            digest = self.records[digest].prev
        return found[::-1]

    def tell(self, head: str) -> None:
        """A writer was told that its record, the last one of this history, counts."""
        chain = self.chain(head)
        record = self.records[head]
        members = self.members_of(record)
        needed = members.write_quorum
        real = sum(not is_placeholder(store_id) for store_id in members.ids)
        if members.sequencer == BY_STORES:
            sure = self._on(head, True, members) >= needed or self._on(head, False, members) >= real
        else:
            sure = max(self._on(head, key, members) for key in (False, True)) >= needed
        assert sure, f"told before it is certain. seq={record.seq}"
        shorter, longer = sorted((self.told, chain), key=len)
        assert longer[: len(shorter)] == shorter, "one history is told to all writers"
        self.told = longer

    @property
    def state(self) -> LogState:
        """The fold of what writers were told."""
        return self.states[self.told[-1]] if self.told else empty(JOB)

    @property
    def latest(self) -> LogState:
        """The fold of all that counts, told or not."""
        return self.states[self.winner[max(self.winner)]] if self.winner else empty(JOB)

    def sets(self) -> list[tuple[str, ...]]:
        """The ids of each set of stores that is in force, or may come to be."""
        found = [] if self.state.stores is None else [self.state.stores.ids]
        return found + [
            one.body.ids
            for one in self.records.values()
            if one.seq >= len(self.told) and isinstance(one.body, Stores)
        ]

    def members_of(self, record: Record) -> StoreSet:
        """Which set of stores a record had to be on."""
        if record.seq:
            members = self.states[record.prev].stores
            assert members is not None
            return members
        body = record.body
        assert isinstance(body, Stores)
        return StoreSet(body.ids, body.write_quorum, body.sequencer)

    def counts(self, digest: str) -> bool:
        """Whether the record was on W stores."""
        members = self.members_of(self.records[digest])
        return any(self._on(digest, key, members) >= members.write_quorum for key in (False, True))

    def votes(self, seq: int) -> dict[str, set[Body]]:
        """Who ever held which record at the first key of a place."""
        return {
            d: bodies
            for (d, second), bodies in self._copies.items()
            if not second and self.records[d].seq == seq
        }

    def _meet(self, record: Record) -> None:
        if record.digest in self.records:
            return
        if record.seq:
            before = self.records.get(record.prev)
            assert before is not None and before.seq == record.seq - 1, (
                "a record follows one that exists"
            )
            assert self.counts(record.prev), (
                f"nothing is written before what it follows counts. seq={record.seq}"
            )
            after = self.states[record.prev].stores
            assert after is not None
            on = len(
                {body.store_id for key in (False, True) for body in self._copies[record.prev, key]}
                & set(after.ids)
            )
            assert on >= after.write_quorum, (
                "a new set has its copies before another record follows"
            )
        self.records[record.digest] = record
        before_state = self.states[record.prev] if record.prev else empty(JOB)
        self.states[record.digest] = state = fold(before_state, [record])
        assert state.hole is None

    def _count(self, record: Record) -> None:
        if self.counts(record.digest):
            known = self.winner.setdefault(record.seq, record.digest)
            assert known == record.digest, f"at most one record counts a place. seq={record.seq}"
        settled = self._settled.get(record.seq)
        if settled is not None and record.seq in self.winner:
            assert self.winner[record.seq] == settled, "what is settled is what counts"

    def _on(self, digest: str, second: bool, members: StoreSet) -> int:
        return len({body.store_id for body in self._copies[digest, second]} & set(members.ids))


def record_or_none(data: bytes) -> Record | None:
    """The record in these bytes, if they are one."""
    try:
        return decode_record(data)
    except IntegrityError:
        return None
