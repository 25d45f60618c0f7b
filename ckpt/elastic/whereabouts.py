"""Which process of a training this one is."""

from __future__ import annotations

import os

import torch

from ckpt.session.c10d_mailbox import world_of_process


class Whereabouts:
    """This process's rank and device."""

    @property
    def rank(self) -> int:
        """This process's rank, from 0."""
        return world_of_process()[0]

    @property
    def local_rank(self) -> int:
        """This process's number on its node, from 0."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        """How many ranks train together."""
        return world_of_process()[1]

    @property
    def device(self) -> torch.device:
        """Where this rank's model belongs: its CUDA device where there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")
