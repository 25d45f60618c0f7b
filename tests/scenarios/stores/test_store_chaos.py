"""Servers die, hang, lie, forget and come back while a job saves, restores, scrubs and sweeps: one
seed is one run.

``CKPT_SEED=7 pytest tests/scenarios/stores/test_store_chaos.py`` does one run again,
``CKPT_SEED=7-20`` some. Which request meets a fault depends a little on the order of threads, so a
rare failure may take some repetitions.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from kit.servers.fixtures import Servers
from kit.servers.s3 import Gateway, Moto
from kit.store_chaos.judge import judge
from kit.store_chaos.places import FolderPlace, Place, S3Place
from kit.store_chaos.run import Run
from kit.store_chaos.schedule import FOLDER, FORGETFUL, S3, draw

from ckpt.backends import open as opening
from ckpt.backends.encrypted.keys import write_new_key
from ckpt.backends.file.store import FileBackend
from ckpt.backends.objects.s3 import CLIENT_VARIABLE
from ckpt.log.sequencers import STATE_VARIABLE
from ckpt.testing.crashes import NumberedOps

SOAK = os.environ.get("CKPT_SOAK") == "1"
NAMED = os.environ.get("CKPT_SEED", "")
FIRST, _, LAST = NAMED.partition("-")
SEEDS = range(int(FIRST), int(LAST or FIRST) + 1) if NAMED else range(300) if SOAK else (0, 4)

pytestmark = pytest.mark.slow


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("seed", SEEDS)
def test_no_committed_snapshot_is_lost_or_wrong_whatever_the_stores_do(
    seed: int,
    _s3_servers: Servers,
    ending: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = draw(seed)
    print(schedule)
    monkeypatch.setenv(CLIENT_VARIABLE, schedule.client)
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    key = None
    if schedule.encrypted:
        key = f"file:{tmp_path / 'job.key'}"
        write_new_key(key.removeprefix("file:"))
    places: list[Place] = []
    for kind in schedule.world:
        number = schedule.world[: len(places)].count(kind)
        if kind == FOLDER:
            places.append(folder := FolderPlace(tmp_path / "folder"))
            failing = partial(FileBackend, ops=NumberedOps(folder.around))
            monkeypatch.setattr(opening, "FileBackend", failing)
        else:
            assert kind in (S3, FORGETFUL)
            places.append(S3Place(_s3_servers.get(Gateway if kind == S3 else Moto, number)))
        ending.callback(places[-1].close)
    run = Run(schedule, places, tmp_path, key)
    ending.callback(run.leave)
    run.play()
    judge(run, random.Random(seed))
