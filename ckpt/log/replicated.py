"""One log on several stores: read from all of them, written to W of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ckpt.backends.base import Backend
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
    Closed,
    Record,
    Stores,
    decode_record,
    decode_settled,
    make_record,
)
from ckpt.log.fold import empty
from ckpt.log.high_water import HighWaterMark
from ckpt.log.quorum import (
    Beaten,
    Divided,
    LastRecord,
    MergedLog,
    NextRound,
    NoAnswer,
    Settled,
    Split,
    StoreRecords,
    Undecided,
    Won,
    conclude,
    contest,
    contest_among_survivors,
    is_placeholder,
    merge_stores,
)
from ckpt.log.reader import HOLE_READS_MAX, RECORDS_AT_ONCE, LogNote, prune_folds
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

PROVE_S = 10.0
"""How long a snapshot waits for the other stores to have all that one had which is gone."""

# ---- sequencers of several stores


class QuorumSequencer:
    """The stores that create a key only once vote: a record that W of them hold has the position
    for good.

    ``full``: ids of the stores that count and answer, by number; ``absent``: how many others count.
    A store that refuses to create only once still has a vote, which is unknown: it may refuse only
    now, or only this writer. ``rounds``: a divided vote is decided in further rounds, without the
    stores that do not answer. Only if all writers of the position vote, and agree on the stores
    that do. ``survivors``: all stores that do not answer are declared lost, and ``full``, fewer
    than W, decide together; ``quorum`` is their number then.
    """

    def __init__(
        self,
        copies: LogReplicas,
        full: Mapping[int, str],
        quorum: int,
        *,
        absent: int,
        rounds: bool = True,
        survivors: bool = False,
    ) -> None:
        self._replicas = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent
        self._rounds = rounds
        self._survivors = survivors

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Returns once all stores hold the record, or W hold it at its settled key too."""
        mine = vote = decode_record(data).digest
        bytes_of = {mine: data}
        for number in range(ROUNDS_MAX if self._rounds else 1):
            vote_key, settled_key = keys.round_keys(seq, number)
            answers = self._replicas.create(
                vote_key, bytes_of[vote], self._full, self._quorum, vote=True
            )
            votes = [digest or None for digest in _learn(answers, seq, bytes_of)]
            outcome = self._contest(vote, votes, number)
            match outcome:
                case Won(sure=True) if number == 0:
                    return Appended()
                case Beaten(digest) if number == 0:
                    return KeyTaken(bytes_of[digest])
                case Won():
                    digest = vote
                case Beaten(digest) | Split(digest):
                    pass
                case Divided(digest) if self._rounds:
                    pass
                case _:
                    return self._unknown("too few stores answered.", answers)
            answers = self._settle(settled_key, outcome, bytes_of[digest], seq, number)
            held = _learn(answers, seq, bytes_of)
            match conclude(held, self._quorum):
                case Settled(winner):
                    won = bytes_of[winner]
                    if number and (doubt := self._settle_first(seq, won)) is not None:
                        return doubt
                    return Appended() if won == data else KeyTaken(won)
                case NextRound(found):
                    vote = found or digest
                case Undecided():
                    return self._unknown(
                        "the record that counts is known, but on too few stores yet.", answers
                    )
        return self._unknown("other writers came first in every round.", answers)

    def _contest(
        self, vote: str, votes: list[str | None], number: int
    ) -> Won | Beaten | Split | Divided | Undecided:
        if self._survivors:
            return contest_among_survivors(votes, first=number == 0)
        outcome = contest(vote, votes + [None] * self._absent, self._quorum)
        # Only in the first round: in later ones the survivors of lost stores may find another
        # winner than who knows the lost ones' votes.
        return Divided(outcome.digest) if isinstance(outcome, Split) and number else outcome

    def _settle(
        self,
        key: str,
        outcome: Won | Beaten | Split | Divided,
        winner: bytes,
        seq: int,
        number: int,
    ) -> dict[int, bytes | NoAnswer]:
        """Settle the round for ``winner``, or close it if its votes are divided."""
        if not isinstance(outcome, Divided):
            return self._replicas.create(key, winner, self._full, self._quorum)
        closed = Closed(job=decode_record(winner).job, seq=seq, closed_round=number).encode()
        # Only where a key is created once: elsewhere a record could be overwritten.
        return self._replicas.create(key, closed, self._full, self._quorum, vote=True)

    def _settle_first(self, seq: int, won: bytes) -> WriteUnknown | None:
        """Bring a record that a later round settled to W settled keys of the first round.

        There readers, scrubs and releases without rounds find what was acknowledged. What is there
        never counted.
        """
        answers = settle_anyway(self._replicas, seq, won, self._full, self._quorum)
        if count_copies(won, answers) >= self._quorum:
            return None
        return self._unknown("the record that counts is known, but on too few stores yet.", answers)

    def _unknown(self, fact: str, answers: Mapping[int, bytes | NoAnswer]) -> WriteUnknown:
        return WriteUnknown(f"{fact} {silent_stores(self._replicas, answers)}")


