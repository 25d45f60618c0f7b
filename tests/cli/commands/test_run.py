"""``ckpt run``: torchrun's options, ckpt's own, and what it exits with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.template import Program
from kit.template import run as run_program

from ckpt.cli.commands.run import etcd_without_secret
from ckpt.elastic.rendezvous import run as rendezvous_run
from ckpt.errors import UsageError

CKPT_RUN = [sys.executable, "-m", "ckpt", "run"]
WAIT_S = 240

pytestmark = pytest.mark.filterwarnings(
    "ignore:Unable to enable fault handler"
)  # pytest's stderr is none that torch likes


def parsed(*arguments: str) -> object:
    return rendezvous_run.fill_in_options(rendezvous_run._parser().parse_args(list(arguments)))


def test_own_options_become_settings_wherever_they_stand() -> None:
    args = parsed(
        "--nnodes",
        "2:3",
        "--secret=s",
        "--rdzv-conf=ttl=9,grow=1",
        "--ttl",
        "3",
        "train.py",
        "--ttl",
        "7",
    )
    assert args.rdzv_backend == "ckpt"
    assert args.nnodes == "2:3"
    assert args.rdzv_conf == "ttl=9,grow=1,secret=s,ttl=3,standby=warm"
    assert (args.training_script, args.training_script_args) == ("train.py", ["--ttl", "7"])


def test_certificates_and_plaintext_become_settings_wherever_they_stand() -> None:
    assert parsed("--mirror-rate", "5MiB", "train.py").rdzv_conf == "mirror_rate=5MiB,standby=warm"
    args = parsed(
        "--tls-cert=c", "--nnodes", "2", "--tls-key", "k", "--tls-ca=a", "train.py", "--plaintext"
    )
    assert args.rdzv_conf == "tls_cert=c,tls_key=k,tls_ca=a,standby=warm"
    assert args.training_script_args == ["--plaintext"]
    assert (
        parsed("--nnodes", "2", "--plaintext", "train.py").rdzv_conf == "plaintext=1,standby=warm"
    )


def test_help_says_what_plaintext_means(ckpt: Callable) -> None:
    said = " ".join(ckpt("run", "--help").out.split())
    assert (
        "weights and optimizer state can then be read by whoever sees the packets on their path"
        in said
    )


def test_standbys_are_warm_unless_something_else_is_asked_for() -> None:
    assert parsed("train.py").rdzv_conf == "standby=warm"
    assert parsed("--standby=wait", "train.py").rdzv_conf == "standby=wait"
    assert parsed("--rdzv-conf=standby=wait", "train.py").rdzv_conf == "standby=wait"


def test_program_is_started_again_some_times_unless_something_else_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parsed("train.py").max_restarts == rendezvous_run.MAX_RESTARTS > 0
    assert parsed("--max-restarts=0", "train.py").max_restarts == 0
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    assert parsed("train.py").max_restarts == 7


def test_every_option_of_torchrun_passes() -> None:
    args = parsed(
        "--max-restarts=3",
        "-m",
        "--tee",
        "3",
        "--local-addr",
        "h",
        "--standalone",
        "package.module",
        "-m",
    )
    assert (args.max_restarts, args.module, args.tee, args.local_addr, args.standalone) == (
        3,
        True,
        "3",
        "h",
        False,
    )
    assert args.training_script_args == ["-m"]


def test_options_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="torchrun takes others"):
        parsed("--rdzv-backend=c10d", "train.py")
    with pytest.raises(UsageError, match="--domain"):
        parsed("--domain=a,b", "train.py")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing argument"),
        (("--frob", "x.py"), ""),
        (("--nnodes=0", "x.py"), "min_nodes"),
        (("--standby=hot", "x.py"), "warm or wait"),
        (("--rdzv-conf=frob=1", "x.py"), "key=frob"),
        (("--nnodes=2", "x.py"), "--rdzv-id=NAME"),
        (
            ("--nnodes=2", "--rdzv-id=j", "--tls-cert=a", "--tls-key=b", "--tls-ca=c", "x.py"),
            "certificate can't be read",
        ),
        (("--nnodes=2", "--rdzv-id=j", "--tls-key=b", "x.py"), "three files"),
        (
            ("--tls-cert=a", "--rdzv-id=j", "--nnodes=2", "--tls-key=b", "--plaintext", "x.py"),
            "three files",
        ),
    ],
)
def test_bad_options_exit_2(ckpt: Callable, arguments: tuple[str, ...], says: str) -> None:
    done = ckpt("run", *arguments)
    assert done.code == 2
    assert says in done.err


@pytest.mark.parametrize(
    ("own", "arguments", "environment", "where"),
    [
        ({}, ["--rdzv-endpoint=h:1", "--nnodes=2", "x.py"], {}, "h:1"),
        ({}, ["--nnodes", "2", "--standalone", "--rdzv_endpoint", "h:1", "x.py"], {}, "h:1"),
        ({}, ["x.py"], {"PET_RDZV_ENDPOINT": "h:1"}, "h:1"),
        ({"secret": "s"}, ["--rdzv-endpoint=h:1", "x.py"], {}, ""),
        ({}, ["--rdzv-endpoint=h:1", "--rdzv-conf=ttl=2,secret=s", "x.py"], {}, ""),
        ({}, ["--rdzv-endpoint=h:1", "x.py"], {"PET_RDZV_CONF": "secret=s"}, ""),
        ({"standby": "wait"}, ["--rdzv-endpoint=h:1", "x.py"], {}, ""),
        ({}, ["--nnodes", "2", "--rdzv-endpoint", "h:1", "--secret", "s", "x.py"], {}, ""),
        ({}, ["--nnodes", "2", "--rdzv-endpoint=h:1", "--standby=wait", "x.py"], {}, ""),
        ({}, ["--rdzv-endpoint=/a/folder", "x.py"], {}, ""),
        ({}, ["--nnodes=2", "x.py", "--rdzv-endpoint=h:1"], {}, ""),  # the script's own
        ({}, ["-m", "x", "--rdzv-endpoint=h:1"], {}, ""),
    ],
)
def test_missing_secret_is_seen_in_the_words_alone(
    own: dict[str, str], arguments: list[str], environment: dict[str, str], where: str
) -> None:
    assert etcd_without_secret(own, arguments, environment) == where


def test_missing_secret_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ckpt", "run", "--rdzv-endpoint=h:1", "x.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "ckpt key new job.secret" in done.stderr and "--secret=job.secret" in done.stderr
    assert " torch\n" not in done.stderr


def test_help_shows_own_options_and_torchruns_on_request(ckpt: Callable) -> None:
    assert all(
        option in ckpt("run", "--help").out for option in ("--secret", "--tls-cert", "--tls-ca")
    )
    done = ckpt("run", "--nnodes=1", "--help")
    assert done.code == 0
    assert "--nproc-per-node" in done.out
    assert "--mirrors" in done.out


@pytest.mark.slow
def test_nodes_that_never_come_exit_11(
    ckpt: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("CKPT_NODES", "")
    done = ckpt(
        "run", "--rdzv-id=j", "--nnodes=2", "--rdzv-conf=join_timeout=0.3", tmp_path / "x.py"
    )
    assert done.code == 11
    assert "no round within 0.3 s" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code"), [("", 0), ("if os.environ['RANK'] == '0': raise SystemExit(5)", 1)]
)
def test_a_program_that_ends(tmp_path: Path, body: str, code: int) -> None:
    # One write a line: both ranks write to one pipe, and print writes a line's end on its own where
    # nothing is buffered.
    (tmp_path / "x.py").write_text(
        f'import os, sys\nos.write(1, f\'{{os.environ["RANK"]}} '
        f"{{sys.argv[1:]}}\\n'.encode())\n{body}"
    )
    done = run_program(
        [*CKPT_RUN, "--nproc-per-node=2", str(tmp_path / "x.py"), "--ttl", "1"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env={**os.environ, "CKPT_STATE_DIR": str(tmp_path)},
    )
    assert done.returncode == code, done.stderr
    assert "0 ['--ttl', '1']" in done.stdout
    assert ("exitcode" in done.stderr) == (code == 1)


@pytest.mark.slow
def test_a_signal_ends_it_and_its_workers(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(1000)"
    )
    process = Program(
        [*CKPT_RUN, str(tmp_path / "x.py")],
        env={**os.environ, "CKPT_STATE_DIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + WAIT_S
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
    finally:
        process.kill()
        process.wait()
