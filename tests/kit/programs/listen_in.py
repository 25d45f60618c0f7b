"""Listens in on all links of this network namespace, and says in how many packets state could be
read.

    python listen_in.py FILE

The ballast of ``little.py`` is one number over and over: bytes that repeat every four, and are not
all zero. Nothing that is encrypted looks so. FILE gets ``{"packets": N, "clear": M}`` when SIGTERM
comes; it is there, with zeros, once this listens.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

ETH_P_ALL = 3
RUN_BYTES = 256
LOOK_EVERY = 128


def repeats(packet: bytes) -> bool:
    """Whether a run of it is one four-byte number over and over, other than zero."""
    for at in range(0, len(packet) - RUN_BYTES, LOOK_EVERY):
        if packet[at : at + RUN_BYTES - 4] == packet[at + 4 : at + RUN_BYTES] and any(
            packet[at : at + 4]
        ):
            return True
    return False


def main(path: Path) -> None:
    packets = clear = 0

    def say() -> None:
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps({"packets": packets, "clear": clear}))
        draft.replace(path)

    def end(*_: object) -> None:
        say()
        sys.exit(0)

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as sock:
        signal.signal(signal.SIGTERM, end)
        say()
        while True:
            packet = sock.recv(1 << 17)
            packets += 1
            clear += repeats(packet)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
