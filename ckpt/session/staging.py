"""From live objects to a sealed slot: capture, ownership, copy. The only part of a save that
training waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch

from ckpt.capture.leaves import Capture, TensorLeaf, World
from ckpt.capture.owners import LeafShares, ReplicatedBox, owned_boxes
from ckpt.capture.plan import CapturePlan
from ckpt.errors import InternalError, UnavailableError, UsageError
from ckpt.events import Fact
from ckpt.format.canonical import digest_hex
from ckpt.ipc.mailbox import CountingMailbox, wait_for_message
from ckpt.save.persister import SealedSlot
from ckpt.staging.copy import THREADS_DEFAULT, CopyPlan, CopySource
from ckpt.staging.devices import HostCopies
from ckpt.staging.memory import MemoryRoom
from ckpt.staging.slot import Pin, Regions, Slot, SlotPool, read_slot
from ckpt.values import DTYPE_BYTES, Box, Leaf, SnapshotId, StagedIndex

SLOT_WAIT_S = 3600.0
"""How long a forced snapshot waits for a slot that an upload holds before it is given up."""

CompareReplicas = Callable[[Sequence[TensorLeaf]], None]
"""Called once for each new set of replicated leaves. Raises UsageError if replicas differ."""


class CopyTime(NamedTuple):
    """When a copy began, with all devices done, and ended, on the monotonic clock."""

    began_s: float
    ended_s: float


_NEVER = CopyTime(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class StagedSlot:
    """A sealed slot and its index. ``release`` lets the slot be reused; call it once."""

    slot: Slot
    index: StagedIndex
    pin: Pin
    shared: Mapping[str, tuple[int, str]]
    """What replicas must agree on for their shares to fit together: see ``replicated_leaves``."""
    samples: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """For each group of replicas, what a sample is of and its digest: see ``ReplicaSampler``."""
    copied: CopyTime = _NEVER

    def release(self) -> None:
        """Let the slot be reused."""
        self.pin.release()

    def sealed(self) -> SealedSlot:
        """What a persister takes."""
        return SealedSlot(
            index=self.index,
            data=self.slot.data[:],
            release=self.release,
            shared=self.shared,
            samples=self.samples,
        )


def sealed_again(slot: Slot) -> SealedSlot:
    """What a persister takes of a slot that was sealed before, and is to be made durable by this
    process after all. Pinned until it is released.
    """
    sealed = read_slot(slot.memory)
    assert sealed is not None, "nobody else writes to it"
    index, generation = sealed
    return SealedSlot(
        index=index,
        data=slot.data[:],
        release=slot.pin().release,
        unchanged=lambda: slot.generation == generation,
    )


class Stager:
    """Stages one rank's share of the state. Keeps plan, layout and slots from one snapshot to the
    next.

    Used by one thread. ``slots`` and ``room`` are the pool's. ``compare_replicas`` is called the
    first time that a set of replicas appears. ``on_short`` is called once if memory becomes short
    during training, ``on_unsampled`` once if a device has no memory for a sample of replicas.
    ``copies`` copies from CUDA devices.

    Over the limit of attributes: plan, layout, slots and buffers are kept from one snapshot to the
    next, and all of them change if one does.
    """

    def __init__(
        self,
        world: World,
        *,
        slots: int,
        room: MemoryRoom | None = None,
        threads: int | None,
        compare_replicas: CompareReplicas,
        on_short: Callable[[UsageError], None] | None = None,
        on_unsampled: Callable[[str], None] | None = None,
        copies: HostCopies | None = None,
    ) -> None:
        self._copies = HostCopies() if copies is None else copies
        self._world = world
        self._asked = (slots, room)
        self._threads = threads or THREADS_DEFAULT
        self._helpers = ThreadPoolExecutor(
            max(1, self._threads - 1), thread_name_prefix="ckpt-stage"
        )
        self._agree = compare_replicas
        self._short = on_short
        self._unsampled = on_unsampled
        self._staged_once = False
        self._plan: CapturePlan | None = None
        self._items: tuple[tuple[str, int], ...] = ()
        self._seen: tuple[TensorLeaf, ...] | None = None
        self._agreed: tuple[tuple[Leaf, Box, tuple[int, ...]], ...] = ()
        self._shared: Mapping[str, tuple[int, str]] = {}
        self._copy: CopyPlan | None = None
        self._pool: SlotPool | None = None
        self._regions: Regions | None = None
        self._sampler = ReplicaSampler(())
        self._sample_refused = False
        self.origin = ""
        """Of the epoch that is staged in: see ``StagedIndex``."""

    def use_regions(self, regions: Regions) -> None:
        """Take the slots' memory from ``regions``. Before the first snapshot and the first
        ``prepare``.
        """
        if self._pool is not None:
            raise InternalError("slots are laid out already.")
        self._regions = regions

    def prepare(self, items: Mapping[str, object]) -> None:
        """Lay the slots out and pre-fault them in the background, so that the first snapshot is as
        quick as the rest.
        """
        self._layout(self._capture(items))

    def stage(
        self,
        items: Mapping[str, object],
        snapshot: SnapshotId,
        *,
        metadata: Mapping[str, Fact],
        wait_s: float,
        sample: bool = False,
    ) -> StagedSlot:
        """Copy this rank's share of ``items`` into a slot and seal it. Costs one memcpy of it and
        one digest pass in cache; with ``sample`` also a digest of a 400th as much of what
        replicas hold alike, another part for each snapshot.

        Raises UnavailableError if no slot is free within ``wait_s`` seconds, or if memory is short
        now but was not before; UsageError for what can't be captured or never fitted in memory.
        """
        if wait_s <= 0 and self._pool is not None and not self._pool.has_room():
            # A skip costs no wait for the devices. Other ranks may stage, and compare replicas.
            _, pool = self._layout(self._capture(items))
            if not pool.has_room():
                raise _no_slot(pool, snapshot, wait_s)
        self._copies.settle()  # what objects give as their state may be in pinned memory too
        began_s = time.monotonic()
        capture = self._capture(items)
        plan, pool = self._layout(capture)
        slot = pool.acquire(wait_s=wait_s)
        if slot is None:
            raise _no_slot(pool, snapshot, wait_s)
        pin = (
            slot.pin()
        )  # before the seal: a sealed slot without pin may be given to another writer
        try:
            slot.begin()
            shards = plan.run(
                slot, objects=_objects(capture), executor=self._helpers, threads=self._threads
            )
            index = StagedIndex(
                snapshot=snapshot,
                rank=self._world.rank,
                world_size=self._world.size,
                shards=shards,
                aliases=tuple(
                    leaf.leaf for leaf in capture.tensors if leaf.leaf.alias_of is not None
                ),
                metadata=metadata,
                origin=self.origin,
            )
            samples = self._samples(snapshot) if sample else {}
            slot.seal(index)
        except BaseException:
            slot.invalidate()
            pin.release()
            raise
        self._staged_once = True
        copied = CopyTime(began_s, time.monotonic())
        return StagedSlot(slot, index, pin, self._shared, samples, copied)

    def _samples(self, snapshot: SnapshotId) -> Mapping[str, tuple[str, str]]:
        """The sample of this snapshot; nothing where a device's memory is full: training owns it,
        and a snapshot without a sample is as good. Said once.
        """
        try:
            return self._sampler.samples(sample_number(snapshot))
        except torch.OutOfMemoryError as error:
            if not self._sample_refused and self._unsampled is not None:
                self._unsampled(f"snapshot={snapshot} cause={error!r}")
            self._sample_refused = True
            return {}

    def staged_again(self, snapshot: SnapshotId) -> StagedSlot | None:
        """A snapshot that was staged before and whose slot still holds it, or None."""
        for slot in self.slots:
            pin = slot.pin()  # first: from here on it stays what it is
            if slot.snapshot == snapshot and (sealed := read_slot(slot.memory)) is not None:
                return StagedSlot(slot, sealed[0], pin, self._shared)
            pin.release()
        return None

    def close(self) -> None:
        """Give the slots' memory back."""
        self._helpers.shutdown()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _capture(self, items: Mapping[str, object]) -> Capture:
        identity = tuple((name, id(item)) for name, item in items.items())
        if self._plan is None or identity != self._items:
            self._plan = CapturePlan(items, world=self._world)
            self._items = identity
        return self._plan.capture()

    def _compare(self, tensors: Sequence[TensorLeaf]) -> None:
        """Compare replicas if their set has changed: that happens on all their ranks at once or on
        none.

        A rank's own leaves, and addresses, may change on one rank alone; waiting for the other
        ranks would then never end.
        """
        shared = [leaf for leaf in tensors if len(leaf.replicas) > 1]
        replicated = tuple((leaf.leaf, leaf.box, leaf.replicas) for leaf in shared)
        if replicated != self._agreed:
            self._copies.settle()
            self._agree(shared)
            self._agreed = replicated
            self._shared = replicated_leaves(shared)

    def _layout(self, capture: Capture) -> tuple[CopyPlan, SlotPool]:
        if capture.tensors is not self._seen or self._copy is None:
            self._compare(capture.tensors)
            self._copy = CopyPlan.build(
                [*_tensors(capture, self._world.rank), *_objects(capture)], self._copies
            )
            self._seen = capture.tensors
            self._sampler = ReplicaSampler(capture.tensors)
        needed_bytes = max(
            self._copy.data_bytes, self._copy.needed_bytes([leaf.data for leaf in capture.objects])
        )
        if self._pool is None:
            self._pool = SlotPool(
                count=self._asked[0],
                room=self._asked[1],
                data_bytes=needed_bytes,
                header_bytes=self._copy.header_bytes,
                regions=self._regions,
                on_short=self._short,
                pinner=self._copies,
            )
        else:
            self._pool.warm()
            self._grow(self._pool, needed_bytes, self._copy.header_bytes)
        return self._copy, self._pool

    def _grow(self, pool: SlotPool, data_bytes: int, header_bytes: int) -> None:
        try:
            pool.resize(data_bytes, header_bytes=header_bytes)
        except UsageError as error:
            if not self._staged_once:
                raise
            if self._short is not None:
                self._short(error)
            raise UnavailableError(
                f"the state has grown and its slots can't grow: {error}"
            ) from error

    @property
    def slots_max(self) -> int:
        """How many slots there are or will be: fewer than asked for if memory is short."""
        return self._pool.count if self._pool is not None else self._asked[0]

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots made so far."""
        return self._pool.slots if self._pool is not None else ()


def _no_slot(pool: SlotPool, snapshot: SnapshotId, wait_s: float) -> UnavailableError:
    short = f"; {pool.shortage}" if pool.shortage is not None else ""
    return UnavailableError(
        f"all slots are held by uploads. snapshot={snapshot} slots={pool.count} "
        f"waited_s={wait_s:g}; "
        f"the store is too slow for this interval: save less often or allow more slots{short}"
    )


def replicated_leaves(shared: Sequence[TensorLeaf]) -> dict[str, tuple[int, str]]:
    """For each group of replicas, by digest of its ranks: how many ranks, and a digest of the
    leaves that they share, in order.
    """
    groups: dict[tuple[int, ...], list[tuple[Leaf, Box]]] = {}
    for leaf in shared:
        groups.setdefault(leaf.replicas, []).append((leaf.leaf, leaf.box))
    encode = msgspec.json.encode
    return {
        digest_hex(encode(ranks)): (len(ranks), digest_hex(encode(leaves)))
        for ranks, leaves in groups.items()
    }


SAMPLE_SHARE = 400
"""A sample is a 400th of what a rank stages of what replicas hold alike: it takes 0.3 ms, and 0.3 %
of the time of a stage of 1 GiB.
"""


SAMPLE_BYTES_MIN = 256 << 10
"""A sample is not smaller: less would take as long, and small groups are looked at whole."""

SAMPLE_TENSORS_MAX = 32
"""A sample is of not more tensors, give or take two: each costs some calls, however small it is."""

SAMPLE_JOINED_BYTES_MAX = 256 << 10
"""Parts of a sample that are smaller are joined and digested at once."""

SAMPLE_SUM_ELEMENTS = 1 << 16
"""As ``SUM_ELEMENTS``, for samples: training may have left little memory of the device."""


def sample_number(snapshot: SnapshotId) -> int:
    """Which sample is taken with a snapshot: the same on all ranks, whatever each staged before.

    Mixed, as intervals that divide the number of shares would otherwise come by few of them.
    """
    return int(digest_hex(f"{snapshot.epoch} {snapshot.step}".encode())[:15], 16)


@dataclass(frozen=True, slots=True)
class _SampledGroup:
    """What one group of replicas is sampled by: shares of its leaves, then sets of small ones.

    Equal shares alone could each be of thousands of tensors of one number, such as optimizers'
    ``step``.
    """

    name: str
    large: tuple[TensorLeaf, ...]
    shares: LeafShares
    count: int
    small: tuple[tuple[TensorLeaf, ...], ...]

    @classmethod
    def of(cls, ranks: tuple[int, ...], leaves: Sequence[TensorLeaf]) -> _SampledGroup:
        """Cut a group up. O(leaves)."""
        sizes = [leaf.box.elements * DTYPE_BYTES[leaf.leaf.dtype] for leaf in leaves]
        most = SAMPLE_SHARE * len(ranks)
        share_bytes = max(sum(sizes) // most, SAMPLE_BYTES_MIN)
        least = share_bytes // SAMPLE_TENSORS_MAX if len(leaves) > SAMPLE_TENSORS_MAX else 0
        pairs = list(zip(leaves, sizes, strict=True))
        large = [(leaf, size) for leaf, size in pairs if size >= least]
        small = [leaf for leaf, size in pairs if 0 < size < least]
        large_bytes = sum(size for _, size in large)
        return cls(
            digest_hex(msgspec.json.encode(ranks)),
            tuple(leaf for leaf, _ in large),
            LeafShares([_replicated(leaf) for leaf, _ in large]),
            min(most, max(large_bytes // SAMPLE_BYTES_MIN, 1)) if large_bytes else 0,
            tuple(
                tuple(small[start : start + SAMPLE_TENSORS_MAX])
                for start in range(0, len(small), SAMPLE_TENSORS_MAX)
            ),
        )

    def sample(self, number: int) -> tuple[str, list[tuple[TensorLeaf, Box]]] | None:
        """What the ``number``-th sample is of and its parts; None if it is of nothing."""
        count = self.count + len(self.small)
        if not count:
            return None
        number %= count
        if number < self.count:
            boxes = self.shares.boxes(number, self.count)
            parts = [(self.large[share.index], share.box) for share in boxes]
        else:
            parts = [(leaf, leaf.box) for leaf in self.small[number - self.count]]
        if not parts:
            return None
        last = f" to {parts[-1][0].leaf.name}" if len(parts) > 1 else ""
        return f"{parts[0][0].leaf.name}{last} [part {number + 1} of {count}]", parts


class ReplicaSampler:
    """Digests a share of what each group of replicas holds alike, another one each time.

    Copies that have diverged since they were compared are found so, without a look at all bytes.
    Made for one set of leaves, in O(leaves).
    """

    def __init__(self, tensors: Sequence[TensorLeaf]) -> None:
        groups: dict[tuple[int, ...], list[TensorLeaf]] = {}
        for leaf in tensors:
            if len(leaf.replicas) > 1 and leaf.leaf.alias_of is None:
                groups.setdefault(leaf.replicas, []).append(leaf)
        self._groups = [_SampledGroup.of(ranks, leaves) for ranks, leaves in groups.items()]

    def samples(self, number: int) -> dict[str, tuple[str, str]]:
        """For each group, by digest of its ranks: which leaves a share of their elements is of, and
        a digest of it.

        Every replica takes the same share for the same ``number``; consecutive numbers come by all
        shares. Samples of different shares have different labels, and are never compared. Costs a
        digest pass over the shares, and calls for ``SAMPLE_TENSORS_MAX`` tensors of each group.
        Raises torch.OutOfMemoryError if a device has no scratch memory for it.
        """
        samples: dict[str, tuple[str, str]] = {}
        for group in self._groups:
            if (taken := group.sample(number)) is not None:
                label, parts = taken
                pieces = _joined([_narrowed(leaf, box) for leaf, box in parts])
                digests = content_digests(pieces, elements=SAMPLE_SUM_ELEMENTS)
                samples[group.name] = (label, digest_hex("".join(digests).encode()))
        return samples


def _joined(pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bits of ``pieces``: small ones of one size of element and device as one tensor. All
    replicas join the same ones in the same order.
    """
    joined: list[torch.Tensor] = []
    small: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for piece in pieces:
        bits = _integers(piece.detach())
        if bits.numel() * bits.element_size() > SAMPLE_JOINED_BYTES_MAX:
            joined.append(bits)
        else:
            small.setdefault((bits.device, bits.dtype), []).append(bits.reshape(-1))
    joined.extend(some[0] if len(some) == 1 else torch.cat(some) for some in small.values())
    return joined


