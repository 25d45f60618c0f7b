from __future__ import annotations

from pathlib import Path

import torch

from ckpt.session.checkpointer import Checkpointer


def test_tracked_tensor_of_its_own_is_restored_and_readable(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "store")) as checkpointer:
        checkpointer.save(
            {"noise": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0)}, step=1
        )
    live = {"noise": torch.zeros(2, 3), "empty": torch.ones(0)}
    with Checkpointer(str(tmp_path / "store")) as checkpointer:
        checkpointer.restore(live)
        assert checkpointer.read("noise").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert checkpointer.verify().ok
    assert live["noise"].tolist() == [[0, 1, 2], [3, 4, 5]]
