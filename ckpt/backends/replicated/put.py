"""A put to all stores at once that returns when a quorum has the object.

No store reads the caller's memory after the return: it gets bytes that are immutable, a copy, or a
loan that is taken back before the put returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ckpt.backends.base import Buffer
from ckpt.backends.replicated import policy as speeds
from ckpt.backends.replicated import put_race as races
from ckpt.backends.replicated.buffers import (
    Loan,
    ReplicaMemory,
    SharedCopy,
    TakenBackError,
    is_immutable,
)
from ckpt.backends.replicated.group import (
    AnswerQueue,
    StoreGroup,
    StoreReplica,
    busy_error,
    silent_error,
)
from ckpt.backends.replicated.ledger import CopyFault, RepairNeed, VerifiedRange
from ckpt.backends.replicated.policy import most_common_error
from ckpt.backends.replicated.put_race import Handover, PutState, PutTarget, plan_handover
from ckpt.errors import (
    CkptError,
    KeyExistsError,
    StoreDeniedError,
    StoreFullError,
    UnavailableError,
)

PutAnswer = tuple[int, "CkptError | None"]

StoreWrite = Callable[[StoreReplica, str, "Sequence[Buffer]"], None]
"""Writes an object to one store."""

MEMORY_POLL_S = 0.02
"""How often a put retries to get memory for a store that has not finished earlier puts."""

_TOO_SLOW = "slower than the others by more than the grace"
_LEFT_ALONE = "the store is not used at the moment"


class PutBytes:
    """The bytes of one put, and the memory that each store uses for them.

    Only the put's thread calls ``prepare``. ``release`` is called once per store, by any thread.
    """

    def __init__(self, memory: ReplicaMemory, key: str, data: Sequence[Buffer]) -> None:
        self.data = data
        self.size_bytes = sum(memoryview(buffer).nbytes for buffer in data)
        self.immutable = is_immutable(data)
        self.loan = Loan(key)
        self.lent: set[int] = set()
        self._memory = memory
        self._shared_copy = SharedCopy(memory, data, self.size_bytes)
        self._claimed: set[int] = set()
        self._copy_holders: set[int] = set()

    def prepare(self, index: int, handover: Handover) -> Sequence[Buffer] | None:
        """What store ``index`` gets; None if there is no memory for it now."""
        if handover is Handover.LENT:
            self.lent.add(index)
            return self.data
        # Never waits: a hung store's memory must not delay the put, which tries again meanwhile.
        if not self._memory.claim(index, self.size_bytes):
            return None
        self._claimed.add(index)
        if handover is Handover.AS_IS:
            return self.data
        copy = self._shared_copy.acquire()
        self._copy_holders.add(index)
        return copy

    def release(self, index: int) -> None:
        """Store ``index`` no longer uses the bytes."""
        if index in self._claimed:
            self._memory.free(index, self.size_bytes)
        if index in self._copy_holders:
            self._shared_copy.release()

    def forget_source(self) -> None:
        """The put is over: drop the references to the caller's memory."""
        self.data = ()
        self._shared_copy.forget_source()


