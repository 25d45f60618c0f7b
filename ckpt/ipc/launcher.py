"""What the launcher of this process says of the other ranks: how many there are on this node."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

_MPI_COUNTS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_SLURM_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def ranks_here(environment: Mapping[str, str] | None = None) -> int | None:
    """How many ranks of this job are on this node; None where there are several and nothing tells how many are here.

    torchrun says ``LOCAL_WORLD_SIZE``. Where people set ``WORLD_SIZE`` themselves under ``srun`` or ``mpirun``, those know.
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
    return next((count for count in (_count(said, name) for name in names) if count is not None), None)


def _count(said: Mapping[str, str], name: str) -> int | None:
    text = said.get(name, "")
    return int(text) if text.isdecimal() and int(text) > 0 else None
