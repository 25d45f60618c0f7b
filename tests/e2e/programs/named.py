"""Which stores a program of this folder works on: what the test wrote into ``stores.json``, as arguments of ckpt's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def stores(folder: Path) -> dict[str, Any]:
    """``store``, ``storage_options``, ``write_quorum`` and what else is said there."""
    found: dict[str, Any] = json.loads((folder / "stores.json").read_text())
    return found
