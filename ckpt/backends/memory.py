"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ckpt.backends.base import Buffer, Capabilities, Stat, check_key, check_prefix
from ckpt.errors import IntegrityError, KeyExistsError, NotFoundError, UsageError


class MemoryBackend:
    """Objects in a dictionary, lost with the process. Thread-safe.

    ``name`` is used in messages only.
    """

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[bytes, float]] = {}

    @property
    def url(self) -> str:
        """``memory:<name>``, for messages."""
        return f"memory:{self._name}"

    def capabilities(self) -> Capabilities:
        return Capabilities(create_only=True, read_bytes_best=64 << 10, concurrency_best=4)

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Copies the bytes."""
        self.put_lent(key, data, lambda: None, create_only=create_only)

    def put_lent(
        self,
        key: str,
        data: Sequence[Buffer],
        still_lent: Callable[[], None],
        *,
        create_only: bool = False,
    ) -> None:
        """As ``put``, with memory that its owner may take back and change meanwhile.

        After that ``still_lent`` raises.
        """
        check_key(key)
        body = b"".join(data)
        still_lent()
        with self._lock:
            if create_only and key in self._objects:
                raise KeyExistsError(
                    f"the key is taken. key={key} store={self.url}; read it to learn whose bytes "
                    "it holds"
                )
            self._objects[key] = (body, time.time())

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        check_key(key)
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        with self._lock:
            entry = self._objects.get(key)
        if entry is None:
            raise NotFoundError(
                f"no such object. key={key} store={self.url}; list the store's keys"
            )
        flat = out.cast("B")
        part = memoryview(entry[0])[offset_bytes : offset_bytes + len(flat)]
        flat[: len(part)] = part
        if len(part) < len(flat):
            raise IntegrityError(
                f"the object ends too early. key={key} offset_bytes={offset_bytes} "
                f"wanted_bytes={len(flat)} got_bytes={len(part)}; read another copy"
            )

    def stat(self, key: str) -> Stat | None:
        check_key(key)
        with self._lock:
            entry = self._objects.get(key)
        return None if entry is None else Stat(key, len(entry[0]), entry[1])

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """A snapshot of the moment of the first ``next``."""
        check_prefix(prefix)
        with self._lock:
            stats = [
                Stat(key, len(body), modified)
                for key, (body, modified) in self._objects.items()
                if key.startswith(prefix) and key > after
            ]
        yield from sorted(stats, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def close(self) -> None:
        """The objects stay."""