ROUNDS_MAX = 16
"""How many rounds one append takes part in. A second one ends the vote unless writers collide in
it too."""


def settle_anyway(
    replicas: LogReplicas, seq: int, data: bytes, full: Mapping[int, str], quorum: int
) -> dict[int, bytes | NoAnswer]:
    """Bring a record that certainly has its position to W of ``full``, at its settled key.

    A record that lost there, or a closed round, gives way. Returns what each store holds, as
    ``LogReplicas.create``.
    """
    key = keys.settled_key(seq)
    answers = replicas.create(key, data, full, quorum)
    if count_copies(data, answers) < quorum:
        others = {
            number: full[number]
            for number, answer in answers.items()
            if answer != data and _digest(answer, seq) is not None
        }
        answers |= replicas.overwrite(key, data, others, len(others))
    return answers


class CopyingSequencer:
    """Another sequencer gives out the positions; each record is then copied to W of the counting
    stores."""

    def __init__(
        self,
        inner: Sequencer,
        copies: LogReplicas,
        full: Mapping[int, str],
        quorum: int,
        *,
        absent: int,
    ) -> None:
        self._inner = inner
        self._replicas = copies
        self._full = dict(full)
        self._quorum = quorum
        self._absent = absent

    def append(self, seq: int, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """Another writer's record is copied too: that writer may have died before it was copied.

        Raises FencedError if the stores hold a record that the sequencer never gave a position.
        """
        result = self._inner.append(seq, data)
        if isinstance(result, WriteUnknown):
            return result
        winner = result.data if isinstance(result, KeyTaken) else data
        answers = self._replicas.create(keys.log_key(seq), winner, self._full, self._quorum)
        if count_copies(winner, answers) >= self._quorum:
            return result
        others = sum(answer != winner and bool(_digest(answer, seq)) for answer in answers.values())
        if len(self._full) + self._absent - others < self._quorum:
            # So many stores hold another record that ours can never be on W of them.
            raise FencedError(
                "the stores hold a record that this sequencer never gave a position: another "
                f"sequencer took over. key={keys.log_key(seq)} stop this writer"
            )
        return WriteUnknown(
            "the record has its position, but is on too few stores yet. "
            f"{silent_stores(self._replicas, answers)}"
        )


def silent_stores(replicas: LogReplicas, answers: Mapping[int, bytes | NoAnswer]) -> str:
    """The stores that did not say what they hold, and why, as text for an error."""
    return (
        "silent=["
        + "; ".join(
            f"{replicas.urls[number]}: {answer.reason}"
            for number, answer in sorted(answers.items())
            if isinstance(answer, NoAnswer)
        )
        + "]"
    )


def _learn(
    answers: Mapping[int, bytes | NoAnswer], seq: int, bytes_of: dict[str, bytes]
) -> list[str | None]:
    """The digest that each store holds; empty for a closed round, None if it is not known.

    Adds the records to ``bytes_of``.
    """
    found: list[str | None] = []
    for answer in answers.values():
        digest = _digest(answer, seq)
        if digest and isinstance(answer, bytes):
            bytes_of[digest] = answer
        found.append(digest)
    return found


def _digest(answer: bytes | NoAnswer, seq: int) -> str | None:
    """The digest of a valid record of this position, empty for a closed round; else None."""
    if isinstance(answer, NoAnswer):
        return None
    try:
        content = decode_settled(answer)
    except (IntegrityError, FormatVersionError):
        return None
    if content.seq != seq:
        return None
    return content.digest if isinstance(content, Record) else ""


@dataclass(frozen=True, slots=True)
class OutsideKnowledge:
    """What no store says. ``mark``: what was seen of the log before.

    What a person vouches for during one command: ``sequencer``, who gives out positions from now on
    (empty: as the log says), and ``lost``, the ids of stores that never come back.
    """

    mark: HighWaterMark | None = None
    sequencer: str = ""
    lost: frozenset[str] = frozenset()


class ReplicatedLog:
    """A log on several stores (a ``LogAccess``). ``backend`` writes objects to the same stores.

    It holds what the last read found: the id of each store, the stores that did not answer, and the
    last record if it may still not count.
    """

    def __init__(
        self,
        backend: MultiStoreBackend,
        copies: LogReplicas,
        *,
        job: str,
        log_id: str,
        mark: HighWaterMark | None = None,
    ) -> None:
        self._backend = backend
        self._replicas = copies
        self._job = job
        self._log_id = log_id
        self._ids: tuple[str, ...] = ("",) * len(copies.stores)
        self._silent = frozenset(range(len(copies.stores)))
        self._counted = dict.fromkeys(range(len(copies.stores)), "")
        self._exchanges = 0
        self._exchanged: dict[int, tuple[int, str]] = {}
        """Of each store that ceased to be the one that counted: which exchange that was last, from
        1 on, and its id before."""
        self._tail: LastRecord | None = None
        self._before_tail: LogState | None = None
        self._outside = OutsideKnowledge(mark)

    @property
    def job(self) -> str:
        return self._job

    @property
    def log_id(self) -> str:
        return self._log_id

    @property
    def replicas(self) -> LogReplicas:
        """The stores."""
        return self._replicas

    @property
    def ids(self) -> tuple[str, ...]:
        """Each store's id at the last read; empty if it did not answer or has none."""
        return self._ids

    @property
    def silent(self) -> frozenset[int]:
        """The numbers of the stores that did not answer at the last read."""
        return self._silent

    def full(self, members: StoreSet) -> dict[int, str]:
        """The stores of ``members`` that answered at the last read: number and id."""
        return {
            number: store_id for number, store_id in enumerate(self._ids) if store_id in members.ids
        }

    def read_start(self) -> tuple[LogState, tuple[LogNote, ...]]:
        """A fold verifies by its own digest and by the record it ends with, on whichever store that
        is."""
        self._tail = self._before_tail = None
        notes: list[LogNote] = []
        seqs = {
            seq
            for key in self._replicas.list_keys(keys.FOLDS)
            if (seq := keys.parse_fold_key(key)) is not None
        }
        for seq in sorted(seqs, reverse=True):
            digests = self._record_digests(seq)
            for answer in self._replicas.read(keys.fold_key(seq), bytes_max=FOLD_BYTES_MAX):
                if isinstance(answer, NoAnswer):
                    continue
                try:
                    state = decode_fold(answer)
                except (IntegrityError, FormatVersionError) as error:
                    notes.append(LogNote("fold passed over", keys.fold_key(seq), str(error)))
                    continue
                is_of_log = (state.job, state.next_seq) == (self._job, seq + 1)
                if is_of_log and state.head_digest in digests:
                    return state, tuple(notes)
                reason = "it is not the fold of the record at its seq"
                notes.append(LogNote("fold passed over", keys.fold_key(seq), reason))
        return empty(self._job), tuple(notes)

    def _record_digests(self, seq: int) -> set[str]:
        """The digests of the records that stores hold at a position."""
        return set(self._records_at(seq))

    def read_new(self, state: LogState) -> LogState:
        """Cost: for each store one list, one small read and one read per new record; stores in
        parallel.

        If the last record may not count, everything after its predecessor is decided anew.
        """
        redecide = False
        if (
            self._tail is not None
            and state.head_digest == self._tail.record.digest
            and self._before_tail is not None
        ):
            redecide = True
            state = self._before_tail
        reads = 0
        while True:
            merged = self._read(state)
            if merged.state.hole is not None and (reads := reads + 1) < HOLE_READS_MAX:
                continue  # see HOLE_READS_MAX
            # A store that counted and is silent now still takes objects: it may be back before the
            # log is read again, and must not lack them then. One that was replaced in the meantime
            # is no longer of the log, whether it comes back or not.
            members = merged.state.stores
            was = {
                number: store_id
                for number, store_id in self._counted.items()
                if number in self._silent
                and (members is None or not store_id or store_id in members.ids)
            }
            self._note_counted(was | {number: self._ids[number] for number in merged.full})
            own = range(len(self._backend.stores))
            self._backend.count_only(
                merged.full.intersection(own), silent=(frozenset(was) - merged.full) & set(own)
            )
            if merged.tail is not None or redecide:
                self._tail, self._before_tail, redecide = merged.tail, merged.before, False
            if (
                merged.state.hole is not None
                or merged.state.next_seq - state.next_seq < RECORDS_AT_ONCE
            ):
                return merged.state
            state = merged.state

    def _note_counted(self, counted: dict[int, str]) -> None:
        """Remember on which stores objects count, and which of those before are others now.

        Whoever reads the log, the writer of objects must learn of it: what such a store
        acknowledged may be nowhere.
        """
        for number, store_id in self._counted.items():
            # Of a store that has never answered no id is known.
            if number not in counted or store_id not in ("", counted[number]):
                self._exchanges += 1
                self._exchanged[number] = (self._exchanges, store_id)
        self._counted = counted

    def record_at(self, seq: int) -> bytes:
        held = self._records_at(seq)
        if not held:
            raise NotFoundError(f"no store that answers has this record. key={keys.log_key(seq)}")
        if len(held) > 1:
            # Writers met here. What follows says which one counts; nothing follows the last record,
            # of which the settled copies come first.
            followed = {record.prev for record in self._records_at(seq + 1).values()}
            held = {digest: record for digest, record in held.items() if digest in followed} or held
        return next(iter(held.values())).encode()

    def _records_at(self, seq: int) -> dict[str, Record]:
        """The valid records that stores hold at a position by digest: settled ones first, then
        those with most copies."""
        copies: Counter[tuple[bool, str]] = Counter()
        records: dict[str, Record] = {}
        for settled in (True, False):
            for answer in self._replicas.read_position(seq, settled=settled):
                if (digest := _digest(answer, seq)) and isinstance(answer, bytes):
                    records[digest] = decode_record(answer)
                    copies[settled, digest] += 1
        best_first = sorted(copies, key=lambda held: (held[0], copies[held], held[1]), reverse=True)
        return {digest: records[digest] for _, digest in best_first}

    def look_at_stores(self, state: LogState) -> tuple[LogState, int]:
        return self.read_new(state), self._exchanges

    def prove_stores(self, state: LogState, since: int) -> tuple[LogState, tuple[str, ...]]:
        """A store that does not answer keeps the id under which it counted.

        Without the store that became another one, W of those that are left may have every object:
        then nothing hangs on it. Waits for that, PROVE_S at most.
        """
        state = self.read_new(state)
        expected = {
            number: store_id
            for number, (exchange, store_id) in self._exchanged.items()
            if exchange > since
        }
        if expected and not self._others_have_all(state, frozenset(expected)):
            raise UnavailableError(
                "a store that took objects is another one now, or none, so they may be nowhere. "
                f"stores={[self._replicas.urls[number] for number in expected]} "
                f"expected={list(expected.values())} "
                f"found={[self._ids[number] for number in expected]}; mount it or move it back"
            )
        return state, tuple(sorted(filter(None, self._counted.values())))

    def _others_have_all(self, state: LogState, lost: frozenset[int]) -> bool:
        """Whether W stores that count, and are not ``lost``, have every object of this process."""
        left = frozenset(self._counted).intersection(range(len(self._backend.stores))) - lost
        _, quorum = self.members(state)
        return len(left) >= quorum and self._backend.await_caught_up(PROVE_S, of=left, least=quorum)

    def members(self, state: LogState) -> tuple[tuple[str, ...], int]:
        """Before the first record any store counts, and none can be lacking."""
        if state.stores is None:
            return tuple(filter(None, self._ids)), self._backend.write_quorum
        return state.stores.ids, state.stores.write_quorum

    def require_sequencer(self, state: LogState) -> None:
        if state.stores is not None:
            self._sequencer(state.stores)

    def confirm_last(self, state: LogState) -> KeyTaken | WriteUnknown | None:
        tail = self._tail
        if state.stores is None or tail is None:
            return None
        return self._finish_last(state.stores) or self._repeat_set_change(tail)

    def append(self, state: LogState, record: Record) -> Appended | KeyTaken | WriteUnknown:
        """The predecessor is brought to W stores first. A record that changes the set goes to both
        sets."""
        members = state.stores or self._first_set(state, record)
        if members is None:
            raise UnavailableError(
                f"the log has no record, as far as is known. stores={list(self._replicas.urls)} "
                f"why={state.short} open it with create=True, or repeat later"
            )
        if (doubt := self._finish_last(members)) is not None:
            return doubt
        result = self._sequencer(members, first=state.next_seq == 0).append(
            record.seq, record.encode()
        )
        if isinstance(result, Appended) and isinstance(record.body, Stores):
            # The change is reported as done only when the old set is needed no more: its stores may
            # be removed right after.
            tail = LastRecord(record, len(members.ids), settled=False, members=members)
            self._tail, self._before_tail = tail, None
            return (
                self._finish_last(_named_by(record.body)) or self._repeat_set_change(tail) or result
            )
        return result

    def put_fold(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        return self._put(key, data)

    def prune_folds(self) -> None:
        prune_folds(self._backend)

    def put_manifest(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        """The key holds the digest of the bytes, so putting them again changes nothing."""
        try:
            self._backend.put(key, [data])
        except UnavailableError as error:
            return WriteUnknown(str(error))
        return Appended()

    def _read(self, state: LogState) -> MergedLog:
        answers = self._replicas.read_logs(state.next_seq - 1, self._log_id)
        merged = self._merge(state, answers)
        members = merged.state.stores
        if (
            not merged.state.stale_reason
            or members is None
            or not any(answer is NO_ANSWER_YET for answer in answers)
        ):
            return merged
        # A majority answered, but with stores outside the set: one came back empty, or is being
        # filled. Wait for the set's own stores.
        return self._merge(
            state, self._replicas.read_logs(state.next_seq - 1, self._log_id, of=members.ids)
        )

    def _merge(self, state: LogState, answers: Sequence[StoreRecords | NoAnswer]) -> MergedLog:
        if not any(isinstance(answer, StoreRecords) for answer in answers):
            silent = silent_stores(
                self._replicas,
                {n: answer for n, answer in enumerate(answers) if isinstance(answer, NoAnswer)},
            )
            raise UnavailableError(f"none of the log's stores answers. {silent} repeat later")
        self._ids = tuple(
            answer.store_id if isinstance(answer, StoreRecords) else "" for answer in answers
        )
        self._silent = frozenset(
            number for number, answer in enumerate(answers) if isinstance(answer, NoAnswer)
        )
        mark = self._outside.mark
        known = mark.proof if mark is not None else {}
        merged = merge_stores(state.without_hole(), answers, self._replicas.urls, known)
        if (hole := merged.state.hole) is not None:
            newer = sum(
                hole.seq in answer.newer for answer in answers if isinstance(answer, StoreRecords)
            )
            # On fewer stores than that, the version number is damaged rather than newer.
            if newer >= (
                merged.state.stores.write_quorum if merged.state.stores else len(answers) // 2 + 1
            ):
                raise FormatVersionError(
                    "the log continues with a record that this release does not read. "
                    f"key={keys.log_key(hole.seq)} stores={newer} upgrade torch-ckpt: {UPGRADE}"
                )
        return merged

    def _finish_last(self, members: StoreSet) -> KeyTaken | WriteUnknown | None:
        """Bring the last record to the stores where it must be before another may follow.

        None if it is there. Its writer may be told, and a successor written, only after that.
        """
        tail = self._tail
        if tail is None:
            return None
        data = tail.record.encode()
        voted = tail.members.sequencer == BY_STORES
        if not tail.is_final and (voted or not tail.settled):
            result = self._sequencer(tail.members, first=tail.record.seq == 0).append(
                tail.record.seq, data
            )
            if isinstance(result, KeyTaken):
                return result
            if isinstance(result, WriteUnknown):
                return WriteUnknown(
                    "the record before is on too few stores, and cannot be copied to more now. "
                    f"seq={tail.record.seq} why={result.reason}"
                )
        elif not tail.is_final and (doubt := self._write_settled(tail, tail.members)) is not None:
            return doubt
        # A record that changes the set counts in the old one. A later reader knows only the new
        # set, so that needs W copies too before another record follows.
        if _changes_set(tail) and (doubt := self._write_settled(tail, members)) is not None:
            return doubt
        self._tail = self._before_tail = None
        return None

    def _write_settled(self, tail: LastRecord, members: StoreSet) -> WriteUnknown | None:
        """Bring a record that certainly has its position to W stores of ``members``, at its settled
        key."""
        data, quorum = tail.record.encode(), self._needed(members)
        answers = settle_anyway(self._replicas, tail.record.seq, data, self.full(members), quorum)
        if count_copies(data, answers) >= quorum:
            return None
        return WriteUnknown(
            f"the record before is on too few stores. seq={tail.record.seq} "
            f"{silent_stores(self._replicas, answers)}"
        )

    def _repeat_set_change(self, tail: LastRecord) -> WriteUnknown | None:
        """After a record that changes the set, write the same set again, under the new set.

        Until another record follows, only stores of the old set can show that the change counts;
        and those may be removed now.
        """
        record, body = tail.record, tail.record.body
        if not isinstance(body, Stores) or not _changes_set(tail):
            return None
        repeat = make_record(
            body,
            job=self._job,
            seq=record.seq + 1,
            epoch=record.epoch,
            write_id=f"{record.write_id[:56]}-again",
            prev=record.digest,
        )
        result = self._sequencer(_named_by(body)).append(repeat.seq, repeat.encode())
        # If another writer's record has the position, it follows the change just as well.
        return result if isinstance(result, WriteUnknown) else None

    def _first_set(self, state: LogState, record: Record) -> StoreSet | None:
        """The set that decides about a record that names the log's stores for the first time."""
        if state.next_seq > 0:
            # The log began on one store, whose id is the log's, and has been on that alone since.
            return StoreSet((self._log_id,), 1)
        return _named_by(record.body) if isinstance(record.body, Stores) else None

    @contextmanager
    def using_sequencer(self, name: str) -> Iterator[None]:
        """For a take-over: within the context, append through ``name`` instead of the log's
        sequencer."""
        self._outside = replace(self._outside, sequencer=name)
        try:
            yield
        finally:
            self._outside = replace(self._outside, sequencer="")

    @contextmanager
    def declared_lost(self, ids: Collection[str]) -> Iterator[None]:
        """Within the context, those of these stores that do not answer are lost for good, on a
        person's word.

        If fewer than W others are left, records are appended that all of those hold. Only for the
        record that removes the stores: with their return there could be two histories.
        """
        self._outside = replace(self._outside, lost=frozenset(ids))
        try:
            yield
        finally:
            self._outside = replace(self._outside, lost=frozenset())

    def _needed(self, members: StoreSet) -> int:
        """How many stores must hold a record: W, or all that are left if those are fewer.

        Raises UnavailableError if those that are left may lack what was acknowledged, or do not all
        answer.
        """
        lost = self._outside.lost.intersection(members.ids).difference(self._ids)
        # A store that was never made is not left either, whoever is lost; of a set whose W counts
        # on it, nothing was acknowledged.
        left = sum(not is_placeholder(store_id) for store_id in set(members.ids) - lost)
        if not lost or left >= members.write_quorum:
            return members.write_quorum
        answering = len(self.full(members))
        if left < members.answers_min or answering < left:
            raise UnavailableError(
                "all stores but the lost ones must answer, and have what was acknowledged. "
                f"answering={answering} left={left} needed={max(left, members.answers_min)} "
                f"lost={sorted(lost)} repeat when they do"
            )
        return left

    def _sequencer(self, members: StoreSet, *, first: bool = False) -> Sequencer:
        full = self.full(members)
        quorum = self._needed(members)
        survivors = quorum < members.write_quorum
        members = replace(members, sequencer=self._outside.sequencer or members.sequencer)
        absent = sum(not is_placeholder(store_id) for store_id in members.ids) - len(full)
        if first:
            # A placeholder's store has no vote. But another process that made the log at the same
            # time may have reached that store and written its own first record there; so stores
            # with an unlisted id, and silent ones, count as votes that are not known.
            unlisted = sum(bool(store_id) and store_id not in members.ids for store_id in self._ids)
            absent += min(unlisted + len(self._silent), sum(map(is_placeholder, members.ids)))
        if survivors:
            absent = 0
        if members.sequencer == BY_STORES:
            able = self._replicas.create_only_stores(full)
            if len(able) + absent < quorum:
                raise UnavailableError(
                    "too few stores are known to create a key only once, so they cannot give out "
                    f"positions in the log. able={len(able)} needed={quorum} "
                    f"stores={list(self._replicas.urls)} repeat later, or grant permission to "
                    "write, or take over with `ckpt stores takeover`"
                )
            # The makers of a log may name different stores; and after a take-over, writers of the
            # old sequencer acknowledge what W stores hold at the first key.
            rounds = not first and not self._outside.sequencer
            return QuorumSequencer(
                self._replicas, full, quorum, absent=absent, rounds=rounds, survivors=survivors
            )
        if members.sequencer.startswith(BY_SQLITE):
            sqlite = SqliteSequencer(database_path(self._log_id), self._log_id)
            if sqlite.name != members.sequencer:
                raise UsageError(
                    "another machine gives out the positions of this log. "
                    f"sequencer={members.sequencer} mine={sqlite.name}; "
                    "run there, or take over with `ckpt stores takeover`"
                )
            return CopyingSequencer(sqlite, self._replicas, full, quorum, absent=absent)
        if members.sequencer.startswith(BY_ETCD):
            etcd = require_etcd(self._log_id, members.sequencer)
            return CopyingSequencer(etcd, self._replicas, full, quorum, absent=absent)
        raise UsageError(
            f"this release does not know the log's sequencer. sequencer={members.sequencer}"
        )

    def _put(self, key: str, data: bytes) -> Appended | KeyTaken | WriteUnknown:
        answering = {number: store_id for number, store_id in enumerate(self._ids) if store_id}
        answers = self._replicas.create(key, data, answering, self._backend.write_quorum)
        if count_copies(data, answers):
            return Appended()
        other = next((answer for answer in answers.values() if isinstance(answer, bytes)), None)
        return (
            KeyTaken(other)
            if other is not None
            else WriteUnknown(silent_stores(self._replicas, answers))
        )


def joined_by(log: ReplicatedLog, new: Backend) -> ReplicatedLog:
    """The log as reached with one store more, which it may come to be on.

    A record that takes ``new`` into the set has to be copied there before another follows.
    """
    replicas = LogReplicas((*log.replicas.stores, new))
    mark = log._outside.mark
    return ReplicatedLog(log._backend, replicas, job=log.job, log_id=log.log_id, mark=mark)


def _named_by(body: Stores) -> StoreSet:
    return StoreSet(body.ids, body.write_quorum, body.sequencer)


def _changes_set(tail: LastRecord) -> bool:
    body = tail.record.body
    if not isinstance(body, Stores):
        return False
    return (body.ids, body.write_quorum) != (tail.members.ids, tail.members.write_quorum)
