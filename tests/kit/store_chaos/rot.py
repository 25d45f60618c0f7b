"""Damage at rest: some objects of one store rot, or are lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol

import botocore.exceptions

from ckpt.format import keys

LOG_SPARED = 2
"""How many of the last records a store may not lose by themselves: nobody could tell that from
never having had them."""


class Objects(Protocol):
    """What lies in a store."""

    def keys(self) -> list[str]: ...
    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def remove(self, key: str) -> None: ...


def spoil_some(place: Objects, kind: str, seed: int) -> None:
    """Damage some of what lies there, or lose it."""
    dice = random.Random(seed)
    for key in _chosen(place.keys(), kind, dice):
        with suppress(FileNotFoundError, botocore.exceptions.ClientError):  # deleted meanwhile
            if kind == "lose":
                place.remove(key)
            else:
                place.write(key, _rotten(bytearray(place.read(key)), dice))


def _chosen(there: list[str], kind: str, dice: random.Random) -> Iterator[str]:
    prefixes = (keys.PACKS, keys.PARTS, keys.MANIFESTS, keys.LOG, keys.FOLDS, keys.JOB_KEY)
    wanted = dice.sample(prefixes, dice.randint(1, 3))
    few = dice.random() < 0.7
    for prefix in wanted:
        found = sorted(key for key in there if key.startswith(prefix))
        if kind == "lose" and prefix == keys.LOG:
            places = sorted({key[: len("log/") + 20] for key in found})[:-LOG_SPARED]
            found = [key for key in found if key[: len("log/") + 20] in places]
        yield from dice.sample(found, min(len(found), dice.randint(1, 3))) if few else found


def _rotten(data: bytearray, dice: random.Random) -> bytes:
    match dice.choice(("flip", "flip", "flips", "cut", "empty", "noise", "longer")):
        case "flip" if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "flips" if data:
            for _ in range(1 + len(data) // 5000):
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "cut" if data:
            del data[dice.randrange(len(data)) :]
        case "empty":
            data.clear()
        case "noise":
            data = bytearray(dice.randbytes(len(data)))
        case _:
            data += dice.randbytes(100)
    return bytes(data)
