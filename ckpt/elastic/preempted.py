"""How a preempted program ends: at a step boundary, durable, with an exit status of its own."""

from __future__ import annotations

import signal

PREEMPTED_STATUS = 128 + signal.SIGTERM
"""143: what a shell reports for a program that SIGTERM ended."""


class Preempted(SystemExit):
    """Raised out of ``run.steps`` or ``run.completed`` when the node is about to be taken away and the state is safe.

    A ``SystemExit``: ``finally`` blocks run, the program exits with 143, nothing after the loop takes it for a finished one.
    """

    def __init__(self, step: int) -> None:
        super().__init__(PREEMPTED_STATUS)
        self.step = step
        """How many steps were complete."""
