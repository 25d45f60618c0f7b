"""Reads of encrypted objects, from one store or from several that hold the same objects.

A range needs its object's header and the frames around it. Headers are remembered, and a read from
an object's start fetches the header too, so most reads are one request. Bytes that do not decrypt
are never returned. If a header and frames do not belong together, the header is read again, since
the object may have been replaced, and from another copy if there are several.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from ckpt.backends.base import Backend
from ckpt.backends.checked import Check, MultiStoreBackend, read_checked
from ckpt.backends.encrypted.cipher import CipherMemory, unseal
from ckpt.backends.encrypted.layout import (
    FRAME_BYTES,
    HEADER_BYTES,
    VERSION,
    EncryptedHeader,
    decode_header,
    sealed_range,
    sealed_size,
)
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.errors import FormatVersionError, IntegrityError, NotFoundError, UsageError

_HEADERS_MAX = 4096
"""Headers remembered: more than a snapshot has packs, in about a megabyte of memory."""

_TRIES_MAX = 8
"""Headers that one read tries. Objects never change, so a second header means another key or a
replaced object.
"""

_NOT_GENUINE = "an encrypted object's header was not made with its key"


def accept_any(_: memoryview) -> str | None:
    """The check of a read that knows no digest: authenticated decryption is enough."""
    return None


def require_known_key(
    header: EncryptedHeader, name: str, keys: EncryptionKeys, *, url: str
) -> EncryptionKey:
    """The key that ``header`` was written with.

    Raises UsageError if it is not available, and FormatVersionError for a newer format. Neither is
    damage: nothing must be repaired, and no older snapshot used instead.
    """
    if header.version != VERSION:
        raise FormatVersionError(
            f"an object is encrypted in another format. key={name} version={header.version} "
            f"known={VERSION} store={url}; upgrade ckpt"
        )
    key = keys.find(header.key_id)
    if key is None:
        raise UsageError(
            f"wrong encryption key. key={name} encrypted_with={header.key_id.hex()} "
            f"given={keys.ids} store={url}; give the key that this was written with (after a "
            "change of keys both: 'file:new,file:old')"
        )
    return key


class SealedReader:
    """Reads from ``inner``, which holds objects encrypted under one of ``keys``. Thread-safe."""

    def __init__(self, inner: Backend, keys: EncryptionKeys, memory: CipherMemory) -> None:
        self._inner = inner
        self._keys = keys
        self._memory = memory
        self._headers: OrderedDict[str, EncryptedHeader] = OrderedDict()
        self._lock = threading.Lock()

    def forget_header(self, name: str) -> None:
        """Forget the header of an object that is written or deleted here."""
        with self._lock:
            self._headers.pop(name, None)

    def plain_bytes(self, name: str) -> int | None:
        """The plaintext's length from the object's header; None if there is no object.

        Raises IntegrityError, UsageError.
        """
        header = self._remembered(name)
        if header is None:
            try:
                header = self._read_header(name, set())
            except NotFoundError:
                return None
        return header.plain_bytes

    def read(self, name: str, out: memoryview, check: Check, *, offset_bytes: int) -> None:
        """As ``checked.read_checked``, of plaintext.

        Takes memory for the stored bytes of the range, besides ``out``.
        """
        # An empty read needs no frames; it reads the header afresh, to learn whether the object
        # exists and is genuine.
        header = self._remembered(name) if len(out) else None
        if header is None and len(out) and offset_bytes == 0:
            header, filled = self._read_start(name, out, check)
            if filled:
                return
        # Header and frames of one object are written together. If they do not match, the remembered
        # header is of a replaced object or another copy: read it again, but accept none twice.
        refuted: set[EncryptedHeader] = set()
        failure: IntegrityError | None = None
        for _ in range(_TRIES_MAX):
            if header is None:
                try:
                    header = self._read_header(name, refuted)
                except IntegrityError as error:
                    raise failure or error from None
            try:
                self._read_frames(name, header, out, check, offset_bytes=offset_bytes)
                return
            except IntegrityError as error:
                failure = error
                refuted.add(header)
                header = None
                self.forget_header(name)
        assert failure is not None
        raise failure

    def read_object(
        self, name: str, check: Check, several: MultiStoreBackend, *, bytes_max: int
    ) -> bytes:
        """As ``checked.read_object``, of plaintext. Decrypts twice: to check and to return."""

        def opens(stored: memoryview) -> str | None:
            header, problem = self._header_in(stored, name)
            # A genuine header of an unknown key is accepted here: _whole() below raises the right
            # error.
            if header is None or self._key_of(header) is None:
                return problem
            plain = self._whole(name, stored)
            return plain if isinstance(plain, str) else check(memoryview(plain))

        stored = several.read_object(name, opens, bytes_max=sealed_size(bytes_max))
        plain = self._whole(name, memoryview(stored))
        if isinstance(plain, str):
            raise IntegrityError(f"{plain}. key={name} store={self._inner.url}; read another copy")
        return bytes(plain)

    def _read_start(
        self, name: str, out: memoryview, check: Check
    ) -> tuple[EncryptedHeader | None, bool]:
        """Read header and frames in one request.

        It assumes that the object ends with ``out``, or that ``out`` ends with a frame. Returns the
        header if there is one, and whether ``out`` is filled. A wrong assumption is no error: the
        caller then reads again.
        """
        target = _CheckedTarget(out, check)

        def fits(data: memoryview) -> str | None:
            header, problem = self._header_in(data, name)
            key = None if header is None else self._key_of(header)
            # Wrong assumption or unknown key: accept the bytes as they are (problem is None), so
            # that no store counts as damaged; the caller sees that nothing was filled.
            if header is None or key is None or not _reaches(header, len(out)):
                return problem
            return target.fill(name, header, key, data[HEADER_BYTES:], offset_bytes=0)

        with self._memory.borrow(sealed_size(len(out))) as stored:
            try:
                read_checked(self._inner, name, stored, fits)
            except IntegrityError:
                return None, False
            return self._header_of(name, stored), target.filled

    def _read_header(self, name: str, refuted: set[EncryptedHeader]) -> EncryptedHeader:
        """The header of a copy, but none of ``refuted``."""
        stored = memoryview(bytearray(HEADER_BYTES))

        def usable(data: memoryview) -> str | None:
            header, problem = self._header_in(data, name)
            return "no other header" if header in refuted else problem

        read_checked(self._inner, name, stored, usable)
        return self._header_of(name, stored)

    def _read_frames(
        self,
        name: str,
        header: EncryptedHeader,
        out: memoryview,
        check: Check,
        *,
        offset_bytes: int,
    ) -> None:
        if len(out) and offset_bytes + len(out) > header.plain_bytes:
            raise IntegrityError(
                f"the object ends too early. key={name} offset_bytes={offset_bytes} "
                f"wanted_bytes={len(out)} size_bytes={header.plain_bytes} store={self._inner.url}; "
                "read another copy"
            )
        key = require_known_key(header, name, self._keys, url=self._inner.url)
        target = _CheckedTarget(out, check)

        def opens(data: memoryview) -> str | None:
            return target.fill(name, header, key, data, offset_bytes=offset_bytes)

        if not len(out):
            if (problem := opens(out)) is not None:
                raise IntegrityError(f"{problem}. key={name} store={self._inner.url}")
            return
        start, stop = sealed_range(offset_bytes, len(out), header.plain_bytes)
        with self._memory.borrow(stop - start) as stored:
            read_checked(self._inner, name, stored, opens, offset_bytes=start)

    def _whole(self, name: str, stored: memoryview) -> bytearray | str:
        """The plaintext of a whole stored object, or what is wrong with it.

        Raises as ``require_known_key``.
        """
        header, problem = self._header_in(stored, name)
        if header is None:
            return problem or _NOT_GENUINE
        key = require_known_key(header, name, self._keys, url=self._inner.url)
        if sealed_size(header.plain_bytes) != len(stored):
            return (
                "an encrypted object has another length than its header says. "
                f"size_bytes={len(stored)}"
            )
        out = bytearray(header.plain_bytes)
        problem = unseal(name, header, stored[HEADER_BYTES:], memoryview(out), key, offset_bytes=0)
        return out if problem is None else problem

    def _header_in(self, data: memoryview, name: str) -> tuple[EncryptedHeader | None, str | None]:
        """The header at the start of a stored object, or what is wrong with it.

        The header of an unknown key is not wrong: its MAC cannot be checked.
        """
        header = decode_header(data, name)
        if isinstance(header, str):
            return None, header
        key = self._key_of(header)
        # Without the key the header cannot be proven genuine. It counts as right here, so that a
        # wrong key is reported as such and not as damage, which would start repairs.
        return (
            (header, None)
            if key is None or key.authenticates(header, name)
            else (None, _NOT_GENUINE)
        )

    def _header_of(self, name: str, data: memoryview) -> EncryptedHeader:
        """The header in bytes that were accepted, which is then remembered.

        Raises as ``require_known_key``.
        """
        header, problem = self._header_in(data, name)
        if header is None:
            raise IntegrityError(
                f"{problem}. key={name} store={self._inner.url}; read another copy"
            )
        require_known_key(header, name, self._keys, url=self._inner.url)
        with self._lock:
            self._headers[name] = header
            self._headers.move_to_end(name)
            while len(self._headers) > _HEADERS_MAX:
                self._headers.popitem(last=False)
        return header

    def _key_of(self, header: EncryptedHeader) -> EncryptionKey | None:
        return self._keys.find(header.key_id) if header.version == VERSION else None

    def _remembered(self, name: str) -> EncryptedHeader | None:
        with self._lock:
            return self._headers.get(name)


class _CheckedTarget:
    """The caller's memory and check, shared by the copies that one read asks.

    Once filled with right bytes the memory is left alone: a slower copy may still answer.
    """

    def __init__(self, out: memoryview, check: Check) -> None:
        self.filled = False
        self._out = out
        self._check = check
        self._lock = threading.Lock()

    def fill(
        self,
        name: str,
        header: EncryptedHeader,
        key: EncryptionKey,
        stored: memoryview,
        *,
        offset_bytes: int,
    ) -> str | None:
        """Decrypt and check; what is wrong, or None."""
        with self._lock:
            # A copy that answers after the first right one is still checked, to learn whether it is
            # damaged, but not into the caller's memory.
            target = memoryview(bytearray(len(self._out))) if self.filled else self._out
            problem = unseal(
                name, header, stored, target, key, offset_bytes=offset_bytes
            ) or self._check(target)
            self.filled = self.filled or problem is None
        return problem


def _reaches(header: EncryptedHeader, size_bytes: int) -> bool:
    """Whether the frames of the first ``size_bytes`` are as if the object ended with them."""
    return size_bytes == header.plain_bytes or (
        size_bytes < header.plain_bytes and size_bytes % FRAME_BYTES == 0
    )
