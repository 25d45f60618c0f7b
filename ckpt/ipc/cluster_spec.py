"""What a keeper has to know of the other nodes of its job, and how the launcher says it. Pure but
for the environment."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence

import msgspec

from ckpt.errors import UsageError
from ckpt.format.canonical import prepare_decoders

NODES_VARIABLE = "CKPT_NODES"
"""Where a launcher that knows of other nodes leaves a ``NodesSpec``, as JSON."""

_RANGE = re.compile(r"(\d+)(?::(\d+))?")


class NodesSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a job's nodes find each other.

    ``where``: ``etcd://host:port,host:port``, or the path of a file of this machine. ``job``: the
    name that all nodes share. ``nodes_min``, ``nodes_max``: how many hold ranks. ``secret``: a file
    with what only they know; "" where all are on one machine and meet in a file. ``host``: where
    others reach this node; ``domain``: what it fails together with. ``mirrors``: on how many other
    nodes each staged snapshot is kept. ``ttl_s``: after how long a silent node is lost. ``agent``:
    which of torchrun's agents launched this, where it may live under the keeper's lease.
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
    """Lend memory over a network without TLS: weights can then be read on the way."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    """PEM files: this node's certificate, which names ``host``, its key, and the one CA that signed
    all nodes' certificates. With them nodes speak TLS to each other, and to nobody else."""
    mirror_bytes: int = 0
    """How much memory the mirrors of others may take here; 0: half of what is free at the start."""
    mirror_rate: float = 0.0
    """How many bytes a second this node sends at most to have its mirrors kept, to all others
    together; 0: no limit."""
    grow_wait_s: float = 10.0
    """How long an epoch lasts at least before one follows only because there are more nodes."""
    last_call_s: float = 5.0
    shrink_wait_s: float = 0.0
    agent: str = ""


prepare_decoders(NodesSpec)


def nodes_from_environment(environment: Mapping[str, str] | None = None) -> NodesSpec | None:
    """What the launcher said, or None. Raises UsageError."""
    text = (os.environ if environment is None else environment).get(NODES_VARIABLE, "")
    if not text:
        return None
    try:
        return msgspec.json.decode(text.encode(), type=NodesSpec)
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"not what a launcher says of nodes. {NODES_VARIABLE}={text[:200]!r} why={error}"
        ) from error


def nodes_to_environment(spec: NodesSpec) -> dict[str, str]:
    """The variable that says it."""
    return {NODES_VARIABLE: msgspec.json.encode(spec).decode()}


def nodes_range(text: str) -> tuple[int, int]:
    """``2`` or ``2:3``, as torchrun's ``--nnodes``. Raises UsageError."""
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"not a number of nodes. nnodes={text!r}; write 2, or 2:3 for at least two and at most "
            "three"
        )
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise UsageError(
            f"not a range of nodes. nnodes={text!r}; at least 1, and the first no more than the "
            "second"
        )
    return least, most


def host_towards(where: str) -> str:
    """The address of this machine that a host beside ``where`` would reach, or loopback where all
    are on this machine."""
    if not where.startswith("etcd://"):
        return "127.0.0.1"
    host, _, port = where.removeprefix("etcd://").split(",")[0].rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        try:
            probe.connect((host.strip("[]"), int(port)))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no way to the membership's server. where={where} why={error}"
            ) from error
        found: str = probe.getsockname()[0]
        return found


# What the launcher of this process says of the other ranks: how many there are on this node.

_MPI_COUNTS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def local_rank_count(environment: Mapping[str, str] | None = None) -> int | None:
    """How many ranks of this job are on this node; None where there are several and nothing tells
    how many are here.

    torchrun says ``LOCAL_WORLD_SIZE``. Where people set ``WORLD_SIZE`` themselves under ``srun`` or
    ``mpirun``, those know.
    """
    said = os.environ if environment is None else environment
    if (local := _count(said, "LOCAL_WORLD_SIZE")) is not None:
        return local
    world = _count(said, "WORLD_SIZE") or 1
    if world == 1:
        return 1
    if (local := _first(said, _MPI_COUNTS)) is not None:
        return local
    if _first(said, _SLURM_NODES) == 1:
        return world
    return _count(said, "SLURM_NTASKS_PER_NODE")


def _first(said: Mapping[str, str], names: Sequence[str]) -> int | None:
    return next(
        (count for count in (_count(said, name) for name in names) if count is not None), None
    )


def _count(said: Mapping[str, str], name: str) -> int | None:
    text = said.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
