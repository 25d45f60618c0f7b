"""Checkpointing and state replication for PyTorch.

The public face. Names load on first use, so that processes which only move bytes never import
torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# Or torch.cuda.is_available() above a decorated call would open the GPU there, and trainers could
# not be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

if TYPE_CHECKING:
    from ckpt.elastic.decorator import RestartPolicy as RestartPolicy
    from ckpt.elastic.decorator import resilient as resilient
    from ckpt.elastic.failure import Preempted as Preempted
    from ckpt.elastic.run import Run as Run
    from ckpt.errors import CkptError as CkptError
    from ckpt.errors import CommitUnknownError as CommitUnknownError
    from ckpt.errors import ConflictError as ConflictError
    from ckpt.errors import FencedError as FencedError
    from ckpt.errors import FormatVersionError as FormatVersionError
    from ckpt.errors import IntegrityError as IntegrityError
    from ckpt.errors import InternalError as InternalError
    from ckpt.errors import KeyExistsError as KeyExistsError
    from ckpt.errors import NotFoundError as NotFoundError
    from ckpt.errors import StoreDeniedError as StoreDeniedError
    from ckpt.errors import StoreFullError as StoreFullError
    from ckpt.errors import UnavailableError as UnavailableError
    from ckpt.errors import UsageError as UsageError
    from ckpt.maintenance.retention import KeepPolicy as KeepPolicy
    from ckpt.maintenance.retention import keep_best as keep_best
    from ckpt.maintenance.retention import keep_every as keep_every
    from ckpt.maintenance.retention import keep_for as keep_for
    from ckpt.maintenance.retention import keep_last as keep_last
    from ckpt.maintenance.retention import keep_tagged as keep_tagged
    from ckpt.session.checkpointer import Checkpointer as Checkpointer
    from ckpt.session.saving import Pending as Pending
    from ckpt.values import SnapshotId as SnapshotId
    from ckpt.values import SnapshotInfo as SnapshotInfo

_HOMES = {
    "resilient": "ckpt.elastic.decorator",
    "Preempted": "ckpt.elastic.failure",
    "RestartPolicy": "ckpt.elastic.decorator",
    "Run": "ckpt.elastic.run",
    "Checkpointer": "ckpt.session.checkpointer",
    "Pending": "ckpt.session.saving",
    "SnapshotId": "ckpt.values",
    "SnapshotInfo": "ckpt.values",
    **dict.fromkeys(
        ("KeepPolicy", "keep_best", "keep_every", "keep_for", "keep_last", "keep_tagged"),
        "ckpt.maintenance.retention",
    ),
    **dict.fromkeys(
        (
            "CkptError",
            "CommitUnknownError",
            "ConflictError",
            "FencedError",
            "FormatVersionError",
            "IntegrityError",
            "InternalError",
            "KeyExistsError",
            "NotFoundError",
            "StoreDeniedError",
            "StoreFullError",
            "UnavailableError",
            "UsageError",
        ),
        "ckpt.errors",
    ),
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
