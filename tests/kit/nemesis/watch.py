"""What is noted while a job runs: changes in etcd, trainers' events, objects of the store's log."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckpt.cluster.membership import transactions as names
from ckpt.format.canonical import digest_hex
from kit.jobs import PROGRAMS, wait_for
from kit.nemesis.acts import now_ns
from kit.nemesis.etcd import Etcd
from kit.nemesis.history import Beat, Change, Entered, Sighting, Step, Trainer
from kit.nemesis.members import Members, read_members
from kit.networks import Network
from kit.template import Program

LOOK_S = 0.5


class EtcdWatch:
    """Follows what ``programs/watch_etcd.py`` writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self._changes: list[Change] = []

    def changes(self) -> list[Change]:
        """All so far."""
        lines, self._read_bytes = _new_lines(self._path, self._read_bytes)
        for line in lines:
            found = json.loads(line)
            value = None if found["value"] is None else base64.b64decode(found["value"])
            self._changes.append(
                Change(found["revision"], found["at"], found["key"], value, found["lease"])
            )
        return self._changes

    def members(self) -> Members:
        """The membership, as far as it is known."""
        return read_members(self.changes())

    def placed(self) -> Sequence[str]:
        """See Seen."""
        epochs = self.members().epochs
        return epochs[-1].machines if epochs else ()

    def leading(self) -> str:
        """See Seen."""
        changes = self.changes()
        leaders = [one.value for one in changes if one.key == names.LEADER]
        if not leaders or leaders[-1] is None:
            return ""
        return self.members().machines.get(leaders[-1].decode(), "")

    def living(self) -> int:
        """How many members there are."""
        found: dict[str, bool] = {}
        for one in self.changes():
            if one.key.startswith(names.NODES):
                found[one.key] = one.value is not None
        return sum(found.values())

    def wait_all(self, etcd: Etcd) -> None:
        """Until it has seen all that etcd holds; the job is over."""
        newest = etcd.revision()
        assert newest > 0, "etcd does not answer"
        # Nobody else writes to this etcd: its newest revision is the job's.
        wait_for(
            lambda: self.changes()[-1].revision >= newest, f"all changes up to revision {newest}"
        )


@contextlib.contextmanager
def etcd_watch(path: Path, lan: Network, host: int, etcd: Etcd, job: str) -> Iterator[EtcdWatch]:
    """A watch from a host of its own, and its end."""
    path.touch()
    with path.with_suffix(".log").open("ab") as log:
        process = Program(
            [
                *lan.command(host),
                sys.executable,
                str(PROGRAMS / "watch_etcd.py"),
                str(path),
                f"/ckpt/{job}/",
                ",".join(etcd.endpoints),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield EtcdWatch(path)
    finally:
        process.kill()
        process.wait()


class Trainers:
    """Follows what ``programs/exact.py`` writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_bytes: dict[Path, int] = {}
        self._who: dict[Path, Trainer] = {}
        self.entered: list[Entered] = []
        self.steps: list[Step] = []
        self.beats: list[Beat] = []
        self._completed = 0

    def poll(self) -> Trainers:
        """Take in what is new."""
        for path in sorted(self._folder.glob("*.jsonl")):
            lines, self._read_bytes[path] = _new_lines(path, self._read_bytes.get(path, 0))
            for line in lines:
                self._take(path, json.loads(line))
        return self

    @property
    def completed(self) -> int:
        """How many steps were taken, each counted once."""
        return self.poll()._completed

    def _take(self, path: Path, event: dict) -> None:  # type: ignore[type-arg]
        match event.pop("kind"):
            case "enter":
                machine, _, pid = path.stem.rpartition("-")
                who = Trainer(event["attempt"], event["rank"], event["world"], machine, int(pid))
                self._who[path] = who
                pair = tuple(event["pair"]) if event["pair"] is not None else None
                self.entered.append(
                    Entered(
                        who,
                        event["epoch"],
                        event["at"],
                        pair,
                        event["step"],
                        event["value"],
                        steps_of(event["trail"]),
                        event["clean"],
                    )
                )
            case "step":
                found = (
                    event["epoch"],
                    event["step"],
                    event["began"],
                    event["ended"],
                    event["value"],
                )
                self.steps.append(Step(self._who[path], *found))
                self._completed = max(self._completed, event["step"] + 1)
            case "beat":
                self.beats.append(Beat(self._who[path], event["at"], event["until"]))


class LogWatch:
    """Looks again and again at the log that lies in a folder: what comes, and whether anything
    changes or goes."""

    def __init__(self, folder: Path, store: int) -> None:
        self._folder = folder
        self._store = store
        self._known: dict[str, str] = {}
        self._stop = threading.Event()
        self.sightings: list[Sighting] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> dict[str, str]:
        """What is there now: each object's digest."""
        found: dict[str, str] = {}
        for path in sorted(self._folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # then it is told as gone
                found[path.name] = digest_hex(path.read_bytes())
        at_ns = now_ns()
        for key in sorted(self._known.keys() | found.keys()):
            if self._known.get(key) != found.get(key):
                self.sightings.append(Sighting(at_ns, self._store, key, found.get(key)))
        self._known = found
        return found

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.look()

    def __enter__(self) -> LogWatch:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()


def steps_of(runs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The epoch of each step, of epochs with a number of steps each."""
    return tuple(epoch for epoch, count in runs for _ in range(count))


def _new_lines(path: Path, read_bytes: int) -> tuple[list[str], int]:
    """Whole lines behind a place, and the place behind them."""
    with path.open("rb") as file:
        file.seek(read_bytes)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return whole.decode().splitlines(), read_bytes + len(whole)
