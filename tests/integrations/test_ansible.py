"""The playbook, run against this machine below a temporary folder: what it writes works, and a
second run changes nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kit.etcd import require
from kit.launches import launch_of
from kit.servers.process import ServerProcess, free_port

from ckpt.cluster.secret import read_secret
from ckpt.cluster.tls import check_tls
from ckpt.errors import UsageError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "integrations" / "ansible"
BIN = Path(sys.executable).parent
JOB = "tried-by-ansible"
STORE_KEY = 'a $key with "quotes" and a \\'
MEMBERS = ("m1", "m2", "m3")
PLAY_S = 300

pytestmark = pytest.mark.slow


@dataclass
class Site:
    """A set-up machine: its folder, and what each run of the playbook printed about each host."""

    folder: Path
    ports: dict[str, dict[str, int]]
    recaps: list[dict[str, dict[str, int]]]
    certificates: list[dict[str, bytes]]
    """The node's files of TLS after each run."""

    def unit(self, host: str, name: str) -> dict[str, list[str]]:
        """The settings of a unit of a host."""
        text = (self.folder / f"units-{host}" / f"{name}.service").read_text().replace("\\\n", "")
        found: dict[str, list[str]] = {}
        for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
            found.setdefault(key, []).append(value)
        return found

    def start_etcd(self) -> list[ServerProcess]:
        """Each member with its unit's command."""
        servers = []
        for name in MEMBERS:
            [line] = self.unit(name, "ckpt-etcd")["ExecStart"]
            ready = f"http://127.0.0.1:{self.ports[name]['metrics']}/health"
            servers.append(
                ServerProcess(
                    shlex.split(line), ready_url=ready, log=self.folder / f"{name}.log", env={}
                )
            )
        return servers


def recap(output: str) -> dict[str, dict[str, int]]:
    """Ansible's last lines: how much was done on each host."""
    lines = re.findall(r"^(\w+) +: (ok=.*)$", output, re.MULTILINE)
    return {
        host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", facts)}
        for host, facts in lines
    }


