"""What really happened to a simulated log: every record that ever landed anywhere, and what writers
were told."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from ckpt.backends.memory import MemoryBackend
from ckpt.format import keys
from ckpt.format.records import BY_STORES, Record, Stores, decode_record, is_closed
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
        """By place the record that counts."""
        self.logs: set[str] = set()
        """The ids of all logs that any store ever belonged to."""
        self.declared_lost: set[str] = set()
        """Stores that somebody gave up."""
        self.told: list[str] = []
        """The longest history that a writer was told of."""
        self._copies: dict[tuple[str, int | None], set[Body]] = defaultdict(set)
        """Who holds which record: at the first key (None), or settled in a round."""
        self._settled: dict[tuple[int, int], str] = {}

    def landed(self, body: Body, key: str, data: bytes) -> None:
        """Note what a store now holds at a key."""
        known = body.first_bytes.setdefault(key, data)
        if known != data:
            self._replaced(body, key, data)
        if key == keys.JOB_KEY:
            named = JobRecord.decode(data)
            body.store_id = named.store_id
            self.logs.add(named.log_id)
            for digest, number in list(self._copies):
                if body in self._copies[digest, number]:  # what is here counts from now on
                    self._count(self.records[digest])
        if (seq := keys.parse_log_key(key)) is not None:
            self._landed_record(body, seq, None, data)
        elif (seq := keys.parse_settled_key(key)) is not None:
            self._landed_record(body, seq, 0, data)
        elif (later := keys.parse_round_key(key)) is not None:
            seq, number, settled = later
            if settled:
                self._landed_record(body, seq, number, data)
            else:
                self._meet(decode_record(data))

    def _landed_record(self, body: Body, seq: int, number: int | None, data: bytes) -> None:
        if is_closed(data):
            assert number is not None, "only what is settled is ever closed"
            return
        record = decode_record(data)
        assert record.seq == seq
        self._meet(record)
        if number is not None and not self.counts(record.digest):
            # What counts may replace it at the first settled key.
            known = self._settled.setdefault((seq, number), record.digest)
            assert known == record.digest, f"one record is settled a round. seq={seq}"
        self._copies[record.digest, number].add(body)
        self._count(record)

    def _replaced(self, body: Body, key: str, data: bytes) -> None:
        """Another object is at the key now: only what counts may replace what lost, or nothing."""
        assert keys.parse_settled_key(key) is not None, f"a key's bytes never change. key={key}"
        assert self.counts(decode_record(data).digest), "only what counts is put for good"
        if not is_closed(body.first_bytes[key]):
            self._copies[decode_record(body.first_bytes[key]).digest, 0].discard(body)
        body.first_bytes[key] = data

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
        if members.sequencer == BY_STORES:
            sure = self._on_enough(head, 0, members) or self._on_all(head, members)
        else:
            sure = any(self._on_enough(head, key, members) for key in (None, 0))
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
        """Whether the record was on all stores, or settled on W in some round: or, where the stores
        do not vote, on W."""
        members = self.members_of(self.records[digest])
        numbers = {number for known, number in self._copies if known == digest}
        if members.sequencer == BY_STORES:
            numbers.discard(None)
            if self._on_all(digest, members):
                return True
        return any(self._on_enough(digest, number, members) for number in numbers)

    def give_up(self, ids: Collection[str]) -> None:
        """A person declares stores lost: what all others hold may count now, if those are few."""
        self.declared_lost.update(ids)
        for record in list(self.records.values()):
            self._count(record)

    def votes(self, seq: int) -> dict[str, set[Body]]:
        """Who ever held which record at the first key of a place."""
        return {
            d: bodies
            for (d, number), bodies in self._copies.items()
            if number is None and self.records[d].seq == seq
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
            bodies = self._copies[record.prev, None] | self._copies[record.prev, 0]
            assert self._enough(bodies, after), (
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

    def _on(self, digest: str, number: int | None, members: StoreSet) -> int:
        return len({body.store_id for body in self._copies[digest, number]} & set(members.ids))

    def _on_enough(self, digest: str, number: int | None, members: StoreSet) -> bool:
        return self._enough(self._copies[digest, number], members)

    def _enough(self, bodies: set[Body], members: StoreSet) -> bool:
        """Whether these are W of the members, or all that are left if those are fewer."""
        on = {body.store_id for body in bodies}.intersection(members.ids)
        real = {store_id for store_id in members.ids if not is_placeholder(store_id)}
        left = real - self.declared_lost
        return len(on) >= members.write_quorum or (len(left) < members.write_quorum and left <= on)

    def _on_all(self, digest: str, members: StoreSet) -> bool:
        real = sum(not is_placeholder(store_id) for store_id in members.ids)
        return self._on(digest, None, members) >= real
