"""What client-side encryption costs: packs put and read through it, beside the bare store and
beside bare AES-256-GCM.

    python benchmarks/encryption.py
    python benchmarks/encryption.py --folder /some/disk      # a folder instead of memory

One thread, 64 MiB packs in page-aligned stretches, read back in chunks of 4 MiB at offsets that are
multiples of 4,096. Contestants alternate; medians of several rounds. Prints MB/s, the ratios, the
machine and the versions. The first table is what the frame size was chosen by.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ckpt.backends.base import Backend
from ckpt.backends.encrypted.cipher import CipherMemory, digest_of, sealed
from ckpt.backends.encrypted.layout import TAG_BYTES
from ckpt.backends.encrypted.open import encrypted
from ckpt.backends.encrypted.secret import EncryptionKey, EncryptionKeys
from ckpt.backends.file.store import FileBackend
from ckpt.backends.memory import MemoryBackend
from ckpt.testing.contract import buffer

PACK_BYTES = 64 << 20
CHUNK_BYTES = 4 << 20
FRAMES = (4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20)
ROUNDS = 9
NAME = "packs/bench-0123456789abcdef-00000000.pack"


def rates(acts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """MB/s of each act over one pack, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(ROUNDS + 1):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: PACK_BYTES / statistics.median(taken) / 1e6 for name, taken in times.items()}


def show(title: str, found: dict[str, float], *, beside: str) -> None:
    print(f"\n{title}")
    for name, rate in found.items():
        print(f"  {name:42} {rate:8.0f} MB/s  x{rate / found[beside]:.2f}")


def by_frame(cipher: AESGCM, pack: memoryview, size_bytes: int) -> Callable[[], None]:
    out = memoryview(bytearray(size_bytes + TAG_BYTES))

    def act() -> None:
        for at in range(0, PACK_BYTES, size_bytes):
            cipher.encrypt_into(bytes(12), pack[at : at + size_bytes], b"x" * 96, out)

    return act


def back_by_frame(cipher: AESGCM, size_bytes: int) -> Callable[[], None]:
    sealed, out = (
        cipher.encrypt(bytes(12), bytes(size_bytes), b"x" * 96),
        memoryview(bytearray(size_bytes)),
    )

    def act() -> None:
        for _ in range(0, PACK_BYTES, size_bytes):
            cipher.decrypt_into(bytes(12), sealed, b"x" * 96, out)

    return act


def reading(store: Backend, *, shift: int) -> Callable[[], None]:
    out = buffer(CHUNK_BYTES, aligned=True)
    places = [at + shift for at in range(0, PACK_BYTES - CHUNK_BYTES + 1, CHUNK_BYTES)]
    places[-1] = PACK_BYTES - CHUNK_BYTES

    def act() -> None:
        for place in places:
            store.read_into(NAME, out, offset_bytes=place)

    return act


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    versions = (
        f"Python {platform.python_version()}, cryptography {metadata.version('cryptography')}"
    )
    return f"{model}, {os.cpu_count()} CPUs, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--folder",
        type=Path,
        help="measure a store in a new folder below this one instead of memory",
    )
    folder = parser.parse_args().folder
    print(machine())
    secret = random.Random(1).randbytes(32)
    key, cipher = EncryptionKey.of(secret), AESGCM(secret)
    pack = buffer(PACK_BYTES, aligned=True, seed=1)
    into = memoryview(bytearray(PACK_BYTES + TAG_BYTES))
    memory = CipherMemory()

    def seal_alone() -> None:
        with sealed(NAME, stretches, key, memory):
            pass

    stretches = [pack[: 5 << 20], pack[5 << 20 : (9 << 20) + 4096], pack[(9 << 20) + 4096 :]]
    one = "one buffer"

    found = {f"frames of {size >> 10} KiB": by_frame(cipher, pack, size) for size in FRAMES}
    show(
        "AES-256-GCM, encrypting",
        rates({one: lambda: cipher.encrypt_into(bytes(12), pack, b"", into), **found}),
        beside=one,
    )
    found = {f"frames of {size >> 10} KiB": back_by_frame(cipher, size) for size in FRAMES}
    show(
        "AES-256-GCM, decrypting",
        rates({one: back_by_frame(cipher, PACK_BYTES), **found}),
        beside=one,
    )

    with tempfile.TemporaryDirectory(dir=folder) as root:
        bare: Backend = MemoryBackend() if folder is None else FileBackend(Path(root) / "bare")
        inner: Backend = (
            MemoryBackend() if folder is None else FileBackend(Path(root) / "encrypted")
        )
        store = encrypted(inner, EncryptionKeys(key))
        bare.put(NAME, stretches)
        store.put(NAME, stretches)
        kind = "memory" if folder is None else "folder"
        puts = {
            "AES-256-GCM, one buffer, no store": lambda: cipher.encrypt_into(
                bytes(12), pack, b"", into
            ),
            "digest of the plaintext alone": lambda: digest_of(stretches, key),
            "sealing alone (digest, frames)": seal_alone,
            "bare put": lambda: bare.put(NAME, stretches),
            "encrypted put": lambda: store.put(NAME, stretches),
        }
        show(f"Putting a pack of 64 MiB into a {kind}", rates(puts), beside="bare put")
        reads = {
            "AES-256-GCM, one buffer, no store": back_by_frame(cipher, PACK_BYTES),
            "bare reads": reading(bare, shift=0),
            "encrypted reads, at frames": reading(store, shift=0),
            "encrypted reads, 4,096 bytes beside": reading(store, shift=4096),
        }
        show(f"Reading it in chunks of 4 MiB from a {kind}", rates(reads), beside="bare reads")
        store.close()
        bare.close()


if __name__ == "__main__":
    main()
