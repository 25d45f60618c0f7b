"""Several stores as one: objects lie in all of them, and losing some loses nothing."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat, check_key, check_prefix
from ckpt.backends.checked import Check
from ckpt.backends.replicated import read as looks
from ckpt.backends.replicated import read as reads
from ckpt.backends.replicated.buffers import BUDGET_BYTES, is_immutable
from ckpt.backends.replicated.group import StoreGroup, StoreReplica
from ckpt.backends.replicated.ledger import VerifiedRange
from ckpt.backends.replicated.policy import ReplicationLimits, quorum_of, with_counting
from ckpt.backends.replicated.put import QuorumPut
from ckpt.backends.replicated.repair import RepairThread
from ckpt.errors import CkptError, KeyExistsError, UsageError
from ckpt.events import Emit
from ckpt.format.canonical import digest

# Create an object once over several stores: whoever creates it in the first of them goes on to
# the others.
#
# Were all asked at once, two writers might each win in some stores and none in enough. Only the
# winner in the first store that answers writes to the rest; where two writers differ about which
# store that is, at most one reaches the quorum.


def create(group: StoreGroup, key: str, data: Sequence[Buffer]) -> None:
    """Store ``data`` at ``key`` in a quorum of stores where the key is new. Copies what could
    change: meant for records.

    Raises KeyExistsError where another object came first, and what ``Put.run`` raises; after that
    the object may lie in some stores, and the key stays taken.
    """
    body = tuple(data) if is_immutable(data) else (b"".join(data),)
    failed: dict[int, CkptError] = {}
    winner: frozenset[int] = frozenset()
    usable = {member.index for member in group.replicas if member.writing.circuit.usable}
    for place in sorted(
        group.quorum.voters, key=lambda at: (at in group.quorum.silent, at not in usable, at)
    ):
        answer = group.ask(
            [place], lambda member: _create(member, key, body), side=lambda m: m.writing, key=key
        )[place]
        if isinstance(answer, KeyExistsError):
            raise answer
        if not isinstance(answer, CkptError):
            winner = frozenset({place})
            break
        failed[place] = answer
    joined = b"".join(body)
    proof = VerifiedRange(0, len(joined), digest(joined), whole=True)
    QuorumPut(group, key, body, write=_create_or_same, verified=proof).run(
        holders=winner, failed=failed
    )


def _create(member: StoreReplica, key: str, data: Sequence[Buffer]) -> bool:
    member.write(
        sum(len(one) for one in data), lambda: member.store.put(key, data, create_only=True)
    )
    return True


def _create_or_same(member: StoreReplica, key: str, data: Sequence[Buffer]) -> None:
    """As a create; but bytes that are there already and the same are as good as created."""
    try:
        member.store.put(key, data, create_only=True)
    except KeyExistsError:
        body = b"".join(data)
        found = member.store.stat(key)
        if found is None or found.size_bytes != len(body):
            raise
        there = bytearray(len(body))
        member.store.read_into(key, memoryview(there))
        if there != body:
            raise


CLOSE_S = 10.0
"""How long ``close`` waits for what is still on its way. It is durable already, so an exit need not
wait for more."""

CATCH_UP_POLL_S = 0.5
"""How often a store that does not answer is tried while somebody waits for it."""


@dataclass(frozen=True, slots=True)
class StoreBacklog:
    """What one store is known to miss. ``overflow``: also objects that are not remembered; a scrub
    finds them."""

    url: str
    keys: int
    overflow: bool


class ReplicatedBackend:
    """A store over ``stores`` that holds each object in all of them, and acknowledges at
    ``write_quorum`` (None: majority).

    For objects whose bytes never change: equal keys mean equal bytes. Puts go to all stores at once
    and return when the quorum has the object; reads take the nearest copy, and another one where
    that is slow, bad or gone. What a store missed or what was found damaged in it is brought to it
    in the background. ``prefer``: places of stores to read from first. ``budget_bytes`` bounds the
    memory for copies. ``seed`` decides pauses. Thread-safe; a fork's child starts with threads of
    its own and knows of nothing that is missing. Raises UsageError for a quorum that two writers
    could reach apart.
    """

    def __init__(
        self,
        stores: Sequence[Backend],
        *,
        write_quorum: int | None = None,
        emit: Emit,
        prefer: Sequence[int] = (),
        limits: ReplicationLimits | None = None,
        budget_bytes: int = BUDGET_BYTES,
        seed: int | None = None,
    ) -> None:
        self._stores = tuple(stores)
        self._quorum = quorum_of(len(self._stores), write_quorum)
        if len({id(store) for store in self._stores}) < len(self._stores):
            raise UsageError(
                "a store is named twice; a second copy in the same place protects from nothing"
            )
        with_counting(self._quorum, prefer)  # the places exist
        self._tell = emit
        self._prefer = tuple(prefer)
        self._pace = limits or ReplicationLimits()
        self._budget_bytes = budget_bytes
        self._seed = seed
        self._closed = False
        self._starting = threading.Lock()
        self._engine: _ProcessState | None = None
        _LIVING.add(self)

    @property
    def url(self) -> str:
        """The stores' addresses, for messages."""
        return " + ".join(store.url for store in self._stores)

    @property
    def stores(self) -> tuple[Backend, ...]:
        """See Replicated."""
        return self._stores

    @property
    def write_quorum(self) -> int:
        """See Replicated."""
        return self._quorum.write

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        """See Replicated. Raises UsageError for a place that is none."""
        self._quorum = with_counting(self._quorum, full, silent)
        if self._engine is not None:
            self._engine.group.count_only(self._quorum)

    def capabilities(self) -> Capabilities:
        """See Backend: what all stores can do. One that doesn't answer can't create once."""
        group = self._group()
        answers = group.ask(range(len(self._stores)), lambda member: member.store.capabilities())
        known = [answer for answer in answers.values() if not isinstance(answer, CkptError)]
        return Capabilities(
            create_only=len(known) == len(self._stores) and all(can.create_only for can in known),
            read_bytes_best=max((can.read_bytes_best for can in known), default=1 << 20),
            concurrency_best=max((can.concurrency_best for can in known), default=1),
            direct_io=len(known) == len(self._stores) and all(can.direct_io for can in known),
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend: durable in the write quorum on return.

        Stores that are well take the caller's memory without a copy if they can be lent it
        (``loans.Borrower``). Raises what most stores that failed raised, naming each, where the
        quorum can't be reached.
        """
        check_key(key)
        group = self._group()
        if not create_only:
            QuorumPut(group, key, data).run()
            return
        if not self.capabilities().create_only:
            raise UsageError(
                f"not every store promises to create a key only once. stores={self.url}; put "
                "without create_only, "
                f"or use stores that do"
            )
        create(group, key, data)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend, and ``reads.read_into``. NotFoundError only where enough stores say that it
        is nowhere."""
        reads.read_into(
            self._reader(key, offset_bytes), key, out, offset_bytes=offset_bytes, check=None
        )

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        """See Replicated."""
        reads.read_into(
            self._reader(key, offset_bytes), key, out, offset_bytes=offset_bytes, check=check
        )

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        """See Replicated."""
        return reads.read_object(self._reader(key, 0), key, check, bytes_max=bytes_max)

    def stat(self, key: str) -> Stat | None:
        """See Backend. None only where enough stores say so; raises UnavailableError where too few
        answer."""
        return looks.stat(self._group(), check_key(key))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend: what any store that answers has. Raises UnavailableError where too few
        answer for all of it."""
        return looks.listing(self._group(), check_prefix(prefix), after)

    def delete(self, key: str) -> None:
        """See Backend: from all stores. Raises, naming them, where some could not be asked."""
        looks.delete(self._group(), check_key(key))

    def behind(self) -> tuple[StoreBacklog, ...]:
        """What each store is known to miss, in the order of the stores."""
        group = self._group()
        return tuple(
            StoreBacklog(store.url, group.behind(place), group.ledger.scrub[place])
            for place, store in enumerate(self._stores)
        )

    def await_caught_up(self, timeout_s: float) -> bool:
        """Mend without pauses, and wait until nothing is known to be missing in any store; False
        after ``timeout_s``.

        False at once where only a scrub can find what is missing.
        """
        engine = self._live()
        until_s = time.monotonic() + timeout_s
        while not engine.group.caught_up():
            left_s = until_s - time.monotonic()
            if left_s <= 0 or any(engine.group.ledger.scrub):
                return False
            engine.caretaker.repair_now()
            with engine.group.change:
                engine.group.change.wait_for(engine.group.caught_up, min(left_s, CATCH_UP_POLL_S))
        return True

    def scrubbed(self, place: int) -> None:
        """A scrub has found whatever the store at ``place`` missed."""
        self._group().scrubbed(place)

    def close(self) -> None:
        """See Backend. Waits for what is on its way, 10 s at most; calls that hang are left behind
        and hold up no exit."""
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.close(time.monotonic() + CLOSE_S)
        for store in self._stores:
            store.close()

    def _reader(self, key: str, offset_bytes: int) -> StoreGroup:
        check_key(key)
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        return self._group()

    def _group(self) -> StoreGroup:
        return self._live().group

    def _live(self) -> _ProcessState:
        """This process's threads. They do not survive a fork, so a child makes its own."""
        if self._closed:
            raise UsageError(f"the store is closed. stores={self.url}; open it again")
        engine = self._engine
        if engine is None:
            with self._starting:
                if self._engine is None:
                    self._engine = self._new_engine()
                engine = self._engine
        return engine

    def _new_engine(self) -> _ProcessState:
        group = StoreGroup(
            self._stores,
            self._quorum,
            prefer=self._prefer,
            limits=self._pace,
            budget_bytes=self._budget_bytes,
            seed=self._seed,
            emit=self._tell,
        )
        return _ProcessState(group, RepairThread(group))

    def _restart(self) -> None:
        self._starting = threading.Lock()
        self._engine = None


@dataclass(frozen=True, slots=True)
class _ProcessState:
    """What one process runs."""

    group: StoreGroup
    caretaker: RepairThread

    def close(self, until_s: float) -> None:
        """Take no more work, and wait for what was taken."""
        self.caretaker.close(max(0.0, until_s - time.monotonic()))
        for member in self.group.replicas:
            for side in (member.writing, member.reading):
                side.threads.close(max(0.0, until_s - time.monotonic()))


_LIVING: weakref.WeakSet[ReplicatedBackend] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child of a fork: forget threads, locks and queues, which belong to the parent."""
    for backend in list(_LIVING):
        backend._restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
