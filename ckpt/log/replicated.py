"""A log on several stores: what is read from all of them is one log, and what is written is on W of
them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ckpt.backends.checked import MultiStoreBackend
from ckpt.errors import (
    FencedError,
    FormatVersionError,
    IntegrityError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from ckpt.format import keys
from ckpt.format.canonical import UPGRADE
from ckpt.format.records import (
    BY_ETCD,
    BY_SQLITE,
    BY_STORES,
    RECORD_BYTES_MAX,
    Record,
    Stores,
    decode_record,
    make_record,
)
from ckpt.log.fold import empty
from ckpt.log.quorum import (
    Beaten,
    LastRecord,
    MergedLog,
    NoAnswer,
    Split,
    StoreRecords,
    Undecided,
    Won,
    contest,
    is_placeholder,
    merge_stores,
)
from ckpt.log.reader import HOLE_READS_MAX, RECORDS_AT_ONCE, LogNote
from ckpt.log.replicas import NO_ANSWER_YET, LogReplicas, count_copies
from ckpt.log.sequencers import (
    Appended,
    KeyTaken,
    Sequencer,
    SqliteSequencer,
    WriteUnknown,
    database_path,
    require_etcd,
)
from ckpt.log.state import LogState, StoreSet
from ckpt.log.stored_fold import FOLD_BYTES_MAX, decode_fold

# Claims on a log that lies on several stores: by the stores together, or through a file or etcd;
# copies at last.


class QuorumSequencer:
    """See Sequencer. The stores that create only once decide together: what W of them hold has the
    place, for good.

    ``full``: the ids of the stores that count and answer, by number; ``absent``: how many others
    count. A store that refuses to create only once has a vote all the same, which is not known: it
    may refuse only now, or only to this writer.
    """

    def __init__(
        self, copies: LogReplicas, full: Mapping[int, str], quorum: int, *, absent: int
    ) -> None:
        self._copies = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See Sequencer. Returns when all stores hold the record, or W hold it at the second key
        too."""
        found = self._copies.create(keys.log_key(seq), data, self._full, self._quorum, vote=True)
        bytes_of = {
            digest: held
            for held in found.values()
            if isinstance(held, bytes) and (digest := _digest(held, seq))
        }
        mine = _digest(data, seq)
        held_by = [_digest(held, seq) or None for held in found.values()]
        match contest(mine, held_by + [None] * self._absent, self._quorum):
            case Won(sure):
                return Appended() if sure else self._settle(seq, data, data)
            case Beaten(digest):
                return KeyTaken(bytes_of[digest])
            case Split(digest):
                return self._settle(seq, bytes_of[digest], data)
            case Undecided():
                return WriteUnknown(
                    f"too few stores answered. {silent_stores(self._copies, found)}"
                )

    def _settle(self, seq: int, winner: bytes, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        found = self._copies.create(keys.settled_key(seq), winner, self._full, self._quorum)
        if count_copies(winner, found) < self._quorum:
            return WriteUnknown(
                "it is decided whose the place is, on too few stores yet. "
                f"{silent_stores(self._copies, found)}"
            )
        return Appended() if winner == data else KeyTaken(winner)


class CopyingSequencer:
    """See Sequencer. ``file`` (or etcd) gives out places; a record that has one is copied to W of
    the stores that count."""

    def __init__(
        self,
        file: Sequencer,
        copies: LogReplicas,
        full: Mapping[int, str],
        quorum: int,
        *,
        absent: int,
    ) -> None:
        self._file = file
        self._copies = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See Sequencer. Another's record is copied too: its writer may have died before it did.

        Raises FencedError where the stores hold what it never gave out.
        """
        given = self._file.append(seq, data)
        if isinstance(given, WriteUnknown):
            return given
        winner = given.data if isinstance(given, KeyTaken) else data
        found = self._copies.create(keys.log_key(seq), winner, self._full, self._quorum)
        if count_copies(winner, found) >= self._quorum:
            return given
        others = sum(
            isinstance(held, bytes) and held != winner and _digest(held, seq) != ""
            for held in found.values()
        )
        if len(self._full) + self._absent - others < self._quorum:
            raise FencedError(
                "the stores hold a record that was never given a place here: another one took "
                "over. "
                f"key={keys.log_key(seq)} stop this writer"
            )
        return WriteUnknown(
            "the record has its place, and is on too few stores yet. "
            f"{silent_stores(self._copies, found)}"
        )


def silent_stores(copies: LogReplicas, found: Mapping[int, bytes | NoAnswer]) -> str:
    """Which stores did not say what they hold, and why."""
    return (
        "silent=["
        + "; ".join(
            f"{copies.urls[number]}: {held.reason}"
            for number, held in sorted(found.items())
            if isinstance(held, NoAnswer)
        )
        + "]"
    )


def _digest(held: bytes | NoAnswer, seq: int) -> str:
    """The digest of a valid record of this place; empty for anything else, which may have been any
    record."""
    if isinstance(held, NoAnswer):
        return ""
    try:
        record = decode_record(held)
    except (IntegrityError, FormatVersionError):
        return ""
    return record.digest if record.seq == seq else ""


class ReplicatedLog:
    """See LogAccess. ``backend`` writes objects to the same stores; it learns which of them
    count."""

    def __init__(
        self, backend: MultiStoreBackend, copies: LogReplicas, *, job: str, log_id: str
    ) -> None:
        self._backend = backend
        self._copies = copies
        self._job = job
        self._log_id = log_id
        self._ids: tuple[str, ...] = ("",) * len(copies.stores)
        self._silent = self._counting = frozenset(range(len(copies.stores)))
        self._tail: LastRecord | None = None
        self._before: LogState | None = None
        self._taking = ""

    @property
    def job(self) -> str:
        """See LogAccess."""
        return self._job

    @property
    def log_id(self) -> str:
        """See LogAccess."""
        return self._log_id

    @property
    def replicas(self) -> LogReplicas:
        """The stores."""
        return self._copies

    @property
    def ids(self) -> tuple[str, ...]:
        """Which store each one was when the log was last read; empty for one that did not answer,
        or is new."""
        return self._ids

    @property
    def silent(self) -> frozenset[int]:
        """Which stores, by number, did not answer when the log was last read."""
        return self._silent

    def full(self, members: StoreSet) -> dict[int, str]:
        """The ids of the stores, by number, that are in ``members`` and answered when the log was
        last read."""
        return {
            number: store_id for number, store_id in enumerate(self._ids) if store_id in members.ids
        }

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """See LogAccess. A fold proves right by its own digest and by the record it ends with,
        whichever store has it."""
        self._tail = self._before = None
        notes: list[LogNote] = []
        seqs = {
            seq
            for key in self._copies.list_keys(keys.FOLDS)
            if (seq := keys.parse_fold_key(key)) is not None
        }
        for seq in sorted(seqs, reverse=True):
            ends = self._ends(seq)
            for held in self._copies.read(keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX):
                if isinstance(held, NoAnswer):
                    continue
                try:
                    state = decode_fold(held)
                except (IntegrityError, FormatVersionError) as error:
                    notes.append(LogNote("fold passed over", keys.fold_key(seq), str(error)))
                    continue
                if (state.job, state.next_seq) == (
                    self._job,
                    seq + 1,
                ) and state.head_digest in ends:
                    return state, tuple(notes)
                notes.append(
                    LogNote(
                        "fold passed over",
                        keys.fold_key(seq),
                        "it is not the fold of the record that it names",
                    )
                )
        return empty(self._job), tuple(notes)

    def _ends(self, seq: int) -> set[str]:
        """The digests of the records that stores hold at a place."""
        digests = set()
        for key in (keys.settled_key(seq), keys.log_key(seq)):
            for held in self._copies.read(key, bytes_max=RECORD_BYTES_MAX):
                if isinstance(held, bytes):
                    with suppress(
                        IntegrityError, FormatVersionError
                    ):  # a damaged copy ends nothing
                        digests.add(decode_record(held).digest)
        return digests

    def read_new(self, state: LogState) -> LogState:
        """See LogAccess. Cost: one list, one small read and one per new record for each store, all
        stores at once.

        Where the last record may not count after all, what follows ``state`` is decided anew from
        the record before it.
        """
        again = (
            self._tail is not None
            and state.head_digest == self._tail.record.digest
            and self._before is not None
        )
        if again and self._before is not None:
            state = self._before
        looks = 0
        while True:
            got = self._gather(state)
            if got.state.hole is not None and (looks := looks + 1) < HOLE_READS_MAX:
                continue  # a list made while records are written may show the later one alone
            # One that is silent takes what is put as it did, and may be back before the log is read
            # again.
            self._counting = got.full | (self._counting & self._silent)
            self._backend.count_only(got.full, silent=self._counting - got.full)
            if got.tail is not None or again:
                self._tail, self._before, again = got.tail, got.before, False
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

    def require_sequencer(self, state: LogState) -> None:
        """See LogAccess."""
        if state.stores is not None:
            self._sequencer(state.stores)

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        """Make sure that the last record of ``state`` counts, as read last: None where it does,
        whatever is lost from now on.

        Lost where another one has its place: read the log again. Unknown where too few stores
        answer.
        """
        tail = self._tail
        if state.stores is None or tail is None:
            return None
        return self._finish_tail(state.stores) or self._follow(tail)

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess. The record before is brought to W stores first; so is ``record``, on a set
        that it changes too."""
        members = state.stores or self._set_before(state, record)
        if members is None:
            raise UnavailableError(
                f"the log is not begun, as far as can be seen. stores={list(self._copies.urls)} "
                f"why={state.short} open it with "
                "create=True, or repeat later"
            )
        if (doubt := self._finish_tail(members)) is not None:
            return doubt
        made = self._sequencer(members, first=state.next_seq == 0).append(
            record.seq, record.encode()
        )
        if isinstance(made, Appended) and isinstance(record.body, Stores):
            # Who asked for the change is told when nobody needs the stores before it any more.
            tail = LastRecord(record, len(members.ids), settled=False, members=members)
            self._tail, self._before = tail, None
            return self._finish_tail(_named_by(record.body)) or self._follow(tail) or made
        return made

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess."""
        return self._put(key, data)

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """See LogAccess. Its key holds its digest: putting it again changes nothing."""
        try:
            self._backend.put(key, [data])
        except UnavailableError as error:
            return WriteUnknown(str(error))
        return Appended()

    def _gather(self, state: LogState) -> MergedLog:
        held = self._copies.read_logs(state.next_seq - 1, self._log_id)
        got = self._gathered(state, held)
        members = got.state.stores
        if (
            not got.state.stale_reason
            or members is None
            or not any(one is NO_ANSWER_YET for one in held)
        ):
            return got
        # Others answered first: a store that came back empty, or is being filled. Now the log's own
        # are waited for.
        return self._gathered(
            state, self._copies.read_logs(state.next_seq - 1, self._log_id, of=members.ids)
        )

    def _gathered(self, state: LogState, held: Sequence[StoreRecords | NoAnswer]) -> MergedLog:
        if not any(isinstance(one, StoreRecords) for one in held):
            why = silent_stores(
                self._copies, {n: one for n, one in enumerate(held) if isinstance(one, NoAnswer)}
            )
            raise UnavailableError(f"none of the log's stores answers. {why} repeat later")
        self._ids = tuple(one.store_id if isinstance(one, StoreRecords) else "" for one in held)
        self._silent = frozenset(
            number for number, one in enumerate(held) if isinstance(one, NoAnswer)
        )
        got = merge_stores(state.without_hole(), held, self._copies.urls)
        if (hole := got.state.hole) is not None:
            newer = sum(hole.seq in one.newer for one in held if isinstance(one, StoreRecords))
            # On fewer stores it is damage to what says the version.
            if newer >= (got.state.stores.write_quorum if got.state.stores else len(held) // 2 + 1):
                raise FormatVersionError(
                    "the log goes on with a record that this release does not read. "
                    f"key={keys.log_key(hole.seq)} "
                    f"stores={newer} upgrade torch-ckpt: {UPGRADE}"
                )
        return got

    def _finish_tail(self, members: StoreSet) -> KeyTaken | WriteUnknown | None:
        """Bring the last record to where it must be before another follows, or its writer is told;
        None where it is there."""
        tail = self._tail
        if tail is None:
            return None
        data = tail.record.encode()
        if not tail.is_final and not tail.settled:
            made = self._sequencer(tail.members, first=tail.record.seq == 0).append(
                tail.record.seq, data
            )
            if isinstance(made, KeyTaken):
                return made
            if isinstance(made, WriteUnknown):
                return WriteUnknown(
                    "the record before is on too few stores, and can't be brought to more now. "
                    f"seq={tail.record.seq} "
                    f"why={made.reason}"
                )
        elif not tail.is_final and (doubt := self._settle(tail, tail.members)) is not None:
            return doubt
        # Of a record that changes the set, the new set needs its copies too.
        if _moves(tail) and (doubt := self._settle(tail, members)) is not None:
            return doubt
        self._tail = self._before = None
        return None

    def _settle(self, tail: LastRecord, members: StoreSet) -> WriteUnknown | None:
        """Bring a record that certainly has its place to W stores of ``members``, at its second
        key."""
        data = tail.record.encode()
        found = self._copies.create(
            keys.settled_key(tail.record.seq), data, self.full(members), members.write_quorum
        )
        if count_copies(data, found) >= members.write_quorum:
            return None
        return WriteUnknown(
            f"the record before is on too few stores. seq={tail.record.seq} "
            f"{silent_stores(self._copies, found)}"
        )

    def _follow(self, tail: LastRecord) -> WriteUnknown | None:
        """After a record that changes the set, write it once more, under the new set.

        Until another record follows it, only the stores of the set before can say that it counts;
        and they may go now.
        """
        record, body = tail.record, tail.record.body
        if not isinstance(body, Stores) or not _moves(tail):
            return None
        again = make_record(
            body,
            job=self._job,
            seq=record.seq + 1,
            epoch=record.epoch,
            write_id=f"{record.write_id[:56]}-again",
            prev=record.digest,
        )
        made = self._sequencer(_named_by(body)).append(again.seq, again.encode())
        return made if isinstance(made, WriteUnknown) else None  # another's record does as well

    def _set_before(self, state: LogState, record: Record) -> StoreSet | None:
        """Who gives out the place of a record that first says which stores there are."""
        if state.next_seq > 0:
            return StoreSet(
                (self._log_id,), 1
            )  # the store in which the log began, and has been alone since
        return _named_by(record.body) if isinstance(record.body, Stores) else None

    @contextmanager
    def using_sequencer(self, name: str) -> Iterator[None]:
        """Meanwhile claim through ``name``, whoever the log says gives out its places: for a
        take-over."""
        self._taking = name
        try:
            yield
        finally:
            self._taking = ""

    def _sequencer(self, members: StoreSet, *, first: bool = False) -> Sequencer:
        full = self.full(members)
        members = replace(members, sequencer=self._taking or members.sequencer)
        absent = sum(not is_placeholder(store_id) for store_id in members.ids) - len(full)
        if first:
            # A store that was not there when the log was made has no vote. But another maker may
            # have met it since.
            met = sum(
                bool(store_id) and store_id not in members.ids for store_id in self._ids
            ) + len(self._silent)
            absent += min(met, sum(map(is_placeholder, members.ids)))
        if members.sequencer == BY_STORES:
            able = self._copies.create_only_stores(full)
            if len(able) + absent < members.write_quorum:
                raise UnavailableError(
                    "too few stores are known to create a key only once, so they can't give out "
                    "the log's places. "
                    f"able={len(able)} needed={members.write_quorum} "
                    f"stores={list(self._copies.urls)} repeat later, or grant "
                    "permission to write, or take over with `ckpt stores takeover`"
                )
            return QuorumSequencer(self._copies, full, members.write_quorum, absent=absent)
        if members.sequencer.startswith(BY_SQLITE):
            file = SqliteSequencer(database_path(self._log_id), self._log_id)
            if file.name != members.sequencer:
                raise UsageError(
                    "another machine gives out the places of this log. "
                    f"sequencer={members.sequencer} mine={file.name}; "
                    "run there, or take over with `ckpt stores takeover`"
                )
            return CopyingSequencer(file, self._copies, full, members.write_quorum, absent=absent)
        if members.sequencer.startswith(BY_ETCD):
            etcd = require_etcd(self._log_id, members.sequencer)
            return CopyingSequencer(etcd, self._copies, full, members.write_quorum, absent=absent)
        raise UsageError(
            "this release does not know who gives out the log's places. "
            f"sequencer={members.sequencer}"
        )

    def _put(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        answering = {number: store_id for number, store_id in enumerate(self._ids) if store_id}
        found = self._copies.create(key, data, answering, self._backend.write_quorum)
        if count_copies(data, found):
            return Appended()
        other = next((held for held in found.values() if isinstance(held, bytes)), None)
        return (
            KeyTaken(other)
            if other is not None
            else WriteUnknown(silent_stores(self._copies, found))
        )


def _named_by(body: Stores) -> StoreSet:
    return StoreSet(body.ids, body.write_quorum, body.sequencer)


def _moves(tail: LastRecord) -> bool:
    body = tail.record.body
    if not isinstance(body, Stores):
        return False
    return (body.ids, body.write_quorum) != (tail.members.ids, tail.members.write_quorum)
