"""A process that is frozen while it leads, until its lease has run out, and then goes on where it
was."""

from __future__ import annotations

import signal
import subprocess
import sys

from ckpt.cluster.membership.member import KeyspaceMembership
from kit.membership.keyspace_contract import DEADLINE_S
from kit.membership.members_contract import open_epoch

PROGRAM = """
import sys
from pathlib import Path
from ckpt.errors import CkptError
from ckpt.keyspace.address import EtcdOptions
from ckpt.cluster.membership.member import boottime_s
from ckpt.cluster.membership.open import open_membership
from ckpt.cluster.membership.records import EpochRecord, NodeInfo, NodePlacement

where, job, ttl_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
where = Path(where) if where.startswith("/") else EtcdOptions(endpoints=tuple(where.split(",")))
member = open_membership(where, job, ttl_s=ttl_s)
member.join(NodeInfo(node="zombie", host="z", slots=1))
leading = member.lead()
view = member.view()
print(type(leading).__name__, flush=True)  # who freezes it now freezes it outside its transactions, but for a keepalive's
record = EpochRecord(job=job, number=9, places=(NodePlacement("zombie", 1),), leader="zombie", nodes_min=1, nodes_max=1)
sys.stdin.readline()
print("acts" if boottime_s() < member.lease_status().act_until_s else "stopped", flush=True)
print(type(member.publish(record, view)).__name__, flush=True)
try:
    print(type(member.lead()).__name__, flush=True)
except CkptError as error:
    print(type(error).__name__, flush=True)
while member.lease_status().state.value != "lost":
    pass
print("lost", flush=True)
"""


def zombie_is_refused(where: str, other: KeyspaceMembership, job: str, *, ttl_s: float) -> None:
    """``where``: endpoints, or a file. ``other`` is another member of the job."""
    zombie = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, where, job, str(ttl_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        start_new_session=True,  # see kit.servers.process: it is stopped
    )
    assert zombie.stdin is not None and zombie.stdout is not None
    try:
        assert zombie.stdout.readline() == "Leading\n"
        zombie.send_signal(signal.SIGSTOP)
        view = other.view()
        while "zombie" in view.by_node:
            other.wait_change(view.revision, timeout_s=DEADLINE_S)
            view = other.view()
        record = open_epoch(other, other.keepalive.ticket.node)
        zombie.stdin.write("\n")
        zombie.send_signal(signal.SIGCONT)
        answers = [zombie.stdout.readline().strip() for _ in range(4)]
        assert answers == ["stopped", "NotPublished", "FencedError", "lost"]
        assert other.view().epoch == record
        assert zombie.wait(DEADLINE_S) == 0
    finally:
        zombie.kill()
        zombie.wait()
        zombie.stdin.close()
        zombie.stdout.close()
