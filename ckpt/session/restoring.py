"""Restoring for the whole job: one snapshot for all ranks and items, an older one if it is damaged.

Rank 0 chooses the snapshot. Every rank fills its items and posts its result; rank 0 posts the
verdict. Damage found by any rank sends all ranks to the next older snapshot, and what was filled
before is filled again, so that no mixture can arise. Other errors never cause a fall-back: an older
snapshot would not help, or would silently give up newer work.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec

from ckpt.backends.base import Backend
from ckpt.capture.leaves import World
from ckpt.errors import CkptError, IntegrityError, InternalError, NotFoundError, UsageError
from ckpt.events import Emit, Event
from ckpt.format.canonical import prepare_decoders
from ckpt.format.index import SnapshotIndex
from ckpt.ipc.mailbox import CountingMailbox, wait_for_message
from ckpt.ipc.messages import RemoteError, from_error, to_error
from ckpt.log.catalog import ChunkPlaces, info_of, load_index, load_manifest
from ckpt.log.fold import LogState
from ckpt.restore.apply.apply import apply
from ckpt.restore.fetch import Fetcher
from ckpt.restore.plan import Want, plan_reads
from ckpt.save.persister import SUSPECT_KEY
from ckpt.values import ChunkLocation, Digest, SnapshotId, SnapshotInfo

FILL_WAIT_S = 7200.0
"""How long a rank waits for the others to read their share."""

PATHS_SHOWN_MAX = 5


class _Choice(msgspec.Struct, frozen=True):
    candidate: RestoreCandidate | None = None
    error: RemoteError | None = None


class _Verdict(msgspec.Struct, frozen=True):
    done: bool = False
    next: RestoreCandidate | None = None
    error: RemoteError | None = None


class _Result(msgspec.Struct, frozen=True):
    error: RemoteError | None = None


class RestoreCandidate(msgspec.Struct, frozen=True):
    """A snapshot that may be restored. ``staged``: from the slots of this node's ranks, else from
    the store.
    """

    snapshot: SnapshotId
    staged: bool = False


OpenStaged = Callable[[SnapshotId], AbstractContextManager["tuple[SnapshotIndex, Backend]"]]
"""Opens a staged snapshot: its index, and its slots as a store."""


@dataclass(frozen=True, slots=True)
class FillRules:
    """How items are filled if program and snapshot differ: see ``Checkpointer.restore``."""

    only: tuple[str, ...] | None = None
    missing: Literal["error", "keep"] = "error"
    classes: Literal["same", "any"] = "same"


class Restoring:
    """Fills items from one chosen snapshot. Every rank makes the same calls in the same order.

    ``state`` gives the log's fold, fresh from the store. ``open_staged`` opens snapshots that are
    in slots.

    Over the limit of attributes: a restore needs every source of state that the session has.
    """

    def __init__(
        self,
        mailbox: CountingMailbox,
        backend: Backend,
        *,
        world: World,
        state: Callable[[], LogState],
        emit: Emit,
        threads: int | None,
        budget_bytes: int,
        open_staged: OpenStaged | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._backend = backend
        self._world = world
        self._state = state
        self._emit = emit
        self._threads = threads
        self._budget_bytes = budget_bytes
        self._round = 0
        self._staged = open_staged
        self._left: list[RestoreCandidate] = []
        self._choices: Callable[[], Sequence[RestoreCandidate]] = list
        self._tried: set[RestoreCandidate] = set()
        self._told_suspect: set[SnapshotId] = set()
        self._filled: list[tuple[Mapping[str, object], FillRules]] = []
        self._open = ExitStack()
        self._source: tuple[SnapshotIndex, Backend] | None = None
        self._half_filled: set[str] = set()
        self._places: ChunkPlaces | None = None
        self.verified: dict[Digest, ChunkLocation] = {}
        """Location in the store of the chosen snapshot's chunks that this rank has read and
        verified.
        """
        self.chosen: SnapshotId | None = None
        """The snapshot that all items come from, or None."""
        self.staged = False
        """Whether it is read from slots."""

    def choose(self, choices: Callable[[], Sequence[RestoreCandidate]]) -> SnapshotId | None:
        """Agree on the snapshot to restore; returns None if there is none. Forgets what an earlier
        choice filled.

        ``choices`` is called on rank 0 only: the snapshots to try, best first. Raises rank 0's
        error.
        """
        self._round += 1
        key = f"choice/{self._round}"
        if self._mailbox.rank == 0:
            self._mailbox.post(key, msgspec.json.encode(self._first(choices)))
        choice = msgspec.json.decode(
            wait_for_message(
                self._mailbox, key, timeout_s=FILL_WAIT_S, awaited="rank 0's choice of a snapshot"
            ),
            type=_Choice,
        )
        if choice.error is not None:
            raise to_error(choice.error)
        self._take(choice.candidate)
        self._filled = []
        self._half_filled = set()
        self._places = None
        return self.chosen

    def fill(self, items: Mapping[str, object], rules: FillRules) -> SnapshotInfo:
        """Fill ``items`` in place from the chosen snapshot, or all items so far from an older one
        if it is damaged.

        Returns the facts of the snapshot that they hold now. Raises IntegrityError if no candidate
        is left, and the error that kept any rank from filling. The items then hold a mixture and
        must not be trained on.
        """
        before, new = self._filled, (items, rules)
        todo = [new]
        while True:
            error = self._try(todo)
            verdict = self._verdict(error)
            if verdict.done:
                self._filled = [*before, new]
                return self._info()
            if verdict.next is None:
                assert verdict.error is not None, "a verdict says what to do"
                raise to_error(verdict.error) from error
            if self._source is not None:
                self._half_filled.update(leaf.name for leaf in self._source[0].leaves())
            self._take(verdict.next)
            todo = [*before, new]

    def index(self) -> SnapshotIndex:
        """The index of the chosen snapshot."""
        return self._loaded()[0]

    def close(self) -> None:
        """Release what the last restore read from."""
        self._source = None
        self._open.close()

    def _info(self) -> SnapshotInfo:
        """The facts of the chosen snapshot. For a staged one no store is asked, and there are no
        tags.
        """
        manifest = self._loaded()[0].manifest
        return info_of(manifest, LogState(job=manifest.job) if self.staged else self._state())

    def _first(self, choices: Callable[[], Sequence[RestoreCandidate]]) -> _Choice:
        self._choices, self._tried = choices, set()
        try:
            self._left = list(choices())
        except CkptError as error:
            return _Choice(error=from_error(error, rank=0))
        self._tried.update(self._left)
        return _Choice(candidate=self._left.pop(0) if self._left else None)

    def _take(self, candidate: RestoreCandidate | None) -> None:
        self.close()
        self.chosen = candidate.snapshot if candidate is not None else None
        self.staged = candidate is not None and candidate.staged
        self.verified = {}

    def _loaded(self) -> tuple[SnapshotIndex, Backend]:
        """The chosen snapshot's index, and the store of its chunks."""
        if self.chosen is None:
            raise InternalError("a snapshot's index is asked for before one was chosen")
        if self._source is not None:
            return self._source
        if self.staged:
            assert self._staged is not None, "staged snapshots are chosen only with slots"
            self._source = self._open.enter_context(self._staged(self.chosen))
        else:
            try:
                self._source = load_index(self._backend, self._state(), self.chosen), self._backend
            except NotFoundError as error:
                raise IntegrityError(
                    f"a committed snapshot's records are gone. snapshot={self.chosen} cause={error}"
                ) from error
        return self._source

    def _try(self, todo: Sequence[tuple[Mapping[str, object], FillRules]]) -> CkptError | None:
        with without_garbage_collection():
            return self._try_now(todo)

    def _try_now(self, todo: Sequence[tuple[Mapping[str, object], FillRules]]) -> CkptError | None:
        try:
            index, backend = self._loaded()
            coalesce = backend.capabilities().read_bytes_best
            places = None
            if not self.staged:
                places = ChunkPlaces(backend, self._state, index, before=self._places)
                self._places = places
            with Fetcher(
                backend,
                threads=self._threads,
                budget_bytes=self._budget_bytes,
                places_of=places,
            ) as fetcher:

                def read(wants: Sequence[Want], outputs: Sequence[memoryview]) -> None:
                    plan = plan_reads(
                        index, wants, coalesce_bytes=coalesce, snapshot=str(self.chosen)
                    )
                    fetcher.fetch(plan, outputs)
                    if not self.staged:
                        chunks = (chunk for request in plan.reads for chunk in request.chunks)
                        # What is damaged at its place is written anew by the next save. Its other
                        # place may be of a snapshot that is no base of that one.
                        self.verified.update(
                            (chunk.digest, chunk.location)
                            for chunk in chunks
                            if chunk.digest not in fetcher.read_elsewhere
                        )

                for items, rules in todo:
                    kept = apply(
                        items,
                        index,
                        read=read,
                        world=self._world,
                        only=rules.only,
                        missing=rules.missing,
                        classes=rules.classes,
                    )
                    self._check_kept(kept)
            if fetcher.read_elsewhere:
                self._emit(_read_elsewhere(self.chosen, list(fetcher.read_elsewhere.values())))
        except CkptError as error:
            return error
        except Exception as error:  # load_state_dict, a device: other ranks must not wait in vain
            text = f"an item could not be restored. rank={self._mailbox.rank} cause={error!r}"
            self._verdict(UsageError(text))
            raise
        return None

    def _check_kept(self, kept: Sequence[str]) -> None:
        """What the snapshot lacks keeps its live value, unless a damaged snapshot has half
        overwritten it.
        """
        spoilt = [
            path
            for path in kept
            if any(f"{leaf}/".startswith(f"{path}/") for leaf in self._half_filled)
        ]
        if spoilt:
            raise IntegrityError(
                "the older snapshot lacks what a damaged one may have half overwritten. "
                f"snapshot={self.chosen} "
                f"paths={spoilt[:PATHS_SHOWN_MAX]}; make these objects anew and restore without "
                "them"
            )

    def _verdict(self, error: CkptError | None) -> _Verdict:
        self._round += 1
        result = _Result(from_error(error, rank=self._mailbox.rank) if error is not None else None)
        self._mailbox.post(
            f"filled/{self._round}/{self._mailbox.rank}", msgspec.json.encode(result)
        )
        key = f"verdict/{self._round}"
        if self._mailbox.rank == 0:
            self._mailbox.post(key, msgspec.json.encode(self._judge()))
        verdict = wait_for_message(
            self._mailbox, key, timeout_s=FILL_WAIT_S, awaited="all ranks to restore their share"
        )
        return msgspec.json.decode(verdict, type=_Verdict)

    def _judge(self) -> _Verdict:
        """On rank 0: done if every rank filled, the next older snapshot after damage, else the
        first error.
        """
        errors = []
        for rank in range(self._mailbox.size):
            key = f"filled/{self._round}/{rank}"
            posted = wait_for_message(
                self._mailbox,
                key,
                timeout_s=FILL_WAIT_S,
                awaited=f"rank {rank} to restore its share",
            )
            result = msgspec.json.decode(posted, type=_Result)
            if result.error is not None:
                errors.append(result.error)
        if not errors:
            self._tell_suspect()
            return _Verdict(done=True)
        damage = all(error.code == IntegrityError.code for error in errors)
        if damage and not self._left and (newer := self._newer_candidates()):
            self._left = newer[1:]
            text = (
                f"{newer[0].snapshot} was committed after {self.chosen} was chosen, "
                f"and is restored instead: {errors[0].text}"
            )
            self._emit(Event("chosen-anew", text))
            return _Verdict(next=newer[0])
        if not damage or not self._left:
            return _Verdict(error=errors[0])
        older = self._next_older()
        self._emit(_fallback(self.chosen, older.snapshot, errors[0].text))
        return _Verdict(next=older)

    def _tell_suspect(self) -> None:
        """Say once that the restored snapshot is marked as a mixture of different replicas."""
        manifest = self._loaded()[0].manifest
        different = manifest.metadata.get(SUSPECT_KEY)
        if different is None or manifest.snapshot in self._told_suspect:
            return
        self._told_suspect.add(manifest.snapshot)
        text = (
            f"the restored snapshot of {manifest.snapshot} is a mixture of replicas that differed "
            f"when it was saved: {different}; if that matters, restore an earlier one by its step"
        )
        self._emit(Event("suspect-restored", text, {"step": manifest.snapshot.step}, alarm=True))

    def _next_older(self) -> RestoreCandidate:
        """The next candidate, the first that is not marked as a mixture if there is one."""
        sound = (candidate for candidate in self._left if not self._is_suspect(candidate))
        older = next(sound, self._left[0])
        self._left.remove(older)
        return older

    def _is_suspect(self, candidate: RestoreCandidate) -> bool:
        """Whether its manifest marks it. What can't be read is not: trying it tells why."""
        if candidate.staged:
            return False  # marks are made when a snapshot is written to the store
        try:
            manifest = load_manifest(self._backend, self._state(), candidate.snapshot)
        except CkptError:
            return False
        return SUSPECT_KEY in manifest.metadata

    def _newer_candidates(self) -> list[RestoreCandidate]:
        """What can be restored now and could not when the snapshot was chosen: retention may have
        replaced the only one.

        Empty once items were filled: a run must not be taken to a snapshot that it committed itself
        meanwhile.
        """
        if self._filled:
            return []
        try:
            newer = [candidate for candidate in self._choices() if candidate not in self._tried]
        except CkptError:
            return []  # the first error explains more
        self._tried.update(newer)
        return newer


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable Python's cycle collector: plans are many small objects, and one full pass beside
    torch took 0.15 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _fallback(damaged: SnapshotId | None, older: SnapshotId, reason: str) -> Event:
    assert damaged is not None, "a snapshot was chosen"
    facts = {
        "damaged_epoch": damaged.epoch,
        "damaged_step": damaged.step,
        "epoch": older.epoch,
        "step": older.step,
    }
    text = (
        f"the snapshot of {damaged} can't be read whole, "
        f"restoring the older one of {older}: {reason}"
    )
    return Event("fallback", text, facts, alarm=True)


def _read_elsewhere(snapshot: SnapshotId | None, damage: Sequence[str]) -> Event:
    text = (
        f"{len(damage)} chunks of the snapshot of {snapshot} are damaged where it stored them, and "
        "were read from another place; the next save writes them anew. run ckpt scrub to find what "
        f"else is damaged. first: {damage[0]}"
    )
    return Event("read-elsewhere", text, {"chunks": len(damage)}, alarm=True)


prepare_decoders(RestoreCandidate, _Choice, _Verdict, _Result)
