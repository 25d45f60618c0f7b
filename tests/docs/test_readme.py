"""The README runs: its programs are written to the files that they name, its commands are run,
their output is compared."""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import ckpt

ROOT = Path(__file__).parents[2]
RUN_S_MAX = 300
KILLED = 137
BLOCK = re.compile(
    r"(?:<!-- not-run: (?P<why>[^\n]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FIGURES = re.compile(r"[-+]?\d[\d.,:e+\-]*(?: ?[KMG]?i?B\b)?")


@dataclass(frozen=True)
class Command:
    """A line behind ``$`` and the output that is shown below it."""

    line: str
    shown: tuple[str, ...]


def blocks(text: str) -> list[tuple[str, str]]:
    return [
        (match["kind"], match["text"]) for match in BLOCK.finditer(text) if match["why"] is None
    ]


def commands(text: str) -> list[Command]:
    found: list[Command] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, *shown = part.splitlines()
        found.append(Command(line, tuple(shown)))
    return found


def loose(line: str) -> str:
    """A line without what differs from run to run: figures, dates, widths of columns."""
    return (
        re.sub(r"[\s─-]+", " ", FIGURES.sub("#", line))
        .replace("[ ", "[")
        .replace(" ]", "]")
        .strip()
    )


def first_missing(shown: tuple[str, ...], printed: str) -> str | None:
    """The first shown line that was not printed behind the one before it; ``...`` stands for any
    lines."""
    lines = iter([loose(line) for line in printed.splitlines()])
    last = ""
    for line in shown:
        wanted = loose(line)
        if line.strip() == "..." or wanted in ("", last):
            continue
        if wanted not in lines:
            return line
        last = wanted
    return None


def test_first_missing_ignores_figures_and_elided_lines() -> None:
    assert (
        first_missing(
            ("step 1 loss 0.5", "step 2 loss 0.4", "...", "done"), "step 7 loss 1e-3\nx\ndone\n"
        )
        is None
    )
    assert first_missing(("one", "two"), "two\none\n") == "two"


def test_first_missing_ignores_how_numpy_pads_figures() -> None:
    assert first_missing(("[[-0.33364415 0.37614447]]",), "[[ 0.1126923   0.4852597 ]]\n") is None


def package_names(text: str) -> set[str]:
    """What a page names of the package; not its files and hosts, as ``ckpt.json``."""
    found = re.findall(r"(?<![\w.\-*/])ckpt\.(?!(?:json|fish|svc)\b)([A-Za-z]\w*)", text)
    return {*map(str, found)}


def test_package_names_are_not_those_of_files() -> None:
    text = "`ckpt.Lost(x)` @ckpt.lost a.ckpt.svc `ckpt.json` =ckpt.testing.store; in ckpt. Then"
    assert package_names(text) == {"Lost", "lost", "testing"}


def test_what_pages_name_of_the_package_is_exported() -> None:
    # ``integrations`` is installed below the package from a folder of its own.
    modules = {found.name for found in pkgutil.iter_modules(ckpt.__path__)} | {"integrations"}
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    unknown = {
        f"{page.relative_to(ROOT)}: ckpt.{name}"
        for page in pages
        for name in package_names(page.read_text()) - modules - {*ckpt.__all__}
    }
    assert len(pages) > 10
    assert not unknown


def test_every_program_in_the_readme_names_its_file() -> None:
    programs = [text for kind, text in blocks((ROOT / "README.md").read_text()) if kind == "python"]
    assert programs
    assert all(re.match(r"# \w+\.py\n", text) for text in programs)


@pytest.mark.slow
def test_readme_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    ran = 0
    for kind, text in blocks((ROOT / "README.md").read_text()):
        if kind == "python":
            (tmp_path / text.split("\n", 1)[0].removeprefix("# ")).write_text(text)
            continue
        assert kind == "console", f"a block that nobody checks. kind={kind!r}"
        for command in commands(text):
            done = subprocess.run(
                command.line,
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_S_MAX,
                check=False,
            )
            if "--signal=KILL" in command.line:
                assert done.returncode == KILLED, f"$ {command.line}\n{done.stdout}{done.stderr}"
                assert {*map(loose, done.stdout.splitlines())} <= {*map(loose, command.shown)}
            else:
                assert done.returncode == 0, f"$ {command.line}\n{done.stdout}{done.stderr}"
                missing = first_missing(command.shown, done.stdout)
                assert missing is None, (
                    f"$ {command.line}\nnot printed: {missing}\n{done.stdout}{done.stderr}"
                )
            ran += 1
    assert ran > 10


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """A server that the README starts, and does not end because the test failed before."""
    yield
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((tmp_path / "serve.pid").read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_store_of_ones_own_in_contributing_is_a_test_that_pytest_collects(tmp_path: Path) -> None:
    [program] = [
        text for kind, text in blocks((ROOT / "CONTRIBUTING.md").read_text()) if kind == "python"
    ]
    path = tmp_path / "test_store_of_ones_own.py"
    path.write_text(program)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "create",
        str(path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_S_MAX, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr


def local_links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name
)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    for link in local_links(page):
        path, _, section = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert section in [
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            ], link
