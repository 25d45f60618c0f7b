"""Keys: several at once, a wrong one, and a store opened in the wrong way."""

from __future__ import annotations

import copy
import hashlib
import pickle
import subprocess
import sys

import pytest

from ckpt.backends.encrypted.open import encrypted, is_sealed_key, require_matching_keys
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import IntegrityError, StoreDeniedError, UnavailableError, UsageError
from ckpt.testing.contract import read

PACK, MANIFEST = "packs/a", "manifests/m"


def key_named(name: str) -> EncryptionKey:
    return EncryptionKey.of(hashlib.sha256(name.encode()).digest())


OLD, NEW, STRANGE = key_named("old"), key_named("new"), key_named("strange")


def test_old_objects_are_read_and_new_ones_written_with_the_first_key() -> None:
    inner = MemoryBackend()
    encrypted(inner, EncryptionKeys(OLD)).put(PACK, [b"old"])
    both = encrypted(inner, EncryptionKeys(NEW, (OLD,)))
    both.put("packs/b", [b"new"])
    assert read(both, PACK) == b"old"
    assert read(encrypted(inner, EncryptionKeys(NEW)), "packs/b") == b"new"
    assert read(encrypted(inner, EncryptionKeys(OLD, (NEW,))), "packs/b") == b"new"


@pytest.mark.parametrize("size_bytes", [0, 5, 131_072, 140_000])
def test_wrong_key_is_named_and_is_no_damage(size_bytes: int) -> None:
    inner = MemoryBackend()
    encrypted(inner, EncryptionKeys(OLD)).put(PACK, [bytes(size_bytes)])
    store = encrypted(inner, EncryptionKeys(STRANGE, (NEW,)))
    for start in {0, size_bytes // 2}:
        with pytest.raises(UsageError, match="wrong encryption key") as caught:
            read(store, PACK, start, size_bytes)
        assert not isinstance(caught.value, IntegrityError | UnavailableError | StoreDeniedError)
        for key in (OLD, STRANGE, NEW):
            assert key.id.hex() in str(caught.value)


def test_damage_is_damage_under_a_wrong_key_too() -> None:
    inner = MemoryBackend()
    encrypted(inner, EncryptionKeys(OLD)).put(PACK, [b"12345"])
    stored = bytearray(inner.stat(PACK).size_bytes)  # type: ignore[union-attr]
    inner.read_into(PACK, memoryview(stored))
    stored[9] ^= 1  # in the key's id
    inner.put(PACK, [stored])
    for keys in (EncryptionKeys(OLD), EncryptionKeys(STRANGE)):
        with pytest.raises(IntegrityError):
            read(encrypted(inner, keys), PACK)


def test_keys_of_one_purpose_say_nothing_of_another() -> None:
    key = key_named("x")
    derived = [key.id, key.digest_key, key._salt_key, key._header_key, key._frames_key]
    assert len({bytes(one[:8]) for one in derived}) == len(derived)


def test_key_shows_its_id_and_nothing_else() -> None:
    secret = hashlib.sha256(b"shown?").digest()
    key = EncryptionKey.of(secret)
    for text in (repr(key), str(key), f"{EncryptionKeys(key, (OLD,))}"):
        assert key.id.hex() in text
        for hidden in (secret, key.digest_key, key._salt_key, key._header_key, key._frames_key):
            assert hidden.hex() not in text
            assert repr(hidden)[2:-1] not in text
    with pytest.raises(TypeError):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        copy.copy(key)


@pytest.mark.parametrize(
    "secret", [b"", b"x" * 31, b"x" * 33, bytes(32), b"ab" * 16, bytes(range(11)) * 2 + bytes(10)]
)
def test_bytes_that_cannot_be_a_random_key_are_refused(secret: bytes) -> None:
    with pytest.raises(UsageError):
        EncryptionKey.of(secret)


def test_only_state_is_encrypted() -> None:
    for key in ("packs/x", "parts/1/x", "manifests/x"):
        assert is_sealed_key(key)
    for key in ("ckpt.json", "log/1", "folds/1", "packs", "other/packs/x"):
        assert not is_sealed_key(key)
    inner = MemoryBackend()
    store = encrypted(inner, EncryptionKeys(OLD))
    for key in ("ckpt.json", "log/1", "packs/x", "parts/1/x", "manifests/x"):
        store.put(key, [b"MARKER" * 10])
        assert (read(inner, key) == b"MARKER" * 10) == (not is_sealed_key(key))
        assert (b"MARKER" in read(inner, key)) == (not is_sealed_key(key))


def test_empty_store_fits_any_keys() -> None:
    for keys in (None, EncryptionKeys(OLD)):
        require_matching_keys(MemoryBackend(), keys)


def test_encrypted_store_is_not_opened_without_its_key() -> None:
    inner = MemoryBackend()
    encrypted(inner, EncryptionKeys(OLD)).put(MANIFEST, [b"{}"])
    require_matching_keys(inner, EncryptionKeys(OLD))
    require_matching_keys(inner, EncryptionKeys(NEW, (OLD,)))
    with pytest.raises(UsageError, match="is encrypted"):
        require_matching_keys(inner, None)
    with pytest.raises(UsageError, match="wrong encryption key"):
        require_matching_keys(inner, EncryptionKeys(NEW))


def test_plain_store_is_not_opened_with_a_key() -> None:
    inner = MemoryBackend()
    inner.put(MANIFEST, [b"{}"])
    require_matching_keys(inner, None)
    with pytest.raises(UsageError, match="not encrypted"):
        require_matching_keys(inner, EncryptionKeys(OLD))


def test_one_damaged_manifest_does_not_hide_what_the_store_is() -> None:
    inner = MemoryBackend()
    for n in range(3):
        encrypted(inner, EncryptionKeys(OLD)).put(f"{MANIFEST}{n}", [b"{}"])
    inner.put(f"{MANIFEST}0", [b"torn"])
    require_matching_keys(inner, EncryptionKeys(OLD))
    with pytest.raises(UsageError, match="is encrypted"):
        require_matching_keys(inner, None)


def test_missing_package_is_named() -> None:
    code = """
import sys
sys.modules["cryptography"] = None  # as if it were not installed
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.keys import load_keys
from ckpt.backends.memory import MemoryBackend
from ckpt.errors import UsageError
import os
os.environ["K"] = os.urandom(32).hex()
keys = load_keys("env:K")
try:
    encrypted(MemoryBackend(), keys)
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'torch-ckpt[crypt]'" in done.stdout


def test_neither_torch_nor_the_cipher_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, ckpt.backends.encrypted.open as e, ckpt.backends.encrypted.keys\n"
        "print('cryptography' in sys.modules, 'torch' in sys.modules)\n"
        "import ckpt.backends.encrypted.store\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]
