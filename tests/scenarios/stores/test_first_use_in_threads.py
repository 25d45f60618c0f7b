from __future__ import annotations

import subprocess
import sys

import pytest

RACE = """
import os, sys, threading
sys.setswitchinterval(1e-6)
from ckpt.format.records import Commit, decode_record, make_record
from ckpt.values import SnapshotId

body = Commit(SnapshotId(1, 1), "0" * 32, None)
data = make_record(body, job="j", seq=0, epoch=1, write_id="a", prev="").encode()
for turn in range(30):
    pid = os.fork()
    if pid == 0:
        gate = threading.Barrier(8)
        def go():
            gate.wait()
            decode_record(data)
        threads = [threading.Thread(target=go) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise SystemExit(f"a reader died: {status}")
"""


@pytest.mark.slow
def test_first_records_read_by_many_threads_at_once_do_not_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
