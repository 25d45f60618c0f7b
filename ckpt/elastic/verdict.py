"""Why no restart of a program may follow: what its processes tell the agent that launched them.

torch's agent sees exit statuses only, and starts workers again whatever they were. So ours names a
file to its workers, and looks there before it lets them start again. Shared by the processes below
an agent and by the agent's rendezvous.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ckpt.errors import FencedError
from ckpt.events import log_warning
from ckpt.format.canonical import prepare_decoders

VERDICT_VARIABLE = "CKPT_VERDICT"
"""Names the file to workers."""
VERDICT_BYTES_MAX = 64 << 10


class Verdict(msgspec.Struct, frozen=True):
    """The same launch again would end the same. ``status``: what the launcher exits with."""

    status: int
    text: str


prepare_decoders(Verdict)


def give_verdict(verdict: Verdict) -> None:
    """Tell the agent, if there is one that asks; the last verdict counts."""
    name = os.environ.get(VERDICT_VARIABLE)
    if not name:
        return
    draft = Path(f"{name}.{os.getpid()}")
    try:
        draft.write_bytes(msgspec.json.encode(verdict))
        draft.replace(name)
    except FileNotFoundError:
        return  # the agent removed its folder: it has ended, and restarts nothing
    except OSError as error:
        log_warning(
            "the agent cannot be told that a restart is futile, and may start the program again. "
            f"file={name} cause={error}; stop it by hand. reason={verdict.text}"
        )


def fenced_verdict(error: BaseException) -> Verdict | None:
    """The verdict of a program that ends with ``error``; None: a restart may help."""
    if not isinstance(error, FencedError):
        return None
    return Verdict(FencedError.exit_code, str(error))


@dataclass(frozen=True, slots=True)
class VerdictFile:
    """The agent's side: the file that it names to its workers."""

    path: Path

    def read(self) -> Verdict | None:
        """The verdict; None if there is none."""
        try:
            with self.path.open("rb") as file:
                data = file.read(VERDICT_BYTES_MAX)
            return msgspec.json.decode(data, type=Verdict)
        except (OSError, msgspec.MsgspecError):
            return None

    def remove(self) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
