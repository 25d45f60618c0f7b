"""How many ranks are on this node, as launchers say it."""

from __future__ import annotations

import pytest

from ckpt.ipc.cluster_spec import local_rank_count


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "8"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "8", "MPI_LOCALNRANKS": "2"}, 2),
        ({"WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1),
        ({"WORLD_SIZE": "8", "SLURM_NNODES": "1"}, 8),
        ({"WORLD_SIZE": "8", "SLURM_JOB_NUM_NODES": "1"}, 8),
        ({"WORLD_SIZE": "2", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "4"}, 2),
        ({"WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "4"}, 2),
        ({"WORLD_SIZE": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"WORLD_SIZE": "8", "SLURM_NNODES": "2"}, None),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}, 1),
    ],
)
def test_ranks_on_this_node(said: dict[str, str], wanted: int | None) -> None:
    assert local_rank_count(said) == wanted
