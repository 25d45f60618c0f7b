"""Reads the newest snapshot of ``save_and_die.py`` in a fresh process: ``python read_back.py
FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from little import digest

import ckpt

FOLDER = Path(sys.argv[1])


def main() -> None:
    checkpointer = ckpt.Checkpointer(str(FOLDER / "store"))
    newest = checkpointer.latest()
    assert newest is not None
    assert checkpointer.verify().ok
    assert checkpointer.read("step").tolist() == [newest.step]
    found = {"step": newest.step, "weights": digest(checkpointer.read("weights"))}
    (FOLDER / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
