"""The mailbox of ranks that no keeper connects: a key-value store that the launcher or the process
group has set up.

Such a store may outlive an attempt. So the handshake gives each set of ranks a random key prefix
first: a dead attempt's key is never taken for a new one.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import Protocol

import msgspec
import torch.distributed as dist

from ckpt.errors import UnavailableError, UsageError
from ckpt.format.canonical import prepare_decoders
from ckpt.ipc.mailbox import POLL_FIRST_S, POLL_LAST_S, CountingMailbox, SoloMailbox

HANDSHAKE_WAIT_S = 1800.0
"""How long ranks wait for each other at the start: a rank may still be building its model."""

STORE_WAIT_S = 300.0


class KeyValueStore(Protocol):
    """The part of ``torch.distributed.Store`` that a mailbox uses."""

    def set(self, key: str, value: str, /) -> None:
        """Write; replaces what was there."""
        ...

    def get(self, key: str, /) -> bytes:
        """Read a key that exists."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys exist."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Add atomically to a counter and return the sum."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Remove a key; says whether it was there."""
        ...


class StoreMailbox:
    """A mailbox in a c10d store, below a prefix that only the ranks of one handshake know."""

    def __init__(self, store: KeyValueStore, *, rank: int, size: int, prefix: str) -> None:
        self._store = store
        self.rank = rank
        self.size = size
        self._prefix = f"ckpt/{prefix}/"

    def post(self, key: str, value: bytes) -> None:
        """torch's stores take text, so bytes travel as Latin-1."""
        self._store.set(self._prefix + key, value.decode("latin-1"))

    def peek(self, key: str) -> bytes | None:
        if not self._store.check([self._prefix + key]):
            return None
        return self._store.get(self._prefix + key).decode("utf-8").encode("latin-1")

    def count(self, key: str, amount: int = 0) -> int:
        return self._store.add(self._prefix + key, amount)

    def forget(self, key: str) -> None:
        self._store.delete_key(self._prefix + key)


def world_of_process() -> tuple[int, int]:
    """This process's rank and the world's size: the process group's, else the launcher's, else (0,
    1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def connect_ranks(*, name: str) -> CountingMailbox:
    """Connect to the other ranks and return the mailbox. Every rank calls it, in the same order of
    names.

    ``name`` separates the handshakes of one attempt: a job may have several checkpointers. Raises
    UsageError if there are several ranks but neither a process group nor a launcher's store,
    UnavailableError if a rank does not call it in time.
    """
    rank, size = world_of_process()
    if size == 1:
        return SoloMailbox()
    return join_handshake(_store_of_process(rank), rank=rank, size=size, name=name)


def _store_of_process(rank: int) -> KeyValueStore:
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
    raise UsageError(
        f"several ranks, but no store to connect them. rank={rank}; call "
        "torch.distributed.init_process_group() "
        "before the first run.track() or Checkpointer call"
    )


class _Invitation(msgspec.Struct, frozen=True):
    room: str
    guests: list[str]


def join_handshake(
    store: KeyValueStore, *, rank: int, size: int, name: str, timeout_s: float = HANDSHAKE_WAIT_S
) -> StoreMailbox:
    """Agree on a fresh key prefix, over a store that may hold keys of dead attempts.

    Each rank posts a random badge under its rank. Rank 0 collects the badges and posts, under each
    badge, an invitation that names a random prefix. A rank that finds an invitation under its own
    badge acknowledges it below that prefix. A badge that a dead process left is replaced by the
    living one's, and rank 0 invites again until every current badge has acknowledged. Two round
    trips; no clock.
    """
    badge = secrets.token_hex(8)
    lobby = f"ckpt/lobby/{name}/"
    store.set(f"{lobby}badge/{rank}", badge)
    began = time.monotonic()
    pause_s = POLL_FIRST_S
    room = secrets.token_hex(8)
    invited: tuple[str, ...] = ()
    while True:
        if rank == 0:
            badges = _badges(store, lobby, size)
            if badges is not None and badges != invited:
                invitation = msgspec.json.encode(_Invitation(room, list(badges))).decode()
                for guest in badges:
                    store.set(f"{lobby}to/{guest}", invitation)
                invited = badges
            if invited and all(store.check([f"{lobby}in/{room}/{guest}"]) for guest in invited[1:]):
                return StoreMailbox(store, rank=rank, size=size, prefix=room)
        elif store.check([f"{lobby}to/{badge}"]):
            entered = msgspec.json.decode(store.get(f"{lobby}to/{badge}"), type=_Invitation).room
            store.set(f"{lobby}in/{entered}/{badge}", "1")
            return StoreMailbox(store, rank=rank, size=size, prefix=entered)
        if time.monotonic() - began > timeout_s:
            raise UnavailableError(
                f"not all ranks joined the handshake. name={name} rank={rank} world_size={size} "
                f"timeout_s={timeout_s:g}; "
                "every rank must create its Run or Checkpointer"
            )
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, POLL_LAST_S)


def _badges(store: KeyValueStore, lobby: str, size: int) -> tuple[str, ...] | None:
    keys = [f"{lobby}badge/{rank}" for rank in range(size)]
    if not store.check(keys):
        return None
    return tuple(store.get(key).decode() for key in keys)


prepare_decoders(_Invitation)
