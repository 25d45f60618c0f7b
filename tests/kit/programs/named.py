"""Which stores a program of this folder works on: what the test wrote into ``stores.json``, as
arguments of ckpt's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def stores(folder: Path) -> dict[str, Any]:
    """``store``, ``storage_options``, ``write_quorum`` and what else is said there."""
    found: dict[str, Any] = json.loads((folder / "stores.json").read_text())
    return found


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A digest of tensors by name, exact to the bit."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].numpy().tobytes())
    return found.hexdigest()[:16]
