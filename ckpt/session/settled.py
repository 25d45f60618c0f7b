"""Before a store is read: let a keeper that nobody uses any more finish what the last run left staged.

Only looks, as a tool does: reading must not become a launch, and must not take a lingering keeper's slots from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ckpt.errors import CkptError, UsageError
from ckpt.events import Event, Tell
from ckpt.ipc.answers import Status
from ckpt.ipc.client import Calls, KeeperSpec
from ckpt.ipc.frames import Wire
from ckpt.ipc.messages import WIRE_VERSION, GetStatus, Hello
from ckpt.ipc.report import Report
from ckpt.ipc.runtime_dir import JobFolder
from ckpt.values import SnapshotId

SETTLE_WAIT_S = 60.0
"""How long reading waits for it; then the store is read as it is."""

ANSWER_S_MAX = 5.0
LOOK_S = 0.1

LINGERING = "lingering"
"""The state of a keeper to which nobody is connected."""


def await_settled(
    spec: KeeperSpec, tell: Tell, *, has: Callable[[SnapshotId], bool], timeout_s: float | None = None
) -> None:
    """Wait, ``timeout_s`` seconds at most (None: SETTLE_WAIT_S), until the job's keeper has made durable what it holds.

    Returns at once where no keeper lives or a run uses it. ``has`` says whether the store has a snapshot already: a keeper that
    took over from another one doesn't know. Raises nothing: what is not durable then isn't read.
    """
    calls = _call(spec)
    if calls is None:
        return
    wait_s = SETTLE_WAIT_S if timeout_s is None else timeout_s
    until_s = time.monotonic() + wait_s
    told = False
    try:
        calls.call(Hello(version=WIRE_VERSION, role="tool", pid=os.getpid()), timeout_s=ANSWER_S_MAX)
        while True:
            report = calls.ask(GetStatus(), Status, timeout_s=ANSWER_S_MAX).report
            left = unsettled(report)
            if report is None or left is None:
                return
            if time.monotonic() > until_s:
                text = f"{left} is not durable after {wait_s:.0f} s, the store is read without it. store={spec.store}"
                tell(Event("unsettled", text, {"waited_s": wait_s}, alarm=True))
                return
            if not told:
                if not report.uploads and report.complete is not None and has(report.complete):
                    return
                told = True
                tell(Event("settling", f"waiting until {left} of the last run is durable, at most {wait_s:.0f} s"))
            time.sleep(LOOK_S)
    except (CkptError, OSError) as error:  # it ended, or is of another release: the store has what is durable
        tell(Event("keeper-silent", f"the last run's keeper says nothing, the store is read as it is: {error}"))
    finally:
        calls.close()


def unsettled(report: Report | None) -> str | None:
    """What a keeper that nobody uses still brings to the store, in words; None where there is nothing, or somebody uses it."""
    if report is None or report.state != LINGERING:
        return None
    durable = report.durable.id if report.durable is not None else None
    if report.complete is not None and (durable is None or report.complete > durable):
        return f"the snapshot of {report.complete}"
    return f"what is being uploaded ({report.uploads})" if report.uploads else None


def _call(spec: KeeperSpec) -> Calls | None:
    try:
        found = JobFolder(spec.store, spec.job).try_connect()
    except UsageError:  # a folder that can't be trusted has no keeper of ours
        return None
    return Calls(Wire(found)) if found is not None else None
