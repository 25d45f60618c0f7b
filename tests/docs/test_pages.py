"""Pages that list what the code has: each list is compared with the code."""

from __future__ import annotations

import ast
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from ckpt import errors
from ckpt.backends.file.store import FileBackend
from ckpt.cli.main import COMMANDS, run
from ckpt.errors import CkptError
from ckpt.testing.sample import write_sample_store

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(path.parent.name for path in (ROOT / "ckpt").glob("*/__init__.py"))
KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptError)
]

LINES = {
    "ls": [],
    "show": [],
    "log": [],
    "read": ["model/fc.weight", "--rows", "0:1"],
    "verify": [],
    "diff": ["10", "20"],
    "restore": ["--to", "out"],
    "tag": ["x"],
    "untag": ["best"],
    "rm": ["--step", "10", "--yes"],
    "gc": ["--dry-run"],
}


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def outer_members(row: str) -> list[str]:
    """The names in the first code span of a table row, without those of documents inside the
    document."""
    text = row[2:].partition("`")[0]
    while (shorter := re.sub(r"\{[^{}]*\}", "", text)) != text:
        text = shorter
    return re.findall(r'"(\w+)"', text)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_on_the_architecture_page(package: str) -> None:
    assert re.search(rf"^\| .*`{package}`", page("docs/dev/architecture.md"), re.MULTILINE)


def exists(name: str) -> bool:
    """Whether a dotted name below ``ckpt`` is a package, a module, or a definition in one."""
    parts, place = name.split("."), ROOT / "ckpt"
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return True
    module = place / f"{parts.pop(0)}.py"
    if not module.exists():
        return False
    body = ast.parse(module.read_text()).body
    for part in parts:
        defined = {
            node.name: node.body
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        if part not in defined:
            return False
        body = defined[part]
    return True


def test_name_on_the_architecture_page_exists() -> None:
    names = re.findall(r"`([a-z_0-9]+(?:\.\w+)+)`", page("docs/dev/architecture.md"))
    assert names
    assert [name for name in names if not exists(name)] == []
    links = re.findall(r"\]\(([^)#]+)\)", page("docs/dev/architecture.md"))
    assert [link for link in links if not (ROOT / "docs" / "dev" / link).exists()] == []


def test_command_of_the_command_line_is_in_its_page_and_the_changelog() -> None:
    for name in COMMANDS:
        assert f"| `ckpt {name} " in page("docs/cli.md"), name
        assert f"`{name}`" in page("CHANGELOG.md"), name


@pytest.mark.parametrize("command", sorted(LINES))
def test_json_of_the_command_has_the_members_that_its_page_names(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample_store(FileBackend(tmp_path / "store"))
    assert run(["--json", command, "store", *LINES[command]]) == 0
    document = json.loads(capsys.readouterr().out)
    [row] = re.findall(rf"^\| `{command}` \| (`{{.*)\|$", page("docs/cli.md"), re.MULTILINE)
    assert sorted(document) == sorted(outer_members(row))


def test_readme_and_command_page_give_the_exit_code_of_each_error() -> None:
    readme, cli = page("README.md"), page("docs/cli.md")
    for kind in KINDS:
        if kind is CkptError:
            continue
        assert re.search(
            rf"^\|.*`{kind.__name__}`.*\| {kind.exit_code} \|$", readme, re.MULTILINE
        ), kind
        assert re.search(rf"^\| {kind.exit_code} \|.*`{kind.code}`", cli, re.MULTILINE), kind


def test_dependency_has_a_line_that_says_what_it_replaces() -> None:
    names = [re.split(r"[\s\[<>=!;(]", one)[0] for one in metadata.requires("torch-ckpt") or ()]
    assert [name for name in names if name not in page("docs/dev/design/006-dependencies.md")] == [
        "torch-ckpt"
    ] * names.count("torch-ckpt")


def test_word_of_the_glossary_is_explained_once() -> None:
    words = re.findall(r"^\| ([\w, ]+?) \| ", page("docs/glossary.md"), re.MULTILINE)
    single = [
        word
        for words_of_line in words
        if words_of_line != "word"
        for word in words_of_line.split(", ")
    ]
    assert sorted(single) == sorted(set(single))


def test_example_that_the_readme_lists_exists_and_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", page("README.md"), re.MULTILINE))
    support = {"demo.py", "gpt_model.py"}
    assert listed == {path.name for path in (ROOT / "examples").glob("*.py")} - support
