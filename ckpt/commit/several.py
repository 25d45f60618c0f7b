"""A log on several stores: what is read from all of them is one log, and what is written is on W of them."""

from __future__ import annotations

from contextlib import suppress

from ckpt.backends.checked import Replicated
from ckpt.commit.claims import FiledSequencer, StoresSequencer, silent
from ckpt.commit.copies import Copies, copies_of
from ckpt.commit.fold import empty
from ckpt.commit.folds import FOLD_BYTES_MAX, decode_fold
from ckpt.commit.gather import Gathered, Held, Silent, Tail, gather
from ckpt.commit.reader import LOOKS_MAX, RECORDS_AT_ONCE, Note
from ckpt.commit.sequencer import Claimed, Lost, Sequencer, Unknown
from ckpt.commit.sqlite import SqliteSequencer, database_path
from ckpt.commit.state import LogState, StoreSet
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UnavailableError, UsageError
from ckpt.manifest import keys
from ckpt.manifest.records import BY_SQLITE, BY_STORES, RECORD_BYTES_MAX, Record, Stores, decode_record


class SeveralStores:
    """See LogAccess. ``backend`` writes objects to the same stores; it learns which of them count."""

    def __init__(self, backend: Replicated, copies: Copies, *, job: str, log_id: str) -> None:
        self._backend = backend
        self._copies = copies
        self._job = job
        self._log_id = log_id
        self._ids: tuple[str, ...] = ("",) * len(copies.stores)
        self._tail: Tail | None = None

    @property
    def job(self) -> str:
        """See LogAccess."""
        return self._job

    @property
    def log_id(self) -> str:
        """See LogAccess."""
        return self._log_id

    @property
    def copies(self) -> Copies:
        """The stores."""
        return self._copies

    @property
    def ids(self) -> tuple[str, ...]:
        """Which store each one was when the log was last read; empty for one that did not answer, or is new."""
        return self._ids

    def full(self, members: StoreSet) -> frozenset[int]:
        """Which stores, by number, are in ``members`` and answered when the log was last read."""
        return frozenset(number for number, store_id in enumerate(self._ids) if store_id in members.ids)

    def start(self) -> tuple[LogState, tuple[Note, ...]]:
        """See LogAccess. A fold proves right by its own digest and by the record it ends with, whichever store has it."""
        notes: list[Note] = []
        seqs = {seq for key in self._copies.listed(keys.FOLDS) if (seq := keys.parse_fold_key(key)) is not None}
        for seq in sorted(seqs, reverse=True):
            ends = self._ends(seq)
            for held in self._copies.read(keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX):
                if isinstance(held, Silent):
                    continue
                try:
                    state = decode_fold(held)
                except (IntegrityError, FormatVersionError) as error:
                    notes.append(Note("fold passed over", keys.fold_key(seq), str(error)))
                    continue
                if (state.job, state.next_seq) == (self._job, seq + 1) and state.head_digest in ends:
                    return state, tuple(notes)
                notes.append(
                    Note("fold passed over", keys.fold_key(seq), "it is not the fold of the record that it names")
                )
        return empty(self._job), tuple(notes)

    def _ends(self, seq: int) -> set[str]:
        """The digests of the records that stores hold at a place."""
        digests = set()
        for key in (keys.settled_key(seq), keys.log_key(seq)):
            for held in self._copies.read(key, bytes_max=RECORD_BYTES_MAX):
                if isinstance(held, bytes):
                    with suppress(IntegrityError):  # a damaged copy ends nothing
                        digests.add(decode_record(held).digest)
        return digests

    def read_on(self, state: LogState) -> LogState:
        """See LogAccess. Cost: one list, one small read and one per new record for each store, all stores at once."""
        looks = 0
        while True:
            got = self._gather(state)
            if got.state.hole is not None and (looks := looks + 1) < LOOKS_MAX:
                continue  # a list made while records are written may show the later one alone
            self._take(got)
            if got.state.hole is not None or got.state.next_seq - state.next_seq < RECORDS_AT_ONCE:
                return got.state
            state = got.state

    def record_at(self, seq: int) -> bytes:
        """See LogAccess."""
        for key in (keys.settled_key(seq), keys.log_key(seq)):
            counts: dict[bytes, int] = {}
            for held in self._copies.read(key, bytes_max=RECORD_BYTES_MAX):
                if isinstance(held, bytes):
                    counts[held] = counts.get(held, 0) + 1
            if counts:
                return max(counts, key=lambda data: (counts[data], data))
        raise NotFoundError(f"no store that answers has this record. key={keys.log_key(seq)}")

    def require_giver(self, state: LogState) -> None:
        """See LogAccess."""
        if state.stores is not None:
            self._sequencer(state.stores)

    def claim(self, state: LogState, record: Record) -> Claimed | Lost | Unknown:
        """See LogAccess. The record before is brought to W stores first; so is ``record``, on a set that it changes too."""
        members = state.stores or _first_set(record)
        if members is None:
            raise UsageError("the first record of a log on several stores says which they are.")
        if (doubt := self._finish_tail(members)) is not None:
            return doubt
        made = self._sequencer(members).claim(record.seq, record.encode())
        if isinstance(made, Claimed) and isinstance(record.body, Stores):
            # The new set needs its copies before another record follows; which stores are in it is known when the log is read.
            self._tail = Tail(record, members.write_quorum, settled=False, members=members)
            everywhere = range(len(self._copies.stores))
            self._copies.create(keys.log_key(record.seq), record.encode(), everywhere, record.body.write_quorum)
        return made

    def put_fold(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess."""
        return self._put(key, data)

    def put_manifest(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        """See LogAccess. Its key holds its digest: putting it again changes nothing."""
        try:
            self._backend.put(key, [data])
        except UnavailableError as error:
            return Unknown(str(error))
        return Claimed()

    def _gather(self, state: LogState) -> Gathered:
        held = self._copies.held(state.next_seq - 1, self._log_id)
        if not any(isinstance(one, Held) for one in held):
            why = silent(self._copies, {n: one for n, one in enumerate(held) if isinstance(one, Silent)})
            raise UnavailableError(f"none of the log's stores answers. {why} repeat later")
        self._ids = tuple(one.store_id if isinstance(one, Held) else "" for one in held)
        return gather(state.without_hole(), held, self._copies.urls)

    def _take(self, got: Gathered) -> None:
        self._backend.count_only(got.full)
        if got.tail is not None:
            self._tail = got.tail

    def _finish_tail(self, members: StoreSet) -> Unknown | None:
        """Bring the last record to where it must be before another follows; what is in doubt, or None."""
        tail = self._tail
        if tail is None:
            return None
        data = tail.record.encode()
        if tail.copies < tail.members.write_quorum and not tail.settled:
            made = self._sequencer(tail.members).claim(tail.record.seq, data)
            if not isinstance(made, Claimed):
                return Unknown(
                    f"the record before is on too few stores, and can't be brought to more now. seq={tail.record.seq} "
                    f"{made.why if isinstance(made, Unknown) else 'other bytes are there'}"
                )
        elif tail.copies < tail.members.write_quorum or isinstance(tail.record.body, Stores):
            # Of a record that changes the set, the new set needs its copies too.
            key = keys.settled_key(tail.record.seq) if tail.settled else keys.log_key(tail.record.seq)
            found = self._copies.create(key, data, self.full(members), members.write_quorum)
            if copies_of(data, found) < members.write_quorum:
                return Unknown(
                    f"the record before is on too few stores. seq={tail.record.seq} {silent(self._copies, found)}"
                )
        self._tail = None
        return None

    def _sequencer(self, members: StoreSet) -> Sequencer:
        full = self.full(members)
        absent = len(members.ids) - len(full)
        if members.sequencer == BY_STORES:
            able = self._copies.creators(full)
            if len(able) + absent < members.write_quorum:
                raise UsageError(
                    f"too few stores create a key only once, so they can't give out the log's places. able={len(able)} "
                    f"needed={members.write_quorum} stores={list(self._copies.urls)}; take over with `ckpt stores takeover`"
                )
            return StoresSequencer(self._copies, full, members.write_quorum, absent=absent)
        if members.sequencer.startswith(BY_SQLITE):
            file = SqliteSequencer(database_path(self._log_id), self._log_id)
            if file.name != members.sequencer:
                raise UsageError(
                    f"another machine gives out the places of this log. sequencer={members.sequencer} mine={file.name}; "
                    "run there, or take over with `ckpt stores takeover`"
                )
            return FiledSequencer(file, self._copies, full, members.write_quorum, absent=absent)
        raise UsageError(f"this release does not know who gives out the log's places. sequencer={members.sequencer}")

    def _put(self, key: str, data: bytes) -> Claimed | Lost | Unknown:
        answering = {number for number, store_id in enumerate(self._ids) if store_id}
        found = self._copies.create(key, data, answering, self._backend.write_quorum)
        if copies_of(data, found):
            return Claimed()
        other = next((held for held in found.values() if isinstance(held, bytes)), None)
        return Lost(other) if other is not None else Unknown(silent(self._copies, found))


def _first_set(record: Record) -> StoreSet | None:
    body = record.body
    return StoreSet(body.ids, body.write_quorum, body.sequencer) if isinstance(body, Stores) else None
