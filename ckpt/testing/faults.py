"""Stores that fail on purpose, and one that counts calls. Each wraps any store and is a store."""

from __future__ import annotations

import enum
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.errors import IntegrityError, StoreDeniedError, StoreFullError, UnavailableError


class Harm(enum.Enum):
    """What goes wrong with one call."""

    LOST_REQUEST = "lost request"
    """Nothing is done, and UnavailableError is raised."""
    LOST_REPLY = "lost reply"
    """Everything is done, and UnavailableError is raised all the same."""
    SLOW = "slow"
    """The call first waits for ``delay_s``."""
    TRUNCATED = "truncated"
    """A read fills half of ``out`` and reports that the object ends there."""
    FLIPPED = "flipped"
    """One bit differs, silently: in what a read returns, or in what a put stores."""
    FULL = "full"
    """A put raises StoreFullError with nothing done."""
    DENIED = "denied"
    """StoreDeniedError is raised with nothing done."""
    READ_ONLY = "read-only"
    """A put or delete raises StoreDeniedError with nothing done; reads work."""


_CHANGES = frozenset({"put", "delete"})
_APPLIES = {
    Harm.TRUNCATED: frozenset({"read_into"}),
    Harm.FLIPPED: frozenset({"read_into", "put"}),
    Harm.FULL: frozenset({"put"}),
    Harm.READ_ONLY: _CHANGES,
}
"""Harms that affect only some operations."""

OPERATIONS = ("put", "read_into", "stat", "list", "delete")
"""The operations that faults can affect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One planned harm.

    It affects calls of ``op`` (None: any possible) on keys that start with ``key``. The first
    ``skip`` matching calls are spared. Then it strikes ``times`` times (None: always), each time
    with probability ``chance``, drawn from the backend's seed.
    """

    harm: Harm
    op: str | None = None
    key: str = ""
    skip: int = 0
    times: int | None = 1
    chance: float = 1.0
    delay_s: float = 0.0

    def is_about(self, op: str, key: str) -> bool:
        """Whether this harm can affect a call of ``op`` on ``key``."""
        return (
            self.op in (None, op)
            and op in _APPLIES.get(self.harm, OPERATIONS)
            and key.startswith(self.key)
        )


class FaultyBackend:
    """A store with a plan of faults. Thread-safe.

    The first due fault decides a call. ``struck`` records (operation, key, harm). ``seed``
    determines chances and flipped bits: with one thread the same seed gives the same faults.
    ``sleep`` is what slow calls wait with.
    """

    def __init__(
        self,
        inner: Backend,
        faults: Sequence[Fault],
        *,
        seed: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.struck: list[tuple[str, str, Harm]] = []
        self._inner = inner
        self._faults = tuple(faults)
        self._met = [0] * len(self._faults)
        self._hits = [0] * len(self._faults)
        self._rng = random.Random(seed)
        self._sleep = sleep
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._inner.url

    def capabilities(self) -> Capabilities:
        """Never harmed."""
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        fault = self._before("put", key)
        if fault is not None and fault.harm is Harm.FLIPPED:
            data = [self._flip(bytearray(b"".join(data)))]
        self._inner.put(key, data, create_only=create_only)
        self._after(fault, "put", key)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        fault = self._before("read_into", key)
        flat = out.cast("B")
        if fault is not None and fault.harm is Harm.TRUNCATED:
            self._inner.read_into(key, flat[: len(flat) // 2], offset_bytes=offset_bytes)
            raise IntegrityError(
                f"the object ends too early. key={key} store={self.url} harm=planned; read another "
                "copy"
            )
        self._inner.read_into(key, flat, offset_bytes=offset_bytes)
        if fault is not None and fault.harm is Harm.FLIPPED:
            self._flip(flat)
        self._after(fault, "read_into", key)

    def stat(self, key: str) -> Stat | None:
        fault = self._before("stat", key)
        stat = self._inner.stat(key)
        self._after(fault, "stat", key)
        return stat

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """Harm strikes before the first entry, a lost reply after the last one."""
        fault = self._before("list", prefix)
        yield from self._inner.list(prefix, after=after)
        self._after(fault, "list", prefix)

    def delete(self, key: str) -> None:
        fault = self._before("delete", key)
        self._inner.delete(key)
        self._after(fault, "delete", key)

    def close(self) -> None:
        """Never harmed."""
        self._inner.close()

    def _before(self, op: str, key: str) -> Fault | None:
        """The fault that is due; raises or waits if it strikes before the call."""
        with self._lock:
            fault = self._due(op, key)
            if fault is not None:
                self.struck.append((op, key, fault.harm))
        facts = f"operation={op} key={key} store={self.url} harm=planned"
        match fault:
            case Fault(harm=Harm.SLOW):
                self._sleep(fault.delay_s)
            case Fault(harm=Harm.LOST_REQUEST):
                raise UnavailableError(f"the store did not answer. {facts}; repeat later")
            case Fault(harm=Harm.FULL):
                raise StoreFullError(f"the store is full. {facts}; free space, then repeat")
            case Fault(harm=Harm.DENIED | Harm.READ_ONLY):
                raise StoreDeniedError(f"the store refuses. {facts}; grant permission, then repeat")
            case _:
                pass
        return fault

    def _after(self, fault: Fault | None, op: str, key: str) -> None:
        if fault is not None and fault.harm is Harm.LOST_REPLY:
            raise UnavailableError(
                f"the store did not answer. operation={op} key={key} store={self.url}; repeat later"
            )

    def _due(self, op: str, key: str) -> Fault | None:
        for i, fault in enumerate(self._faults):
            if not fault.is_about(op, key):
                continue
            self._met[i] += 1
            spent = fault.times is not None and self._hits[i] >= fault.times
            if self._met[i] > fault.skip and not spent and self._rng.random() < fault.chance:
                self._hits[i] += 1
                return fault
        return None

    def _flip(self, memory: bytearray | memoryview) -> bytearray | memoryview:
        if len(memory):
            with self._lock:
                bit = self._rng.randrange(len(memory) * 8)
            memory[bit // 8] ^= 1 << bit % 8
        return memory


@dataclass(frozen=True, slots=True)
class Call:
    """One call that passed a CountingBackend.

    ``size_bytes`` and ``offset_bytes`` are those of ``put`` and ``read_into``.
    """

    op: str
    key: str
    size_bytes: int = 0
    offset_bytes: int = 0


class CountingBackend:
    """A store that records every call, to prove what was read and written. Thread-safe."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._calls: list[Call] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self._inner.url

    def calls(self, op: str | None = None, *, prefix: str = "") -> Sequence[Call]:
        """The calls of ``op`` (None: all) on keys that start with ``prefix``, in order."""
        with self._lock:
            return [
                call
                for call in self._calls
                if op in (None, call.op) and call.key.startswith(prefix)
            ]

    def size_bytes(self, op: str, *, prefix: str = "") -> int:
        """Bytes moved by those calls."""
        return sum(call.size_bytes for call in self.calls(op, prefix=prefix))

    def forget(self) -> None:
        """Forget the calls so far."""
        with self._lock:
            self._calls.clear()

    def capabilities(self) -> Capabilities:
        return self._inner.capabilities()

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._keep(Call("put", key, sum(len(buffer) for buffer in data)))
        self._inner.put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._keep(Call("read_into", key, out.nbytes, offset_bytes))
        self._inner.read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        self._keep(Call("stat", key))
        return self._inner.stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        self._keep(Call("list", prefix))
        return self._inner.list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._keep(Call("delete", key))
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()

    def _keep(self, call: Call) -> None:
        with self._lock:
            self._calls.append(call)
