"""The bytes of an encrypted object: as docs/dev/design/010-encryption.md says, and none of them can
be changed unseen."""

from __future__ import annotations

import hashlib
import hmac
import random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.backends.checked import read_alone
from ckpt.backends.encrypted.cipher import CopyingCipher, frame_cipher
from ckpt.backends.encrypted.layout import (
    FRAME_BYTES,
    HEADER_BYTES,
    PLAIN_BYTES_MAX,
    TAG_BYTES,
    decode_header,
    plain_size,
    sealed_size,
)
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import FormatVersionError, IntegrityError, UsageError
from ckpt.testing.contract import keys as keys_of
from ckpt.testing.contract import read

SECRET = hashlib.sha256(b"known answer").digest()
KEYS = EncryptionKeys(EncryptionKey.of(SECRET))
ONE = "packs/a.pack"

KNOWN = {
    (
        ONE,
        b"",
    ): (
        "636b7074656e63011d6bf3ec80ce219b0000000000000000c0e1b1f01b7173b0d1546e6155c99f2e942214a72e8e9c45"
        "a67816d0d2ba03049a9201408a077ba7"
    ),
    (
        ONE,
        b"hello",
    ): (
        "636b7074656e63011d6bf3ec80ce219b000000000000000539e626b40f3f37a374f2a40d471756532ddbb73d96f2c105"
        "17601e6301e92ab8bb894e49f6b50a317b9be6f07c40fa138602e15b0f089a7e6ee9f693f7"
    ),
    (
        "parts/b",
        b"hello",
    ): (
        "636b7074656e63011d6bf3ec80ce219b0000000000000005033ba2985169be0361b9b2f83708fce9bf6c6002964cfd31"
        "ef44681937df1f51149f22ce80654d6521895fe03a902df52dc91e1296c9459eac98bb0777"
    ),
}
"""Stored objects under SECRET, whole."""

KNOWN_LONG = "c663cd0049e37f096051605cfdd6964716cdded73e438f95a960bd4b24848aa1"
"""SHA-256 of the stored object of 300,000 bytes 0, 1, ..., 250, 0, ... at ONE."""


def sealed(body: bytes, *, name: str = ONE, keys: EncryptionKeys = KEYS) -> bytes:
    inner = MemoryBackend()
    encrypted(inner, keys).put(name, [body])
    return read_alone(inner, name, bytes_max=1 << 40)


def opened(stored: bytes, *, name: str = ONE, keys: EncryptionKeys = KEYS) -> bytes:
    """The plaintext as a reader who asks for the length first gets it, and who reads an empty
    object too."""
    return read(encrypted(_holding(name, stored), keys), name)


def opened_by_the_page(stored: bytes, name: str) -> bytes:
    """Another reader, written from the design page alone."""

    def mac(key: bytes, data: bytes) -> bytes:
        return hmac.new(key, data, hashlib.sha256).digest()

    root = mac(b"ckpt encrypted objects 1", SECRET)
    header_key, frames_key = mac(root, b"header\x01"), mac(root, b"frames\x01")
    path = name.encode()
    assert stored[:8] == b"ckptenc\x01"
    assert stored[8:16] == mac(root, b"id\x01")[:8]
    length, salt = int.from_bytes(stored[16:24], "big"), stored[24:40]
    assert stored[40:56] == mac(header_key, stored[:40] + path)[:16]
    assert stored[56:64] == hashlib.sha256(stored[:56] + path).digest()[:8]
    cipher = AESGCM(mac(frames_key, salt + path))
    plain = b""
    for number, at in enumerate(range(64, len(stored), 131_072 + 16)):
        nonce = number.to_bytes(12, "big")
        plain += cipher.decrypt(
            nonce, stored[at : at + 131_088], stored[:40] + path + number.to_bytes(8, "big")
        )
    assert len(plain) == length
    gmac = AESGCM(mac(root, b"digest\x01")).encrypt(bytes(12), b"", plain)
    assert salt == mac(mac(root, b"salt\x01"), gmac + length.to_bytes(8, "big") + path)[:16]
    return plain


@pytest.mark.parametrize(("name", "body"), KNOWN)
def test_small_objects_have_known_bytes(name: str, body: bytes) -> None:
    assert sealed(body, name=name).hex() == KNOWN[name, body]


def test_object_of_several_frames_has_known_bytes() -> None:
    body = (bytes(range(251)) * 1200)[:300_000]
    assert hashlib.sha256(sealed(body)).hexdigest() == KNOWN_LONG


