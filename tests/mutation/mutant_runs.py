"""Run the tests that concern a module against mutants of it.

A process for each module collects its tests once and then forks for each mutant: the child puts the
mutated function's code into the live function, and runs the tests until one fails. Mutants of what
only an import runs get a process of their own, in which the import is answered with the mutant.
Either way the child tells whether the mutant was in place; nothing is written.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

import pytest
from mutant_inject import Imported, entered, entry_of, patch
from mutants import Mutant, mutants_of

Outcome = Literal["killed", "hung", "survived", "broken"]
"""``hung`` is a way of being killed; ``broken`` says that the run itself failed and nothing is
known."""

WALL_S = 120.0
"""A child that takes longer waits for something: killed. Nothing else looks at the clock, so a busy
machine kills nobody."""
CPU_MIN_S = 4.0
"""A test may always burn this much processor time."""
MEMORY_BYTES = 8 << 30
PRELOADED = (
    "msgspec",
    "xxhash",
    "zstandard",
    "numpy",
    "fsspec",
    "hypothesis",
    "hypothesis.strategies",
)


class Hang(BaseException):
    """A test burnt far more processor time than without a mutant. No test catches it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A module that is mutated, and the tests that ought to notice: paths from the tree's root.

    ``only``: the functions and classes that are mutated, all of them where it is empty.
    """

    path: str
    tests: tuple[str, ...]
    only: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.path.removesuffix(".py").replace("/", ".")

    def mutants(self, source: str) -> list[Mutant]:
        """The mutants of the module's source that count.

        Raises ValueError if ``only`` names what the module does not define.
        """
        found = mutants_of(source)
        if missing := [name for name in self.only if name not in _defined(source)]:
            raise ValueError(f"no such function or class. path={self.path} names={missing}")
        return [
            one for one in found if not self.only or one.function.partition(".")[0] in self.only
        ]


def _defined(source: str) -> frozenset[str]:
    """The functions and classes at the top of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return frozenset(node.name for node in ast.parse(source).body if isinstance(node, kinds))


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one run. ``by``: the first test that failed, or what else ended it."""

    outcome: Outcome
    by: str


class BaselineError(Exception):
    """The tests fail without any mutant; with what pytest wrote."""


def run_all(
    root: Path, target: Target, mutants: Sequence[Mutant], *, cpu_min_s: float = CPU_MIN_S
) -> Iterator[tuple[Mutant, Ran]]:
    """Run the tests on each mutant, and first on none. Raises BaselineError where they fail then
    already.

    A test is stopped that burns ten times the processor time that it burns without a mutant, and
    ``cpu_min_s``.
    """
    live = [one for one in mutants if not one.on_import]
    with tempfile.TemporaryFile() as log:
        with _session(root, _Loop(target, live, cpu_min_s), None, log) as told:
            first = told()
            if first is None or first.outcome != "survived":
                log.seek(0)
                raise BaselineError(
                    f"by={first and first.by}\n{log.read().decode(errors='replace')}"
                )
            for mutant in live:
                ran = told()
                if ran is None:
                    raise BaselineError(f"the process with the tests ended. mutant={mutant.name}")
                yield mutant, ran
        for mutant in mutants:
            if mutant.on_import:
                with _session(root, _Loop(target, [], cpu_min_s), mutant, log) as told:
                    ran = told()
                    yield mutant, Ran("killed", "import") if ran is None else ran


@contextmanager
def copied(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """A copy of these folders and files of a tree, so that a campaign sees one state of it and
    leaves nothing in it."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for name in names:
            if (root / name).is_dir():
                shutil.copytree(
                    root / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(root / name, Path(folder, name))
        yield Path(folder)


def preload() -> None:
    """Import, once for all children, what no mutant changes; and make property tests repeatable and
    brief in defeat."""
    for name in PRELOADED:
        importlib.import_module(name)
    hypothesis = importlib.import_module("hypothesis")
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    checks = list(hypothesis.HealthCheck)
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=checks,
    )
    hypothesis.settings.load_profile("mutants")


