"""One process of ``object_stores.py --state-gib``: raw transfers of a state's bytes, then its save
and restore, with memory.

Its log lies in a folder, since the gateway's versions up to 1.4.2 do not create a key only once;
packs, parts and manifests lie in the bucket.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from kit.servers.s3 import Bucket, Gateway
from object_stores import IN_FLIGHT, PACK_BYTES, open_with, raw_obstore, raw_s3fs, transfer

from ckpt import Checkpointer
from ckpt.backends.base import Backend, Buffer, Capabilities, Stat
from ckpt.backends.file.store import FileBackend

SAMPLE_S = 0.005
SLOTS = 1


class LogElsewhere:
    """A store whose few create-once keys lie in another one."""

    def __init__(self, bulk: Backend, log: Backend) -> None:
        self._bulk = bulk
        self._log = log
        self.url = bulk.url

    def capabilities(self) -> Capabilities:
        bulk = self._bulk.capabilities()
        return Capabilities(
            create_only=True,
            read_bytes_best=bulk.read_bytes_best,
            concurrency_best=bulk.concurrency_best,
        )

    def put(self, key: str, data: Sequence[Buffer], *, create_only: bool = False) -> None:
        self._of(key).put(key, data, create_only=create_only)

    def read_into(self, key: str, out: memoryview, *, offset_bytes: int = 0) -> None:
        self._of(key).read_into(key, out, offset_bytes=offset_bytes)

    def stat(self, key: str) -> Stat | None:
        return self._of(key).stat(key)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Stat]:
        return self._of(prefix).list(prefix, after=after)

    def delete(self, key: str) -> None:
        self._of(key).delete(key)

    def close(self) -> None:
        self._bulk.close()
        self._log.close()

    def _of(self, key: str) -> Backend:
        return self._bulk if key.startswith(("packs/", "parts/")) else self._log


def memory_bytes() -> tuple[int, int]:
    """This process's anonymous and shared memory."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["RssAnon"].split()[0]) << 10, int(facts["RssShmem"].split()[0]) << 10


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """What memory grew by at most while the block ran."""
    before, over = memory_bytes(), threading.Event()
    peak = {"anonymous": 0, "shared": 0}

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            now = memory_bytes()
            peak["anonymous"] = max(peak["anonymous"], now[0] - before[0])
            peak["shared"] = max(peak["shared"], now[1] - before[1])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Print one line of JSON."""
    word = json.loads(sys.argv[1])
    server = Gateway(Path(word["folder"]) / "not-started")
    server.port = word["port"]
    bucket = Bucket(server, word["bucket"])
    torch.set_num_threads(1)
    count = round(word["gib"] * (1 << 30) / PACK_BYTES)
    state = {
        f"w{number}": torch.randint(-(2**62), 2**62, (PACK_BYTES // 8,)) for number in range(count)
    }
    views = [memoryview(tensor.view(torch.uint8).numpy()) for tensor in state.values()]
    sums = [int(tensor.sum()) for tensor in state.values()]

    store = LogElsewhere(
        open_with(bucket, word["client"]), FileBackend(Path(word["folder"]) / "log")
    )
    checkpointer = Checkpointer(store, slots=SLOTS, compression="off")
    checkpointer.prepare({"state": state})
    # Slots are pre-faulted beside what follows, as beside a program's first steps.
    raw = raw_obstore(bucket) if word["client"] == "obstore" else raw_s3fs(bucket)
    keys = [f"raw/{number}" for number in range(count)]
    transfer(raw.put, keys[:IN_FLIGHT], views[:IN_FLIGHT])
    found: dict[str, float] = {"raw_put_s": transfer(raw.put, keys, views)}
    found["raw_get_s"] = transfer(raw.get, keys, views)
    client = server.client()
    for key in keys:
        client.delete_object(Bucket=bucket.name, Key=key)

    with watched() as memory:
        start = time.perf_counter()
        pending = checkpointer.save_async({"state": state}, step=1)
        found["blocked_s"] = time.perf_counter() - start
        pending.durable()
        found["save_s"] = time.perf_counter() - start
    found["save_extra"] = memory["anonymous"]
    found["slots"] = memory_bytes()[1]
    for tensor in state.values():
        tensor.zero_()
    with watched() as memory:
        start = time.perf_counter()
        checkpointer.restore({"state": state})
        found["restore_s"] = time.perf_counter() - start
    found["restore_extra"] = memory["anonymous"]
    checkpointer.close()
    if sums != [int(tensor.sum()) for tensor in state.values()]:
        sys.exit("wrong bytes came back")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
