"""Strikes at a running job, planned from one seed: who is hit, how, and when."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.jobs import Fleet, Job, wait_for

RECOVER_S_MAX = 90.0
"""A job that is not further than before after this time counts as hung."""

NAP_S = 0.7
"""How long a process is stopped that is let go on again: less than counts as a hang."""

TRAINER = ("kill", "segv", "exit", "oom", "stop")
"""What ends a trainer: at most one step is done again for each. ``oom`` kills whom the kernel would
choose."""

HARMLESS = ("nap-trainer", "nap-keeper")
"""Nobody dies of these, and nothing is done again."""

OTHERS = ("supervisor", "keeper")
"""A torchrun that restarts everything, and a keeper that another must follow; these may cost more
than one step."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One blow at ``rank``. ``steps``: new steps to wait for first; None: strike while the job
    still recovers from the last.

    ``delay_s``: waited before, so that a blow falls anywhere in a step.
    """

    kind: str
    rank: int
    steps: int | None
    delay_s: float


def plan(
    kinds: Sequence[str], chance: random.Random, *, steps_max: int, doubles: float
) -> list[Strike]:
    """A strike of each kind in a random order. A share of ``doubles`` come on the heels of another,
    never three in a row.

    A hang is always left to be found out: nothing comes on its heels.
    """
    order = list(kinds)
    chance.shuffle(order)
    strikes: list[Strike] = []
    for kind in order:
        again = bool(strikes) and strikes[-1].steps is not None and chance.random() < doubles
        again = again and kind in TRAINER and strikes[-1].kind not in (*HARMLESS, "stop")
        steps = None if again else chance.randint(2, steps_max)
        strikes.append(
            Strike(kind, chance.randrange(2), steps, chance.uniform(0.0, 0.3 if again else 0.02))
        )
    return strikes


@dataclass
class Campaign:
    """Carries a plan out and keeps count of what it cost."""

    fleet: Fleet
    job: Job
    strikes: Sequence[Strike]

    def run(self) -> list[str]:
        """All strikes, each after the job got over the last ones; what went wrong, in words."""
        wrong: list[str] = []
        groups = grouped(self.strikes)
        for number, group in enumerate(groups):
            self.job.wait_steps(self.job.completed + (group[0].steps or 1))
            before = self.redone()
            begin_s, entered = time.monotonic(), 0
            for strike in group:
                time.sleep(strike.delay_s)
                entered = self.job.attempts(strike.rank)
                self.strike(strike)
            self.wait_beyond(self.job.completed + 2, group[-1], entered)
            cost = self.redone() - before
            names = "+".join(f"{strike.kind}@{strike.rank}" for strike in group)
            print(
                f"{number + 1}/{len(groups)} {names} redone={cost} "
                f"seconds={time.monotonic() - begin_s:.2f}"
            )
            allowed = allowance(group)
            if allowed is not None and cost > allowed:
                wrong.append(f"{names}: {cost} steps were done again, {allowed} are allowed")
            if group[-1].kind in HARMLESS and self.job.attempts(group[-1].rank) != entered:
                wrong.append(f"{names}: training was started again for nothing")
        return wrong

    def redone(self) -> int:
        """Steps that were done again so far, on the rank that did most."""
        return max(losses.poll().redone for losses in self.job.losses)

    def strike(self, strike: Strike) -> None:
        """One blow. Waits for a living target where there is none at the moment."""
        hit = [False]

        def once() -> bool:
            hit[0] = self._blow(strike)
            return hit[0] or self.job.process.poll() is not None

        wait_for(once, f"a living target for {strike}", wait_s=RECOVER_S_MAX, say=self.say)
        if not hit[0]:
            pytest.fail(
                f"the job ended before {strike}. status={self.job.process.returncode}\n{self.say()}"
            )

    def wait_beyond(self, completed: int, strike: Strike, entered: int) -> None:
        """Wait until the job is further than it was, and was started again where somebody died."""

        def further() -> bool:
            again = strike.kind in HARMLESS or self.job.attempts(strike.rank) > entered
            if again and self.job.completed >= completed:
                return True
            assert self.job.process.poll() is None, f"ended early\n{self.say()}"
            return False

        wait_for(further, f"step {completed} after {strike}", wait_s=RECOVER_S_MAX, say=self.say)

    def say(self) -> str:
        return f"{self.job.output()}\n{self.fleet.describe()}"

    def _blow(self, strike: Strike) -> bool:
        trainer, send = self.job.trainer(strike.rank), self.fleet.send
        match strike.kind:
            case "kill":
                return send(trainer, signal.SIGKILL)
            case "segv":
                return send(trainer, signal.SIGSEGV)
            case "exit":
                return send(trainer, signal.SIGUSR1)
            case "stop":
                return send(trainer, signal.SIGSTOP)
            case "oom":
                victim = self._likeliest()
                return victim in self._trainers() and send(victim, signal.SIGKILL)
            case "supervisor":
                # Only where it has a trainer: while it is being replaced, the file still names the
                # one before.
                return self.fleet.is_member(trainer) and send(
                    self.job.supervisor(strike.rank), signal.SIGKILL
                )
            case "keeper":
                return send(self.fleet.keeper(self.job.folder / "store"), signal.SIGKILL)
            case "nap-trainer":
                return self._nap(trainer)
            case "nap-keeper":
                return self._nap(self.fleet.keeper(self.job.folder / "store"))
        raise AssertionError(strike.kind)

    def _nap(self, pid: int) -> bool:
        if not self.fleet.send(pid, signal.SIGSTOP):
            return False
        time.sleep(NAP_S)
        return self.fleet.send(pid, signal.SIGCONT)

    def _trainers(self) -> list[int]:
        return [
            pid for pid in (self.job.trainer(0), self.job.trainer(1)) if self.fleet.is_member(pid)
        ]

    def _likeliest(self) -> int:
        """The process of this job that the kernel would kill first where memory runs out."""
        scores: dict[int, int] = {}
        for pid in self.fleet.members():
            try:
                scores[pid] = int(Path(f"/proc/{pid}/oom_score").read_text())
            except OSError:  # it ended meanwhile
                continue
        return max(scores, key=lambda pid: scores[pid], default=0)


def grouped(strikes: Sequence[Strike]) -> list[list[Strike]]:
    """Strikes that come on the heels of others, together with those."""
    groups: list[list[Strike]] = []
    for strike in strikes:
        if strike.steps is None and groups:
            groups[-1].append(strike)
        else:
            groups.append([strike])
    return groups


def allowance(group: Sequence[Strike]) -> int | None:
    """How many steps a rank may have to do again; None where that is not promised."""
    if any(strike.kind in OTHERS for strike in group):
        return None
    return sum(strike.kind in TRAINER for strike in group)
