"""``python -m ckpt.keeper FOLDER``: the keeper of the job whose specification is on standard input.

The first process exits as soon as the socket listens, with 0, or with 3 if another keeper holds the
job's lock. The keeper itself continues in a session of its own. Its output goes where the
caller directed it: the log of the job's folder.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.events import emit_to_logging
from ckpt.ipc.client import KeeperSpec
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.keeper.process import KeeperListener

if TYPE_CHECKING:
    from ckpt.keeper.daemon import Daemon

LOCKED_STATUS = 3


def main() -> int:
    """Run a keeper; returns the exit status."""
    spec = KeeperSpec.decode(sys.stdin.buffer.read())
    listener = KeeperListener.acquire(spec, JobFolder.at(Path(sys.argv[1])))
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
        daemon(spec, listener, incarnation=os.urandom(8).hex(), emit=emit_to_logging(-1)).run()
    finally:
        listener.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
