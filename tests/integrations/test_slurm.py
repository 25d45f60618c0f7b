"""The Slurm script: valid, its launch parses, and it runs: with stand-ins for ``srun`` and
``scontrol``, all else real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.etcd import require
from kit.jobs import PROGRAMS
from kit.launches import launch_of
from kit.servers.process import free_port

import ckpt
from ckpt.cluster.tls import check_tls
from ckpt.errors import UsageError
from ckpt.ipc.cluster_spec import NodesSpec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "integrations" / "slurm" / "train.sbatch"
MAKE_CERTIFICATES = ROOT / "integrations" / "slurm" / "make-certificates.sh"
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
JOB = "4711"
BEGUN = 30
STEPS = 100_000
WAIT_S = 300.0


class Allocation:
    """A job's allocation of three hosts, on this machine. ``start`` runs the script there, as often
    as it is queued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = next(port for port in iter(free_port, 0) if port % 2 == 0)
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *arguments: object,
        program: Path = PROGRAMS / "counting.py",
        first: str = "",
        **more: str,
    ) -> subprocess.Popen[bytes]:
        """``first``: a folder whose commands come before all others; ``more``: variables of the
        script."""
        places = [
            first,
            str(HERE / "slurm_standins"),
            str(Path(sys.executable).parent),
            os.environ["PATH"],
        ]
        path = os.pathsep.join(filter(None, places))
        # It runs as a user's program does, not in place and without keepers as most of the suite.
        outside = {
            name: value
            for name, value in os.environ.items()
            if name not in ("CKPT_KEEPER", "CKPT_IN_PLACE")
        }
        environment = {
            **outside,
            "PATH": path,
            "STANDIN_FOLDER": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": "train",
            "SLURM_JOB_NODELIST": " ".join(HOSTS),
            "SLURM_RESTART_COUNT": str(self.starts),
            "NODES": "2",
            "RANKS": "1",
            "PORT": str(self.port),
            "MAKE_SECRETS": str(ROOT / "integrations" / "kubernetes" / "make-secrets.sh"),
            "CKPT_CONF": "last_call_timeout=2",
            "HOSTS_BY": "name",
            **more,
        }
        with (self.folder / "job.txt").open("ab") as out:
            self.process = subprocess.Popen(
                ["bash", SCRIPT, program, self.folder, *map(str, arguments)],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.starts += 1
        return self.process

    def wait_step(self, step: int) -> None:
        until_s = time.monotonic() + WAIT_S
        while self.steps() < step:
            assert self.process is not None and self.process.poll() is None, self.output()
            assert time.monotonic() < until_s, self.output()
            time.sleep(0.05)

    def steps(self) -> int:
        path = self.folder / "steps-0.txt"
        return max(map(int, path.read_text().split()), default=0) if path.exists() else 0

    def output(self) -> str:
        return "\n".join(
            f"--- {path}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.rglob("*.txt"))
        )

    def keepers(self) -> str:
        """What the nodes' keepers said."""
        return "\n".join(path.read_text() for path in self.folder.rglob("keeper.log"))

    def members(self) -> list[int]:
        """Every process that runs for this allocation."""
        mark = f"STANDIN_FOLDER={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
        return found


def make_certificates(folder: Path, *hosts: str, **variables: str) -> str:
    """What the script that makes them says."""
    done = subprocess.run(
        [MAKE_CERTIFICATES, folder, *hosts],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def nodes_of(folder: Path, host: str) -> NodesSpec:
    cert, key, ca = (str(folder / name) for name in (f"{host}.crt", f"{host}.key", "ca.crt"))
    return NodesSpec(
        where="/f", job="j", nodes_min=2, nodes_max=2, tls_cert=cert, tls_key=key, tls_ca=ca
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the allocation's hosts."""
    require("openssl")
    folder = tmp_path_factory.mktemp("made") / "certificates"
    make_certificates(folder, *HOSTS)
    return folder


@pytest.fixture
def allocation(tmp_path: Path, certificates: Path) -> Iterator[Allocation]:
    require()
    shutil.copytree(certificates, tmp_path / "certificates")
    made = Allocation(tmp_path)
    try:
        yield made
    finally:
        while members := made.members():
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if made.process is not None:
                made.process.poll()
            time.sleep(0.02)
        if made.process is not None:
            made.process.wait(WAIT_S)


def test_script_is_valid_bash_and_asks_slurm_for_what_it_relies_on() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1", "one agent on each node"
    assert {"no-kill", "requeue"} <= asked.keys()
    assert asked["mem"] == "0", "all memory of a node: slots and mirrors are memory"
    told, seconds = re.fullmatch(r"(\w:\w+)@(\d+)", asked["signal"]).groups()  # type: ignore[union-attr]
    assert told == "B:TERM" and int(seconds) > 60


@pytest.mark.slow
def test_certificates_name_hosts_and_addresses_are_private_and_stay_until_they_end_soon(
    tmp_path: Path,
) -> None:
    require("openssl")
    folder = tmp_path / "certificates"
    hosts = ("gpu1=10.0.0.1,fd00::1", "127.0.0.2")
    assert make_certificates(folder, *hosts).count("made ") == 2
    for host, names in (("gpu1", ("gpu1", "10.0.0.1", "fd00::1")), ("127.0.0.2", ("127.0.0.2",))):
        for name in names:
            assert check_tls(nodes_of(folder, host), name) is not None
        with pytest.raises(UsageError, match="would refuse"):
            check_tls(nodes_of(folder, host), "10.0.0.9")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "made " not in make_certificates(folder, *hosts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert make_certificates(folder, "gpu1=10.0.0.2", "127.0.0.2").count("made ") == 1  # it moved
    assert check_tls(nodes_of(folder, "gpu1"), "10.0.0.2") is not None
    assert (
        make_certificates(folder, "127.0.0.2", RENEW_DAYS="366").count("made ") == 1
    )  # it ends sooner
    assert (folder / "ca.crt").read_bytes() == before["ca.crt"]
    assert (folder / "127.0.0.2.key").read_bytes() == before["127.0.0.2.key"]
    assert (
        make_certificates(folder, "127.0.0.2", DAYS="4000") != ""
    )  # longer than the authority holds: that is renewed
    assert (folder / "ca.crt").read_bytes() != before["ca.crt"]
    for host, name in (("gpu1", "10.0.0.2"), ("127.0.0.2", "127.0.0.2")):
        assert check_tls(nodes_of(folder, host), name) is not None, "it is the same authority"
    (folder / "127.0.0.2.key").unlink()
    make_certificates(folder, "127.0.0.2")
    assert check_tls(nodes_of(folder, "127.0.0.2"), "127.0.0.2") is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lacks", "more", "says"),
    [
        (("127.0.0.2.key",), {}, "missing=127.0.0.2.key;"),
        (("ca.crt", "127.0.0.3.crt"), {}, "missing=ca.crt 127.0.0.3.crt;"),
        ((), {"CERTIFICATES": "/nowhere"}, "folder=/nowhere missing=ca.crt 127.0.0.1.crt"),
        ((), {"PLAINTEXT": "yes"}, "PLAINTEXT=yes"),
        ((), {"HOSTS_BY": "number"}, "HOSTS_BY=number"),
    ],
)
def test_job_that_could_not_speak_tls_ends_before_anything_starts(
    allocation: Allocation, lacks: tuple[str, ...], more: dict[str, str], says: str
) -> None:
    for name in lacks:
        (allocation.folder / "certificates" / name).unlink()
    assert allocation.start(STEPS, **more).wait(60) == 2
    said = (allocation.folder / "job.txt").read_text()
    assert said.startswith("train.sbatch: ") and says in said and len(said.splitlines()) == 1
    assert {path.name for path in allocation.folder.iterdir()} == {"certificates", "job.txt"}, (
        "nothing was started"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["TLS", "TLS by name", "plaintext"])
def test_node_speaks_tls_by_its_own_certificate_and_in_the_clear_only_when_asked(
    allocation: Allocation, tmp_path: Path, how: str
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "ckpt").write_text(
        '#!/bin/sh\nprintf "%s\\0" "$@" >"$STANDIN_FOLDER/$SLURMD_NODENAME/words"\n'
    )
    (commands / "ckpt").chmod(0o755)
    more = {
        "TLS": {"HOSTS_BY": ""},
        "TLS by name": {"HOSTS_BY": "name"},
        "plaintext": {"HOSTS_BY": "", "PLAINTEXT": "1", "CERTIFICATES": "/nowhere"},
    }[how]
    outside = {
        "ETCD": "127.0.0.1:2379",
        "SECRETS": "/etc/ckpt",
        "CKPT_CONF": "",
        "first": str(commands),
    }
    process = allocation.start("--lr", "0.1", **outside, **more)
    assert process.wait(60) == 0, allocation.output()
    for host in HOSTS:
        words = (tmp_path / host / "words").read_text().split("\0")[:-1]
        args, settings = launch_of(["ckpt", *words])
        assert settings is not None and settings.nodes is not None
        assert settings.nodes.domain == f"core.rack-{host[-1]}"
        assert settings.nodes.plaintext == (how == "plaintext")
        assert settings.nodes.host == (host if how == "TLS by name" else "")
        assert args.training_script_args == [str(tmp_path), "--lr", "0.1"]
        assert (
            settings.nodes.ca_file == "/etc/ckpt/ca.crt"
            and settings.nodes.secret == "/etc/ckpt/job.secret"
        )
        if how == "plaintext":
            assert not settings.nodes.tls_cert
        else:
            assert check_tls(settings.nodes, host) is not None


@pytest.mark.slow
def test_job_that_is_told_of_its_end_stops_durable_is_queued_again_and_goes_on(
    allocation: Allocation,
) -> None:
    process = allocation.start(STEPS)
    allocation.wait_step(BEGUN)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) in (1, 128 + signal.SIGTERM), allocation.output()
    assert (allocation.folder / "requeued").read_text().split() == [JOB]
    stopped = allocation.steps()
    newest = ckpt.Checkpointer(str(allocation.folder / "store")).latest()
    assert newest is not None and newest.step == stopped, allocation.output()
    assert "nodes use TLS; this node's certificate is valid until" in allocation.keepers()

    process = allocation.start(stopped + 200)  # less is to be done now, so that it ends
    assert process.wait(WAIT_S) == 0, allocation.output()
    assert (allocation.folder / "requeued").read_text().split() == [JOB]
    steps = [*map(int, (allocation.folder / "steps-0.txt").read_text().split())]
    assert steps == [*range(1, stopped + 201)], "no step was done twice"
    assert not (allocation.folder / f".ckpt-{JOB}").exists(), (
        "secrets stay while the job may be queued again, not longer"
    )


@pytest.mark.slow
def test_every_nodes_agent_is_started_with_options_that_parse(
    allocation: Allocation, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(600)\n")
    allocation.start("--lr", "0.1", program=program)
    found: dict[str, list[str]] = {}
    until_s = time.monotonic() + WAIT_S
    while len(found) < len(HOSTS):
        assert time.monotonic() < until_s, allocation.output()
        for pid in allocation.members():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
                host = re.search(
                    rb"SLURMD_NODENAME=([\d.]+)", Path(f"/proc/{pid}/environ").read_bytes()
                )
            except OSError:  # it has ended
                continue
            if host and any(word.endswith("/ckpt") for word in words[:2]) and "run" in words[:3]:
                found[host[1].decode()] = ["ckpt", *words[words.index("run") :]]
        time.sleep(0.05)
    for host, words in found.items():
        args, settings = launch_of(words)
        assert settings is not None and settings.nodes is not None, shlex.join(words)
        assert settings.nodes.domain == f"core.rack-{host[-1]}"
        assert (
            check_tls(settings.nodes, settings.nodes.host) is not None
            and settings.nodes.host == host
        )
        assert (settings.nodes.nodes_max, settings.nodes.job) == (2, f"train-{JOB}")
        assert args.training_script_args == [str(tmp_path), "--lr", "0.1"]
