"""torchrun's rendezvous options, checked: where agents and keepers meet, and their time limits.

Reads the environment, which names the folder of this machine's files, and this process's number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from ckpt.elastic.rendezvous.decide import RendezvousRules
from ckpt.errors import UsageError
from ckpt.format.manifest import is_job_name
from ckpt.ipc.cluster_spec import NodesSpec
from ckpt.ipc.runtime_dir import runtime_root
from ckpt.keyspace.address import PORT, split_endpoint
from ckpt.log.sequencers import database_path
from ckpt.rate_limit import RATE_BYTES_MIN, parse_rate

BACKEND = "ckpt"
"""The name after ``--rdzv-backend``."""

SETTINGS_HELP: Mapping[str, str] = {
    "secret": "a file with the secret of the job's nodes",
    "host": "the address at which other nodes reach this one",
    "domain": "the failure domain of this node",
    "mirrors": "on how many other nodes staged state is kept",
    "mirror_bytes": "how much memory the mirrors of others may take here",
    "mirror_rate": "how much is sent in a second at most to have mirrors kept, such as 500MiB "
    "(default 1GiB; 0: no limit)",
    "ttl": "seconds after which a silent node is lost",
    "standby": "warm: extra nodes start the program at once, and hold no rank; wait: they wait",
    "grow": "restart a running undecorated job with fewer nodes than allowed when one arrives",
    "grow_timeout": "seconds that a decorated job runs at least before it takes in more nodes",
    "last_call_timeout": "seconds that a first round waits for more nodes than the minimum",
    "shrink_timeout": "seconds that a lost node may take to return before the rest continues "
    "(default 5, decorated 0)",
    "join_timeout": "seconds in which a round must begin",
    "close_timeout": "seconds in which the rendezvous must be closed",
    "user": "etcd's user",
    "password_file": "a file with the user's password",
    "ca_file": "PEM file of etcd's authority",
    "cert_file": "PEM file of this client's certificate",
    "key_file": "PEM file of its key",
    "tls_cert": "PEM file of this node's certificate: nodes then speak TLS to each other",
    "tls_key": "PEM file of its key",
    "tls_ca": "PEM file of the authority that signed all nodes' certificates",
    "plaintext": "serve memory over the network without TLS: weights can then be read on the way",
}
"""Each setting of ``--rdzv-conf``, and its meaning."""

_TORCHS = ("timeout",)
"""Settings that torchrun adds by itself."""

JOIN_S = 900.0
"""As torch's launcher has it, which always passes a ``timeout``."""
CLOSE_S = 30.0
MIRROR_RATE = float(1 << 30)
"""A third of 25 Gbit/s, a twelfth of 100: gradients are on the same links, and each step waits for
them, while no step waits for a mirror."""
AGENTS_SUFFIX = ".agents"
"""The agents' membership is a job beside the keepers' one, with this suffix."""
NAME_CHARS_MAX = 190
FILE_CHARS_MAX = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class RendezvousSettings:
    """The settings of one agent.

    ``nodes`` is what keepers receive, None for a single node; ``agents_spec`` is the same for the
    agents' own job. ``rules`` are those of rounds. ``host``: where rank 0's workers listen. Times
    are in seconds.
    """

    run_id: str
    nodes: NodesSpec | None
    agents_spec: NodesSpec
    rules: RendezvousRules
    host: str
    join_s: float
    close_s: float

    @property
    def shares_service(self) -> bool:
        """Whether agents and keepers meet in one etcd, so that they can share a lease.

        With files they have one each.
        """
        return self.nodes is not None and self.nodes.where == self.agents_spec.where


def parse_settings(
    run_id: str,
    endpoint: str,
    *,
    agents_min: int,
    agents_max: int,
    config: Mapping[str, object],
    local_addr: str = "",
) -> RendezvousSettings:
    """The settings in torchrun's options; ``config`` is ``--rdzv-conf``. Raises UsageError."""
    if unknown := sorted(set(config) - set(SETTINGS_HELP) - set(_TORCHS)):
        raise UsageError(
            f"not a setting of --rdzv-conf. key={unknown[0]}; settings are "
            f"{', '.join(sorted(SETTINGS_HELP))}"
        )
    read = _ConfigReader(config)
    endpoint = endpoint.strip()
    alone = agents_max == 1 and not endpoint
    if run_id in ("", "none") and not alone:
        raise UsageError(
            "nodes that meet need the name of their job. --rdzv-id=NAME, the same on all of them"
        )
    job = f"alone-{os.getpid()}-{os.urandom(6).hex()}" if alone else run_id
    if not is_job_name(job) or len(job) > NAME_CHARS_MAX:
        raise UsageError(
            f"not a job's name (1 to {NAME_CHARS_MAX} printable characters). rdzv_id={job[:200]!r}"
        )
    standby = read.text("standby") or "wait"
    if standby not in ("warm", "wait"):
        raise UsageError(f"not a kind of standby. standby={standby!r}; warm or wait")
    rules = RendezvousRules(
        agents_min=agents_min,
        agents_max=agents_max,
        last_call_s=read.seconds("last_call_timeout", 30.0),
        shrink_wait_s=read.seconds("shrink_timeout", 5.0),
        warm=standby == "warm",
        grow=read.yes("grow"),
    )
    host = read.text("host") or local_addr
    where = str(runtime_root() / f"{job}.sqlite3") if alone else _where(endpoint, job)
    nodes = _spec(read, where, job, rules, host)
    return RendezvousSettings(
        run_id=run_id,
        nodes=None if alone else nodes,
        agents_spec=_agents(nodes),
        rules=rules,
        host=host,
        join_s=nodes.join_s,
        close_s=read.seconds("close_timeout", CLOSE_S),
    )