@contextmanager
def _session(
    root: Path, loop: _Loop, imported: Mutant | None, log: IO[bytes]
) -> Iterator[Callable[[], Ran | None]]:
    """A process that has collected the tests and runs them without, then with each mutant. Gives a
    way to hear of the next.

    That one says None where the process ended: with ``imported`` in place of the module, because it
    can't be imported.
    """
    receive, send = os.pipe()
    child = _fork(log, lambda: _collect(root, loop, imported, send))
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:

        def told() -> Ran | None:
            if not select.select([pipe], [], [], 2 * WALL_S)[0]:
                return Ran("hung", "the clock")
            line = pipe.readline()
            return Ran(**json.loads(line)) if line else None

        try:
            yield told
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork(log: IO[bytes] | None, work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        if log is not None:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        work()
    except BaseException:  # noqa: BLE001 - the border of a process: its parent's code must not go on here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _collect(root: Path, loop: _Loop, imported: Mutant | None, send: int) -> None:
    loop.send = send
    target = loop.target
    os.chdir(root)
    sys.path.insert(0, str(root))
    finder = Imported(target.module, root / target.path, imported.source) if imported else None
    if finder:
        sys.meta_path.insert(0, finder)
    options = ["-q", "-m", "not slow", "--tb=short", "--assert=plain", f"--basetemp={root}/tmp"]
    pytest.main(
        [*options, "-p", "no:cacheprovider", "-p", "no:xdist", *target.tests], plugins=[loop]
    )
    if finder and not finder.executed:
        _tell(send, Ran("broken", "nothing imports the module"))


def _tell(send: int, ran: Ran) -> None:
    os.write(send, json.dumps(asdict(ran)).encode() + b"\n")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a test did without any mutant: processor time, and which functions of the module it
    entered, by their line."""

    spent_s: float
    entered: frozenset[int]


class _Loop:
    """Instead of pytest's own loop over the tests: one over mutants, and in a child of each one
    over the tests.

    Those that killed most for their time come first; those that never entered the mutated function
    are left out.
    """

    def __init__(self, target: Target, mutants: Sequence[Mutant], cpu_min_s: float) -> None:
        self.target = target
        self.send = -1
        """Where it tells what came of each; known once there is a process."""
        self._mutants = mutants
        self._cpu_min_s = cpu_min_s
        self._kills: Counter[str] = Counter()
        self._before: dict[str, _Seen] = {}
        self._failed = ""
        self._hung = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not session.testsfailed and session.items:
            for mutant in (None, *self._mutants):
                ran = self._run(session.items, mutant)
                self._kills[ran.by] += 1
                _tell(self.send, ran)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self._failed:
            self._failed = report.nodeid

    def _run(self, items: list[pytest.Item], mutant: Mutant | None) -> Ran:
        receive, send = os.pipe()
        child = _fork(None, lambda: self._test(items, mutant, send))
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            told = b""
            until = time.monotonic() + WALL_S
            while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                if not (more := os.read(pipe.fileno(), 1 << 16)):
                    break
                told += more
            else:
                os.kill(child, signal.SIGKILL)
                told = b'["hung", "the clock", {}]'
            os.waitpid(child, 0)
        outcome, by, seen = json.loads(told or b'["killed", "the end of the process", {}]')
        if mutant is None:
            self._before = {
                name: _Seen(spent_s, frozenset(entered))
                for name, (spent_s, entered) in seen.items()
            }
        return Ran(outcome, by)

    def _test(self, items: list[pytest.Item], mutant: Mutant | None, send: int) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        module = sys.modules[self.target.module]
        if mutant is None:
            chosen = items
        else:
            line = entry_of(module, mutant)
            chosen = [one for one in items if line in self._before[one.nodeid].entered]
            if not patch(module, mutant):
                os.write(send, json.dumps(["broken", "there is no such function", {}]).encode())
                return
        told: dict[str, tuple[float, list[int]]] = {}
        before = {one: self._before.get(one.nodeid, _Seen(WALL_S, frozenset())) for one in chosen}
        # Most kills for the time first; a test without any yet, a tenth of one.
        worth = {
            one: (self._kills[one.nodeid] + 0.1) / (before[one].spent_s + 0.001) for one in chosen
        }
        chosen = sorted(chosen, key=lambda one: -worth[one])
        signal.signal(signal.SIGPROF, self._stop)
        for item, following in zip(chosen, [*chosen[1:], None], strict=False):
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, max(self._cpu_min_s, 10 * before[item].spent_s))
            with ExitStack() as stack:
                lines = stack.enter_context(entered(module)) if mutant is None else set()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            signal.setitimer(signal.ITIMER_PROF, 0)
            told[item.nodeid] = time.process_time() - begun, sorted(lines)
            if self._failed:
                break
        outcome = "hung" if self._hung else "killed" if self._failed else "survived"
        os.write(send, json.dumps([outcome, self._failed, told]).encode())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._hung = True
        raise Hang