class QuorumPut:
    """One put. The calling thread runs it; threads of stores answer, also after it has returned.

    ``write``: use it for each store, try each store only once, and lend to none. ``verified``
    covers the whole object, to repair a copy with other bytes.
    """

    def __init__(
        self,
        group: StoreGroup,
        key: str,
        data: Sequence[Buffer],
        *,
        write: StoreWrite | None = None,
        verified: VerifiedRange | None = None,
    ) -> None:
        self._group = group
        self._key = key
        self._bytes = PutBytes(group.memory, key, data)
        self._write = write
        self._verified = verified
        self._answers: AnswerQueue[PutAnswer] = AnswerQueue()
        self._jobs: dict[int, Callable[[], None]] = {}
        self._waiting_for_memory: dict[int, Handover] = {}
        self._durable = False
        self._errors: dict[int, CkptError] = {}

    def run(
        self, *, holders: frozenset[int] = frozenset(), failed: Mapping[int, CkptError] = {}
    ) -> None:
        """Write, and return when the object is durable.

        ``holders`` have it already; ``failed`` are not written to. If the quorum cannot be reached,
        raises the most common error type of the failed stores, naming each store.
        """
        group = self._group
        group.detect_stalls()
        all_stores = frozenset(range(len(group.replicas)))
        race = races.begin_put(
            group.quorum,
            size_bytes=self._bytes.size_bytes,
            now_s=time.monotonic(),
            held_back=all_stores,
        )
        try:
            for index in holders:
                race = races.with_ack(race, index, time.monotonic())
            for index, error in failed.items():
                race = self._failed(race, index, error, transient=False)
            # Stores that do not count stay held back: each is filled as a whole before it counts.
            race = self._send_first(race, group.quorum.voters - holders - failed.keys())
            while True:
                now_s = time.monotonic()
                match races.decide(race, now_s, limits=group.limits):
                    case races.SendTo(indexes):
                        for index in indexes:
                            race = self._give(race, index, self._last_resort())
                    case races.WaitForAck(until_s):
                        wait_s = until_s - now_s
                        entry = self._answers.get(
                            min(wait_s, MEMORY_POLL_S) if self._waiting_for_memory else wait_s
                        )
                        if entry is not None:
                            race = self._heard(race, *entry)
                        for index, handover in tuple(self._waiting_for_memory.items()):
                            race = self._give(race, index, handover)
                    case races.PutDone():
                        self._durable = True
                        return
                    case races.PutFailed():
                        # An answer may have arrived since decide(), above all if this thread was
                        # suspended.
                        race = self._hear_last_answers(race)
                        if race.quorum_s is None:
                            raise self._error(race)
        finally:
            self._finish(race)

    # ---- Handing over the bytes.

    def _send_first(self, race: races.PutRace, indexes: frozenset[int]) -> races.PutRace:
        """Hand the bytes to each store as ``plan_handover`` says."""
        group = self._group
        targets = [
            PutTarget(
                usable=replica.writing.circuit.usable,
                has_room=replica.writing.threads.has_room,
                borrows=replica.borrower is not None and self._write is None,
                expected_s=speeds.expected_s(replica.writing.speed, self._bytes.size_bytes),
            )
            for replica in group.replicas
        ]
        handovers = plan_handover(
            targets, group.quorum, immutable=self._bytes.immutable, limits=group.limits
        )
        # Stores that need no copy begin first.
        for index in sorted(indexes, key=lambda index: handovers[index] is not Handover.LENT):
            if handovers[index] is Handover.SPARED and not self._ready(index, Handover.SPARED):
                continue
            if handovers[index] is not Handover.LATER:
                race = self._give(race, index, handovers[index])
        return race

    def _last_resort(self) -> Handover:
        """How held-back stores get the bytes when the others do not suffice."""
        return Handover.AS_IS if self._bytes.immutable else Handover.COPIED

    def _ready(self, index: int, handover: Handover) -> bool:
        """Prepare the job of store ``index``; False if there is no memory for it."""
        if index in self._jobs:
            return True
        data = self._bytes.prepare(index, handover)
        if data is None:
            return False
        replica = self._group.replicas[index]
        if handover is Handover.LENT:
            self._jobs[index] = self._job(replica, lambda: self._lend(replica))
        else:
            write = self._write or _put
            self._jobs[index] = self._job(replica, lambda: write(replica, self._key, data))
        return True

    def _give(self, race: races.PutRace, index: int, handover: Handover) -> races.PutRace:
        """Hand the bytes to the store.

        Without memory for them the store is tried again as long as the put lasts.
        """
        race = races.with_sent(race, (index,))
        replica = self._group.replicas[index]
        if not self._ready(index, handover):
            self._waiting_for_memory[index] = handover
            return race
        self._waiting_for_memory.pop(index, None)
        if not replica.writing.threads.submit(self._jobs[index], key=self._key):
            return self._failed(race, index, busy_error(replica), transient=True)
        return race

    def _lend(self, replica: StoreReplica) -> None:
        assert replica.borrower is not None, "only borrowers are lent to"
        self._bytes.loan.still_lent()
        replica.borrower.put_lent(self._key, self._bytes.data, self._bytes.loan.still_lent)

    def _job(self, replica: StoreReplica, put: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            answer: CkptError | None = None
            try:
                replica.write(self._bytes.size_bytes, put)
            except CkptError as error:
                answer = error
            if not self._answers.put((replica.index, answer)):
                self._late(replica.index, answer)

        return job

    # ---- Answers of the stores.

    def _heard(self, race: races.PutRace, index: int, answer: CkptError | None) -> races.PutRace:
        if answer is None:
            self._errors.pop(index, None)
            return races.with_ack(race, index, time.monotonic())
        return self._failed(
            race, index, answer, transient=self._write is None and _is_transient(answer)
        )

    def _failed(
        self, race: races.PutRace, index: int, error: CkptError, *, transient: bool
    ) -> races.PutRace:
        self._errors[index] = error
        group = self._group
        return races.with_failure(
            race,
            index,
            time.monotonic(),
            transient=transient,
            limits=group.limits,
            jitter=group.jitter(),
        )

    def _hear_last_answers(self, race: races.PutRace) -> races.PutRace:
        """Wait a moment longer for answers before giving up.

        They name more causes of the failure. If this thread itself was suspended, they may also
        complete the quorum.
        """
        until_s = time.monotonic() + self._group.limits.grace_s_min
        while (
            race.in_state(PutState.SENT)
            and (entry := self._answers.get(until_s - time.monotonic())) is not None
        ):
            race = self._heard(race, *entry)
        return race

    def _error(self, race: races.PutRace) -> CkptError:
        group, errors = self._group, self._errors
        waited_s = time.monotonic() - race.start_s
        for index in race.in_state(PutState.SENT):
            replica = group.replicas[index]
            errors[index] = (
                _no_memory(replica)
                if index in self._waiting_for_memory
                else silent_error(replica, waited_s)
            )
        acks = race.in_state(PutState.ACKED)
        per_store = " | ".join(
            f"{group.replicas[index].url}: {error}" for index, error in sorted(errors.items())
        )
        ignored = [group.replicas[index].url for index in sorted(acks - group.quorum.voters)]
        failed_voters = race.in_state(PutState.FAILED, PutState.RETRYING) & group.quorum.voters
        error_type = most_common_error([errors[index] for index in sorted(failed_voters)])
        return error_type(
            f"too few stores took the object. key={self._key} "
            f"acknowledged={len(acks & group.quorum.voters)} "
            f"needed={group.quorum.write}{f' not_counting={ignored}' if ignored else ''} "
            f"[{per_store}]; repeat when they do"
        )

    def _finish(self, race: races.PutRace) -> None:
        """End the put: release the caller's memory, and note missing copies.

        The loan is taken back first. Only then the caller may write to its memory again.
        """
        # First of all: a store's check of the loan that comes later fails, so a put that is cut off
        # stores nothing. The caller's memory is then free.
        self._bytes.loan.take_back()
        group, out = self._group, race.in_state(PutState.SENT) - self._waiting_for_memory.keys()
        if self._durable:
            # They write from a copy or from immutable bytes, so they may go on after the return;
            # until they end, the object counts as missing there.
            for index in out - self._bytes.lent:
                group.backlog.background_put_started(index, self._key)
            for index in out & self._bytes.lent:
                # The object counts as missing there until the store answers, which may never
                # happen.
                group.replicas[index].cut_off(
                    self._bytes.size_bytes, time.monotonic() - race.start_s
                )
                self._missing(index, _TOO_SLOW, alarm=False)
            for index in (
                race.in_state(PutState.FAILED, PutState.RETRYING, PutState.HELD_BACK)
                | self._waiting_for_memory.keys()
            ):
                alone = not group.replicas[index].writing.circuit.usable
                error = self._errors.get(index, _LEFT_ALONE if alone else _TOO_SLOW)
                self._missing(index, error, alarm=alone or index in self._errors)
        # From here on a store's thread that finds the queue closed calls _late() itself. So each
        # answer is handled exactly once, here or there.
        drained = self._answers.close()
        self._bytes.forget_source()
        for index in range(len(group.replicas)):
            if index not in out:
                self._release(index)
        for index, answer in drained:
            self._late(index, answer)
        if out:
            group.wake()  # the repair thread detects it if one of them hangs

    def _late(self, index: int, answer: CkptError | None) -> None:
        """Handle a store's answer after the put has returned."""
        self._release(index)
        if not self._durable:
            return
        if answer is None:
            self._group.backlog.settle(index, self._key)
        elif not isinstance(answer, TakenBackError):
            self._missing(index, answer, alarm=True)
        # A lent store was already noted as missing when it was cut off.
        if index not in self._bytes.lent:
            self._group.backlog.background_put_ended(index, self._key)

    def _missing(self, index: int, reason: CkptError | str, *, alarm: bool) -> None:
        need = RepairNeed(CopyFault.MISSING)
        # Another object is at the key in this store, although the quorum has ours: the copy is
        # wrong, and may be replaced because its bytes are verified as a whole.
        if isinstance(reason, KeyExistsError) and self._verified is not None:
            need = RepairNeed(CopyFault.DAMAGED, self._verified)
        self._group.backlog.note(index, self._key, need, reason=str(reason), alarm=alarm)

    def _release(self, index: int) -> None:
        # The job refers to the caller's buffers and to the copy.
        self._jobs.pop(index, None)
        self._bytes.release(index)


def _put(replica: StoreReplica, key: str, data: Sequence[Buffer]) -> None:
    replica.store.put(key, data)


def _is_transient(error: CkptError) -> bool:
    """Whether trying again in a moment may help."""
    return isinstance(error, UnavailableError) and not isinstance(
        error, StoreFullError | StoreDeniedError
    )


def _no_memory(replica: StoreReplica) -> UnavailableError:
    return UnavailableError(
        f"no memory left for the unfinished writes of this store. store={replica.url}; repeat later"
    )
