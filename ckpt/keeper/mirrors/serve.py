"""What this node serves to the others: its slots, read-only, and the mirrors that it keeps for
them."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Buffer, Stat
from ckpt.cluster.endpoint import Endpoint
from ckpt.cluster.mesh.messages import InventoryEntry
from ckpt.cluster.peermem.auth import PeerSecret
from ckpt.cluster.peermem.keys import (
    MIRRORS_PREFIX,
    SLOTS_PREFIX,
    parse_mirror_key,
    parse_slot_key,
    slot_key,
)
from ckpt.cluster.peermem.memory import PeerMemory, ServedObject, copy_bytes
from ckpt.cluster.peermem.server import PeerServer
from ckpt.errors import IntegrityError, NotFoundError
from ckpt.events import Emit
from ckpt.keeper.slots import HeldSlot
from ckpt.staging.header import SlotSummary, generation_of, read_summary
from ckpt.staging.memory import available_bytes
from ckpt.values import SnapshotId

VAULT_SHARE = 0.5
"""The part of the free memory, at the start, that mirrors of others may take."""

VAULT_BYTES_DEFAULT = 8 << 30
"""The limit of mirrors if the free memory is unknown."""


@dataclass(slots=True, eq=False)
class _ServedSlot:
    """One slot as it is served: a mapping of its own, which lives until its last reader is done."""

    fd: int
    size_bytes: int
    mapping: mmap.mmap
    known: tuple[SlotSummary, int] | None = None

    def summary(self) -> tuple[SlotSummary, int] | None:
        """What it holds sealed. Read once a generation: each request asks for it, and an index may
        be long."""
        memory = memoryview(self.mapping)
        if self.known is None or generation_of(memory) != self.known[1]:
            try:
                self.known = read_summary(memory)
            except IntegrityError:
                self.known = None
        return self.known

    def close(self) -> None:
        os.close(self.fd)


class SlotCatalog:
    """A ``ServedSource`` of this node's slots: ``slots/<snapshot>/<rank>`` is a slot's whole
    memory. Thread-safe.

    The keeper's loop says which slots there are. If a slot is overwritten while it is sent, its
    generation shows it, and the digests of its chunks show it for what was sent.
    """

    prefix = SLOTS_PREFIX

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._served: dict[HeldSlot, _ServedSlot] = {}

    def show(self, slots: Iterable[HeldSlot]) -> None:
        """These are the slots of this node now."""
        with self._lock:
            current = set(slots)
            for gone in self._served.keys() - current:
                self._served.pop(gone).close()
            for slot in current - self._served.keys():
                if (served := _serve_slot(slot)) is not None:
                    self._served[slot] = served

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[ServedObject]:
        with self._lock:
            match = self._find(key)
            if match is None:
                raise NotFoundError(f"no slot of this node holds this object. key={key}")
            served, generation = match
            # A descriptor and view of its own: ``show`` may drop the slot during the read.
            fd, view = os.dup(served.fd), memoryview(served.mapping)
        try:
            yield ServedObject(
                view=view,
                fd=fd,
                offset_bytes=0,
                version=generation,
                modified_unix_s=0.0,
                unchanged=lambda: generation_of(view) == generation,
            )
        finally:
            view.release()
            os.close(fd)

    def stat(self, key: str) -> Stat | None:
        with self._lock:
            match = self._find(key)
            return None if match is None else Stat(key, match[0].size_bytes, 0.0)

    def list(self) -> list[Stat]:
        with self._lock:
            held = [
                (served, summary[0])
                for served in self._served.values()
                if (summary := served.summary()) is not None
            ]
        stats = [
            Stat(slot_key(summary.snapshot, summary.rank), served.size_bytes, 0.0)
            for served, summary in held
        ]
        return sorted(stats, key=lambda stat: stat.key)

    def _find(self, key: str) -> tuple[_ServedSlot, int] | None:
        wanted = parse_slot_key(key)
        for served in self._served.values() if wanted is not None else ():
            summary = served.summary()
            if summary is not None and (summary[0].snapshot, summary[0].rank) == wanted:
                return served, summary[1]
        return None


def _serve_slot(slot: HeldSlot) -> _ServedSlot | None:
    """None if the system has no descriptor or no address space left: the next tick tries again, and
    other nodes have mirrors. s _ServedSlot => _ServedSlot s _serve_slot(slot) => _serve_slot(slot)
    s def _lent( => def _serve_slot( s self._served => self._served"""
    try:
        fd = os.dup(slot.fd)
    except OSError:
        return None
    try:
        return _ServedSlot(fd, slot.size_bytes, mmap.mmap(fd, slot.size_bytes, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        os.close(fd)
        return None


class NodeMemoryServer:
    """The server and what it serves."""

    def __init__(
        self, secret: PeerSecret, endpoint: Endpoint, *, emit: Emit, budget_bytes: int = 0
    ) -> None:
        left = available_bytes()
        share = VAULT_BYTES_DEFAULT if left is None else int(left * VAULT_SHARE)
        self.vault = PeerMemory(budget_bytes or max(1 << 20, share))
        self.slots = SlotCatalog()
        self._server = PeerServer(
            self.vault, secret, endpoint=endpoint, sources=[self.slots], emit=emit
        )
        self._server.start()

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return self._server.address[1]

    @property
    def refused(self) -> dict[str, int]:
        """How many requests and connections were rejected, by kind."""
        return dict(self._server.stats().refused)

    def see_epoch(self, number: int) -> None:
        """Refuse requests of older epochs of the membership from now on."""
        self._server.see_epoch(number)

    def mirrored(self) -> list[InventoryEntry]:
        """The mirrors that this node keeps; damaged ones are left out."""
        entries = []
        for stat in self.vault.list(MIRRORS_PREFIX):
            wanted = parse_mirror_key(stat.key)
            if wanted is None:
                continue
            with (
                contextlib.suppress(NotFoundError, IntegrityError),
                self.vault.reading(stat.key) as held,
            ):
                summary = read_summary(held.view)
                if summary is not None and (summary[0].snapshot, summary[0].rank) == wanted:
                    entries.append(
                        InventoryEntry(
                            snapshot=summary[0].snapshot,
                            origin=summary[0].origin,
                            world_size=summary[0].world_size,
                            rank=summary[0].rank,
                            mirror=True,
                        )
                    )
        return entries

    def kept(self) -> list[tuple[SnapshotId, int, int]]:
        """The mirrors here by their names: snapshot, rank and bytes of each share."""
        keys = (
            (parse_mirror_key(stat.key), stat.size_bytes)
            for stat in self.vault.list(MIRRORS_PREFIX)
        )
        return [(*key, size_bytes) for key, size_bytes in keys if key is not None]

    def keep(self, key: str, pieces: Sequence[Buffer]) -> None:
        """Keep this node's own share beside its slots, which training overwrites. Raises
        StoreFullError."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        # A copy, not a reference: training overwrites the slots while mirrors must stay.
        with self.vault.incoming(key, sum(view.nbytes for view in views)) as room:
            offset = 0
            for view in views:
                copy_bytes(room.view[offset : offset + view.nbytes], view)
                offset += view.nbytes
            room.publish()

    def snapshots(self) -> frozenset[SnapshotId]:
        """The snapshots of which mirrors are kept here."""
        keys = (parse_mirror_key(stat.key) for stat in self.vault.list(MIRRORS_PREFIX))
        return frozenset(key[0] for key in keys if key is not None)

    def retain(self, pairs: frozenset[SnapshotId]) -> None:
        """Remove the mirrors of all other snapshots."""
        for stat in self.vault.list(MIRRORS_PREFIX):
            kept = parse_mirror_key(stat.key)
            if kept is not None and kept[0] not in pairs:
                self.vault.delete(stat.key)

    def close(self) -> None:
        """End the server. Mirrors kept for others are gone."""
        self._server.stop()
        self.slots.show(())
        self.vault.retain(())