def _spec(
    read: _ConfigReader, where: str, job: str, rules: RendezvousRules, host: str
) -> NodesSpec:
    ttl_s = read.seconds("ttl", 5.0)
    if ttl_s < (2.0 if where.startswith("etcd://") else 0.5):
        raise UsageError(
            f"too short to tell silence from death. ttl={ttl_s}; etcd grants no less than 2 seconds"
        )
    return NodesSpec(
        where=where,
        job=job,
        nodes_min=rules.agents_min,
        nodes_max=rules.agents_max,
        secret=read.file("secret"),
        host=host,
        domain=read.text("domain"),
        mirrors=read.count("mirrors", 1),
        ttl_s=ttl_s,
        user=read.text("user"),
        password_file=read.file("password_file"),
        ca_file=read.file("ca_file"),
        cert_file=read.file("cert_file"),
        key_file=read.file("key_file"),
        plaintext=read.yes("plaintext"),
        tls_cert=read.file("tls_cert"),
        tls_key=read.file("tls_key"),
        tls_ca=read.file("tls_ca"),
        mirror_bytes=read.count("mirror_bytes", 0),
        mirror_rate=read.rate("mirror_rate", MIRROR_RATE),
        last_call_s=rules.last_call_s,
        shrink_wait_s=read.seconds("shrink_timeout", 0.0),
        grow_wait_s=read.seconds("grow_timeout", 10.0),
        join_s=read.seconds("join_timeout", read.seconds("timeout", JOIN_S)),
    )


def _agents(nodes: NodesSpec) -> NodesSpec:
    """The specification of the agents' job.

    It is separate, so that facts of agents and of keepers do not mix.
    """
    fields = {name: getattr(nodes, name) for name in nodes.__struct_fields__}
    where = nodes.where if nodes.where.startswith("etcd://") else f"{nodes.where}{AGENTS_SUFFIX}"
    return NodesSpec(**{**fields, "where": where, "job": f"{nodes.job}{AGENTS_SUFFIX}"})


def _where(endpoint: str, job: str) -> str:
    if not endpoint or endpoint.startswith("/"):
        name = f"nodes-{quote(job, safe='')}"
        if len(name) > FILE_CHARS_MAX:
            raise UsageError(
                f"too long for the name of a file. rdzv_id={job[:200]!r}; choose a shorter one, or "
                "use etcd"
            )
        state = database_path(name).absolute()
        return str(Path(endpoint) / state.name if endpoint else state)
    hosts = []
    for address in endpoint.removeprefix("etcd://").split(","):
        host, port = split_endpoint(address.strip())
        hosts.append(f"{host}:{port or PORT}")
    return f"etcd://{','.join(hosts)}"


@dataclass(frozen=True, slots=True)
class _ConfigReader:
    """Reads values of ``--rdzv-conf``: texts from torchrun, or values set by a program."""

    config: Mapping[str, object]

    def text(self, key: str) -> str:
        value = self.config.get(key)
        return "" if value is None else str(value).strip()

    def file(self, key: str) -> str:
        text = self.text(key)
        return str(Path(text).expanduser().absolute()) if text else ""

    def yes(self, key: str) -> bool:
        text = self.text(key).lower()
        if text in ("1", "true", "yes", "on"):
            return True
        if text in ("", "0", "false", "no", "off"):
            return False
        raise UsageError(f"neither yes nor no. {key}={text!r}")

    def count(self, key: str, default: int) -> int:
        text = self.text(key)
        if text and not text.isdecimal():
            raise UsageError(f"not a number from 0 on. {key}={text!r}")
        return int(text) if text else default

    def rate(self, key: str, default: float) -> float:
        text = self.text(key)
        value = (0.0 if text == "0" else parse_rate(text)) if text else default
        if 0.0 < value < RATE_BYTES_MIN:
            raise UsageError(
                f"so slow a node is taken for one that stalls. {key}={text!r} "
                f"least={RATE_BYTES_MIN >> 20}MiB"
            )
        return value

    def seconds(self, key: str, default: float) -> float:
        text = self.text(key)
        try:
            value = float(text) if text else default
        except ValueError as error:
            raise UsageError(f"not a number of seconds. {key}={text!r}") from error
        if not 0.0 <= value < 1e9:
            raise UsageError(f"not a number of seconds from 0 on. {key}={text!r}")
        return value
