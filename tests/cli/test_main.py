"""The program's borders: help, errors, exit codes, JSON, what it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from ckpt.cli import main as program
from ckpt.cli.main import COMMANDS, cli

CKPT = [sys.executable, "-m", "ckpt"]


def test_every_command_has_help_with_examples(ckpt) -> None:
    assert ckpt("--help").code == 0
    for name in COMMANDS:
        done = ckpt(name, "--help")
        assert done.code == 0
        assert "Examples:" in done.out
        assert f"  ckpt {name}" in done.out


def test_every_command_takes_json_and_those_on_stores_storage_options() -> None:
    context = click.Context(cli)
    # One is torchrun, the other a group of commands, of which those that print facts take it.
    for name in COMMANDS.keys() - {"run", "serve"}:
        flags = {flag for one in cli.get_command(context, name).params for flag in one.opts}
        assert {"--json", "--debug"} <= flags
        assert name in ("completion", "ps", "top", "logs", "standby", "key") or (
            "--storage-option" in flags and flags & {"url", "urls", "src"}
        )


def test_no_arguments_prints_help(ckpt) -> None:
    done = ckpt()
    assert done.code == 0
    assert "Commands:" in done.out


@pytest.mark.parametrize(
    "arguments", [("frobnicate",), ("ls",), ("ls", "x", "--frob"), ("restore", "x"), ("--frob",)]
)
def test_bad_command_line_exits_2(ckpt, arguments: tuple[str, ...]) -> None:
    done = ckpt(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "--help" in done.err
    assert done.out == ""


def test_error_is_an_object_with_json_before_or_after(ckpt, tmp_path: Path) -> None:
    for arguments in (("--json", "ls", tmp_path / "no"), ("ls", tmp_path / "no", "--json")):
        done = ckpt(*arguments)
        assert done.code == done.error["exit_code"] == 10
        assert done.error["code"] == "not-found"
        assert done.error["retry"] is False
    assert ckpt("--json", "nonsense").error["code"] == "usage"


def test_storage_option_for_a_folder_is_a_usage_error(ckpt, store) -> None:
    assert ckpt("ls", store.url, "--storage-option", "anon=true").code == 2
    assert "KEY=VALUE" in ckpt("ls", store.url, "--storage-option", "anon").err


def test_storage_options_reach_the_file_system(ckpt) -> None:
    done = ckpt("ls", "memory://nothing-here", "--storage-option", "a=1")
    assert done.code == 10


def test_traceback_only_with_debug(ckpt, tmp_path: Path) -> None:
    assert "Traceback" not in ckpt("ls", tmp_path / "no").err
    assert "Traceback" in ckpt("ls", tmp_path / "no", "--debug").err


def test_defect_exits_70_and_asks_for_a_report(ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.COMMANDS, "ls", "ckpt.no_such_module")
    done = ckpt("ls", "x")
    assert done.code == 70
    assert "--debug" in done.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(ckpt, shell: str) -> None:
    done = ckpt("completion", shell)
    assert done.code == 0
    assert "_CKPT_COMPLETE" in done.out
    assert ckpt("completion", shell, "--json").json["shell"] == shell


@pytest.mark.slow
def test_completion_answers_the_shell() -> None:
    env = {
        **os.environ,
        "_CKPT_COMPLETE": "bash_complete",
        "COMP_WORDS": "ckpt res",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['ckpt']; from ckpt.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.split() == ["plain,restore"]


def test_version_is_quick_and_imports_little() -> None:
    heavy = "sorted({'torch', 'numpy', 'rich'} & set(sys.modules))"
    code = f"from ckpt.cli.main import run; import sys; run(['--version']); print({heavy})"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("ckpt ")
    assert done.stdout.splitlines()[1] == "[]"
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_no_reading_command_imports_torch(store, tmp_path: Path) -> None:
    url = store.url
    lines = [
        ["ls", url],
        ["show", url],
        ["log", url],
        ["verify", url, "--all"],
        ["read", url, "model/fc.weight"],
        ["diff", url, "10", "20", "--values"],
        ["tag", url, "a"],
        ["untag", url, "a"],
        ["rm", url, "--step", "10", "--yes"],
        ["restore", url, "--to", str(tmp_path / "out"), "--format", "safetensors"],
    ]
    code = f"""
import sys
from ckpt.cli.main import run
for line in {lines!r}:
    assert run(line) == 0, line
    assert "torch" not in sys.modules, line
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_program_runs_as_a_module(store) -> None:
    done = subprocess.run([*CKPT, "ls", store.url], capture_output=True, text=True, check=True)
    assert "best" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
def test_closed_pipe_is_no_error(store) -> None:
    child = subprocess.Popen(
        [*CKPT, "read", store.url, "model/fc.weight", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) in (0, program.EXIT_PIPE)
    assert errors == b""


@pytest.mark.slow
def test_interrupt_exits_130_quietly(store, tmp_path: Path) -> None:
    code = """
import sys
import ckpt.cli.commands.ls
from ckpt.cli.main import main
def waits(backend, state):
    print("reading", flush=True)
    while True:
        sys.stdin.read(1)
ckpt.cli.commands.ls.snapshots = waits
sys.argv = ["ckpt", "ls", sys.argv[1]]
main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code, store.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"reading\n"
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")
