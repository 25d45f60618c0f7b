"""Where generations come from: the log and the stores that are followed, and one fill of a buffer.

What lies in memory stays or is copied, the rest is read. After a fill every byte of every tensor in
CPU memory was checked against a digest of the snapshot: bytes that stayed and bytes that were
copied as well as those that were read. Memory of a device is not read back; there a tensor stays
only if torch's version counter says that nobody wrote to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ckpt.backends.base import Backend
from ckpt.backends.replicated.open import key_source, open_job_stores, require_key_fits
from ckpt.capture.leaves import World
from ckpt.capture.tensors import local_of
from ckpt.errors import IntegrityError
from ckpt.events import Emit
from ckpt.format.canonical import digest
from ckpt.format.index import SnapshotIndex
from ckpt.log.catalog import ChunkPlaces, info_of, load_index
from ckpt.log.journal import Journal
from ckpt.log.state import LogState
from ckpt.restore.apply.apply import apply
from ckpt.restore.apply.targets import TensorFill, bytes_of, fill_tensors, is_direct
from ckpt.restore.fetch import Fetcher, threads_best
from ckpt.restore.plan import ChunkCopy, ReadPlan, Want, plan_reads
from ckpt.serve.delta import HeldBytes, Place, delta_of
from ckpt.serve.generations import DeviceTensor, Generation, ModelBuffer
from ckpt.serve.shared_reads import SharedReads
from ckpt.session.options import StorageOptions
from ckpt.values import Digest, SnapshotId

IDENTIFY_S = 2.0
"""How often it is asked whether the store is still the same one: a small read."""
READ_BUDGET_BYTES = 64 << 20
FILL_SHARE = 4
"""A fill beside requests uses the number of readers that is best for the store, by this."""
NAMES_SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class SwapReport:
    """How one generation came to be served. Times in seconds, in order: ``look`` (log), ``index``,
    ``fill`` (read, verify, copy), ``check``, ``swap``; ``since_commit`` by the clocks of the
    machine that committed and of this one."""

    generation: str
    read_bytes: int
    reused_bytes: int
    seconds: Mapping[str, float]


@dataclass(slots=True)
class FillReport:
    """What a fill cost. ``read_bytes`` came from the store, ``reused_bytes`` from memory."""

    read_bytes: int = 0
    reused_bytes: int = 0
    changed: list[TensorFill] = field(default_factory=list)
    """The tensors of which some bytes were read: those that no served generation has."""
    seconds: dict[str, float] = field(default_factory=dict)


class GenerationSource:
    """The stores of a job, opened when they first answer, and the item of its snapshots that is
    served. Used by one thread."""

    def __init__(
        self,
        store: str | tuple[str, ...] | Backend,
        storage_options: StorageOptions,
        *,
        item: str,
        share_reads: bool,
        write_quorum: int | None,
        encryption_key: str | None,
        emit: Emit,
    ) -> None:
        self._item = item
        self._key = key_source(encryption_key)
        self._own = isinstance(store, (str, tuple))
        self._backend: Backend = (
            open_job_stores(
                (store,) if isinstance(store, str) else store,
                storage_options,
                write_quorum=write_quorum,
                encryption_key=self._key,
                emit=emit,
            )
            if isinstance(store, (str, tuple))
            else store
        )
        self._journal: Journal | None = None
        self._identified = time.monotonic()
        self._share_reads = share_reads
        self._shared: SharedReads | None = None

    def state(self) -> LogState:
        """The log's fold, fresh from the stores. Raises NotFoundError if there is no log yet,
        UnavailableError if the stores do not answer."""
        if self._journal is None:
            if self._own:
                require_key_fits(self._backend, self._key)
            self._journal = Journal.open(self._backend)
            if self._share_reads:
                self._shared = SharedReads(self._journal.log_id)
        elif time.monotonic() - self._identified >= IDENTIFY_S:
            # An empty folder where a disk was mounted lists no new record, as a quiet log does.
            self._journal.look_at_stores()
            self._identified = time.monotonic()
        return self._journal.refresh()

    def fill(
        self,
        buffer: ModelBuffer,
        donors: Sequence[ModelBuffer],
        state: LogState,
        target: SnapshotId,
        *,
        world: World,
    ) -> tuple[Generation, FillReport]:
        """Make the model in ``buffer`` what the snapshot ``target`` has of the item.

        Raises UsageError that lists all differences if the model has another structure, other
        shapes or dtypes (nothing was written then); IntegrityError for damage; UnavailableError.
        After an error the buffer's model must not be used, and the next fill makes it right.
        """
        begun = time.monotonic()
        index = load_index(self._backend, state, target)
        indexed = time.monotonic()
        shared_bytes = self._shared.shared_bytes if self._shared is not None else 0
        coalesce_bytes = self._backend.capabilities().read_bytes_best
        # While something is served a fill is in no hurry, and its threads compete with requests.
        share = FILL_SHARE if donors else 1
        with Fetcher(
            self._backend,
            threads=threads_best(self._backend) // share,
            budget_bytes=READ_BUDGET_BYTES,
            places_of=ChunkPlaces(self._backend, self.state, index),
            cache=self._shared,
        ) as fetcher:
            filling = _Filling(buffer, donors, index, fetcher, coalesce_bytes)
            apply(
                {self._item: buffer.model},
                index,
                read=filling.read,
                world=world,
                fill=filling.fill,
            )
        report = filling.report
        report.seconds.update(index=indexed - begun, fill=time.monotonic() - indexed)
        if self._shared is not None:
            report.read_bytes -= self._shared.shared_bytes - shared_bytes
            self._shared.tidy()
        return Generation(buffer.model, info_of(index.manifest, state)), report

    def close(self) -> None:
        """Close the stores, unless the user opened them, and leave what replicas share."""
        if self._shared is not None:
            self._shared.close()
        if self._own:
            self._backend.close()


@dataclass(frozen=True, slots=True)
class SnapshotChecks:
    """What a filled model must pass before it is served."""

    allow_nan: bool = False
    check: Callable[[Generation], object] | None = None

    def require(self, candidate: Generation, report: FillReport) -> None:
        """Raise IntegrityError if the candidate must not be served."""
        begun = time.monotonic()
        if not self.allow_nan:
            require_numbers(report.changed)
        if self.check is not None:
            try:
                verdict = self.check(candidate)
            except Exception as error:
                raise IntegrityError(f"check raised {error!r}") from error
            if verdict is False:
                raise IntegrityError("check returned False")
        report.seconds["check"] = time.monotonic() - begun


def require_numbers(fills: Sequence[TensorFill]) -> None:
    """Raise IntegrityError that names tensors with a NaN. Infinities are legal: masks hold them."""
    spoilt = []
    for fill in fills:
        if _has_nan(local_of(fill.tensor)):
            spoilt.append(fill.want.leaf)
    if spoilt:
        raise IntegrityError(
            f"the model has values that are not numbers (NaN). tensors={len(spoilt)} "
            f"first={spoilt[:NAMES_SHOWN_MAX]}"
        )


def _has_nan(tensor: torch.Tensor) -> bool:
    """Whether a value is NaN: the greatest value is, then. A tenth of the time of looking at each,
    and no memory; types that have no greatest value are looked at."""
    if tensor.is_complex():
        return _has_nan(torch.view_as_real(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    try:
        return bool(torch.isnan(tensor.amax()))
    except (NotImplementedError, RuntimeError):  # float8
        return bool(torch.isnan(tensor.float()).any())


class _Filling:
    """One fill of one buffer."""

    def __init__(
        self,
        buffer: ModelBuffer,
        donors: Sequence[ModelBuffer],
        index: SnapshotIndex,
        fetcher: Fetcher,
        coalesce_bytes: int,
    ) -> None:
        self._buffer = buffer
        self._donors = donors
        self._index = index
        self._fetcher = fetcher
        self._coalesce_bytes = coalesce_bytes
        self.report = FillReport()

    def read(self, wants: Sequence[Want], outputs: Sequence[memoryview]) -> None:
        """Read all of it."""
        plan = self._plan(wants)
        self._fetcher.fetch(plan, outputs)
        self.report.read_bytes += plan.read_bytes

    @torch.no_grad()
    def fill(self, fills: Sequence[TensorFill]) -> None:
        """Put the snapshot's bytes into all tensors."""
        full = [fill for fill in fills if local_of(fill.tensor).numel()]
        self._fill_memory([fill for fill in full if is_direct(local_of(fill.tensor))])
        self._fill_devices([fill for fill in full if not is_direct(local_of(fill.tensor))])

    def _plan(self, wants: Sequence[Want]) -> ReadPlan:
        return plan_reads(
            self._index,
            wants,
            coalesce_bytes=self._coalesce_bytes,
            snapshot=str(self._index.manifest.snapshot),
        )

    # ---- tensors in CPU memory, by chunk

    def _fill_memory(self, fills: Sequence[TensorFill]) -> None:
        wants = [fill.want for fill in fills]
        outputs = [bytes_of(local_of(fill.tensor)) for fill in fills]
        held: dict[Place, HeldBytes] = {}

        def reuse(place: Place, copy: ChunkCopy, chunk: Digest) -> bool:
            region = _region(outputs[copy.output], copy)
            known = self._buffer.held.pop(place, None)
            if known is None or known.chunk != chunk or _digest(region) != known.own:
                known = self._copy(place, copy, chunk, region)
            if known is None:
                return False
            held[place] = known
            return True

        delta = delta_of(self._plan(wants), wants, reuse, coalesce_bytes=self._coalesce_bytes)
        # What is known of places that this snapshot does not have is forgotten: its bytes are
        # about to be overwritten.
        self._buffer.held = {}
        self._buffer.memory = {}
        self._fetcher.fetch(delta.plan, outputs)
        self.report.read_bytes += delta.plan.read_bytes
        self.report.reused_bytes += delta.reused_bytes
        read: set[int] = set()
        for place, copy, chunk in delta.missing:
            read.add(copy.output)
            held[place] = HeldBytes(chunk, _digest(_region(outputs[copy.output], copy)))
        self._buffer.held = held
        self._buffer.memory = dict(zip(wants, outputs, strict=True))
        self.report.changed += [fills[number] for number in sorted(read)]
        for number in read:
            _bump(fills[number].tensor)

    def _copy(
        self, place: Place, copy: ChunkCopy, chunk: Digest, region: NDArray[np.uint8]
    ) -> HeldBytes | None:
        """Copy the place's bytes from another generation that has that chunk there."""
        for donor in self._donors:
            known = donor.held.get(place)
            memory = donor.memory.get(place.want)
            if known is None or known.chunk != chunk or memory is None:
                continue
            np.copyto(region, _region(memory, copy))
            if _digest(region) == known.own:
                return known
        return None

    # ---- tensors on devices, and those of odd strides, whole

    def _fill_devices(self, fills: Sequence[TensorFill]) -> None:
        known: dict[Want, DeviceTensor] = {}
        left: list[tuple[TensorFill, frozenset[tuple[Place, Digest]]]] = []
        for fill in fills:
            chunks = _chunks_of(self._plan([fill.want]), fill.want)
            own = self._buffer.on_device.pop(fill.want, None)
            size_bytes = local_of(fill.tensor).numel() * local_of(fill.tensor).element_size()
            if own is not None and own.chunks == chunks and own.unchanged:
                known[fill.want] = own
                self.report.reused_bytes += size_bytes
                continue
            donor = self._device_donor(fill.want, chunks)
            if donor is None:
                left.append((fill, chunks))
                continue
            fill.tensor.copy_(donor.tensor)
            known[fill.want] = DeviceTensor.now(fill.tensor, chunks)
            self.report.reused_bytes += size_bytes
        self._buffer.on_device = {}
        fill_tensors([fill for fill, _ in left], self.read)
        known.update((fill.want, DeviceTensor.now(fill.tensor, chunks)) for fill, chunks in left)
        self._buffer.on_device = known
        self.report.changed += [fill for fill, _ in left]

    def _device_donor(
        self, want: Want, chunks: frozenset[tuple[Place, Digest]]
    ) -> DeviceTensor | None:
        for donor in self._donors:
            known = donor.on_device.get(want)
            if known is not None and known.chunks == chunks and known.unchanged:
                return known
        return None


def _chunks_of(plan: ReadPlan, want: Want) -> frozenset[tuple[Place, Digest]]:
    return frozenset(
        (Place(want, copy), chunk.digest)
        for request in plan.reads
        for chunk in request.chunks
        for copy in chunk.copies
    )


def _region(memory: memoryview, copy: ChunkCopy) -> NDArray[np.uint8]:
    """The bytes of a copy's place in its output, of shape ``copy.shape + (itemsize,)``."""
    region: NDArray[np.uint8] = np.ndarray(
        (*copy.shape, copy.itemsize_bytes),
        np.uint8,
        memory,
        copy.target_offset_bytes,
        (*copy.target_strides_bytes, 1),
    )
    return region


def _digest(region: NDArray[np.uint8]) -> Digest:
    return digest(np.ascontiguousarray(region).reshape(-1).data)


def _bump(tensor: torch.Tensor) -> None:
    """Advance autograd's version counter: the tensor was written to."""
    local = local_of(tensor)
    if not local.is_inference():
        torch.autograd.graph.increment_version(local)
