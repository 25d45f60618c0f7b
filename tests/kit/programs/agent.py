"""An agent as a process of its own, which can be killed: it rendezvous, and again whenever it is
asked back.

    python agent.py ENDPOINT JOB NODES_MIN NODES_MAX CONFIG_JSON

Says a JSON line for each round that it is in, and one for each line that it reads: what it knows.
Ends when nobody writes.
"""

from __future__ import annotations

import json
import os
import select
import sys

from torch.distributed.elastic.rendezvous.api import RendezvousParameters

from ckpt.elastic.rendezvous.plugin import handler_of


def say(**fields: object) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


endpoint, job, nodes_min, nodes_max, config = sys.argv[1:]
handler = handler_of(
    RendezvousParameters(
        "ckpt", endpoint, job, int(nodes_min), int(nodes_max), **json.loads(config)
    )
)
say(ready=True)
while True:
    info = handler.next_rendezvous()
    say(rank=info.rank, world=info.world_size, pid=os.getpid())
    while handler.num_nodes_waiting() == 0:
        if select.select([0], [], [], 0.05)[0]:
            if not os.read(0, 100):
                sys.exit(0 if handler.shutdown() else 1)
            agent = handler._agent
            look = agent.latest_view()
            leads = (
                look is not None
                and look.view.leader is not None
                and look.view.leader.node == agent._node
            )
            say(leads=leads, fresh=0 if look is None else len(look.newcomers))
    say(asked=True)
