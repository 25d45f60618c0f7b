"""A store whose objects only a key can read: a wrapper around any backend.

Objects whose key ``is_sealed`` accepts are encrypted whole; all others pass through unchanged.
Imported lazily, because it needs the package ``cryptography``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ckpt.backends.base import Backend, Buffer, Capabilities, Stat, check_key
from ckpt.backends.checked import Check, MultiStoreBackend
from ckpt.backends.encrypted.cipher import CipherMemory, sealed
from ckpt.backends.encrypted.layout import FRAME_BYTES, HEADER_BYTES, decode_header, plain_size
from ckpt.backends.encrypted.reading import SealedReader, accept_any
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.errors import IntegrityError, NotFoundError, UnavailableError, UsageError

READ_BYTES_BEST_MIN = 4 * FRAME_BYTES
"""Shorter reads decrypt mostly bytes that were not asked for."""

_TRIES_MAX = 3
"""Comparisons of an object's stored length with its header. Objects never change, so only a damaged
one differs more than once.
"""


class EncryptedBackend:
    """``inner`` with objects encrypted under ``keys``; sizes and offsets are the plaintext's.

    A put takes memory for the stored object, a read for the stored bytes of its range; up to 256
    MiB are kept for reuse. An object under an unknown key raises UsageError, which no caller takes
    for damage. Stored bytes that differ from what was written raise IntegrityError. ``others`` are
    bare stores that hold the same objects. An object that one of them has is written under the key
    that it has there, so that all copies stay equal after a change of keys.
    """

    def __init__(
        self,
        inner: Backend,
        keys: EncryptionKeys,
        *,
        is_sealed: Callable[[str], bool],
        others: Sequence[Backend] = (),
        memory: CipherMemory | None = None,
    ) -> None:
        self._inner = inner
        self._others = tuple(others) if keys.older else ()
        self._keys = keys
        self._is_sealed = is_sealed
        self._memory = memory or CipherMemory()
        self._reader = SealedReader(inner, keys, self._memory)

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def inner(self) -> Backend:
        """The store of encrypted bytes. Copies from store to store are made of these."""
        return self._inner

    def capabilities(self) -> Capabilities:
        inner = self._inner.capabilities()
        return replace(
            inner, direct_io=False, read_bytes_best=max(inner.read_bytes_best, READ_BYTES_BEST_MIN)
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """Repeating a put stores the same bytes. The buffers must not change until it returns."""
        if not self._is_sealed(check_key(key)):
            self._inner.put(key, data, create_only=create_only)
            return
        self._reader.forget_header(key)
        with sealed(key, data, self._writing(key), self._memory) as stored:
            self._inner.put(key, [stored], create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """Reads whole frames, up to 128 KiB more at each end."""
        if not self._is_sealed(check_key(key)):
            self._inner.read_into(key, out, offset_bytes=offset_bytes)
            return
        self._read(key, out, accept_any, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """Raises IntegrityError if the stored length is no encrypted object's, or not the header's.

        The header is read only if a truncated object could pass for a shorter one; in all other
        cases reading the object to its end fails.
        """
        stat = self._inner.stat(key)
        if not self._is_sealed(key):
            return stat
        for _ in range(_TRIES_MAX):
            if stat is None:
                return None
            size_bytes = plain_size(stat.size_bytes)
            # Cut between frames, an object could pass for a shorter one whose last frame is full:
            # only then compare with the header.
            if size_bytes is not None and (
                size_bytes % FRAME_BYTES or size_bytes == self._reader.plain_bytes(key)
            ):
                return Stat(key, size_bytes, stat.modified_unix_s)
            self._reader.forget_header(key)  # the object may have been replaced
            stat = self._inner.stat(key)
        raise IntegrityError(
            f"an encrypted object has a wrong length. key={key} store={self.url}; read another copy"
        )

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """An object whose stored length is invalid is listed with 0 bytes.

        Damage must not end a listing.
        """
        for stat in self._inner.list(prefix, after=after):
            if self._is_sealed(stat.key):
                yield Stat(stat.key, plain_size(stat.size_bytes) or 0, stat.modified_unix_s)
            else:
                yield stat

    def delete(self, key: str) -> None:
        self._reader.forget_header(key)
        self._inner.delete(key)

    def close(self) -> None:
        self._inner.close()

    def _writing(self, name: str) -> EncryptionKey:
        # Write under the key that another store has the object under, so that all copies stay equal
        # after a change of keys.
        for store in self._others:
            head = memoryview(bytearray(HEADER_BYTES))
            try:
                store.read_into(name, head)
            except (NotFoundError, IntegrityError, UnavailableError):
                continue  # no header here; an object that no store has gets the newest key
            header = decode_header(head, name)
            key = None if isinstance(header, str) else self._keys.find(header.key_id)
            if key is not None:
                return key
        return self._keys.writing

    def _read(self, key: str, out: memoryview, check: Check, *, offset_bytes: int) -> None:
        if offset_bytes < 0:
            raise UsageError(
                f"an offset is negative. key={key} offset_bytes={offset_bytes}; pass 0 or more"
            )
        self._reader.read(key, out.cast("B"), check, offset_bytes=offset_bytes)


class EncryptedMultiStore(EncryptedBackend):
    """The same over several stores.

    An object that does not decrypt in one of them is read from another, which also repairs it.
    """

    def __init__(
        self,
        inner: Backend,
        several: MultiStoreBackend,
        keys: EncryptionKeys,
        *,
        is_sealed: Callable[[str], bool],
    ) -> None:
        super().__init__(inner, keys, is_sealed=is_sealed)
        self._several = several
        self._stores = tuple(
            EncryptedBackend(
                store,
                keys,
                is_sealed=is_sealed,
                others=[other for other in several.stores if other is not store],
                memory=self._memory,
            )
            for store in several.stores
        )

    @property
    def stores(self) -> tuple[Backend, ...]:
        """The single stores, seen through the keys.

        Objects that are not encrypted, above all the log, pass through unchanged.
        """
        return self._stores

    @property
    def write_quorum(self) -> int:
        return self._several.write_quorum

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        self._several.count_only(full, silent=silent)

    def await_caught_up(
        self, timeout_s: float, *, of: frozenset[int] | None = None, least: int | None = None
    ) -> bool:
        return self._several.await_caught_up(timeout_s, of=of, least=least)

    def stat(self, key: str) -> Stat | None:
        """If the copy that answered has a wrong length, the first copy with a right one."""
        try:
            return super().stat(key)
        except IntegrityError as damage:
            # A truncated copy must not make the object look damaged in all stores.
            for store in self._stores:
                try:
                    stat = store.stat(key)
                except (IntegrityError, UnavailableError):
                    continue
                if stat is not None:
                    return stat
            raise damage

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        """``check`` sees plaintext."""
        if not self._is_sealed(check_key(key)):
            self._several.read_checked(key, out, check, offset_bytes=offset_bytes)
            return
        self._read(key, out, check, offset_bytes=offset_bytes)

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        """``check`` sees plaintext, and ``bytes_max`` is of plaintext."""
        if not self._is_sealed(check_key(key)):
            return self._several.read_object(key, check, bytes_max=bytes_max)
        return self._reader.read_object(key, check, self._several, bytes_max=bytes_max)


def encrypted_store(
    inner: Backend, keys: EncryptionKeys, *, is_sealed: Callable[[str], bool]
) -> Backend:
    """``inner`` with encrypted objects; if ``inner`` is several stores, so is the result."""
    if isinstance(inner, MultiStoreBackend):
        return EncryptedMultiStore(inner, inner, keys, is_sealed=is_sealed)
    return EncryptedBackend(inner, keys, is_sealed=is_sealed)
