"""The pages about many machines: every command line parses, every script is valid, alarms and paths
that are named exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from kit.launches import launch_of

from ckpt.cli.main import COMMANDS, cli
from ckpt.ipc.messages import Policy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "running.md"
PAGES = [PAGE, *sorted((ROOT / "integrations").glob("*/README.md"))]
SCRIPTS = [
    *sorted((ROOT / "integrations").rglob("*.sh")),
    *sorted((ROOT / "integrations").rglob("*.sbatch")),
]


def lines(page: Path) -> list[str]:
    """The command lines in a page's blocks, without comments, continued ones joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip()]


def words(line: str) -> list[str]:
    """A line's words; variables that are set before the command are none of them."""
    found = shlex.split(line, comments=True)
    while found and re.match(r"[A-Z_]+=", found[0]):
        found.pop(0)
    return found


ALL = [(page.parent.name, line) for page in PAGES for line in lines(page)]
LAUNCHES = [
    line for _, line in ALL if words(line)[:2] == ["ckpt", "run"] or words(line)[:1] == ["torchrun"]
]
OTHERS = [line for _, line in ALL if words(line)[:1] == ["ckpt"] and words(line)[1] != "run"]


def test_pages_show_launches_of_both_kinds() -> None:
    assert {words(line)[0] for line in LAUNCHES} == {"ckpt", "torchrun"}
    assert OTHERS


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_parses_and_its_settings_are_known(line: str) -> None:
    args, settings = launch_of(words(line))
    assert args.training_script.endswith(".py")
    assert settings is not None and settings.nodes is not None
    assert settings.rules.warm, "decorated programs want standbys that hold memory"


@pytest.mark.parametrize("line", OTHERS)
def test_command_parses(line: str) -> None:
    name, *arguments = [word for word in words(line)[1:] if word != "--json"]
    assert name in COMMANDS
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, arguments).close()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=30)


@pytest.mark.parametrize(("folder", "line"), ALL)
def test_files_of_this_project_that_a_command_names_exist(folder: str, line: str) -> None:
    here = ROOT if folder == "docs" else ROOT / "integrations" / folder
    found = [
        word
        for word in words(line)
        if re.match(r"(\.\./|\./|integrations/)[\w./-]+\.(sh|sbatch|yaml)$", word)
    ]
    for word in found:
        places = [here / word, *(folder / word for folder in (ROOT / "integrations").iterdir())]
        assert any(place.exists() for place in places), word


def test_alarms_that_are_named_are_told_by_the_code() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "ckpt").rglob("*.py"))
    rows = re.findall(
        r"^\| (`[\w-]+`.*?) \| ", PAGE.read_text().partition("## What to watch")[2], re.MULTILINE
    )
    named = [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]
    assert len(named) > 4
    assert [name for name in named if f'"{name}"' not in code] == []


def test_times_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    assert f"`grace` ({Policy().grace_s:.0f} s" in text
    _, settings = launch_of(words(LAUNCHES[0]))
    assert settings is not None and settings.nodes is not None
    nodes = settings.nodes
    for name, seconds in (
        ("--ttl", nodes.ttl_s),
        ("last_call_timeout", nodes.last_call_s),
        ("shrink_timeout", nodes.shrink_wait_s),
        ("grow_timeout", nodes.grow_wait_s),
        ("join_timeout", settings.join_s),
    ):
        assert re.search(rf"`{name}`? ?\({seconds:.0f} s\)", text), name
