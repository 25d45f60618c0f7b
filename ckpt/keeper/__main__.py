"""``python -m ckpt.keeper FOLDER``: the keeper of the job whose specification comes on standard input.

The first process ends as soon as the socket listens, with 0, or with 3 where another keeper holds the job's lock; the keeper
itself goes on in a session of its own. Its output goes where the caller sent it: the job folder's log.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from pathlib import Path

from ckpt.keeper.daemon import Daemon
from ckpt.link.client import KeeperSpec
from ckpt.link.runtime import JobFolder
from ckpt.observe.events import to_logging

LOCKED_STATUS = 3


def main() -> int:
    """See the module."""
    spec = KeeperSpec.decode(sys.stdin.buffer.read())
    folder = JobFolder.at(Path(sys.argv[1]))
    lock = folder.try_lock()
    if lock is None:
        return LOCKED_STATUS
    listener = folder.listen()
    folder.describe(spec.store, spec.job)
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever ends a node ends its trainers first, and they end the job
    folder.describe(spec.store, spec.job)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        Daemon(spec, folder, listener, boot=secrets.token_hex(8), tell=to_logging(-1)).run()
    finally:
        listener.close()
        folder.remove()
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
