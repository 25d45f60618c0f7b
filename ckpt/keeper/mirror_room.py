"""Has memory for the first mirrors ready before they come, as that of all later ones is: it was used before."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable

from ckpt.keeper.slots import HeldSlot
from ckpt.peer.vault import Vault
from ckpt.stage.slot_header import HEADER_BYTES_DEFAULT, header_bytes_of

READY_BYTES_MIN = 16 << 20
"""Shares of less data come in no time, whatever pages they land in."""

INDEX_SHARE, INDEX_BYTES = 1 / 32, 1 << 20
"""What a share's header may add to its data here: a mirror's is as long as its index, not as a slot's."""

GENERATIONS = 2
"""A pair that is kept stays until the next one is whole."""

PAUSE_S = 0.005
"""After each megabyte, which takes half as long: training starts at the same time, and needs the processors more."""


class MirrorRoom:
    """What comes is guessed from this node's own slots: ranks' shares are about as large everywhere.

    ``copies``: how many shares a node keeps for each of its ranks, its own one included.
    """

    def __init__(self, vault: Vault, *, copies: int) -> None:
        self._vault = vault
        self._copies = copies
        self._seen: frozenset[tuple[int, int]] = frozenset()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, slots: Iterable[HeldSlot]) -> None:
        """These are the slots of this node now. A thread does what is to be done; nothing where they are as before."""
        # Before a slot is first staged into it does not say how long its header is.
        shares = frozenset(
            (slot.rank, slot.size_bytes - (header_bytes_of(slot.memory) or HEADER_BYTES_DEFAULT)) for slot in slots
        )
        if shares == self._seen or (self._thread is not None and self._thread.is_alive()):
            return
        self._seen = shares
        large = (data_bytes for _, data_bytes in shares if data_bytes >= READY_BYTES_MIN)
        wanted = Counter(int(data_bytes * (1 + INDEX_SHARE)) + INDEX_BYTES for data_bytes in large)
        if wanted:
            self._thread = threading.Thread(
                target=self._make_ready, args=(wanted,), name="ckpt-mirror-room", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Make no more ready; returns when the thread has ended."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _make_ready(self, wanted: Counter[int]) -> None:
        for size_bytes, ranks in wanted.items():
            with contextlib.closing(self._vault.make_ready(size_bytes, ranks * self._copies * GENERATIONS)) as made:
                for _ in made:
                    if self._stopped.wait(PAUSE_S):
                        return
