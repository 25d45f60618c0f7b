"""A killed group whose processes do not all end; what a trainer reports."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ckpt.elastic.processes.child import KilledGroup, LivingMember, TrainerChild, living_members
from ckpt.elastic.processes.trainer import FAILING, FIRST_STEP, TrainerProcess
from ckpt.ipc.messages import Failing

STUCK = LivingMember(71, "python", "D")


class Group:
    """A killed group under a clock that the test moves."""

    def __init__(self, *left: LivingMember) -> None:
        self.now_s = 100.0
        self.left = list(left)
        self.looks = 0
        self.rest = KilledGroup(70, now=lambda: self.now_s, members=self._look)

    def _look(self, group: int) -> list[LivingMember]:
        assert group == 70
        self.looks += 1
        return self.left

    def over_within(self, seconds: float) -> tuple[float | None, list[str]]:
        """When it was over, if it was, with the lines of the wait; asked every 10 ms, as the
        supervisor does."""
        lines = []
        for n in range(1, round(seconds * 100) + 1):
            self.now_s = 100.0 + n / 100
            over = self.rest.over()
            if line := self.rest.line():
                lines.append(line)
            if over:
                return n / 100, lines
        return None, lines


def test_group_of_zombies_that_nobody_reaps_is_over_soon() -> None:
    group = Group()
    assert group.over_within(10) == (0.1, [])
    assert group.rest.over()


def test_process_that_sigkill_does_not_end_is_named_and_waited_for_a_minute_at_most() -> None:
    group = Group(STUCK)
    over_s, (told, given_up) = group.over_within(600)
    assert over_s is not None
    assert 60 <= over_s <= 61
    assert "pid=71 (python, D)" in told
    assert "waited for, 60 s at most" in told
    assert "pid=71 (python, D)" in given_up
    assert "not waited for any longer" in given_up
    assert group.looks < 80, "each reads the state of every process of the machine"


def test_process_that_ends_late_ends_the_wait() -> None:
    group = Group(STUCK)
    assert group.over_within(20)[0] is None
    group.left = []
    assert group.rest.over() or group.over_within(22)[0] is not None


def _process(proc: Path, pid: int, *states: str, group: int, name: str = "python") -> None:
    for n, state in enumerate(states):
        task = proc / str(pid) / "task" / str(pid + n)
        task.mkdir(parents=True)
        (task / "stat").write_text(f"{pid + n} ({name}) {state} 1 {group} 1 0")
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) {states[0]} 1 {group} 1 0")


def test_only_what_lives_in_the_group_is_left_of_it(tmp_path: Path) -> None:
    _process(tmp_path, 70, "Z", group=70)
    _process(tmp_path, 71, "D", group=70, name="a (b) c")
    _process(tmp_path, 80, "Z", "Z", "D", group=70)  # its first thread is dead, another one is not
    _process(tmp_path, 90, "S", group=9)
    (tmp_path / "95").mkdir()  # gone since the folder was listed
    assert sorted(living_members(70, proc=tmp_path), key=lambda each: each.pid) == [
        LivingMember(71, "a (b) c", "D"),
        LivingMember(80, "python", "D"),
    ]


def test_without_proc_the_kernel_says_whether_a_group_lives(tmp_path: Path) -> None:
    nowhere = tmp_path / "proc"
    (left,) = living_members(os.getpgrp(), proc=nowhere)
    assert left.pid == os.getpgrp()
    assert living_members(2**30, proc=nowhere) == [], "no kernel has so many processes"


def test_exception_that_ends_a_trainer_is_read_between_its_other_reports_and_in_pieces() -> None:
    out, into = os.pipe()
    os.set_blocking(out, False)
    child = TrainerChild(pid=os.getpid(), attempt=1, report_fd=out)
    trainer = TrainerProcess(attempt=1, port=1, how="fork", pid=1, report_fd=into)
    failing = Failing(kind="STDError", text="REST\nDEF", fingerprint="f", step=3, final=True)
    trainer.entered()
    trainer.first_step_done()
    trainer.failing(failing)
    trainer.first_step_done()
    assert (child.read_reports(), child.failing) == (b"SS", failing)
    trainer.entered()
    line = FAILING + msgspec.json.encode(failing) + b"\n"
    for piece in (line[:1], line[1:9], line[9:-1]):
        os.write(into, piece)
        assert (child.read_reports(), child.failing) == (b"", None)
    os.write(into, line[-1:] + FIRST_STEP)
    os.close(into)
    assert (child.read_reports(), child.failing) == (FIRST_STEP, failing)
    assert child.read_reports() == b""