@pytest.mark.parametrize("size_bytes", [0, 1, 131_071, 131_072, 131_073, 400_000])
def test_reader_written_from_the_page_reads_it(size_bytes: int) -> None:
    body = random.Random(size_bytes).randbytes(size_bytes)
    assert opened_by_the_page(sealed(body), ONE) == body


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.integers(0, 300), st.integers(131_000, 131_200), st.integers(0, 400_000)),
        max_size=5,
    ),
    seed=st.integers(0, 2**32),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_buffers_come_back_in_any_range(
    sizes: list[int], seed: int, ends: tuple[float, float]
) -> None:
    rng = random.Random(seed)
    pieces = [rng.randbytes(size) for size in sizes]
    whole = b"".join(pieces)
    inner = MemoryBackend()
    encrypted(inner, KEYS).put(ONE, pieces)
    start, stop = sorted(round(end * len(whole)) for end in ends)
    store = encrypted(inner, KEYS)
    assert read(store, ONE, start, stop) == whole[start:stop]
    assert read(store, ONE) == whole
    assert read(store, ONE, start, stop) == whole[start:stop]
    assert [found.size_bytes for found in store.list("")] == [len(whole)]


@given(size_bytes=st.one_of(st.integers(0, 10**6), st.integers(0, PLAIN_BYTES_MAX)))
def test_sizes_are_a_function_both_ways(size_bytes: int) -> None:
    assert plain_size(sealed_size(size_bytes)) == size_bytes


@given(stored_bytes=st.integers(0, 10**6))
def test_every_stored_length_has_one_plain_length_or_none(stored_bytes: int) -> None:
    found = plain_size(stored_bytes)
    assert found is None or sealed_size(found) == stored_bytes


def test_sizes_beside_the_edges() -> None:
    step = FRAME_BYTES + TAG_BYTES
    impossible = [0, 1, 63, *range(65, 81), HEADER_BYTES + step + 1, HEADER_BYTES + step + 16]
    assert [plain_size(size) for size in impossible] == [None] * len(impossible)
    assert [plain_size(size) for size in (64, 81, 64 + step, 64 + step + 17)] == [
        0,
        1,
        FRAME_BYTES,
        FRAME_BYTES + 1,
    ]
    with pytest.raises(UsageError):
        sealed_size(PLAIN_BYTES_MAX + 1)


@settings(max_examples=40, deadline=None)
@given(body=st.binary(max_size=400), name=st.sampled_from([ONE, "parts/x", "manifests/y"]))
def test_same_plaintext_at_the_same_key_gives_the_same_bytes_and_any_other_gives_others(
    body: bytes, name: str
) -> None:
    first = sealed(body, name=name)
    assert sealed(body, name=name) == first
    for other in (sealed(body + b"\0", name=name), sealed(body, name=name + "2")):
        assert other[24:40] != first[24:40]


@pytest.mark.parametrize("body", [b"", b"x", b"a small object of a few bytes"])
@pytest.mark.parametrize("bit", [0, 3, 7])
def test_every_changed_bit_is_found(body: bytes, bit: int) -> None:
    whole = sealed(body)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        with pytest.raises(IntegrityError):
            opened(bytes(changed))


def test_changed_byte_is_found_in_the_frame_that_holds_it_and_elsewhere_harms_nothing() -> None:
    body = random.Random(2).randbytes(3 * FRAME_BYTES)
    inner = MemoryBackend()
    changed = bytearray(sealed(body))
    changed[HEADER_BYTES + FRAME_BYTES + TAG_BYTES + 5] ^= 1
    inner.put(ONE, [changed])
    store = encrypted(inner, KEYS)
    assert read(store, ONE, 0, FRAME_BYTES) == body[:FRAME_BYTES]
    assert read(store, ONE, 2 * FRAME_BYTES, 3 * FRAME_BYTES) == body[2 * FRAME_BYTES :]
    with pytest.raises(IntegrityError, match="frame=1"):
        read(store, ONE, FRAME_BYTES - 1, FRAME_BYTES + 1)


def frames(stored: bytes) -> tuple[bytes, list[bytes]]:
    step = FRAME_BYTES + TAG_BYTES
    return stored[:HEADER_BYTES], [
        stored[at : at + step] for at in range(HEADER_BYTES, len(stored), step)
    ]


def test_frames_in_another_order_are_found() -> None:
    head, parts = frames(sealed(random.Random(3).randbytes(4 * FRAME_BYTES)))
    for low in range(3):
        swapped = parts.copy()
        swapped[low], swapped[low + 1] = swapped[low + 1], swapped[low]
        with pytest.raises(IntegrityError):
            opened(head + b"".join(swapped))
    with pytest.raises(IntegrityError):
        opened(head + b"".join([parts[0]] * 4))


def test_frame_of_another_object_is_found() -> None:
    head, parts = frames(sealed(bytes(2 * FRAME_BYTES)))
    for other in (
        sealed(bytes(2 * FRAME_BYTES), name="packs/b"),
        sealed(b"\1" + bytes(2 * FRAME_BYTES - 1)),
    ):
        with pytest.raises(IntegrityError):
            opened(head + parts[0] + frames(other)[1][1])


