"""One job of ``recovery.py``: starts it, reads what its ranks tell, kills one of them and times
what follows."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from measure import family

WAIT_S_MAX = 120.0
"""A job that takes longer from one point to the next counts as hung."""

POLL_S = 0.002

PHASES = ("noticed", "started", "imported", "built", "grouped", "restored", "first")
"""What the time from the kill to the first step goes to, in this order; each phase ends at the mark
in ``ENDS``."""

ENDS: Mapping[str, tuple[str, ...]] = {
    "started": ("started",),
    "imported": ("entered",),
    "built": ("built", "promoted"),
    "grouped": ("grouped",),
    "restored": ("restored",),
}


class JobHungError(Exception):
    """The job did not get to where it should within ``WAIT_S_MAX``."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill. ``phases_s`` add up to ``first_s``, the first step of the new trainers; ``new_s``:
    the first step that nobody had completed before. ``lost``: completed steps that had to be done
    again."""

    phases_s: Mapping[str, float]
    first_s: float
    new_s: float
    lost: int


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of a rank's file."""

    name: str
    at_s: float
    pid: int
    completed: int = 0
    step: int = 0


class Job:
    """A context manager: nothing of the job lives on after it."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        ranks: int,
        log: Path,
    ) -> None:
        self.folder, self.ranks = folder, ranks
        self.marks: list[list[Mark]] = [[] for _ in range(ranks)]
        self._read_bytes = [0] * ranks
        variable, value = "CKPT_BENCHMARK", uuid.uuid4().hex
        self._family = f"{variable}={value}"
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment, variable: value},
                stdout=file,
                stderr=file,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while members := family(self._family):
            for pid in members:
                kill_quietly(pid)
            self.process.poll()
            time.sleep(POLL_S)
        self.process.wait()

    def wait_steps(self, count: int, *, prepared: bool) -> None:
        """Wait until ``count`` more steps are complete and, with ``prepared``, a trainer of each
        rank stands by."""
        goal = self._completed() + count
        self._wait(
            f"step {goal}", lambda: self._completed() >= goal and (not prepared or self._stand_by())
        )

    def wait_offset(self, offset: int, every: int) -> None:
        """Wait until the number of completed steps is ``offset`` beyond a multiple of ``every``."""
        before = self._completed()
        self._wait(
            f"offset {offset}",
            lambda: before < self._completed() and self._completed() % every == offset,
        )

    @property
    def step_s(self) -> float:
        """How long the last step took."""
        steps = [mark.at_s for mark in self.marks[0] if mark.name == "step"]
        return steps[-1] - steps[-2]

    def kill(self, rank: int, *, after_s: float) -> Recovery:
        """Kill a rank's trainer, a moment from now, and watch the job come back."""
        time.sleep(after_s)
        old = [self._live(number) for number in range(self.ranks)]
        others = [os.pidfd_open(pid) for number, pid in enumerate(old) if number != rank]
        os.kill(old[rank], signal.SIGKILL)
        kill_s = time.monotonic()
        try:
            self._wait("end of the other ranks", lambda: all(ended(handle) for handle in others))
            noticed_s = time.monotonic()
        finally:
            for handle in others:
                os.close(handle)
        self._poll()
        reached = max(mark.completed for marks in self.marks for mark in marks if mark.pid in old)
        self._wait(
            f"step {reached + 1}",
            lambda: all(self._first(number, old, reached) for number in range(self.ranks)),
        )
        return self._recovery(kill_s, noticed_s, old, reached)

    def stop(self) -> None:
        """Let the job end well, and its daemons too."""
        (self.folder / "stop").touch()
        self._wait("end", lambda: self.process.poll() is not None, alive=False)
        if self.process.returncode != 0:
            raise SystemExit(
                f"the job failed at its end. status={self.process.returncode}; see "
                "bench-out/recovery.log"
            )
        self._wait("end of its daemons", lambda: not family(self._family), alive=False)

    def _recovery(
        self, kill_s: float, noticed_s: float, old: Sequence[int], reached: int
    ) -> Recovery:
        firsts = [self._first(number, old, 0) for number in range(self.ranks)]
        news = [self._first(number, old, reached) for number in range(self.ranks)]
        assert all(firsts)
        pids = {mark.pid for mark in news if mark is not None}
        theirs = [mark for marks in self.marks for mark in marks if mark.pid in pids]
        restored = min(mark.step for mark in theirs if mark.name == "restored")
        first_s = max(mark.at_s for mark in firsts if mark is not None)
        phases_s, before_s = {"noticed": noticed_s - kill_s}, noticed_s
        for phase, names in ENDS.items():
            # A trainer that was prepared did these before the kill: they cost nothing.
            end_s = max(before_s, *(mark.at_s for mark in theirs if mark.name in names))
            phases_s[phase], before_s = end_s - before_s, end_s
        phases_s["first"] = first_s - before_s
        new_s = max(mark.at_s for mark in news if mark is not None)
        return Recovery(phases_s, first_s - kill_s, new_s - kill_s, reached - restored)

    def _first(self, rank: int, old: Sequence[int], beyond: int) -> Mark | None:
        """The first step beyond ``beyond`` that a trainer of ``rank`` completed that isn't one of
        ``old``."""
        latest = self._live(rank)
        for mark in self.marks[rank]:
            if (
                mark.name == "step"
                and mark.pid == latest
                and mark.pid not in old
                and mark.completed > beyond
            ):
                return mark
        return None

    def _live(self, rank: int) -> int:
        """The process that took this rank's last step."""
        return next((mark.pid for mark in reversed(self.marks[rank]) if mark.name == "step"), 0)

    def _completed(self) -> int:
        """Steps that all ranks completed."""
        last = (
            next((mark for mark in reversed(marks) if mark.name == "step"), None)
            for marks in self.marks
        )
        return min(0 if mark is None else mark.completed for mark in last)

    def _stand_by(self) -> bool:
        """Whether each rank has a process that built its model and has not begun to train."""
        for rank, marks in enumerate(self.marks):
            last = next((mark for mark in reversed(marks) if mark.name == "built"), None)
            if last is None or last.pid == self._live(rank):
                return False
            if any(mark.name == "promoted" and mark.pid == last.pid for mark in marks):
                return False
        return True

    def _poll(self) -> None:
        for rank in range(self.ranks):
            path = self.folder / f"marks-{rank}.jsonl"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._read_bytes[rank])
                text = file.read()
            text = text[: text.rfind(b"\n") + 1]
            self._read_bytes[rank] += len(text)
            self.marks[rank] += [Mark(**json.loads(line)) for line in text.splitlines()]

    def _wait(self, what: str, until: Callable[[], bool], *, alive: bool = True) -> None:
        deadline_s = time.monotonic() + WAIT_S_MAX
        while not until():
            if time.monotonic() > deadline_s:
                raise JobHungError(f"hung before {what}")
            if alive and self.process.poll() is not None:
                raise SystemExit(
                    f"the job ended before {what}. status={self.process.returncode}; see its log"
                )
            time.sleep(POLL_S)
            self._poll()


def ended(handle: int) -> bool:
    """Whether the process behind a pidfd has ended."""
    return bool(select.select([handle], [], [], 0)[0])


def kill_quietly(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
