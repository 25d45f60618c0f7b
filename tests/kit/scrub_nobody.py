"""The command line run by a user who owns nothing; a child process can import it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ckpt.cli import main
from ckpt.cli.commands import doctor

NOBODY = 65534


@dataclass(frozen=True)
class AsNobody:
    """``arguments`` on the command line, what it prints in the file ``out``, as another user where
    root runs the tests."""

    arguments: tuple[str, ...]
    out: str

    def __call__(self) -> None:
        """Run it, and exit as it does."""
        assert doctor.command.name == "doctor"  # imported while files may still be read
        with Path(self.out).open("w") as file:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            sys.stdout = file
            code = main.run(self.arguments)
        sys.exit(code)
