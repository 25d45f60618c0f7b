"""What a keeper answers to what it is asked. The questions are in ``messages``."""

from __future__ import annotations

import msgspec

from ckpt.ipc.message import Message, RemoteError
from ckpt.ipc.report import Report
from ckpt.ipc.seating import Seating, Source
from ckpt.values import SnapshotId


class Reply(Message, frozen=True, kw_only=True):
    """Base of answers; ``error`` is set where the call failed, and nothing else then counts."""

    error: RemoteError | None = None


class Done(Reply, frozen=True, kw_only=True):
    """The call was carried out (or failed)."""


class Welcome(Reply, frozen=True, kw_only=True):
    """``boot`` is random for each keeper. ``new``: it knows nothing of the peer's attempt, so hand over what you hold.

    ``seating``: where the node's ranks are in the peer's attempt, where the job has several nodes.
    """

    boot: str
    pid: int
    attempt: int
    new: bool = False
    seating: Seating | None = None


class Value(Reply, frozen=True, kw_only=True):
    """What is posted under the key, or None."""

    value: bytes | None


class Number(Reply, frozen=True, kw_only=True):
    """A count or an epoch. ``origin``: of an epoch, what its staged indexes carry, since numbers alone are given out twice."""

    number: int
    origin: str = ""


class SlotEntry(msgspec.Struct, frozen=True):
    """One slot that the keeper holds."""

    index: int
    size_bytes: int


class Slots(Reply, frozen=True, kw_only=True):
    """The slots of one rank, memfds beside them in the same order."""

    slots: tuple[SlotEntry, ...]


class Sources(Reply, frozen=True, kw_only=True):
    """Where the share of each rank of the pair's world is; empty where the pair isn't known."""

    ranks: tuple[Source, ...]
    epoch: int = 0


class Choice(msgspec.Struct, frozen=True):
    """A snapshot to restore. ``tier``: ``staged`` (all ranks' slots hold it) or ``durable``."""

    snapshot: SnapshotId
    tier: str


class Choices(Reply, frozen=True, kw_only=True):
    """What can be restored, best first: the line of the newest epoch."""

    choices: tuple[Choice, ...]


class Status(Reply, frozen=True, kw_only=True):
    """What ``ckpt ps`` and ``ckpt top`` show: see ``report``."""

    report: Report | None
