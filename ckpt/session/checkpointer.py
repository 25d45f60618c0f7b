"""``ckpt.Checkpointer``: save, restore and read without the decorator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal

import torch

from ckpt.errors import NotFoundError, UsageError
from ckpt.events import Fact
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import ChunkPlaces, info_of, load_index, load_manifest, select, snapshots
from ckpt.log.select import require_known_newest
from ckpt.restore.reader import SnapshotReader
from ckpt.restore.verify import VerifyReport, verify
from ckpt.session.options import (
    KeepArgument,
    SessionOptions,
    StorageOptions,
    StoreArgument,
    check_grace,
    check_items,
    check_keep,
    check_metadata,
    check_only,
    check_store,
    check_tag,
    is_count,
)
from ckpt.session.restoring import FillRules, RestoreCandidate
from ckpt.session.saving import Pending
from ckpt.session.session import Session
from ckpt.values import SnapshotInfo


class Checkpointer:
    """Snapshots of a state in one store.

    Works in a plain process, under torchrun and in a notebook. With several ranks ``save``,
    ``save_async``, ``restore`` and ``close`` are called by every rank in the same order; any rank
    may call the rest. Not thread-safe. Nothing is touched before the first call. A context manager:
    leaving it closes.

    A state is a dict of the user's names to modules, optimizers, schedulers, loaders, generators,
    anything with ``state_dict`` and ``load_state_dict``, dicts, lists and tensors.
    """

    def __init__(  # noqa: PLR0913  one keyword for each choice a user has
        self,
        store: StoreArgument,
        *,
        job: str | None = None,
        slots: int | Literal["auto"] = 2,
        compression: Literal["off", "auto", "on"] = "auto",
        threads: int | None = None,
        storage_options: StorageOptions = None,
        write_quorum: int | None = None,
        encryption_key: str | None = None,
        keep: KeepArgument = None,
        grace: str = "auto",
    ) -> None:
        """``store`` is a path, an fsspec URL or a ``Backend``; ``job`` names the run in it
        (default: its last path component).

        Or ``store`` is a list of paths and URLs that shall all hold the same: a snapshot is durable
        once ``write_quorum`` of them have it (default: the majority), and is read from the nearest
        that is intact. ``storage_options`` go to fsspec: for all stores, or a list with one entry
        for each. ``encryption_key`` says where the key is that encrypts everything that leaves this
        machine: ``"file:PATH"``, ``"env:NAME"`` or ``"command:WORDS"``.

        ``slots``: how many staged snapshots memory may hold, each as large as this rank's share of
        the state; another save waits until one is durable. ``"auto"``: 3, 2 or 1, with which a
        tenth of all memory stays free. ``compression``: chunks are compressed
        never, if it pays, or always. ``threads`` copy and read (default: 2 to copy, enough to fill
        the link to read).

        ``keep`` says which snapshots stay, such as ``keep_last(5) | keep_best("loss")`` or
        ``"last=5,best=loss:1"`` (default: all); the newest and tagged ones always stay. The others
        are dropped in the background after saves. Their bytes are deleted ``grace`` later, by the
        stores' clocks (default: a quarter of an hour, more if restores take longer, less while a
        store is full): longer than any restore that may have begun before.
        """
        options = SessionOptions(
            job=job,
            slots=slots,
            compression=compression,
            threads=threads,
            storage_options=storage_options,
            write_quorum=write_quorum,
            encryption_key=encryption_key,
            keep=check_keep(keep),
            grace_s=check_grace(grace),
        )
        self._session = Session(check_store(store, write_quorum=write_quorum), options)

    def prepare(self, state: Mapping[str, object]) -> None:
        """Lay out and pre-fault the slots for ``state`` in the background, so that the first save
        is as quick as the rest.

        Call it early, while the program still reads data or compiles; every rank calls it. It is
        never needed: without it the first save takes longer, because it touches fresh memory.
        Raises UsageError for what can't be captured.
        """
        self._session.attach_keeper()
        self._session.saving.prepare(state)

    def save_async(
        self,
        state: Mapping[str, object],
        *,
        step: int,
        tag: str | None = None,
        metadata: Mapping[str, Fact] | None = None,
    ) -> Pending:
        """Copy ``state`` now and make it durable in the background. Returns once it is staged;
        training may change it then.

        ``step`` is the number of completed steps; it grows from save to save until an older
        snapshot is restored. Saves are queued, never mixed: with all slots in use the call waits
        for one. ``tag`` names the snapshot once it is durable; ``metadata`` is stored with it.
        Blocks for one memcpy of this rank's share. Raises UsageError for what can't be captured,
        FencedError if a newer attempt took over.
        """
        check_items(state)
        if not is_count(step):
            raise UsageError(f"a step is a whole number from 0 on. step={step!r}")
        if tag is not None:
            check_tag(tag)
        facts = check_metadata(metadata or {})
        return self._session.save(
            state, step, metadata=facts, tags=(tag,) if tag is not None else ()
        )

    def save(
        self,
        state: Mapping[str, object],
        *,
        step: int,
        tag: str | None = None,
        metadata: Mapping[str, Fact] | None = None,
    ) -> SnapshotInfo:
        """As ``save_async``, and durable on return. Raises what kept it from becoming durable."""
        return self.save_async(state, step=step, tag=tag, metadata=metadata).durable()

    def restore(
        self,
        state: Mapping[str, object],
        *,
        step: int | None = None,
        tag: str | None = None,
        epoch: int | None = None,
        only: Sequence[str] | None = None,
        missing: Literal["error", "keep"] = "error",
        classes: Literal["same", "any"] = "same",
        stale: Literal["error", "allow"] = "error",
    ) -> SnapshotInfo:
        """Fill ``state``'s objects in place and return the facts of the snapshot that they now
        hold.

        Without ``step`` and ``tag`` it is the newest; if that can't be read whole, the next older
        one, with a warning in the log ``ckpt``. Every byte is verified. ``only`` restores just
        these leaves: names or whole leading path components (``["model", "optimizer/state"]``).
        ``missing="keep"`` keeps live values that the snapshot does not have. Optimizers and other
        objects with state must be of the class (by its name) whose state was saved;
        ``classes="any"`` says that another one is meant. The world may have
        another size: shared leaves are taken as they are, per-rank ones by rank modulo the old
        size. Later saves continue from here.

        If a newer snapshot than the newest one seen may exist (the log has a hole, or too few of
        its stores answer), nothing is restored: training that went on from the older one would
        leave the newer behind. ``stale="allow"`` takes the newest that is seen all the same.

        Raises NotFoundError if there is no such snapshot, UsageError naming everything that does
        not fit, before anything is changed, and IntegrityError if nothing is readable; the state
        may then be half filled and must not be used.
        """
        check_items(state)
        _check_choice(step, epoch, tag)
        if missing not in ("error", "keep"):
            raise UsageError(f"missing is 'error' or 'keep'. missing={missing!r}")
        if classes not in ("same", "any"):
            raise UsageError(f"classes is 'same' or 'any'. classes={classes!r}")
        if stale not in ("error", "allow"):
            raise UsageError(f"stale is 'error' or 'allow'. stale={stale!r}")
        rules = FillRules(check_only(only), missing, classes)
        session = self._session

        def choices() -> Sequence[RestoreCandidate]:
            if step is None and tag is None and epoch is None:
                found = session.newest_first()
                if stale == "error" and found and not found[0].staged:
                    require_known_newest(session.state())
                return found
            return [RestoreCandidate(select(session.state(), step=step, epoch=epoch, tag=tag))]

        return session.restore(state, choices, rules)

    def latest(self) -> SnapshotInfo | None:
        """The newest snapshot, or None if there is none yet. Reads the log; other ranks are not
        involved.

        What the keeper of a dead run still holds becomes durable first, as for ``restore``; that is
        waited for, one minute at most.
        """
        self._session.await_previous_run()
        newest = [
            candidate.snapshot for candidate in self._session.newest_first() if not candidate.staged
        ]
        if not newest:
            return None
        state = self._session.state()
        return info_of(load_manifest(self._session.backend, state, newest[0]), state)

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """All snapshots that exist, in the order of their commits. Reads the log and their
        manifests; waits as ``latest`` does.
        """
        self._session.await_previous_run()
        try:
            return snapshots(self._session.backend, self._session.state())
        except NotFoundError:
            return ()

    def read(
        self,
        leaf: str,
        *,
        rows: slice | None = None,
        rank: int = 0,
        step: int | None = None,
        tag: str | None = None,
        epoch: int | None = None,
    ) -> torch.Tensor:
        """One tensor, or ``rows`` of its first dimension, without reading the rest; verified.
        ``rank`` picks per-rank leaves.

        Reads only the chunks that hold the rows. Raises NotFoundError naming close matches.
        """
        backend, index = self._session.backend, self._index(step, epoch, tag)
        places = ChunkPlaces(backend, self._session.state, index)
        with SnapshotReader(backend, index, places_of=places) as reader:
            values = reader.read(leaf, rank=rank, rows=rows)
        dtype: torch.dtype = getattr(torch, values.dtype)
        if values.array.size == 0:
            return torch.empty(values.array.shape, dtype=dtype)
        return (
            torch.from_numpy(values.array.reshape(-1).view("uint8"))
            .view(dtype)
            .reshape(values.array.shape)
        )

    def verify(
        self, *, step: int | None = None, tag: str | None = None, epoch: int | None = None
    ) -> VerifyReport:
        """Read every byte of one snapshot (default: the newest) and report everything that is
        damaged.
        """
        return verify(self._index(step, epoch, tag), self._session.backend)

    def close(self) -> None:
        """Wait until everything is durable and leave. Raises what kept the last snapshot from
        becoming durable.
        """
        self._session.finish(run=False)

    def _index(self, step: int | None, epoch: int | None, tag: str | None) -> SnapshotIndex:
        _check_choice(step, epoch, tag)
        state = self._session.state()
        return load_index(
            self._session.backend, state, select(state, step=step, epoch=epoch, tag=tag)
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._session.abandon()


def _check_choice(step: int | None, epoch: int | None, tag: str | None) -> None:
    for name, number in (("step", step), ("epoch", epoch)):
        if number is not None and not is_count(number):
            raise UsageError(f"{name} is a whole number from 0 on. {name}={number!r}")
    if tag is not None:
        check_tag(tag)
