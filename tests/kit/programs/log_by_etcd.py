"""Begins a job's log on several folders whose places etcd gives out, as on stores that can't create
an object only once.

CKPT_SEQUENCER=etcd://HOST:PORT,… python log_by_etcd.py JOB FOLDER FOLDER …
"""

from __future__ import annotations

import sys
from dataclasses import replace

from ckpt.backends.base import Capabilities
from ckpt.backends.file.store import FileBackend
from ckpt.backends.replicated.open import open_stores
from ckpt.log.journal import Journal

_able = FileBackend.capabilities


def unable(self: FileBackend) -> Capabilities:
    """What a store says that may overwrite."""
    return replace(_able(self), create_only=False)


def main(job: str, folders: list[str]) -> None:
    FileBackend.capabilities = unable  # type: ignore[method-assign]
    backend = open_stores(folders, emit=lambda event: None)
    state = Journal.open(backend, job=job, create=True).refresh()
    assert state.stores is not None
    print(state.stores.sequencer)
    backend.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
