"""Saves with a plain ``Checkpointer``, and is gone by SIGKILL right after the last ``save_async``
returned.

    python save_and_die.py FOLDER SEED

Writes what the last snapshot must hold to ``saved.json`` before it saves it, and overwrites the
tensors afterwards.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from little import digest

import ckpt

FOLDER, CHANCE = Path(sys.argv[1]), random.Random(sys.argv[2])


def main() -> None:
    torch.manual_seed(CHANCE.randrange(1 << 30))
    elements = CHANCE.choice([1_000, 1_000_000, 12_000_000])
    state = {"weights": torch.empty(elements), "step": torch.zeros(1, dtype=torch.long)}
    checkpointer = ckpt.Checkpointer(str(FOLDER / "store"))
    last = CHANCE.randint(1, 3)
    for step in range(1, last + 1):
        state["weights"].normal_()
        state["step"].fill_(step)
        if step == last:
            (FOLDER / "saved.json").write_text(
                json.dumps({"step": step, "weights": digest(state["weights"])})
            )
        checkpointer.save_async(state, step=step)
    state["weights"].zero_()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
