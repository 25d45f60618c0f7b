"""A store whose bytes only a key can read: a wrapper around any backend, and around several behind
one.

Objects whose key ``is_sealed`` takes are encrypted whole; all others pass through as they are.
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
"""Shorter reads decrypt mostly what was not asked for."""

_TRIES_MAX = 3
"""Looks at an object's two lengths: objects never change, so that they differ twice only where one
is damaged."""


class EncryptedBackend:
    """``inner`` with objects encrypted under ``keys``; sizes and offsets are the plaintext's.

    A put takes memory for the stored object, a read for the stored bytes of its range; up to 256
    MiB are kept for the next. A key that isn't among ``keys`` raises UsageError, which nothing
    takes for damage; stored bytes that differ from what was written raise IntegrityError.
    ``others`` are bare stores that hold the same objects: what they have is written with the key
    that they have it under, so that all copies stay alike after a change of keys.
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
        """See Backend."""
        return self._inner.url

    @property
    def inner(self) -> Backend:
        """The store with the bytes as they lie there. Copies from store to store are made of
        these."""
        return self._inner

    def capabilities(self) -> Capabilities:
        """See Backend."""
        found = self._inner.capabilities()
        return replace(
            found, direct_io=False, read_bytes_best=max(found.read_bytes_best, READ_BYTES_BEST_MIN)
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        """See Backend. Repeating a put stores the same bytes; the buffers must not change until it
        returns."""
        if not self._is_sealed(check_key(key)):
            self._inner.put(key, data, create_only=create_only)
            return
        self._reader.forget_header(key)
        with sealed(key, data, self._writing(key), self._memory) as stored:
            self._inner.put(key, [stored], create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        """See Backend. Reads whole frames, up to 128 KiB more at each end."""
        if not self._is_sealed(check_key(key)):
            self._inner.read_into(key, out, offset_bytes=offset_bytes)
            return
        self._read(key, out, accept_any, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        """See Backend. Raises IntegrityError where the stored length is no encrypted object's, or
        not what its header says.

        The header is read only where an object cut short could pass for a shorter one; else reading
        it to its end fails.
        """
        found = self._inner.stat(key)
        if not self._is_sealed(key):
            return found
        for _ in range(_TRIES_MAX):
            if found is None:
                return None
            size_bytes = plain_size(found.size_bytes)
            if size_bytes is not None and (
                size_bytes % FRAME_BYTES or size_bytes == self._reader.plain_bytes(key)
            ):
                return Stat(key, size_bytes, found.modified_unix_s)
            self._reader.forget_header(key)  # another object may have taken its place
            found = self._inner.stat(key)
        raise IntegrityError(
            f"an encrypted object's length is not what it should be. key={key} store={self.url}; "
            "read another copy"
        )

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        """See Backend. An object whose length no encrypted one has comes with 0 bytes: a listing
        outlives damage."""
        for found in self._inner.list(prefix, after=after):
            if self._is_sealed(found.key):
                yield Stat(found.key, plain_size(found.size_bytes) or 0, found.modified_unix_s)
            else:
                yield found

    def delete(self, key: str) -> None:
        """See Backend."""
        self._reader.forget_header(key)
        self._inner.delete(key)

    def close(self) -> None:
        """See Backend."""
        self._inner.close()

    def _writing(self, name: str) -> EncryptionKey:
        for store in self._others:
            head = memoryview(bytearray(HEADER_BYTES))
            try:
                store.read_into(name, head)
            except (NotFoundError, IntegrityError, UnavailableError):
                continue  # this copy says nothing; the newest key is right for what no store has
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
    """The same around several stores: what does not decrypt in one of them is read from, and mended
    by, another."""

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
        """Each store alone, seen through the keys; what isn't encrypted, the log above all, is read
        and written as it is."""
        return self._stores

    @property
    def write_quorum(self) -> int:
        """See Replicated."""
        return self._several.write_quorum

    def count_only(self, full: frozenset[int], *, silent: frozenset[int] = frozenset()) -> None:
        """See Replicated."""
        self._several.count_only(full, silent=silent)

    def stat(self, key: str) -> Stat | None:
        """See Backend. Where the copy that answered has a wrong length, of the first that has a
        right one."""
        try:
            return super().stat(key)
        except IntegrityError as damage:
            for store in self._stores:
                try:
                    found = store.stat(key)
                except (IntegrityError, UnavailableError):
                    continue
                if found is not None:
                    return found
            raise damage

    def read_checked(
        self, key: str, out: memoryview, check: Check, *, offset_bytes: int = 0
    ) -> None:
        """See Replicated. ``check`` sees plaintext."""
        if not self._is_sealed(check_key(key)):
            self._several.read_checked(key, out, check, offset_bytes=offset_bytes)
            return
        self._read(key, out, check, offset_bytes=offset_bytes)

    def read_object(self, key: str, check: Check, *, bytes_max: int) -> bytes:
        """See Replicated. ``check`` sees plaintext, and ``bytes_max`` is of plaintext."""
        if not self._is_sealed(check_key(key)):
            return self._several.read_object(key, check, bytes_max=bytes_max)
        return self._reader.read_object(key, check, self._several, bytes_max=bytes_max)


def encrypted_store(
    inner: Backend, keys: EncryptionKeys, *, is_sealed: Callable[[str], bool]
) -> Backend:
    """``inner`` with encrypted objects, several stores where ``inner`` is several."""
    if isinstance(inner, MultiStoreBackend):
        return EncryptedMultiStore(inner, inner, keys, is_sealed=is_sealed)
    return EncryptedBackend(inner, keys, is_sealed=is_sealed)
