"""Where each fact of a job lies below ``/ckpt/<job>/``. Pure.

epoch                      the newest epoch's record                            no lease
leader                     the id of the node that leads                        its node's lease
nodes/<id>                 what a node says of itself                           its lease
said/<fact>/<id>           what it says besides: ``holdings``, ``agent.x``      its lease
suspects/<id>/<by>         a witness's word                                     the witness's lease
"""

from __future__ import annotations

import re

from ckpt.cluster.membership.records import node_ok
from ckpt.errors import UsageError
from ckpt.keyspace.base import Keys

EPOCH = "epoch"
LEADER = "leader"
NODES = "nodes/"
SAID = "said/"
SUSPECTS = "suspects/"
HOLDINGS = "holdings"

_FACT_RE = re.compile(r"[0-9A-Za-z_.-]{1,100}", re.ASCII)


def under(prefix: str, *, values: bool = True) -> Keys:
    """All keys that begin with ``prefix``, which ends with a slash."""
    return Keys(prefix, prefix[:-1] + "0", values)  # "0" follows "/"


HEAD_KEYS = (Keys(EPOCH, LEADER + "\0"),)
"""Epoch and leader, and nothing else: no other name lies between."""
ALL_KEYS = (*HEAD_KEYS, under(NODES), under(f"{SAID}{HOLDINGS}/"), under(SUSPECTS))


def node_key(node: str) -> str:
    """Where a node says what it is."""
    return NODES + node


def agent_fact(agent: str) -> str:
    """What a node says to let that agent live under its lease. Raises UsageError for a name that can't be one."""
    if not node_ok(agent):
        raise UsageError(f"not the name of an agent (1 to 64 of 0-9 a-z A-Z _ -). agent={agent[:80]!r}")
    return f"agent.{agent}"


def said_key(fact: str, node: str) -> str:
    """Where a node says a fact. Raises UsageError for a name that can't be one."""
    return f"{said_by_all(fact).start}{node}"


def said_by_all(fact: str) -> Keys:
    """Where all nodes say it. Raises UsageError for a name that can't be one."""
    if not _FACT_RE.fullmatch(fact):
        raise UsageError(f"not the name of a fact (1 to 100 of 0-9 a-z A-Z _ . -). fact={fact[:120]!r}")
    return under(f"{SAID}{fact}/")


def suspect_key(node: str, by: str) -> str:
    """Where ``by`` says that it suspects ``node``."""
    if not node_ok(node):
        raise UsageError(f"not a node id. node={node[:80]!r}")
    return f"{SUSPECTS}{node}/{by}"
