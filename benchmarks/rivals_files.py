"""One file a snapshot, written by the caller: torch.save and safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from contestant import Saving, State, finished, remove_tree, sync_tree
from safetensors import safe_open
from safetensors.torch import save_file


class TorchSave:
    """``torch.save`` of a flat dictionary; loads with ``mmap=True``, its quickest way."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder

    def save(self, step: int) -> Saving:
        path = self.folder / str(step)
        path.mkdir()
        torch.save(self.state.tensors, path / "state.pt")
        return Saving(finished(), fsync_s=sync_tree(path))

    def load(self, step: int) -> None:
        loaded = torch.load(self.folder / str(step) / "state.pt", mmap=True, weights_only=True)
        for name, tensor in self.state.tensors.items():
            tensor.copy_(loaded[name])

    def forget(self, step: int) -> None:
        remove_tree(self.folder / str(step))

    def close(self) -> None:
        pass


class Safetensors:
    """``safetensors``: writes through a memory map of its own; loads tensor by tensor from one."""

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder

    def save(self, step: int) -> Saving:
        path = self.folder / str(step)
        path.mkdir()
        save_file(self.state.tensors, path / "state.safetensors")
        return Saving(finished(), fsync_s=sync_tree(path))

    def load(self, step: int) -> None:
        with safe_open(self.folder / str(step) / "state.safetensors", framework="pt") as file:
            for name, tensor in self.state.tensors.items():
                tensor.copy_(file.get_tensor(name))

    def forget(self, step: int) -> None:
        remove_tree(self.folder / str(step))

    def close(self) -> None:
        pass
