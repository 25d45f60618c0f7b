"""``python -m ckpt.keeper FOLDER [ESTATE]``: the keeper of the job whose specification is on
standard input. ESTATE: what it takes over from the keeper that started it.

The first process exits as soon as the socket listens, with 0, or with 3 if another keeper holds the
job's lock. The keeper itself continues in a session of its own. Its output goes where the
caller directed it: the log of the job's folder.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ckpt.events import emit_to_logging
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.keeper.process import KeeperListener

if TYPE_CHECKING:
    from ckpt.keeper.daemon import Daemon
    from ckpt.keeper.slots import Estate

LOCKED_STATUS = 3
FAILED_STATUS = 70


def main() -> int:
    """Run a keeper; returns the exit status."""
    spec = KeeperSpec.decode(sys.stdin.buffer.read())
    folder, estate, listener = JobFolder.at(Path(sys.argv[1])), None, None
    if len(sys.argv) > 2:
        kind: type[Estate] = import_module("ckpt.keeper.slots").Estate
        estate = msgspec.json.decode(sys.argv[2], type=kind)
        for fd in estate.fds:
            os.set_inheritable(fd, False)
        # Before the keeper that holds all this ends: it goes on if this one can't begin.
        import_module("ckpt.keeper.daemon")
        listener = KeeperListener(spec, folder, estate.lock)
    else:
        listener = KeeperListener.acquire(spec, folder)
    if listener is None:
        return LOCKED_STATUS
    listener.describe()
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A node that is shut down ends its trainers too, and they end the job.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener.describe()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        # Imported only now: the client that waits for the first process to exit connects meanwhile.
        daemon: type[Daemon] = import_module("ckpt.keeper.daemon").Daemon
        daemon(
            spec,
            listener,
            incarnation=os.urandom(8).hex(),
            emit=emit_to_logging(-1),
            estate=estate,
        ).run()
    except Exception:  # noqa: BLE001  the border of a process
        # Into the log, while there is one: the folder goes next, and its log is kept.
        traceback.print_exc()
        sys.stderr.flush()
        return FAILED_STATUS
    finally:
        listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
