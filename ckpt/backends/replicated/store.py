"""Several stores as one backend: every object is in all of them, and losing some loses nothing."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat, check_key, check_prefix
from ckpt.backends.checked import Check
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

# ---- Creating an object once over several stores.
#
# Create-only puts ask one store first, and only its winner continues with the others. If all stores
# were asked at once, two writers could each win in some of them and neither in enough. If two
# writers differ about which store is first, because one sees it as dead, at most one of them
# reaches the quorum.


def create(group: StoreGroup, key: str, data: Sequence[Buffer]) -> None:
    """Store ``data`` at ``key`` in a quorum of stores, if the key is new. Meant for records.

    Copies what could change. Raises KeyExistsError if another object came first, and as
    ``QuorumPut.run``; then the object may be in some stores, and the key stays taken.
    """
    body = tuple(data) if is_immutable(data) else (b"".join(data),)
    failed: dict[int, CkptError] = {}
    winner: frozenset[int] = frozenset()
    usable = {replica.index for replica in group.replicas if replica.writing.circuit.usable}
    # All writers ask the stores in the same order, stores that probably answer first, so that they
    # meet at the same first store.
    for index in sorted(
        group.quorum.voters,
        key=lambda index: (index in group.quorum.silent, index not in usable, index),
    ):
        answer = group.ask(
            [index],
            lambda replica: _create(replica, key, body),
            side=lambda replica: replica.writing,
            key=key,
        )[index]
        if isinstance(answer, KeyExistsError):
            raise answer
        if not isinstance(answer, CkptError):
            winner = frozenset({index})
            break
        failed[index] = answer
    # Proof of the whole object: stores that hold another object at the key are repaired with ours.
    joined = b"".join(body)
    verified = VerifiedRange(0, len(joined), digest(joined), whole=True)
    QuorumPut(group, key, body, write=_create_or_same, verified=verified).run(
        holders=winner, failed=failed
    )


def _create(replica: StoreReplica, key: str, data: Sequence[Buffer]) -> bool:
    replica.write(
        sum(len(buffer) for buffer in data), lambda: replica.store.put(key, data, create_only=True)
    )
    return True


def _create_or_same(replica: StoreReplica, key: str, data: Sequence[Buffer]) -> None:
    """Create the object; equal bytes that are already there count as created."""
    try:
        replica.store.put(key, data, create_only=True)
    except KeyExistsError:
        body = b"".join(data)
        stat = replica.store.stat(key)
        if stat is None or stat.size_bytes != len(body):
            raise
        stored = bytearray(len(body))
        replica.store.read_into(key, memoryview(stored))
        if stored != body:
            raise


CLOSE_S = 10.0
"""Longest wait of ``close`` for writes in flight. Their objects are durable, so an exit need not
wait longer.
"""

CATCH_UP_POLL_S = 0.5
"""How often ``await_caught_up`` tries a store that does not answer."""


@dataclass(frozen=True, slots=True)
class StoreBacklog:
    """What one store is known to miss.

    ``overflow``: it misses more than is remembered; a scrub finds the rest.
    """

    url: str
    keys: int
    overflow: bool


class ReplicatedBackend:
    """A store that holds each object in all of ``stores`` and acknowledges at ``write_quorum``.

    For objects whose bytes never change: equal keys mean equal bytes. Puts go to all stores at once
    and return when the quorum has the object. Reads take the nearest copy, and another one if that
    is slow, wrong or missing. Copies that are missing or were found damaged are repaired in the
    background.

    ``write_quorum``: None means the majority. ``prefer``: indexes of stores to read from first.
    ``budget_bytes`` bounds the memory for copies. ``seed`` seeds the jitter of pauses. Thread-safe;
    the child of a fork starts with threads of its own and an empty repair ledger. Raises UsageError
    for a quorum that two writers could reach separately.
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
                "a store is named twice; a second copy in the same place protects against nothing"
            )
        with_counting(self._quorum, prefer)  # raises for indexes out of range
        self._emit = emit
        self._prefer = tuple(prefer)
        self._limits = limits or ReplicationLimits()
        self._budget_bytes = budget_bytes
        self._seed = seed
        self._closed = False
        self._state_lock = threading.Lock()
        self._state: _ProcessState | None = None
        _LIVING.add(self)

    @property
    def url(self) -> str:
        """The stores' addresses, for messages."""
        return " + ".join(store.url for store in self._stores)

    @property
    def stores(self) -> tuple[Backend, ...]:
        return self._stores

    @property
    def write_quorum(self) -> int:
        return self._quorum.write

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        """Raises UsageError for an index out of range."""
        self._quorum = with_counting(self._quorum, full, silent)
        if self._state is not None:
            self._state.group.count_only(self._quorum)

    def capabilities(self) -> Capabilities:
        """What all stores can do. With a store that does not answer ``create_only`` is False."""
        group = self._group()
        answers = group.ask(range(len(self._stores)), lambda replica: replica.store.capabilities())
        capabilities = [answer for answer in answers.values() if not isinstance(answer, CkptError)]
        return Capabilities(
            create_only=len(capabilities) == len(self._stores)
            and all(each.create_only for each in capabilities),
            read_bytes_best=max((each.read_bytes_best for each in capabilities), default=1 << 20),
            concurrency_best=max((each.concurrency_best for each in capabilities), default=1),
            direct_io=len(capabilities) == len(self._stores)
            and all(each.direct_io for each in capabilities),
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Durable in the write quorum on return.

        Stores that can borrow memory (``buffers.Borrower``) take the caller's without a copy. If
        the quorum cannot be reached, raises the most common error type of the failed stores, naming
        each store.
        """
        check_key(key)
        group = self._group()
        if not create_only:
            QuorumPut(group, key, data).run()
            return
        if not self.capabilities().create_only:
            raise UsageError(
                f"not every store promises to create a key only once. stores={self.url}; put "
                "without create_only, or use stores that do"
            )
        create(group, key, data)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """NotFoundError only if enough stores say that the object is not there."""
        reads.read_into(
            self._group_for_read(key, offset_bytes), key, out, offset_bytes=offset_bytes, check=None
        )

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        reads.read_into(
            self._group_for_read(key, offset_bytes),
            key,
            out,
            offset_bytes=offset_bytes,
            check=check,
        )

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        return reads.read_object(self._group_for_read(key, 0), key, check, bytes_max=bytes_max)

    def stat(self, key: str) -> Stat | None:
        """None only if enough stores say so; raises UnavailableError if too few answer."""
        return reads.stat(self._group(), check_key(key))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """The objects that any answering store has; raises UnavailableError if too few answer."""
        return reads.listing(self._group(), check_prefix(prefix), after)

    def delete(self, key: str) -> None:
        """From all stores. Raises, naming them, if some could not be asked."""
        reads.delete(self._group(), check_key(key))

    def behind(self) -> tuple[StoreBacklog, ...]:
        """What each store is known to miss, in the order of the stores."""
        group = self._group()
        return tuple(
            StoreBacklog(store.url, group.backlog.behind(index), group.backlog.ledger.scrub[index])
            for index, store in enumerate(self._stores)
        )

    def await_caught_up(
        self, timeout_s: float, *, of: frozenset[int] | None = None, least: int | None = None
    ) -> bool:
        """Repair without pauses, and wait until nothing is known to be missing in ``least`` of the
        stores ``of`` (None: in all of them, of all stores).

        False after ``timeout_s``, and at once if only a scrub can find what is missing.
        """
        state = self._process_state()
        backlog = state.group.backlog
        stores = frozenset(range(len(self._stores))) if of is None else of
        count = len(stores) if least is None else least
        until_s = time.monotonic() + timeout_s

        def caught_up() -> bool:
            return len(backlog.whole(stores)) >= count

        while not caught_up():
            left_s = until_s - time.monotonic()
            known = sum(not backlog.ledger.scrub[index] for index in stores)
            if left_s <= 0 or known < count:
                return False
            state.repairer.repair_now()
            with backlog.change:
                backlog.change.wait_for(caught_up, min(left_s, CATCH_UP_POLL_S))
        return True

    def scrubbed(self, index: int) -> None:
        """A scrub of store ``index`` has finished, and found whatever it missed."""
        self._group().backlog.scrubbed(index)

    def close(self) -> None:
        """Waits for writes in flight, for 10 s at most.

        Calls that hang are abandoned and do not delay the exit.
        """
        if self._closed:
            return
        self._closed = True
        if self._state is not None:
            self._state.close(time.monotonic() + CLOSE_S)
        for store in self._stores:
            store.close()

    def _group_for_read(self, key: str, offset_bytes: int) -> StoreGroup:
        check_key(key)
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        return self._group()

    def _group(self) -> StoreGroup:
        return self._process_state().group

    def _process_state(self) -> _ProcessState:
        """This process's threads and ledger.

        They do not survive a fork, so a child makes its own.
        """
        if self._closed:
            raise UsageError(f"the store is closed. stores={self.url}; open it again")
        state = self._state
        if state is None:
            with self._state_lock:
                # Checked again under the lock: two threads may start at once, one process has one
                # ledger.
                if self._state is None:
                    self._state = self._new_state()
                state = self._state
        return state

    def _new_state(self) -> _ProcessState:
        group = StoreGroup(
            self._stores,
            self._quorum,
            prefer=self._prefer,
            limits=self._limits,
            budget_bytes=self._budget_bytes,
            seed=self._seed,
            emit=self._emit,
        )
        return _ProcessState(group, RepairThread(group))

    def _restart(self) -> None:
        # A new lock: another thread of the parent may have held the old one at the fork.
        self._state_lock = threading.Lock()
        self._state = None


@dataclass(frozen=True, slots=True)
class _ProcessState:
    """The threads and the ledger of one process."""

    group: StoreGroup
    repairer: RepairThread

    def close(self, until_s: float) -> None:
        """Accept no more work, and wait for the work in flight."""
        self.repairer.close(max(0.0, until_s - time.monotonic()))
        for replica in self.group.replicas:
            for side in (replica.writing, replica.reading):
                side.threads.close(max(0.0, until_s - time.monotonic()))


_LIVING: weakref.WeakSet[ReplicatedBackend] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child of a fork: drop threads, locks and queues, which belong to the parent."""
    for backend in list(_LIVING):
        backend._restart()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
