"""What a launcher tells: the settings of the job's nodes, the number of local ranks, the name of a
launch.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ckpt.errors import UsageError
from ckpt.format.canonical import prepare_decoders

NODES_VARIABLE = "CKPT_NODES"
"""The environment variable in which a launcher passes a ``NodesSpec``, as JSON."""


class NodesSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the nodes of a job find each other, and what they may use.

    ``where`` is ``etcd://host:port,host:port``, or the path of a file on this machine. ``job`` is
    the name that all nodes share. ``nodes_min`` and ``nodes_max`` bound how many nodes hold
    ranks. ``secret`` is a file that only the job's nodes can read; "" if all are on one machine
    and meet in a file. ``host`` is where others reach this node, ``domain`` its failure domain.
    ``mirrors``: on how many other nodes each staged snapshot is copied. ``ttl_s``: a node that is
    silent for that long is lost. ``agent`` names the torchrun agent that launched this node's
    program and may put its keys under the keeper's lease.
    """

    where: str
    job: str
    nodes_min: int
    nodes_max: int
    secret: str = ""
    host: str = ""
    domain: str = ""
    mirrors: int = 1
    ttl_s: float = 5.0
    user: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    plaintext: bool = False
    """Serve memory over a network without TLS: weights can then be read on the way."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    """PEM files for TLS between nodes: certificate, key and CA.

    The certificate names ``host``; the CA signed the certificates of all nodes. With them nodes
    accept only TLS connections from each other.
    """
    mirror_bytes: int = 0
    """The most memory for other nodes' mirrors; 0: half of what is free at the start."""
    mirror_rate: float = 0.0
    """The most bytes a second that this node sends to its mirrors, all together; 0: no limit."""
    grow_wait_s: float = 10.0
    """The least time between two epochs if the second one only adds nodes."""
    last_call_s: float = 5.0
    shrink_wait_s: float = 0.0
    agent: str = ""
    join_s: float = 900.0
    """How long a node waits for ranks, or for nodes that train and may need it, before its launch
    ends."""
    instance: int = 0
    """The number of this node among those of the job on this machine; each has a keeper."""
    ends_after: int = -1
    """The membership's revision when this run of the job began: the end of the job in a newer epoch
    is this node's too, even if it joined later. -1: not known."""


prepare_decoders(NodesSpec)


def nodes_from_environment(environment: Mapping[str, str] | None = None) -> NodesSpec | None:
    """The nodes' settings from the environment, or None if there are none.

    Raises UsageError if they are invalid.
    """
    text = (os.environ if environment is None else environment).get(NODES_VARIABLE, "")
    if not text:
        return None
    try:
        return msgspec.json.decode(text.encode(), type=NodesSpec)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"invalid settings of nodes. {NODES_VARIABLE}={text[:200]!r} why={error}"
        ) from error


def nodes_to_environment(spec: NodesSpec) -> dict[str, str]:
    """The environment variable for ``nodes_from_environment``."""
    return {NODES_VARIABLE: msgspec.json.encode(spec).decode()}


def host_towards(where: str) -> str:
    """The address of this machine as a host beside ``where`` sees it; loopback for a file.

    Sends nothing. Raises UsageError if there is no route.
    """
    if not where.startswith("etcd://"):
        return "127.0.0.1"
    host, _, port = where.removeprefix("etcd://").split(",")[0].rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((host.strip("[]"), int(port)))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no route to the membership's server. where={where} why={error}"
            ) from error
        address: str = probe.getsockname()[0]
        return address


# ---- the number of local ranks, as the launcher's environment says it

_MPI_COUNTS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def local_rank_count(environment: Mapping[str, str] | None = None) -> int | None:
    """The number of this job's ranks on this node; None if there are several and it is unknown.

    torchrun sets ``LOCAL_WORLD_SIZE``. If people set ``WORLD_SIZE`` themselves under ``srun`` or
    ``mpirun``, the variables of Slurm or MPI say it.
    """
    variables = os.environ if environment is None else environment
    if (local := _count(variables, "LOCAL_WORLD_SIZE")) is not None:
        return local
    world = _count(variables, "WORLD_SIZE") or 1
    if world == 1:
        return 1
    if (local := _first(variables, _MPI_COUNTS)) is not None:
        return local
    if _first(variables, _SLURM_NODES) == 1:
        return world
    return _count(variables, "SLURM_NTASKS_PER_NODE")


def _first(variables: Mapping[str, str], names: Sequence[str]) -> int | None:
    counts = (_count(variables, name) for name in names)
    return next((count for count in counts if count is not None), None)


def _count(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


# ---- the name of one start of the whole program: the same on all its ranks, and never used again

_MARKS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""The variables that launchers set for each rank, the innermost launcher first."""

_FACTS = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


def launch_name() -> str:
    """The name of this start of the program, equal on all its ranks.

    It holds the launcher's pid and start time, and the launcher's own names. The launcher is the
    nearest process above this one that belongs to no rank: scripts between the two belong to the
    rank. A program without ranks is its own launcher.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return f"{os.getpid()}-{secrets.token_hex(4)}"
    mark = next((name for name in _MARKS if name in os.environ), "RANK")
    launcher = _nearest_without(mark)
    return "-".join(
        [str(launcher), _stat(launcher)[1], *(os.environ.get(name, "") for name in _FACTS)]
    )


def _nearest_without(mark: str) -> int:
    """The nearest ancestor that was started without this variable; else the outermost.

    An ancestor whose variables are unreadable counts as well.
    """
    pid = os.getppid()
    while True:
        try:
            started_with = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # another user's process: not part of this program
            return pid
        parent = _stat(pid)[0]
        if parent <= 0 or not any(
            variable.startswith(f"{mark}=".encode()) for variable in started_with
        ):
            return pid
        pid = parent


def _stat(pid: int) -> tuple[int, str]:
    """A process's parent and its start time in clock ticks since boot.

    The pid and the start time together identify a process.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="ascii", errors="replace")
            .rpartition(")")[2]
            .split()
        )
        return int(fields[1]), fields[19]
    except (OSError, IndexError):
        return 0, ""