def _replicated(leaf: TensorLeaf) -> ReplicatedBox:
    return ReplicatedBox(leaf.box, DTYPE_BYTES[leaf.leaf.dtype], leaf.replicas)


def _narrowed(leaf: TensorLeaf, box: Box) -> torch.Tensor:
    tensor = leaf.tensor
    if box == leaf.box:
        return tensor
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start - leaf.box.offsets[dim], size)
    return tensor


def _tensors(capture: Capture, rank: int) -> Iterator[CopySource]:
    """What this rank stages of each tensor: all of it, or its share of what replicas hold too.
    Aliases have no bytes.
    """
    own = [leaf for leaf in capture.tensors if leaf.leaf.alias_of is None]
    shared = [leaf for leaf in own if len(leaf.replicas) > 1]
    for leaf in own:
        if len(leaf.replicas) == 1:
            yield CopySource(leaf.leaf, leaf.box, leaf.tensor)
    groups = [_replicated(leaf) for leaf in shared]
    for share in owned_boxes(groups, rank=rank):
        leaf = shared[share.index]
        yield CopySource(leaf.leaf, leaf.box, leaf.tensor, share.box)


def _objects(capture: Capture) -> list[CopySource]:
    return [
        CopySource(leaf.leaf, Box.whole(leaf.leaf.shape), leaf.data) for leaf in capture.objects
    ]


