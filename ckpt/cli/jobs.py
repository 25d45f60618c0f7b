"""The keepers of this machine: which there are, and what each says. Starts none, removes nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ckpt.errors import CkptError, NotFoundError, UsageError
from ckpt.ipc.answers import Status
from ckpt.ipc.client import Calls
from ckpt.ipc.frames import Wire
from ckpt.ipc.messages import WIRE_VERSION, GetStatus, Hello
from ckpt.ipc.report import Report
from ckpt.ipc.runtime_dir import JobFolder, list_jobs

ANSWER_S_MAX = 5.0
"""How long a keeper may take for one answer; it answers from memory, so more means that it hangs."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a keeper lives or lived. ``pid`` is 0 and texts are empty where its note of itself is gone."""

    job: str
    store: str
    pid: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Alive:
    """A keeper that answered."""

    home: Home
    report: Report


@dataclass(frozen=True, slots=True)
class Silent:
    """A keeper that holds its lock and did not answer: it hangs, is stopped, starts just now, or speaks another version."""

    home: Home
    problem: str


@dataclass(frozen=True, slots=True)
class Dead:
    """A folder that nobody holds: its keeper was killed, and no other has come."""

    home: Home


Found = Alive | Silent | Dead


class Asker:
    """One connection to a keeper, as a tool. Raises UnavailableError where nobody listens or answers in time."""

    def __init__(self, folder: JobFolder) -> None:
        self._calls = Calls(Wire(folder.connect()))
        try:
            self._calls.call(Hello(version=WIRE_VERSION, role="tool", pid=os.getpid()), timeout_s=ANSWER_S_MAX)
        except BaseException:
            self._calls.close()
            raise

    def report(self) -> Report | None:
        """What the keeper says now; None where it has no ranks yet."""
        return self._calls.ask(GetStatus(), Status, timeout_s=ANSWER_S_MAX).report

    def close(self) -> None:
        """Hang up."""
        self._calls.close()


def ask_all() -> list[Found]:
    """What each keeper of this user says, in the order of their jobs' names."""
    found = (ask(folder) for folder in list_jobs())
    return sorted((one for one in found if one is not None), key=lambda one: (one.home.job, one.home.store))


def ask(folder: JobFolder) -> Found | None:
    """What the keeper of one folder says; None where there is none and never was."""
    home = home_of(folder)
    try:
        asker = Asker(folder)
        try:
            report = asker.report()
        finally:
            asker.close()
    except CkptError as error:
        if folder.locked():
            return Silent(home, str(error))
        # Without a note: it has gone meanwhile, or its first keeper is about to start.
        return Dead(home) if folder.note() is not None else None
    return Silent(home, "it has no ranks yet") if report is None else Alive(home, report)


def home_of(folder: JobFolder) -> Home:
    """What the keeper wrote down about itself."""
    note = folder.note()
    return Home(note.job, note.store, note.pid, folder.path) if note is not None else Home("", "", 0, folder.path)


def choose(homes: Sequence[Home], wanted: str | None) -> int:
    """Which home the user means: by the job's name, or by the folder's. Pure.

    Raises NotFoundError where there is none, UsageError where the name fits several.
    """
    fitting = [at for at, home in enumerate(homes) if wanted is None or wanted in (home.job, home.folder.name)]
    if not fitting:
        text = "no job runs here." if wanted is None else f"no such job runs here. job={wanted}"
        raise NotFoundError(f"{text} 'ckpt ps' lists what does")
    if len(fitting) > 1:
        names = ", ".join(f"{homes[at].folder.name} ({homes[at].job} in {homes[at].store})" for at in fitting)
        raise UsageError(f"several jobs fit; name one by its folder. folders={names}")
    return fitting[0]


def job_command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command ``--json`` and ``--debug``; it gets the keyword ``as_json``."""

    @click.option("--json", "as_json", is_flag=True, help="Print results and errors as JSON.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
    @click.pass_context
    @functools.wraps(function)
    def command(ctx: click.Context, /, *, as_json: bool, **others: object) -> int | None:
        return function(as_json=as_json or bool(ctx.find_root().params.get("as_json")), **others)

    return command
