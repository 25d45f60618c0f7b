"""What a keeper needs to know of its user's choices: about failures, and how long snapshots are kept."""

from __future__ import annotations

import msgspec


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor's user chose about failures; equal on all ranks.

    ``same_error_max``: the same exception at the same step that often in a row is a bug. ``stuck_max``: that many failures in a
    row without one step completed end the job. ``hang_s``: the least time without a step that counts as a hang (0: never).
    ``grace_s``: how long a preempted job may take. ``linger_s``: how long slots are kept for a program that was killed.
    """

    same_error_max: int = 2
    stuck_max: int = 5
    hang_s: float = 600.0
    grace_s: float = 25.0
    linger_s: float = 60.0


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """What the user of an epoch's writer chose to keep: the policy's text, and how long the bytes of dropped snapshots stay."""

    keep: str
    grace_s: float
