"""The key-value stores with which agents hand out ranks, and wait for each other at the end.

There is one for each round, on no agent's machine: a range of keys beside the agents' membership,
in etcd or in a file of one machine. The keys have a lease of their own, which every agent of the
round keeps alive, and disappear some time after the last one.
"""

from __future__ import annotations

import datetime
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from torch.distributed import DistStoreError, Store  # type: ignore[attr-defined]

from ckpt.cluster.membership.transactions import keys_under
from ckpt.elastic.rendezvous import decide
from ckpt.elastic.rendezvous.decide import RendezvousRound
from ckpt.errors import CkptError, NotFoundError, UnavailableError
from ckpt.keyspace.base import (
    Delete,
    Keys,
    Keyspace,
    KeyValue,
    NoneOf,
    Put,
    Transaction,
    TransactionResult,
    Unchanged,
)

ROUNDS = "rounds/"
LOOK_S = 0.5
"""How often a wait checks whether the round is over."""
RETRY_S = 0.1
RACES_MAX = 100
BATCH_KEYS = 64
"""Keys deleted in one transaction; etcd limits its operations."""


def round_prefix(number: int, lease: int) -> str:
    """The prefix of the keys of a round's store."""
    return f"{ROUNDS}{number}-{lease:x}/"


class RoundStore(Store):
    """A ``torch.distributed.Store`` of one round. Thread-safe.

    ``round_problem``: why the round cannot begin, "" if it can. ``count_present``: how many
    agents still run it. ``on_doomed`` is called if ranks were handed out for a round that cannot
    begin. Methods raise DistStoreError if a wait takes too long, or if the service does not
    answer for as long.
    """

    def __init__(
        self,
        keyspace: Keyspace,
        round_: RendezvousRound,
        *,
        round_problem: Callable[[], str],
        count_present: Callable[[], int],
        on_doomed: Callable[[str], object],
    ) -> None:
        super().__init__()
        self._keyspace = keyspace
        self._lease = round_.lease
        self._root = round_prefix(round_.number, round_.lease)
        self._round_problem = round_problem
        self._count_present = count_present
        self._on_doomed = on_doomed

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value, replacing the one before."""
        put = Put(self._value(key), _bytes(value), self._lease)
        for _ in range(RACES_MAX):
            result = self._transact(
                Transaction((NoneOf(self._adds(key)),), (put,), (self._adds(key),))
            )
            if result.succeeded:
                return
            adds = result.found[0][:BATCH_KEYS]
            unchanged = tuple(Unchanged(entry.key, entry.changed) for entry in adds)
            self._transact(Transaction(unchanged, tuple(Delete(entry.key) for entry in adds)))
        raise DistStoreError(f"gave up after {RACES_MAX} conflicting writes. key={key}")

    def get(self, key: str) -> bytes:
        """The value; waits until there is one."""
        value = self._wait_for_value(key, self._until_s())
        if value is None:
            raise DistStoreError(f"this key was not set in time. key={key}")
        return value

    def add(self, key: str, value: int) -> int:
        """Add to a number, 0 at first, and return the sum.

        Exact even if the answer to a call was lost.
        """
        # Each call puts a key of its own and sums up those created before it: repeating the same
        # put is harmless, and no two calls compete for one key.
        own_key = f"{self._adds(key).start}{secrets.token_hex(8)}"
        reads = (Keys(self._value(key)), self._adds(key))
        result = self._transact(
            Transaction((), (Put(own_key, str(value).encode(), self._lease),), reads)
        )
        first, adds = result.found
        created = next(entry.created for entry in adds if entry.key == own_key)
        return _sum(first, [entry for entry in adds if entry.created <= created])

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them have a value now."""
        return all(self._read(key)[0] is not None for key in keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all of them have a value."""
        until_s = self._until_s(timeout)
        for key in keys:
            if self._wait_for_value(key, until_s) is None:
                raise DistStoreError(f"this key was not set in time. key={key}")

    def wait_for_all(self, keys: Sequence[str]) -> str:
        """Wait until all of them have a value.

        Returns why the round is over if it ends before that, else "".
        """
        for key in keys:
            value, revision = self._read(key)
            while value is None:
                if reason := self._round_problem():
                    return reason
                self._wait(revision, LOOK_S)
                value, revision = self._read(key)
        return ""

    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        """Write a value if the current one is ``expected_value``; returns the current value.

        "" as ``expected_value`` also matches a missing value.
        """
        expected, desired = _bytes(expected_value), _bytes(desired_value)
        for _ in range(RACES_MAX):
            (entries,) = self._transact(Transaction(reads=(Keys(self._value(key)),))).found
            current = entries[0].value if entries else b""
            if current != expected:
                return current if entries else expected
            changed = entries[0].changed if entries else 0
            put = Put(self._value(key), desired, self._lease)
            if self._transact(Transaction((Unchanged(put.key, changed),), (put,))).succeeded:
                return desired
        raise DistStoreError(f"gave up after {RACES_MAX} conflicting writes. key={key}")

    def delete_key(self, key: str) -> bool:
        """Delete a value; whether there was one."""
        values, adds = self._transact(
            Transaction(reads=(Keys(self._value(key), values=False), self._adds(key)))
        ).found
        keys = [entry.key for entry in (*values, *adds)]
        for first in range(0, len(keys), BATCH_KEYS):
            batch = keys[first : first + BATCH_KEYS]
            self._transact(Transaction(then=tuple(Delete(key) for key in batch)))
        return bool(keys)

    def num_keys(self) -> int:
        """The number of keys that have a value."""
        values, adds = self._transact(
            Transaction(
                reads=(
                    keys_under(f"{self._root}v/", values=False),
                    keys_under(f"{self._root}a/", values=False),
                )
            )
        ).found
        return len({entry.key.split("/")[3] for entry in (*values, *adds)})

    # ---- helpers

    def _value(self, key: str) -> str:
        return f"{self._root}v/{quote(key, safe='')}"

    def _adds(self, key: str) -> Keys:
        return keys_under(f"{self._root}a/{quote(key, safe='')}/")

    def _until_s(self, timeout: datetime.timedelta | None = None) -> float:
        limit: datetime.timedelta = self.timeout if timeout is None else timeout  # type: ignore[attr-defined]
        return time.monotonic() + limit.total_seconds()

    def _read(self, key: str) -> tuple[bytes | None, int]:
        result = self._transact(Transaction(reads=(Keys(self._value(key)), self._adds(key))))
        first, adds = result.found
        if adds:
            return str(_sum(first, adds)).encode(), result.revision
        return (first[0].value if first else None), result.revision

    def _wait_for_value(self, key: str, until_s: float) -> bytes | None:
        while True:
            value, revision = self._read(key)
            if value is None:
                value = self._stand_in(key)
            left_s = until_s - time.monotonic()
            if value is not None or left_s <= 0:
                return value
            self._wait(revision, min(LOOK_S, left_s))

    def _wait(self, revision: int, timeout_s: float) -> None:
        """Wait until a key of any round changes.

        One range covers all keys, because a driver keeps a watch for each range.
        """
        try:
            self._keyspace.wait((keys_under(ROUNDS, values=False),), revision, timeout_s=timeout_s)
        except UnavailableError:
            time.sleep(min(RETRY_S, timeout_s))

    def _stand_in(self, key: str) -> bytes | None:
        """The value that stands in for agents that are gone."""
        if decide.is_agent_key(key):
            reason = self._round_problem()
            if not reason:
                return None
            self._on_doomed(reason)
            return decide.stand_in_value(key)
        if key == decide.EXIT_DONE:
            count, _ = self._read(decide.EXIT_COUNT)
            if count is not None and int(count) >= self._count_present():
                return b"1"
        return None

    def _transact(self, transaction: Transaction) -> TransactionResult:
        until_s = self._until_s()
        while True:
            try:
                return self._keyspace.transact(transaction)
            except NotFoundError as error:
                raise DistStoreError(f"the round of this store has expired. {error}") from error
            except UnavailableError as error:
                if time.monotonic() > until_s:
                    raise DistStoreError(
                        f"the store of the agents does not answer: {error}"
                    ) from error
                time.sleep(RETRY_S)
            except CkptError as error:
                raise DistStoreError(str(error)) from error


class UnrankedStore(Store):
    """The store of an agent without a round: it waits for no other agent.

    Its workers' ranks are outside the world. ``agents``: the most agents of a round.
    """

    def __init__(self, agents: int) -> None:
        super().__init__()
        self._agents = agents
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        with self._lock:
            self._values[key] = _bytes(value)

    def get(self, key: str) -> bytes:
        """The value; of ranks, those outside the world. Raises DistStoreError if there is none."""
        with self._lock:
            if key.startswith(decide.ASSIGNED):
                return decide.ranks_outside_world(
                    self._values[decide.ROLE_INFO + key.removeprefix(decide.ASSIGNED)], self._agents
                )
            if key not in self._values:
                raise DistStoreError(f"no other agent writes to this store. key={key}")
            return self._values[key]

    def add(self, key: str, value: int) -> int:
        """Add to a number."""
        with self._lock:
            total = int(self._values.get(key, b"0")) + value
            self._values[key] = str(total).encode()
            return total

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them have a value."""
        with self._lock:
            return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Return at once: there is no other agent to wait for.

        Raises DistStoreError if a value is missing.
        """
        if missing := [key for key in keys if key != decide.EXIT_DONE and not self.check([key])]:
            raise DistStoreError(
                f"no other agent writes to this store. keys={missing} timeout={timeout}"
            )


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def _sum(first: Sequence[KeyValue], adds: Sequence[KeyValue]) -> int:
    return (int(first[0].value) if first else 0) + sum(int(entry.value) for entry in adds)