# ---- replicas: compared by digest once, the first time that a set of replicated leaves appears.
# Who stores which bytes of a replicated tensor is computed, not agreed, so each rank stores its
# share of its own copy. If the copies differed, the snapshot would be a mixture of them.

COMPARE_WAIT_S = 1800.0
NAMED_MAX = 5


def compare_replicas(
    mailbox: CountingMailbox,
    leaves: Sequence[TensorLeaf],
    *,
    n: int,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Check that every replica of ``leaves`` has the same bytes. All ranks call it with the same
    ``n``, counted up.

    Costs one digest pass over the local copies, on their devices, and one message a rank. Waits for
    the other ranks' digests; raises UnavailableError once ``stop()`` is true. Raises UsageError
    naming the leaves that differ.
    """
    if mailbox.size == 1:
        return
    found = digests_of_replicas([leaf.tensor for leaf in leaves])
    own_digests = {leaf.leaf.name: one for leaf, one in zip(leaves, found, strict=True)}
    mailbox.post(f"replicas/{n}/{mailbox.rank}", msgspec.json.encode(own_digests))
    first_digests: dict[int, dict[str, str]] = {}
    differing: list[str] = []
    for leaf in leaves:
        first = leaf.replicas[0]
        if first == mailbox.rank:
            continue
        if first not in first_digests:
            posted = wait_for_message(
                mailbox,
                f"replicas/{n}/{first}",
                timeout_s=COMPARE_WAIT_S,
                awaited=f"rank {first}'s digests of replicated leaves",
                stop=stop,
            )
            first_digests[first] = msgspec.json.decode(posted, type=dict[str, str])
        if first_digests[first].get(leaf.leaf.name) != own_digests[leaf.leaf.name]:
            differing.append(f"{leaf.leaf.name} (ranks {first} and {mailbox.rank})")
    if differing:
        named = ", ".join(differing[:NAMED_MAX])
        more = f" and {len(differing) - NAMED_MAX} more" if len(differing) > NAMED_MAX else ""
        raise UsageError(
            f"replicas differ between ranks, so they are not one tensor. leaves={named}{more}; "
            "synchronise them (a "
            "data-parallel wrapper broadcasts parameters once, when it is made), or track the "
            "unwrapped module to store each "
            "rank's own"
        )


def digests_of_replicas(
    tensors: Sequence[torch.Tensor],
    *,
    on_device: Callable[[torch.Tensor], bool] | None = None,
) -> list[str]:
    """As ``content_digests``; where a device has no scratch memory for them the same sums are
    computed on the host, one tensor at a time: other ranks wait for them.
    """
    on_device = on_device or is_on_device
    try:
        return content_digests(tensors, on_device=on_device)
    except torch.OutOfMemoryError:
        digests: list[str] = []
        for tensor in tensors:
            digests += content_digests(
                [tensor.detach().cpu()], on_device=_always if on_device(tensor) else _never
            )
        return digests


def _always(tensor: torch.Tensor) -> bool:
    return True


def _never(tensor: torch.Tensor) -> bool:
    return False


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes are on an accelerator that can digest them there."""
    return tensor.device.type == "cuda"


def content_digests(
    tensors: Sequence[torch.Tensor],
    *,
    on_device: Callable[[torch.Tensor], bool] = is_on_device,
    elements: int | None = None,
) -> list[str]:
    """A digest of each tensor's elements, equal for equal bits of equal shapes and dtypes.

    Tensors on a device are digested there, at the speed of its memory, and 16 bytes of each are
    copied to the host; one wait for each device. ``elements`` (or SUM_ELEMENTS) are digested there
    at a time, and digests of other numbers differ. Not made to withstand forgery. Raises
    torch.OutOfMemoryError if a device has no scratch memory for it.
    """
    sums = [device_sums(one, elements=elements) if on_device(one) else None for one in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, pair in enumerate(sums):
        if pair is not None:
            by_device.setdefault(pair.device, []).append(index)
    digests = [
        "" if pair is not None else _digest(tensor)
        for tensor, pair in zip(tensors, sums, strict=True)
    ]
    for indices in by_device.values():
        values = torch.stack([pair for index in indices if (pair := sums[index]) is not None])
        for index, (one, two) in zip(indices, values.tolist(), strict=True):
            digests[index] = f"{one & _WORD:016x}{two & _WORD:016x}"
    return digests


SUM_ELEMENTS = 1 << 20
"""Elements that are digested at a time on a device: a few times 8 MiB of scratch memory there."""

_WORD = (1 << 64) - 1


def device_sums(tensor: torch.Tensor, *, elements: int | None = None) -> torch.Tensor:
    """Two 64-bit sums of a tensor's elements, weighted by odd numbers, on its own device.

    A change of one element always changes both: an odd weight times a difference is never a
    multiple of 2^64. ``elements`` (or SUM_ELEMENTS) are summed at a time. Waits for nothing.
    """
    elements = elements or SUM_ELEMENTS
    bits = _integers(tensor.detach())
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    weights = _weights(min(elements, max(1, bits.numel())), bits.device)
    for piece in _pieces(bits, elements):
        flat = piece.reshape(-1).to(torch.int64)
        # Two flipped signs would cancel: their differences are both 2^63, whatever the weights.
        flat = flat ^ ((flat >> 32) & _LOW_WORD)
        sums = sums * _STEP + (weights[:, : flat.numel()] * flat).sum(dim=1)
    return sums


_LOW_WORD = (1 << 32) - 1
_STEP = 0x2545F4914F6CDD1D
_MIX = (0x1B873593CC9E2D51, 0x4CF5AD432745937F)


def _weights(count: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    rows = []
    for number in _MIX:
        mixed = position * number
        mixed = (mixed ^ (mixed >> 29)) * _STEP
        rows.append((mixed ^ (mixed >> 32)) | 1)
    return torch.stack(rows)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bits as integers, without a copy (lazy conjugation is written out)."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.element_size() > 8:
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def _pieces(bits: torch.Tensor, elements: int) -> Iterator[torch.Tensor]:
    """The tensor in pieces of at most ``elements`` in C order, cut alike whatever its strides."""
    if bits.numel() <= elements:
        if bits.numel():
            yield bits
        return
    inner = bits[0].numel()
    if inner > elements:
        for row in bits:
            yield from _pieces(row, elements)
        return
    rows = elements // inner
    for start in range(0, len(bits), rows):
        yield bits[start : start + rows]


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return digest_hex(flat.view(torch.uint8).numpy().data) if flat.numel() else ""
