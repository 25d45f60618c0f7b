"""Serving: models in memory that follow the snapshots of a training job.

``Follower`` is the part that fits into any server; ``Replica`` declares what ``ckpt serve`` runs.
Names load on first use, so that commands which only look at replicas never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt.serve.client import Client as Client
    from ckpt.serve.client import ClientReply as ClientReply
    from ckpt.serve.follower import Follower as Follower
    from ckpt.serve.follower import FollowerStatus as FollowerStatus
    from ckpt.serve.generations import Generation as Generation
    from ckpt.serve.replica import ModelRequest as ModelRequest
    from ckpt.serve.replica import Replica as Replica
    from ckpt.serve.shared_reads import SharedReads as SharedReads
    from ckpt.serve.source import SwapReport as SwapReport

_HOMES = {
    "Client": "ckpt.serve.client",
    "ClientReply": "ckpt.serve.client",
    "Follower": "ckpt.serve.follower",
    "FollowerStatus": "ckpt.serve.follower",
    "Generation": "ckpt.serve.generations",
    "ModelRequest": "ckpt.serve.replica",
    "Replica": "ckpt.serve.replica",
    "SharedReads": "ckpt.serve.shared_reads",
    "SwapReport": "ckpt.serve.source",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckpt.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
