"""What a user chooses about failures."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.elastic.schedule import parse_duration
from ckpt.errors import UsageError
from ckpt.ipc.policy import Policy

NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When a job whose trainer failed is started again, and when a trainer counts as hanging.

    ``same_error_max``: the same exception of the program at the same step, that often in a row, is a bug: the job ends with it
    (1: never start again after an exception). ``stuck_max``: that many failures in a row without a new step end the job.
    ``hang``: the least time without a completed step that counts as a hang, or ``"never"``; where the job's own steps are long,
    ten times the longest recent one. The first step, pauses and debuggers are exempt. ``grace``: how long a preempted job may
    take to stop. ``linger``: how long slots are kept for a program that was killed as a whole.
    Raises UsageError where a value cannot work.
    """

    same_error_max: int = 2
    stuck_max: int = 5
    hang: str = "10m"
    grace: str = "25s"
    linger: str = "60s"

    def __post_init__(self) -> None:
        for name in ("same_error_max", "stuck_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} counts from 1 on. {name}={value!r}")
        self.message()

    def message(self) -> Policy:
        """As the keeper takes it."""
        return Policy(
            same_error_max=self.same_error_max, stuck_max=self.stuck_max,
            hang_s=0.0 if self.hang == NEVER else parse_duration(self.hang, name="hang"),
            grace_s=parse_duration(self.grace, name="grace"), linger_s=parse_duration(self.linger, name="linger"),
        )  # fmt: skip