def test_object_under_another_name_is_found() -> None:
    for body in (b"", b"body", bytes(FRAME_BYTES)):
        with pytest.raises(IntegrityError):
            opened(sealed(body), name="packs/b")
        with pytest.raises(IntegrityError):
            read(encrypted(_holding("packs/b", sealed(body)), KEYS), "packs/b", 0, len(body))


@pytest.mark.parametrize("size_bytes", [0, 1, 100, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES])
def test_truncated_and_lengthened_objects_are_found(size_bytes: int) -> None:
    whole = sealed(random.Random(4).randbytes(size_bytes))
    step = FRAME_BYTES + TAG_BYTES
    shorter = {
        0,
        1,
        40,
        63,
        64,
        65,
        len(whole) - 1,
        len(whole) - 16,
        len(whole) - 17,
        len(whole) - step,
    }
    for stop in shorter:
        if 0 <= stop < len(whole):
            with pytest.raises(IntegrityError):
                opened(whole[:stop])
            with pytest.raises(IntegrityError):
                read(encrypted(_holding(ONE, whole[:stop]), KEYS), ONE, 0, max(1, size_bytes))
    for more in (b"\0", bytes(16), bytes(17), bytes(step), whole[HEADER_BYTES:]):
        if more:
            with pytest.raises(IntegrityError):
                opened(whole + more)


def test_truncation_at_a_frame_is_found_though_the_header_is_made_to_say_so() -> None:
    whole = sealed(bytes(2 * FRAME_BYTES))
    shorter = bytearray(whole[: HEADER_BYTES + FRAME_BYTES + TAG_BYTES])
    shorter[16:24] = FRAME_BYTES.to_bytes(8, "big")
    shorter[56:64] = hashlib.sha256(bytes(shorter[:56]) + ONE.encode()).digest()[:8]
    with pytest.raises(IntegrityError, match="not made with its key"):
        opened(bytes(shorter))


def test_object_that_is_not_encrypted_is_integrity_error() -> None:
    for body in (b"", b"plain", b'{"a": 1}' * 50, bytes(81)):
        with pytest.raises(IntegrityError):
            opened(body)


def test_listing_outlives_an_object_of_impossible_length() -> None:
    inner = _holding("packs/a", sealed(b"12345", name="packs/a"))
    inner.put("packs/b", [b"torn"])
    inner.put("packs/c", [sealed(b"123", name="packs/c")])
    store = encrypted(inner, KEYS)
    assert [(found.key, found.size_bytes) for found in store.list("packs/")] == [
        ("packs/a", 5),
        ("packs/b", 0),
        ("packs/c", 3),
    ]
    assert keys_of(store, "packs/", "packs/a") == ["packs/b", "packs/c"]
    with pytest.raises(IntegrityError, match="length"):
        store.stat("packs/b")


def test_newer_format_is_told_apart_from_damage() -> None:
    newer = bytearray(sealed(b"12345"))
    newer[7] = 2
    with pytest.raises(IntegrityError):
        opened(bytes(newer))
    newer[56:64] = hashlib.sha256(bytes(newer[:56]) + ONE.encode()).digest()[:8]
    with pytest.raises(FormatVersionError, match="upgrade"):
        opened(bytes(newer))


def test_replaced_object_is_read_although_its_header_is_remembered() -> None:
    inner = MemoryBackend()
    reader, writer = encrypted(inner, KEYS), encrypted(inner, KEYS)
    for body in (b"first", b"other", b"longer than before", b"", b"short"):
        writer.put(ONE, [body])
        assert read(reader, ONE) == body
        for at in range(len(body)):
            assert read(reader, ONE, at, len(body)) == body[at:]


def test_releases_without_encrypt_into_give_the_same_bytes() -> None:
    key, rng = bytes(range(32)), random.Random(9)
    for size in (1, 100, FRAME_BYTES):
        plain = rng.randbytes(size)
        ours, theirs = bytearray(size + TAG_BYTES), bytearray(size + TAG_BYTES)
        frame_cipher(key).encrypt_into(bytes(12), plain, b"bound", ours)
        CopyingCipher(key).encrypt_into(bytes(12), plain, b"bound", theirs)
        assert ours == theirs
        back = bytearray(size)
        CopyingCipher(key).decrypt_into(bytes(12), ours, b"bound", back)
        assert back == plain


@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_header_decoder(data: bytes) -> None:
    assert isinstance(decode_header(data, ONE), str)


def _holding(name: str, stored: bytes) -> MemoryBackend:
    inner = MemoryBackend()
    inner.put(name, [stored])
    return inner
