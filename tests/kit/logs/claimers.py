"""Processes that claim places in a file, for the tests beside them. Importable by a spawned process."""

from __future__ import annotations

import itertools
from multiprocessing.connection import Connection
from pathlib import Path

from ckpt.log.sequencers import Appended, KeyTaken, SqliteSequencer

LOG_ID = "1" * 32


def claim_many(path: Path, me: int, count: int, answer: Connection) -> None:
    """Win ``count`` places, each with bytes of this process alone, and say which."""
    file = SqliteSequencer(path, LOG_ID)
    file.make(0)
    answer.send("ready")
    answer.recv()
    won = {}
    seq = 0
    while len(won) < count:
        data = f"process {me} place {seq}".encode()
        match file.append(seq, data):
            case Appended():
                won[seq] = data
                seq += 1
            case KeyTaken():
                seq += 1
            case unknown:
                raise AssertionError(unknown)
    answer.send(won)


def claim_for_ever(path: Path, me: int, answer: Connection) -> None:
    """Win places until killed; each is said once it is won."""
    file = SqliteSequencer(path, LOG_ID)
    seq = 0
    for turn in itertools.count():
        data = f"process {me} turn {turn}".encode()
        while not isinstance(made := file.append(seq, data), Appended):
            assert isinstance(made, KeyTaken), made
            seq += 1
        answer.send((seq, data))
