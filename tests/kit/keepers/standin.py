"""A keeper that only tells its status, in a job's folder and on its real socket; and reports for it
to tell."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

from ckpt.errors import UsageError
from ckpt.ipc.frames import MessageSocket
from ckpt.ipc.messages import (
    WIRE_VERSION,
    Done,
    GetStatus,
    Hello,
    KeeperReport,
    RankReport,
    SlotReport,
    Status,
    StoreBehind,
    Welcome,
    from_error,
)
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.values import SnapshotId, SnapshotInfo

STORE = "file:///runs/a"
RECOVERY = {
    "attempt": 2,
    "why": "rank 1 died of SIGKILL",
    "resumed": 118,
    "steps_lost": 2,
    "seconds": 0.512,
    "detect_s": 0.002,
    "kill_s": 0.012,
    "restore_s": 0.3,
}


def rank_report(rank: int, *, completed: int = 120, trainer_pid: int = 0) -> RankReport:
    return RankReport(
        rank=rank,
        supervisor_pid=4000 + rank,
        trainer_pid=trainer_pid or 5000 + rank,
        completed=completed,
        phase="training",
        idle_s=0.25,
        staged=12,
        skipped=1,
        slots=(
            SlotReport(index=0, size_bytes=1 << 20, snapshot=SnapshotId(5, 119), held=True),
            SlotReport(index=1, size_bytes=1 << 20, snapshot=SnapshotId(5, 120), held=False),
            SlotReport(index=2, size_bytes=1 << 20, snapshot=None, held=False),
        ),
    )


def job_report(job: str = "demo", *, completed: int = 120, attempt: int = 2) -> KeeperReport:
    return KeeperReport(
        job=job,
        store=STORE,
        pid=os.getpid(),
        boot="b00t",
        launch="l1",
        attempt=attempt,
        epoch=5,
        state="running",
        since_s=75.0,
        complete=SnapshotId(5, 119),
        durable=SnapshotInfo(
            epoch=5,
            step=100,
            world_size=2,
            size_bytes=900,
            new_bytes=90,
            created_unix_s=1.7e9,
            tags=("best",),
        ),
        uploads=1,
        slot_bytes=6 << 20,
        rss_bytes=40 << 20,
        ranks=(rank_report(0, completed=completed), rank_report(1, completed=completed)),
        recoveries=(RECOVERY,),
        mirror_bytes=12345,
        refused={"mac": 3, "line": 1},
        behind=(StoreBehind(store="s3://b/run", objects=7),),
    )


def folder_of(job: str = "demo", store: str = STORE) -> JobFolder:
    return JobFolder(store, job)


class StandIn:
    """A keeper that knows nothing but what to answer: the n-th question gets the n-th report, then
    always the last.

    It ends by itself before it would answer question ``answers_max``; ``on_end`` then runs once its
    lock is free.
    """

    def __init__(
        self,
        folder: JobFolder,
        *reports: KeeperReport | None,
        mute: bool = False,
        refuses: bool = False,
        answers_max: int | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        lock = folder.try_lock()
        assert lock is not None
        self._reports = reports
        self._mute, self._refuses, self._answers_max, self._on_end = (
            mute,
            refuses,
            answers_max,
            on_end,
        )
        self._asked = 0
        self._wires: list[MessageSocket] = []
        self._lock = lock
        named = next((one for one in reports if one is not None), job_report())
        folder.write_info(named.store, named.job)
        self._listener = folder.listen()
        self.roles: list[str] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        shut(self._listener)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            while not self._over():
                try:
                    peer, _ = self._listener.accept()
                except OSError:
                    return
                self._wires.append(MessageSocket(peer))
                if not self._mute:
                    self._answer(self._wires[-1])
        finally:
            for wire in self._wires:
                wire.close()
            self._listener.close()
            os.close(self._lock)
            self._on_end()

    def _over(self) -> bool:
        return self._answers_max is not None and self._asked >= self._answers_max

    def _answer(self, wire: MessageSocket) -> None:
        while not self._over() and (received := wire.receive(10)) is not None:
            match received[0]:
                case Hello(id=call_id, version=version, role=role):
                    assert version == WIRE_VERSION
                    self.roles.append(role)
                    if self._refuses:
                        refusal = from_error(
                            UsageError("this keeper is of another version."), rank=0
                        )
                        wire.send(Done(id=call_id, error=refusal))
                    else:
                        wire.send(Welcome(id=call_id, boot="b00t", pid=os.getpid(), attempt=2))
                case GetStatus(id=call_id):
                    report = self._reports[min(self._asked, len(self._reports) - 1)]
                    self._asked += 1
                    wire.send(Status(id=call_id, report=report))


def shut(listener: socket.socket) -> None:
    """Wake whoever waits in ``accept``."""
    if listener.fileno() >= 0:
        listener.shutdown(socket.SHUT_RDWR)


def dead_folder(job: str) -> JobFolder:
    """What a keeper leaves that was killed."""
    folder = folder_of(job)
    lock = folder.try_lock()
    assert lock is not None
    folder.listen().close()
    folder.write_info(STORE, job)
    os.close(lock)
    return folder
