"""PyTorch's own distributed checkpointing (DCP), as it comes and tuned. It calls fsync on its files
itself."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contestant import Saving, State, finished, remove_tree
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse


class Dcp:
    """``dcp.save`` with one thread, the default."""

    threads = 1

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder

    def save(self, step: int) -> Saving:
        dcp.save(self.state.tensors, storage_writer=self.writer(step), no_dist=True)
        return Saving(finished())

    def load(self, step: int) -> None:
        dcp.load(self.state.tensors, checkpoint_id=self.folder / str(step), no_dist=True)

    def forget(self, step: int) -> None:
        remove_tree(self.folder / str(step))

    def close(self) -> None:
        pass

    def writer(self, step: int) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.folder / str(step), thread_count=self.threads)


class Dcp2(Dcp):
    """``dcp.save`` with two writer threads."""

    threads = 2


class DcpAsync(Dcp):
    """``dcp.async_save`` as it comes: copies into fresh memory, then saves in a thread."""

    def save(self, step: int) -> Saving:
        return Saving(
            durable(
                dcp.async_save(
                    self.state.tensors, checkpoint_id=self.folder / str(step), no_dist=True
                )
            )
        )


class DcpAsyncTuned(Dcp):
    """``dcp.async_save`` with a stager that reuses its shared (on CUDA: pinned) memory, and two
    writer threads."""

    threads = 2
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=torch.cuda.is_available(),
            )
        )

    def save(self, step: int) -> Saving:
        response = dcp.async_save(
            self.state.tensors,
            storage_writer=self.writer(step),
            async_stager=self.stager,
            async_checkpointer_type=self.kind,
            no_dist=True,
        )
        return Saving(durable(response))

    def close(self) -> None:
        self.stager.close()


class DcpProcess(DcpAsyncTuned):
    """The same, saved by a process of its own. Its daemon insists on a process group, here of one
    rank."""

    kind = AsyncCheckpointerType.PROCESS

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()


def durable(response: Future[object] | AsyncSaveResponse) -> Future[None]:
    return response.upload_completion if isinstance(response, AsyncSaveResponse) else response