def tried(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A command, run where the playbook lies."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "ANSIBLE_HOME": str(folder / "ansible"),
        "LC_ALL": "C.UTF-8",
    }
    return subprocess.run(
        [*map(str, command)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PLAY_S,
        check=False,
    )


def play(folder: Path, *options: object) -> list[object]:
    """The command that runs the playbook."""
    return [
        BIN / "ansible-playbook",
        "-i",
        folder / "inventory.yaml",
        "-f",
        "1",
        *options,
        "site.yaml",
    ]


def tls_files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / "etc" / name).read_bytes()
        for name in ("node.crt", "node.key", "nodes-ca.crt")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The playbook's work, done twice."""
    require()
    require("openssl")
    folder = tmp_path_factory.mktemp("site")

    def run(*command: object) -> str:
        done = tried(folder, *command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    source = folder / "source"  # a build writes into what it builds from
    source.mkdir()
    for name in ("ckpt", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(
        BIN / "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder / "dist",
        source,
    )
    [wheel] = (folder / "dist").glob("*.whl")
    run(ROOT / "integrations" / "kubernetes" / "make-secrets.sh", folder / "secrets")
    ports = {
        name: {kind: free_port() for kind in ("client", "peer", "metrics")} for name in MEMBERS
    }
    for host in (*MEMBERS, "n1"):
        (folder / f"units-{host}").mkdir()
    user = run("id", "-un").strip()
    settings = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "ansible_host": "127.0.0.1",
        "ckpt_become": False,
        "ckpt_users": False,
        "ckpt_packages": False,
        "ckpt_services": False,
        "ckpt_user": user,
        "ckpt_etcd_user": user,
        "ckpt_etcd_listen": "127.0.0.1",
        "ckpt_etcd_binary": shutil.which("etcd"),
        "ckpt_units": str(folder) + "/units-{{ inventory_hostname }}",
        "ckpt_prefix": str(folder / "opt"),
        "ckpt_config": str(folder / "etc"),
        "ckpt_state": str(folder / "var"),
        "ckpt_secrets": str(folder / "secrets"),
        "ckpt_wheel": str(wheel),
        "ckpt_extras": "",
        "ckpt_pip_arguments": "--no-deps",
        "ckpt_python": sys.executable,
        "ckpt_job": JOB,
        "ckpt_nodes": "1",
        "ckpt_ranks": 1,
        "ckpt_program": str(folder / "program.py"),
        "ckpt_program_arguments": ["--lr", "0.1"],
        "ckpt_environment": {"TRIED": "two words", "STORE_KEY": STORE_KEY},
    }
    members = {
        name: {
            "ckpt_etcd_client_port": ports[name]["client"],
            "ckpt_etcd_peer_port": ports[name]["peer"],
            "ckpt_etcd_metrics": f"http://127.0.0.1:{ports[name]['metrics']}",
            "ckpt_etcd_config": str(folder / f"etc-{name}"),
            "ckpt_etcd_data": str(folder / f"data-{name}"),
        }
        for name in MEMBERS
    }
    groups = {"etcd": {"hosts": members}, "nodes": {"hosts": {"n1": {"ckpt_domain": "rack-a"}}}}
    (folder / "inventory.yaml").write_text(yaml.safe_dump({"ckpt": {"children": groups}}))
    (folder / "group_vars").mkdir()
    (folder / "group_vars" / "ckpt.yaml").write_text(yaml.safe_dump(settings))
    site_ = Site(folder, ports, [], [])
    for limit in ((), ("--limit", "m1,n1")):  # again, a host of each kind
        site_.recaps.append(recap(run(*play(folder, *limit))))
        site_.certificates.append(tls_files(folder))
    return site_


@pytest.fixture
def etcd(made: Site) -> Iterator[list[ServerProcess]]:
    """The members, running and healthy."""
    servers = made.start_etcd()
    try:
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()


def test_second_run_changes_nothing(made: Site) -> None:
    first, second = made.recaps
    assert first.keys() == {*MEMBERS, "n1"}
    assert second.keys() == {"m1", "n1"}
    assert all(host["changed"] > 3 for host in first.values()), first
    assert all(
        host["failed"] == host["unreachable"] == 0 for host in (*first.values(), *second.values())
    )
    assert all(host["changed"] == 0 for host in second.values()), second


def test_what_is_secret_is_private(made: Site) -> None:
    private = [*(made.folder / "etc").iterdir(), *(made.folder / "etc-m1").iterdir()]
    assert {path.name for path in private} >= {
        "job.secret",
        "client.key",
        "ca.crt",
        "etcd.key",
        "node.key",
        "node.crt",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert read_secret(made.folder / "etc" / "job.secret") == read_secret(
        made.folder / "secrets" / "job.secret"
    )


def test_credentials_of_the_store_are_in_no_unit(made: Site) -> None:
    readable = [path for path in made.folder.rglob("*.service") if STORE_KEY in path.read_text()]
    assert readable == []


def test_key_of_a_node_stays_there_and_the_authoritys_on_the_other_side(made: Site) -> None:
    authority = made.folder / "secrets" / "nodes"
    assert {path.name for path in authority.iterdir()} == {"ca.crt", "ca.key"}
    assert stat.S_IMODE((authority / "ca.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    assert not [path for path in (made.folder / "etc").iterdir() if path.name.endswith("ca.key")]
    key = (made.folder / "etc" / "node.key").read_bytes()
    elsewhere = [
        path
        for path in made.folder.rglob("*")
        if path.is_file() and path.suffix in ("", ".key", ".crt")
    ]
    assert [path.name for path in elsewhere if path.read_bytes() == key] == ["node.key"]


def test_certificate_of_a_node_is_one_that_others_accept_at_its_address_and_a_second_run_keeps_it(
    made: Site,
) -> None:
    first, second = made.certificates
    assert first == second
    _, settings = launch_of(
        ["ckpt", *shlex.split(made.unit("n1", f"ckpt-{JOB}")["ExecStart"][0])[1:]]
    )
    assert settings is not None and settings.nodes is not None
    assert settings.nodes.host == "127.0.0.1"
    ends_s = check_tls(settings.nodes, "127.0.0.1")
    assert ends_s is not None and 364 < (ends_s - time.time()) / 86_400 <= 365
    for host in ("127.0.0.2", "n1"):
        with pytest.raises(UsageError, match="would refuse"):
            check_tls(settings.nodes, host)


def test_certificate_that_ends_soon_is_renewed_and_one_of_the_users_own_is_examined(
    made: Site,
) -> None:
    before = tls_files(made.folder)
    only = ("--limit", "n1", "--tags", "certificates")
    done = tried(made.folder, *play(made.folder, *only, "-e", "ckpt_tls_renew_days=366"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert recap(done.stdout)["n1"]["changed"] == 1
    after = tls_files(made.folder)
    assert {name for name in after if after[name] != before[name]} == {"node.crt"}
    _, settings = launch_of(
        ["ckpt", *shlex.split(made.unit("n1", f"ckpt-{JOB}")["ExecStart"][0])[1:]]
    )
    assert settings is not None and settings.nodes is not None
    assert check_tls(settings.nodes, "127.0.0.1") is not None

    own = ("-e", "ckpt_tls_make=false")
    done = tried(made.folder, *play(made.folder, *only, *own))
    assert done.returncode == 0, done.stdout + done.stderr
    done = tried(
        made.folder, *play(made.folder, *only, *own, "-e", "ckpt_tls_names=IP:127.0.0.1,DNS:gpu-1")
    )
    assert done.returncode != 0
    assert "it does not name DNS:gpu-1" in done.stdout
    assert tls_files(made.folder) == after


def test_etcd_that_was_set_up_is_one_healthy_cluster(made: Site, etcd: list[ServerProcess]) -> None:
    require("etcdctl")
    endpoints = ",".join(f"https://127.0.0.1:{made.ports[name]['client']}" for name in MEMBERS)
    secrets = made.folder / "secrets"
    done = subprocess.run(
        [
            "etcdctl",
            f"--endpoints={endpoints}",
            f"--cacert={secrets / 'ca.crt'}",
            f"--cert={secrets / 'client.crt'}",
            f"--key={secrets / 'client.key'}",
            "--command-timeout=60s",
            "--dial-timeout=30s",
            "endpoint",
            "health",
            "--write-out=json",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [one["health"] for one in json.loads(done.stdout)] == [True] * len(MEMBERS)


def test_unit_of_a_node_runs_its_program(made: Site, etcd: list[ServerProcess]) -> None:
    unit = made.unit("n1", f"ckpt-{JOB}")
    [line] = unit["ExecStart"]
    command = shlex.split(line)
    args, settings = launch_of(["ckpt", *command[1:]])
    assert args.training_script_args == ["--lr", "0.1"]
    assert settings is not None and settings.nodes is not None
    assert settings.nodes.domain == "rack-a" and not settings.nodes.plaintext
    assert [f"127.0.0.1:{made.ports[name]['client']}" for name in MEMBERS] == settings.nodes.where[
        7:
    ].split(",")

    said = made.folder / "said.json"
    (made.folder / "program.py").write_text(
        "import json, os, pathlib, sys\n"
        "env = os.environ\n"
        "facts = [env['TRIED'], env['STORE_KEY'], env['RANK'], env['WORLD_SIZE'], 'CKPT_NODES' in env, "
        "sys.argv[1:]]\n"
        f"pathlib.Path({str(said)!r}).write_text(json.dumps(facts))\n"
    )
    # The wheel was installed without what it depends on: that is here already.
    [packages] = (made.folder / "opt" / "venv" / "lib").glob("python*/site-packages")
    (packages / "tried.pth").write_text("\n".join(site.getsitepackages()))
    [environment] = unit["EnvironmentFile"]
    settings_of_unit = dict(
        word.split("=", 1)
        for text in [*unit["Environment"], *Path(environment).read_text().splitlines()[1:]]
        for word in shlex.split(text)
    )
    done = subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **settings_of_unit},
        cwd=unit["WorkingDirectory"][0],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(said.read_text()) == [
        "two words",
        STORE_KEY,
        "0",
        "1",
        True,
        ["--lr", "0.1"],
    ]


def test_units_are_valid(made: Site) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    for host, name in (("m1", "ckpt-etcd"), ("n1", f"ckpt-{JOB}")):
        done = subprocess.run(
            [
                "systemd-analyze",
                "verify",
                "--man=no",
                made.folder / f"units-{host}" / f"{name}.service",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        about_ours = [line for line in done.stderr.splitlines() if name in line]
        assert done.returncode == 0, done.stderr
        assert about_ours == [], done.stderr


def test_variables_of_the_example_are_known() -> None:
    known = yaml.safe_load((FOLDER / "group_vars" / "all.yaml").read_text())
    settings = yaml.safe_load((FOLDER / "settings.example.yaml").read_text())
    groups = yaml.safe_load((FOLDER / "inventory.example.yaml").read_text())["ckpt"]["children"]
    hosts = [facts for group in groups.values() for facts in group["hosts"].values()]
    used = {name for facts in (settings, *hosts) for name in facts if name.startswith("ckpt_")}
    assert used <= known.keys()
    assert not any(set(group) - {"hosts"} for group in groups.values()), (
        "weaker than group_vars/all.yaml"
    )
    texts = [path.read_text() for path in (*FOLDER.glob("*.yaml"), *FOLDER.glob("templates/*"))]
    named = {name for text in texts for name in re.findall(r"\bckpt_\w+", text)}
    registered = {name for text in texts for name in re.findall(r"register: (ckpt_\w+)", text)}
    assert named - registered == known.keys() | used
